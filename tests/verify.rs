//! `falaj verify` on real servers: equal while a writer runs, and whatever is broken by hand in a sink is named.

mod by_hand;

use rdkafka::producer::Producer;
use serde_json::Value;

use crate::rig::{DEADLINE, Pipeline, Servers, archive, bigquery, connect, id, kafka, load};

/// The content of [`twenty`], as the board names it.
const CONTENT: &str = "content 0cc175b9-c0f1-b6a8-31c3-99e269772661";

/// Runs the verb; gives its exit code and what it found.
async fn verify(p: &Pipeline, flags: &[&str]) -> (Option<i32>, Value) {
    let ended = p.start(&[&["verify", "--json"], flags].concat()).end().await;
    let report = serde_json::from_str(&ended.out).unwrap_or_else(|e| panic!("{e}: {ended:?}"));
    (ended.code, report)
}

/// A table in a sink.
fn table<'a>(report: &'a Value, sink: &str, table: &str) -> &'a Value {
    let sinks = report["sinks"].as_array().unwrap();
    let sink = sinks.iter().find(|s| s["sink"] == sink).unwrap_or_else(|| panic!("no {sink} in {report}"));
    sink["tables"].as_array().unwrap().iter().find(|t| t["table"] == table).unwrap()
}

/// The rows that are named, each in a line.
fn named(report: &Value, sink: &str, name: &str) -> Vec<String> {
    let line = |row: &Value| {
        let columns: Vec<_> = row["columns"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let id = row["_id"].as_str().unwrap_or("-");
        format!("{} {} {id} {}", row["what"].as_str().unwrap(), row["key"].as_str().unwrap(), columns.join(","))
    };
    table(report, sink, name)["rows"].as_array().unwrap().iter().map(line).collect()
}

/// Tables of all sinks that differ.
fn differing(report: &Value) -> Vec<String> {
    let sinks = report["sinks"].as_array().unwrap().iter();
    let tables = sinks.flat_map(|s| s["tables"].as_array().unwrap().iter().map(move |t| (s, t)));
    let differ = tables.filter(|(_, t)| t["equal"] == false);
    differ.map(|(s, t)| format!("{} {}", s["sink"].as_str().unwrap(), t["table"].as_str().unwrap())).collect()
}

/// Twenty events, all in every sink.
async fn twenty(name: &str) -> Pipeline {
    let p = Pipeline::new(name).await;
    p.run("INSERT INTO content VALUES (md5('a')::uuid, 'a', 'عنوان', 'podcast', 60, now())").await;
    p.run(
        "INSERT INTO engagement_events (content_id, event_ts, duration_ms, device, raw_payload) \
         SELECT md5('a')::uuid, now(), g, 'web‑safari', '{\"a\": 1.10}' FROM generate_series(1, 20) AS g",
    )
    .await;
    p.produce().await;
    p.start(&["upload", "--once"]).ends_well().await;
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, &report["equal"], differing(&report)), (Some(0), &Value::Bool(true), vec![]), "{report}");
    for sink in ["kafka", "archive", "bigquery"] {
        let found = table(&report, sink, "engagement_events");
        assert_eq!((&found["source"], &found["source"]["rows"]), (&found["sink"], &Value::from(20)), "{report}");
        assert_eq!(found["changed_since"], 0, "{report}");
    }
    p
}

/// The `_id` of the event of a row.
async fn event(p: &Pipeline, row: usize) -> String {
    let values = p.values("engagement_events").await;
    let of = |value: &&String| value.starts_with(&format!("{{\"id\":{row},"));
    id(values.iter().find(of).unwrap()).to_owned()
}

/// What has to be named when row 5 was removed, 7 doubled and 9 changed.
async fn broken(p: &Pipeline) -> Vec<String> {
    vec![
        "missing 5 - ".to_owned(),
        format!("different 9 {} duration_ms", event(p, 9).await),
        format!("doubled 7 {} ", event(p, 7).await),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn events_behind_an_open_transaction_are_waited_for() {
    let p = Pipeline::new("verify_open").await;
    let topic = p.config.topic("engagement_events");
    let open = kafka::open_transaction(&p.config, &topic, p.config.kafka.partitions).await;
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 20)").await;
    p.produce().await;
    let mut verify = p.start(&["verify", "--json"]);
    verify.says("waiting for open transactions").await;
    tokio::task::spawn_blocking(move || open.abort_transaction(DEADLINE).unwrap()).await.unwrap();
    let report: Value = serde_json::from_str(&verify.ends_well().await).unwrap();
    let found = table(&report, "kafka", "engagement_events");
    assert_eq!((&found["source"], &found["sink"]["rows"]), (&found["sink"], &Value::from(20)), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_does_not_wait_for_an_open_transaction() {
    let p = Pipeline::new("verify_stopped").await;
    let open =
        kafka::open_transaction(&p.config, &p.config.topic("engagement_events"), p.config.kafka.partitions).await;
    let mut verify = p.start(&["verify"]);
    verify.says("waiting for open transactions").await;
    verify.signal("-TERM");
    let ended = verify.end().await;
    assert_eq!((ended.code, ended.log.contains("shut down before everything was")), (Some(1), true), "{}", ended.log);
    assert!(!ended.log.contains("not drained within"), "{}", ended.log);
    tokio::task::spawn_blocking(move || open.abort_transaction(DEADLINE).unwrap()).await.unwrap();
}

/// With little memory the table is compared in several ranges of keys; what is found is the same.
async fn the_same_by_ranges(p: &Pipeline, sink: &str, whole: &Value) {
    let (code, report) = verify(p, &["--memory", "4KiB"]).await;
    let (found, expected) = (table(&report, sink, "engagement_events"), table(whole, sink, "engagement_events"));
    assert!(found["passes"].as_u64().unwrap() > 2, "{report}");
    assert_eq!((code, &expected["passes"]), (Some(1), &1.into()));
    for what in ["source", "sink", "ranges", "missing", "extra", "different", "doubled"] {
        assert_eq!(found[what], expected[what], "{what}");
    }
    let [mut found, mut expected] = [&report, whole].map(|report| named(report, sink, "engagement_events"));
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_a_doubled_and_a_changed_row_of_the_archive_are_named() {
    let p = twenty("verify_archive").await;
    by_hand::break_archive(&p.archive(), "engagement_events");
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, differing(&report)), (Some(1), vec!["archive engagement_events".to_owned()]), "{report}");
    assert_eq!(named(&report, "archive", "engagement_events"), broken(&p).await);
    the_same_by_ranges(&p, "archive", &report).await;
    let found = table(&report, "archive", "engagement_events");
    assert_eq!((&found["source"]["rows"], &found["sink"]["rows"]), (&20.into(), &19.into()), "{report}");
    assert_eq!((found["missing"].clone(), found["doubled"].clone()), (1.into(), 1.into()));
    // The text says the same.
    let ended = p.start(&["verify"]).end().await;
    assert_eq!(ended.code, Some(1));
    assert!(ended.out.contains("archive    engagement_events: DIFFERENT up to"), "{}", ended.out);
    assert!(ended.out.contains("missing    key 5\n"), "{}", ended.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_a_doubled_and_a_changed_row_of_kafka_are_named() {
    let mut p = twenty("verify_kafka").await;
    let expected = broken(&p).await;
    let (events, contents) = (p.records("engagement_events").await, p.records("content").await);
    p.set("FALAJ_KAFKA__TOPIC", "copy.{pipeline}.{table}");
    for (name, records) in [("engagement_events", events), ("content", contents)] {
        let topic = p.config.topic(name);
        falaj::kafka::create_topic(&p.config.kafka, &topic, 3, &[]).await.unwrap();
        for record in records {
            let is = |row: usize| name == "engagement_events" && record.value.starts_with(&format!("{{\"id\":{row},"));
            let value = match is(9) {
                true => record.value.replace("\"duration_ms\":9,", "\"duration_ms\":90,"),
                false => record.value.clone(),
            };
            for _ in 0..if is(5) { 0 } else { 1 + usize::from(is(7)) } {
                kafka::write(&p.config, &topic, record.key.as_deref().unwrap(), &value).await;
            }
        }
    }
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, differing(&report)), (Some(1), vec!["kafka engagement_events".to_owned()]), "{report}");
    assert_eq!(named(&report, "kafka", "engagement_events"), expected);
    the_same_by_ranges(&p, "kafka", &report).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_a_doubled_and_a_changed_row_of_bigquery_are_named() {
    let p = twenty("verify_bq").await;
    let name = format!("`{}.engagement_events`", p.name);
    for sql in [
        format!("DELETE FROM {name} WHERE id = 5"),
        format!("INSERT INTO {name} SELECT * FROM {name} WHERE id = 7"),
        format!("UPDATE {name} SET duration_ms = 90 WHERE id = 9"),
    ] {
        bigquery::query(&p, &sql).await;
    }
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, differing(&report)), (Some(1), vec!["bigquery engagement_events".to_owned()]), "{report}");
    assert_eq!(named(&report, "bigquery", "engagement_events"), broken(&p).await);
    the_same_by_ranges(&p, "bigquery", &report).await;
    // The last row of a table is missed too.
    bigquery::query(&p, &format!("DELETE FROM {name} WHERE id = 20")).await;
    let (_, report) = verify(&p, &[]).await;
    let found = named(&report, "bigquery", "engagement_events");
    assert!(found.contains(&"missing 20 - ".to_owned()), "{found:?}");
}

/// A table that the stream has brought nothing of.
#[tokio::test(flavor = "multi_thread")]
async fn a_removed_and_a_doubled_row_of_history_alone_are_named() {
    let p = Pipeline::bare(Servers::shared(), "verify_history").await;
    p.run(include_str!("../sql/01_tables.sql")).await;
    p.run("INSERT INTO engagement_events (event_ts, duration_ms) SELECT now(), g FROM generate_series(1, 5) AS g")
        .await;
    p.start(&["init", "--yes", "--snapshot"]).ends_well().await;
    p.produce().await;
    p.start(&["upload", "--once"]).ends_well().await;
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, differing(&report)), (Some(0), vec![]), "{report}");
    let found = table(&report, "bigquery", "engagement_events");
    assert_eq!((&found["source"], &found["source"]["rows"]), (&found["sink"], &Value::from(5)), "{report}");
    let name = format!("`{}.engagement_events`", p.name);
    bigquery::query(&p, &format!("DELETE FROM {name} WHERE id = 3")).await;
    bigquery::query(&p, &format!("INSERT INTO {name} SELECT * FROM {name} WHERE id = 4")).await;
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, differing(&report)), (Some(1), vec!["bigquery engagement_events".to_owned()]), "{report}");
    let expected = ["missing 3 - ".to_owned(), format!("doubled 4 {} ", event(&p, 4).await)];
    assert_eq!(named(&report, "bigquery", "engagement_events"), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_and_status_write_nothing_into_the_archive() {
    let p = Pipeline::new("verify_reads").await;
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 3)").await;
    p.produce().await;
    let there = || {
        let entries = std::fs::read_dir(p.archive()).unwrap().map(|entry| entry.unwrap().file_name());
        entries.collect::<std::collections::BTreeSet<_>>()
    };
    let before = there();
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, &table(&report, "bigquery", "engagement_events")["changed_since"]), (Some(0), &3.into()));
    let status: Value = serde_json::from_str(&p.start(&["status", "--json"]).ends_well().await).unwrap();
    assert_eq!(status["upload"][0]["pending_files"], 1, "{status}");
    assert_eq!(there(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn history_that_waits_for_its_load_is_left_out() {
    let mut p = Pipeline::bare(Servers::shared(), "verify_waits").await;
    p.set("FALAJ_PRODUCE__TRANSACTION_BYTES", "64KiB");
    p.set("FALAJ_ARCHIVE__SEAL_BYTES", "32KiB");
    p.run(include_str!("../sql/01_tables.sql")).await;
    p.run(
        "INSERT INTO engagement_events (event_ts, raw_payload) \
         SELECT now(), to_jsonb(md5(g::text) || sha256(g::text::bytea)::text) FROM generate_series(1, 5000) AS g",
    )
    .await;
    p.start(&["init", "--yes", "--snapshot"]).ends_well().await;
    // As if the slot had been adopted: nothing tells that the rows are older.
    std::fs::remove_file(p.config.state.dir.join("origin.json")).unwrap();
    p.run("INSERT INTO engagement_events (event_ts, duration_ms) VALUES (now(), 5001)").await;
    p.produce().await;
    let batches = archive::batches(&p.archive());
    assert!(batches.len() > 2, "{batches:?}");
    let (batch, aside) = (p.archive().join(&batches[1]), p.archive().join(".aside"));
    assert!(batch.join("_backfill.json").exists(), "{batches:?}");
    std::fs::rename(&batch, &aside).unwrap();
    let waiting = 5001 - p.rows("engagement_events").len();
    p.start(&["upload", "--once"]).ends_well().await;
    std::fs::rename(&aside, &batch).unwrap();
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, differing(&report)), (Some(0), vec![]), "{report}");
    let found = table(&report, "bigquery", "engagement_events");
    assert_eq!(
        (&found["changed_since"], &found["sink"]["rows"]),
        (&waiting.into(), &(5001 - waiting).into()),
        "{report}"
    );
    p.start(&["upload", "--once"]).ends_well().await;
    let (code, report) = verify(&p, &[]).await;
    let found = table(&report, "bigquery", "engagement_events");
    assert_eq!((code, &found["sink"]["rows"]), (Some(0), &5001.into()), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_on_the_board_is_named() {
    let p = twenty("verify_board").await;
    p.start(&["consume", "--sinks", "redis", "--until-end"]).ends_well().await;
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, &report["board"]["equal"]), (Some(0), &Value::Bool(true)), "{report}");
    assert_eq!((&report["board"]["board_events"], &report["board"]["kafka_events"]), (&20.into(), &20.into()));
    // A count and a sum that are wrong, a content and a device that are gone.
    let expected = format!("by Kafka {CONTENT}: 20 events, 210 ms");
    for (kind, command, score, found) in [
        ("events", "ZINCRBY", Some(1), "21 events, 210 ms"),
        ("millis", "ZINCRBY", Some(5), "21 events, 215 ms"),
        ("events", "ZREM", None, "0 events, 215 ms"),
        ("millis", "ZREM", None, "0 events, 0 ms"),
    ] {
        by_hand::edit_board(&p.config, kind, command, score).await;
        let (code, report) = verify(&p, &[]).await;
        assert_eq!((code, differing(&report)), (Some(1), vec![]), "{report}");
        assert_eq!(report["board"]["differences"], serde_json::json!([format!("{CONTENT}: {found}; {expected}")]));
    }
    by_hand::edit_board(&p.config, "devices", "ZREM", None).await;
    let (_, report) = verify(&p, &[]).await;
    let told = report["board"]["differences"][1].as_str().unwrap();
    assert!(
        told.starts_with("device web‑safari: 0 events, ") && told.contains("by Kafka device web‑safari: 20 events, "),
        "{told}"
    );
}

/// Reading it whole takes longer than the board ever stands still.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_board_is_compared_while_it_moves() {
    let p = Pipeline::new("verify_large_board").await;
    p.run(
        "INSERT INTO content (id, slug, title, publish_ts) \
         SELECT md5(g::text)::uuid, g, g, now() FROM generate_series(1, 20000) AS g; \
         INSERT INTO engagement_events (content_id, event_ts, duration_ms, device) \
         SELECT md5(g::text)::uuid, now() - g * interval '20 ms', g, 'd' || g % 100 FROM generate_series(1, 20000) AS g",
    )
    .await;
    p.produce().await;
    p.start(&["consume", "--sinks", "redis", "--until-end"]).ends_well().await;
    let (produce, consume) = (p.start(&["produce"]), p.start(&["consume", "--sinks", "redis"]));
    let written = tokio_util::sync::CancellationToken::new();
    let writing = async {
        let mut rows = 0;
        while !written.is_cancelled() {
            p.run("INSERT INTO engagement_events (content_id, event_ts) VALUES (md5('7')::uuid, now())").await;
            rows += 1;
        }
        rows
    };
    let verifying = async {
        let mut counted = vec![];
        for _ in 0..3 {
            let (_, report) = verify(&p, &[]).await;
            assert_eq!(report["board"]["equal"], true, "{report}");
            assert_eq!(report["board"]["board_events"], report["board"]["kafka_events"], "{report}");
            counted.push(report["board"]["board_events"].as_u64().unwrap());
        }
        written.cancel();
        counted
    };
    let (rows, counted) = tokio::join!(writing, verifying);
    assert!(20_000 < counted[0] && counted.is_sorted() && counted[2] <= 20_000 + rows, "{counted:?} of {rows}");
    produce.drains().await;
    consume.drains().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_equal_while_a_writer_runs_and_nobody_is_disturbed() {
    let p = Pipeline::new("verify_live").await;
    let other = connect(&p.config.postgres.url).await;
    other.batch_execute("BEGIN; INSERT INTO engagement_events (id, event_ts) VALUES (-77, now())").await.unwrap();
    let produce = p.start(&["produce"]);
    let reader = p.streams("").await;
    let mut compared = 0;
    let verifying = async {
        for _ in 0..4 {
            let (code, report) = verify(&p, &[]).await;
            assert_eq!((code, differing(&report)), (Some(0), vec![]), "{report}");
            compared = table(&report, "kafka", "engagement_events")["source"]["rows"].as_u64().unwrap();
        }
    };
    tokio::join!(load::mixed(&p, 4000, 3), verifying);
    assert!(compared > 0);
    other.batch_execute("COMMIT").await.unwrap();
    assert_eq!(p.reader().await, reader);
    let lsn = p.lsn().await;
    produce.drains().await;
    p.produce_until(lsn, &[]).await;
    p.start(&["upload", "--once"]).ends_well().await;
    let (code, report) = verify(&p, &["--until-lsn", &lsn.to_string()]).await;
    assert_eq!((code, differing(&report)), (Some(0), vec![]), "{report}");
    let rows: u64 = p.text("SELECT count(*) FROM engagement_events").await.parse().unwrap();
    for sink in ["kafka", "archive", "bigquery"] {
        let found = table(&report, sink, "engagement_events");
        assert_eq!(
            found["sink"]["rows"].as_u64().unwrap() + found["changed_since"].as_u64().unwrap(),
            rows,
            "{report}"
        );
    }
    let slots = p.text("SELECT count(*) FROM pg_replication_slots WHERE database = current_database()").await;
    assert_eq!(slots, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_are_older_than_the_slot_are_counted_and_changes_after_the_lsn_left_out() {
    let p = Pipeline::bare(Servers::shared(), "verify_old").await;
    p.run(include_str!("../sql/01_tables.sql")).await;
    p.run("INSERT INTO engagement_events (event_ts, duration_ms) SELECT now(), g FROM generate_series(1, 10) AS g")
        .await;
    p.init().await;
    p.run("INSERT INTO engagement_events (event_ts, duration_ms) SELECT now(), g FROM generate_series(11, 30) AS g")
        .await;
    p.run("UPDATE engagement_events SET duration_ms = 0 WHERE id = 1; DELETE FROM engagement_events WHERE id = 2")
        .await;
    let lsn = p.produce().await;
    p.run("UPDATE engagement_events SET duration_ms = -1 WHERE id = 12").await;
    p.run("INSERT INTO engagement_events (event_ts) VALUES (now()); DELETE FROM engagement_events WHERE id = 13").await;
    for flags in [&[][..], &["--until-lsn", &lsn.to_string()]] {
        let (code, report) = verify(&p, flags).await;
        assert_eq!((code, differing(&report)), (Some(0), vec![]), "{report}");
        for sink in ["kafka", "archive"] {
            let found = table(&report, sink, "engagement_events");
            let counts = ["older_than_slot", "changed_since"].map(|name| found[name].as_u64().unwrap());
            assert_eq!((counts, found["sink"]["rows"].as_u64()), ([8, 2], Some(19)), "{sink}: {report}");
        }
    }
    let out = p.start(&["verify"]).ends_well().await;
    let told =
        "8 rows of engagement_events are older than the slot and not in this sink; falaj backfill engagement_events";
    assert!(out.contains(told), "{out}");
    // Sinks that will not come so far are told.
    let ahead = p.lsn().await.to_string();
    let ended = p.start(&["verify", "--until-lsn", &ahead]).end().await;
    assert_eq!(ended.code, Some(78), "{ended:?}");
    assert!(ended.log.contains("verify_position"), "{ended:?}");
    // A backfill brings what is older.
    p.start(&["backfill", "engagement_events"]).ends_well().await;
    p.produce().await;
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, differing(&report)), (Some(0), vec![]), "{report}");
    for sink in ["kafka", "archive"] {
        let found = table(&report, sink, "engagement_events");
        let counts = ["older_than_slot", "changed_since", "in_part"].map(|name| found[name].as_u64().unwrap());
        assert_eq!((counts, found["sink"]["rows"].as_u64()), ([0, 0, 0], Some(29)), "{sink}: {report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn values_of_every_kind_toast_keys_and_tables_without_a_key_compare_equal() {
    let p = Pipeline::bare(Servers::shared(), "verify_kinds").await;
    p.run(
        "CREATE TABLE every (id bigint PRIMARY KEY, f4 real, f8 double precision, n numeric, amount numeric(12,3), b boolean, d date,
             t timestamp, tz timestamptz, u uuid, js json, jb jsonb, c char(4), ia int[], a inet, iv interval, by bytea);
         CREATE TABLE page (a int, at timestamptz, body text, PRIMARY KEY (a, at));
         ALTER TABLE page ALTER body SET STORAGE EXTERNAL;
         CREATE TABLE line (body text, n numeric(6,2));
         CREATE PUBLICATION falaj FOR TABLE every, page, line",
    )
    .await;
    p.init().await;
    p.run(
        r#"INSERT INTO every VALUES
           (1, 1.5, 0.1, 1.10, 12345.100, true, '2024-02-29', '2024-02-29 12:00:00.000001', '2024-02-29 12:00:00.5+03', 'c0ffee00-0000-4000-8000-000000000001', ' {"b": 1.10} ', '{"b": 1.10}', 'ab', '{{1,NULL},{3,4}}', '10.0.0.1', '1 year', '\xdead'),
           (2, 'NaN', '-Infinity', 'NaN', 'NaN', false, 'infinity', '-infinity', 'infinity', NULL, 'null', 'null', '', '{}', '::1', '-3 days', ''),
           (3, '-0', 1e300, 1, -0.001, NULL, '0044-03-15 BC', NULL, '0001-01-01 00:00:00+00', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
         INSERT INTO page SELECT g, '2024-02-29', repeat('x', 9000) FROM generate_series(1, 4) AS g;
         UPDATE page SET at = 'infinity' WHERE a = 1;
         UPDATE page SET a = a WHERE a = 2;
         DELETE FROM page WHERE a = 3;
         INSERT INTO line VALUES ('a', 1.10), ('a', 1.10), ('b', NULL)"#,
    )
    .await;
    p.produce().await;
    p.start(&["upload", "--once"]).ends_well().await;
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, differing(&report)), (Some(0), vec![]), "{report}");
    for (sink, name, rows) in
        [("kafka", "every", 3), ("archive", "page", 3), ("bigquery", "line", 3), ("bigquery", "every", 3)]
    {
        assert_eq!(table(&report, sink, name)["sink"]["rows"], rows, "{sink} {name}: {report}");
    }
    // One row less of equal ones, and one more, behind the publication's back.
    p.run("ALTER PUBLICATION falaj SET (publish = 'update')").await;
    p.run("DELETE FROM line WHERE body = 'b'; INSERT INTO line VALUES ('a', 1.10); DELETE FROM page WHERE a = 4").await;
    let (code, report) = verify(&p, &[]).await;
    assert_eq!(code, Some(1));
    assert_eq!(
        named(&report, "kafka", "line")
            .iter()
            .map(|l| l.split(' ').take(2).collect::<Vec<_>>().join(" "))
            .collect::<Vec<_>>(),
        ["missing [\"a\",1.10]", "extra [\"b\",null]"]
    );
    assert_eq!(named(&report, "archive", "page")[0].split(' ').next(), Some("extra"));
}

/// Changes that the sinks lack are known by their key, wherever its column stood when they were made.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_whose_place_has_changed_is_still_the_key() {
    let p = Pipeline::bare(Servers::shared(), "verify_place").await;
    p.run(
        "CREATE TYPE mood AS ENUM ('sad', 'so so', 'glad'); CREATE DOMAIN number AS int;
         CREATE TABLE t (gone text, id int PRIMARY KEY, v text); CREATE TABLE own (m mood, n number, v text, PRIMARY KEY (n, m));
         CREATE PUBLICATION falaj FOR TABLE t, own",
    )
    .await;
    p.init().await;
    p.run("INSERT INTO t SELECT 'x', g, 'v' FROM generate_series(1, 5) AS g").await;
    p.run("INSERT INTO own VALUES ('sad', 1, 'v'), ('glad', 1, 'v'), ('so so', 2, 'v')").await;
    p.produce().await;
    // Types of the user's own look like others, in the stream as in the catalogue.
    p.run("UPDATE own SET v = 'w' WHERE m = 'glad'").await;
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, differing(&report)), (Some(0), vec![]), "{report}");
    for sink in ["kafka", "archive"] {
        let found = table(&report, sink, "own");
        assert_eq!((&found["changed_since"], &found["sink"]["rows"]), (&1.into(), &2.into()), "{sink}: {report}");
    }
    p.run("UPDATE t SET v = 'w' WHERE id = 2; ALTER TABLE t DROP COLUMN gone, ADD COLUMN new text; DELETE FROM t WHERE id = 3")
        .await;
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, differing(&report)), (Some(0), vec![]), "{report}");
    for sink in ["kafka", "archive"] {
        let found = table(&report, sink, "t");
        let counts = ["changed_since", "in_part"].map(|name| found[name].as_u64().unwrap());
        assert_eq!(
            (counts, &found["source"]["rows"], &found["sink"]["rows"]),
            ([1, 3], &3.into(), &3.into()),
            "{sink}: {report}"
        );
    }
    // A row that the changes do not touch is compared, and missed.
    p.run("ALTER PUBLICATION falaj SET (publish = 'update'); DELETE FROM t WHERE id = 4").await;
    let (code, report) = verify(&p, &[]).await;
    assert_eq!((code, differing(&report)), (Some(1), vec!["kafka t".to_owned(), "archive t".to_owned()]), "{report}");
    assert!(named(&report, "kafka", "t")[0].starts_with("extra 4 "), "{report}");
}
