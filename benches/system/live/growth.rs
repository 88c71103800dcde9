//! What a row costs when the backlog, the contents and the partitions grow: it should cost the same, and memory should
//! follow the contents alone.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use falaj::kafka;
use falaj::lsn::Lsn;
use serde::Serialize;

use super::board::Board;
use super::plot::{Panel, plot};
use super::{median, rows};
use crate::load::{Backlog, RowBytes};
use crate::plan::{Reader, Workload};
use crate::reader::{self, Run};
use crate::report::Verdict;
use crate::shape::Shape;
use crate::stack::Stack;
use crate::warm;

const MILLION: u64 = 1_000_000;
/// Backlogs in rows, and how often each is read.
const BACKLOGS: [(u64, usize); 2] = [(MILLION, 3), (10 * MILLION, 1)];
/// With `GROWTH=full`: some 25 minutes and 30 GB more.
const LARGEST: (u64, usize) = (30 * MILLION, 1);
const CONTENTS: [u64; 3] = [10, 20_000, MILLION];
const PARTITIONS: [i32; 2] = [3, 48];
/// What is not varied.
const USUAL: (u64, i32) = (20_000, 3);
/// The backlog while contents and partitions are varied, and how often it is read.
const FIXED: (u64, usize) = (300_000, 5);
/// The slowest rate may be this part of the fastest one to count as flat.
const FLAT: f64 = 0.75;
/// Peak memory may be this many times the least one where it should not grow.
const SAME_MEMORY: f64 = 1.3;

/// What is varied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum By {
    Backlog,
    Contents,
    Partitions,
}

impl By {
    const ALL: [Self; 3] = [Self::Backlog, Self::Contents, Self::Partitions];

    fn name(self) -> &'static str {
        match self {
            Self::Backlog => "rows of backlog",
            Self::Contents => "content rows",
            Self::Partitions => "partitions",
        }
    }
}

/// All cases.
#[derive(Debug, Serialize)]
pub struct Growth(Vec<Case>);

/// One size of one thing.
#[derive(Debug, Serialize)]
struct Case {
    by: By,
    size: u64,
    runs: Vec<Run>,
}

/// Each thing in turn; `produce` reads into Kafka and the archive.
pub async fn measure(stack: &Stack) -> Result<Growth> {
    let full = std::env::var("GROWTH").is_ok_and(|v| v == "full");
    let mut growth = Growth(Vec::new());
    let mut number = 0;
    for contents in CONTENTS {
        let start = begin(stack, "bench_contents", contents).await?;
        let end = rows::write(stack, 1, FIXED.0, contents).await?;
        let backlog = backlog("bench_contents", FIXED, start, end);
        // The usual contents serve for the partitions too; these take turns.
        let partitions = if contents == USUAL.0 { &PARTITIONS[..] } else { &[USUAL.1][..] };
        if contents == CONTENTS[0] {
            for partitions in PARTITIONS {
                warm::up(stack, |number| read(stack, &backlog, partitions, number + 100 * partitions as usize)).await?;
            }
        }
        for _ in 0..FIXED.1 {
            for &partitions in partitions {
                number += 1;
                let run = read(stack, &backlog, partitions, number).await?;
                if partitions == USUAL.1 {
                    growth.add(By::Contents, contents, run.clone());
                }
                if contents == USUAL.0 {
                    growth.add(By::Partitions, partitions as u64, run);
                }
            }
        }
        stack.drop_slot("bench_contents").await?;
    }
    let start = begin(stack, "bench_backlog", USUAL.0).await?;
    let mut written = 0;
    for (size, rounds) in BACKLOGS.into_iter().chain(full.then_some(LARGEST)) {
        eprintln!("bench     growth: writing rows {} to {size}", written + 1);
        let end = rows::write(stack, written + 1, size, USUAL.0).await?;
        written = size;
        let backlog = backlog("bench_backlog", (size, rounds), start, end);
        for _ in 0..rounds {
            number += 1;
            let run = read(stack, &backlog, USUAL.1, number).await?;
            growth.add(By::Backlog, size, run);
        }
    }
    stack.drop_slot("bench_backlog").await?;
    stack.execute("TRUNCATE engagement_events").await?;
    Ok(growth)
}

async fn begin(stack: &Stack, slot: &str, contents: u64) -> Result<Lsn> {
    eprintln!("bench     growth: {contents} contents");
    rows::reset(stack, contents).await?;
    rows::slot(stack, slot).await
}

fn backlog(slot: &str, (rows, rounds): (u64, usize), start: Lsn, end: Lsn) -> Backlog {
    let workload = Workload {
        name: "growth",
        shape: Shape::Inserts,
        rows,
        per_transaction: rows::SIZE,
        rounds,
        readers: &[Reader::Both],
        peers: &[],
    };
    Backlog { workload, slot: slot.into(), start, end, row_bytes: RowBytes { text: f64::NAN, binary: f64::NAN } }
}

async fn read(stack: &Stack, backlog: &Backlog, partitions: i32, number: usize) -> Result<Run> {
    // Made beforehand, it is what `init` leaves as it is.
    let topic = stack.config.kafka.topic(&reader::pipeline(backlog, number), "engagement_events");
    kafka::create_topic(&stack.config.kafka, &topic, partitions, &[]).await?;
    let rows = backlog.workload.rows;
    let run = reader::run(stack, backlog, Reader::Both, number).await;
    let run = run.with_context(|| format!("{rows} rows, {partitions} partitions"))?;
    let (rate, rss) = (run.rows_per_second / 1e3, run.peak_rss as f64 / 1e6);
    eprintln!("bench     growth: {rows} rows, {partitions} partitions: {rate:.0}k rows/s, {rss:.0} MB");
    Ok(run)
}

impl Growth {
    fn add(&mut self, by: By, size: u64, run: Run) {
        match self.0.iter_mut().find(|case| (case.by, case.size) == (by, size)) {
            Some(case) => case.runs.push(run),
            None => self.0.push(Case { by, size, runs: vec![run] }),
        }
    }

    fn of(&self, by: By) -> impl Iterator<Item = &Case> {
        self.0.iter().filter(move |case| case.by == by)
    }

    /// Rate and, but for the contents, memory must stay what they are.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        for by in By::ALL {
            let name = by.name();
            let slowest = self.of(by).map(Case::rate).fold(f64::MAX, f64::min);
            let flat = slowest / self.of(by).map(Case::rate).fold(0.0, f64::max);
            let text = format!("growth of {name}: slowest rate is {flat:.3} of the fastest, needed ≥ {FLAT}");
            verdicts.push(Verdict { text, held: flat >= FLAT });
            if by != By::Contents {
                let least = self.of(by).map(Case::rss).fold(f64::MAX, f64::min);
                let times = self.of(by).map(Case::rss).fold(0.0, f64::max) / least;
                let text = format!("growth of {name}: peak RSS grows {times:.3} times, needed ≤ {SAME_MEMORY}");
                verdicts.push(Verdict { text, held: times <= SAME_MEMORY });
            }
        }
        let wrong = self.0.iter().flat_map(|case| &case.runs).filter(|run| !run.is_exact()).count();
        let text = format!("growth: {wrong} runs with a sink that lacks a row or has one twice");
        verdicts.push(Verdict { text, held: wrong == 0 });
        verdicts
    }

    /// One table; with the board's consumers, where they were measured.
    pub fn markdown(&self, board: Option<&Board>) -> String {
        let (rows, (contents, partitions)) = (FIXED.0, USUAL);
        let mut out = format!(
            "### Growth: → Kafka + archive; where not varied, {rows} rows, {contents} contents, {partitions} partitions\n\n\
             | varied | | rows/s, median (min–max) | µs a row | peak RSS, MB | readings |\n|---|--:|--:|--:|--:|--:|\n"
        );
        for by in By::ALL {
            for case in self.of(by) {
                let rates = || case.runs.iter().map(|run| run.rows_per_second / 1e3);
                let (min, max) = (rates().fold(f64::MAX, f64::min), rates().fold(0.0, f64::max));
                let (rate, micros, rss) = (case.rate() / 1e3, 1e6 / case.rate(), case.rss() / 1e6);
                let (name, size, readings) = (by.name(), short(case.size), case.runs.len());
                let _ = writeln!(
                    out,
                    "| {name} | {size} | {rate:.0}k ({min:.0}–{max:.0}) | {micros:.1} | {rss:.0} | {readings} |"
                );
            }
        }
        for (consumers, rate) in board.iter().flat_map(|board| board.medians(|run| board.rate(run))) {
            let _ =
                writeln!(out, "| consumers of the board | {consumers} | {:.0}k | {:.1} | | |", rate / 1e3, 1e6 / rate);
        }
        let _ = writeln!(out, "\nA content row takes {:.0} bytes of memory.", self.bytes_a_content());
        out
    }

    /// From the least contents to the most.
    fn bytes_a_content(&self) -> f64 {
        let mut cases: Vec<&Case> = self.of(By::Contents).collect();
        cases.sort_by_key(|case| case.size);
        let (Some(first), Some(last)) = (cases.first(), cases.last()) else { return f64::NAN };
        (last.rss() - first.rss()) / (last.size - first.size) as f64
    }

    /// Rates above, memory below.
    pub fn plot(&self, board: Option<&Board>) -> String {
        let panel = |by: By, title: &str, of: fn(&Case) -> f64| Panel {
            title: title.replace("{}", by.name()),
            bars: self.of(by).map(|case| (short(case.size), of(case))).collect(),
        };
        let mut panels: Vec<Panel> =
            By::ALL.map(|by| panel(by, "k rows/s by {}", |case| case.rate() / 1e3)).into_iter().collect();
        if let Some(board) = board {
            let rates = board.medians(|run| board.rate(run) / 1e3);
            let bars = rates.into_iter().map(|(consumers, rate)| (consumers.to_string(), rate)).collect();
            panels.push(Panel { title: "k events/s by consumers".into(), bars });
        }
        let memory = By::ALL.map(|by| panel(by, "peak MB by {}", |case| case.rss() / 1e6));
        plot(&[&panels, &memory])
    }
}

impl Case {
    /// Rows a second.
    fn rate(&self) -> f64 {
        median(self.runs.iter().map(|run| run.rows_per_second))
    }

    /// The highest of all readings, in bytes.
    fn rss(&self) -> f64 {
        self.runs.iter().map(|run| run.peak_rss).max().unwrap_or(0) as f64
    }
}

/// 20 k, 10 M
fn short(size: u64) -> String {
    match size {
        _ if size >= MILLION && size.is_multiple_of(MILLION) => format!("{} M", size / MILLION),
        _ if size >= 1000 && size.is_multiple_of(1000) => format!("{} k", size / 1000),
        _ => size.to_string(),
    }
}
