//! Commit → readable in Kafka and commit → on the board, while a steady load is written with all roles on this machine.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use serde::Serialize;

use super::applied::{Applied, Watch};
use super::at_most;
use super::readable::{Readable, Seen};
use super::role::Role;
use crate::process;
use crate::reader::{falaj, pipeline_dir};
use crate::report::Verdict;
use crate::sinks;
use crate::stack::Stack;

/// Rows a second. The quick bench takes the middle one.
const RATES: [u64; 3] = [200, 2000, 20_000];
const QUICK_RATE: u64 = 2000;
/// How long each is written.
const LENGTH: Duration = Duration::from_secs(35);
const QUICK_LENGTH: Duration = Duration::from_secs(15);
/// Events committed within this time of the first one do not count: caches fill, and connections open.
const WARM_UP: Duration = Duration::from_secs(5);
/// A load that falls behind its rate by more than this is none.
const LEAST_OF_RATE: f64 = 0.95;

/// Where an event arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    Kafka,
    Redis,
}

/// Which of the percentiles.
#[derive(Clone, Copy, Debug)]
enum At {
    P50,
    P99,
}

/// Rows a second, where, which percentile, and the most it may be in milliseconds.
const BARS: [(u64, To, At, f64); 7] = [
    (2000, To::Kafka, At::P50, 20.0),
    (2000, To::Kafka, At::P99, 60.0),
    (20_000, To::Kafka, At::P50, 45.0),
    (20_000, To::Kafka, At::P99, 150.0),
    (2000, To::Redis, At::P50, 25.0),
    (2000, To::Redis, At::P99, 70.0),
    (20_000, To::Redis, At::P99, 200.0),
];

/// Upper ends of the histogram's bars in milliseconds; a last bar takes the rest.
const ENDS: [u64; 14] = [5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000];

/// What one rate gave.
#[derive(Debug, Serialize)]
pub struct Latency {
    /// Rows a second that were asked for.
    pub rate: u64,
    /// Rows a second that were committed.
    pub committed_rate: f64,
    /// Events that count.
    pub events: u64,
    /// To a reader with `read_committed`.
    pub kafka: Spread,
    /// To the board.
    pub redis: Spread,
    /// Peak resident memory of `produce` in bytes.
    pub produce_rss: u64,
    /// Peak resident memory of `consume` in bytes.
    pub consume_rss: u64,
    /// Cores that `produce` took.
    pub produce_cores: f64,
    /// Cores that `consume` took.
    pub consume_cores: f64,
}

/// Milliseconds from commit, over all events.
#[derive(Clone, Debug, Serialize)]
pub struct Spread {
    /// Median.
    pub p50: f64,
    /// 95 of 100.
    pub p95: f64,
    /// 99 of 100.
    pub p99: f64,
    /// The slowest.
    pub max: f64,
    /// Events up to each of [`ENDS`], and beyond the last.
    pub counts: Vec<u64>,
}

/// Each rate in turn, with a pipeline of its own.
pub async fn measure(stack: &Stack, quick: bool) -> Result<Vec<Latency>> {
    let (rates, length) = if quick { (&[QUICK_RATE][..], QUICK_LENGTH) } else { (&RATES[..], LENGTH) };
    let mut found = Vec::new();
    for &rate in rates {
        eprintln!("bench     latency at {rate} events/s for {} s", length.as_secs());
        let pipeline = format!("bench_latency_{rate}");
        let latency = tokio::task::block_in_place(|| run(stack, &pipeline, rate, length));
        let latency = latency.with_context(|| format!("{rate} events/s"))?;
        for (to, spread) in [("Kafka", &latency.kafka), ("Redis", &latency.redis)] {
            eprintln!("bench     → {to}: p50 {:.1}, p99 {:.1}, max {:.1} ms", spread.p50, spread.p99, spread.max);
        }
        stack.drop_slot(&pipeline).await?;
        sinks::remove(stack, &pipeline).await?;
        found.push(latency);
    }
    Ok(found)
}

fn run(stack: &Stack, pipeline: &str, rate: u64, length: Duration) -> Result<Latency> {
    let role = |args: &[&str]| {
        let mut command = falaj(stack, pipeline, pipeline, "kafka,archive");
        command.args(args);
        command
    };
    process::run(role(&["init", "--yes"]), stack.servers)?;
    let dir = pipeline_dir(stack, pipeline);
    let mut produce = Role::start(role(&["produce"]), &dir, "produce")?;
    produce.wait_for(" streaming ")?;
    let consume = Role::start(role(&["consume", "--sinks", "redis"]), &dir, "consume")?;
    let readable = Readable::of_pipeline(&stack.config.kafka, pipeline)?;
    let watch = Watch::start(stack, pipeline)?;
    let count = rate * length.as_secs();
    let (rate_arg, count_arg) = (rate.to_string(), count.to_string());
    let load =
        process::run(role(&["generate", "--rate", &rate_arg, "--count", &count_arg, "--seed", "7"]), stack.servers)?;
    let mut seen = readable.collect(count)?;
    // The board comes a moment after Kafka.
    let mut last = BTreeMap::new();
    for event in &seen {
        let offset = last.entry(event.partition).or_insert(event.offset);
        *offset = event.offset.max(*offset);
    }
    let applied = watch.stop_at(last)?;
    let consume = consume.stop()?;
    let produce = produce.stop()?;
    seen.extend(readable.stop()?);
    ensure!(seen.len() as u64 == count, "{} events came out of {count} rows: some came twice", seen.len());
    let (kafka, redis) = spreads(&seen, &applied)?;
    Ok(Latency {
        rate,
        committed_rate: committed_rate(&seen),
        events: kafka.counts.iter().sum(),
        kafka,
        redis,
        produce_rss: produce.rss,
        consume_rss: consume.rss,
        produce_cores: produce.cpu / load.seconds,
        consume_cores: consume.cpu / load.seconds,
    })
}

/// The first transaction's rows came before the time that is measured.
fn committed_rate(seen: &[Seen]) -> f64 {
    let (first, last) = ends(seen);
    let later = seen.iter().filter(|s| s.committed > first).count();
    later as f64 * 1e6 / (last - first).max(1) as f64
}

fn ends(seen: &[Seen]) -> (i64, i64) {
    seen.iter().fold((i64::MAX, i64::MIN), |(a, b), s| (a.min(s.committed), b.max(s.committed)))
}

/// The events that count.
fn warm(seen: &[Seen]) -> impl Iterator<Item = &Seen> {
    let warm = ends(seen).0 + WARM_UP.as_micros() as i64;
    seen.iter().filter(move |event| event.committed >= warm)
}

/// Until the reader had them.
pub fn kafka_spread(seen: &[Seen]) -> Result<Spread> {
    let mut micros = Histogram::new(3)?;
    for event in warm(seen) {
        micros.record(event.age() as u64)?;
    }
    Ok(spread(&micros))
}

fn spreads(seen: &[Seen], applied: &Applied) -> Result<(Spread, Spread)> {
    let mut redis = Histogram::new(3)?;
    for event in warm(seen) {
        let at = applied.at(event.partition, event.offset);
        let at = at.with_context(|| format!("{event:?} was never counted on the board"))?;
        redis.record((at - event.committed).max(0) as u64)?;
    }
    Ok((kafka_spread(seen)?, spread(&redis)))
}

fn spread(micros: &Histogram<u64>) -> Spread {
    let at = |q| micros.value_at_quantile(q) as f64 / 1000.0;
    let mut counts = vec![0; ENDS.len() + 1];
    for step in micros.iter_recorded() {
        let bar = ENDS.partition_point(|end| end * 1000 < step.value_iterated_to());
        counts[bar] += step.count_at_value();
    }
    Spread { p50: at(0.50), p95: at(0.95), p99: at(0.99), max: micros.max() as f64 / 1000.0, counts }
}

impl Latency {
    /// Bars of this rate.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let rate = self.rate;
        let mut verdicts = vec![Verdict {
            text: format!("load at {rate} events/s: {:.0} were committed a second", self.committed_rate),
            held: self.committed_rate >= rate as f64 * LEAST_OF_RATE,
        }];
        for (_, to, at, most) in BARS.iter().filter(|bar| bar.0 == rate) {
            let spread = if *to == To::Kafka { &self.kafka } else { &self.redis };
            let (name, found) = match at {
                At::P50 => ("p50", spread.p50),
                At::P99 => ("p99", spread.p99),
            };
            verdicts.push(at_most(&format!("commit → {to:?} at {rate} events/s, {name}"), found, *most, "ms"));
        }
        verdicts
    }

    fn bars(&self) -> String {
        let mut out = format!("{} events/s\n{:>8}   {:<28}{}\n", self.rate, "ms", "→ Kafka", "→ Redis");
        let counts = || self.kafka.counts.iter().zip(&self.redis.counts);
        let used = |(kafka, redis): (&u64, &u64)| kafka + redis > 0;
        let (first, last) = (counts().position(used), counts().rposition(used));
        for at in first.unwrap_or(0)..=last.unwrap_or(0) {
            let label = ENDS.get(at).map_or(format!("> {}", ENDS[ENDS.len() - 1]), |end| format!("≤ {end}"));
            let [kafka, redis] = [&self.kafka, &self.redis].map(|s| bar(s.counts[at], self.events));
            let _ = writeln!(out, "{}", format!("{label:>8}   {kafka}  {redis}").trim_end());
        }
        out
    }
}

/// Share of the events, as a number and as a bar of at most 16 characters.
fn bar(count: u64, of: u64) -> String {
    let share = count as f64 / of.max(1) as f64;
    format!("{:>7.3} % {:<16}", share * 100.0, "█".repeat((share * 16.0).round() as usize))
}

/// Percentiles as a table, then one histogram a rate.
pub fn markdown(found: &[Latency]) -> String {
    let mut out = String::from(
        "### Latency from commit, milliseconds\n\n| events/s | to | p50 | p95 | p99 | max | events | produce: MB, cores | consume: MB, cores |\n|--:|---|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for latency in found {
        let Latency { rate, events, kafka, redis, .. } = latency;
        let produce = format!("{:.0}, {:.2}", latency.produce_rss as f64 / 1e6, latency.produce_cores);
        let consume = format!("{:.0}, {:.2}", latency.consume_rss as f64 / 1e6, latency.consume_cores);
        for (to, Spread { p50, p95, p99, max, .. }, cost) in [
            ("Kafka, readable", kafka, format!("{produce} | –")),
            ("Redis, on the board", redis, format!("– | {consume}")),
        ] {
            let _ = writeln!(out, "| {rate} | {to} | {p50:.1} | {p95:.1} | {p99:.1} | {max:.1} | {events} | {cost} |");
        }
    }
    out.push_str("\nShare of the events by latency:\n\n```\n");
    let bars: Vec<String> = found.iter().map(Latency::bars).collect();
    out.push_str(&bars.join("\n"));
    out.push_str("```\n");
    out
}
