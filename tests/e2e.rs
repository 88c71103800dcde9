//! From rows in Postgres to every sink, checked against what Postgres itself computes.

use falaj::mock_external::Faults;

use crate::rig::peer::Peer;
use crate::rig::{Pipeline, Servers, check, load, oracle};

#[tokio::test(flavor = "multi_thread")]
async fn every_event_is_in_every_sink_once_and_as_of_its_own_commit() {
    let p = Pipeline::bare(Servers::shared(), "e2e").await;
    oracle::install(&p).await;
    // These are there before the slot: they come from the lookup base, and are no events.
    p.run(include_str!("../sql/04_sample_content.sql")).await;
    p.init().await;
    oracle::follow(&p).await;
    load::mixed(&p, 50_000, 11).await;

    let lsn = p.produce().await;
    assert_eq!(p.confirmed().await, lsn);
    let count = check::produced(&p, lsn).await;
    assert!(count > 55_000, "{count} events");

    p.start(&["consume", "--until-end", "--sinks", "redis"]).ends_well().await;
    check::board(&p, lsn).await;
    p.start(&["upload", "--once"]).ends_well().await;
    check::bigquery(&p, lsn).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_reaches_the_outside_system_once_although_it_fails_now_and_then() {
    let mut p = Pipeline::with_oracle(Servers::shared(), "outside").await;
    let peer = Peer::start(&mut p, Faults::random(0.05, 5)).await;
    load::mixed(&p, 3_000, 12).await;
    let lsn = p.produce().await;
    p.start(&["consume", "--until-end", "--sinks", "external"]).ends_well().await;
    check::outside(&p, &peer, lsn).await;
}
