//! How long a start takes until events flow, how long a crash is felt, and whether anything was lost or doubled by it.

use std::fmt::Write as _;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::Serialize;

use super::readable::{Readable, Seen};
use super::role::Role;
use super::{at_most, median};
use crate::plan::Reader;
use crate::process;
use crate::reader::{falaj, pipeline_dir};
use crate::report::Verdict;
use crate::shape::Shape;
use crate::sinks::{self, Content};
use crate::stack::Stack;

const PIPELINE: &str = "bench_recovery";
const ROUNDS: usize = 5;
const QUICK_ROUNDS: usize = 1;
/// Rows that wait for a start.
const WAITING: u32 = 5;
/// Rows a second beside the crashes.
const RATE: u64 = 2000;
/// How long all runs undisturbed before a crash.
const CALM: Duration = Duration::from_secs(3);
/// Caught up: what was committed after the crash is readable within this, in microseconds.
const LIVE: i64 = 200_000;
/// Seconds from the start of `produce` to its first event, the median of the rounds.
const START_MOST: f64 = 1.0;
/// Seconds from the crash until caught up, the slowest of the rounds.
const CAUGHT_UP_MOST: f64 = 2.0;

/// What the rounds gave.
#[derive(Debug, Serialize)]
pub struct Recovery {
    /// Seconds from the start of the process until its first event was readable.
    pub starts: Vec<f64>,
    /// Seconds from SIGKILL until caught up.
    pub crashes: Vec<f64>,
    /// Rows that were committed meanwhile.
    pub rows: u64,
    /// What the sinks hold at the end.
    pub kafka: Content,
    /// The same.
    pub archive: Content,
}

/// Starts, then crashes, in one pipeline with both sinks.
pub async fn measure(stack: &Stack, quick: bool) -> Result<Recovery> {
    let rounds = if quick { QUICK_ROUNDS } else { ROUNDS };
    stack.execute("TRUNCATE engagement_events").await?;
    tokio::task::block_in_place(|| process::run(role(stack, &["init", "--yes"]), stack.servers))?;
    let mut starts = Vec::new();
    for round in 1..=rounds {
        starts.push(start(stack).await.with_context(|| format!("start {round}"))?);
        eprintln!("bench     start {round} of {rounds}: first event after {:.2} s", starts[round - 1]);
    }
    let crashes = tokio::task::block_in_place(|| crash(stack, rounds))?;
    let end = stack.lsn("SELECT pg_current_wal_lsn()::text").await?.to_string();
    tokio::task::block_in_place(|| process::run(role(stack, &["produce", "--until-lsn", &end]), stack.servers))?;
    let rows = stack.ask("SELECT count(*)::text FROM engagement_events").await?.parse()?;
    let held = sinks::count(stack, Reader::Both, PIPELINE, Shape::Inserts).await?;
    let content = |sink: &str| held.get(sink).copied().with_context(|| format!("{sink} was not counted"));
    let (kafka, archive) = (content("kafka")?, content("archive")?);
    stack.drop_slot(PIPELINE).await?;
    sinks::remove(stack, PIPELINE).await?;
    Ok(Recovery { starts, crashes, rows, kafka, archive })
}

fn role(stack: &Stack, args: &[&str]) -> std::process::Command {
    let mut command = falaj(stack, PIPELINE, PIPELINE, "kafka,archive");
    command.args(args);
    command
}

/// A few rows wait, a reader waits, then `produce` starts.
async fn start(stack: &Stack) -> Result<f64> {
    let rows = format!(
        "INSERT INTO engagement_events (event_type, event_ts) SELECT 'play', now() FROM generate_series(1, {WAITING})"
    );
    stack.execute(&rows).await?;
    tokio::task::block_in_place(|| {
        let readable = Readable::of_pipeline(&stack.config.kafka, PIPELINE)?;
        let began = Timestamp::now().as_microsecond();
        let produce = produce(stack)?;
        let first = readable.wait(|_| true)?;
        produce.stop()?;
        readable.stop()?;
        Ok(seconds(began, &first))
    })
}

fn crash(stack: &Stack, rounds: usize) -> Result<Vec<f64>> {
    let mut producing = produce(stack)?;
    producing.wait_for(" streaming ")?;
    let readable = Readable::of_pipeline(&stack.config.kafka, PIPELINE)?;
    let rate = RATE.to_string();
    let load = Role::start(role(stack, &["generate", "--rate", &rate, "--seed", "7"]), &dir(stack), "generate")?;
    let mut crashes = Vec::new();
    for round in 1..=rounds {
        thread::sleep(CALM);
        let killed = Timestamp::now().as_microsecond();
        producing.kill()?;
        producing = produce(stack)?;
        // Nothing that was committed after the crash can have come from the process that was killed.
        let live = readable.wait(|seen| seen.committed > killed && seen.age() < LIVE);
        let live = live.with_context(|| format!("crash {round}"))?;
        crashes.push(seconds(killed, &live));
        eprintln!("bench     crash {round} of {rounds}: caught up after {:.2} s", crashes[round - 1]);
    }
    load.stop()?;
    producing.stop()?;
    readable.stop()?;
    Ok(crashes)
}

fn produce(stack: &Stack) -> Result<Role> {
    Role::start(role(stack, &["produce"]), &dir(stack), "produce")
}

fn dir(stack: &Stack) -> std::path::PathBuf {
    pipeline_dir(stack, PIPELINE)
}

fn seconds(from: i64, to: &Seen) -> f64 {
    (to.readable - from) as f64 / 1e6
}

impl Recovery {
    fn is_exact(&self) -> bool {
        [self.kafka, self.archive].iter().all(|c| [c.events, c.distinct, c.of_kind] == [self.rows; 3])
    }

    /// Bars.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let slowest = self.crashes.iter().copied().fold(f64::NAN, f64::max);
        let Self { rows, kafka, archive, .. } = self;
        let text = if self.is_exact() {
            format!("after {} × SIGKILL each of {rows} rows once in Kafka and in the archive", self.crashes.len())
        } else {
            format!("after SIGKILL of {rows} rows Kafka holds {kafka:?}, the archive {archive:?}")
        };
        vec![
            at_most("start → first event, median", median(self.starts.iter().copied()), START_MOST, "s"),
            at_most("SIGKILL → caught up at 2,000 events/s, slowest", slowest, CAUGHT_UP_MOST, "s"),
            Verdict { text, held: self.is_exact() },
        ]
    }

    /// One table.
    pub fn markdown(&self) -> String {
        let mut out =
            String::from("### Start and crash, seconds\n\n| | median | slowest | rounds |\n|---|--:|--:|---|\n");
        let crash = format!("SIGKILL → caught up at {RATE} events/s");
        for (what, seconds) in [("start → first event readable", &self.starts), (&crash, &self.crashes)] {
            let rounds: Vec<String> = seconds.iter().map(|s| format!("{s:.2}")).collect();
            let slowest = seconds.iter().copied().fold(f64::NAN, f64::max);
            let middle = median(seconds.iter().copied());
            let _ = writeln!(out, "| {what} | {middle:.2} | {slowest:.2} | {} |", rounds.join(", "));
        }
        let Self { rows, kafka, archive, .. } = self;
        let _ = writeln!(
            out,
            "\n{rows} rows were committed; Kafka holds {} events ({} different), the archive {} ({}).",
            kafka.events, kafka.distinct, archive.events, archive.distinct
        );
        out
    }
}
