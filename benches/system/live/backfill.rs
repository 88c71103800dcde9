//! A copy of history into Kafka and the archive, beside two parallel `COPY … TO STDOUT` of the same rows, which nobody keeps.

use std::fmt::Write as _;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::{median, rows};
use crate::plan::Reader;
use crate::process::{self, Cpu};
use crate::reader::falaj;
use crate::report::Verdict;
use crate::shape::Shape;
use crate::sinks::{self, Content};
use crate::stack::Stack;

const PIPELINE: &str = "bench_backfill";
const TABLE: &str = "engagement_events";
const ROWS: u64 = 500_000;
const QUICK_ROWS: u64 = 150_000;
const CONTENTS: u64 = 20_000;
const JOBS: u64 = 2;
const ROUNDS: usize = 3;
const QUICK_ROUNDS: usize = 1;
/// The least that the copy's rate may be, divided by that of the `COPY`s in the same run.
const RATIO_LEAST: f64 = 0.9;

/// All rounds.
#[derive(Debug, Serialize)]
pub struct Backfill {
    /// Rows of the table.
    pub rows: u64,
    /// The parallel `COPY`s, of each round.
    pub copies: Vec<Span>,
    /// Each copy by falaj.
    pub runs: Vec<Run>,
}

/// How long something took, and how much of the machine.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Span {
    /// From start to exit of the processes.
    pub seconds: f64,
    /// CPU seconds of all cores, whoever worked: clients, Postgres, broker.
    pub worked: f64,
}

/// One copy by falaj, into empty sinks.
#[derive(Debug, Serialize)]
pub struct Run {
    /// Start-up included.
    pub span: Span,
    /// What it cost.
    pub cpu: Cpu,
    /// Peak resident memory in bytes.
    pub peak_rss: u64,
    /// What is in Kafka.
    pub kafka: Content,
    /// What is in the archive.
    pub archive: Content,
}

/// Takes turns.
pub async fn measure(stack: &Stack, quick: bool) -> Result<Backfill> {
    let (count, rounds) = if quick { (QUICK_ROWS, QUICK_ROUNDS) } else { (ROWS, ROUNDS) };
    eprintln!("bench     backfill: writing {count} rows");
    rows::reset(stack, CONTENTS).await?;
    rows::write(stack, 1, count, CONTENTS).await?;
    stack.execute(&format!("VACUUM ANALYZE {TABLE}")).await?;
    let mut found = Backfill { rows: count, copies: Vec::new(), runs: Vec::new() };
    for round in 1..=rounds {
        let span = copy(stack).await?;
        eprintln!(
            "bench     backfill, round {round} of {rounds}: {JOBS} × COPY   {:.0}k rows/s",
            count as f64 / span.seconds / 1e3
        );
        found.copies.push(span);
        let run = backfill(stack, round).await?;
        eprintln!(
            "bench     backfill, round {round} of {rounds}: backfill   {:.0}k rows/s",
            count as f64 / run.span.seconds / 1e3
        );
        found.runs.push(run);
    }
    Ok(found)
}

/// Each half of the table in a session of its own, at the same time, until the last has ended.
async fn copy(stack: &Stack) -> Result<Span> {
    let bounds = format!("SELECT (min(id) + (max(id) - min(id)) / {JOBS})::text FROM {TABLE}");
    let middle: u64 = stack.ask(&bounds).await?.parse()?;
    let (began, worked) = (Instant::now(), process::machine_cpu_seconds()?);
    let halves: Vec<Child> = [format!("id <= {middle}"), format!("id > {middle}")]
        .iter()
        .map(|half| {
            let sql = format!("COPY (SELECT * FROM {TABLE} WHERE {half}) TO STDOUT");
            Command::new("psql")
                .args(["-qXd", &stack.config.postgres.url, "-c", &sql])
                .stdout(Stdio::null())
                .spawn()
                .context("starting psql")
        })
        .collect::<Result<_>>()?;
    for mut half in halves {
        ensure!(half.wait()?.success(), "psql: COPY has failed");
    }
    Ok(Span { seconds: began.elapsed().as_secs_f64(), worked: process::machine_cpu_seconds()? - worked })
}

async fn backfill(stack: &Stack, round: usize) -> Result<Run> {
    let name = format!("{PIPELINE}_{round}");
    let mut init = falaj(stack, &name, &name, "kafka,archive");
    init.args(["init", "--yes"]);
    tokio::task::block_in_place(|| process::run(init, stack.servers)).context("making the slot")?;
    let mut command = falaj(stack, &name, &name, "kafka,archive");
    command.args(["backfill", TABLE, "--jobs", &JOBS.to_string()]);
    let worked = process::machine_cpu_seconds()?;
    let finished = tokio::task::block_in_place(|| process::run(command, stack.servers))?;
    let span = Span { seconds: finished.seconds, worked: process::machine_cpu_seconds()? - worked };
    let mut found = sinks::count(stack, Reader::Both, &name, Shape::Inserts).await?;
    let mut content = |sink| found.remove(sink).context(sink);
    let (kafka, archive) = (content("kafka")?, content("archive")?);
    stack.drop_slot(&name).await?;
    sinks::remove(stack, &name).await?;
    Ok(Run { span, cpu: finished.cpu, peak_rss: finished.peak_rss, kafka, archive })
}

impl Backfill {
    fn ratio(&self) -> f64 {
        median(self.copies.iter().map(|span| span.seconds)) / median(self.runs.iter().map(|run| run.span.seconds))
    }

    /// Each row once in either sink, and none as something that the stream would have brought.
    fn is_exact(&self) -> bool {
        let exact = Content { events: self.rows, distinct: self.rows, of_kind: 0 };
        self.runs.iter().all(|run| [run.kafka, run.archive] == [exact; 2])
    }

    /// The table.
    pub fn markdown(&self) -> String {
        let rate = |seconds: f64| self.rows as f64 / seconds / 1e3;
        let of = |figure: fn(&Run) -> f64| median(self.runs.iter().map(figure));
        let copy = |figure: fn(&Span) -> f64| median(self.copies.iter().map(figure));
        let (copied, ours) = (copy(|span| span.seconds), of(|run| run.span.seconds));
        let mut out = String::new();
        // Writing into a string does not fail.
        let _ = write!(
            out,
            "### Backfill of {} rows, {JOBS} jobs, {CONTENTS} contents; {} round(s)\n\n\
             | | rows/s, median | ratio | s | CPU s: all cores | falaj | broker | peak RSS, MB | in Kafka and archive |\n\
             |---|--:|--:|--:|--:|--:|--:|--:|---|\n\
             | {JOBS} × COPY … TO STDOUT >/dev/null | {:.0}k | 1.00 | {copied:.2} | {:.2} | – | – | – | – |\n\
             | backfill → Kafka + archive | {:.0}k | {:.2} | {ours:.2} | {:.2} | {:.2} | {:.2} | {:.0} | {} |\n",
            self.rows,
            self.runs.len(),
            rate(copied),
            copy(|span| span.worked),
            rate(ours),
            self.ratio(),
            of(|run| run.span.worked),
            of(|run| run.cpu.client),
            of(|run| run.cpu.broker),
            self.runs.iter().map(|run| run.peak_rss).max().unwrap_or_default() as f64 / 1e6,
            if self.is_exact() { "every row once" } else { "NOT every row once" },
        );
        out
    }

    /// Its bars.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let ratio = self.ratio();
        vec![
            Verdict {
                text: format!("backfill: ratio to {JOBS} parallel COPY {ratio:.3}, needed ≥ {RATIO_LEAST}"),
                held: ratio >= RATIO_LEAST,
            },
            Verdict {
                text: format!("backfill: each of {} rows once in either sink", self.rows),
                held: self.is_exact(),
            },
        ]
    }
}
