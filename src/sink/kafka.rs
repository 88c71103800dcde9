//! The Kafka sink: one Kafka transaction = events + a record of the position, on a compacted, single-partition topic.
//!
//! Start order: the slot is held → `init_transactions` fences whoever held it before → the checkpoint topic is read,
//! read_committed, to its end. A transaction larger than the limit flows as several: the position has the ordinal.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::{Offset, TopicPartitionList};
use serde::{Deserialize, Serialize};

use super::worker::{Next, Order, Orders, Worker};
use super::{Opened, Sink, Stored};
use crate::change::Op;
use crate::config::{self, Config};
use crate::error::{Error, Result};
use crate::event::{Event, Layout};
use crate::kafka::{TIMEOUT, client, client_over, error, partitions};
use crate::lsn::{Checkpoint, Lsn, Position, SlotIdentity};

/// An open transaction with nothing more coming is closed after this long: a little company halves the broker's work.
const COMPANY: Duration = Duration::from_millis(4);
/// What is buffered is handed to the producing thread in pieces of about this size.
const PIECE: usize = 256 << 10;

/// Value of a checkpoint record; its key is the slot's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointRecord {
    /// The stream that the LSNs belong to.
    pub identity: SlotIdentity,
    /// Everything committed below it is in.
    pub end_lsn: Lsn,
    /// Last event of a transaction that is half in; absent at a transaction boundary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
}

impl CheckpointRecord {
    fn checkpoint(&self) -> Checkpoint {
        Checkpoint { resume: self.end_lsn, partial: self.position }
    }
}

/// Records of several events in one buffer, and the position after them.
struct Piece {
    bytes: Vec<u8>,
    records: Vec<Record>,
    topics: Arc<Vec<String>>,
    checkpoint: Checkpoint,
    /// Commit now, whatever the transaction's size and age.
    now: bool,
}

struct Record {
    topic: usize,
    key: Option<Range<usize>>,
    value: Range<usize>,
    /// ms since the Unix epoch.
    timestamp: i64,
    partition: Option<i32>,
    headers: Option<OwnedHeaders>,
}

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

/// Fences the previous owner and reads the position. Call it only while the slot is held.
///
/// # Errors
/// [`Error::Refused`] for rights, absent topics or a foreign checkpoint; [`Error::Unreachable`] without a broker.
pub async fn open(config: Arc<Config>, identity: &SlotIdentity) -> Result<Opened> {
    let (c, id) = (Arc::clone(&config), identity.clone());
    let blocking = tokio::task::spawn_blocking(move || {
        require_topic(&c, &c.checkpoint_topic())?;
        let producer = producer(&c, &id.slot)?;
        let position = read_position(&c, &id)?;
        Ok((producer, position))
    });
    let (producer, position) = blocking.await.map_err(|e| Error::fatal("opening the Kafka sink", e))??;
    // Below every LSN: a sink without a position has nothing, and nothing of it may be acknowledged.
    let start = position.unwrap_or(Checkpoint::whole(Lsn(0)));
    let committer = Committer {
        producer,
        config: config.kafka.clone(),
        topic: config.checkpoint_topic(),
        identity: identity.clone(),
        limit: config.produce.transaction_bytes.0,
        age: config.produce.transaction_age.0,
        open: None,
    };
    let worker = Worker::spawn("kafka", config.produce.queue_bytes.0, start, move |orders| committer.run(&orders))?;
    let (topics, known, bytes, records) = Default::default();
    let sink = Box::new(KafkaSink { config, worker, start, topics, known, bytes, records });
    Ok(Opened { sink, position: position.map(Stored) })
}

/// Reads the sink's position without taking it over: for a run that leaves this sink out, and for `status`.
///
/// # Errors
/// As [`open`].
pub async fn peek(config: Arc<Config>, identity: &SlotIdentity) -> Result<Option<Stored>> {
    let id = identity.clone();
    tokio::task::spawn_blocking(move || {
        require_topic(&config, &config.checkpoint_topic())?;
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
            let (config, name) = (Arc::clone(&self.config), topic.clone());
            let found = tokio::task::spawn_blocking(move || require_topic(&config, &name)).await;
            found.map_err(|e| Error::fatal("looking up a topic", e))??;
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
    async fn hand_over(&mut self, checkpoint: Checkpoint, now: bool) -> Result<()> {
        let capacity = self.bytes.len();
        let bytes = std::mem::replace(&mut self.bytes, Vec::with_capacity(capacity));
        let records = std::mem::take(&mut self.records);
        let size = bytes.len() + records.len() * size_of::<Record>();
        let piece = Piece { bytes, records, topics: Arc::clone(&self.topics), checkpoint, now };
        self.worker.send(piece, size).await
    }
}

/// The thread's side: owns the producer and the open Kafka transaction.
struct Committer {
    producer: BaseProducer,
    config: config::Kafka,
    topic: String,
    identity: SlotIdentity,
    limit: usize,
    age: Duration,
    open: Option<Open>,
}

struct Open {
    since: Instant,
    bytes: usize,
    checkpoint: Checkpoint,
}

impl Committer {
    fn run(mut self, orders: &Orders<Piece>) -> Result<()> {
        loop {
            let patience = match &self.open {
                Some(open) if open.checkpoint.partial.is_none() => Some(COMPANY.saturating_sub(open.since.elapsed())),
                _ => None,
            };
            match orders.next(patience) {
                Next::Order(Order { what: piece, .. }) => {
                    self.add(&piece)?;
                    if self.is_due(piece.now) {
                        self.commit(orders)?;
                    }
                }
                Next::Quiet => self.commit(orders)?,
                Next::Gone => return self.roll_back(),
            }
        }
    }

    fn is_due(&self, now: bool) -> bool {
        let Some(open) = &self.open else { return false };
        let whole = open.checkpoint.partial.is_none();
        now || open.bytes >= self.limit || (whole && open.since.elapsed() >= self.age)
    }

    fn add(&mut self, piece: &Piece) -> Result<()> {
        if self.open.is_none() {
            self.producer.begin_transaction().map_err(|e| self.failed(&e))?;
        }
        let open = self.open.get_or_insert(Open { since: Instant::now(), bytes: 0, checkpoint: piece.checkpoint });
        open.bytes += piece.bytes.len();
        open.checkpoint = piece.checkpoint;
        for record in &piece.records {
            self.produce(piece, record)?;
        }
        Ok(())
    }

    fn produce(&self, piece: &Piece, record: &Record) -> Result<()> {
        let mut out = BaseRecord::<[u8], [u8]>::to(&piece.topics[record.topic])
            .payload(&piece.bytes[record.value.clone()])
            .timestamp(record.timestamp);
        out.key = record.key.clone().map(|key| &piece.bytes[key]);
        out.partition = record.partition;
        out.headers.clone_from(&record.headers);
        self.send(out)
    }

    /// librdkafka's own queue is bounded; while it is full, wait for the broker.
    fn send(&self, mut record: BaseRecord<'_, [u8], [u8]>) -> Result<()> {
        loop {
            record = match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => back,
                Err((e, _)) => return Err(self.failed(&e)),
            };
            self.producer.poll(Duration::from_millis(1));
        }
    }

    fn commit(&mut self, orders: &Orders<Piece>) -> Result<()> {
        let Some(Open { checkpoint, since, bytes }) = self.open.take() else { return Ok(()) };
        let Checkpoint { resume: end_lsn, partial: position } = checkpoint;
        let record = CheckpointRecord { identity: self.identity.clone(), end_lsn, position };
        let value = serde_json::to_vec(&record).map_err(|e| Error::fatal("writing a checkpoint", e))?;
        self.send(
            BaseRecord::to(&self.topic).key(self.identity.slot.as_bytes()).payload(value.as_slice()).partition(0),
        )?;
        self.drain();
        self.retrying(|p| p.commit_transaction(TIMEOUT))?;
        orders.durable(checkpoint);
        metrics::histogram!("falaj_produce_kafka_transaction_seconds").record(since.elapsed().as_secs_f64());
        metrics::counter!("falaj_produce_kafka_bytes_total").increment(bytes as u64);
        Ok(())
    }

    /// Waits until the broker has every record. `commit_transaction` would do so too, but in steps of 100 ms.
    fn drain(&self) {
        let client = self.producer.client().native_ptr();
        // SAFETY: the pointer belongs to `self.producer`, which lives through the call; rd_kafka_flush is thread-safe.
        // Its result needs no look: what was not delivered makes commit_transaction fail.
        unsafe { rdkafka::bindings::rd_kafka_flush(client, TIMEOUT.as_millis() as i32) };
    }

    fn roll_back(self) -> Result<()> {
        match self.open {
            None => Ok(()),
            Some(_) => self.retrying(|p| p.abort_transaction(TIMEOUT)),
        }
    }

    /// Retriable errors ask for the same call again; any other one ends this producer, and a new one starts from the
    /// position that is stored.
    fn retrying(&self, call: impl Fn(&BaseProducer) -> Result<(), KafkaError>) -> Result<()> {
        loop {
            match call(&self.producer) {
                Ok(()) => return Ok(()),
                Err(KafkaError::Transaction(e)) if e.is_retriable() && !e.txn_requires_abort() => {}
                Err(e) => return Err(self.failed(&e)),
            }
        }
    }

    fn failed(&self, e: &KafkaError) -> Error {
        match self.producer.client().fatal_error() {
            Some((
                RDKafkaErrorCode::Fenced | RDKafkaErrorCode::ProducerFenced | RDKafkaErrorCode::InvalidProducerEpoch,
                why,
            )) => Error::Fenced(format!("another producer of pipeline and slot has taken over Kafka: {why}")),
            _ => error(&self.config, e),
        }
    }
}

fn producer(config: &Config, slot: &str) -> Result<BaseProducer> {
    let mut settings = client_over(
        &config.kafka,
        &[
            ("linger.ms", "5"),
            ("batch.size", "1048576"),
            ("batch.num.messages", "20000"),
            ("queue.buffering.max.kbytes", "16384"),
            ("queue.buffering.max.messages", "200000"),
            ("transaction.timeout.ms", "60000"),
            ("message.timeout.ms", "45000"),
            ("partitioner", "murmur2_random"),
        ],
    );
    settings
        .set("transactional.id", format!("{}.{slot}", config.pipeline))
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("delivery.report.only.error", "true");
    let producer: BaseProducer = settings.create().map_err(|e| error(&config.kafka, &e))?;
    producer.init_transactions(TIMEOUT).map_err(|e| error(&config.kafka, &e))?;
    Ok(producer)
}

/// Topics are made by `init`, never by accident.
fn require_topic(config: &Config, topic: &str) -> Result<()> {
    match partitions(&config.kafka, topic)? {
        Some(_) => Ok(()),
        None => Err(Error::refused(
            "kafka_topics",
            format!("topic {topic} does not exist"),
            "a topic for the checkpoint and one for each published table",
            "falaj init",
        )),
    }
}

/// The last checkpoint record of this slot.
fn read_position(config: &Config, identity: &SlotIdentity) -> Result<Option<Checkpoint>> {
    let mut settings: ClientConfig = client(&config.kafka);
    settings
        .set("group.id", format!("{}.checkpoint", config.pipeline))
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error")
        .set("enable.partition.eof", "true");
    let consumer: BaseConsumer = settings.create().map_err(|e| error(&config.kafka, &e))?;
    let topic = config.checkpoint_topic();
    let (low, high) = consumer.fetch_watermarks(&topic, 0, TIMEOUT).map_err(|e| error(&config.kafka, &e))?;
    // The newest record is near the end; the whole topic is read only if it is not.
    for window in [16, 1_000, i64::MAX] {
        let from = high.saturating_sub(window).max(low);
        let found = last_record(config, &consumer, &topic, from, identity)?;
        if found.is_some() || from == low {
            return Ok(found.map(|r| r.checkpoint()));
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
) -> Result<Option<CheckpointRecord>> {
    let mut assignment = TopicPartitionList::new();
    let assigned = assignment.add_partition_offset(topic, 0, Offset::Offset(from));
    assigned.and_then(|()| consumer.assign(&assignment)).map_err(|e| error(&config.kafka, &e))?;
    let mut found = None;
    let deadline = Instant::now() + TIMEOUT;
    while Instant::now() < deadline {
        match consumer.poll(Duration::from_millis(100)) {
            None => {}
            // On a compacted topic the last record of a key is the one that counts; those before it may go at any time.
            Some(Err(KafkaError::PartitionEOF(_))) => {
                let parse = |(offset, value): (i64, Vec<u8>)| parse_record(topic, offset, &value, identity);
                return found.map(parse).transpose();
            }
            Some(Err(e)) => return Err(error(&config.kafka, &e)),
            Some(Ok(message)) if message.key() == Some(identity.slot.as_bytes()) => {
                found = Some((message.offset(), message.payload().unwrap_or_default().to_vec()));
            }
            Some(Ok(_)) => {}
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
        };
        let value = serde_json::to_vec(&record).unwrap();
        assert_eq!(
            String::from_utf8(value.clone()).unwrap(),
            r#"{"identity":{"system_id":"7","timeline":1,"slot":"falaj"},"end_lsn":"0/100","position":{"commit_lsn":"0/12C","ordinal":4}}"#
        );
        assert_eq!(parse_record("t", 0, &value, &identity).unwrap(), record);
        for other in
            [SlotIdentity { timeline: 2, ..identity.clone() }, SlotIdentity { system_id: "8".into(), ..identity }]
        {
            assert_eq!(parse_record("t", 0, &value, &other).unwrap_err().exit_code(), 78);
        }
        assert_eq!(parse_record("t", 0, b"{}", &record.identity).unwrap_err().exit_code(), 78);
    }
}
