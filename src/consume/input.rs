//! The board's side of Kafka: group membership, places in the log, records. Nothing outside this file knows the client.
//!
//! The group only shares the partitions out; positions live in Redis, beside what they count.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
/// `max.poll.interval.ms` where nothing else is set: how long the reader may be held up, by Redis for instance, before the
/// group goes on without it; a rebalance waits for it as long. To leave costs nothing, since positions live in Redis.
const POLL_MILLIS: u64 = 30_000;
/// `session.timeout.ms` where nothing else is set. A process that was killed holds its partitions for as long as the session
/// lasts: six seconds is the least that brokers allow by default.
const SESSION_MILLIS: u64 = 6_000;

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

/// What the group has decided about this member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Share {
    /// Nothing is ours until the group decides anew.
    Revoked,
    /// These partitions are ours; none, where there are more members than partitions.
    Assigned(Vec<i32>),
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
        self.consumer.context().membership().waits();
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
            Some(Err(e)) if kafka::is_place_lost(&e) => Polled::Lost(self.error(&e)),
            Some(Err(e)) => match e.rdkafka_error_code() {
                // The group goes on without us while Redis is away for long; the next poll joins it again.
                Some(Code::PollExceeded) => Polled::Nothing,
                _ => Polled::Trouble(self.error(&e)),
            },
        }
    }

    /// What the group has decided since the last call; `None` when nothing changed. Until [`Input::assign`] no partition
    /// that it has given is read.
    pub fn reassigned(&self) -> Option<Share> {
        self.consumer.context().membership().news.take()
    }

    /// Whether [`Input::reassigned`] has something to say.
    pub fn is_reassigned(&self) -> bool {
        self.consumer.context().membership().news.is_some()
    }

    /// For how long the group has owed us a decision, be it that we get no partition; `None` where it has made one.
    pub fn waited(&self) -> Option<Duration> {
        self.consumer.context().membership().waits_since.map(|since| since.elapsed())
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
            return Err(kafka::no_topics(&[&self.topic]));
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
    // What is no number is refused by librdkafka, and so is a poll interval below the session's time-out.
    let session = config.kafka.client.get("session.timeout.ms").and_then(|millis| millis.parse().ok());
    let poll = POLL_MILLIS.max(session.unwrap_or(SESSION_MILLIS));
    // These may be configured.
    let defaults = [
        ("session.timeout.ms", SESSION_MILLIS),
        ("max.poll.interval.ms", poll),
        ("topic.metadata.refresh.interval.ms", 10_000),
    ];
    for (key, millis) in defaults {
        if !config.kafka.client.contains_key(key) {
            client.set(key, millis.to_string());
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
struct Rebalances(Mutex<Membership>);

#[derive(Default)]
struct Membership {
    /// What the reader has not heard of yet.
    news: Option<Share>,
    /// Since when the group owes us a decision.
    waits_since: Option<Instant>,
}

impl Rebalances {
    fn membership(&self) -> MutexGuard<'_, Membership> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Membership {
    fn note(&mut self, share: Share) {
        match share {
            Share::Revoked => self.waits(),
            Share::Assigned(_) => self.waits_since = None,
        }
        self.news = Some(share);
    }

    fn waits(&mut self) {
        self.waits_since.get_or_insert_with(Instant::now);
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
            let partitions = list.elements().iter().map(|e| e.partition()).collect();
            self.membership().note(Share::Assigned(partitions));
        } else {
            self.membership().note(Share::Revoked);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_goes_on_after_30_s_without_a_poll_and_not_before_the_session_ends() {
        let mut config = Config::defaults().unwrap();
        let set = |config: &Config| {
            let client = client(config, false);
            ["session.timeout.ms", "max.poll.interval.ms"].map(|key| client.get(key).unwrap().to_owned())
        };
        assert_eq!(set(&config), ["6000", "30000"]);
        config.kafka.client.insert("session.timeout.ms".into(), "45000".into());
        assert_eq!(set(&config), ["45000", "45000"]);
        config.kafka.client.insert("max.poll.interval.ms".into(), "60000".into());
        assert_eq!(set(&config), ["45000", "60000"]);
    }

    #[test]
    fn an_empty_share_is_a_decision_and_a_revoked_one_is_none() {
        let mut membership = Membership::default();
        membership.note(Share::Revoked);
        let since = membership.waits_since;
        assert!(since.is_some());
        membership.note(Share::Revoked);
        assert_eq!(membership.waits_since, since, "it waits since the first of them");
        membership.note(Share::Assigned(Vec::new()));
        assert_eq!((membership.waits_since, membership.news), (None, Some(Share::Assigned(Vec::new()))));
    }
}
