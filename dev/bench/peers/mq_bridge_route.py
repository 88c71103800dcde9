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
    # The librdkafka settings that make a difference: as falaj's, and without compression, as falaj's default.
    tuned = {"acks": "all", "linger.ms": "20", "batch.size": "1048576", "batch.num.messages": "10000"}
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
    # Parquet: one file a batch, so the larger the better.
    batch_size = {"kafka": 1024, "parquet": 16384}[kind]
    route = mq_bridge.Route.from_config(
        {"input": {"postgres_cdc": source}, "output": output(kind, target), "batch_size": batch_size}
    )
    signal.signal(signal.SIGTERM, lambda *_: mq_bridge.request_shutdown())
    route.start()
    route.join()


main()
