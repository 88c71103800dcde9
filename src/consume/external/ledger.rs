//! Which records wait, are under way or done: order per key, the offset that may be committed, and bounds. No IO.
//!
//! Records of one lane (a partition's record key) go out one after the other, lanes side by side. Of each partition only
//! the unfinished offsets are kept; everything below the lowest of them is done, and that is what may be committed.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::envelope::Content;

/// What the records of all partitions together may hold in memory.
pub const WINDOW_BYTES: usize = 16 << 20;
/// A partition gets at least this much of [`WINDOW_BYTES`], however many there are.
const LEAST_SHARE: usize = 256 << 10;
/// How far a partition may run ahead of its lowest unfinished offset: so much, at most, is sent again after a crash.
pub const SPAN: i64 = 50_000;
/// What a waiting record costs beside its body and its key.
const OVERHEAD: usize = 200;

/// One Kafka record that is to be delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Partition of the topic.
    pub partition: i32,
    /// Offset in the partition.
    pub offset: i64,
    /// Commit time in milliseconds since 1970, where the record carries one.
    pub timestamp: Option<i64>,
    /// Record key; records of one key keep their order.
    pub key: Option<Vec<u8>>,
    /// The record's value, byte for byte; `None` for a tombstone.
    pub body: Option<Bytes>,
    /// What the value says.
    pub content: Content,
}

impl Record {
    fn cost(&self) -> usize {
        OVERHEAD + self.body.as_ref().map_or(0, Bytes::len) + self.key.as_ref().map_or(0, Vec::len)
    }

    fn lane(&self) -> Lane {
        (self.partition, self.key.clone())
    }
}

type Lane = (i32, Option<Vec<u8>>);

/// A record that may be sent now, and the token that is cancelled when its partition is taken away.
#[derive(Debug)]
pub struct Job {
    /// What to send.
    pub record: Record,
    /// Which assignment of the partition it belongs to.
    pub generation: u64,
    /// Cancelled when the partition is revoked.
    pub revoked: CancellationToken,
}

/// The state of every partition that this process owns.
#[derive(Debug, Default)]
pub struct Ledger {
    partitions: BTreeMap<i32, Partition>,
    lanes: HashMap<Lane, VecDeque<Record>>,
    ready: VecDeque<Lane>,
    generations: u64,
}

#[derive(Debug, Default)]
struct Partition {
    generation: u64,
    revoked: CancellationToken,
    /// The offset after the last one that was read; `None` before the first.
    read: Option<i64>,
    unfinished: BTreeSet<i64>,
    committed: Option<i64>,
    bytes: usize,
    paused: bool,
    /// Taken over, and not yet told by [`Ledger::take_roomy`].
    fresh: bool,
}

impl Partition {
    /// Everything below this offset is done.
    fn low_water(&self) -> Option<i64> {
        self.unfinished.first().copied().or(self.read)
    }

    fn is_full(&self, share: usize) -> bool {
        let span = self.read.zip(self.low_water()).map_or(0, |(read, low)| read - low);
        self.bytes >= share || span >= SPAN
    }

    fn has_room(&self, share: usize) -> bool {
        let span = self.read.zip(self.low_water()).map_or(0, |(read, low)| read - low);
        self.bytes <= share / 2 && span <= SPAN / 2
    }
}

impl Ledger {
    /// Takes a partition over.
    pub fn assign(&mut self, partition: i32) {
        self.revoke(partition);
        self.generations += 1;
        // librdkafka keeps a pause over a revocation. So a partition counts as paused until it has been resumed.
        let taken = Partition { generation: self.generations, paused: true, fresh: true, ..Partition::default() };
        self.partitions.insert(partition, taken);
    }

    /// Forgets a partition: what waits is dropped, what is under way is cancelled, nothing of it is committed any more.
    pub fn revoke(&mut self, partition: i32) {
        if let Some(gone) = self.partitions.remove(&partition) {
            gone.revoked.cancel();
        }
        self.lanes.retain(|lane, _| lane.0 != partition);
        self.ready.retain(|lane| lane.0 != partition);
    }

    /// The partitions that are owned.
    pub fn partitions(&self) -> impl Iterator<Item = i32> {
        self.partitions.keys().copied()
    }

    /// Queues a record behind the others of its key. A record of a partition that is not owned is left to its owner.
    pub fn admit(&mut self, record: Record) {
        let Some(partition) = self.partitions.get_mut(&record.partition) else { return };
        partition.read = Some(record.offset + 1);
        partition.unfinished.insert(record.offset);
        partition.bytes += record.cost();
        let lane = record.lane();
        let waiting = self.lanes.entry(lane.clone()).or_insert_with(|| {
            self.ready.push_back(lane);
            VecDeque::new()
        });
        waiting.push_back(record);
    }

    /// Everything below `offset` has been read; what was not admitted needs no delivery.
    pub fn pass(&mut self, partition: i32, offset: i64) {
        if let Some(partition) = self.partitions.get_mut(&partition) {
            partition.read = Some(offset);
        }
    }

    /// All records below `end` have been read: between the last one and `end` stand only marks of transactions.
    pub fn reached(&mut self, partition: i32, end: i64) {
        if let Some(partition) = self.partitions.get_mut(&partition) {
            partition.read = partition.read.max(Some(end));
        }
    }

    /// The next record whose predecessors of the same key are done. It stays at its lane's head until [`Ledger::done`].
    pub fn next_job(&mut self) -> Option<Job> {
        let lane = self.ready.pop_front()?;
        let partition = self.partitions.get(&lane.0)?;
        let record = self.lanes.get(&lane)?.front()?.clone();
        Some(Job { record, generation: partition.generation, revoked: partition.revoked.clone() })
    }

    /// The record is delivered or a dead letter. Of an assignment that has ended, nothing happens.
    pub fn done(&mut self, record: &Record, generation: u64) {
        let Some(partition) = self.partitions.get_mut(&record.partition) else { return };
        if partition.generation != generation {
            return;
        }
        partition.unfinished.remove(&record.offset);
        partition.bytes = partition.bytes.saturating_sub(record.cost());
        let lane = record.lane();
        let Some(waiting) = self.lanes.get_mut(&lane) else { return };
        waiting.pop_front();
        if waiting.is_empty() {
            self.lanes.remove(&lane);
        } else {
            self.ready.push_back(lane);
        }
    }

    /// Offsets to commit, one a partition where it has moved since the last call.
    pub fn take_commits(&mut self) -> Vec<(i32, i64)> {
        let moved = self.partitions.iter_mut().filter_map(|(&number, partition)| {
            let low = partition.low_water()?;
            let moved = partition.committed != Some(low);
            partition.committed = Some(low);
            moved.then_some((number, low))
        });
        moved.collect()
    }

    /// A commit did not get through: the next [`Ledger::take_commits`] names these partitions again. Whether any is owned.
    pub fn not_committed(&mut self, partitions: impl IntoIterator<Item = i32>) -> bool {
        let mut owned = false;
        for number in partitions {
            if let Some(partition) = self.partitions.get_mut(&number) {
                partition.committed = None;
                owned = true;
            }
        }
        owned
    }

    /// The next [`Ledger::take_commits`] names every partition again: answers to earlier commits will not be seen.
    pub fn none_committed(&mut self) {
        self.partitions.values_mut().for_each(|p| p.committed = None);
    }

    /// Whether everything below `end` has been read and is done; `None` for a partition that is not owned.
    pub fn is_done_to(&self, partition: i32, end: i64) -> Option<bool> {
        self.partitions.get(&partition).map(|p| p.low_water().is_some_and(|low| low >= end))
    }

    /// Partitions to pause because they have used up their share, each named once.
    pub fn take_full(&mut self) -> Vec<i32> {
        self.flip(false, Partition::is_full)
    }

    /// Partitions to read (on), each named once: with `None` because it has just been taken over, else because it has room
    /// again, with the offset after the last one that was read of it.
    pub fn take_roomy(&mut self) -> Vec<(i32, Option<i64>)> {
        let numbers = self.flip(true, Partition::has_room);
        let roomy = numbers.into_iter().map(|number| {
            let partition = self.partitions.get_mut(&number);
            (number, partition.and_then(|p| if std::mem::take(&mut p.fresh) { None } else { p.read }))
        });
        roomy.collect()
    }

    /// Whether this process owns no partition.
    pub fn owns_nothing(&self) -> bool {
        self.partitions.is_empty()
    }

    /// Records that wait or are under way.
    pub fn unfinished(&self) -> usize {
        self.partitions.values().map(|p| p.unfinished.len()).sum()
    }

    fn flip(&mut self, paused: bool, when: fn(&Partition, usize) -> bool) -> Vec<i32> {
        let share = (WINDOW_BYTES / self.partitions.len().max(1)).max(LEAST_SHARE);
        let flipped = self.partitions.iter_mut().filter(|(_, p)| p.paused == paused && when(p, share));
        let flipped = flipped.map(|(&number, partition)| {
            partition.paused = !paused;
            number
        });
        flipped.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(partition: i32, offset: i64, key: &str) -> Record {
        let body = Some(Bytes::from(format!("{partition}/{offset}")));
        let content = Content::Event { id: format!("{partition}/{offset}") };
        Record { partition, offset, timestamp: None, key: Some(key.into()), body, content }
    }

    fn ledger(records: &[(i64, &str)]) -> Ledger {
        let mut ledger = Ledger::default();
        ledger.assign(0);
        assert_eq!((ledger.take_roomy(), ledger.take_roomy()), (vec![(0, None)], vec![]));
        for (offset, key) in records {
            ledger.admit(record(0, *offset, key));
        }
        ledger
    }

    fn jobs(ledger: &mut Ledger) -> Vec<i64> {
        std::iter::from_fn(|| ledger.next_job()).map(|job| job.record.offset).collect()
    }

    #[test]
    fn one_record_of_a_key_is_under_way_and_keys_go_side_by_side() {
        let mut ledger = ledger(&[(0, "a"), (1, "a"), (2, "b"), (3, "a")]);
        assert_eq!(jobs(&mut ledger), [0, 2]);
        ledger.done(&record(0, 0, "a"), 1);
        assert_eq!(jobs(&mut ledger), [1]);
        assert_eq!(jobs(&mut ledger), vec![0; 0]);
    }

    #[test]
    fn a_whole_batch_is_not_committed_after_one_success() {
        let mut ledger = ledger(&[(5, "a"), (6, "b"), (9, "c")]);
        jobs(&mut ledger);
        assert_eq!(ledger.take_commits(), [(0, 5)]);
        ledger.done(&record(0, 9, "c"), 1);
        assert_eq!(ledger.take_commits(), []);
        ledger.done(&record(0, 5, "a"), 1);
        assert_eq!(ledger.take_commits(), [(0, 6)]);
        ledger.done(&record(0, 6, "b"), 1);
        assert_eq!(ledger.take_commits(), [(0, 10)]);
        assert_eq!(ledger.unfinished(), 0);
    }

    #[test]
    fn what_needs_no_delivery_moves_the_offset_only_behind_what_does() {
        let mut ledger = ledger(&[(0, "a")]);
        ledger.pass(0, 7);
        assert_eq!(ledger.take_commits(), [(0, 0)]);
        assert_eq!(ledger.is_done_to(0, 7), Some(false));
        ledger.done(&record(0, 0, "a"), 1);
        assert_eq!(ledger.is_done_to(0, 7), Some(true));
        assert_eq!(ledger.take_commits(), [(0, 7)]);
    }

    #[test]
    fn a_revoked_partition_is_cancelled_and_never_committed() {
        let mut ledger = ledger(&[(0, "a"), (1, "a")]);
        let job = ledger.next_job().unwrap();
        ledger.revoke(0);
        assert!(job.revoked.is_cancelled());
        ledger.done(&job.record, job.generation);
        assert_eq!((ledger.take_commits(), ledger.is_done_to(0, 0)), (vec![], None));
        // The same partition comes back: an answer to the old request must not finish the new one.
        ledger.assign(0);
        ledger.admit(record(0, 0, "a"));
        ledger.done(&job.record, job.generation);
        assert_eq!((ledger.take_commits(), jobs(&mut ledger)), (vec![(0, 0)], vec![0]));
    }

    #[test]
    fn a_failed_commit_is_named_again() {
        let mut ledger = ledger(&[]);
        ledger.pass(0, 3);
        assert_eq!(ledger.take_commits(), [(0, 3)]);
        ledger.not_committed([0]);
        assert_eq!(ledger.take_commits(), [(0, 3)]);
    }

    #[test]
    fn a_stuck_key_pauses_its_own_partition_only() {
        let mut ledger = ledger(&[(0, "stuck")]);
        ledger.assign(1);
        assert_eq!(ledger.take_roomy(), [(1, None)]);
        let job = ledger.next_job().unwrap();
        for offset in 1..SPAN {
            ledger.admit(record(0, offset, "b"));
            let free = ledger.next_job().unwrap();
            ledger.done(&free.record, free.generation);
        }
        assert_eq!((ledger.take_full(), ledger.take_full()), (vec![0], vec![]));
        assert_eq!(ledger.take_roomy(), []);
        ledger.done(&job.record, job.generation);
        assert_eq!((ledger.take_roomy(), ledger.take_roomy()), (vec![(0, Some(SPAN))], vec![]));
        // It is paused, goes and comes back: it has to be resumed.
        for offset in SPAN..2 * SPAN + 1 {
            ledger.admit(record(0, offset, "stuck"));
        }
        assert_eq!(ledger.take_full(), [0]);
        ledger.assign(0);
        assert_eq!(ledger.take_roomy(), [(0, None)]);
    }

    #[test]
    fn bytes_are_bounded() {
        let mut ledger = ledger(&[]);
        let mut offset = 0;
        while ledger.take_full().is_empty() {
            ledger.admit(Record { body: Some(vec![0; 1 << 20].into()), ..record(0, offset, "a") });
            offset += 1;
        }
        assert_eq!(offset, 16);
    }
}
