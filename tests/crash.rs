//! Crashes and outages under load: afterwards every sink holds exactly what it would have held without them.

use std::time::{Duration, SystemTime};

use falaj::lsn::Lsn;
use falaj::mock_external::Faults;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::rig::peer::Peer;
use crate::rig::process::Falaj;
use crate::rig::stack::Stack;
use crate::rig::{Pipeline, Servers, check, load, until};

/// How often each process is killed.
const KILLS: u32 = 10;

/// Random moments from a seed that is printed, so that a failure can be looked into.
fn moments(name: &str) -> StdRng {
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("{name}: seed {seed}");
    StdRng::seed_from_u64(seed)
}

/// Lets a random time go by: the one thing here that is not a condition.
async fn a_moment(random: &mut StdRng, longest: u64) {
    let length = random.random_range(0..=longest);
    tokio::time::sleep(Duration::from_millis(length)).await;
}

/// Starts and kills a role at random moments, from its first millisecond to well into its work.
async fn kill_again_and_again(p: &Pipeline, args: &[&str], random: &mut StdRng) {
    for _ in 0..KILLS {
        let process = p.start(args);
        a_moment(random, 2500).await;
        process.kill();
    }
}

/// A pipeline that cuts its batches small and often.
async fn pipeline(servers: Servers, name: &str) -> Pipeline {
    let mut p = Pipeline::with_oracle(servers, name).await;
    p.set("FALAJ_ARCHIVE__SEAL_AFTER", "500ms");
    p.set("FALAJ_PRODUCE__TRANSACTION_BYTES", "64KiB");
    p
}

fn generate(p: &Pipeline, rows: u32, rate: u32, seed: u32) -> Falaj {
    let [rows, rate, seed] = [rows, rate, seed].map(|n| n.to_string());
    p.start(&["generate", "--count", &rows, "--rate", &rate, "--seed", &seed])
}

/// The rest of the load, and all of it through produce.
async fn finish(p: &Pipeline) -> Lsn {
    load::changes(p).await;
    let lsn = p.produce().await;
    check::produced(p, lsn).await;
    lsn
}

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_of_produce_at_random_moments() {
    let p = pipeline(Servers::shared(), "killp").await;
    let mut random = moments("produce");
    p.run(include_str!("../sql/04_sample_content.sql")).await;
    let load = generate(&p, 20_000, 1000, 1);
    let titles = async {
        for _ in 0..40 {
            load::titles(&p).await;
        }
    };
    tokio::join!(kill_again_and_again(&p, &["produce"], &mut random), titles);
    load.ends_well().await;
    finish(&p).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_of_consume_and_upload_at_random_moments() {
    let mut p = pipeline(Servers::shared(), "killc").await;
    p.set("FALAJ_BIGQUERY__LOAD_EVERY", "500ms");
    let peer = Peer::start(&mut p, Faults::random(0.05, 3).with_delay(Duration::from_millis(2))).await;
    let (mut random, mut other) = (moments("consume"), moments("upload"));
    let produce = p.start(&["produce"]);
    let load = generate(&p, 12_000, 600, 2);
    tokio::join!(
        kill_again_and_again(&p, &["consume"], &mut random),
        kill_again_and_again(&p, &["upload"], &mut other)
    );
    load.ends_well().await;
    produce.drains().await;
    let lsn = finish(&p).await;
    p.start(&["consume", "--until-end"]).ends_well().await;
    p.start(&["upload", "--once"]).ends_well().await;
    check::board(&p, lsn).await;
    check::outside(&p, &peer, lsn).await;
    check::bigquery(&p, lsn).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_walsender_is_terminated_again_and_again() {
    let p = pipeline(Servers::shared(), "walsender").await;
    let mut random = moments("walsender");
    let produce = p.start(&["produce"]);
    let load = generate(&p, 10_000, 1000, 3);
    let mut before = String::new();
    for _ in 0..KILLS {
        before = p.streams(&before).await;
        a_moment(&mut random, 1000).await;
        p.run(&format!("SELECT pg_terminate_backend({before})")).await;
    }
    load.ends_well().await;
    produce.drains().await;
    finish(&p).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_stops_without_a_checkpoint() {
    let stack = Stack::up("immediate", &["postgres"]);
    let mut p = pipeline(Servers::shared().with(stack.addresses()), "immediate").await;
    let mut random = moments("postgres");
    let produce = p.start(&["produce"]);
    for seed in 1..=3 {
        let load = generate(&p, 100_000, 2000, seed);
        p.flows().await;
        a_moment(&mut random, 1500).await;
        stack.call(&["stop-immediate", "postgres"]);
        load.kill();
        stack.call(&["up", "postgres"]);
        p = p.reconnect().await;
    }
    p.streams("").await;
    generate(&p, 2000, 2000, 9).ends_well().await;
    produce.drains().await;
    finish(&p).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kafka_broker_is_killed() {
    let stack = Stack::up("broker", &["kafka"]);
    let p = pipeline(Servers::shared().with(stack.addresses()), "broker").await;
    let mut random = moments("kafka");
    let (produce, consume) = (p.start(&["produce"]), p.start(&["consume", "--sinks", "redis"]));
    let load = generate(&p, 20_000, 800, 4);
    for _ in 0..2 {
        p.flows().await;
        a_moment(&mut random, 1500).await;
        stack.call(&["kill", "kafka"]);
        stack.call(&["up", "kafka"]);
    }
    load.ends_well().await;
    let lsn = p.lsn().await;
    until("all is acknowledged", async || p.confirmed().await >= lsn).await;
    for process in [produce, consume] {
        process.drains().await;
    }
    let lsn = finish(&p).await;
    p.start(&["consume", "--until-end", "--sinks", "redis"]).ends_well().await;
    check::board(&p, lsn).await;
}
