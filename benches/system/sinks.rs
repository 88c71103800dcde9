//! What a run left behind: events and distinct positions in each sink, so that speed bought with loss is seen.

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
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use rdkafka::admin::AdminOptions;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::{Message, Offset, TopicPartitionList};
use serde::Serialize;

use crate::plan::Reader;
use crate::reader::pipeline_dir;
use crate::stack::Stack;

const TABLE: &str = "engagement_events";
/// A topic that gives nothing for this long, and has not come to its end, is an error.
const PATIENCE: Duration = Duration::from_secs(30);

/// Events in a sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Content {
    /// All of them.
    pub events: u64,
    /// Different `_id`.
    pub distinct: u64,
}

/// (commit LSN, ordinal)
type Id = (u64, u64);

/// Counts what the pipeline's sinks hold.
pub async fn count(stack: &Stack, reader: Reader, pipeline: &str) -> Result<HashMap<&'static str, Content>> {
    let mut found = HashMap::new();
    tokio::task::block_in_place(|| {
        if reader.feeds_kafka() {
            found.insert("kafka", content(&in_kafka(&stack.config.kafka, pipeline)?));
        }
        if reader.feeds_archive() {
            found.insert("archive", content(&in_archive(&pipeline_dir(stack, pipeline).join("archive"))?));
        }
        Ok(found)
    })
}

/// Removes what the run has made: the next one shall find the disk as this one did.
pub async fn remove(stack: &Stack, reader: Reader, pipeline: &str) -> Result<()> {
    let dir = pipeline_dir(stack, pipeline);
    if dir.exists() {
        std::fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    if reader.feeds_kafka() {
        let config = &stack.config.kafka;
        let topics = [TABLE, "content"].map(|table| config.topic(pipeline, table));
        let others = ["checkpoint", "dead_letter"].map(|what| format!("{pipeline}.{what}"));
        let names: Vec<&str> = topics.iter().chain(&others).map(String::as_str).collect();
        kafka::admin(config)?.delete_topics(&names, &AdminOptions::new()).await?;
    }
    Ok(())
}

fn content(ids: &[Id]) -> Content {
    let distinct: HashSet<&Id> = ids.iter().collect();
    Content { events: ids.len() as u64, distinct: distinct.len() as u64 }
}

fn in_kafka(config: &Kafka, pipeline: &str) -> Result<Vec<Id>> {
    let topic = config.topic(pipeline, TABLE);
    let consumer = reader(config, &topic, Offset::Beginning)?;
    let mut open: HashSet<i32> = partitions(config, &topic)?.collect();
    let (mut ids, mut last) = (Vec::new(), Instant::now());
    while !open.is_empty() {
        match consumer.poll(Duration::from_millis(200)) {
            Some(Ok(message)) => {
                let body = message.payload().context("a record without a body")?;
                ids.push(id(body).with_context(|| String::from_utf8_lossy(body).into_owned())?);
                last = Instant::now();
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => drop(open.remove(&partition)),
            Some(Err(e)) => bail!("reading {topic}: {e}"),
            None => ensure!(last.elapsed() < PATIENCE, "{topic}: nothing for {PATIENCE:?} before its end"),
        }
    }
    Ok(ids)
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

fn partitions(config: &Kafka, topic: &str) -> Result<std::ops::Range<i32>> {
    let count = kafka::partitions(config, topic)?.with_context(|| format!("there is no topic {topic}"))?;
    Ok(0..i32::try_from(count)?)
}

/// `"_id":"{commit_lsn:016X}:{ordinal:010}"`, which stands near the end of the body.
fn id(body: &[u8]) -> Option<Id> {
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

fn in_archive(dir: &Path) -> Result<Vec<Id>> {
    let mut ids = Vec::new();
    for batch in archive::list(dir)? {
        for file in batch.files()?.into_iter().filter(|f| f.table == TABLE) {
            let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(&file.path)?)?;
            let columns = ProjectionMask::columns(builder.parquet_schema(), ["_commit_lsn", "_ordinal"]);
            for rows in builder.with_projection(columns).build()? {
                let rows = rows?;
                let column = |at: usize| rows.column(at).as_primitive::<Int64Type>().values().iter();
                ids.extend(column(0).zip(column(1)).map(|(lsn, ordinal)| (*lsn as u64, *ordinal as u64)));
            }
        }
    }
    Ok(ids)
}
