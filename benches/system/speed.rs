//! Throughput: the readers take turns at each backlog, and their medians are compared.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::bars::{BARS, Bar, PRODUCE_RSS_MB, Pace};
use crate::load::{Backlog, RowBytes};
use crate::peer;
use crate::plan::{Reader, Workload};
use crate::reader::{self, Run};
use crate::report::Verdict;
use crate::stack::Stack;
use crate::warm;

/// All that was measured of it.
#[derive(Default, Serialize)]
pub struct Speed {
    /// What the backlogs were.
    pub workloads: Vec<(Workload, RowBytes)>,
    /// Each run.
    pub runs: Vec<Run>,
    /// The peers that could not be measured.
    pub absent: Vec<Absent>,
}

/// A peer that could not be measured, or not in every round.
#[derive(Serialize)]
pub struct Absent {
    /// Who.
    pub reader: Reader,
    /// Why.
    pub why: String,
}

impl Speed {
    /// Installs the peers that the workloads name. What they lack here is no reason to stop: falaj is what is measured.
    pub fn install_peers(&mut self, stack: &Stack, workloads: &[Workload]) {
        for reader in workloads.iter().flat_map(|workload| workload.peers) {
            let installed = reader.peer().map_or(Ok(()), |peer| peer::install(stack.servers, peer));
            if let Err(error) = installed {
                self.give_up(*reader, &error);
            }
        }
    }

    fn give_up(&mut self, reader: Reader, error: &anyhow::Error) {
        eprintln!("bench     {reader} is left out from here on: {error:#}");
        self.absent.push(Absent { reader, why: format!("{error:#}") });
    }

    /// Why a peer was left out: the end of what it said, which has the reason.
    pub fn why_absent(&self, reader: Reader) -> Option<String> {
        let why = &self.absent.iter().find(|absent| absent.reader == reader)?.why;
        let last = why.lines().last().unwrap_or_default();
        Some(last.chars().take(160).map(|c| if c == '|' { '/' } else { c }).collect())
    }

    /// A B C A B C …: what drifts in the machine meets all readers alike.
    pub async fn take_turns(&mut self, stack: &Stack, backlog: &Backlog) -> Result<()> {
        let Workload { name, rounds, readers, peers, .. } = backlog.workload;
        let mut is_cold = readers.contains(&Reader::Kafka);
        for round in 1..=rounds {
            if is_cold {
                warm::up(stack, |number| reader::run(stack, backlog, Reader::Kafka, number + 40 * round)).await?;
            }
            let peers = if round % 2 == 1 { peers } else { &[] };
            // The peers write in other ways: what the broker had compiled for falaj's is compiled anew after them.
            is_cold = !peers.is_empty();
            for reader in readers.iter().chain(peers).copied() {
                if self.why_absent(reader).is_some() {
                    continue;
                }
                let run = reader::run(stack, backlog, reader, self.runs.len()).await;
                match run.with_context(|| format!("{name}, {reader}, round {round}")) {
                    Ok(run) => {
                        let rate = run.rows_per_second / 1000.0;
                        eprintln!("bench     {name}, round {round} of {rounds}: {reader:<30} {rate:>5.0}k rows/s");
                        self.runs.push(run);
                    }
                    Err(error) if reader.peer().is_some() => self.give_up(reader, &error),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// The runs of one reader.
    pub fn of(&self, workload: &str, reader: Reader) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(move |r| r.workload == workload && r.reader == reader)
    }

    /// Median of a figure over a reader's runs; of an even number the higher one of the two in the middle.
    pub fn median(&self, workload: &str, reader: Reader, figure: impl Fn(&Run) -> Option<f64>) -> Option<f64> {
        let mut figures: Vec<f64> = self.of(workload, reader).filter_map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len() / 2).copied()
    }

    /// Median rate of a reader, or of its later halves.
    pub fn rate(&self, workload: &str, pace: Pace) -> Option<f64> {
        self.median(workload, pace.reader(), |run| match pace {
            Pace::Of(_) => Some(run.rows_per_second),
            Pace::WarmHalf(_) => run.warm_half,
        })
    }

    /// One rate divided by another.
    pub fn ratio(&self, workload: &str, rate: Pace, to: Pace) -> Option<f64> {
        Some(self.rate(workload, rate)? / self.rate(workload, to)?)
    }

    /// Each bar of this run's workloads and readers, what `produce` holds resident, and that every sink holds every row once.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let ratios = BARS.iter().filter(|bar| self.is_planned(bar)).map(|bar| self.verdict(bar));
        let memory = self.workloads.iter().filter_map(|(workload, _)| self.memory(workload.name));
        let mut verdicts: Vec<Verdict> = ratios.chain(memory).collect();
        verdicts.extend(self.exactness());
        verdicts
    }

    /// The quick version, and single parts, leave some out. A peer that could not be had was planned all the same.
    fn is_planned(&self, bar: &Bar) -> bool {
        let of_it =
            self.workloads.iter().map(|(workload, _)| workload).filter(|workload| workload.name == bar.workload);
        let readers: Vec<Reader> = of_it.flat_map(|w| w.readers.iter().chain(w.peers)).copied().collect();
        [bar.reader, bar.to.reader()].iter().all(|reader| readers.contains(reader))
    }

    fn verdict(&self, bar: &Bar) -> Verdict {
        let Bar { workload, reader, least, to } = *bar;
        let beside = match to {
            Pace::Of(Reader::Baseline) => String::new(),
            Pace::Of(other) => format!(" to {other}"),
            Pace::WarmHalf(other) => format!(" to the later half of {other}"),
        };
        let needed = format!("needed ≥ {least}");
        match self.ratio(workload, Pace::Of(reader), to) {
            Some(ratio) => Verdict {
                text: format!("{workload}, {reader}: ratio{beside} {ratio:.3}, {needed}"),
                held: ratio >= least,
            },
            None => {
                let why = self.why_absent(to.reader()).unwrap_or_else(|| "there is no figure".into());
                Verdict {
                    text: format!("{workload}, {reader}: ratio{beside} not measured ({why}), {needed}"),
                    held: false,
                }
            }
        }
    }

    /// The run of `produce` that held the most.
    fn memory(&self, workload: &str) -> Option<Verdict> {
        let runs = self.runs.iter().filter(|run| run.workload == workload && run.reader.sinks().is_some());
        let most = runs.max_by_key(|run| run.peak_rss)?;
        let mb = most.peak_rss as f64 / 1e6;
        let text = format!("{workload}, {}: peak RSS {mb:.0} MB, needed ≤ {PRODUCE_RSS_MB:.0} MB", most.reader);
        Some(Verdict { text, held: mb <= PRODUCE_RSS_MB })
    }

    /// Of falaj's runs; what a peer has lost or doubled is in its table.
    fn exactness(&self) -> Option<Verdict> {
        let ours = || self.runs.iter().filter(|run| run.reader.peer().is_none());
        let sinks: usize = ours().map(|run| run.sinks.len()).sum();
        let mut text = format!("every row once in each of {sinks} sinks");
        let mut held = true;
        for run in ours().filter(|run| !run.is_exact()) {
            held = false;
            let _ = write!(text, "; {} {}: {:?} of {} rows", run.workload, run.reader, run.sinks, run.rows);
        }
        (sinks > 0).then_some(Verdict { text, held })
    }
}
