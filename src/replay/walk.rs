//! The walk over the range: each event with its bytes, counted; progress on stderr, and a summary at the end.

use std::time::{Duration, Instant};

use tracing::info;

use crate::error::{Error, Result};
use crate::event::Event;
use crate::lsn::Position;
use crate::playback::{Events, Range, batches};
use crate::world::World;

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// The events of a range, one after the other.
pub(super) struct Walk<'a> {
    pub(super) world: &'a World,
    pub(super) range: Range,
    pub(super) tally: Tally,
    events: Events,
    json: Vec<u8>,
}

/// An event and the bytes of its Kafka value.
pub(super) struct Item<'a> {
    pub(super) event: Event<'a>,
    pub(super) json: &'a [u8],
}

/// What has been walked.
pub(super) struct Tally {
    /// Rows and bytes by layout: table name, rows, bytes.
    pub(super) tables: Vec<(String, u64, u64)>,
    /// Of those, how many the sink had before.
    pub(super) skipped: u64,
    /// The last event that was handed out.
    pub(super) last: Option<Position>,
    /// Whether a shutdown has cut the walk short.
    pub(super) stopped: bool,
    began: Instant,
    told: Instant,
}

/// The tables of the range, from the names of its files: nothing is decoded for that.
pub(super) fn tables(world: &World, range: Range) -> Result<Vec<String>> {
    let mut tables = Vec::new();
    for batch in batches(&world.config.archive.dir)? {
        if range.overlaps(&batch) {
            tables.extend(batch.files()?.into_iter().map(|file| file.table));
        }
    }
    tables.sort();
    tables.dedup();
    Ok(tables)
}

impl<'a> Walk<'a> {
    pub(super) fn new(world: &'a World, range: Range) -> Result<Self> {
        let events = Events::open(&world.config.archive.dir, range, None)?;
        let now = Instant::now();
        let tally = Tally { tables: Vec::new(), skipped: 0, last: None, stopped: false, began: now, told: now };
        Ok(Self { world, range, tally, events, json: Vec::new() })
    }

    /// Batches opened so far.
    pub(super) fn batches(&self) -> u64 {
        self.events.batches()
    }

    /// The next event; `None` at the end of the range, and after a shutdown.
    pub(super) fn next(&mut self) -> Result<Option<Item<'_>>> {
        self.tally.stopped = self.world.stop.is_cancelled();
        if self.tally.stopped {
            return Ok(None);
        }
        let Some(event) = self.events.advance()?.and_then(|rows| rows.event()) else { return Ok(None) };
        self.json.clear();
        let written = event.write_json(&mut self.json);
        written.map_err(|e| Error::fatal(format_args!("event {} of table {}", event.at, event.layout.table), e))?;
        self.tally.count(&event, self.json.len(), self.range);
        Ok(Some(Item { event, json: &self.json }))
    }
}

impl Tally {
    fn count(&mut self, event: &Event<'_>, bytes: usize, range: Range) {
        let index = event.layout.generation as usize;
        if index >= self.tables.len() {
            self.tables.resize(index + 1, (String::new(), 0, 0));
        }
        let (table, rows, sum) = &mut self.tables[index];
        if table.is_empty() {
            table.clone_from(&event.layout.table);
        }
        *rows += 1;
        *sum += bytes as u64;
        self.last = Some(event.at);
        if rows.is_multiple_of(256) && self.told.elapsed() >= TELL_EVERY {
            self.told = Instant::now();
            let done = event.at.commit_lsn.0.saturating_sub(range.from.0) as f64;
            let percent = 100.0 * done / (range.to.0 - range.from.0).max(1) as f64;
            let (rows, bytes) = self.total();
            let rate = rows as f64 / self.began.elapsed().as_secs_f64();
            info!(rows, bytes, at = %event.at, "{percent:.0} %, {rate:.0} rows/s");
        }
    }

    /// Rows and bytes of all tables.
    pub(super) fn total(&self) -> (u64, u64) {
        self.tables.iter().fold((0, 0), |(rows, bytes), table| (rows + table.1, bytes + table.2))
    }

    /// The last word.
    pub(super) fn summary(&self, range: Range, sink: &str) {
        let ((rows, bytes), seconds) = (self.total(), self.began.elapsed().as_secs_f64());
        let had =
            if self.skipped > 0 { format!(", {} of them were there before", self.skipped) } else { String::new() };
        match (self.stopped, self.last) {
            (false, _) => info!(
                "replayed {} – {} to {sink}: {rows} rows, {bytes} bytes{had}, in {seconds:.1} s",
                range.from, range.to
            ),
            (true, Some(at)) => {
                info!("stopped at {at} of {} – {}: {rows} rows, {bytes} bytes{had}", range.from, range.to)
            }
            (true, None) => info!("stopped before the first row of {} – {}", range.from, range.to),
        }
    }
}
