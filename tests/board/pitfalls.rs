//! What public solutions of this task get wrong on the board, each by its name.

use falaj::consume::batch::bucket_of;
use falaj::consume::redis::Store;
use serde_json::json;

use super::model::now;
use super::*;

const MICROS: i64 = 1_000_000;

/// Committed `commit` seconds ago, happened `event` seconds ago.
fn ago(number: u64, commit: i64, event: i64) -> Ev {
    let now = now();
    Ev { commit_ts: now - commit * MICROS, event_ts: now - event * MICROS, ..Ev::now(number) }
}

#[test]
fn the_ranking_is_of_ten_minutes_not_of_all_time() {
    let mut rig = Rig::new("all_time");
    let old = Ev { content: Some("old".into()), millis: Some(9_000_000), ..ago(1, 640, 650) };
    let new = Ev { content: Some("new".into()), millis: Some(1), ..ago(2, 0, 0) };
    rig.write(&[old, new]);
    rig.consume_until_end();
    rig.assert_board();
    assert_eq!(rig.board()["top"].as_array().unwrap().len(), 1);
    assert_eq!(rig.board()["top"][0]["content_id"], "new");
}

#[test]
fn a_window_is_not_refreshed_by_the_events_that_it_holds() {
    let mut rig = Rig::new("ttl");
    let mut redis = redis::Client::open(rig.config.redis.url.as_str()).unwrap().get_connection().unwrap();
    let mut expiries = |rig: &Rig, bucket: i64| -> Vec<(String, i64)> {
        let keys: Vec<String> = redis.keys(format!("{}:*:{bucket}:*", rig.key())).unwrap();
        let mut all: Vec<_> = keys
            .into_iter()
            .map(|k| (k.clone(), redis::cmd("EXPIRETIME").arg(&k).query(&mut redis).unwrap()))
            .collect();
        all.sort();
        all
    };
    let event = ago(1, 0, 300);
    let bucket = bucket_of(event.event_ts);
    rig.write(std::slice::from_ref(&event));
    rig.consume_until_end();
    let before = expiries(&rig, bucket);
    assert_eq!(before.len(), 5, "{before:?}");
    assert!(before.iter().all(|(_, at)| *at == (bucket + 60) * 10 + 120), "{before:?}");
    let again = Ev { event_ts: event.event_ts, user: Some("another".into()), ..Ev::now(2) };
    rig.write(&[again, Ev::now(3)]);
    rig.consume_until_end();
    assert_eq!(expiries(&rig, bucket), before);
    rig.assert_board();
}

#[test]
fn the_window_slides_by_ten_seconds_and_is_not_aligned_to_the_clock() {
    let mut rig = Rig::new("slides");
    let event = Ev::now(1);
    let bucket = bucket_of(event.event_ts);
    rig.write(&[event]);
    rig.consume_until_end();
    let (store, runtime) = (Store::new(&rig.config).unwrap(), tokio::runtime::Runtime::new().unwrap());
    let events_at = |last: i64| {
        let (contents, ..) = runtime.block_on(store.read(last - 59, last, 10)).unwrap();
        contents.first().map_or(0, |row| row.2)
    };
    // It is there from its own bucket on, through every full hour, ten minutes long.
    let seen: Vec<i64> = (bucket - 61..bucket + 70).filter(|last| events_at(*last) == 1).collect();
    assert_eq!(seen, (bucket..bucket + 60).collect::<Vec<_>>());
}

#[test]
fn null_and_negative_durations_count_and_900_ms_are_0_9_s() {
    let mut rig = Rig::new("durations");
    let event = |n, content: &str, millis| Ev { content: Some(content.into()), millis, ..Ev::now(n) };
    rig.write(&[
        event(1, "nine", Some(900)),
        event(2, "null", None),
        event(3, "null", None),
        event(4, "minus", Some(-1500)),
        event(5, "zero", Some(0)),
        Ev { content: None, ..Ev::now(6) },
    ]);
    rig.consume_until_end();
    rig.assert_board();
    let board = rig.board();
    let rows: Vec<_> = board["top"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (row["content_id"].as_str().unwrap(), row["engagement_seconds"].clone(), row["events"].clone()))
        .collect();
    let expected =
        [("nine", json!(0.9), 1), ("null", json!(0.0), 2), ("zero", json!(0.0), 1), ("minus", json!(-1.5), 1)];
    assert_eq!(rows, expected.map(|(id, seconds, events)| (id, seconds, json!(events))));
    assert_eq!(board["devices"][0]["events"], 6, "NULL content counts for devices");
}

#[test]
fn devices_that_look_alike_stay_apart_and_null_comes_last() {
    let mut rig = Rig::new("devices");
    let event = |n, device: Option<&str>| Ev { device: device.map(Into::into), ..Ev::now(n) };
    rig.write(&[event(1, None), event(2, Some("web\u{2011}safari")), event(3, Some("web-safari")), event(4, Some(""))]);
    rig.consume_until_end();
    rig.assert_board();
    let board = rig.board();
    let names: Vec<_> = board["devices"].as_array().unwrap().iter().map(|d| d["device"].clone()).collect();
    assert_eq!(names, [json!(""), json!("web-safari"), json!("web\u{2011}safari"), json!(null)]);
}

#[test]
fn late_and_future_events_are_counted_and_left_out_and_the_rest_goes_to_its_own_bucket() {
    let mut rig = Rig::new("late");
    rig.write(&[ago(1, 0, 601), ago(2, 0, 86_400), ago(3, 0, -61), ago(4, 0, 400), ago(5, 30, -20)]);
    rig.consume_until_end();
    rig.assert_board();
    let board = rig.board();
    assert_eq!((&board["late_dropped"], &board["future_dropped"]), (&json!(2), &json!(1)));
}

#[test]
fn history_is_not_replayed_into_the_live_board() {
    let mut rig = Rig::new("history");
    let (history, update) = (Ev { op: "r", ..Ev::now(1) }, Ev { op: "u", ..Ev::now(2) });
    rig.write(&[history, update, Ev::now(3)]);
    rig.consume_until_end();
    rig.assert_board();
    assert_eq!(rig.board()["top"][0]["events"], 1);
}

#[test]
fn one_foreign_record_is_named_and_does_not_stop_the_board() {
    let mut rig = Rig::new("foreign");
    rig.write_values(&["not json"]);
    rig.write(&[Ev::now(1)]);
    let out = rig.command(&["consume", "--sinks", "redis", "--until-end"]).output().unwrap();
    assert_eq!(out.status.code(), Some(0));
    let log = stderr(&out);
    assert_eq!(log.lines().filter(|l| l.contains("no engagement event") && l.contains("offset")).count(), 1, "{log}");
    rig.assert_board();
}

#[test]
fn columns_that_are_gone_count_as_null() {
    let mut rig = Rig::new("columns");
    let events = [
        (Ev { device: None, ..Ev::now(1) }, vec!["device"]),
        (Ev { title: None, content: Some("b".into()), ..Ev::now(2) }, vec!["title", "length_seconds"]),
        (Ev { user: None, millis: None, ..Ev::now(3) }, vec!["user_id", "engagement_seconds"]),
        (Ev { content: None, ..Ev::now(4) }, vec!["content_id", "event_type", "duration_ms"]),
    ];
    let values: Vec<String> = events.iter().map(|(event, columns)| without(event, columns)).collect();
    rig.write_values(&values.iter().map(String::as_str).collect::<Vec<_>>());
    rig.written.extend(events.map(|(event, _)| event));
    rig.consume_until_end();
    rig.assert_board();
    assert_eq!(rig.board()["devices"].as_array().unwrap().len(), 2);
}

/// The event of a table, or of a lookup, that does not have these columns.
fn without(event: &Ev, columns: &[&str]) -> String {
    let mut fields: serde_json::Map<String, Value> = serde_json::from_str(&event.json()).unwrap();
    columns.iter().for_each(|column| assert!(fields.remove(*column).is_some(), "{column}"));
    Value::Object(fields).to_string()
}
