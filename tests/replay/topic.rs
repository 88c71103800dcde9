//! Into a new topic: exactly once, and never into one that holds something else.

use super::{commit, lines, lsn, replay, replayed};
use crate::rig::process::Ended;
use crate::rig::{Pipeline, Servers, assert_same, check, id, kafka, load};

/// Everything of a record but its place.
fn content(records: Vec<kafka::Record>) -> Vec<(Option<String>, String, Option<i64>)> {
    let mut content: Vec<_> = records.into_iter().map(|r| (r.key, r.value, r.timestamp)).collect();
    content.sort_by_cached_key(|(_, value, _)| id(value).to_owned());
    content
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_into_a_new_topic_is_exact_and_survives_sigkill() {
    let mut p = Pipeline::new("rp_kafka").await;
    p.set("FALAJ_PRODUCE__TRANSACTION_BYTES", "64KiB");
    load::mixed(&p, 60_000, 21).await;
    p.produce().await;
    let mut all = Vec::new();
    for table in check::TABLES {
        all.extend(p.records(table).await);
    }
    let all = content(all);
    let (from, topic) = (lsn(&all[0].1), format!("{}.again", p.name));
    let flags = ["--from", &from, "--sink", "kafka", "--topic", &topic];
    let checkpoints = [p.config.checkpoint_topic()];
    for _ in 0..2 {
        let before = kafka::ends(&p.config, &checkpoints).await;
        let running = p.start(&[&["replay"], &flags[..]].concat());
        // Each transaction adds a record and a marker.
        running.killed_midway(async || kafka::ends(&p.config, &checkpoints).await[0] > before[0] + 5).await;
    }
    let part = content(kafka::records(&p.config, &topic).await);
    assert!(part.len() < all.len(), "killed too late");
    replayed(&p, &flags).await;
    let records = kafka::records(&p.config, &topic).await;
    for pair in records.windows(2).filter(|pair| pair[0].partition == pair[1].partition) {
        assert!(id(&pair[0].value) < id(&pair[1].value), "order: {pair:?}");
    }
    assert!(content(records) == all, "the topic differs");
    // Again: everything is there, and that is said.
    let again = replay(&p, &flags).await;
    let told = format!("to topic {topic}: {rows} rows, ", rows = all.len());
    let before = format!(" bytes, {} of them were there before, in ", all.len());
    assert!(again.code == Some(0) && again.log.contains(&told) && again.log.contains(&before), "{}", again.log);
    assert!(content(kafka::records(&p.config, &topic).await) == all, "doubled");
    // One topic a table, and a part.
    let (to, each) = (lsn(&all[all.len() / 2].1), format!("{}.part.{{table}}", p.name));
    replayed(&p, &["--from", &from, "--to", &to, "--sink", "kafka", "--topic", &each]).await;
    let limit = commit(&all[all.len() / 2].1);
    for table in check::TABLES {
        let within = |v: &String| commit(v) <= limit;
        let expected: Vec<_> = p.values(table).await.into_iter().filter(within).collect();
        let found = content(kafka::records(&p.config, &each.replace("{table}", table)).await);
        assert_same(table, &found.into_iter().map(|(_, value, _)| value).collect::<Vec<_>>(), &expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_holds_something_else_is_refused() {
    let mut p = Pipeline::new("rp_taken").await;
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 5)").await;
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 5)").await;
    p.produce().await;
    let values = p.values("engagement_events").await;
    let (first, second) = (lsn(&values[0]), lsn(&values[5]));
    let into = async |topic: &str, from: &str, to: &str| {
        replay(&p, &["--from", from, "--to", to, "--sink", "kafka", "--topic", topic]).await
    };
    let refused = |ended: Ended, words: &str| {
        assert_eq!(ended.code, Some(78), "{ended:?}");
        assert!(ended.log.contains("replay_topic") && ended.log.contains(words), "{words}: {}", ended.log);
    };
    for own in [p.config.topic("engagement_events"), p.config.checkpoint_topic(), p.config.dead_letter_topic()] {
        refused(into(&own, &first, &second).await, "of pipeline");
    }
    let foreign = format!("{}.foreign", p.name);
    falaj::kafka::create_topic(&p.config.kafka, &foreign, 1, &[]).await.unwrap();
    kafka::write(&p.config, &foreign, "k", "v").await;
    refused(into(&foreign, &first, &second).await, "partition 0 has offsets");
    let topic = format!("{}.again", p.name);
    assert_eq!(into(&topic, &first, &second).await.code, Some(0));
    refused(into(&topic, &second, &second).await, "holds a replay from");
    refused(into(&topic, &first, &first).await, "holds a replay from");
    // The records are as old as their commits, and a retention would count from there.
    assert_eq!(kafka::setting(&p.config.kafka, &topic, "retention.ms").await.as_deref(), Some("-1"));
    let found = content(kafka::records(&p.config, &topic).await);
    assert_same("unharmed", &found.into_iter().map(|(_, v, _)| v).collect::<Vec<_>>(), &values);
    // What the archive cannot give.
    p.set("FALAJ_KAFKA__ENVELOPE", "debezium");
    let ended = replay(&p, &["--from", &first, "--sink", "kafka", "--topic", "other"]).await;
    assert_eq!(ended.code, Some(78), "{ended:?}");
    for word in ["kafka.envelope", "debezium", "the row before an update", "fix:"] {
        assert!(ended.log.contains(word), "{word}: {}", ended.log);
    }
}

/// A message stands at the position of the row behind it: neither may be taken for the other, nor be lost with it.
#[tokio::test(flavor = "multi_thread")]
async fn messages_are_replayed_between_the_rows_that_they_stood_between() {
    let mut p = Pipeline::bare(Servers::shared(), "rp_messages").await;
    p.set("FALAJ_PRODUCE__MESSAGES", "true");
    p.set("FALAJ_PRODUCE__TRANSACTION_BYTES", "16KiB");
    p.run("CREATE TABLE t (id int PRIMARY KEY, note text); CREATE PUBLICATION falaj FOR TABLE t").await;
    p.init().await;
    p.run("SELECT pg_logical_emit_message(false, 'free', 'before all')").await;
    p.run(
        "DO $$ BEGIN FOR n IN 1..20000 LOOP
             PERFORM pg_logical_emit_message(true, 'p' || n % 7, 'first ' || n), pg_logical_emit_message(true, 'q', 'then ' || n);
             INSERT INTO t VALUES (n, repeat('x', 40));
             IF n % 100 = 0 THEN PERFORM pg_logical_emit_message(true, 'p', 'last of its transaction'); COMMIT; END IF;
         END LOOP; END $$",
    )
    .await;
    p.run("SELECT pg_logical_emit_message(false, 'free', 'behind them'); INSERT INTO t VALUES (0)").await;
    p.produce().await;
    let key =
        |value: &String| serde_json::from_str::<serde_json::Value>(value).unwrap()["_id"].as_str().unwrap().to_owned();
    let mut all = Vec::new();
    for table in ["t", "_message"] {
        all.extend(p.records(table).await.into_iter().map(|record| record.value));
    }
    all.sort_by_cached_key(key);
    assert_eq!(all.len(), 20_000 * 3 + 200 + 3);
    let from = lsn(&all[0]);
    assert_same("stdout", &lines(&replayed(&p, &["--from", &from, "--sink", "stdout"]).await), &all);

    let (topic, checkpoints) = (format!("{}.again", p.name), [p.config.checkpoint_topic()]);
    let flags = ["--from", &from, "--sink", "kafka", "--topic", &topic];
    for _ in 0..3 {
        let before = kafka::ends(&p.config, &checkpoints).await;
        let running = p.start(&[&["replay"], &flags[..]].concat());
        running.killed_midway(async || kafka::ends(&p.config, &checkpoints).await[0] > before[0] + 5).await;
    }
    replayed(&p, &flags).await;
    let mut found: Vec<_> = kafka::records(&p.config, &topic).await.into_iter().map(|record| record.value).collect();
    found.sort_by_cached_key(key);
    assert_same("kafka", &found, &all);
}
