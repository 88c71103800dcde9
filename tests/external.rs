//! The outside path against a real Kafka: nothing lost, nothing under two keys, order per key, whatever the peer does.

pub mod stage;

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use falaj::mock_external::{Counts, Fault, Faults};
use serde_json::json;
use stage::{Stage, event, id, until};

use crate::rig::kafka;
use crate::rig::stack::Stack;

/// The stored events of one key, in the order of their storing.
fn of_key(ids: &[String], key: u64, keys: u64, count: u64) -> Vec<String> {
    let wanted: BTreeSet<String> = (0..count).filter(|n| n % keys == key).map(id).collect();
    ids.iter().filter(|i| wanted.contains(*i)).cloned().collect()
}

fn assert_all_in_order(stage: &Stage, keys: u64, count: u64) {
    let ids = stage.peer.mock.received().ids();
    assert_eq!(ids.iter().cloned().collect::<BTreeSet<_>>(), (0..count).map(id).collect());
    for key in 0..keys {
        let expected: Vec<String> = (0..count).filter(|n| n % keys == key).map(id).collect();
        assert_eq!(of_key(&ids, key, keys, count), expected);
    }
    let Counts { unique, conflicts, .. } = stage.peer.mock.received().counts();
    assert_eq!((unique, conflicts), (count, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn all_events_arrive_in_order_per_key_through_a_peer_that_fails() {
    let stage = Stage::new("faults", 3, Faults::random(0.3, 42)).await;
    stage.send_events(0..1000, 40, 3).await;
    stage.send((5000..5100).map(|n| (0, None, event(n, "c"))).collect(), false).await;
    stage.send_events(1000..2000, 40, 3).await;
    stage.consume(&["--until-end"]).ends_well().await;
    assert_all_in_order(&stage, 40, 2000);
    assert_eq!(stage.committed(3).await, stage.ends(3).await);
    // Five answers of "error" in a row are the one thing in the mix that could have made a dead letter.
    assert_eq!(stage.dead_letters().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_op_goes_out_and_history_only_when_asked_for() {
    let mut stage = Stage::new("ops", 1, Faults::default()).await;
    let ops = ["c", "u", "d", "t", "r"];
    stage.send((0..5).map(|n| (0, None, event(n, ops[n as usize]))).collect(), true).await;
    stage.consume(&["--until-end"]).ends_well().await;
    assert_eq!(stage.peer.mock.received().ids(), [0, 1, 2, 3].map(id));
    assert_eq!(stage.committed(1).await, stage.ends(1).await);

    stage.set("FALAJ_EXTERNAL__HISTORY", "true");
    stage.send(vec![(0, None, event(5, "r"))], true).await;
    stage.consume(&["--until-end"]).ends_well().await;
    assert_eq!(stage.peer.mock.received().ids(), [0, 1, 2, 3, 5].map(id));
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_holds_back_its_own_key_only() {
    let stage = Stage::new("later", 1, Faults::default()).await;
    let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(8));
    stage.peer.mock.faults().script(id(0), [Fault::retry_after(429, "2")]);
    stage.peer.mock.faults().script(id(1), [Fault::retry_after(503, date)]);
    stage.send_events(0..60, 6, 1).await;
    let began = Instant::now();
    stage.consume(&["--until-end"]).ends_well().await;
    assert!(began.elapsed() >= Duration::from_secs(2));
    assert_all_in_order(&stage, 6, 60);
    let ids = stage.peer.mock.received().ids();
    let others: BTreeSet<String> = (0..60).filter(|n| n % 6 > 1).map(id).collect();
    assert_eq!(ids[..40].iter().cloned().collect::<BTreeSet<_>>(), others);
    assert_eq!((&ids[40], &ids[50]), (&id(0), &id(1)));
    assert_eq!(stage.peer.mock.received().counts().requests, 62);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_200_with_an_error_body_is_tried_again_then_a_dead_letter() {
    let mut stage = Stage::new("errors", 1, Faults::default()).await;
    stage.set("FALAJ_EXTERNAL__ERROR_PATIENCE", "0s");
    stage.peer.mock.faults().script(id(0), vec![Fault::error_body(); 4]);
    stage.peer.mock.faults().script(id(1), vec![Fault::error_body(); 5]);
    stage.send_events(0..3, 3, 1).await;
    stage.consume(&["--until-end"]).ends_well().await;
    let stored: BTreeSet<String> = stage.peer.mock.received().ids().into_iter().collect();
    assert_eq!(stored, BTreeSet::from([id(0), id(2)]));
    assert_eq!(stage.peer.mock.received().counts().requests, 5 + 5 + 1);
    let letters = stage.dead_letters().await;
    let reason = r#"HTTP 200: {"status":"error","message":"simulated"} (5 times)"#;
    assert_eq!((letters.len(), &letters[0].1["_id"], &letters[0].1["reason"]), (1, &json!(id(1)), &json!(reason)));
}

/// A peer that is in trouble may say so in this way.
#[tokio::test(flavor = "multi_thread")]
async fn an_error_body_makes_no_dead_letter_before_the_patience_is_over() {
    let mut stage = Stage::new("patience", 1, Faults::default()).await;
    stage.set("FALAJ_EXTERNAL__ERROR_PATIENCE", "5s");
    // Six tries are over in less than two seconds.
    stage.peer.mock.faults().script(id(0), vec![Fault::error_body(); 6]);
    stage.peer.mock.faults().script(id(1), vec![Fault::error_body(); 10_000]);
    stage.send_events(0..6, 3, 1).await;
    let began = Instant::now();
    stage.consume(&["--until-end"]).ends_well().await;
    assert!(began.elapsed() >= Duration::from_secs(5));
    let stored: BTreeSet<String> = stage.peer.mock.received().ids().into_iter().collect();
    assert_eq!(stored, BTreeSet::from([0, 2, 3, 4, 5].map(id)));
    let letters = stage.dead_letters().await;
    assert_eq!((letters.len(), &letters[0].1["_id"]), (1, &json!(id(1))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_event_becomes_a_dead_letter_with_position_reason_and_body() {
    let stage = Stage::new("refused", 1, Faults::default()).await;
    let refusal = Fault::Answer { status: 400, retry_after: None, body: "no such content\n".into() };
    stage.peer.mock.faults().script(id(1), [refusal]);
    stage.send_events(0..4, 2, 1).await;
    stage.consume(&["--until-end"]).ends_well().await;
    assert_eq!(stage.peer.mock.received().counts(), Counts { unique: 3, requests: 4, duplicates: 0, conflicts: 0 });
    let body: serde_json::Value = serde_json::from_slice(&event(1, "c")).unwrap();
    let letter = json!({
        "_id": id(1), "position": {"commit_lsn": "1/1", "ordinal": 0}, "reason": "HTTP 400: no such content",
        "url": format!("http://{}/events", stage.peer.address), "topic": stage.topic(), "partition": 0, "offset": 1,
        "body": body,
    });
    assert_eq!(stage.dead_letters().await, [(Some("k1".into()), letter)]);
    assert_eq!(stage.committed(1).await, stage.ends(1).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_that_its_topic_would_never_take_is_told_and_stands_there_once_it_does() {
    let topic_says = [("cleanup.policy", "compact", "delete"), ("max.message.bytes", "100", "1000000")];
    for (n, (key, bad, good)) in topic_says.into_iter().enumerate() {
        let stage = Stage::new(&format!("unburied{n}"), 1, Faults::default()).await;
        kafka::configure(&stage.config, &stage.config.dead_letter_topic(), key, bad).await;
        stage.peer.mock.faults().script(id(1), vec![Fault::status(400); 2]);
        stage.send((0..3).map(|n| (0, None, event(n, "t"))).collect(), true).await;
        let (code, log) = stage.consume(&["--until-end"]).end().await;
        assert!(
            code == Some(78) && log.contains("kafka_dead_letter") && log.contains("offset 1"),
            "{key}: {code:?} {log}"
        );
        kafka::configure(&stage.config, &stage.config.dead_letter_topic(), key, good).await;
        stage.consume(&["--until-end"]).ends_well().await;
        let letters = stage.dead_letters().await;
        assert_eq!((letters.len(), &letters[0].1["_id"]), (1, &json!(id(1))), "{key}");
        assert_eq!(stage.committed(1).await, stage.ends(1).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_event_becomes_a_dead_letter_and_blocks_nothing() {
    let stage = Stage::new("malformed", 1, Faults::default()).await;
    let records = vec![(0, Some("k".into()), b"\xff no json".to_vec()), (0, Some("k".into()), event(1, "c"))];
    stage.send(records, true).await;
    stage.consume(&["--until-end"]).ends_well().await;
    assert_eq!(stage.peer.mock.received().ids(), [id(1)]);
    let letters = stage.dead_letters().await;
    assert_eq!((letters.len(), &letters[0].1["body_hex"]), (1, &json!("ff206e6f206a736f6e")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_not_followed_and_loses_nothing() {
    let stage = Stage::new("redirect", 1, Faults::default()).await;
    stage.peer.mock.faults().everything(Some(Fault::status(307)));
    stage.send_events(0..3, 3, 1).await;
    let process = stage.consume(&["--until-end"]);
    until("some requests were redirected", async || stage.peer.mock.received().counts().requests >= 9).await;
    assert_eq!(stage.peer.mock.received().counts().unique, 0);
    stage.peer.mock.faults().everything(None);
    process.ends_well().await;
    assert_all_in_order(&stage, 3, 3);
    assert_eq!(stage.dead_letters().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_at_any_moment_loses_nothing() {
    let stage = Stage::new("sigkill", 3, Faults::random(0.2, 7).with_delay(Duration::from_millis(5))).await;
    stage.send_events(0..3000, 100, 3).await;
    for part in 1..6 {
        let process = stage.consume(&[]);
        stage.peer.has(part * 450).await;
        process.kill();
    }
    stage.consume(&["--until-end"]).ends_well().await;
    assert_all_in_order(&stage, 100, 3000);
    assert_eq!(stage.committed(3).await, stage.ends(3).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_instances_share_the_work_and_one_may_leave() {
    let stage = Stage::new("two", 4, Faults::default().with_delay(Duration::from_millis(20))).await;
    stage.send_events(0..4000, 80, 4).await;
    let first = stage.consume(&["--until-end"]);
    let second = stage.consume(&["--until-end"]);
    let third = stage.consume(&[]);
    stage.peer.has(1500).await;
    third.terminate();
    third.ends_well().await;
    stage.peer.has(2500).await;
    second.kill();
    first.ends_well().await;
    assert_all_in_order(&stage, 80, 4000);
    assert_eq!(stage.committed(4).await, stage.ends(4).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_batch_is_not_committed_after_one_success() {
    let stage = Stage::new("stuck", 1, Faults::default()).await;
    stage.peer.mock.faults().script(id(3), vec![Fault::status(503); 10_000]);
    stage.send_events(0..50, 10, 1).await;
    let process = stage.consume(&[]);
    stage.peer.has(45).await;
    until("offset 3 is committed", async || stage.committed(1).await == [Some(3)]).await;
    process.terminate();
    process.ends_well().await;
    assert_eq!(stage.committed(1).await, [Some(3)]);
    assert_eq!(stage.peer.mock.received().counts().unique, 45);

    stage.peer.mock.faults().forget(&id(3));
    stage.consume(&["--until-end"]).ends_well().await;
    assert_all_in_order(&stage, 10, 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_the_peer_is_waited_for() {
    let mut stage = Stage::new("outage", 2, Faults::default()).await;
    stage.serve_http();
    stage.send_events(0..200, 20, 2).await;
    let process = stage.consume(&[]);
    // Not when the peer has them: an answer may be on its way still, and would be lost with the peer.
    until("the first 200 are committed", async || {
        stage.committed(2).await.into_iter().map(|offset| offset.unwrap_or(0)).sum::<i64>() >= 200
    })
    .await;
    stage.peer.go_away().await;
    stage.send_events(200..400, 20, 2).await;
    until("the others wait", async || stage.metric("falaj_external_waiting_events").await == Some(200.0)).await;
    stage.peer.come_back().await;
    stage.peer.has(400).await;
    process.terminate();
    process.ends_well().await;
    assert_all_in_order(&stage, 20, 400);
    assert_eq!(stage.dead_letters().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_requests_do_not_hold_a_shutdown_back() {
    let stage = Stage::new("hang", 1, Faults::default()).await;
    stage.peer.mock.faults().script(id(0), [Fault::Slow(Duration::from_secs(60))]);
    stage.send_events(0..4, 2, 1).await;
    let process = stage.consume(&[]);
    stage.peer.has(2).await;
    let began = Instant::now();
    process.terminate();
    process.ends_well().await;
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(stage.committed(1).await, [Some(0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_the_window_holds_goes_through_in_order() {
    let mut stage = Stage::new("window", 1, Faults::default().with_delay(Duration::from_millis(10))).await;
    stage.set("FALAJ_EXTERNAL__IN_FLIGHT", "2");
    let filler = "x".repeat(300_000);
    let body = |n: u64| format!(r#"{{"filler":"{filler}","_id":"{}","_op":"c"}}"#, id(n)).into_bytes();
    for part in 0..4 {
        let records = (part * 50..(part + 1) * 50).map(|n| (0, Some(format!("k{}", n % 5)), body(n)));
        stage.send(records.collect(), true).await;
    }
    stage.consume(&["--until-end"]).ends_well().await;
    assert_all_in_order(&stage, 5, 200);
    assert_eq!(stage.peer.mock.received().counts(), Counts { unique: 200, requests: 200, duplicates: 0, conflicts: 0 });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_at_the_start_is_said_with_its_code() {
    let mut stage = Stage::bare("start", Faults::default()).await;
    let (code, log) = stage.consume(&["--until-end"]).end().await;
    assert_eq!((code, log.contains("fix:    falaj init")), (Some(78), true), "{log}");

    stage.set("FALAJ_EXTERNAL__URL", "ftp://127.0.0.1/events");
    let (code, log) = stage.consume(&[]).end().await;
    assert_eq!((code, log.contains("external.url")), (Some(78), true), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_without_tls_behind_https_is_78() {
    let mut stage = Stage::new("tls", 1, Faults::default()).await;
    stage.set("FALAJ_EXTERNAL__URL", &format!("https://{}/events", stage.peer.address));
    stage.send_events(0..1, 1, 1).await;
    let (code, log) = stage.consume(&[]).end().await;
    assert_eq!((code, log.contains("external_tls")), (Some(78), true), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn until_end_ends_also_when_another_instance_has_the_partitions() {
    let stage = Stage::new("other", 1, Faults::default()).await;
    stage.send_events(0..20, 4, 1).await;
    let owner = stage.consume(&[]);
    stage.peer.has(20).await;
    stage.consume(&["--until-end"]).ends_well().await;
    owner.terminate();
    owner.ends_well().await;
    assert_eq!(stage.peer.mock.received().counts(), Counts { unique: 20, requests: 20, duplicates: 0, conflicts: 0 });
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_kafka_deleted_undelivered_are_not_passed_over_in_silence() {
    let stage = Stage::new("expired", 1, Faults::default()).await;
    stage.send_events(0..10, 2, 1).await;
    stage.consume(&["--until-end"]).ends_well().await;
    assert_eq!(stage.committed(1).await, [Some(11)]);
    stage.send_events(10..20, 2, 1).await;
    stage.delete_records_below(15).await;
    let process = stage.consume(&[]);
    stage.peer.has(16).await;
    process.terminate();
    let (code, log) = process.end().await;
    assert_eq!((code, log.contains("deleted records that were not delivered")), (Some(0), true), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_kafka_deleted_while_the_peer_was_away_are_told_too() {
    let mut stage = Stage::new("overtaken", 1, Faults::default()).await;
    stage.serve_http();
    let large = |n| (0, None, [event(n, "c"), vec![b' '; 600_000]].concat());
    stage.send(vec![large(0)], true).await;
    let process = stage.consume(&[]);
    stage.peer.has(1).await;
    until("its answer has come", async || stage.metric("falaj_external_waiting_events").await == Some(0.0)).await;
    stage.peer.go_away().await;
    stage.send((1..50).map(large).collect(), true).await;
    // Offsets 2 to 29 fill what may wait, and the partition is paused there.
    until("28 events wait", async || stage.metric("falaj_external_waiting_events").await == Some(28.0)).await;
    stage.delete_records_below(40).await;
    stage.peer.come_back().await;
    stage.peer.has(1 + 28 + 11).await;
    process.terminate();
    let (code, log) = process.end().await;
    assert!(code == Some(0) && log.contains("deleted records that were not delivered"), "{log}");
    assert!(log.contains("from=30 begin=40"), "{log}");
}

/// A running member commits past the mark of the last transaction: once retention has deleted that too, nothing was lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_mark_that_kafka_deleted_behind_the_last_event_is_no_loss() {
    let mut stage = Stage::new("mark", 1, Faults::default()).await;
    stage.send_events(0..10, 2, 1).await;
    let process = stage.consume(&[]);
    until("the mark is committed", async || stage.committed(1).await == [Some(11)]).await;
    process.terminate();
    process.ends_well().await;
    stage.delete_records_below(11).await;
    stage.serve_http();
    let process = stage.consume(&[]);
    stage.send_events(10..20, 2, 1).await;
    until("all is committed", async || stage.committed(1).await == [Some(22)]).await;
    assert_eq!(stage.metric("falaj_external_expired_records_total").await, None);
    process.terminate();
    let (code, log) = process.end().await;
    assert!(code == Some(0) && !log.contains("deleted records"), "{log}");
    assert_eq!(stage.peer.mock.received().counts(), Counts { unique: 20, requests: 20, duplicates: 0, conflicts: 0 });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_on_a_quiet_topic_is_ready_again_once_kafka_is_back() {
    let stack = Stack::up("quiet", &["kafka"]);
    let mut stage = Stage::on(&stack, "quiet", 1, Faults::default()).await;
    // The broker is missed soon, and for less time than the group takes a member for dead: nothing is read anew.
    stage.set("FALAJ_KAFKA__SOCKET_TIMEOUT_MS", "1000");
    stage.set("FALAJ_KAFKA__SESSION_TIMEOUT_MS", "60000");
    stage.send_events(0..10, 2, 1).await;
    let http = stage.serve_http();
    let process = stage.consume(&[]);
    until("it is ready", async || http.is_ready().await).await;
    until("the topic is quiet", async || stage.committed(1).await == stage.ends(1).await).await;
    stack.signal("kafka", "-STOP");
    until("Kafka is missed", async || http.lacks("kafka_external").await).await;
    stack.signal("kafka", "-CONT");
    until("it is ready again", async || http.is_ready().await).await;
    process.terminate();
    process.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_has_lost_its_partitions_does_not_answer_for_the_outside_system() {
    let mut stage = Stage::new("spare", 1, Faults::default()).await;
    stage.peer.mock.faults().everything(Some(Fault::status(503)));
    stage.send_events(0..20, 20, 1).await;
    let first_http = stage.serve_http();
    let first = stage.consume(&[]);
    until("the first one is refused", async || first_http.lacks("external").await).await;
    // The group takes it for dead.
    first.signal("-STOP");
    let second_http = stage.serve_http();
    let second = stage.consume(&[]);
    until("the second one is refused", async || second_http.lacks("external").await).await;
    first.signal("-CONT");
    until("the first one is ready", async || first_http.is_ready().await).await;
    assert!(second_http.lacks("external").await);
    for process in [first, second] {
        process.terminate();
        process.ends_well().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_at_the_address_for_thirty_seconds_is_69() {
    let stage = Stage::new("nobody", 1, Faults::default()).await;
    stage.peer.go_away().await;
    let (code, log) = stage.consume(&[]).end().await;
    assert_eq!((code, log.contains("the outside system at http://127.0.0.1:")), (Some(69), true), "{log}");
}

/// The old offsets mean nothing in it. What was read of the old one is delivered all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_made_anew_is_delivered_from_its_beginning() {
    let mut stage = Stage::new("anew", 2, Faults::default()).await;
    stage.serve_http();
    stage.send_events(0..10, 4, 2).await;
    let consume = stage.consume(&[]);
    stage.peer.has(10).await;
    stage.peer.go_away().await;
    stage.send_events(10..30, 4, 2).await;
    until("20 events wait", async || stage.metric("falaj_external_waiting_events").await == Some(20.0)).await;
    stage.make_topic_anew(2).await;
    // More than there were: the old offsets are there.
    stage.send_events(30..100, 4, 2).await;
    stage.peer.come_back().await;
    stage.peer.has(100).await;
    assert_eq!(stage.peer.mock.received().ids().into_iter().collect::<BTreeSet<_>>(), (0..100).map(id).collect());
    stage.send_events(100..110, 4, 2).await;
    stage.peer.has(110).await;
    until("all is committed", async || stage.committed(2).await == stage.ends(2).await).await;
    consume.terminate();
    consume.ends_well().await;
}
