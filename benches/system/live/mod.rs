//! Figures of the whole system at work: latency under a steady load, starts and crashes, the board, and growth.
//! Each part measures by itself and brings its own table and its own bars.

mod applied; //   when the board has counted what
mod backfill; //  history → Kafka and archive
mod beside; //    commit → readable, and Debezium's
mod board; //     Kafka → Redis
mod growth; //    backlogs, contents, partitions
mod latency; //   commit → readable, commit → on the board
mod plot; //      bars as SVG
mod readable; //  when Kafka lets whom read what
mod recovery; //  start, SIGKILL
mod role; //      a falaj that runs until it is told to end
mod rows; //      backlogs of any size, with any number of contents

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::parts::Parts;
use crate::report::Verdict;
use crate::stack::Stack;

/// What was measured; `None` for a part that was left out.
#[derive(Serialize)]
pub struct Live {
    /// Commit → Kafka and → Redis, by rate.
    pub latency: Option<Vec<latency::Latency>>,
    /// Commit → Kafka alone, by rate, with the peer's.
    pub beside: Option<Vec<beside::Beside>>,
    /// Start and crash.
    pub recovery: Option<recovery::Recovery>,
    /// Kafka → Redis.
    pub board: Option<board::Board>,
    /// History → Kafka and archive.
    pub backfill: Option<backfill::Backfill>,
    /// Cost of a row as everything grows.
    pub growth: Option<growth::Growth>,
}

/// Measures the chosen parts.
pub async fn measure(stack: &Stack, quick: bool, parts: &Parts) -> Result<Live> {
    let mut live = Live { latency: None, beside: None, recovery: None, board: None, backfill: None, growth: None };
    if parts.has("latency") {
        live.latency = Some(latency::measure(stack, quick).await.context("latency")?);
        if parts.has("peers") && !quick {
            live.beside = Some(beside::measure(stack).await.context("latency beside Debezium")?);
        }
    }
    if parts.has("recovery") {
        live.recovery = Some(recovery::measure(stack, quick).await.context("recovery")?);
    }
    if parts.has("board") {
        live.board = Some(board::measure(stack, quick).await.context("board")?);
    }
    if parts.has("backfill") {
        live.backfill = Some(backfill::measure(stack, quick).await.context("backfill")?);
    }
    // It fills the disk more than all others and leaves other contents behind: last.
    if parts.has("growth") && !quick {
        live.growth = Some(growth::measure(stack).await.context("growth")?);
    }
    Ok(live)
}

impl Live {
    /// Tables.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        let parts = [
            self.latency.as_deref().map(latency::markdown),
            self.beside.as_deref().map(beside::markdown),
            self.recovery.as_ref().map(recovery::Recovery::markdown),
            self.board.as_ref().map(board::Board::markdown),
            self.backfill.as_ref().map(backfill::Backfill::markdown),
            self.growth.as_ref().map(|growth| growth.markdown(self.board.as_ref())),
        ];
        for part in parts.into_iter().flatten() {
            // Writing into a string does not fail.
            let _ = write!(out, "\n{part}");
        }
        out
    }

    /// Bars, of the parts that were measured.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        verdicts.extend(self.latency.iter().flatten().flat_map(latency::Latency::verdicts));
        verdicts.extend(self.beside.iter().flatten().flat_map(beside::Beside::verdicts));
        verdicts.extend(self.recovery.iter().flat_map(recovery::Recovery::verdicts));
        verdicts.extend(self.board.iter().flat_map(board::Board::verdicts));
        verdicts.extend(self.backfill.iter().flat_map(backfill::Backfill::verdicts));
        verdicts.extend(self.growth.iter().flat_map(growth::Growth::verdicts));
        verdicts
    }

    /// The plot of growth; `None` when it was not measured.
    pub fn plot(&self) -> Option<String> {
        Some(self.growth.as_ref()?.plot(self.board.as_ref()))
    }
}

/// A bar on a figure that may not be more than `most`.
fn at_most(what: &str, found: f64, most: f64, unit: &str) -> Verdict {
    Verdict { text: format!("{what}: {found:.1} {unit}, needed ≤ {most} {unit}"), held: found <= most }
}

/// The middle of some figures, the lower one of two; NaN of none.
fn median(figures: impl IntoIterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.into_iter().collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}
