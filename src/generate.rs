//! Seeded, realistic engagement load: contents, sessions, late and repeated events, rolled-back transactions.
//!
//! `model` says what is written, as a function of the seed, the pace and the contents that are there; `writer` writes
//! it.
//! Every time in the model counts from the start of the load, so that two runs differ in `event_ts` and `publish_ts`
//! by one
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
mod lanes;
mod model;
mod sessions;
mod text;
mod writer;

use lanes::Lanes;
use model::{Model, Pace, Transaction};

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
/// Without `--rate` it goes as fast as Postgres takes it, with transactions that lean to the large side (thousands of
/// rows, by
/// COPY), and the settings of durability are the server's own: nothing is switched off for speed.
///
/// # Errors
/// [`Error::Usage`] for a rate of 0; [`Error::Unreachable`] when Postgres is away at the start; [`Error::Refused`] without
/// tables or rights. An outage later is waited for, and no row is lost or doubled by it (after a crash of the server an id that it had not
/// written down may be given to another transaction, whose end is then taken for that of ours).
pub async fn run(world: &World, args: &cli::Generate) -> Result<()> {
    if args.rate == Some(0) {
        return Err(Error::Usage("--rate 0: a rate is 1 or more rows a second; leave it out for full speed".into()));
    }
    let opened = async {
        let mut lanes = Lanes::open(world, lanes(args)).await?;
        let subjects = lanes.stock(&model::stock(args.seed), Timestamp::now().as_microsecond()).await?;
        Ok((lanes, subjects))
    };
    let (mut lanes, subjects) = match opened.await {
        Ok(opened) => opened,
        Err(e) => return world.ended(Err(e)),
    };
    let pace = pace(args.rate, args.count);
    let mut model = Model::new(args.seed, pace, subjects);
    let mut load = Load::new(args, pace, Timestamp::now().as_microsecond());
    while load.left() > 0 && !world.stop.is_cancelled() {
        let transaction = model.next(load.left());
        if world_stops_before(world, load.due(&transaction)).await {
            break;
        }
        load.plan(&transaction, &model, Timestamp::now().as_microsecond());
        for written in lanes.write(transaction, load.start).await? {
            load.done(&written);
        }
    }
    for written in lanes.drain().await? {
        load.done(&written);
    }
    load.finish(args.seed)
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
    /// Where the model's time 0 is, in microseconds since 1970.
    start: i64,
    began: Instant,
    /// Committed engagement rows of the transactions handed over so far.
    planned: u64,
    committed: u64,
    rolled_back: u64,
    transactions: u64,
    report: Report,
}

impl Load {
    /// Time 0 is now; a load of known length at full speed lies in the past instead, and ends now.
    fn new(args: &cli::Generate, pace: Pace, now: i64) -> Self {
        let span = match (args.rate, args.count) {
            (None, Some(count)) => count as f64 / pace.rows_per_second,
            _ => 0.0,
        };
        Self {
            rate: args.rate,
            count: args.count,
            start: now - (span * 1e6) as i64,
            began: Instant::now(),
            planned: 0,
            committed: 0,
            rolled_back: 0,
            transactions: 0,
            report: Report::new(),
        }
    }

    /// Engagement rows that are still to be handed over.
    fn left(&self) -> u64 {
        self.count.map_or(u64::MAX, |count| count - self.planned)
    }

    /// When a transaction is to be written: when its last row is due. Counted from the beginning, so that no delay
    /// adds up.
    fn due(&self, transaction: &Transaction) -> Option<Instant> {
        let rows = self.planned + transaction.committed;
        self.rate.map(|rate| self.began + Duration::from_secs_f64(rows as f64 / rate as f64))
    }

    fn plan(&mut self, transaction: &Transaction, model: &Model, now: i64) {
        self.planned += transaction.committed;
        self.set_clock(model.time(self.planned), now);
    }

    fn done(&mut self, transaction: &Transaction) {
        self.committed += transaction.committed;
        self.rolled_back += transaction.rolled_back;
        self.transactions += 1;
        metrics::counter!("falaj_generate_rows_total").increment(transaction.committed);
        metrics::counter!("falaj_generate_rolled_back_rows_total").increment(transaction.rolled_back);
        metrics::counter!("falaj_generate_transactions_total").increment(1);
        self.report.progress(self.committed, self.count, self.began.elapsed());
    }

    /// Live events must stay near the present: after an outage, at a rate that Postgres cannot take, and in an endless
    /// load at full speed.
    fn set_clock(&mut self, model: i64, now: i64) {
        let live = self.rate.is_some() || self.count.is_none();
        let skew = now - (self.start + model);
        if live && skew.abs() > MOST_SKEW {
            self.start += skew;
        }
    }

    fn finish(mut self, seed: u64) -> Result<()> {
        self.report.clear();
        let seconds = self.began.elapsed().as_secs_f64();
        let Self { committed, transactions, rolled_back, .. } = self;
        let achieved = if committed == 0 { 0.0 } else { committed as f64 / seconds };
        let wanted = self.rate.map(|rate| format!(" wanted_rows_per_second={rate}")).unwrap_or_default();
        let summary = format!(
            "generated rows={committed} transactions={transactions} rolled_back_rows={rolled_back} seconds={seconds:.3} \
             rows_per_second={achieved:.0}{wanted} seed={seed}\n"
        );
        std::io::stdout().write_all(summary.as_bytes()).map_err(|e| Error::fatal("writing the summary to stdout", e))
    }
}

/// Connections. One keeps the order of rows and of their ids the same in every run; a large load at full speed is
/// written by two,
/// so that its transactions interleave.
fn lanes(args: &cli::Generate) -> usize {
    let large = args.count.is_none_or(|count| count >= 200_000);
    let fast = args.rate.is_none_or(|rate| rate > 20_000);
    if large && fast { 2 } else { 1 }
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
