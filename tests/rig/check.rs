//! The sinks of produce against the oracle.

use falaj::lsn::Lsn;

use super::oracle::{Expected, expected};
use super::{Pipeline, archive, assert_same, id};

pub const TABLES: [&str; 2] = ["content", "engagement_events"];

/// Kafka and the archive hold the expected events up to `lsn`, byte for byte, each once, in order. Gives their number.
pub async fn produced(pipeline: &Pipeline, lsn: Lsn) -> usize {
    let mut count = 0;
    for table in TABLES {
        let expected = expected(pipeline, table, lsn).await;
        kafka(pipeline, table, &expected).await;
        assert_same(&format!("archive, {table}"), &pipeline.rows(table), &expected.bodies());
        count += expected.events.len();
    }
    assert_batches_in_order(pipeline);
    count
}

/// A topic against the expected events: bodies, record keys, commit times, order within each partition.
pub async fn kafka(pipeline: &Pipeline, table: &str, expected: &Expected) {
    let mut records = pipeline.records(table).await;
    for pair in records.windows(2).filter(|pair| pair[0].partition == pair[1].partition) {
        assert!(id(&pair[0].value) < id(&pair[1].value), "order in {table}: {pair:?}");
    }
    records.sort_by_cached_key(|r| id(&r.value).to_owned());
    let values: Vec<_> = records.iter().map(|r| r.value.clone()).collect();
    assert_same(&format!("kafka, {table}"), &values, &expected.bodies());
    let keys: Vec<_> = records.iter().map(|r| r.key.clone().unwrap_or_default()).collect();
    let expected: Vec<_> = expected.events.iter().map(|(key, _)| key.clone()).collect();
    assert_same(&format!("record keys, {table}"), &keys, &expected);
}

/// Batches are named after ranges that do not overlap.
fn assert_batches_in_order(pipeline: &Pipeline) {
    let bounds: Vec<String> = archive::batches(&pipeline.archive())
        .iter()
        .flat_map(|name| name.split('-').map(str::to_owned).collect::<Vec<_>>())
        .collect();
    assert!(bounds.is_sorted(), "{bounds:?}");
}
