//! The tables: medians, ratios, bars; as Markdown for a reader, as JSON for the record.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use crate::latency::Latency;
use crate::load::RowBytes;
use crate::plan::{BARS, Bar, Limit, Reader, Workload};
use crate::reader::Run;
use crate::stack::Machine;

/// Everything that was measured.
#[derive(Serialize)]
pub struct Figures {
    /// Where.
    pub machine: Machine,
    /// What the backlogs were.
    pub workloads: Vec<(Workload, RowBytes)>,
    /// Each run.
    pub runs: Vec<Run>,
    /// The steady load; `None` where that part was left out.
    pub latency: Option<Latency>,
    /// Nanoseconds an event, by step.
    pub micro: Vec<(String, f64)>,
}

/// A bar and what was found.
pub struct Verdict {
    /// One line.
    pub text: String,
    /// Whether it holds.
    pub held: bool,
}

impl Figures {
    fn of(&self, workload: &str, reader: Reader) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(move |r| r.workload == workload && r.reader == reader)
    }

    fn median(&self, workload: &str, reader: Reader, figure: fn(&Run) -> f64) -> Option<f64> {
        let mut figures: Vec<f64> = self.of(workload, reader).map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len() / 2).copied()
    }

    fn ratio(&self, workload: &str, reader: Reader) -> Option<f64> {
        let rate = |reader| self.median(workload, reader, |r| r.rows_per_second);
        Some(rate(reader)? / rate(Reader::Baseline)?)
    }

    /// Each bar of this run's workloads, and that every sink holds every row once.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let mut verdicts: Vec<Verdict> = BARS.iter().filter_map(|bar| self.verdict(bar)).collect();
        let wrong: Vec<&Run> = self.runs.iter().filter(|r| !r.is_exact()).collect();
        let sinks: usize = self.runs.iter().map(|r| r.sinks.len()).sum();
        let mut text = format!("every row once in each of {sinks} sinks");
        for run in &wrong {
            let _ = write!(text, "; {} {}: {:?} of {} rows", run.workload, run.reader, run.sinks, run.rows);
        }
        verdicts.push(Verdict { text, held: wrong.is_empty() });
        verdicts
    }

    fn verdict(&self, bar: &Bar) -> Option<Verdict> {
        let what = format!("{}, {}", bar.workload, bar.reader);
        Some(match bar.limit {
            Limit::RatioAtLeast(least) => {
                let ratio = self.ratio(bar.workload, bar.reader)?;
                Verdict { text: format!("{what}: ratio {ratio:.2}, needed ≥ {least:.1}"), held: ratio >= least }
            }
            Limit::PeakRssAtMost(most) => {
                let rss = self.of(bar.workload, bar.reader).map(|r| r.peak_rss).max()? as f64 / 1e6;
                Verdict { text: format!("{what}: peak RSS {rss:.0} MB, needed ≤ {most:.0} MB"), held: rss <= most }
            }
        })
    }

    /// All tables.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        // Writing into a string does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Machine { cpus, cpu, memory_gb, load, kernel, .. } = &self.machine;
        let Machine { postgres, kafka, librdkafka, redis, commit, .. } = &self.machine;
        writeln!(out, "Machine: {cpus} × {cpu}, {memory_gb} GB, Linux {kernel}; load average at the start {load}.")?;
        writeln!(out, "Postgres {postgres}, Kafka {kafka}, librdkafka {librdkafka}, Redis {redis}, falaj {commit}.")?;
        for (workload, bytes) in &self.workloads {
            self.write_workload(out, workload, *bytes)?;
        }
        self.write_latency(out)?;
        self.write_micro(out)
    }

    fn write_workload(&self, out: &mut String, workload: &Workload, bytes: RowBytes) -> std::fmt::Result {
        let Workload { name, rows, rounds, .. } = workload;
        let RowBytes { text, binary } = bytes;
        writeln!(
            out,
            "\n### {name}: {rows} rows, {text:.0} B a row in text, {binary:.0} B in binary; {rounds} round(s)\n"
        )?;
        writeln!(
            out,
            "| reader | rows/s, median (min–max) | ratio | streaming, s | whole process, s | CPU s: client | walsender | broker | peak RSS, MB | in the sink |"
        )?;
        writeln!(out, "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|")?;
        workload.readers.iter().try_for_each(|reader| self.write_row(out, name, *reader))
    }

    fn write_row(&self, out: &mut String, workload: &str, reader: Reader) -> std::fmt::Result {
        let median = |figure| self.median(workload, reader, figure).unwrap_or(f64::NAN);
        let rate = |r: &Run| r.rows_per_second / 1000.0;
        let (min, max) = self.of(workload, reader).map(rate).fold((f64::MAX, 0.0), |(a, b), x| (x.min(a), x.max(b)));
        let ratio = self.ratio(workload, reader).map_or("–".into(), |ratio| format!("{ratio:.2}"));
        write!(out, "| {reader} | {:.0}k ({min:.0}–{max:.0}) | {ratio} ", median(|r| r.rows_per_second / 1000.0))?;
        match reader {
            Reader::Baseline => write!(out, "| – ")?,
            _ => write!(out, "| {:.2} ", median(|r| r.streaming.map_or(f64::NAN, |s| s.seconds)))?,
        }
        write!(out, "| {:.2} ", median(|r| r.whole_seconds))?;
        write!(out, "| {:.2} | {:.2} ", median(|r| r.cpu.client), median(|r| r.cpu.walsender))?;
        let broker = median(|r| r.cpu.broker);
        let broker = if reader.feeds_kafka() { format!("{broker:.2}") } else { "–".into() };
        write!(
            out,
            "| {broker} | {:.0} ",
            self.of(workload, reader).map(|r| r.peak_rss).max().unwrap_or(0) as f64 / 1e6
        )?;
        let exact = self.of(workload, reader).all(Run::is_exact);
        let sink = match reader {
            Reader::Baseline | Reader::Discard => "–",
            _ if exact => "every row once",
            _ => "**rows missing or double**",
        };
        writeln!(out, "| {sink} |")
    }

    fn write_latency(&self, out: &mut String) -> std::fmt::Result {
        let Some(latency) = &self.latency else { return Ok(()) };
        let Latency { rate, kafka, redis, produce_rss, consume_rss, events } = latency;
        writeln!(out, "\n### Latency from commit at {rate} events/s, milliseconds\n")?;
        writeln!(out, "| to | p50 | p99 | max |\n|---|--:|--:|--:|")?;
        for (to, p) in [("Kafka, readable with read_committed", kafka), ("Redis, on the board", redis)] {
            writeln!(out, "| {to} | {:.1} | {:.1} | {:.1} |", p.p50, p.p99, p.max)?;
        }
        let mb = |bytes: &u64| *bytes as f64 / 1e6;
        writeln!(
            out,
            "\n{events} events; peak RSS of produce {:.0} MB, of consume {:.0} MB.",
            mb(produce_rss),
            mb(consume_rss)
        )
    }

    fn write_micro(&self, out: &mut String) -> std::fmt::Result {
        if self.micro.is_empty() {
            return Ok(());
        }
        writeln!(out, "\n### One event on one core, microseconds\n\n| step | µs |\n|---|--:|")?;
        self.micro.iter().try_for_each(|(step, nanos)| writeln!(out, "| {step} | {:.3} |", nanos / 1000.0))
    }
}

/// Medians that `benches/micro.rs` left in criterion's directory; empty when it was not run.
pub fn micro(dir: &Path) -> Vec<(String, f64)> {
    let Ok(steps) = std::fs::read_dir(dir.join("event")) else { return Vec::new() };
    let mut found: Vec<(String, f64)> = steps
        .flatten()
        .filter_map(|step| {
            let text = std::fs::read_to_string(step.path().join("new/estimates.json")).ok()?;
            let estimates: serde_json::Value = serde_json::from_str(&text).ok()?;
            Some((step.file_name().into_string().ok()?, estimates["median"]["point_estimate"].as_f64()?))
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}
