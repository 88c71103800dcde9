//! Records of the board's topic that are no engagement events: the log names the first of a streak and counts the rest, and
//! `/readyz` fails until the board is fed by events again.

use std::fmt;
use std::time::{Duration, Instant};

use tracing::{error, info};

use crate::world::Health;

/// Name of the check.
const CHECK: &str = "board_events";
/// How often the log counts the records of a streak: to name each of them would fill the disk.
const COUNT_EVERY: Duration = Duration::from_secs(5);

/// The records that are no events: a streak lasts from the first of them to the next batch that holds events alone.
#[derive(Default)]
pub struct Malformed {
    streak: Option<Streak>,
    /// Since the last batch that was applied.
    in_batch: u64,
}

struct Streak {
    /// Place of the first record, and what is wrong with it.
    first: String,
    records: u64,
    /// How many of them the log knows of.
    logged: u64,
    logged_at: Instant,
}

impl Malformed {
    /// A record is none of ours; `why` is what is wrong with it.
    pub fn note(&mut self, topic: &str, partition: i32, offset: i64, why: &str) {
        self.in_batch += 1;
        if let Some(streak) = &mut self.streak {
            streak.records += 1;
            return;
        }
        error!(topic, partition, offset, why, "no engagement event");
        let first = format!("{topic}, partition {partition}, offset {offset}: {why}");
        self.streak = Some(Streak { first, records: 1, logged: 1, logged_at: Instant::now() });
    }

    /// What was gathered is on the board, `events` among it; tells `health` whether it was all well-formed.
    pub fn applied(&mut self, events: u64, health: &Health) {
        let malformed = std::mem::take(&mut self.in_batch);
        if let Some(mut ended) = self.streak.take_if(|_| malformed == 0 && events > 0) {
            ended.count();
            info!(records = ended.records, "engagement events again");
            health.ok(CHECK);
        }
        let Some(streak) = &mut self.streak else { return };
        if malformed > 0 {
            health.failing(CHECK, &*streak);
        }
        if streak.logged_at.elapsed() >= COUNT_EVERY {
            streak.count();
        }
    }

    /// Nothing more is read: the log gets the last count.
    pub fn close(&mut self) {
        if let Some(streak) = &mut self.streak {
            streak.count();
        }
    }
}

impl Streak {
    fn count(&mut self) {
        if self.records > self.logged {
            error!(more = self.records - self.logged, "records that the board cannot count");
        }
        (self.logged, self.logged_at) = (self.records, Instant::now());
    }
}

impl fmt::Display for Streak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, records, .. } = self;
        write!(f, "{first}; {records} such records, none counted. What the board needs of a record: docs/schema.md")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_fails_from_a_malformed_record_to_the_next_batch_of_events_alone() {
        let (health, mut malformed) = (Health::default(), Malformed::default());
        let told = || health.report().get(CHECK).cloned();
        malformed.applied(7, &health);
        assert_eq!(told(), None, "what nobody has seen fail is no check");
        malformed.note("t", 1, 9, "_id is missing or null");
        malformed.note("t", 1, 10, "no JSON");
        malformed.applied(5, &health);
        let why = told().flatten().unwrap();
        assert!(why.starts_with("t, partition 1, offset 9: _id is missing or null; 2 such records"), "{why}");
        malformed.applied(0, &health);
        assert_eq!(told(), Some(Some(why)), "silence proves nothing");
        malformed.applied(1, &health);
        assert_eq!(told(), Some(None));
    }
}
