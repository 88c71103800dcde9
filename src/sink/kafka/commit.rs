//! The producing thread: owns the producer and the open Kafka transaction, and decides when it is closed.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant, SystemTime};

use rdkafka::bindings::rd_kafka_resp_err_t as RDKafkaRespErr;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::OwnedHeaders;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use tracing::warn;

use super::limit::queue_kbytes;
use super::reports::Reports;
use super::topic::Topics;
use crate::config::{self, Config};
use crate::error::{Error, Result};
use crate::kafka::{TIMEOUT, TRANSACTION_TIMEOUT, client_over, error, transaction_timeout};
use crate::lsn::Checkpoint;
use crate::sink::worker::{Next, Order, Orders};

/// An open transaction with nothing more coming is closed after this long: a little company halves the broker's work.
const COMPANY: Duration = Duration::from_millis(4);
/// Events that were committed longer ago than this, by both clocks, are a backlog: they get no small transactions, which would
/// cost the broker most of its time.
pub const BACKLOG: Duration = Duration::from_millis(100);
/// Each partition of a transaction costs the broker a marker. So one of a backlog may be open for this part of the time that
/// its events are late anyway …
const OF_DELAY: u32 = 8;
/// … but not longer than this many times `transaction_age`.
const AGES: u32 = 8;
/// The broker rolls back what it takes for abandoned: a transaction that is still open after `transaction.timeout.ms`. So none
/// gets older than this part of it, not even one in the middle of a transaction of Postgres whose next rows take long.
const OF_TIMEOUT: u32 = 3;
/// How long a full queue is flushed before a record tries it again.
const FULL: Duration = Duration::from_millis(2);
/// How long the end of a session waits for the open transaction to be rolled back.
const ROLL_BACK: Duration = Duration::from_secs(2);
/// One step of that.
const STEP: Duration = Duration::from_millis(50);

/// Records of several events, and the position after them.
pub(super) struct Piece {
    pub(super) records: Records,
    pub(super) topics: Arc<Vec<String>>,
    pub(super) checkpoint: Checkpoint,
    /// Commit now, whatever the transaction's size and age.
    pub(super) now: bool,
}

/// Records and the one buffer that they point into. It goes back and forth between loop and thread: taken from the system
/// anew for each piece, its pages would cost as much as their content.
#[derive(Default)]
pub(super) struct Records {
    pub(super) bytes: Vec<u8>,
    pub(super) list: Vec<Record>,
}

impl Records {
    /// Bytes that are kept for the next piece; a larger buffer held a few large rows.
    const KEPT: usize = 1 << 20;

    /// Empties it; `None` when it is too large to be kept.
    fn cleared(mut self) -> Option<Self> {
        self.bytes.clear();
        self.list.clear();
        (self.bytes.capacity() + self.list.capacity() * size_of::<Record>() <= Self::KEPT).then_some(self)
    }
}

pub(super) struct Record {
    pub(super) topic: usize,
    pub(super) key: Option<Range<usize>>,
    /// `None`: a tombstone.
    pub(super) value: Option<Range<usize>>,
    /// Commit time, ms since the Unix epoch; without one Kafka takes that of sending.
    pub(super) timestamp: Option<i64>,
    pub(super) partition: Option<i32>,
    pub(super) headers: Option<OwnedHeaders>,
}

/// Key and value of the record that says, within the transaction, how far its events reach.
pub(super) type Progress = Box<dyn Fn(Checkpoint) -> Result<(String, Vec<u8>)> + Send>;

/// The thread's side: owns the producer and the open Kafka transaction.
pub(super) struct Committer {
    producer: Arc<BaseProducer<Reports>>,
    config: config::Kafka,
    topic: String,
    progress: Progress,
    limit: usize,
    age: Duration,
    oldest: Duration,
    open: Option<Open>,
    spent: Sender<Records>,
}

struct Open {
    since: Instant,
    bytes: usize,
    /// How long ago the newest event had been committed when it came.
    delay: Duration,
    checkpoint: Checkpoint,
}

impl Committer {
    /// `spent` takes back what has been produced.
    pub(super) fn new(
        producer: BaseProducer<Reports>,
        config: &Config,
        progress: Progress,
        spent: Sender<Records>,
    ) -> Self {
        Self {
            producer: Arc::new(producer),
            config: config.kafka.clone(),
            topic: config.checkpoint_topic(),
            progress,
            limit: config.produce.transaction_bytes.0,
            age: config.produce.transaction_age.0,
            oldest: oldest(&config.kafka),
            open: None,
            spent,
        }
    }

    pub(super) fn run(mut self, orders: &Orders<Piece>) -> Result<()> {
        let producer = Arc::clone(&self.producer);
        let mut topics = Topics::new(&producer);
        loop {
            match orders.next(self.open.as_ref().map(|open| self.patience(open))) {
                Next::Order(Order { what: piece, .. }) => {
                    self.add(&piece, &mut topics)?;
                    if let Some(records) = piece.records.cleared() {
                        let _ = self.spent.send(records);
                    }
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
        let elapsed = open.since.elapsed();
        let left = self.age_limit(open).saturating_sub(elapsed);
        match open.checkpoint.partial {
            None if open.delay < BACKLOG => COMPANY.saturating_sub(elapsed),
            None => left.min(self.age),
            Some(_) => left,
        }
    }

    fn is_due(&self, now: bool) -> bool {
        let Some(open) = &self.open else { return false };
        now || open.bytes >= self.limit || open.since.elapsed() >= self.age_limit(open)
    }

    /// How old the open transaction may become: in the middle of one of Postgres as old as any.
    fn age_limit(&self, open: &Open) -> Duration {
        match open.checkpoint.partial {
            None => stretched(self.age, open.delay).min(self.oldest),
            Some(_) => self.oldest,
        }
    }

    fn add(&mut self, piece: &Piece, topics: &mut Topics<'_>) -> Result<()> {
        if self.open.is_none() {
            self.producer.begin_transaction().map_err(|e| self.failed(&e))?;
        }
        let open = self.open.get_or_insert(Open {
            since: Instant::now(),
            bytes: 0,
            delay: Duration::ZERO,
            checkpoint: piece.checkpoint,
        });
        open.bytes += piece.records.bytes.len();
        open.checkpoint = piece.checkpoint;
        if let Some(last) = piece.records.list.last() {
            open.delay = last.timestamp.map(age_of).unwrap_or_default();
        }
        for record in &piece.records.list {
            self.produce(piece, record, topics)?;
        }
        Ok(())
    }

    fn produce(&self, piece: &Piece, record: &Record, topics: &mut Topics<'_>) -> Result<()> {
        let name = &piece.topics[record.topic];
        let bytes = |range: &Option<Range<usize>>| range.clone().map(|range| &piece.records.bytes[range]);
        let (key, value) = (bytes(&record.key), bytes(&record.value));
        if record.headers.is_none() {
            let topic = topics.at(record.topic, name).map_err(|e| self.failed(&e))?;
            return self.queue(|| topic.send(key, value, record.timestamp, record.partition));
        }
        self.queue(|| {
            let mut out = BaseRecord::<[u8], [u8]>::to(name);
            (out.key, out.payload) = (key, value);
            (out.timestamp, out.partition) = (record.timestamp, record.partition);
            out.headers.clone_from(&record.headers);
            self.producer.send(out).map_err(|(e, _)| e)
        })
    }

    /// librdkafka's own queue is bounded; while it is full, wait for the broker to take some of it.
    fn queue(&self, send: impl Fn() -> Result<(), KafkaError>) -> Result<()> {
        loop {
            match send() {
                Ok(()) => return Ok(()),
                Err(KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull)) => self.flush(FULL),
                Err(e) => return Err(self.failed(&e)),
            }
        }
    }

    fn commit(&mut self, orders: &Orders<Piece>) -> Result<()> {
        let Some(Open { checkpoint, since, bytes, .. }) = self.open.take() else { return Ok(()) };
        let (key, value) = (self.progress)(checkpoint)?;
        let record = || BaseRecord::to(&self.topic).key(key.as_bytes()).payload(value.as_slice()).partition(0);
        self.queue(|| self.producer.send(record()).map_err(|(e, _)| e))?;
        // `commit_transaction` would wait for the records too, but in steps of 100 ms.
        self.flush(TIMEOUT);
        self.retrying(|p| p.commit_transaction(TIMEOUT))?;
        orders.durable(checkpoint);
        metrics::histogram!("falaj_produce_kafka_transaction_seconds").record(since.elapsed().as_secs_f64());
        metrics::counter!("falaj_produce_kafka_bytes_total").increment(bytes as u64);
        Ok(())
    }

    /// Sends what is queued without lingering, until the broker has every record or `longest` is over. What was not delivered
    /// makes `commit_transaction` fail; it is waited for until `poll` has taken the report of it, so that is done in between.
    fn flush(&self, longest: Duration) {
        let (client, deadline) = (self.producer.client().native_ptr(), Instant::now() + longest);
        loop {
            let step = deadline.saturating_duration_since(Instant::now()).min(STEP);
            // Rounded up: with 0 it returns at once, and the last millisecond would be spent waking librdkafka's threads.
            let step = step.as_micros().div_ceil(1000) as i32;
            // SAFETY: the pointer belongs to `self.producer`, which lives through the call; rd_kafka_flush is thread-safe.
            let flushed = unsafe { rdkafka::bindings::rd_kafka_flush(client, step) };
            self.producer.poll(Duration::ZERO);
            if flushed == RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR || Instant::now() >= deadline {
                return;
            }
        }
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
    fn retrying(&self, call: impl Fn(&BaseProducer<Reports>) -> Result<(), KafkaError>) -> Result<()> {
        loop {
            match call(&self.producer) {
                Ok(()) => return Ok(()),
                Err(KafkaError::Transaction(e)) if e.is_retriable() && !e.txn_requires_abort() => {
                    warn!(error = %e, "Kafka has not answered a commit, asking again");
                }
                Err(e) => return Err(self.failed(&e)),
            }
        }
    }

    fn failed(&self, e: &KafkaError) -> Error {
        // A commit that fails says only that something was not taken; what, is in the reports.
        self.producer.poll(STEP);
        if let Some(refusal) = self.producer.context().refusal() {
            return refusal;
        }
        match self.producer.client().fatal_error() {
            Some((
                RDKafkaErrorCode::Fenced | RDKafkaErrorCode::ProducerFenced | RDKafkaErrorCode::InvalidProducerEpoch,
                why,
            )) => Error::Fenced(format!(
                "another producer of pipeline and slot has taken over Kafka, or the broker has given up a transaction that was \
                 open for longer than transaction.timeout.ms, as after a pause of this machine (then start it again): {why}"
            )),
            _ => error(&self.config, e),
        }
    }
}

/// How old any transaction may become.
fn oldest(config: &config::Kafka) -> Duration {
    transaction_timeout(config) / OF_TIMEOUT
}

/// How old a transaction may become whose newest event came `delay` after its commit: `age` while there is no long backlog.
fn stretched(age: Duration, delay: Duration) -> Duration {
    (delay / OF_DELAY).clamp(age, age.saturating_mul(AGES))
}

/// Time since a commit, by this machine's clock. One that lies behind Postgres's makes it zero; one that lies ahead makes live
/// events look late, and they then wait for the age of a backlog's transaction. `falaj check` tells how far it is off.
fn age_of(commit_ms: i64) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(Duration::from_millis(commit_ms.max(0) as u64))
}

/// A producer of this pipeline and slot (or replay); its `init_transactions` fences whoever had the id before.
pub(super) fn producer(config: &Config, slot: &str) -> Result<BaseProducer<Reports>> {
    let mut settings = client_over(
        &config.kafka,
        &[
            // So long that batches go when they are full, and with a flush: that of a full queue and that of a commit. While
            // a partition has a record older than this and a request on its way, librdkafka's thread asks without waiting
            // whether it may send: a third of its CPU time with 30 ms (docs/benchmarks.md).
            ("linger.ms", "1000"),
            ("batch.size", "262144"),
            ("batch.num.messages", "20000"),
            ("queue.buffering.max.messages", "200000"),
            ("transaction.timeout.ms", TRANSACTION_TIMEOUT),
            ("message.timeout.ms", "45000"),
            ("partitioner", "murmur2_random"),
            // A fifth of the bytes for the kernel to copy, for the network and for the broker's disk (docs/benchmarks.md).
            ("compression.type", "lz4"),
        ],
    );
    settings
        .set("transactional.id", format!("{}.{slot}", config.pipeline))
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("queue.buffering.max.kbytes", queue_kbytes(&config.kafka)?)
        .set("delivery.report.only.error", "true");
    settings.create_with_context(Reports::default()).map_err(|e| error(&config.kafka, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_grows_older_with_the_delay_of_its_events() {
        let ms = Duration::from_millis;
        let limits = [0, 399, 400, 800, 3200, 86_400_000].map(|delay| stretched(ms(50), ms(delay)));
        assert_eq!(limits, [50, 50, 50, 100, 400, 400].map(ms));
        assert_eq!(stretched(Duration::MAX, ms(1)), Duration::MAX);
    }

    #[test]
    fn settings_that_do_not_fit_together_are_refused() {
        let mut config = Config::load(None, []).unwrap();
        config.kafka.client.insert("transaction.timeout.ms".into(), "3000".into());
        assert_eq!(oldest(&config.kafka), Duration::from_secs(1));
        let refused = producer(&config, "slot").err().unwrap();
        assert!(refused.exit_code() == 78 && refused.to_string().contains("message.timeout.ms"), "{refused}");
        config.kafka.client.insert("message.timeout.ms".into(), "3000".into());
        assert!(producer(&config, "slot").is_ok());
    }
}
