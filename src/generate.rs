//! Seeded, realistic engagement load: contents, sessions, late and repeated events, rolled-back transactions.
//!
//! [`model`] says what is written, as a function of the seed, the pace and the contents that are there; [`writer`] writes it.
//! Every time in the model counts from the start of the load, so that two runs differ in `event_ts` and `publish_ts` by one
//! constant, and in ids of the sequence; in nothing else.

use std::io::{IsTerminal, Write as _};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;
use tracing::info;

use crate::cli;
use crate::error::{Error, Result};
use crate::world::World;

mod catalog;
mod event;
mod hash;
mod model;
mod sessions;
mod text;
mod writer;

use model::{Model, Pace, Transaction};
use writer::Writer;

/// Rows a second of event time in a load without `--rate`, at least.
const BULK_ROWS_PER_SECOND: f64 = 500.0;
/// Event time that a load with `--count` and without `--rate` spans at most, in seconds: half of the live window.
const BULK_SECONDS: f64 = 300.0;
/// Event time of an endless load without `--rate`; its clock is set by the wall's (see [`MOST_SKEW`]).
const FLOOD_ROWS_PER_SECOND: f64 = 100_000.0;
/// Where the model's clock is further than this from the wall's, in microseconds, it is set again.
const MOST_SKEW: i64 = 5_000_000;
/// With `--rate` no transaction holds more than this many seconds of rows: they would be old when they are committed.
const MOST_SECONDS_IN_TRANSACTION: f64 = 0.25;
/// Largest transaction, in rows.
const MOST_ROWS: u64 = 8000;

/// Writes the load until `--count` rows are committed or a shutdown comes, and prints a summary line.
///
/// Without `--rate` it goes as fast as Postgres takes it, with transactions that lean to the large side (thousands of rows, by
/// COPY), and the settings of durability are the server's own: nothing is switched off for speed.
///
/// # Errors
/// [`Error::Usage`] for a rate of 0; [`Error::Unreachable`] when Postgres is away at the start; [`Error::Refused`] without tables
/// or rights. An outage later is waited for, and no row is lost or doubled by it.
pub async fn run(world: &World, args: &cli::Generate) -> Result<()> {
    if args.rate == Some(0) {
        return Err(Error::Usage("--rate 0: a rate is 1 or more rows a second; leave it out for full speed".into()));
    }
    let mut writer = Writer::open(world).await?;
    let mut load = Load::new(args, Timestamp::now().as_microsecond());
    writer.stock(&model::stock(args.seed), load.start).await?;
    let mut model = Model::new(args.seed, load.pace, writer.contents().await?);
    load.restart(Timestamp::now().as_microsecond());
    while load.left() > 0 && !world.stop.is_cancelled() {
        let transaction = model.next(load.left());
        if world_stops_before(world, load.due(&transaction)).await {
            break;
        }
        writer.write(&transaction, load.start).await?;
        load.done(&transaction, &model, Timestamp::now().as_microsecond());
    }
    load.finish(args.seed, writer.retries)
}

/// Waits for `due`; true when the shutdown comes first.
async fn world_stops_before(world: &World, due: Option<Instant>) -> bool {
    let Some(due) = due else { return false };
    tokio::select! {
        () = tokio::time::sleep_until(due) => false,
        () = world.stop.cancelled() => true,
    }
}

/// The schedule of a load, and what it has done.
struct Load {
    rate: Option<u64>,
    count: Option<u64>,
    pace: Pace,
    /// Where the model's time 0 is, in microseconds since 1970.
    start: i64,
    began: Instant,
    committed: u64,
    rolled_back: u64,
    transactions: u64,
    report: Report,
}

impl Load {
    fn new(args: &cli::Generate, now: i64) -> Self {
        let pace = pace(args.rate, args.count);
        let mut load = Self {
            rate: args.rate,
            count: args.count,
            pace,
            start: now,
            began: Instant::now(),
            committed: 0,
            rolled_back: 0,
            transactions: 0,
            report: Report::new(),
        };
        load.restart(now);
        load
    }

    /// Time 0 is now; a load of known length at full speed lies in the past instead, and ends now.
    fn restart(&mut self, now: i64) {
        let span = match (self.rate, self.count) {
            (None, Some(count)) => count as f64 / self.pace.rows_per_second,
            _ => 0.0,
        };
        self.start = now - (span * 1e6) as i64;
        self.began = Instant::now();
    }

    /// Engagement rows that are still to be committed.
    fn left(&self) -> u64 {
        self.count.map_or(u64::MAX, |count| count - self.committed)
    }

    /// When a transaction is to be written: when its last row is due. Counted from the beginning, so that no delay adds up.
    fn due(&self, transaction: &Transaction) -> Option<Instant> {
        let rows = self.committed + transaction.committed;
        self.rate.map(|rate| self.began + Duration::from_secs_f64(rows as f64 / rate as f64))
    }

    fn done(&mut self, transaction: &Transaction, model: &Model, now: i64) {
        self.committed += transaction.committed;
        self.rolled_back += transaction.rolled_back;
        self.transactions += 1;
        metrics::counter!("falaj_generate_rows_total").increment(transaction.committed);
        metrics::counter!("falaj_generate_rolled_back_rows_total").increment(transaction.rolled_back);
        metrics::counter!("falaj_generate_transactions_total").increment(1);
        self.set_clock(model.time(self.committed), now);
        self.report.progress(self.committed, self.count, self.began.elapsed());
    }

    /// Live events must stay near the present: after an outage, at a rate that Postgres cannot take, and in an endless load at full speed.
    fn set_clock(&mut self, model: i64, now: i64) {
        let live = self.rate.is_some() || self.count.is_none();
        let skew = now - (self.start + model);
        if live && skew.abs() > MOST_SKEW {
            self.start += skew;
        }
    }

    fn finish(mut self, seed: u64, retries: u64) -> Result<()> {
        self.report.clear();
        let seconds = self.began.elapsed().as_secs_f64();
        let Self { committed, transactions, rolled_back, .. } = self;
        let achieved = if committed == 0 { 0.0 } else { committed as f64 / seconds };
        let wanted = self.rate.map(|rate| format!(" wanted_rows_per_second={rate}")).unwrap_or_default();
        let summary = format!(
            "generated rows={committed} transactions={transactions} rolled_back_rows={rolled_back} seconds={seconds:.3} \
             rows_per_second={achieved:.0}{wanted} retries={retries} seed={seed}\n"
        );
        std::io::stdout().write_all(summary.as_bytes()).map_err(|e| Error::fatal("writing the summary to stdout", e))
    }
}

fn pace(rate: Option<u64>, count: Option<u64>) -> Pace {
    match (rate, count) {
        (Some(rate), _) => {
            let rate = rate as f64;
            let most_rows = ((rate * MOST_SECONDS_IN_TRANSACTION) as u64).clamp(3, MOST_ROWS);
            Pace { rows_per_second: rate, most_rows, lean: 1.0 }
        }
        // A short load has small transactions too, so that it shows every kind.
        (None, Some(count)) => Pace {
            rows_per_second: (count as f64 / BULK_SECONDS).max(BULK_ROWS_PER_SECOND),
            most_rows: (count / 20).clamp(3, MOST_ROWS),
            lean: 0.5,
        },
        (None, None) => Pace { rows_per_second: FLOOD_ROWS_PER_SECOND, most_rows: MOST_ROWS, lean: 0.5 },
    }
}

/// Progress on stderr: a line that is written over on a terminal, a log line every few seconds elsewhere.
struct Report {
    terminal: bool,
    next: Instant,
    last: (Duration, u64),
}

impl Report {
    fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), next: Instant::now(), last: (Duration::ZERO, 0) }
    }

    fn progress(&mut self, committed: u64, count: Option<u64>, elapsed: Duration) {
        if Instant::now() < self.next {
            return;
        }
        let seconds = (elapsed - self.last.0).as_secs_f64().max(1e-3);
        let rate = (committed - self.last.1) as f64 / seconds;
        let of = count.map(|count| format!(" of {count}")).unwrap_or_default();
        if self.terminal {
            eprint!("\r\x1b[K{committed}{of} rows, {rate:.0} rows/s");
        } else if self.last.1 > 0 {
            info!(rows = committed, rows_per_second = rate as u64, "generating");
        }
        self.last = (elapsed, committed);
        self.next = Instant::now() + if self.terminal { Duration::from_millis(500) } else { Duration::from_secs(5) };
    }

    fn clear(&mut self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}
