//! The producing thread: owns the producer and the open Kafka transaction, and decides when it is closed.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::OwnedHeaders;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

use crate::config::{self, Config};
use crate::error::{Error, Result};
use crate::kafka::{TIMEOUT, client_over, error};
use crate::lsn::Checkpoint;
use crate::sink::worker::{Next, Order, Orders};

/// An open transaction with nothing more coming is closed after this long: a little company halves the broker's work.
const COMPANY: Duration = Duration::from_millis(4);
/// … but not while events come that were committed longer ago than this: then there is a backlog, and small transactions
/// would cost the broker most of its time.
const BACKLOG: Duration = Duration::from_millis(100);
/// How long the end of a session waits for the open transaction to be rolled back.
const ROLL_BACK: Duration = Duration::from_secs(2);
/// One step of that.
const STEP: Duration = Duration::from_millis(50);

/// Records of several events in one buffer, and the position after them.
pub(super) struct Piece {
    pub(super) bytes: Vec<u8>,
    pub(super) records: Vec<Record>,
    pub(super) topics: Arc<Vec<String>>,
    pub(super) checkpoint: Checkpoint,
    /// Commit now, whatever the transaction's size and age.
    pub(super) now: bool,
}

pub(super) struct Record {
    pub(super) topic: usize,
    pub(super) key: Option<Range<usize>>,
    pub(super) value: Range<usize>,
    /// ms since the Unix epoch.
    pub(super) timestamp: i64,
    pub(super) partition: Option<i32>,
    pub(super) headers: Option<OwnedHeaders>,
}

/// Key and value of the record that says, within the transaction, how far its events reach.
pub(super) type Progress = Box<dyn Fn(Checkpoint) -> Result<(String, Vec<u8>)> + Send>;

/// The thread's side: owns the producer and the open Kafka transaction.
pub(super) struct Committer {
    producer: BaseProducer,
    config: config::Kafka,
    topic: String,
    progress: Progress,
    limit: usize,
    age: Duration,
    open: Option<Open>,
}

struct Open {
    since: Instant,
    bytes: usize,
    /// The newest event was committed a moment ago.
    is_live: bool,
    checkpoint: Checkpoint,
}

impl Committer {
    pub(super) fn new(producer: BaseProducer, config: &Config, progress: Progress) -> Self {
        Self {
            producer,
            config: config.kafka.clone(),
            topic: config.checkpoint_topic(),
            progress,
            limit: config.produce.transaction_bytes.0,
            age: config.produce.transaction_age.0,
            open: None,
        }
    }

    pub(super) fn run(mut self, orders: &Orders<Piece>) -> Result<()> {
        loop {
            let patience = match &self.open {
                Some(open) if open.checkpoint.partial.is_none() => Some(self.patience(open)),
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

    /// How long the open transaction still waits for more.
    fn patience(&self, open: &Open) -> Duration {
        let company = if open.is_live { COMPANY } else { self.age };
        company.saturating_sub(open.since.elapsed())
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
        let open = self.open.get_or_insert(Open {
            since: Instant::now(),
            bytes: 0,
            is_live: true,
            checkpoint: piece.checkpoint,
        });
        open.bytes += piece.bytes.len();
        open.checkpoint = piece.checkpoint;
        open.is_live = piece.records.last().is_none_or(|r| age_of(r.timestamp) < BACKLOG);
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
        let Some(Open { checkpoint, since, bytes, .. }) = self.open.take() else { return Ok(()) };
        let (key, value) = (self.progress)(checkpoint)?;
        self.send(BaseRecord::to(&self.topic).key(key.as_bytes()).payload(value.as_slice()).partition(0))?;
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

    /// Aborting drops what is queued, and then waits for the reports of just that, which nobody takes but `poll`. Not for
    /// long: what stays open here is rolled back by whoever opens the producer next.
    fn roll_back(self) -> Result<()> {
        if self.open.is_none() {
            return Ok(());
        }
        let deadline = Instant::now() + ROLL_BACK;
        loop {
            match self.producer.abort_transaction(STEP) {
                Ok(()) => return Ok(()),
                Err(KafkaError::Transaction(e)) if e.is_retriable() && Instant::now() < deadline => {
                    self.producer.poll(Duration::ZERO);
                }
                Err(e) => return Err(self.failed(&e)),
            }
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

/// Time since a commit, by this machine's clock; a clock that lies behind Postgres's makes it zero.
fn age_of(commit_ms: i64) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(Duration::from_millis(commit_ms.max(0) as u64))
}

/// A producer of this pipeline and slot; its `init_transactions` fences whoever had the id before.
pub(super) fn producer(config: &Config, slot: &str) -> Result<BaseProducer> {
    let mut settings = client_over(
        &config.kafka,
        &[
            ("linger.ms", "20"),
            ("batch.size", "1048576"),
            ("batch.num.messages", "20000"),
            ("queue.buffering.max.kbytes", "8192"),
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
    settings.create().map_err(|e| error(&config.kafka, &e))
}
