//! From rows in Postgres to every sink, checked against what Postgres itself computes.

use crate::rig::{Pipeline, Servers, check, load, oracle};

#[tokio::test(flavor = "multi_thread")]
async fn every_event_is_in_every_sink_once_and_as_of_its_own_commit() {
    let pipeline = Pipeline::bare(Servers::shared(), "e2e").await;
    oracle::install(&pipeline).await;
    // These are there before the slot: they come from the lookup base, and are no events.
    pipeline.run(include_str!("../sql/04_sample_content.sql")).await;
    pipeline.init().await;
    oracle::follow(&pipeline).await;
    load::mixed(&pipeline, 50_000, 11).await;
    let lsn = pipeline.produce().await;
    assert_eq!(pipeline.confirmed().await, lsn);
    let count = check::produced(&pipeline, lsn).await;
    assert!(count > 55_000, "{count} events");
}
