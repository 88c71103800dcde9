//! A `read_committed` reader of the events' topic that notes when it got what.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use falaj::config::Kafka;
use jiff::Timestamp;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::BorrowedMessage;
use rdkafka::{Message, Offset};

use crate::sinks::{self, field};

/// How long finding the topic's end may take, and how long no event may come.
const PATIENCE: Duration = Duration::from_secs(30);
const TABLE: &str = "engagement_events";

/// An event that was read. Times are microseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Partition of the topic.
    pub partition: i32,
    /// Offset in it.
    pub offset: i64,
    /// `_commit_ts`.
    pub committed: i64,
    /// When the reader got it.
    pub readable: i64,
}

impl Seen {
    /// Microseconds from commit until it was read.
    pub fn age(&self) -> i64 {
        (self.readable - self.committed).max(0)
    }
}

/// Microseconds since 1970 at which a record's row was committed.
type Committed = fn(&[u8]) -> Option<i64>;

/// The reader's thread, and what it has read.
pub struct Readable {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
    seen: Receiver<Seen>,
}

impl Readable {
    /// Reads falaj's events from the topic's end on; once this returns it is already polling there.
    pub fn of_pipeline(config: &Kafka, pipeline: &str) -> Result<Self> {
        Self::start(config, &config.topic(pipeline, TABLE), commit_ts)
    }

    /// The same of any topic. `committed` finds the commit's time in a record's value.
    pub fn start(config: &Kafka, topic: &str, committed: Committed) -> Result<Self> {
        let consumer = sinks::reader(config, topic, Offset::End)?;
        go_to_end(&consumer)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, (sender, seen)) = (Arc::clone(&stop), channel());
        Ok(Self { stop, thread: thread::spawn(move || read(&consumer, committed, &stopped, &sender)), seen })
    }

    /// The next event, if it comes within `patience`.
    pub fn take(&self, patience: Duration) -> Option<Seen> {
        self.seen.recv_timeout(patience).ok()
    }

    /// The next event that `wanted` takes.
    pub fn wait(&self, mut wanted: impl FnMut(&Seen) -> bool) -> Result<Seen> {
        loop {
            let seen = self.seen.recv_timeout(PATIENCE).with_context(|| format!("no event within {PATIENCE:?}"))?;
            if wanted(&seen) {
                return Ok(seen);
            }
        }
    }

    /// This many events; fewer within [`PATIENCE`] are an error.
    pub fn collect(&self, count: u64) -> Result<Vec<Seen>> {
        let mut all = Vec::with_capacity(count as usize);
        while (all.len() as u64) < count {
            let seen = self.seen.recv_timeout(PATIENCE);
            all.push(seen.with_context(|| format!("{} of {count} events, then none for {PATIENCE:?}", all.len()))?);
        }
        Ok(all)
    }

    /// Ends it; whatever it has read beyond what was taken is given back.
    pub fn stop(self) -> Result<Vec<Seen>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the Kafka reader panicked"))??;
        Ok(self.seen.into_iter().collect())
    }
}

/// The end of every partition is told once nothing lies before it: only then the reader waits there.
fn go_to_end(consumer: &BaseConsumer) -> Result<()> {
    let mut open: HashSet<i32> = consumer.assignment()?.elements().iter().map(|e| e.partition()).collect();
    let deadline = Instant::now() + PATIENCE;
    while !open.is_empty() {
        ensure!(Instant::now() < deadline, "the ends of partitions {open:?} were not found within {PATIENCE:?}");
        if let Some(Err(KafkaError::PartitionEOF(partition))) = consumer.poll(Duration::from_millis(100)) {
            open.remove(&partition);
        }
    }
    Ok(())
}

fn read(consumer: &BaseConsumer, committed: Committed, stopped: &AtomicBool, sender: &Sender<Seen>) -> Result<()> {
    while !stopped.load(Ordering::Relaxed) {
        // The end of a partition comes as an error, again and again: it says nothing here.
        if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
            let readable = Timestamp::now().as_microsecond();
            // Nobody listens any more only when the bench itself is ending.
            let _ = sender.send(seen(&message, committed, readable)?);
        }
    }
    Ok(())
}

fn commit_ts(body: &[u8]) -> Option<i64> {
    Some(field(body, "_commit_ts")?.parse::<Timestamp>().ok()?.as_microsecond())
}

fn seen(message: &BorrowedMessage<'_>, committed: Committed, readable: i64) -> Result<Seen> {
    let body = message.payload().unwrap_or_default();
    let committed = committed(body).with_context(|| format!("no commit time in {}", String::from_utf8_lossy(body)))?;
    Ok(Seen { partition: message.partition(), offset: message.offset(), committed, readable })
}
