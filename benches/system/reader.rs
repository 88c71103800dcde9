//! One run: a reader reads a copy of the backlog's slot to its end, and what it left in the sinks is counted.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use falaj::lsn::Lsn;
use serde::Serialize;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::load::{Backlog, recvlogical};
use crate::peer;
use crate::plan::{Reader, Workload};
use crate::process::{self, Cpu, Finished};
use crate::sinks::{self, Content};
use crate::stack::Stack;

/// What one run gave.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Name of the workload.
    pub workload: &'static str,
    /// Who read it.
    pub reader: Reader,
    /// Rows in it.
    pub rows: u64,
    /// Seconds from start to exit of the process.
    pub whole_seconds: f64,
    /// What falaj says of its streaming, or the broker's clock and the files' times of a peer's; `None` for the baseline.
    pub streaming: Option<Streaming>,
    /// The figure that counts: of the streaming, or of the whole process where that is more.
    pub rows_per_second: f64,
    /// Rows a second of the later half; of peers only.
    pub warm_half: Option<f64>,
    /// What it cost.
    pub cpu: Cpu,
    /// Peak resident memory in bytes.
    pub peak_rss: u64,
    /// What is in each sink that it feeds.
    pub sinks: HashMap<&'static str, Content>,
}

/// The part of a run between its start-up and its end.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Streaming {
    /// From the first row that is walked to the last acknowledgement.
    pub seconds: f64,
    /// Share of the backlog that had been sent before that, while the sinks were being opened; of a peer: that had been
    /// written. These rows do not count.
    pub ahead: f64,
}

impl Run {
    /// Whether no sink lacks a row, has one twice, or takes one for something else.
    pub fn is_exact(&self) -> bool {
        self.sinks.values().all(|c| [c.events, c.distinct, c.of_kind] == [self.rows; 3])
    }
}

/// Reads the backlog once.
pub async fn run(stack: &Stack, backlog: &Backlog, reader: Reader, number: usize) -> Result<Run> {
    let name = pipeline(backlog, number);
    if let Some(peer) = reader.peer() {
        return peer::run(stack, backlog, reader, peer, &name).await;
    }
    let slot = stack.copy_slot(&backlog.slot, &name).await?;
    let end = backlog.end.to_string();
    let command = match reader.sinks() {
        None if reader == Reader::Baseline => {
            let mut command = recvlogical(stack, &slot, backlog.end);
            command.args(["-f", "/dev/null"]);
            command
        }
        sinks => {
            let sinks = sinks.unwrap_or("archive");
            let mut adopt = falaj(stack, &name, &slot, sinks);
            adopt.args(["init", "--yes", "--adopt-slot"]);
            tokio::task::block_in_place(|| process::run(adopt, stack.servers))?;
            let mut command = falaj(stack, &name, &slot, sinks);
            command.args([if reader == Reader::Discard { "measure" } else { "produce" }, "--until-lsn", &end]);
            command
        }
    };
    let (ahead, on_line) = watch_start(stack, backlog, &slot);
    let finished = tokio::task::block_in_place(|| process::run_watched(command, stack.servers, on_line))?;
    let streaming = match reader {
        Reader::Baseline => None,
        _ => Some(Streaming { seconds: streamed(reader, &finished)?, ahead: ahead.await?? }),
    };
    let sinks = sinks::count(stack, reader, &name, backlog.workload.shape).await?;
    stack.drop_slot(&slot).await?;
    sinks::remove(stack, &name).await?;
    Ok(summary(backlog, reader, finished, streaming, sinks))
}

/// Name of the pipeline of one run.
pub fn pipeline(backlog: &Backlog, number: usize) -> String {
    format!("{}_{number}", backlog.slot)
}

/// A `falaj` whose names and directories are those of one pipeline.
pub fn falaj(stack: &Stack, pipeline: &str, slot: &str, sinks: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_falaj"));
    let dir = pipeline_dir(stack, pipeline);
    command.env("FALAJ_PIPELINE", pipeline).env("FALAJ_POSTGRES__SLOT", slot).env("FALAJ_PRODUCE__SINKS", sinks);
    command.env("FALAJ_STATE__DIR", dir.join("state")).env("FALAJ_ARCHIVE__DIR", dir.join("archive"));
    command.env("FALAJ_HTTP__LISTEN", "").env("NO_COLOR", "1").env_remove("FALAJ_LOG");
    command
}

/// State and archive of a pipeline.
pub fn pipeline_dir(stack: &Stack, pipeline: &str) -> PathBuf {
    stack.dir.join(pipeline)
}

/// At the line that says that the walk begins: how much of the backlog the walsender has sent by then. What is in the
/// queues and in the kernel's buffers counts as sent.
fn watch_start(
    stack: &Stack,
    backlog: &Backlog,
    slot: &str,
) -> (JoinHandle<Result<f64>>, impl FnMut(&str) + Send + 'static) {
    let (begins, begun) = oneshot::channel();
    let (client, start, length) = (Arc::clone(&stack.sql), backlog.start.0, backlog.end.0 - backlog.start.0);
    let sql = format!(
        "SELECT sent_lsn::text FROM pg_stat_replication JOIN pg_replication_slots ON pid = active_pid \
         WHERE slot_name = '{slot}'"
    );
    let ahead = tokio::spawn(async move {
        begun.await.context("falaj did not say that it streams")?;
        let sent: Option<String> = client.query_one(&sql, &[]).await?.get(0);
        let sent: Lsn = sent.as_deref().unwrap_or("0/0").parse().map_err(anyhow::Error::msg)?;
        Ok(sent.0.saturating_sub(start) as f64 / length as f64)
    });
    let mut begins = Some(begins);
    let on_line = move |line: &str| {
        if line.contains(" streaming ")
            && let Some(begins) = begins.take()
        {
            // Nobody waits for it any more only when the bench itself is ending.
            let _ = begins.send(());
        }
    };
    (ahead, on_line)
}

fn summary(
    backlog: &Backlog,
    reader: Reader,
    finished: Finished,
    streaming: Option<Streaming>,
    sinks: HashMap<&'static str, Content>,
) -> Run {
    let Workload { name, rows, .. } = backlog.workload;
    let rate = |rows, seconds| rows / seconds;
    // The whole process counts its start-up too. The streaming may count too few rows, since `sent_lsn` of a large
    // transaction moves before its rows are sent. Neither is more than the true rate.
    let streamed = streaming.map_or(0.0, |s| rate(rows as f64 * (1.0 - s.ahead), s.seconds));
    let rows_per_second = streamed.max(rate(rows as f64, finished.seconds));
    Run {
        workload: name,
        reader,
        rows,
        whole_seconds: finished.seconds,
        streaming,
        rows_per_second,
        warm_half: None,
        cpu: finished.cpu,
        peak_rss: finished.peak_rss,
        sinks,
    }
}

fn streamed(reader: Reader, finished: &Finished) -> Result<f64> {
    if reader == Reader::Discard { measured(&finished.stdout) } else { reached(&finished.stderr) }
}

/// `measure` prints one line of JSON.
fn measured(stdout: &str) -> Result<f64> {
    let line: serde_json::Value = serde_json::from_str(stdout.trim()).with_context(|| format!("measure: {stdout}"))?;
    line["seconds"].as_f64().with_context(|| format!("measure: {stdout}"))
}

/// `produce` logs `reached lsn=… rows=… seconds=…` when everything is durable and acknowledged.
fn reached(log: &str) -> Result<f64> {
    let line = log.lines().rev().find(|l| l.contains(" reached ")).with_context(|| format!("no end in\n{log}"))?;
    let seconds = line.split_whitespace().find_map(|word| word.strip_prefix("seconds="));
    Ok(seconds.with_context(|| line.to_owned())?.parse()?)
}
