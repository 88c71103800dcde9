//! The Kafka sink: one Kafka transaction = events + a record of the position, on a compacted, single-partition topic.
//!
//! Start order: the slot is held → `init_transactions` fences whoever held it before → the checkpoint topic is read,
//! read_committed, to its end. A transaction larger than the limit flows as several: the position has the ordinal.

mod commit;
mod history;
mod position;

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, Producer};

use super::worker::Worker;
use super::{Opened, Sink, Stored};
use crate::change::Op;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::event::{Event, Layout};
use crate::kafka;
use crate::lsn::{Checkpoint, Lsn, SlotIdentity};
use commit::{Committer, Piece, Progress, Record, producer};
pub use history::{Fenced, fence, open_history, read_history};
use position::{progress, read_position, require};

/// What is buffered is handed to the producing thread in pieces of about this size.
const PIECE: usize = 256 << 10;

/// The loop's side of the sink.
pub struct KafkaSink {
    config: Arc<Config>,
    worker: Worker<Piece>,
    start: Checkpoint,
    topics: Arc<Vec<String>>,
    known: BTreeSet<String>,
    bytes: Vec<u8>,
    records: Vec<Record>,
}

/// Fences the previous owner and reads the position. Call it only while the slot is held. `tables` are the published ones:
/// each needs its topic before the first event of any is written.
///
/// # Errors
/// [`Error::Refused`] for rights, absent topics or a foreign checkpoint; [`Error::Unreachable`] without a broker.
pub async fn open(config: Arc<Config>, identity: &SlotIdentity, tables: &[String]) -> Result<Opened> {
    let (c, id) = (Arc::clone(&config), identity.clone());
    let known: BTreeSet<String> = tables.iter().map(|table| config.topic(table)).collect();
    let needed: Vec<String> = [config.checkpoint_topic()].into_iter().chain(known.iter().cloned()).collect();
    let blocking = tokio::task::spawn_blocking(move || {
        let producer = producer(&c, &id.slot)?;
        let topics = kafka::topics_of(&c.kafka, producer.client(), kafka::TIMEOUT)?;
        needed.iter().try_for_each(|topic| require(&topics, topic))?;
        producer.init_transactions(kafka::TIMEOUT).map_err(|e| kafka::error(&c.kafka, &e))?;
        let position = read_position(&c, &id)?;
        Ok((producer, position))
    });
    let (producer, position) = blocking.await.map_err(|e| Error::fatal("opening the Kafka sink", e))??;
    // Below every LSN: a sink without a position has nothing, and nothing of it may be acknowledged.
    let start = position.unwrap_or(Checkpoint::whole(Lsn(0)));
    let sink = Box::new(KafkaSink::start(config, producer, progress(identity.clone()), start, known)?);
    Ok(Opened { sink, position: position.map(Stored) })
}

/// Reads the sink's position without taking it over: for a run that leaves this sink out, and for `status`.
///
/// # Errors
/// As [`open`].
pub async fn peek(config: Arc<Config>, identity: &SlotIdentity) -> Result<Option<Stored>> {
    let id = identity.clone();
    tokio::task::spawn_blocking(move || {
        require(&kafka::topics(&config.kafka, kafka::TIMEOUT)?, &config.checkpoint_topic())?;
        Ok(read_position(&config, &id)?.map(Stored))
    })
    .await
    .map_err(|e| Error::fatal("reading the Kafka sink's position", e))?
}

#[async_trait]
impl Sink for KafkaSink {
    fn name(&self) -> &'static str {
        "kafka"
    }

    async fn prepare(&mut self, layout: &Arc<Layout>) -> Result<()> {
        let topic = self.config.topic(&layout.table);
        if !self.known.contains(&topic) {
            let config = Arc::clone(&self.config);
            let topics = tokio::task::spawn_blocking(move || kafka::topics(&config.kafka, kafka::TIMEOUT)).await;
            require(&topics.map_err(|e| Error::fatal("looking up a topic", e))??, &topic)?;
            self.known.insert(topic.clone());
        }
        let index = layout.generation as usize;
        let topics = Arc::make_mut(&mut self.topics);
        topics.resize(topics.len().max(index + 1), String::new());
        topics[index] = topic;
        Ok(())
    }

    fn push(&mut self, event: &Event<'_>) -> Result<()> {
        if self.start.has(event.at) {
            return Ok(());
        }
        let failed = |e| Error::fatal(format_args!("event {} of table {}", event.at, event.layout.table), e);
        let start = self.bytes.len();
        let key = event.write_key(&mut self.bytes).map_err(failed)?.then_some(start..self.bytes.len());
        let start = self.bytes.len();
        event.write_json(&mut self.bytes).map_err(failed)?;
        self.records.push(Record {
            topic: event.layout.generation as usize,
            key,
            value: start..self.bytes.len(),
            timestamp: event.commit_ts.div_euclid(1000),
            partition: (event.op == Op::Truncate).then_some(0),
            headers: self.config.kafka.headers.is_some().then(|| cloud_event(event, &self.config.pipeline)),
        });
        Ok(())
    }

    async fn mark(&mut self, checkpoint: Checkpoint) -> Result<()> {
        let checkpoint = checkpoint.max(self.start);
        let whole = checkpoint.partial.is_none();
        if self.records.is_empty() || (!whole && self.bytes.len() < PIECE) {
            return Ok(());
        }
        self.hand_over(checkpoint, false).await
    }

    async fn flush(&mut self, checkpoint: Checkpoint) -> Result<()> {
        let checkpoint = checkpoint.max(self.start);
        self.hand_over(checkpoint, true).await
    }

    fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    fn stored(&self) -> Stored {
        self.worker.stored()
    }

    async fn moved(&mut self) -> Result<()> {
        self.worker.moved().await
    }

    async fn stop(&mut self) {
        let _ = self.worker.stop().await;
    }
}

impl KafkaSink {
    /// Starts the producing thread. `known` are the topics that are there.
    fn start(
        config: Arc<Config>,
        producer: BaseProducer,
        progress: Progress,
        start: Checkpoint,
        known: BTreeSet<String>,
    ) -> Result<Self> {
        let committer = Committer::new(producer, &config, progress);
        let worker = Worker::spawn("kafka", config.produce.queue_bytes.0, start, move |orders| committer.run(&orders))?;
        let (topics, bytes, records) = Default::default();
        Ok(Self { config, worker, start, topics, known, bytes, records })
    }

    async fn hand_over(&mut self, checkpoint: Checkpoint, now: bool) -> Result<()> {
        let capacity = self.bytes.len();
        let bytes = std::mem::replace(&mut self.bytes, Vec::with_capacity(capacity));
        let records = std::mem::take(&mut self.records);
        let size = bytes.len() + records.len() * size_of::<Record>();
        let piece = Piece { bytes, records, topics: Arc::clone(&self.topics), checkpoint, now };
        self.worker.send(piece, size).await
    }
}

/// CloudEvents 1.0, Kafka binary content mode.
fn cloud_event(event: &Event<'_>, pipeline: &str) -> OwnedHeaders {
    let mut time = Vec::new();
    crate::value::write_rfc3339(event.commit_ts, "Z", &mut time);
    let (id, kind) = (event.at.event_id(), format!("falaj.{}", event.op.letter()));
    let source = format!("/{pipeline}/{}", event.layout.table);
    let pairs: [(&str, &[u8]); 6] = [
        ("ce_specversion", b"1.0"),
        ("ce_id", id.as_bytes()),
        ("ce_source", source.as_bytes()),
        ("ce_type", kind.as_bytes()),
        ("ce_time", &time),
        ("content-type", b"application/json"),
    ];
    pairs
        .into_iter()
        .fold(OwnedHeaders::new_with_capacity(6), |h, (key, value)| h.insert(Header { key, value: Some(value) }))
}
