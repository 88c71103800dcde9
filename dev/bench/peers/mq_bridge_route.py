"""One mq-bridge route from a replication slot to Kafka or to Parquet files, until SIGTERM.

usage: mq_bridge_route.py kafka|parquet SLOT TARGET
"""

import logging
import os
import signal
import sys

import mq_bridge


def output(kind, target):
    if kind == "parquet":
        return {"object_store": {"url": f"file://{target}", "format": "parquet"}}
    # Compression as falaj. A batch has to be delivered before the next one is read, so a long linger costs more than it
    # brings: batches of 1,024 made 37,000 rows/s with 20 ms, and 96,000 with 1 ms.
    tuned = {
        "acks": "all",
        "linger.ms": "5",
        "batch.size": "1048576",
        "batch.num.messages": "10000",
        "compression.type": "lz4",
    }
    return {
        "kafka": {
            "url": os.environ["FALAJ_KAFKA__BOOTSTRAP_SERVERS"],
            "topic": target,
            "create_topic": False,
            # Its default, a hash of the change, would scatter the changes of one row over the partitions.
            "partition_key": "postgres.key",
            "producer_options": [[key, value] for key, value in tuned.items()],
        }
    }


def main():
    kind, slot, target = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    mq_bridge.init_logging("info")
    source = {
        "url": os.environ["FALAJ_POSTGRES__URL"],
        "publication": "falaj",
        "slot_name": slot,
        "create_slot": False,
        "status_interval_ms": 200,
    }
    # The fastest of 1,024, 4,096 and 16,384 to Kafka, and of 4,096 to 262,144 to Parquet, where each batch is a file.
    batch_size = 4096
    route = mq_bridge.Route.from_config(
        {"input": {"postgres_cdc": source}, "output": output(kind, target), "batch_size": batch_size}
    )
    signal.signal(signal.SIGTERM, lambda *_: mq_bridge.request_shutdown())
    route.start()
    route.join()


main()
