//! Debezium's latency at the same rates, for the bars that are relative to it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use falaj::kafka;

use super::latency::{Spread, kafka_spread};
use super::readable::Readable;
use super::role::Role;
use crate::peer;
use crate::process;
use crate::reader::{falaj, pipeline_dir};
use crate::sinks;
use crate::stack::Stack;

const PEER: &str = "debezium";
/// How long it may take until it streams.
const PATIENCE: Duration = Duration::from_secs(90);

/// Commit → readable through Debezium, at-least-once, while `generate` writes.
pub async fn measure(stack: &Stack, rate: u64, length: Duration) -> Result<Spread> {
    let name = format!("bench_debezium_{rate}");
    let topic = format!("{name}.public.engagement_events");
    peer::install(stack.servers, PEER)?;
    kafka::create_topic(&stack.config.kafka, &topic, stack.config.kafka.partitions, &[]).await?;
    let mut init = falaj(stack, &name, &name, "archive");
    init.args(["init", "--yes"]);
    tokio::task::block_in_place(|| process::run(init, stack.servers))?;
    let measured = run(stack, &name, &topic, rate, length).await;
    stack.drop_slot(&name).await?;
    sinks::remove(stack, &name).await?;
    measured
}

async fn run(stack: &Stack, name: &str, topic: &str, rate: u64, length: Duration) -> Result<Spread> {
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
        let count = rate * length.as_secs();
        let mut load = falaj(stack, name, name, "archive");
        load.args(["generate", "--rate", &rate.to_string(), "--count", &count.to_string(), "--seed", "7"]);
        process::run(load, stack.servers)?;
        let seen = readable.collect(count)?;
        readable.stop()?;
        // It keeps nothing that is needed again.
        debezium.kill()?;
        kafka_spread(&seen)
    })
}

/// `"__source_ts_us":…`, the commit's time in microseconds since 1970.
fn source_ts(body: &[u8]) -> Option<i64> {
    i64::try_from(peer::number(body, "__source_ts_us")?).ok()
}
