//! How far the readers of the events' topic are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{Offset, TopicPartitionList};
use serde::Serialize;

use crate::config::Config;
use crate::consume::redis::{Claim, FROM_ARCHIVE, Store};
use crate::error::{Error, Result};
use crate::kafka;

/// The table that both outlets of `consume` read.
const TABLE: &str = "engagement_events";
/// How long one question may take; less than a part's patience, so that its own error is told.
const TIMEOUT: Duration = Duration::from_secs(4);

/// A reader of a topic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reader {
    /// The topic.
    pub topic: String,
    /// Each of its partitions.
    pub partitions: Vec<ReaderAt>,
    /// The sum over the partitions.
    pub lag_records: i64,
}

/// A reader in one partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReaderAt {
    /// Number of the partition.
    pub partition: i32,
    /// The next offset to read; `null` before the first.
    pub offset: Option<i64>,
    /// The last stable offset: everything below is readable.
    pub end: i64,
    /// What lies between, marks of transactions included: a reader that is done may show one or two.
    pub lag_records: i64,
}

/// What feeds the board: the offsets lie in Redis, beside the counts.
pub(super) async fn board(config: &Arc<Config>) -> Result<Reader> {
    let Claim { offsets, replaced: source, .. } = Store::new(config)?.look().await?;
    if source.as_deref() == Some(FROM_ARCHIVE) {
        return Err(Error::Fatal(
            "falaj replay has rebuilt it from the archive; falaj consume goes on from Kafka".into(),
        ));
    }
    // Asked for later, so that no reader is ahead of the end.
    let (topic_id, ends) = ask(config, |consumer, topic| {
        let ends = ends(&consumer, topic, &partitions(&consumer, topic)?)?;
        Ok((kafka::topic_id(consumer.client(), topic, TIMEOUT)?, ends))
    })
    .await?;
    if source.is_some_and(|source| source != topic_id) {
        return Err(Error::Fatal("the board is of another topic: consume rebuilds it".into()));
    }
    match beyond(&offsets, &ends) {
        Some(why) => Err(Error::Fatal(why)),
        None => Ok(reader(config, &offsets, ends)),
    }
}

/// Why no lag can be told: the board has counted what the topic does not have (any more).
fn beyond(offsets: &BTreeMap<i32, i64>, ends: &Ends) -> Option<String> {
    let (partition, offset, end) = offsets.iter().find_map(|(partition, offset)| {
        let (_, end) = ends.get(partition)?;
        (offset > end).then_some((partition, offset, end))
    })?;
    Some(format!("partition {partition}: counted to offset {offset}, the topic ends at {end}: consume rebuilds it"))
}

/// What feeds the outside system: the offsets are those of a consumer group.
pub(super) async fn external(config: &Arc<Config>) -> Result<Reader> {
    let (offsets, ends) = ask(config, |consumer, topic| {
        let partitions = partitions(&consumer, topic)?;
        let offsets = committed(&consumer, topic, &partitions)?;
        Ok((offsets, ends(&consumer, topic, &partitions)?))
    })
    .await?;
    Ok(reader(config, &offsets, ends))
}

/// First and last stable offset by partition.
type Ends = BTreeMap<i32, (i64, i64)>;

fn reader(config: &Config, offsets: &BTreeMap<i32, i64>, ends: Ends) -> Reader {
    let at = |(partition, (first, end)): (i32, (i64, i64))| {
        let offset = offsets.get(&partition).copied();
        ReaderAt { partition, offset, end, lag_records: (end - offset.unwrap_or(first)).max(0) }
    };
    let partitions: Vec<ReaderAt> = ends.into_iter().map(at).collect();
    let lag_records = partitions.iter().map(|p| p.lag_records).sum();
    Reader { topic: config.topic(TABLE), partitions, lag_records }
}

fn partitions(consumer: &BaseConsumer, topic: &str) -> Result<Vec<i32>, Failure> {
    let metadata = consumer.fetch_metadata(Some(topic), TIMEOUT)?;
    let found = metadata.topics().iter().find(|t| t.name() == topic && t.error().is_none());
    let partitions: Vec<i32> = found.map(|t| t.partitions().iter().map(|p| p.id()).collect()).unwrap_or_default();
    if partitions.is_empty() { Err(Failure::NoTopic) } else { Ok(partitions) }
}

fn committed(consumer: &BaseConsumer, topic: &str, partitions: &[i32]) -> Result<BTreeMap<i32, i64>, Failure> {
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        list.add_partition(topic, *partition);
    }
    let found = consumer.committed_offsets(list, TIMEOUT)?;
    let offset = |e: &TopicPartitionListElem<'_>| match e.offset() {
        Offset::Offset(offset) => Some((e.partition(), offset)),
        _ => None,
    };
    Ok(found.elements().iter().filter_map(offset).collect())
}

fn ends(consumer: &BaseConsumer, topic: &str, partitions: &[i32]) -> Result<Ends, Failure> {
    let end = |p: &i32| Ok((*p, consumer.fetch_watermarks(topic, *p, TIMEOUT)?));
    partitions.iter().map(end).collect()
}

enum Failure {
    NoTopic,
    Kafka(KafkaError),
}

impl From<KafkaError> for Failure {
    fn from(e: KafkaError) -> Self {
        Self::Kafka(e)
    }
}

/// Asks with a client in the outside path's group, off the runtime's threads. It joins nothing and commits nothing.
async fn ask<T: Send + 'static>(
    config: &Arc<Config>,
    question: impl FnOnce(BaseConsumer, &str) -> Result<T, Failure> + Send + 'static,
) -> Result<T> {
    let (config, topic) = (config.clone(), config.topic(TABLE));
    let asked = move || {
        let mut client = kafka::client(&config.kafka);
        client.set("group.id", format!("{}.external", config.pipeline));
        client.set("isolation.level", "read_committed").set("enable.auto.commit", "false");
        let answer = client.create().map_err(Failure::Kafka).and_then(|consumer| question(consumer, &topic));
        answer.map_err(|failure| match failure {
            Failure::NoTopic => Error::Fatal(format!("no topic {topic}; falaj init makes it")),
            Failure::Kafka(e) => kafka::error(&config.kafka, &e),
        })
    };
    tokio::task::spawn_blocking(asked).await.map_err(|e| Error::fatal("asking Kafka", e))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_has_not_begun_lags_by_all_that_is_there() {
        let config = Config::defaults().unwrap();
        let found = reader(&config, &BTreeMap::from([(0, 7)]), BTreeMap::from([(0, (5, 9)), (1, (3, 13))]));
        let at = |partition, offset, end, lag_records| ReaderAt { partition, offset, end, lag_records };
        assert_eq!(found.partitions, [at(0, Some(7), 9, 2), at(1, None, 13, 10)]);
        assert_eq!((found.lag_records, found.topic.as_str()), (12, "falaj.engagement_events"));
    }

    #[test]
    fn a_board_beyond_the_end_of_its_topic_is_not_up_to_date() {
        let ends = BTreeMap::from([(0, (5, 9)), (1, (3, 13))]);
        assert_eq!(beyond(&BTreeMap::from([(0, 9), (1, 4), (2, 7)]), &ends), None);
        assert_eq!(
            beyond(&BTreeMap::from([(0, 9), (1, 14)]), &ends).as_deref(),
            Some("partition 1: counted to offset 14, the topic ends at 13: consume rebuilds it")
        );
    }
}
