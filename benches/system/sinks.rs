//! What a run left behind: events, distinct positions and operations in each sink, so that speed bought with loss is seen.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use falaj::archive;
use falaj::config::Kafka;
use falaj::kafka;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use rdkafka::admin::AdminOptions;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::BorrowedMessage;
use rdkafka::{Message, Offset, TopicPartitionList};
use serde::Serialize;

use crate::plan::Reader;
use crate::reader::pipeline_dir;
use crate::shape::Shape;
use crate::stack::Stack;

/// A topic that gives nothing for this long, and has not come to its end, is an error.
const PATIENCE: Duration = Duration::from_secs(30);

/// Events in a sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Content {
    /// All of them.
    pub events: u64,
    /// Different `_id`; of a peer, which has none: different `id` of rows.
    pub distinct: u64,
    /// Events whose `_op` is the one that the backlog is made of; a peer's all are taken for it.
    pub of_kind: u64,
}

/// One event, as far as it is counted.
struct Event {
    /// (commit LSN, ordinal)
    id: (u64, u64),
    of_kind: bool,
}

/// Counts what the pipeline's sinks hold.
pub async fn count(
    stack: &Stack,
    reader: Reader,
    pipeline: &str,
    shape: Shape,
) -> Result<HashMap<&'static str, Content>> {
    let mut found = HashMap::new();
    tokio::task::block_in_place(|| {
        if reader.feeds_kafka() {
            found.insert("kafka", content(&in_kafka(&stack.config.kafka, pipeline, shape)?));
        }
        if reader.feeds_archive() {
            found.insert("archive", content(&in_archive(&pipeline_dir(stack, pipeline).join("archive"), shape)?));
        }
        Ok(found)
    })
}

/// Removes what the run has made: the next one shall find the disk as this one did.
pub async fn remove(stack: &Stack, pipeline: &str) -> Result<()> {
    let dir = pipeline_dir(stack, pipeline);
    if dir.exists() {
        std::fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    let config = &stack.config.kafka;
    let topics = tokio::task::block_in_place(|| kafka::topics(config, kafka::TIMEOUT))?;
    let prefix = format!("{pipeline}.");
    let names: Vec<&str> = topics.keys().map(String::as_str).filter(|name| name.starts_with(&prefix)).collect();
    if !names.is_empty() {
        kafka::admin(config)?.delete_topics(&names, &AdminOptions::new()).await?;
    }
    Ok(())
}

fn content(events: &[Event]) -> Content {
    let distinct: HashSet<_> = events.iter().map(|event| event.id).collect();
    let of_kind = events.iter().filter(|event| event.of_kind).count();
    Content { events: events.len() as u64, distinct: distinct.len() as u64, of_kind: of_kind as u64 }
}

fn in_kafka(config: &Kafka, pipeline: &str, shape: Shape) -> Result<Vec<Event>> {
    let mut events = Vec::new();
    for table in shape.tables() {
        read_topic(config, &config.topic(pipeline, &table), |message| {
            let body = message.payload().context("a record without a body")?;
            let id = id(body).with_context(|| String::from_utf8_lossy(body).into_owned())?;
            events.push(Event { id, of_kind: field(body, "_op") == Some(shape.op()) });
            Ok(())
        })?;
    }
    Ok(events)
}

/// Shows every committed record of a topic to `on_record`.
pub fn read_topic(
    config: &Kafka,
    topic: &str,
    mut on_record: impl FnMut(&BorrowedMessage) -> Result<()>,
) -> Result<()> {
    let consumer = reader(config, topic, Offset::Beginning)?;
    let mut open: HashSet<i32> = partitions(config, topic)?.collect();
    let mut last = Instant::now();
    while !open.is_empty() {
        match consumer.poll(Duration::from_millis(200)) {
            Some(Ok(message)) => {
                on_record(&message)?;
                last = Instant::now();
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => drop(open.remove(&partition)),
            Some(Err(e)) => bail!("reading {topic}: {e}"),
            None => ensure!(last.elapsed() < PATIENCE, "{topic}: nothing for {PATIENCE:?} before its end"),
        }
    }
    Ok(())
}

/// A consumer of the whole topic that sees what is committed.
pub fn reader(config: &Kafka, topic: &str, from: Offset) -> Result<BaseConsumer> {
    let settings = [("group.id", "bench"), ("isolation.level", "read_committed"), ("enable.partition.eof", "true")];
    let consumer: BaseConsumer = kafka::client_over(config, &settings).create()?;
    let mut assignment = TopicPartitionList::new();
    for partition in partitions(config, topic)? {
        assignment.add_partition_offset(topic, partition, from)?;
    }
    consumer.assign(&assignment)?;
    Ok(consumer)
}

/// The partitions of a topic.
pub fn partitions(config: &Kafka, topic: &str) -> Result<std::ops::Range<i32>> {
    let count = kafka::partitions(config, topic)?.with_context(|| format!("there is no topic {topic}"))?;
    Ok(0..i32::try_from(count)?)
}

/// `"_id":"{commit_lsn:016X}:{ordinal:010}"`, which stands near the end of the body.
fn id(body: &[u8]) -> Option<(u64, u64)> {
    let text = field(body, "_id")?;
    let (lsn, ordinal) = text.split_once(':')?;
    Some((u64::from_str_radix(lsn, 16).ok()?, ordinal.parse().ok()?))
}

/// Text of one of falaj's own fields of an event.
pub fn field<'a>(body: &'a [u8], name: &str) -> Option<&'a str> {
    let text = std::str::from_utf8(body).ok()?;
    let label = format!("\"{name}\":\"");
    text[text.rfind(&label)? + label.len()..].split('"').next()
}

fn in_archive(dir: &Path, shape: Shape) -> Result<Vec<Event>> {
    let (tables, mut events) = (shape.tables(), Vec::new());
    for batch in archive::list(dir)? {
        for file in batch.files()?.into_iter().filter(|file| tables.contains(&file.table)) {
            for rows in parquet(&file.path, &["_op", "_commit_lsn", "_ordinal"])? {
                let rows = rows?;
                let numbers = |name| -> Result<&[i64]> {
                    Ok(rows.column_by_name(name).context(name)?.as_primitive::<Int64Type>().values())
                };
                let ops = rows.column_by_name("_op").context("_op")?.as_string::<i32>().iter();
                let ids = numbers("_commit_lsn")?.iter().zip(numbers("_ordinal")?);
                let event = |(op, (lsn, ordinal)): (Option<&str>, (&i64, &i64))| Event {
                    id: (*lsn as u64, *ordinal as u64),
                    of_kind: op == Some(shape.op()),
                };
                events.extend(ops.zip(ids).map(event));
            }
        }
    }
    Ok(events)
}

/// Some columns of a Parquet file.
pub fn parquet(path: &Path, columns: &[&str]) -> Result<ParquetRecordBatchReader> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?;
    let columns = ProjectionMask::columns(builder.parquet_schema(), columns.iter().copied());
    Ok(builder.with_projection(columns).build()?)
}
