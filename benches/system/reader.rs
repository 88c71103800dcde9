//! One run: a reader reads a copy of the backlog's slot to its end, and what it left in the sinks is counted.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::load::{Backlog, recvlogical};
use crate::plan::Reader;
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
    /// Seconds from the first message that was walked to the last acknowledgement, as falaj says; `None` for the baseline.
    pub streaming_seconds: Option<f64>,
    /// The figure that counts (see [`rate`]).
    pub rows_per_second: f64,
    /// What it cost.
    pub cpu: Cpu,
    /// Peak resident memory in bytes.
    pub peak_rss: u64,
    /// Whether each sink that it feeds holds every row once.
    pub sinks: HashMap<&'static str, Content>,
}

impl Run {
    /// Whether no sink lacks a row or has one twice.
    pub fn is_exact(&self) -> bool {
        self.sinks.values().all(|c| (c.events, c.distinct) == (self.rows, self.rows))
    }
}

/// Reads the backlog once.
pub async fn run(stack: &Stack, backlog: &Backlog, reader: Reader, number: usize) -> Result<Run> {
    let name = format!("{}_{number}", backlog.slot);
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
    let finished = tokio::task::block_in_place(|| process::run(command, stack.servers))?;
    let sinks = sinks::count(stack, reader, &name).await?;
    stack.drop_slot(&slot).await?;
    sinks::remove(stack, reader, &name).await?;
    summary(backlog, reader, finished, sinks)
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

fn summary(
    backlog: &Backlog,
    reader: Reader,
    finished: Finished,
    sinks: HashMap<&'static str, Content>,
) -> Result<Run> {
    let rows = backlog.workload.rows;
    let streaming_seconds = match reader {
        Reader::Baseline => None,
        Reader::Discard => Some(measured(&finished.stdout)?),
        _ => Some(reached(&finished.stderr)?),
    };
    Ok(Run {
        workload: backlog.workload.name,
        reader,
        rows,
        whole_seconds: finished.seconds,
        streaming_seconds,
        rows_per_second: rate(backlog, finished.seconds, streaming_seconds),
        cpu: finished.cpu,
        peak_rss: finished.peak_rss,
        sinks,
    })
}

/// Rows a second. The whole process counts its start-up too. Its streaming part does not, but while the sinks are being
/// opened a queue's worth of rows (`produce.queue_bytes`) may have been read ahead, so these do not count there.
/// Neither can be more than the true rate: the larger one is taken.
fn rate(backlog: &Backlog, whole: f64, streaming: Option<f64>) -> f64 {
    let rows = backlog.workload.rows as f64;
    let ahead = QUEUE_BYTES / backlog.row_bytes.binary;
    let streamed = streaming.map_or(0.0, |seconds| (rows - ahead).max(0.0) / seconds);
    streamed.max(rows / whole)
}

/// The default of `produce.queue_bytes`.
const QUEUE_BYTES: f64 = 8.0 * 1024.0 * 1024.0;

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
