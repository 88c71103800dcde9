//! The consumer group `{pipeline}.external`: assignment, offsets, the end of the topic.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use metrics::counter;
use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{Message, Offset, TopicPartitionList};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::envelope::Content;
use super::ledger::{Ledger, Record};
use crate::error::{Error, Result};
use crate::kafka::{self, TIMEOUT, blocking};
use crate::world::World;

/// Name of the check in /readyz: this path's own connection to Kafka.
pub const CHECK: &str = "kafka_external";
/// How long the last commit and leaving the group may take at a shutdown.
const FAREWELL: Duration = Duration::from_secs(2);
/// After how long the offsets in a topic that was made anew are set again, where the group takes no commits.
const PAUSE: Duration = Duration::from_millis(200);

/// What the read loop sees next.
pub enum Next {
    /// A record.
    Record(Record),
    /// A partition has nothing more to read at this moment.
    End(i32),
    /// Kafka is not there at the moment; librdkafka goes on trying.
    Trouble(String),
}

/// This process's membership in the group. The [`Ledger`] is changed by rebalances, so that both share it.
pub struct Group {
    consumer: Arc<StreamConsumer<Context>>,
    ledger: SharedLedger,
    topic: String,
    name: String,
    config: crate::config::Kafka,
    /// Looks at committed offsets under way.
    looking: Arc<AtomicUsize>,
}

/// The ledger, shared with librdkafka's callbacks. They run inside [`Group::next`], on its thread.
#[derive(Clone, Default)]
pub struct SharedLedger(Arc<Mutex<Ledger>>);

impl SharedLedger {
    /// The ledger, locked. Never hold it over an await.
    pub fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Group {
    /// Joins the group. Without a committed offset, a partition is read from its beginning. From here on [`Group::next`]
    /// must be called, else the other members wait for this one. With `until_end` it reads from the
    /// leaders, who know the end.
    ///
    /// # Errors
    /// [`Error::Refused`] for a bad librdkafka key or value.
    pub fn join(world: &World, table: &str, until_end: bool) -> Result<Self> {
        let config = world.config.kafka.clone();
        let topic = world.config.topic(table);
        let name = format!("{}.external", world.config.pipeline);
        let ledger = SharedLedger::default();
        let mut client = kafka::consumer(&config, until_end);
        client
            .set("group.id", &name)
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "earliest")
            .set("enable.partition.eof", "true")
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("queued.max.messages.kbytes", "4096")
            .set("fetch.queue.backoff.ms", "10");
        // After a crash the partitions wait so long for their old owner; librdkafka's default is 45 s.
        if !config.client.contains_key("session.timeout.ms") {
            client.set("session.timeout.ms", "6000").set("heartbeat.interval.ms", "2000");
        }
        let context = Context { ledger: ledger.clone(), topic: topic.clone() };
        let consumer: StreamConsumer<Context> =
            client.create_with_context(context).map_err(|e| kafka::error(&config, &e))?;
        consumer.subscribe(&[&topic]).map_err(|e| kafka::error(&config, &e))?;
        Ok(Self { consumer: Arc::new(consumer), ledger, topic, name, config, looking: Arc::default() })
    }

    /// The ledger of what this process owns.
    pub fn ledger(&self) -> &SharedLedger {
        &self.ledger
    }

    /// The topic that is read.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// The next record or event. Must be called all the time: rebalances are served here. Cancelling it loses nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] for missing rights, [`Error::Fatal`] when librdkafka gives the client up.
    pub async fn next(&self) -> Result<Next> {
        // librdkafka's queue knows nothing of tokio's budget: a full one would keep this thread from everything else.
        tokio::task::coop::consume_budget().await;
        match self.consumer.recv().await {
            Ok(message) => Ok(Next::Record(record(&message))),
            Err(KafkaError::PartitionEOF(partition)) => Ok(Next::End(partition)),
            Err(KafkaError::MessageConsumptionFatal(code)) => Err(Error::fatal("reading from Kafka", code)),
            Err(e) => match kafka::error(&self.config, &e) {
                Error::Unreachable { why, .. } => Ok(Next::Trouble(why)),
                refused => Err(refused),
            },
        }
    }

    /// The offset behind everything that [`Group::next`] has handed out of a partition, marks of transactions included.
    pub fn passed(&self, partition: i32) -> Option<i64> {
        let positions = self.consumer.position().ok()?;
        match positions.find_partition(&self.topic, partition)?.offset() {
            Offset::Offset(offset) => Some(offset),
            _ => None,
        }
    }

    /// Pauses what is full, reads what has room (again).
    ///
    /// # Errors
    /// [`Error::Unreachable`], which librdkafka does not give for partitions that it has assigned.
    pub fn balance(&self) -> Result<()> {
        let (full, roomy) = {
            let mut ledger = self.ledger.lock();
            (ledger.take_full(), ledger.take_roomy())
        };
        let failed = |e| kafka::error(&self.config, &e);
        if !full.is_empty() {
            self.consumer.pause(&self.list(full)).map_err(failed)?;
        }
        if !roomy.is_empty() {
            self.consumer.resume(&self.list(roomy.iter().map(|(partition, _)| *partition))).map_err(failed)?;
            self.look_for_gaps(roomy);
        }
        Ok(())
    }

    /// Says, in the background, where Kafka has deleted records before they were delivered: partitions that begin above the
    /// offset from which they are read on, which is the committed one where they were just taken over.
    fn look_for_gaps(&self, starts: Vec<(i32, Option<i64>)>) {
        let (consumer, topic) = (self.consumer.clone(), self.topic.clone());
        let fresh = self.list(starts.iter().filter(|(_, read)| read.is_none()).map(|(partition, _)| *partition));
        let looking = (fresh.count() > 0).then(|| Looking::new(&self.looking));
        tokio::task::spawn_blocking(move || {
            let told = committed(&consumer, fresh).map(|offsets| {
                drop(looking);
                let start = |(partition, read): (i32, Option<i64>)| {
                    Some((partition, read.or(offsets.get(&partition).copied())?))
                };
                starts
                    .into_iter()
                    .filter_map(start)
                    .try_for_each(|(partition, from)| report_gap(&consumer, &topic, partition, from))
            });
            if let Err(error) = told.and_then(|told| told) {
                warn!(%error, "whether Kafka has deleted undelivered records cannot be told");
            }
        });
    }

    /// Commits, without waiting, how far each partition is done.
    pub fn commit(&self) {
        if self.looking.load(Ordering::Acquire) > 0 {
            return;
        }
        let offsets = self.ledger.lock().take_commits();
        commit(&*self.consumer, &self.topic, &self.ledger, &offsets, CommitMode::Async);
    }

    /// Commits, waits for the answer, and leaves the group. Kafka being away, that is given up after a short while:
    /// what is not committed is delivered again, under the same keys.
    pub async fn leave(self) {
        let work = tokio::task::spawn_blocking(move || {
            let offsets = {
                let mut ledger = self.ledger.lock();
                ledger.none_committed();
                ledger.take_commits()
            };
            commit(&*self.consumer, &self.topic, &self.ledger, &offsets, CommitMode::Sync);
            drop(self.consumer);
        });
        if tokio::time::timeout(FAREWELL, work).await.is_err() {
            warn!("Kafka did not answer the last commit in time; some events will be delivered again");
        }
    }

    /// The topic was made anew. What the group has committed, perhaps just now, is of the old one: this member's partitions are
    /// set to their beginning, and it leaves. Gives what was read and is not done. With `stop` cancelled it is tried once.
    pub async fn give_up(self, stop: &CancellationToken) -> SharedLedger {
        let stop = stop.clone();
        let left = SharedLedger(Arc::new(Mutex::new(std::mem::take(&mut *self.ledger.lock()))));
        let owned: Vec<_> = left.lock().partitions().collect();
        let begin = owned.iter().map(|partition| ((self.topic.clone(), *partition), Offset::Offset(0))).collect();
        let work = tokio::task::spawn_blocking(move || {
            // Other members leave too, and in between a group takes no commits.
            let mut committed = self.consumer.commit(&begin, CommitMode::Sync);
            while begin.count() > 0 && committed.is_err() && !stop.is_cancelled() {
                std::thread::sleep(PAUSE);
                committed = self.consumer.commit(&begin, CommitMode::Sync);
            }
            drop(self.consumer);
            committed
        });
        if !owned.is_empty()
            && let Err(error) = work.await.unwrap_or(Ok(()))
        {
            warn!(%error, "the new topic may be read from where the old one was");
        }
        left
    }

    /// The topic's id.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when no broker answers in time, or when there is no topic at this moment.
    pub fn topic_id(&self) -> impl Future<Output = Result<String>> + Send + use<> {
        let (consumer, config, topic) = (self.consumer.clone(), self.config.clone(), self.topic.clone());
        blocking(move || kafka::topic_id(consumer.client(), &topic, TIMEOUT).map_err(|e| kafka::error(&config, &e)))
    }

    /// The last stable offset of every partition: everything below is committed or aborted.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when no broker answers in time, [`Error::Fatal`] on an internal failure.
    pub fn ends(&self) -> impl Future<Output = Result<BTreeMap<i32, i64>>> + use<> {
        let (consumer, config, topic) = (self.consumer.clone(), self.config.clone(), self.topic.clone());
        blocking(move || {
            let count = kafka::partitions(&config, &topic)?.unwrap_or_default();
            let end = |partition| {
                let (_, high) =
                    consumer.fetch_watermarks(&topic, partition, TIMEOUT).map_err(|e| kafka::error(&config, &e))?;
                Ok((partition, high))
            };
            (0..i32::try_from(count).unwrap_or(i32::MAX)).map(end).collect()
        })
    }

    /// Whether the group has committed that every event below these ends is done, whoever owns the partitions.
    ///
    /// A member that has not come to the end commits up to its last event, not past the marks of transactions behind it. So
    /// where another member's offset is too low, a look at the partition tells whether an event is left. An offset of our
    /// own that is too low, as after a commit in the middle of a rebalance, is committed again.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when no broker answers in time, [`Error::Fatal`] on an internal failure.
    pub async fn is_done_to(&self, ends: &BTreeMap<i32, i64>) -> Result<bool> {
        let committed = self.committed(ends.keys().copied().collect()).await?;
        for (&partition, &end) in ends {
            let from = committed.get(&partition).copied();
            if from.unwrap_or(0) >= end {
                continue;
            }
            let ours = self.ledger.lock().not_committed([partition]);
            if ours || self.has_event(partition, from, end).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether a committed event stands in `from..end`; without `from`, from the beginning.
    async fn has_event(&self, partition: i32, from: Option<i64>, end: i64) -> Result<bool> {
        let mut list = TopicPartitionList::new();
        let from = from.map_or(Offset::Beginning, Offset::Offset);
        let (config, topic, name) = (self.config.clone(), self.topic.clone(), format!("{}.look", self.name));
        blocking(move || {
            let failed = |e| kafka::error(&config, &e);
            list.add_partition_offset(&topic, partition, from).map_err(failed)?;
            let mut client = kafka::client(&config);
            client.set("group.id", name).set("isolation.level", "read_committed");
            client.set("enable.auto.commit", "false").set("enable.partition.eof", "true");
            client.set("auto.offset.reset", "earliest");
            let reader: BaseConsumer = client.create().map_err(failed)?;
            reader.assign(&list).map_err(failed)?;
            match reader.poll(TIMEOUT) {
                Some(Ok(message)) => Ok(message.offset() < end),
                Some(Err(KafkaError::PartitionEOF(_))) => Ok(false),
                Some(Err(e)) => Err(failed(e)),
                None => Err(Error::unreachable(format!("Kafka at {}", config.servers()), "no answer to a fetch")),
            }
        })
        .await
    }

    async fn committed(&self, partitions: Vec<i32>) -> Result<BTreeMap<i32, i64>> {
        let (consumer, config, list) = (self.consumer.clone(), self.config.clone(), self.list(partitions));
        blocking(move || committed(&consumer, list).map_err(|e| kafka::error(&config, &e))).await
    }

    fn list(&self, partitions: impl IntoIterator<Item = i32>) -> TopicPartitionList {
        let mut list = TopicPartitionList::new();
        for partition in partitions {
            list.add_partition(&self.topic, partition);
        }
        list
    }
}

/// librdkafka's callbacks.
struct Context {
    ledger: SharedLedger,
    topic: String,
}

impl ClientContext for Context {}

impl ConsumerContext for Context {
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(list) => {
                let mut ledger = self.ledger.lock();
                numbers(list).for_each(|partition| ledger.assign(partition));
                info!(partitions = ?numbers(list).collect::<Vec<_>>(), topic = self.topic, "assigned");
            }
            Rebalance::Revoke(list) => self.revoke(consumer, list),
            Rebalance::Error(error) => warn!(%error, "rebalance"),
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, offsets: &TopicPartitionList) {
        if let Err(error) = result {
            debug!(%error, "offsets not committed, will be committed again");
            self.ledger.lock().not_committed(numbers(offsets));
        }
    }
}

impl Context {
    /// The last chance to commit what is done. librdkafka waits for that commit before it gives the partitions back.
    /// A partition that is lost already has another owner: nothing may be committed for it.
    fn revoke(&self, consumer: &BaseConsumer<Self>, list: &TopicPartitionList) {
        if !consumer.assignment_lost() {
            let offsets = self.ledger.lock().take_commits();
            commit(consumer, &self.topic, &self.ledger, &offsets, CommitMode::Async);
        }
        let mut ledger = self.ledger.lock();
        numbers(list).for_each(|partition| ledger.revoke(partition));
        info!(partitions = ?numbers(list).collect::<Vec<_>>(), topic = self.topic, "revoked");
    }
}

fn commit(
    consumer: &impl Consumer<Context>,
    topic: &str,
    ledger: &SharedLedger,
    offsets: &[(i32, i64)],
    mode: CommitMode,
) {
    if offsets.is_empty() {
        return;
    }
    let list: TopicPartitionList =
        offsets.iter().map(|&(partition, offset)| ((topic.to_owned(), partition), Offset::Offset(offset))).collect();
    if let Err(error) = consumer.commit(&list, mode) {
        debug!(%error, "offsets not committed, will be committed again");
        ledger.lock().not_committed(offsets.iter().map(|&(partition, _)| partition));
    }
}

/// While one is there, nothing is committed: the look for gaps needs the offsets as they were.
struct Looking(Arc<AtomicUsize>);

impl Looking {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count.clone())
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What the group has committed for these partitions. Blocking.
fn committed(consumer: &StreamConsumer<Context>, partitions: TopicPartitionList) -> KafkaResult<BTreeMap<i32, i64>> {
    if partitions.count() == 0 {
        return Ok(BTreeMap::new());
    }
    let found = consumer.committed_offsets(partitions, TIMEOUT)?;
    let offset = |element: TopicPartitionListElem<'_>| match element.offset() {
        Offset::Offset(offset) => Some((element.partition(), offset)),
        _ => None,
    };
    Ok(found.elements().into_iter().filter_map(offset).collect())
}

fn report_gap(consumer: &StreamConsumer<Context>, topic: &str, partition: i32, from: i64) -> KafkaResult<()> {
    let (begin, _) = consumer.fetch_watermarks(topic, partition, TIMEOUT)?;
    if begin > from {
        counter!("falaj_external_expired_records_total").increment((begin - from).unsigned_abs());
        error!(
            topic,
            partition,
            from,
            begin,
            "Kafka's retention has deleted records that were not delivered, marks of transactions among them. \
             Send the events again with `falaj replay --sink external`, and raise retention.ms"
        );
    }
    Ok(())
}

fn numbers(list: &TopicPartitionList) -> impl Iterator<Item = i32> + use<> {
    list.elements().into_iter().map(|e| e.partition()).collect::<Vec<_>>().into_iter()
}

/// Waits for Kafka and asks for the topics.
///
/// # Errors
/// [`Error::Refused`] for a topic that does not exist, [`Error::Unreachable`] after the patience that a start has.
pub async fn require_topics(world: &World, topics: [String; 2]) -> Result<()> {
    for topic in topics {
        world.at_start(CHECK, || require_topic(world, topic.clone())).await?;
    }
    Ok(())
}

async fn require_topic(world: &World, topic: String) -> Result<()> {
    let (config, name) = (world.config.kafka.clone(), topic.clone());
    match blocking(move || kafka::partitions(&config, &name)).await? {
        Some(_) => Ok(()),
        None => Err(kafka::no_topics(&[&topic])),
    }
}

fn record(message: &impl Message) -> Record {
    Record {
        partition: message.partition(),
        offset: message.offset(),
        timestamp: message.timestamp().to_millis(),
        key: message.key().map(<[u8]>::to_vec),
        body: message.payload().map(Bytes::copy_from_slice),
        content: Content::read(message.payload()),
    }
}
