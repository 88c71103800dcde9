//! What public solutions of this task get wrong; each is a test with its name, here or where this list says.
//!
//! | pitfall | test |
//! |---|---|
//! | rows that commit late, carry an old time or tie are never read | [`rows_that_commit_late_lie_back_or_tie_are_all_read`] |
//! | an INNER JOIN drops events without content | [`events_without_content_are_kept`] |
//! | the cursor is saved before the data | `crash::sigkill_of_produce_at_random_moments` |
//! | a second batch in the same second overwrites the first | [`batches_of_the_same_second_are_all_kept`] |
//! | a torn file is uploaded | [`a_batch_in_the_making_is_not_in_the_archive`], `upload::a_torn_file_is_named_and_other_tables_go_on` |
//! | a crash between load and delete loads twice | `upload::faults::a_kill_after_the_job_is_sent_doubles_nothing` |
//! | the ranking is by recency or of all time | `board::pitfalls::the_ranking_is_of_ten_minutes_not_of_all_time` |
//! | every event refreshes the window's expiry | `board::pitfalls::a_window_is_not_refreshed_by_the_events_that_it_holds` |
//! | a clock-aligned window is empty at hh:10 | `board::pitfalls::the_window_slides_by_ten_seconds_and_is_not_aligned_to_the_clock` |
//! | NULL durations crash or vanish; 900 ms become 0 s | `board::pitfalls::null_and_negative_durations_count_and_900_ms_are_0_9_s`, `produce::an_event_sees_earlier_changes_of_its_own_transaction_and_no_later_ones` |
//! | HTTP retries stand in Redis's way | [`an_outside_system_that_refuses_everything_does_not_delay_the_board`] |
//! | 200 with an error body is taken as success | `external::a_200_with_an_error_body_is_tried_again_then_a_dead_letter` |
//! | 429 is fatal | `external::retry_after_holds_back_its_own_key_only` |
//! | a whole poll batch is committed after one success | `external::a_poll_batch_is_not_committed_after_one_success` |
//! | what was seen is remembered without bound | [`what_is_remembered_of_the_past_is_one_offset_a_partition`] |
//! | history is replayed into the live board | `board::pitfalls::history_is_not_replayed_into_the_live_board` |
//! | a latency test passes on any leftover key | [`the_latency_is_that_of_one_event_that_was_not_there_before`] |

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use falaj::mock_external::{Fault, Faults};
use redis::Commands;
use serde_json::Value;

use crate::rig::peer::Peer;
use crate::rig::{Pipeline, archive, assert_same, connect, until};

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_commit_late_lie_back_or_tie_are_all_read() {
    let p = Pipeline::new("late").await;
    let produce = p.start(&["produce"]);
    let late = connect(&p.config.postgres.url).await;
    late.batch_execute("BEGIN; INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 10)")
        .await
        .unwrap();
    p.run("INSERT INTO engagement_events (event_ts) SELECT '2024-01-01 00:00:00Z' FROM generate_series(1, 10)").await;
    until("the second has been read", async || p.records("engagement_events").await.len() == 10).await;
    late.batch_execute("COMMIT").await.unwrap();
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() - interval '3 days' FROM generate_series(1, 10)")
        .await;
    until("all have been read", async || p.records("engagement_events").await.len() == 30).await;
    produce.drains().await;
    let ids: Vec<i64> = p.rows("engagement_events").iter().map(|e| field(e, "id").as_i64().unwrap()).collect();
    assert_eq!(ids, (11..=20).chain(1..=10).chain(21..=30).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn events_without_content_are_kept() {
    let p = Pipeline::new("nocontent").await;
    p.run("ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey").await;
    p.run("INSERT INTO engagement_events (event_ts, content_id, duration_ms) VALUES (now(), NULL, 1500), (now(), gen_random_uuid(), NULL)").await;
    p.produce().await;
    let values = p.values("engagement_events").await;
    for event in &values {
        for name in ["title", "content_type", "length_seconds", "engagement_pct"] {
            assert_eq!(field(event, name), Value::Null);
        }
    }
    assert_eq!((values.len(), field(&values[0], "engagement_seconds")), (2, serde_json::json!(1.5)));
    assert_same("archive", &p.rows("engagement_events"), &values);
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_of_the_same_second_are_all_kept() {
    let mut p = Pipeline::new("second").await;
    p.set("FALAJ_ARCHIVE__SEAL_AFTER", "1ms");
    let produce = p.start(&["produce"]);
    p.streams("").await;
    let began = Instant::now();
    for n in 1..=60 {
        p.run("INSERT INTO engagement_events (event_ts) VALUES (now())").await;
        until("it is sealed", async || archive::batches(&p.archive()).len() == n).await;
    }
    // Sixty batches in less than sixty seconds: some share one.
    assert!(began.elapsed() < Duration::from_secs(59));
    produce.drains().await;
    assert_same("archive", &p.rows("engagement_events"), &p.values("engagement_events").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_in_the_making_is_not_in_the_archive() {
    let p = Pipeline::new("torn").await;
    let produce = p.start(&["produce"]);
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 20000)").await;
    let work = || {
        let entries = std::fs::read_dir(p.archive()).into_iter().flatten().map(|entry| entry.unwrap().path());
        let works = entries.filter(|path| path.to_string_lossy().contains("/.work-"));
        works.flat_map(std::fs::read_dir).flatten().map(|entry| entry.unwrap().path()).find(|path| path.is_dir())
    };
    until("a batch is being written", async || work().is_some()).await;
    produce.kill();
    assert_eq!((work().is_some(), archive::batches(&p.archive())), (true, vec![]));
    let out = p.start(&["upload", "--once"]).ends_well().await;
    assert!(out.contains("0 load jobs, 0 rows"), "{out}");
    p.produce().await;
    assert_eq!((work(), p.rows("engagement_events").len()), (None, 20_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outside_system_that_refuses_everything_does_not_delay_the_board() {
    let mut p = Pipeline::new("refuses").await;
    let peer = Peer::start(&mut p, Faults::default()).await;
    peer.mock.faults().everything(Some(Fault::status(503)));
    let consume = p.start(&["consume"]);
    p.run("INSERT INTO engagement_events (event_ts, device) SELECT now(), 'ios' FROM generate_series(1, 500)").await;
    p.produce().await;
    until("it has been tried", async || peer.mock.received().counts().requests > 50).await;
    until("the board has all", async || board(&p).await["devices"][0]["events"] == 500).await;
    assert_eq!(peer.mock.received().counts().unique, 0);
    peer.mock.faults().everything(None);
    until("the outside has all", async || peer.mock.received().counts().unique == 500).await;
    consume.drains().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_remembered_of_the_past_is_one_offset_a_partition() {
    let p = Pipeline::new("bounded").await;
    let mut redis = redis::Client::open(p.config.redis.url.as_str()).unwrap().get_connection().unwrap();
    let mut remembered = Vec::new();
    for rows in [300, 3000] {
        p.run(&format!("INSERT INTO content SELECT gen_random_uuid(), '{rows}' || g, 't', NULL, NULL, now() FROM generate_series(1, 50) AS g")).await;
        p.run(&format!("INSERT INTO engagement_events (content_id, event_ts) SELECT id, now() - interval '1 hour' FROM content, generate_series(1, {rows}) LIMIT {rows}")).await;
        p.produce().await;
        p.start(&["consume", "--until-end", "--sinks", "redis"]).ends_well().await;
        let fields: BTreeSet<String> = redis.hkeys(format!("{{falaj:{}}}", p.name)).unwrap();
        remembered.push(fields);
    }
    assert_eq!(remembered[0], remembered[1]);
    assert_eq!(remembered[1].iter().filter(|f| f.starts_with("offset:")).count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_latency_is_that_of_one_event_that_was_not_there_before() {
    let p = Pipeline::new("latency").await;
    let (produce, consume) = (p.start(&["produce"]), p.start(&["consume", "--sinks", "redis"]));
    p.streams("").await;
    // The first one waits for both to be up.
    for n in 0..6 {
        let content = p.text("gen_random_uuid()").await;
        let shown = async || {
            let board = board(&p).await;
            board["top"]
                .as_array()
                .unwrap()
                .iter()
                .any(|c| c["content_id"] == content.as_str() && c["engagement_seconds"] == 7.0)
        };
        assert!(!shown().await);
        p.run(&format!("BEGIN; INSERT INTO content VALUES ('{content}', '{content}', 't', NULL, NULL, now()); \
             INSERT INTO engagement_events (content_id, event_ts, duration_ms) VALUES ('{content}', now(), 7000); COMMIT")).await;
        let committed = Instant::now();
        until("the board shows it", shown).await;
        assert!(n == 0 || committed.elapsed() < Duration::from_secs(5), "{:?}", committed.elapsed());
    }
    for process in [produce, consume] {
        process.drains().await;
    }
}

async fn board(p: &Pipeline) -> Value {
    serde_json::from_str(&p.start(&["board", "--json"]).ends_well().await).unwrap()
}

fn field(event: &str, name: &str) -> Value {
    let event: Value = serde_json::from_str(event).unwrap();
    event[name].clone()
}
