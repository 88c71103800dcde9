//! Commit → Kafka readable and commit → Redis while a steady load is written, with all roles on this machine.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use falaj::config::Kafka;
use hdrhistogram::Histogram;
use jiff::Timestamp;
use rdkafka::consumer::BaseConsumer;
use rdkafka::{Message, Offset};
use serde::Serialize;

use crate::plan::LATENCY_RATE;
use crate::process;
use crate::reader::{falaj, pipeline_dir};
use crate::sinks::{self, field};
use crate::stack::Stack;

const PIPELINE: &str = "bench_latency";
/// How long a role may take to get going, and to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Milliseconds from commit.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Percentiles {
    /// Median.
    pub p50: f64,
    /// 99 of 100.
    pub p99: f64,
    /// The slowest.
    pub max: f64,
}

/// What a steady load gave.
#[derive(Debug, Serialize)]
pub struct Latency {
    /// Rows a second that were written.
    pub rate: u64,
    /// To a reader with `read_committed`, over all events.
    pub kafka: Percentiles,
    /// To the board, from the reports of `consume`: median of their p50, the worst of their p99 and max.
    pub redis: Percentiles,
    /// Peak resident memory of `produce` in bytes.
    pub produce_rss: u64,
    /// Peak resident memory of `consume` in bytes.
    pub consume_rss: u64,
    /// Events that the Kafka reader saw.
    pub events: u64,
}

/// Runs `produce` and `consume` beside `generate` for a while.
pub async fn measure(stack: &Stack, length: Duration) -> Result<Latency> {
    let role = |args: &[&str]| {
        let mut command = falaj(stack, PIPELINE, PIPELINE, "kafka,archive");
        command.args(args);
        command
    };
    tokio::task::block_in_place(|| {
        process::run(role(&["init", "--yes"]), stack.servers)?;
        let dir = pipeline_dir(stack, PIPELINE);
        let produce = Role::start(role(&["produce"]), &dir, "produce", Some(" streaming "))?;
        let consume = Role::start(role(&["consume", "--sinks", "redis"]), &dir, "consume", None)?;
        let readable = Readable::start(&stack.config.kafka)?;
        let (rate, count) = (LATENCY_RATE.to_string(), (LATENCY_RATE * length.as_secs()).to_string());
        process::run(role(&["generate", "--rate", &rate, "--count", &count, "--seed", "7"]), stack.servers)?;
        let kafka = readable.stop()?;
        let (consume_rss, reports) = consume.stop()?;
        let (produce_rss, _) = produce.stop()?;
        Ok(Latency {
            rate: LATENCY_RATE,
            kafka: percentiles(&kafka),
            redis: board(&reports)?,
            produce_rss,
            consume_rss,
            events: kafka.len(),
        })
    })
}

fn percentiles(micros: &Histogram<u64>) -> Percentiles {
    let at = |q| micros.value_at_quantile(q) as f64 / 1000.0;
    Percentiles { p50: at(0.50), p99: at(0.99), max: micros.max() as f64 / 1000.0 }
}

/// The reports of whole intervals: the first and the last one are cut.
fn board(reports: &str) -> Result<Percentiles> {
    let mut found = Vec::new();
    for line in reports.lines() {
        let line: serde_json::Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let at = |name: &str| line["latency_ms"][name].as_f64();
        if let (Some(p50), Some(p99), Some(max)) = (at("p50"), at("p99"), at("max")) {
            found.push(Percentiles { p50, p99, max });
        }
    }
    ensure!(found.len() > 2, "consume reported {} times only:\n{reports}", found.len());
    let whole = &found[1..found.len() - 1];
    let mut medians: Vec<f64> = whole.iter().map(|p| p.p50).collect();
    medians.sort_by(f64::total_cmp);
    let worst = |of: fn(&Percentiles) -> f64| whole.iter().map(of).fold(0.0, f64::max);
    Ok(Percentiles { p50: medians[medians.len() / 2], p99: worst(|p| p.p99), max: worst(|p| p.max) })
}

/// A role that runs until it is told to end.
struct Role {
    child: Child,
    name: &'static str,
    out: std::path::PathBuf,
    log: std::path::PathBuf,
}

impl Role {
    /// Starts it, and waits for a word in its log.
    fn start(mut command: Command, dir: &Path, name: &'static str, ready: Option<&str>) -> Result<Self> {
        let (out, log) = (dir.join(format!("{name}.out")), dir.join(format!("{name}.log")));
        command.stdin(Stdio::null()).stdout(File::create(&out)?).stderr(File::create(&log)?);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        let mut role = Self { child, name, out, log };
        let deadline = Instant::now() + PATIENCE;
        while let Some(word) = ready
            && !role.log_text()?.contains(word)
        {
            role.is_alive()?;
            ensure!(Instant::now() < deadline, "{name} does not get going:\n{}", role.log_text()?);
            thread::sleep(Duration::from_millis(20));
        }
        Ok(role)
    }

    fn log_text(&self) -> Result<String> {
        Ok(std::fs::read_to_string(&self.log)?)
    }

    fn is_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} has ended, {status}:\n{}", self.name, self.log_text()?),
        }
    }

    /// Ends it; its peak memory in bytes and what it printed.
    fn stop(mut self) -> Result<(u64, String)> {
        self.is_alive()?;
        let rss = process::peak_rss(self.child.id()).context("a running process")?;
        process::signal("TERM", self.child.id())?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(Instant::now() < deadline, "{} does not end", self.name);
            thread::sleep(Duration::from_millis(20));
        };
        ensure!(status.success(), "{}: {status}\n{}", self.name, self.log_text()?);
        Ok((rss, std::fs::read_to_string(&self.out)?))
    }
}

impl Drop for Role {
    /// After an error it must not run on; where it has ended there is nothing to kill.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A reader of the events' topic from its end on.
struct Readable {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Result<Histogram<u64>>>,
}

impl Readable {
    fn start(config: &Kafka) -> Result<Self> {
        let consumer = sinks::reader(config, &config.topic(PIPELINE, "engagement_events"), Offset::End)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        Ok(Self { stop, thread: thread::spawn(move || read(&consumer, &stopped)) })
    }

    fn stop(self) -> Result<Histogram<u64>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the Kafka reader panicked"))?
    }
}

fn read(consumer: &BaseConsumer, stopped: &AtomicBool) -> Result<Histogram<u64>> {
    let mut micros = Histogram::new(3)?;
    while !stopped.load(Ordering::Relaxed) {
        // The end of a partition comes as an error, again and again: it says nothing here.
        if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
            let now = Timestamp::now();
            let committed = message.payload().and_then(|body| field(body, "_commit_ts")).context("no _commit_ts")?;
            let took = now.as_microsecond() - committed.parse::<Timestamp>()?.as_microsecond();
            micros.record(u64::try_from(took).unwrap_or(0))?;
        }
    }
    ensure!(!micros.is_empty(), "no event became readable");
    Ok(micros)
}
