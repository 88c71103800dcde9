//! The sinks of produce against the oracle.

use std::collections::BTreeMap;

use falaj::lsn::Lsn;
use serde_json::Value;
use serde_json::value::RawValue;

use super::oracle::{Expected, expected};
use super::peer::Peer;
use super::{Pipeline, archive, assert_same, bigquery, id};

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

/// `falaj board` shows what SQL computes over the same moment. Unique users are estimated there: within 2 %, or 3.
pub async fn board(pipeline: &Pipeline, lsn: Lsn) {
    expected(pipeline, "engagement_events", lsn).await;
    let out = pipeline.start(&["board", "--json", "--top", "100000"]).ends_well().await;
    let mut found: Value = serde_json::from_str(&out).unwrap();
    let as_of = found.as_object_mut().unwrap().remove("as_of").unwrap();
    let sql = format!("oracle_board('{}')", as_of.as_str().unwrap());
    let mut expected: Value = serde_json::from_str(&pipeline.text(&sql).await).unwrap();
    let users = |board: &mut Value| -> Vec<f64> {
        let top = board["top"].as_array_mut().unwrap();
        top.iter_mut().map(|c| c["users"].take().as_f64().unwrap()).collect()
    };
    let (estimated, exact) = (users(&mut found), users(&mut expected));
    assert!(!exact.is_empty() && found["devices"].as_array().unwrap().len() > 2, "{found}");
    let parts = ["window_seconds", "late_dropped", "future_dropped", "devices"];
    for part in parts {
        assert_eq!(found[part], expected[part], "{part}");
    }
    let lines = |board: &Value| board["top"].as_array().unwrap().iter().map(Value::to_string).collect::<Vec<_>>();
    assert_same("board", &lines(&found), &lines(&expected));
    for (estimated, exact) in estimated.iter().zip(exact) {
        assert!((estimated - exact).abs() <= (exact * 0.02).max(3.0), "{estimated} users, not {exact}");
    }
}

/// BigQuery holds every expected event once, with every value, and its view the rows that the source has now.
pub async fn bigquery(pipeline: &Pipeline, lsn: Lsn) {
    let columns = "_id, _op, CAST(id AS STRING), content_id, user_id, event_type, CAST(UNIX_MICROS(event_ts) AS STRING), \
                   CAST(duration_ms AS STRING), device, raw_payload, title, content_type, CAST(length_seconds AS STRING), \
                   CAST(CAST(engagement_seconds * 1000 AS INT64) AS STRING), CAST(CAST(engagement_pct * 100 AS INT64) AS STRING), \
                   CAST(UNIX_MICROS(_commit_ts) AS STRING)";
    let rows = bigquery::rows(pipeline, columns, "engagement_events", "_id").await;
    let expected = expected(pipeline, "engagement_events", lsn).await.bodies();
    let expected: Vec<_> = expected.iter().map(|body| cells(body)).collect();
    assert_same("BigQuery", &lines(rows), &expected);

    let latest = "CAST(id AS STRING), content_id, CAST(duration_ms AS STRING), device, event_type";
    let latest = bigquery::rows(pipeline, latest, "engagement_events_latest", "id").await;
    let source = "SELECT id::text, content_id::text, duration_ms::text, device, event_type FROM engagement_events AS e ORDER BY e.id";
    let source = pipeline.sql.query(source, &[]).await.unwrap();
    let source = source.iter().map(|row| (0..5).map(|i| row.get(i)).collect()).collect();
    assert_same("BigQuery, latest", &lines(latest), &lines(source));
}

fn lines(rows: Vec<bigquery::Row>) -> Vec<String> {
    let cell = |cell: Option<String>| cell.unwrap_or_else(|| "NULL".into());
    rows.into_iter().map(|row| row.into_iter().map(cell).collect::<Vec<_>>().join("|")).collect()
}

/// An event as the query of [`bigquery`] shows it.
fn cells(body: &str) -> String {
    let fields: BTreeMap<&str, &RawValue> = serde_json::from_str(body).unwrap();
    let micros = |text: String| text.parse::<jiff::Timestamp>().unwrap().as_microsecond().to_string();
    let cell = |name: &str| -> Option<String> {
        let raw = fields[name].get();
        let text = || serde_json::from_str::<String>(raw).unwrap();
        Some(match (name, raw) {
            (_, "null") => return None,
            ("event_ts" | "_commit_ts", _) => micros(text()),
            ("raw_payload", _) => raw.to_owned(),
            // The decimal point is where the scale says: without it they are whole numbers.
            ("engagement_seconds" | "engagement_pct", _) => raw.replace('.', "").parse::<i64>().unwrap().to_string(),
            _ if raw.starts_with('"') => text(),
            _ => raw.to_owned(),
        })
    };
    let names = [
        "_id",
        "_op",
        "id",
        "content_id",
        "user_id",
        "event_type",
        "event_ts",
        "duration_ms",
        "device",
        "raw_payload",
        "title",
        "content_type",
        "length_seconds",
        "engagement_seconds",
        "engagement_pct",
        "_commit_ts",
    ];
    lines(vec![names.map(cell).into()]).remove(0)
}

/// The outside system has every event once, and never two bodies under one key.
pub async fn outside(pipeline: &Pipeline, peer: &Peer, lsn: Lsn) {
    let mut ids = peer.mock.received().ids();
    ids.sort();
    let expected = expected(pipeline, "engagement_events", lsn).await.bodies();
    let expected: Vec<_> = expected.iter().map(|body| id(body).to_owned()).collect();
    assert_same("outside", &ids, &expected);
    assert_eq!(peer.mock.received().counts().conflicts, 0);
}

/// Batches are named after ranges that do not overlap.
fn assert_batches_in_order(pipeline: &Pipeline) {
    let bounds: Vec<String> = archive::batches(&pipeline.archive())
        .iter()
        .flat_map(|name| name.split('-').map(str::to_owned).collect::<Vec<_>>())
        .collect();
    assert!(bounds.is_sorted(), "{bounds:?}");
}
