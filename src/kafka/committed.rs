//! A topic from its beginning to its end, as a read_committed reader sees it. Blocking.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::{Message, Offset, TopicPartitionList};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::{TIMEOUT, client, error, no_topics, partitions, transaction_timeout};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::world::go_on;

/// A producer that has died leaves a transaction open until its timeout, and the broker looks for such every ten seconds.
const LOOKS_EVERY: Duration = Duration::from_secs(10);
/// How often it is looked for, and after how long a reader is told.
const STEP: Duration = Duration::from_millis(10);
const SILENT: Duration = Duration::from_secs(1);

/// Reads all that was committed at the call, value by value with partition and offset; tombstones, which are no events, are passed
/// over.
///
/// # Errors
/// [`Error::Refused`] for a topic that is not there; [`Error::Unreachable`] when no broker answers, or when a transaction stays open
/// for longer than falaj's own ever do; [`Error::Fatal`] once `stop` is cancelled; those of `each`.
pub fn read_committed(
    config: &Config,
    topic: &str,
    stop: &CancellationToken,
    mut each: impl FnMut(i32, i64, &[u8]) -> Result<()>,
) -> Result<()> {
    let failed = |e: KafkaError| error(&config.kafka, &e);
    let Some(count) = partitions(&config.kafka, topic)? else { return Err(no_topics(&[topic])) };
    let reader: BaseConsumer = settings(config, "read_committed").create().map_err(failed)?;
    let mut ends: BTreeMap<i32, i64> = (0..).zip(settle(config, &reader, topic, count as i32, stop)?).collect();
    let mut list = TopicPartitionList::new();
    for partition in 0..count as i32 {
        list.add_partition_offset(topic, partition, Offset::Beginning).map_err(failed)?;
    }
    reader.assign(&list).map_err(failed)?;
    ends.retain(|_, end| *end > 0);
    while !ends.is_empty() {
        go_on(stop)?;
        // The last offsets may be of no record but of a transaction's mark: then the partition's end is told instead, or, where
        // others write on and on, the next record.
        let ended = match reader.poll(TIMEOUT) {
            Some(Ok(message)) => {
                let (partition, offset) = (message.partition(), message.offset());
                let Some(end) = ends.get(&partition) else { continue };
                if let Some(value) = message.payload().filter(|_| offset < *end) {
                    each(partition, offset, value)?;
                }
                (offset + 1 >= *end).then_some(partition)
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => Some(partition),
            Some(Err(e)) => return Err(failed(e)),
            None => return Err(Error::unreachable(kafka_at(config), "no answer to a fetch")),
        };
        if let Some(partition) = ended {
            ends.remove(&partition);
            let mut list = TopicPartitionList::new();
            list.add_partition(topic, partition);
            reader.pause(&list).map_err(failed)?;
        }
    }
    Ok(())
}

/// Waits for the transactions that are open now, and gives the end of each partition at the call. A broker answers a commit before each partition has its mark: what a checkpoint
/// says is committed may not be readable everywhere yet, and would seem to be missing.
///
/// # Errors
/// [`Error::Unreachable`] when no broker answers, or when a transaction stays open for longer than falaj's own ever do;
/// [`Error::Fatal`] once `stop` is cancelled.
pub fn settle(
    config: &Config,
    reader: &BaseConsumer,
    topic: &str,
    count: i32,
    stop: &CancellationToken,
) -> Result<Vec<i64>> {
    let failed = |e: KafkaError| error(&config.kafka, &e);
    let all: BaseConsumer = settings(config, "read_uncommitted").create().map_err(failed)?;
    let end = |of: &BaseConsumer, p| Ok::<_, Error>(of.fetch_watermarks(topic, p, TIMEOUT).map_err(failed)?.1);
    let ends = (0..count).map(|p| end(&all, p)).collect::<Result<Vec<_>>>()?;
    let (since, mut told) = (Instant::now(), false);
    let longest = transaction_timeout(&config.kafka) + LOOKS_EVERY;
    for (partition, &written) in (0..).zip(&ends) {
        // With read_committed the end is that of what no open transaction holds back.
        while end(reader, partition)? < written {
            go_on(stop)?;
            if since.elapsed() > longest {
                let why = format!(
                    "{topic}, partition {partition}: a transaction before offset {written} has been open for {} s; \
                     kafka-transactions.sh find-hanging shows whose",
                    longest.as_secs()
                );
                return Err(Error::unreachable(kafka_at(config), why));
            }
            if !told && since.elapsed() > SILENT {
                told = true;
                info!(topic, partition, "waiting for open transactions");
            }
            std::thread::sleep(STEP);
        }
    }
    // Its threads take a tenth of a second to end, which nobody has to wait for.
    std::thread::spawn(|| drop(all));
    Ok(ends)
}

fn settings(config: &Config, isolation: &str) -> ClientConfig {
    let mut settings = client(&config.kafka);
    settings.set("group.id", format!("{}.verify", config.pipeline)).set("isolation.level", isolation);
    settings.set("enable.auto.commit", "false").set("enable.partition.eof", "true").set("auto.offset.reset", "error");
    settings
}

fn kafka_at(config: &Config) -> String {
    format!("Kafka at {}", config.kafka.servers())
}
