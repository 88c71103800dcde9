//! The sink's position: the last record of the checkpoint topic.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::{Offset, TopicPartitionList};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::commit::Progress;
use crate::config::{Config, Kafka};
use crate::error::{Error, Result};
use crate::event::Layout;
use crate::kafka::{TIMEOUT, client, error, no_checkpoint, no_topics, settle};
use crate::lsn::{Checkpoint, Commit, Lsn, Position, SlotIdentity};

/// Value of a checkpoint record; its key is the slot's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointRecord {
    /// The stream that the LSNs belong to.
    pub identity: SlotIdentity,
    /// Everything committed below it is in.
    pub end_lsn: Lsn,
    /// Last event of a transaction that is half in; null at a transaction boundary, where an earlier falaj left it out.
    #[serde(default)]
    pub position: Option<Position>,
    /// Last change of the lookup rows that the events below `end_lsn` were enriched with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lookups: Option<Position>,
    /// The last transaction of which events are in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<Commit>,
    /// Of a replay: what it copies, and into which topics. Absent in the record of the stream itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyOf>,
}

/// What a replay writes, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOf {
    /// The first commit LSN.
    pub from: Lsn,
    /// Topics with their ids: one of the same name that was made anew has another id, and nothing of the replay in it.
    pub topics: BTreeMap<String, String>,
}

impl CheckpointRecord {
    pub(super) fn checkpoint(&self) -> Checkpoint {
        Checkpoint { resume: self.end_lsn, partial: self.position, lookups: self.lookups, commit: self.commit }
    }
}

/// The record of a stream's position, or of a copy's, under its key.
pub(super) fn progress(identity: SlotIdentity, key: String, copy: Option<CopyOf>) -> Progress {
    Box::new(move |Checkpoint { resume: end_lsn, partial: position, lookups, commit }| {
        let (identity, copy) = (identity.clone(), copy.clone());
        let record = CheckpointRecord { identity, end_lsn, position, lookups, commit, copy };
        let value = serde_json::to_vec(&record).map_err(|e| Error::fatal("writing a checkpoint", e))?;
        Ok((key.clone(), value))
    })
}

/// Topics are made by `init`, never by accident.
pub(super) fn require<'a>(
    topics: &BTreeMap<String, usize>,
    checkpoint: &str,
    others: impl IntoIterator<Item = &'a String>,
) -> Result<()> {
    if !topics.contains_key(checkpoint) {
        return Err(no_checkpoint(checkpoint));
    }
    let missing: Vec<_> = others.into_iter().filter(|t| !topics.contains_key(*t)).map(String::as_str).collect();
    if missing.is_empty() { Ok(()) } else { Err(no_topics(&missing)) }
}

/// The same for a table that has been published since the start. By now it may have been dropped again: then `init` does not
/// know it, and its rows are in the stream all the same.
pub(super) fn require_table(
    topics: &BTreeMap<String, usize>,
    topic: &str,
    layout: &Layout,
    config: &Kafka,
) -> Result<()> {
    if topics.contains_key(topic) {
        return Ok(());
    }
    let (servers, partitions) = (config.servers(), config.partitions);
    Err(Error::refused(
        "kafka_topics",
        format!("the first rows of table {} have come, and topic {topic} does not exist", layout.table),
        "a topic for each published table, before its first row",
        format!(
            "falaj init; where the table is no longer published: kafka-topics.sh --bootstrap-server {servers} --create \
             --topic {topic} --partitions {partitions}. Then start falaj produce again: nothing is lost, it goes on with these rows"
        ),
    ))
}

/// The last checkpoint record of this slot; `settled` as in [`read_record`].
pub(super) fn read_position(
    config: &Config,
    identity: &SlotIdentity,
    settled: Option<&CancellationToken>,
) -> Result<Option<Checkpoint>> {
    Ok(read_record(config, identity, &identity.slot, settled)?.map(|record| record.checkpoint()))
}

/// The last record under a key; it has to be of the stream.
///
/// Behind a transaction that somebody else has left open (the lane of a killed backfill, say) no reader sees anything. Who is
/// to write from this position on says by `settled` that it is waited for, and what breaks the wait off.
pub(super) fn read_record(
    config: &Config,
    identity: &SlotIdentity,
    key: &str,
    settled: Option<&CancellationToken>,
) -> Result<Option<CheckpointRecord>> {
    let consumer = consumer(config)?;
    if let Some(stop) = settled {
        settle(config, &consumer, &config.checkpoint_topic(), 1, stop)?;
    }
    let record = newest(config, &consumer, identity, key)?;
    // Its threads take a tenth of a second to end, which nobody has to wait for.
    std::thread::spawn(|| drop(consumer));
    Ok(record)
}

pub(super) fn consumer(config: &Config) -> Result<BaseConsumer> {
    let mut settings = client(&config.kafka);
    settings
        .set("group.id", format!("{}.checkpoint", config.pipeline))
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error")
        .set("enable.partition.eof", "true")
        // How long the broker holds back the answer that says that the end is reached.
        .set("fetch.wait.max.ms", "5");
    settings.create().map_err(|e| error(&config.kafka, &e))
}

fn newest(
    config: &Config,
    consumer: &BaseConsumer,
    identity: &SlotIdentity,
    key: &str,
) -> Result<Option<CheckpointRecord>> {
    let topic = config.checkpoint_topic();
    let (low, high) = consumer.fetch_watermarks(&topic, 0, TIMEOUT).map_err(|e| error(&config.kafka, &e))?;
    // The newest record is near the end; the whole topic is read only if it is not.
    for window in [16, 1_000, i64::MAX] {
        let from = high.saturating_sub(window).max(low);
        let found = last_record(config, consumer, &topic, from, identity, key)?;
        if found.is_some() || from == low {
            return Ok(found);
        }
    }
    Ok(None)
}

fn last_record(
    config: &Config,
    consumer: &BaseConsumer,
    topic: &str,
    from: i64,
    identity: &SlotIdentity,
    key: &str,
) -> Result<Option<CheckpointRecord>> {
    let mut found = None;
    // The last record of a key is the one that counts; compaction may take those before it at any time.
    scan(config, consumer, topic, from, |found_key, offset, value| {
        if found_key == key.as_bytes() {
            found = Some((offset, value.to_vec()));
        }
    })?;
    found.map(|(offset, value): (i64, Vec<u8>)| parse_record(topic, offset, &value, identity)).transpose()
}

/// Hands key, offset and value of every committed record from `from` to the end to `each`.
pub(super) fn scan(
    config: &Config,
    consumer: &BaseConsumer,
    topic: &str,
    from: i64,
    mut each: impl FnMut(&[u8], i64, &[u8]),
) -> Result<()> {
    let mut assignment = TopicPartitionList::new();
    let assigned = assignment.add_partition_offset(topic, 0, Offset::Offset(from));
    assigned.and_then(|()| consumer.assign(&assignment)).map_err(|e| error(&config.kafka, &e))?;
    // However long the topic is: what counts is that it comes.
    let mut deadline = Instant::now() + TIMEOUT;
    while Instant::now() < deadline {
        match consumer.poll(Duration::from_millis(100)) {
            None => {}
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(()),
            Some(Err(e)) => return Err(error(&config.kafka, &e)),
            Some(Ok(message)) => {
                deadline = Instant::now() + TIMEOUT;
                each(message.key().unwrap_or_default(), message.offset(), message.payload().unwrap_or_default());
            }
        }
    }
    Err(Error::unreachable(
        format!("Kafka at {}", config.kafka.servers()),
        format!("{topic} could not be read to its end"),
    ))
}

fn parse_record(topic: &str, offset: i64, value: &[u8], identity: &SlotIdentity) -> Result<CheckpointRecord> {
    let refuse = |found: String| {
        Error::refused(
            "kafka_position",
            format!("{topic}, offset {offset}: {found}"),
            format!("a position of {identity}"),
            "give this pipeline another name (then it starts anew), or put the slot and cluster back that the position belongs to",
        )
    };
    let record: CheckpointRecord =
        serde_json::from_slice(value).map_err(|e| refuse(format!("not a checkpoint record: {e}")))?;
    if record.identity != *identity {
        return Err(refuse(format!("the position of {}", record.identity)));
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_of_another_stream_is_refused() {
        let identity = SlotIdentity { system_id: "7".into(), timeline: 1, slot: "falaj".into() };
        let record = CheckpointRecord {
            identity: identity.clone(),
            end_lsn: Lsn(256),
            position: Some(Position { commit_lsn: Lsn(300), ordinal: 4 }),
            lookups: Some(Position { commit_lsn: Lsn(200), ordinal: 1 }),
            commit: Some(Commit { lsn: Lsn(300), ts: 5 }),
            copy: None,
        };
        let value = serde_json::to_vec(&record).unwrap();
        let text = r#"{"identity":{"system_id":"7","timeline":1,"slot":"falaj"},"end_lsn":"0/100","position":{"commit_lsn":"0/12C","ordinal":4},"lookups":{"commit_lsn":"0/C8","ordinal":1},"commit":{"lsn":"0/12C","ts":5}}"#;
        assert_eq!(std::str::from_utf8(&value).unwrap(), text);
        assert_eq!(parse_record("t", 0, &value, &identity).unwrap(), record);
        // As falaj 0.1.0 wrote it before it said that.
        let later = r#","lookups":{"commit_lsn":"0/C8","ordinal":1},"commit":{"lsn":"0/12C","ts":5}"#;
        let before = text.replace(later, "");
        let read = parse_record("t", 0, before.as_bytes(), &identity).unwrap();
        assert_eq!(read, CheckpointRecord { lookups: None, commit: None, ..record.clone() });
        let whole = CheckpointRecord { position: None, ..read };
        let text = serde_json::to_string(&whole).unwrap();
        assert!(text.contains(r#","position":null"#), "{text}");
        // And as it wrote it at a transaction boundary.
        for text in [text.replace(r#","position":null"#, ""), text] {
            assert_eq!(parse_record("t", 0, text.as_bytes(), &identity).unwrap(), whole);
        }
        for other in
            [SlotIdentity { timeline: 2, ..identity.clone() }, SlotIdentity { system_id: "8".into(), ..identity }]
        {
            assert_eq!(parse_record("t", 0, &value, &other).unwrap_err().exit_code(), 78);
        }
        assert_eq!(parse_record("t", 0, b"{}", &record.identity).unwrap_err().exit_code(), 78);
    }
}
