//! The board's side of Kafka: group membership, places in the log, records. Nothing outside this file knows the client.
//!
//! The group only shares the partitions out; positions live in Redis, beside what they count.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::message::BorrowedMessage;
use rdkafka::types::{RDKafkaErrorCode as Code, RDKafkaRespErr};
use rdkafka::{ClientContext, Message, Offset, TopicPartitionList};
use tracing::{debug, error, info, warn};

use crate::config::{Config, Kafka};
use crate::error::{Error, Result};
use crate::kafka::{self, topic_id};

/// How long Kafka may take to answer a question of the loop: short, so that a shutdown is not held up by it.
const TIMEOUT: Duration = Duration::from_secs(3);

/// One topic, read as a member of the board's group.
pub struct Input {
    consumer: BaseConsumer<Rebalances>,
    kafka: Kafka,
    topic: String,
}

/// What one poll brings.
pub enum Polled<'a> {
    /// A committed record.
    Record(Record<'a>),
    /// Everything readable of this partition has been handed out.
    CaughtUp(i32),
    /// The place that was read from is not in the log (any more): places must be found anew.
    Lost(Error),
    /// Kafka is in trouble; the client goes on by itself unless the error says otherwise.
    Trouble(Error),
    /// Nothing is waiting.
    Nothing,
}

/// A record, borrowed from the client.
pub struct Record<'a>(BorrowedMessage<'a>);

impl Record<'_> {
    /// Partition of the topic.
    pub fn partition(&self) -> i32 {
        self.0.partition()
    }

    /// Offset in the partition.
    pub fn offset(&self) -> i64 {
        self.0.offset()
    }

    /// Whether there is no value: what Kafka's compaction is told by.
    pub fn is_tombstone(&self) -> bool {
        self.0.payload().is_none()
    }

    /// The value; empty for a tombstone.
    pub fn value(&self) -> &[u8] {
        self.0.payload().unwrap_or_default()
    }
}

/// Offsets of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The first that is still there.
    pub first: i64,
    /// The last stable offset: everything below is readable by read_committed.
    pub end: i64,
    /// The first whose record is young enough; `end` when none is.
    pub needed: i64,
}

impl Input {
    /// A client for the board's topic; joins the group at [`Input::subscribe`]. With `until_end` it reads from the
    /// leaders, who know the end.
    ///
    /// # Errors
    /// [`Error::Refused`] for a librdkafka key or value that does not exist.
    pub fn open(config: &Config, table: &str, until_end: bool) -> Result<Self> {
        let client = client(config, until_end);
        let consumer =
            client.create_with_context(Rebalances::default()).map_err(|e| kafka::error(&config.kafka, &e))?;
        Ok(Self { consumer, kafka: config.kafka.clone(), topic: config.topic(table) })
    }

    /// The topic's name.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// Joins the group.
    ///
    /// # Errors
    /// What librdkafka says about the subscription.
    pub fn subscribe(&self) -> Result<()> {
        self.consumer.subscribe(&[&self.topic]).map_err(|e| self.error(&e))
    }

    /// Waits up to `timeout` for the next thing.
    pub fn poll(&self, timeout: Duration) -> Polled<'_> {
        match self.consumer.poll(timeout) {
            None => Polled::Nothing,
            Some(Ok(message)) => Polled::Record(Record(message)),
            Some(Err(KafkaError::PartitionEOF(partition))) => Polled::CaughtUp(partition),
            Some(Err(KafkaError::MessageConsumptionFatal(code))) => {
                Polled::Trouble(Error::fatal(format!("reading {}", self.topic), code))
            }
            Some(Err(e)) => match e.rdkafka_error_code() {
                Some(
                    Code::AutoOffsetReset
                    | Code::OffsetOutOfRange
                    | Code::UnknownTopicOrPartition
                    | Code::UnknownTopic
                    | Code::UnknownPartition
                    | Code::UnknownTopicId
                    | Code::LogTruncation,
                ) => Polled::Lost(self.error(&e)),
                // The group goes on without us while Redis is away for long; the next poll joins it again.
                Some(Code::PollExceeded) => Polled::Nothing,
                _ => Polled::Trouble(self.error(&e)),
            },
        }
    }

    /// The partitions that the group has given us since the last call; `None` when nothing changed. Until
    /// [`Input::assign`] none of them is read.
    pub fn reassigned(&self) -> Option<Vec<i32>> {
        self.consumer.context().change.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether [`Input::reassigned`] has something to say.
    pub fn is_reassigned(&self) -> bool {
        self.consumer.context().change.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Reads these partitions, each from its offset, and no others.
    ///
    /// # Errors
    /// What librdkafka says about the assignment.
    pub fn assign(&self, starts: impl Iterator<Item = (i32, i64)>) -> Result<()> {
        let mut list = TopicPartitionList::new();
        for (partition, offset) in starts {
            list.add_partition_offset(&self.topic, partition, Offset::Offset(offset)).map_err(|e| self.error(&e))?;
        }
        self.consumer.assign(&list).map_err(|e| self.error(&e))
    }

    /// The offset behind everything that was handed out of a partition, control records included.
    pub fn passed(&self, partition: i32) -> Option<i64> {
        let positions = self.consumer.position().ok()?;
        match positions.find_partition(&self.topic, partition)?.offset() {
            Offset::Offset(offset) => Some(offset),
            _ => None,
        }
    }

    /// The topic's id. Blocking.
    ///
    /// # Errors
    /// [`Error::Unreachable`], also while the topic is not there.
    pub fn topic_id(&self) -> Result<String> {
        topic_id(self.consumer.client(), &self.topic, TIMEOUT).map_err(|e| self.error(&e))
    }

    /// The last stable offset of every partition of the topic. Blocking.
    ///
    /// # Errors
    /// [`Error::Unreachable`]; [`Error::Refused`] when the topic is not there: it is made by init, never by accident.
    pub fn ends(&self) -> Result<BTreeMap<i32, i64>> {
        let Some(count) = kafka::partitions(&self.kafka, &self.topic)? else {
            return Err(Error::refused(
                "kafka_topics",
                format!("no topic {} on {}", self.topic, self.kafka.servers()),
                "the topic that produce writes to",
                "run `falaj init`, or mend kafka.topic",
            ));
        };
        (0..count as i32).map(|p| Ok((p, self.watermarks(p)?.1))).collect()
    }

    /// Where those of these partitions that are there stand, and where the records committed since `since_millis`
    /// (milliseconds since 1970) begin. A topic that was made anew may have fewer partitions than the group has shared out:
    /// to wait for the others would keep this member from the news. Blocking.
    ///
    /// # Errors
    /// [`Error::Unreachable`].
    pub fn places(&self, partitions: &[i32], since_millis: i64) -> Result<BTreeMap<i32, Place>> {
        let topics = kafka::topics_of(&self.kafka, self.consumer.client(), TIMEOUT)?;
        let Some(&count) = topics.get(&self.topic) else {
            return Err(Error::unreachable(
                format!("Kafka at {}", self.kafka.servers()),
                format!("no topic {}", self.topic),
            ));
        };
        // The end is asked for first: what is written after that lies behind it and will be read.
        let mut places = BTreeMap::new();
        let mut times = TopicPartitionList::new();
        for &partition in partitions.iter().filter(|partition| (**partition as usize) < count) {
            let (first, end) = self.watermarks(partition)?;
            places.insert(partition, Place { first, end, needed: end });
            times
                .add_partition_offset(&self.topic, partition, Offset::Offset(since_millis.max(0)))
                .map_err(|e| self.error(&e))?;
        }
        let found = self.consumer.offsets_for_times(times, TIMEOUT).map_err(|e| self.error(&e))?;
        for element in found.elements() {
            element.error().map_err(|e| self.error(&e))?;
            if let (Offset::Offset(offset), Some(place)) = (element.offset(), places.get_mut(&element.partition())) {
                place.needed = offset.min(place.end);
            }
        }
        Ok(places)
    }

    /// First offset and last stable offset of a partition. Blocking.
    ///
    /// # Errors
    /// [`Error::Unreachable`].
    pub fn watermarks(&self, partition: i32) -> Result<(i64, i64)> {
        self.consumer.fetch_watermarks(&self.topic, partition, TIMEOUT).map_err(|e| self.error(&e))
    }

    fn error(&self, e: &KafkaError) -> Error {
        kafka::error(&self.kafka, e)
    }
}

fn client(config: &Config, until_end: bool) -> ClientConfig {
    let mut client = kafka::consumer(&config.kafka, until_end);
    // These two may be configured. A process that was killed holds its partitions for as long as the session lasts:
    // six seconds is the least that brokers allow by default.
    for (key, value) in [("session.timeout.ms", "6000"), ("topic.metadata.refresh.interval.ms", "10000")] {
        if !config.kafka.client.contains_key(key) {
            client.set(key, value);
        }
    }
    client
        .set("group.id", format!("{}.redis", config.pipeline))
        .set("partition.assignment.strategy", "range")
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error")
        .set("enable.partition.eof", "true")
        // A full queue is looked at again after this time; the default of a second stalls the reader that long.
        .set("fetch.queue.backoff.ms", "10")
        .set("queued.max.messages.kbytes", "16384");
    client
}

/// Notes what the group assigns; the reader assigns it once it knows the places to read from. Nothing has no place, and is
/// assigned at once.
#[derive(Default)]
struct Rebalances {
    change: Mutex<Option<Vec<i32>>>,
}

impl Rebalances {
    fn note(&self, partitions: Vec<i32>) {
        *self.change.lock().unwrap_or_else(PoisonError::into_inner) = Some(partitions);
    }
}

impl ConsumerContext for Rebalances {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, event: RDKafkaRespErr, list: &mut TopicPartitionList) {
        metrics::counter!("falaj_consume_redis_rebalances_total").increment(1);
        if event == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
            // librdkafka waits for an assignment of nothing too, and until then answers no later rebalance: the whole group
            // would wait for this member.
            if list.count() == 0
                && let Err(e) = consumer.assign(list)
            {
                warn!(error = %e, "taking no partition from the group");
            }
            self.note(list.elements().iter().map(|e| e.partition()).collect());
        } else {
            self.note(Vec::new());
            if let Err(e) = consumer.unassign() {
                warn!(error = %e, "giving partitions back to the group");
            }
        }
    }
}

impl ClientContext for Rebalances {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        match level {
            // Lost connections also come as errors of a poll, where they are handled.
            _ if fac == "FAIL" => debug!(target: "librdkafka", "{fac}: {message}"),
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error => {
                error!(target: "librdkafka", "{fac}: {message}");
            }
            RDKafkaLogLevel::Warning => warn!(target: "librdkafka", "{fac}: {message}"),
            RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => info!(target: "librdkafka", "{fac}: {message}"),
            RDKafkaLogLevel::Debug => debug!(target: "librdkafka", "{fac}: {message}"),
        }
    }

    fn error(&self, e: KafkaError, reason: &str) {
        debug!(target: "librdkafka", error = %e, reason);
    }
}
