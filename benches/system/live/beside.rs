//! Commit → readable in Kafka, beside Debezium: the two take turns, each alone on the machine and with Kafka as its only sink.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use falaj::kafka;
use serde::Serialize;

use super::latency::{Spread, kafka_spread};
use super::readable::{Readable, Seen};
use super::role::Role;
use super::{at_most, median};
use crate::peer;
use crate::process;
use crate::reader::{falaj, pipeline_dir};
use crate::report::Verdict;
use crate::sinks;
use crate::stack::Stack;

const PEER: &str = "debezium";
/// Rows a second.
const RATES: [u64; 2] = [200, 2000];
const ROUNDS: usize = 3;
/// How long each is written in a round.
const LENGTH: Duration = Duration::from_secs(30);
/// How long it may take until Debezium streams.
const PATIENCE: Duration = Duration::from_secs(90);

/// What one rate gave.
#[derive(Debug, Serialize)]
pub struct Beside {
    rate: u64,
    /// One a round.
    falaj: Vec<Spread>,
    /// The same; or why there is no figure.
    debezium: Result<Vec<Spread>, String>,
}

/// The rounds of each rate.
pub async fn measure(stack: &Stack) -> Result<Vec<Beside>> {
    let mut found = Vec::new();
    for rate in RATES {
        let mut beside = Beside { rate, falaj: Vec::new(), debezium: Ok(Vec::new()) };
        for round in 1..=ROUNDS {
            let ours = ours(stack, rate).await.with_context(|| format!("falaj at {rate} events/s"))?;
            let mut said = format!("falaj p50 {:.1}, p99 {:.1}", ours.p50, ours.p99);
            beside.falaj.push(ours);
            if let Ok(rounds) = &mut beside.debezium {
                match theirs(stack, rate).await {
                    Ok(theirs) => {
                        let _ = write!(said, ", Debezium p50 {:.1}, p99 {:.1} ms", theirs.p50, theirs.p99);
                        rounds.push(theirs);
                    }
                    // What a peer lacks here is no reason to stop: falaj is what is measured.
                    Err(error) => beside.debezium = Err(format!("{error:#}")),
                }
            }
            eprintln!("bench     commit → Kafka at {rate} events/s, round {round} of {ROUNDS}: {said}");
        }
        found.push(beside);
    }
    Ok(found)
}

async fn ours(stack: &Stack, rate: u64) -> Result<Spread> {
    let name = format!("bench_beside_{rate}");
    let measured = tokio::task::block_in_place(|| {
        let role = |verb: &[&str]| {
            let mut command = falaj(stack, &name, &name, "kafka");
            command.args(verb);
            command
        };
        process::run(role(&["init", "--yes"]), stack.servers)?;
        let mut produce = Role::start(role(&["produce"]), &pipeline_dir(stack, &name), "produce")?;
        produce.wait_for(" streaming ")?;
        let readable = Readable::of_pipeline(&stack.config.kafka, &name)?;
        let seen = load(stack, &name, rate, &readable)?;
        produce.stop()?;
        readable.stop()?;
        kafka_spread(&seen)
    });
    clear(stack, &name, measured).await
}

/// At-least-once: with `exactly.once.support` it is slower still.
async fn theirs(stack: &Stack, rate: u64) -> Result<Spread> {
    let name = format!("bench_debezium_{rate}");
    let topic = format!("{name}.public.engagement_events");
    peer::install(stack.servers, PEER)?;
    kafka::create_topic(&stack.config.kafka, &topic, stack.config.kafka.partitions, &[]).await?;
    let mut init = falaj(stack, &name, &name, "archive");
    init.args(["init", "--yes"]);
    tokio::task::block_in_place(|| process::run(init, stack.servers))?;
    let measured = debezium(stack, &name, &topic, rate).await;
    clear(stack, &name, measured).await
}

async fn debezium(stack: &Stack, name: &str, topic: &str, rate: u64) -> Result<Spread> {
    let dir = pipeline_dir(stack, name);
    let mut command = peer::script();
    command.env("PEER_FOR", "latency").args(["run", PEER]).arg(&dir).args([name, topic]);
    let mut debezium = Role::start(command, &dir, PEER)?;
    let readable = tokio::task::block_in_place(|| Readable::start(&stack.config.kafka, topic, source_ts))?;
    // It logs nothing when it streams: rows tell.
    let (deadline, mut probes) = (Instant::now() + PATIENCE, 0);
    while readable.take(Duration::from_millis(500)).is_none() {
        debezium.is_alive()?;
        ensure!(Instant::now() < deadline, "no row came through within {PATIENCE:?}; its log is in {}", dir.display());
        stack.execute("INSERT INTO engagement_events (event_type, event_ts) VALUES ('play', now())").await?;
        probes += 1;
    }
    tokio::task::block_in_place(|| {
        readable.collect(probes - 1)?;
        let seen = load(stack, name, rate, &readable)?;
        readable.stop()?;
        // It keeps nothing that is needed again.
        debezium.kill()?;
        kafka_spread(&seen)
    })
}

/// The same rows for each: the events of the load as `readable` got them.
fn load(stack: &Stack, name: &str, rate: u64, readable: &Readable) -> Result<Vec<Seen>> {
    let count = rate * LENGTH.as_secs();
    let mut load = falaj(stack, name, name, "archive");
    load.args(["generate", "--rate", &rate.to_string(), "--count", &count.to_string(), "--seed", "7"]);
    process::run(load, stack.servers)?;
    readable.collect(count)
}

/// Nothing of a round is left for the next one, whatever came of it.
async fn clear(stack: &Stack, name: &str, measured: Result<Spread>) -> Result<Spread> {
    stack.drop_slot(name).await?;
    sinks::remove(stack, name).await?;
    measured
}

/// `"__source_ts_us":…`, the commit's time in microseconds since 1970.
fn source_ts(body: &[u8]) -> Option<i64> {
    i64::try_from(peer::number(body, "__source_ts_us")?).ok()
}

/// A percentile, and how to find it.
type Percentile = (&'static str, fn(&Spread) -> f64);

impl Beside {
    /// Debezium's own medians are the bars.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let text = format!("commit → Kafka at {} events/s beside Debezium", self.rate);
        let theirs = match &self.debezium {
            Ok(theirs) => theirs,
            Err(why) => return vec![Verdict { text: format!("{text}, which has no figure: {why}"), held: false }],
        };
        let percentiles: [Percentile; 2] = [("p50", |s| s.p50), ("p99", |s| s.p99)];
        let bar = |(name, of): Percentile| {
            let [ours, theirs] = [&self.falaj, theirs].map(|rounds| median(rounds.iter().map(of)));
            at_most(&format!("{text}, {name}"), ours, (theirs * 10.0).round() / 10.0, "ms")
        };
        percentiles.map(bar).into()
    }
}

/// Medians of the rounds, and how far these lie apart.
pub fn markdown(found: &[Beside]) -> String {
    let mut out = String::from(
        "### Latency to Kafka alone, beside Debezium, milliseconds\n\n| events/s | by | p50 | p95 | p99 | max |\n|--:|---|--:|--:|--:|--:|\n",
    );
    for Beside { rate, falaj, debezium } in found {
        let debezium = debezium.as_deref().unwrap_or_default();
        for (name, rounds) in [("falaj, exactly once", falaj.as_slice()), ("Debezium, at least once", debezium)] {
            let cell = |of: fn(&Spread) -> f64| {
                let (low, high) = rounds.iter().map(of).fold((f64::MAX, 0.0_f64), |(a, b), n| (a.min(n), b.max(n)));
                format!("{:.1} ({low:.1}–{high:.1})", median(rounds.iter().map(of)))
            };
            if !rounds.is_empty() {
                let cells = [cell(|s| s.p50), cell(|s| s.p95), cell(|s| s.p99), cell(|s| s.max)].join(" | ");
                let _ = writeln!(out, "| {rate} | {name} | {cells} |");
            }
        }
    }
    out
}
