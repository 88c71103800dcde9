//! When the board has counted what: the offsets that Redis keeps beside the counts are looked at again and again. It does
//! not rely on what `consume` says of itself, and covers every event.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use jiff::Timestamp;

use crate::stack::Stack;

/// How often Redis is asked. An event counts as late by up to this.
const EVERY: Duration = Duration::from_millis(1);
/// How long the last events may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Each partition's offset as it moved, with the moment it was seen at, in microseconds since 1970.
#[derive(Debug, Default)]
pub struct Applied {
    moves: BTreeMap<i32, Vec<(i64, i64)>>,
    /// When the board was first there: a reader has its partitions, and has read nothing yet.
    pub begun: Option<i64>,
    /// When an offset last moved.
    pub moved: Option<i64>,
}

impl Applied {
    /// When the event at `offset` was on the board.
    pub fn at(&self, partition: i32, offset: i64) -> Option<i64> {
        let moves = self.moves.get(&partition)?;
        moves.get(moves.partition_point(|(next, _)| *next <= offset)).map(|(_, at)| *at)
    }

    fn covers(&self, last: &BTreeMap<i32, i64>) -> bool {
        last.iter().all(|(partition, offset)| self.at(*partition, *offset).is_some())
    }

    fn note(&mut self, partition: i32, next: i64, now: i64) {
        let moves = self.moves.entry(partition).or_default();
        if moves.last().is_none_or(|(last, _)| *last < next) {
            moves.push((next, now));
            self.moved = Some(now);
        }
    }
}

/// The thread that looks.
pub struct Watch {
    /// The last offset of each partition that is waited for.
    stop: Arc<OnceLock<BTreeMap<i32, i64>>>,
    thread: JoinHandle<Result<Applied>>,
}

impl Watch {
    /// Looks at the pipeline's board from now on.
    pub fn start(stack: &Stack, pipeline: &str) -> Result<Self> {
        let client = redis::Client::open(stack.config.redis.url.as_str())?;
        let mut connection = client.get_connection().context("connecting to Redis")?;
        let key = format!("{{falaj:{pipeline}}}");
        let stop = Arc::new(OnceLock::<BTreeMap<i32, i64>>::new());
        let told = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let (mut applied, mut since) = (Applied::default(), None);
            loop {
                let last = told.get();
                look(&mut connection, &key, &mut applied)?;
                if let Some(last) = last {
                    let since: &mut Instant = since.get_or_insert_with(Instant::now);
                    if applied.covers(last) || since.elapsed() > PATIENCE {
                        return Ok(applied);
                    }
                }
                thread::sleep(EVERY);
            }
        });
        Ok(Self { stop, thread })
    }

    /// Looks once more, and tells.
    pub fn stop(self) -> Result<Applied> {
        self.stop_at(BTreeMap::new())
    }

    /// Looks until the board has counted the `last` offset of each partition, and tells.
    pub fn stop_at(self, last: BTreeMap<i32, i64>) -> Result<Applied> {
        self.stop.get_or_init(|| last);
        self.thread.join().map_err(|_| anyhow::anyhow!("the watch on Redis panicked"))?
    }
}

fn look(connection: &mut redis::Connection, key: &str, applied: &mut Applied) -> Result<()> {
    let fields: BTreeMap<String, String> = redis::cmd("HGETALL").arg(key).query(connection)?;
    // After the answer: what it says was true by then.
    let now = Timestamp::now().as_microsecond();
    if !fields.is_empty() {
        applied.begun.get_or_insert(now);
    }
    for (field, value) in &fields {
        if let Some(partition) = field.strip_prefix("offset:") {
            applied.note(partition.parse()?, value.parse()?, now);
        }
    }
    Ok(())
}
