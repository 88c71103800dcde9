//! A table's topic → facts, as a read_committed reader sees it. Blocking.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::{Message, Offset, TopicPartitionList};
use serde_json::value::RawValue;

use super::fold::{Fact, Fold};
use super::table::{Form, Table, hash, old_key, trimmed};
use crate::change::Op;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kafka;
use crate::lsn::{Lsn, Position};

/// How long Kafka may be silent.
const PATIENCE: Duration = Duration::from_secs(10);

/// Reads a topic from its beginning to its end, value by value with partition and offset.
///
/// # Errors
/// [`Error::Refused`] for a topic that is not there; [`Error::Unreachable`] when no broker answers.
pub(super) fn read(config: &Config, topic: &str, mut each: impl FnMut(i32, i64, &[u8]) -> Result<()>) -> Result<()> {
    let failed = |e: KafkaError| kafka::error(&config.kafka, &e);
    let mut client = kafka::client(&config.kafka);
    client.set("group.id", format!("{}.verify", config.pipeline)).set("isolation.level", "read_committed");
    client.set("enable.auto.commit", "false").set("enable.partition.eof", "true").set("auto.offset.reset", "error");
    let reader: BaseConsumer = client.create().map_err(failed)?;
    let Some(partitions) = kafka::partitions(&config.kafka, topic)? else { return Err(no_topic(topic)) };
    let mut list = TopicPartitionList::new();
    for partition in 0..partitions as i32 {
        list.add_partition_offset(topic, partition, Offset::Beginning).map_err(failed)?;
    }
    reader.assign(&list).map_err(failed)?;
    let mut open = partitions;
    while open > 0 {
        match reader.poll(PATIENCE) {
            Some(Ok(message)) => {
                // A tombstone is no event.
                message.payload().map_or(Ok(()), |value| each(message.partition(), message.offset(), value))?;
            }
            Some(Err(KafkaError::PartitionEOF(ended))) => {
                open -= 1;
                // What comes after its end is of no concern, and the reading has to end.
                let mut ended_list = TopicPartitionList::new();
                ended_list.add_partition(topic, ended);
                reader.pause(&ended_list).map_err(failed)?;
            }
            Some(Err(e)) => return Err(failed(e)),
            None => {
                return Err(Error::unreachable(format!("Kafka at {}", config.kafka.servers()), "no answer to a fetch"));
            }
        }
    }
    Ok(())
}

fn no_topic(topic: &str) -> Error {
    Error::refused(
        "kafka_topics",
        format!("topic {topic} does not exist"),
        "a topic for the checkpoint and one for each published table",
        "falaj init",
    )
}

/// Folds a table's events. `sees` says whether the snapshot sees a commit.
///
/// # Errors
/// As [`read`]; [`Error::Fatal`] for a record that is no event.
pub(super) fn fold(config: &Config, table: &Table, mut fold: Fold, sees: impl Fn(Lsn) -> bool) -> Result<Fold> {
    let topic = config.topic(&table.name);
    let mut values = Vec::new();
    read(config, &topic, |partition, offset, value| {
        let strange = |why: &dyn std::fmt::Display| {
            Error::fatal(format_args!("reading {topic}, partition {partition}, offset {offset}"), why)
        };
        let fields: HashMap<Cow<'_, str>, &RawValue> = serde_json::from_slice(value).map_err(|e| strange(&e))?;
        let raw = |name: &str| fields.get(name).map(|value| value.get());
        let own = |name: &str| raw(name).and_then(|text| serde_json::from_str::<String>(text).ok());
        // One topic may hold several tables, and messages, which are no rows.
        if own("_table").ok_or_else(|| strange(&"no _table"))? != table.name {
            return Ok(());
        }
        let id = own("_id").ok_or_else(|| strange(&"no _id"))?;
        let at = Position::from_event_id(&id).ok_or_else(|| strange(&format_args!("_id is {id:?}")))?;
        let op = own("_op").and_then(|op| Op::from_letter(&op)).ok_or_else(|| strange(&"no known _op"))?;
        if !sees(at.commit_lsn) {
            return Ok(());
        }
        if op == Op::Truncate {
            fold.push(&Fact { at, op, key: "", old_key: None, values: &[] });
            return Ok(());
        }
        let column = |i: usize| raw(&table.columns[i].0).map(|text| trimmed(text).to_owned());
        let Some(key) = table.key_text(column) else {
            fold.unclear += u64::from(fields.contains_key("_unchanged"));
            return Ok(());
        };
        let old = raw("_old_key").map(|json| old_key(table, Form::Json, json, column)).transpose()?.flatten();
        values.clear();
        values.extend(table.columns.iter().map(|(name, _)| raw(name).map(|text| hash(trimmed(text)))));
        fold.push(&Fact { at, op, key: &key, old_key: old.as_deref(), values: &values });
        Ok(())
    })?;
    Ok(fold)
}
