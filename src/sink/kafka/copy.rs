//! The Kafka sink of a replay: into topics of its own, exactly once, to be taken up again after a crash.
//!
//! As in the stream, one Kafka transaction holds events and their position; the record stands on the same checkpoint topic
//! under a key of the replay. It also names the range's beginning and the topics' ids. So a topic that holds anything but
//! this replay is told from one that does: there is no record of it, and it must be empty.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::admin::AdminClient;
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::Producer;
use tokio_util::sync::CancellationToken;

use super::commit::producer;
use super::position::{CheckpointRecord, CopyOf, progress, read_record, require};
use super::{KafkaSink, Opened, Stored};
use crate::config::{self, Config};
use crate::error::{Error, Result};
use crate::kafka;
use crate::lsn::{Checkpoint, Lsn, SlotIdentity};
use crate::sink::Sink;

/// How long a topic that was just made may take to be known to every broker.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked for meanwhile.
const LOOK: Duration = Duration::from_millis(50);

/// What is copied.
pub struct Copy {
    /// Names the replay: topic name, with `{table}` where it has one.
    pub name: String,
    /// The stream that the positions belong to.
    pub identity: SlotIdentity,
    /// The first commit LSN.
    pub from: Lsn,
    /// The last.
    pub to: Lsn,
    /// The tables in it.
    pub tables: Vec<String>,
}

/// Opens the sink. `config` has the new topic's name as `kafka.topic`. Topics that are absent are made. `stop` breaks off the
/// wait for transactions of others.
///
/// # Errors
/// [`Error::Refused`] for a topic that holds something else, for rights, or without a checkpoint topic;
/// [`Error::Unreachable`] without a broker.
pub async fn open(config: Arc<Config>, copy: &Copy, stop: &CancellationToken) -> Result<Opened> {
    require_flat(&config)?;
    let topics: BTreeSet<String> = copy.tables.iter().map(|table| config.topic(table)).collect();
    let existing = on_thread(&config, |config| kafka::topics(&config.kafka, kafka::TIMEOUT)).await?;
    require(&existing, &config.checkpoint_topic(), [])?;
    for topic in topics.iter().filter(|topic| !existing.contains_key(*topic)) {
        // The records have the times of their commits, and a usual retention would take the oldest away within minutes.
        kafka::create_topic(&config.kafka, topic, config.kafka.partitions, &[("retention.ms", "-1")]).await?;
        tracing::info!(topic, partitions = config.kafka.partitions, "topic made");
    }
    let (key, wanted) = (format!("replay:{}", copy.name), topics.clone());
    let (identity, from, to) = (copy.identity.clone(), copy.from, copy.to);
    let id = format!("replay.{}", copy.name);
    let (record_key, stop) = (key.clone(), stop.clone());
    let (producer, position, of) = on_thread(&config, move |config| {
        let producer = producer(config, &id)?;
        producer.init_transactions(kafka::TIMEOUT).map_err(|e| kafka::error(&config.kafka, &e))?;
        let of = CopyOf { from, topics: ids(config, &wanted)? };
        let record = read_record(config, &identity, &record_key, Some(&stop))?;
        let position = place(config, record, &of, to)?;
        Ok((producer, position, of))
    })
    .await?;
    let start = position.unwrap_or(Checkpoint::whole(from));
    let mut sink = KafkaSink::start(config, producer, progress(copy.identity.clone(), key, Some(of)), start, topics)?;
    if position.is_none() {
        // From now on these topics are known as the replay's, whatever becomes of its first transaction.
        sink.flush(start).await?;
        sink.moved().await?;
    }
    Ok(Opened { sink: Box::new(sink), position: position.map(Stored) })
}

/// The archive has the events' flat bodies, and of the row before an update only its key.
fn require_flat(config: &Config) -> Result<()> {
    match config.kafka.envelope {
        config::Envelope::Flat => Ok(()),
        config::Envelope::Debezium => Err(Error::refused(
            "replay",
            "kafka.envelope = \"debezium\"",
            "flat events: the archive does not hold the row before an update",
            "run it with FALAJ_KAFKA__ENVELOPE=flat; or replay by Postgres: falaj bookmark",
        )),
    }
}

async fn on_thread<T: Send + 'static>(
    config: &Arc<Config>,
    work: impl FnOnce(&Config) -> Result<T> + Send + 'static,
) -> Result<T> {
    let config = Arc::clone(config);
    tokio::task::spawn_blocking(move || work(&config))
        .await
        .map_err(|e| Error::fatal("opening the replay's topics", e))?
}

/// How far the replay has got; `None` when it has not begun.
fn place(config: &Config, record: Option<CheckpointRecord>, of: &CopyOf, to: Lsn) -> Result<Option<Checkpoint>> {
    let checkpoint = record.as_ref().map(CheckpointRecord::checkpoint);
    let known = record.and_then(|record| record.copy).filter(|copy| is_of_these(copy, of));
    for (topic, id) in &of.topics {
        match known.as_ref().and_then(|copy| copy.topics.get(topic)) {
            Some(known) if known == id => {}
            Some(_) => return Err(taken(topic, "it was made anew since the replay began", "another --topic")),
            None => require_empty(config, topic)?,
        }
    }
    let (Some(known), Some(checkpoint)) = (known, checkpoint) else { return Ok(None) };
    let beyond = checkpoint.partial.is_some_and(|last| last.commit_lsn > to);
    if known.from != of.from || beyond {
        let reach = checkpoint.partial.map_or("nothing yet".to_owned(), |last| format!("up to {}", last.commit_lsn));
        let found = format!("it holds a replay from {} ({reach})", known.from);
        return Err(taken(of.topics.keys().next().map_or("", |t| t), &found, &format!("--from {}", known.from)));
    }
    Ok(Some(checkpoint))
}

/// Whether the record speaks of these topics. When none of them is the one that it knew, it speaks of others, long gone.
fn is_of_these(copy: &CopyOf, of: &CopyOf) -> bool {
    copy.topics.iter().any(|(topic, id)| of.topics.get(topic) == Some(id))
}

/// A topic's id, asked for until every broker knows it.
fn ids(config: &Config, topics: &BTreeSet<String>) -> Result<BTreeMap<String, String>> {
    let client: AdminClient<DefaultClientContext> = kafka::admin(&config.kafka)?;
    let deadline = Instant::now() + PATIENCE;
    let id = |topic: &String| loop {
        match kafka::topic_id(client.inner(), topic, kafka::TIMEOUT) {
            Ok(id) => return Ok((topic.clone(), id)),
            Err(e) if Instant::now() > deadline => return Err(kafka::error(&config.kafka, &e)),
            Err(_) => std::thread::sleep(LOOK),
        }
    };
    topics.iter().map(id).collect()
}

fn require_empty(config: &Config, topic: &str) -> Result<()> {
    let mut client = kafka::client(&config.kafka);
    client.set("group.id", format!("{}.replay", config.pipeline)).set("enable.auto.commit", "false");
    let consumer: BaseConsumer = client.create().map_err(|e| kafka::error(&config.kafka, &e))?;
    let partitions = kafka::partitions(&config.kafka, topic)?.unwrap_or(0);
    for partition in 0..partitions as i32 {
        let marks = consumer.fetch_watermarks(topic, partition, kafka::TIMEOUT);
        let (low, high) = marks.map_err(|e| kafka::error(&config.kafka, &e))?;
        if high > low {
            return Err(taken(topic, &format!("partition {partition} has offsets {low} to {high}"), "another --topic"));
        }
    }
    Ok(())
}

fn taken(topic: &str, found: &str, fix: &str) -> Error {
    Error::refused(
        "replay_topic",
        format!("topic {topic}: {found}"),
        "a new topic, an empty one, or one that holds the beginning of this very replay: anything else would be doubled or mixed",
        fix,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_that_was_made_anew_is_another_one() {
        let of = |id: &str| CopyOf { from: Lsn(8), topics: [("t".to_owned(), id.to_owned())].into() };
        assert!(is_of_these(&of("a"), &of("a")));
        assert!(!is_of_these(&of("a"), &of("b")));
    }
}
