//! The tables: medians, ratios, bars; as Markdown for a reader, as JSON for the record.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use crate::live::Live;
use crate::speed::Speed;
use crate::stack::Machine;

/// Everything that was measured.
#[derive(Serialize)]
pub struct Figures {
    /// Where.
    pub machine: Machine,
    /// How fast the backlogs were read.
    pub speed: Speed,
    /// The system at work.
    pub live: Live,
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
    /// Every bar.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let mut verdicts = self.speed.verdicts();
        verdicts.extend(self.live.verdicts());
        verdicts
    }

    /// All tables.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        // Writing into a string does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Machine { cpus, cpu, memory_gb, load, kernel, congestion_control, .. } = &self.machine;
        let Machine { postgres, kafka, librdkafka, redis, commit, .. } = &self.machine;
        writeln!(
            out,
            "Machine: {cpus} × {cpu}, {memory_gb} GB, Linux {kernel}, TCP {congestion_control}; load average at the start {load}."
        )?;
        writeln!(out, "Postgres {postgres}, Kafka {kafka}, librdkafka {librdkafka}, Redis {redis}, falaj {commit}.")?;
        self.speed.write(out)?;
        out.push_str(&self.live.markdown());
        self.write_micro(out)
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
