//! The Kafka sink: one Kafka transaction = events + a record of the position, on a compacted, single-partition topic.
//!
//! Start order: the slot is held → `init_transactions` fences whoever held it before → the checkpoint topic is read,
//! read_committed, to its end. A transaction larger than the limit flows as several: the position has the ordinal.

mod commit;
pub mod copy;
mod history;
mod limit;
mod position;
mod reports;
mod topic;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use async_trait::async_trait;
use rdkafka::message::{Header, Headers, OwnedHeaders};
use rdkafka::producer::{BaseProducer, Producer};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::worker::Worker;
use super::{Opened, Sink, Stored};
use crate::change::Op;
use crate::config::{self, Config, TooLarge};
use crate::envelope::{Envelope, Part};
use crate::error::{Error, Result};
use crate::event::{Event, Layout};
use crate::kafka;
use crate::lsn::{Checkpoint, Lsn, SlotIdentity};
use crate::source::conn::Conninfo;
use crate::value::Converted;
pub use commit::BACKLOG;
use commit::{Committer, Piece, Progress, Record, Records, producer};
pub use history::{Fenced, fence, open_history, read_history};
pub use limit::require_room;
use limit::{HEADERS, Limit, write_note};
use position::{progress, read_position, require, require_table};
use reports::Reports;

/// What is buffered is handed to the producing thread in pieces of about this size.
const PIECE: usize = 256 << 10;
/// Index of the dead-letter topic; that of a layout is its generation and one.
const DEAD_LETTER: usize = 0;

/// The loop's side of the sink.
pub struct KafkaSink {
    config: Arc<Config>,
    worker: Worker<Piece>,
    start: Checkpoint,
    topics: Arc<Vec<String>>,
    known: BTreeSet<String>,
    records: Records,
    spent: Receiver<Records>,
    limit: Limit,
    /// `None`: the flat form.
    envelope: Option<Envelope>,
    /// A piece of a transaction was handed over whose end was not.
    within: bool,
}

/// Fences the previous owner and reads the position. Call it only while the slot is held. `tables` are the published ones:
/// each needs its topic before the first event of any is written. `stop` breaks off the wait for transactions of others.
///
/// # Errors
/// [`Error::Refused`] for rights, absent topics or a foreign checkpoint; [`Error::Unreachable`] without a broker.
pub async fn open(
    config: Arc<Config>,
    identity: &SlotIdentity,
    tables: &[String],
    stop: &CancellationToken,
) -> Result<Opened> {
    let (c, id, stop) = (Arc::clone(&config), identity.clone(), stop.clone());
    let known: BTreeSet<String> = tables.iter().map(|table| config.topic(table)).collect();
    let letters = (config.kafka.too_large == TooLarge::DeadLetter).then(|| config.dead_letter_topic());
    let needed: Vec<String> = known.iter().cloned().chain(letters).collect();
    let blocking = tokio::task::spawn_blocking(move || {
        let producer = producer(&c, &id.slot)?;
        let topics = kafka::topics_of(&c.kafka, producer.client(), kafka::TIMEOUT);
        let topics = topics.map_err(|e| kafka::explained(&c.kafka, e))?;
        require(&topics, &c.checkpoint_topic(), &needed)?;
        // Whose topics they are comes first: the owner of others is not put out of them.
        read_position(&c, &id, None)?;
        producer.init_transactions(kafka::TIMEOUT).map_err(|e| kafka::error(&c.kafka, &e))?;
        let position = read_position(&c, &id, Some(&stop))?;
        Ok((producer, position))
    });
    let (producer, position) = blocking.await.map_err(|e| Error::fatal("opening the Kafka sink", e))??;
    require_room(&config, &known.iter().cloned().collect::<Vec<_>>()).await?;
    // Below every LSN: a sink without a position has nothing, and nothing of it may be acknowledged.
    let start = position.unwrap_or(Checkpoint::whole(Lsn(0)));
    let progress = progress(identity.clone(), identity.slot.clone(), None);
    let sink = Box::new(KafkaSink::start(config, producer, progress, start, known)?);
    Ok(Opened { sink, position: position.map(Stored) })
}

/// Reads the sink's position without taking it over: for a run that leaves this sink out, and for `status`. What lies behind a
/// transaction that others have left open is waited for with `settled`, which breaks the wait off; else it is not seen.
///
/// # Errors
/// As [`open`].
pub async fn peek(
    config: Arc<Config>,
    identity: &SlotIdentity,
    settled: Option<&CancellationToken>,
) -> Result<Option<Stored>> {
    let (id, settled) = (identity.clone(), settled.cloned());
    tokio::task::spawn_blocking(move || {
        require(&kafka::topics(&config.kafka, kafka::TIMEOUT)?, &config.checkpoint_topic(), [])?;
        Ok(read_position(&config, &id, settled.as_ref())?.map(Stored))
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
            let topics = topics.map_err(|e| Error::fatal("looking up a topic", e))??;
            require_table(&topics, &topic, layout, &self.config.kafka)?;
            self.known.insert(topic.clone());
        }
        let index = index(layout);
        let topics = Arc::make_mut(&mut self.topics);
        topics.resize(topics.len().max(index + 1), String::new());
        topics[index] = topic;
        Ok(())
    }

    fn push(&mut self, event: &Event<'_>) -> Result<()> {
        self.push_together(&[], Some(event))
    }

    fn push_together(&mut self, messages: &[Event<'_>], row: Option<&Event<'_>>) -> Result<()> {
        let before = (self.records.bytes.len(), self.records.list.len());
        let taken = messages.iter().try_for_each(|event| self.take_event(event));
        let taken = taken.and_then(|()| row.map_or(Ok(()), |event| self.take_event(event)));
        if taken.is_err() {
            self.records.bytes.truncate(before.0);
            self.records.list.truncate(before.1);
        }
        taken
    }

    fn may_refuse(&self) -> bool {
        true
    }

    /// What is not proven goes its way too: the broker rolls back what stays open.
    async fn mark(&mut self, checkpoint: Checkpoint, _: bool) -> Result<()> {
        let checkpoint = checkpoint.max(self.start);
        let whole = checkpoint.partial.is_none();
        // The end of a transaction has no rows of its own; without it the last ones would wait for what comes next.
        let nothing = self.is_empty() && !(whole && self.within);
        if nothing || (!whole && self.records.bytes.len() < PIECE) {
            return Ok(());
        }
        self.hand_over(checkpoint, false).await
    }

    async fn flush(&mut self, checkpoint: Checkpoint) -> Result<()> {
        let checkpoint = checkpoint.max(self.start);
        self.hand_over(checkpoint, true).await
    }

    fn is_empty(&self) -> bool {
        self.records.list.is_empty()
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

/// A record's timestamp: the commit's time in ms.
fn timestamp(event: &Event<'_>) -> Option<i64> {
    event.commit_time().map(|at| at.div_euclid(1000))
}

/// Index of a layout's topic.
fn index(layout: &Layout) -> usize {
    layout.generation as usize + 1
}

impl KafkaSink {
    /// Starts the producing thread. `known` are the topics that are there.
    fn start(
        config: Arc<Config>,
        producer: BaseProducer<Reports>,
        progress: Progress,
        start: Checkpoint,
        known: BTreeSet<String>,
    ) -> Result<Self> {
        let limit = Limit::of(&config.kafka)?;
        let envelope = match config.kafka.envelope {
            config::Envelope::Flat => None,
            config::Envelope::Debezium => {
                Some(Envelope::new(&config.pipeline, Conninfo::parse(&config.postgres.url)?.dbname()))
            }
        };
        let (give_back, spent) = channel();
        let committer = Committer::new(producer, &config, progress, give_back);
        let worker = Worker::spawn("kafka", config.produce.queue_bytes.0, start, move |orders| committer.run(&orders))?;
        let (topics, records) = (Arc::new(vec![config.dead_letter_topic()]), Records::default());
        Ok(Self { config, worker, start, topics, known, records, spent, limit, envelope, within: false })
    }

    /// Encodes an event, unless it is in already.
    fn take_event(&mut self, event: &Event<'_>) -> Result<()> {
        if self.start.has(event.at) {
            return Ok(());
        }
        if self.envelope.is_some() && event.is_key_changed() && event.layout.is_keyed_by_row() {
            self.take(event, Part::Gone)?;
            return self.take(event, Part::Come);
        }
        self.take(event, Part::Whole)
    }

    /// Encodes an event, or one part of it, with what follows it for compacted topics.
    fn take(&mut self, event: &Event<'_>, part: Part) -> Result<()> {
        let failed = |e| Error::fatal(format_args!("event {} of table {}", event.at, event.layout.table), e);
        let begin = self.records.bytes.len();
        let keyed = match part {
            Part::Gone => event.write_previous_key(&mut self.records.bytes),
            _ => event.write_key(&mut self.records.bytes),
        };
        let key = keyed.map_err(failed)?.then_some(begin..self.records.bytes.len());
        let start = self.records.bytes.len();
        let written = match &self.envelope {
            None => event.write_json(&mut self.records.bytes),
            Some(envelope) => envelope.write(event, part, &mut self.records.bytes),
        };
        written.map_err(failed)?;
        let headers = self.headers(event, part).map_err(failed)?;
        let size = self.records.bytes.len() - begin + headers.as_ref().map_or(0, header_bytes);
        if size > self.limit.bytes {
            return self.too_large(event, part, begin, start, size);
        }
        let mut record = Record {
            topic: index(event.layout),
            key,
            value: Some(start..self.records.bytes.len()),
            timestamp: timestamp(event),
            partition: (event.op == Op::Truncate).then_some(0),
            headers,
        };
        if !self.config.kafka.tombstones {
            self.records.list.push(record);
            return Ok(());
        }
        if event.op == Op::Truncate {
            // A compacted topic takes no record without a key.
            let start = self.records.bytes.len();
            event.write_id(&mut self.records.bytes);
            record.key = Some(start..self.records.bytes.len());
        }
        let key = record.key.clone();
        self.records.list.push(record);
        self.bury(event, part, key).map_err(failed)
    }

    /// CloudEvents where configured; in Debezium's envelope each half of a changed key names the other key.
    fn headers(&self, event: &Event<'_>, part: Part) -> Converted<Option<OwnedHeaders>> {
        let headers = self.config.kafka.headers.as_ref().map(|_| cloud_event(event, &self.config.pipeline));
        let mut other = Vec::new();
        let name = match part {
            Part::Whole => return Ok(headers),
            Part::Gone if event.write_key(&mut other)? => "__debezium.newkey",
            Part::Come if event.write_previous_key(&mut other)? => "__debezium.oldkey",
            Part::Gone | Part::Come => return Ok(headers),
        };
        let other = Header { key: name, value: Some(&other) };
        Ok(Some(headers.unwrap_or_default().insert(other)))
    }

    /// For compacted topics: a record without value for a key that no row has any more. `key` is that of the event.
    fn bury(&mut self, event: &Event<'_>, part: Part, key: Option<Range<usize>>) -> Converted<()> {
        let start = self.records.bytes.len();
        let gone = match event.op {
            Op::Delete if event.layout.is_keyed_by_row() => key,
            Op::Update if part == Part::Gone => key,
            Op::Update if part == Part::Whole => {
                event.write_previous_key(&mut self.records.bytes)?.then_some(start..self.records.bytes.len())
            }
            _ => None,
        };
        self.records.list.extend(gone.map(|key| Record {
            topic: index(event.layout),
            key: Some(key),
            value: None,
            timestamp: timestamp(event),
            partition: None,
            headers: None,
        }));
        Ok(())
    }

    /// Takes the body back of an event that is too large; by policy a note stands in its place.
    fn too_large(&mut self, event: &Event<'_>, part: Part, begin: usize, start: usize, found: usize) -> Result<()> {
        let body = self.records.bytes.len() - start;
        let topic = &self.topics[index(event.layout)];
        if self.limit.policy == TooLarge::Stop {
            return Err(self.limit.refusal(event, found, topic));
        }
        warn!(id = event.id(), table = event.layout.table, bytes = found, "too large for Kafka: dead letter");
        metrics::counter!("falaj_produce_dead_letters_total").increment(1);
        let key = (1..=self.limit.longest_key()).contains(&(start - begin)).then_some(begin..start);
        let mut note = Vec::new();
        write_note(event, self.limit, topic, key.clone().map(|key| &self.records.bytes[key]), body, &mut note)?;
        self.records.bytes.truncate(key.as_ref().map_or(begin, |key| key.end));
        // The room that it took is given back too.
        self.records.bytes.shrink_to(PIECE);
        let start = self.records.bytes.len();
        self.records.bytes.extend_from_slice(&note);
        self.records.list.push(Record {
            topic: DEAD_LETTER,
            key: None,
            value: Some(start..self.records.bytes.len()),
            timestamp: timestamp(event),
            partition: None,
            headers: None,
        });
        let buried = if self.config.kafka.tombstones { self.bury(event, part, key) } else { Ok(()) };
        buried.map_err(|e| Error::fatal(format_args!("event {} of table {}", event.at, event.layout.table), e))
    }

    async fn hand_over(&mut self, checkpoint: Checkpoint, now: bool) -> Result<()> {
        let records = std::mem::replace(&mut self.records, self.spent.try_recv().unwrap_or_default());
        let size = records.bytes.len() + records.list.len() * size_of::<Record>();
        let piece = Piece { records, topics: Arc::clone(&self.topics), checkpoint, now };
        self.within = checkpoint.partial.is_some();
        self.worker.send(piece, size).await
    }
}

/// What headers take of a record, with the lengths of each, beyond what is kept free for them.
fn header_bytes(headers: &OwnedHeaders) -> usize {
    let all: usize = headers.iter().map(|header| header.key.len() + header.value.map_or(0, <[u8]>::len) + 10).sum();
    all.saturating_sub(HEADERS)
}

/// CloudEvents 1.0, Kafka binary content mode.
fn cloud_event(event: &Event<'_>, pipeline: &str) -> OwnedHeaders {
    let mut time = Vec::new();
    if let Some(at) = event.commit_time() {
        crate::value::write_rfc3339(at, "Z", &mut time);
    }
    let (id, kind) = (event.id(), format!("falaj.{}", event.op.letter()));
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
        .filter(|(_, value)| !value.is_empty())
        .fold(OwnedHeaders::new_with_capacity(6), |h, (key, value)| h.insert(Header { key, value: Some(value) }))
}
