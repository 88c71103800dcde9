//! Kafka → Redis: how fast a topic full of events of the last minutes is counted, what that costs, and whether the board
//! then says what SQL says.

use std::fmt::Write as _;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};
use falaj::kafka;
use serde::{Deserialize, Serialize};

use super::applied::{Applied, Watch};
use super::{at_most, median, rows};
use crate::process::{self, Finished};
use crate::reader::falaj;
use crate::report::Verdict;
use crate::sinks;
use crate::stack::Stack;

const PIPELINE: &str = "bench_board";
const ROWS: u64 = 1_000_000;
const QUICK_ROWS: u64 = 200_000;
const CONTENTS: u64 = 2000;
/// One for each of four consumers.
const PARTITIONS: i32 = 4;
const CONSUMERS: [usize; 2] = [1, 4];
const ROUNDS: usize = 3;
const QUICK_ROUNDS: usize = 1;
/// Events a second, one consumer, the median of the rounds.
const RATE_LEAST: f64 = 100_000.0;
/// Microseconds of `consume` an event, one consumer, the median of the rounds.
const CPU_MOST: f64 = 3.0;

/// All rounds.
#[derive(Debug, Serialize)]
pub struct Board {
    /// Events in the topic.
    pub events: u64,
    /// What SQL says of them.
    pub expected: Totals,
    /// Each run.
    pub runs: Vec<Run>,
}

/// One reading of the whole topic onto an empty board.
#[derive(Debug, Serialize)]
pub struct Run {
    /// Processes that shared the partitions.
    pub consumers: usize,
    /// From the moment the first of them has its partitions until the last event is on the board.
    pub seconds: f64,
    /// From the start of the processes until the last has ended.
    pub whole_seconds: f64,
    /// CPU seconds of all consumers.
    pub consume_cpu: f64,
    /// CPU seconds of Redis.
    pub redis_cpu: f64,
    /// CPU seconds of the broker.
    pub broker_cpu: f64,
    /// The largest peak resident memory of a consumer, in bytes.
    pub peak_rss: u64,
    /// What the board says.
    pub totals: Totals,
}

/// Sums over everything on the board.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Of the ranking: contents with events.
    pub contents: u64,
    /// Of the ranking.
    pub content_events: u64,
    /// Engagement of the ranking in milliseconds.
    pub millis: i64,
    /// Of the devices: all that were counted.
    pub device_events: u64,
    /// Late ones and those from the future.
    pub left_out: u64,
}

/// Fills a topic, then reads it again and again.
pub async fn measure(stack: &Stack, quick: bool) -> Result<Board> {
    let (events, rounds) = if quick { (QUICK_ROWS, QUICK_ROUNDS) } else { (ROWS, ROUNDS) };
    eprintln!("bench     board: filling a topic with {events} events");
    let expected = fill(stack, events).await?;
    let mut runs = Vec::new();
    for round in 1..=rounds {
        for consumers in CONSUMERS {
            let run = tokio::task::block_in_place(|| run(stack, consumers));
            let run = run.with_context(|| format!("{consumers} consumer(s), round {round}"))?;
            let rate = events as f64 / run.seconds / 1000.0;
            eprintln!("bench     board, round {round} of {rounds}: {consumers} consumer(s) {rate:>5.0}k events/s");
            runs.push(run);
        }
    }
    sinks::remove(stack, PIPELINE).await?;
    Ok(Board { events, expected, runs })
}

async fn fill(stack: &Stack, events: u64) -> Result<Totals> {
    rows::reset(stack, CONTENTS).await?;
    let topic = stack.config.kafka.topic(PIPELINE, "engagement_events");
    kafka::create_topic(&stack.config.kafka, &topic, PARTITIONS, &[]).await?;
    let mut init = command(stack);
    init.args(["init", "--yes"]);
    tokio::task::block_in_place(|| process::run(init, stack.servers))?;
    let end = rows::write(stack, 1, events, CONTENTS).await?.to_string();
    let mut produce = command(stack);
    produce.args(["produce", "--until-lsn", &end]);
    tokio::task::block_in_place(|| process::run(produce, stack.servers))?;
    stack.drop_slot(PIPELINE).await?;
    let expected = expected(stack).await?;
    stack.execute("TRUNCATE engagement_events").await?;
    Ok(expected)
}

fn command(stack: &Stack) -> Command {
    falaj(stack, PIPELINE, PIPELINE, "kafka")
}

/// Engagement is counted where there is a content.
async fn expected(stack: &Stack) -> Result<Totals> {
    let sql = "SELECT count(DISTINCT content_id), count(content_id), \
                      coalesce(sum(duration_ms) FILTER (WHERE content_id IS NOT NULL), 0)::bigint, count(*) \
               FROM engagement_events";
    let row = stack.sql.query_one(sql, &[]).await.context(sql)?;
    let count = |at: usize| row.try_get::<_, i64>(at);
    Ok(Totals {
        contents: count(0)? as u64,
        content_events: count(1)? as u64,
        millis: count(2)?,
        device_events: count(3)? as u64,
        left_out: 0,
    })
}

fn run(stack: &Stack, consumers: usize) -> Result<Run> {
    let client = redis::Client::open(stack.config.redis.url.as_str())?;
    // Nobody else uses this Redis.
    redis::cmd("FLUSHALL").query::<()>(&mut client.get_connection()?)?;
    let gone = "Redis is gone";
    let redis = process::cpu_seconds(stack.servers.redis).context(gone)?;
    let broker = process::cpu_seconds(stack.servers.kafka).context("the broker is gone")?;
    let watch = Watch::start(stack, PIPELINE)?;
    let began = std::time::Instant::now();
    let finished = consume(stack, consumers)?;
    let whole_seconds = began.elapsed().as_secs_f64();
    let applied = watch.stop()?;
    Ok(Run {
        consumers,
        seconds: seconds(&applied).context("nothing was counted")?,
        whole_seconds,
        consume_cpu: finished.iter().map(|f| f.cpu.client).sum(),
        redis_cpu: process::cpu_seconds(stack.servers.redis).context(gone)? - redis,
        broker_cpu: process::cpu_seconds(stack.servers.kafka).context("the broker is gone")? - broker,
        peak_rss: finished.iter().map(|f| f.peak_rss).max().unwrap_or(0),
        totals: totals(stack)?,
    })
}

fn seconds(applied: &Applied) -> Option<f64> {
    Some((applied.moved? - applied.begun?) as f64 / 1e6)
}

/// All at once, each to the end.
fn consume(stack: &Stack, consumers: usize) -> Result<Vec<Finished>> {
    let started: Vec<_> = (0..consumers)
        .map(|_| {
            let (mut consume, servers) = (command(stack), stack.servers);
            consume.args(["consume", "--sinks", "redis", "--until-end"]);
            thread::spawn(move || process::run(consume, servers))
        })
        .collect();
    started.into_iter().map(|run| run.join().map_err(|_| anyhow::anyhow!("a run panicked"))?).collect()
}

/// The board as `falaj board --json` shows it, all of the ranking.
fn totals(stack: &Stack) -> Result<Totals> {
    #[derive(Deserialize)]
    struct View {
        top: Vec<Content>,
        devices: Vec<Device>,
        late_dropped: u64,
        future_dropped: u64,
    }
    #[derive(Deserialize)]
    struct Content {
        engagement_seconds: f64,
        events: u64,
    }
    #[derive(Deserialize)]
    struct Device {
        events: u64,
    }
    let mut board = command(stack);
    board.args(["board", "--json", "--top", &(CONTENTS + 1).to_string()]);
    let printed = process::run(board, stack.servers)?.stdout;
    let view: View = serde_json::from_str(&printed).with_context(|| printed.clone())?;
    Ok(Totals {
        contents: view.top.len() as u64,
        content_events: view.top.iter().map(|c| c.events).sum(),
        // Three decimals: a double holds them exactly enough to round.
        millis: view.top.iter().map(|c| (c.engagement_seconds * 1000.0).round() as i64).sum(),
        device_events: view.devices.iter().map(|d| d.events).sum(),
        left_out: view.late_dropped + view.future_dropped,
    })
}

impl Board {
    /// Numbers of consumers that were tried, with the median of a figure.
    pub fn medians(&self, figure: impl Fn(&Run) -> f64) -> [(usize, f64); 2] {
        CONSUMERS.map(|n| (n, median(self.runs.iter().filter(|r| r.consumers == n).map(&figure))))
    }

    /// Events a second.
    pub fn rate(&self, run: &Run) -> f64 {
        self.events as f64 / run.seconds
    }

    /// Bars.
    pub fn verdicts(&self) -> Vec<Verdict> {
        let [(_, rate), _] = self.medians(|run| self.rate(run));
        let [(_, cpu), _] = self.medians(|run| run.consume_cpu * 1e6 / self.events as f64);
        let wrong: Vec<&Run> = self.runs.iter().filter(|r| r.totals != self.expected).collect();
        let mut exact = format!("board: {} times each of {} events counted once", self.runs.len(), self.events);
        for run in &wrong {
            let _ = write!(exact, "; {} consumer(s): {:?}, SQL says {:?}", run.consumers, run.totals, self.expected);
        }
        vec![
            Verdict {
                text: format!("Kafka → Redis: {:.0}k events/s, needed ≥ {:.0}k", rate / 1e3, RATE_LEAST / 1e3),
                held: rate >= RATE_LEAST,
            },
            at_most("Kafka → Redis: CPU of consume", cpu, CPU_MOST, "µs an event"),
            Verdict { text: exact, held: wrong.is_empty() },
        ]
    }

    /// One table.
    pub fn markdown(&self) -> String {
        let mut out = format!(
            "### Kafka → Redis: {} events, {PARTITIONS} partitions, {CONTENTS} contents; {} round(s)\n\n\
             | consumers | events/s, median (min–max) | counting, s | whole process, s | µs an event: consume | Redis | broker | peak RSS, MB | on the board |\n\
             |--:|--:|--:|--:|--:|--:|--:|--:|---|\n",
            self.events,
            self.runs.len() / CONSUMERS.len()
        );
        for consumers in CONSUMERS {
            let runs: Vec<&Run> = self.runs.iter().filter(|r| r.consumers == consumers).collect();
            let middle = |figure: &dyn Fn(&Run) -> f64| median(runs.iter().map(|r| figure(r)));
            let (min, max) = runs.iter().fold((f64::MAX, 0.0), |(a, b): (f64, f64), r| {
                let rate = self.rate(r) / 1e3;
                (a.min(rate), b.max(rate))
            });
            let micros = |figure: &dyn Fn(&Run) -> f64| middle(figure) * 1e6 / self.events as f64;
            let exact = runs.iter().all(|r| r.totals == self.expected);
            let _ = writeln!(
                out,
                "| {consumers} | {:.0}k ({min:.0}–{max:.0}) | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.0} | {} |",
                middle(&|r| self.rate(r) / 1e3),
                middle(&|r| r.seconds),
                middle(&|r| r.whole_seconds),
                micros(&|r| r.consume_cpu),
                micros(&|r| r.redis_cpu),
                micros(&|r| r.broker_cpu),
                runs.iter().map(|r| r.peak_rss).max().unwrap_or(0) as f64 / 1e6,
                if exact { "every event once" } else { "**differs from SQL**" },
            );
        }
        let _ = writeln!(out, "\nCPU is of whole processes, start-up included.");
        out
    }
}
