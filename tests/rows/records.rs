//! What becomes of an event as a Kafka record: tombstones, and events that are too large.

use serde_json::{Value, json};

use super::{events, published};
use crate::rig::{Pipeline, Servers, archive, id, kafka, until};

/// Records of a topic in the order of their partitions, as `key=op` or `key=tombstone`.
async fn ops(p: &Pipeline, topic: &str) -> Vec<String> {
    let op = |record: kafka::Record| {
        let key = record.key.unwrap_or_else(|| "no key".into());
        let what = match serde_json::from_str::<Value>(&record.value) {
            Ok(event) => event["_op"].as_str().unwrap().to_owned(),
            Err(_) => "tombstone".to_owned() + &record.value,
        };
        (record.partition, record.offset, format!("{key}={what}"))
    };
    let mut all: Vec<_> = kafka::records(&p.config, topic).await.into_iter().map(op).collect();
    all.sort();
    all.into_iter().map(|(_, _, text)| text).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn tombstones_follow_deletes_and_changed_keys_of_rows() {
    let mut p = Pipeline::bare(Servers::shared(), "tombs").await;
    p.set("FALAJ_KAFKA__TOMBSTONES", "true");
    p.set("FALAJ_KAFKA__PARTITIONS", "1");
    p.run(include_str!("../../sql/01_tables.sql")).await;
    p.run(
        "CREATE TABLE page (id int PRIMARY KEY, v int); CREATE TABLE pair (a int, b text, PRIMARY KEY (a, b));
         CREATE TABLE pile (v int); ALTER TABLE pile REPLICA IDENTITY FULL;
         ALTER TABLE engagement_events REPLICA IDENTITY FULL;
         CREATE PUBLICATION falaj FOR TABLE page, pair, pile, content, engagement_events",
    )
    .await;
    p.init().await;
    p.run("INSERT INTO page VALUES (1, 1), (2, 2); UPDATE page SET v = 3 WHERE id = 1; UPDATE page SET id = 7 WHERE id = 1").await;
    p.run("DELETE FROM page WHERE id = 7; TRUNCATE page").await;
    p.run("INSERT INTO pair VALUES (1, 'x'); UPDATE pair SET b = 'y'; DELETE FROM pair").await;
    p.run("INSERT INTO pile VALUES (1); DELETE FROM pile").await;
    // Keyed by content_id: a tombstone would bury every other event of the content.
    p.run(
        "INSERT INTO content VALUES ('00000000-0000-0000-0000-00000000000a', 's', 't', NULL, NULL, now());
         INSERT INTO engagement_events (content_id, event_ts) VALUES ('00000000-0000-0000-0000-00000000000a', now());
         DELETE FROM engagement_events",
    )
    .await;
    p.produce().await;
    let live = async |table: &str| ops(&p, &p.config.topic(table)).await;
    let page = live("page").await;
    let truncated = id(&p.records("page").await.pop().unwrap().value).to_owned();
    assert_eq!(page, ["1=c", "2=c", "1=u", "7=u", "1=tombstone", "7=d", "7=tombstone", &format!("{truncated}=t")]);
    assert_eq!(
        live("pair").await,
        [r#"["1","x"]=c"#, r#"["1","y"]=u"#, r#"["1","x"]=tombstone"#, r#"["1","y"]=d"#, r#"["1","y"]=tombstone"#,]
    );
    assert_eq!(live("pile").await.len(), 2);
    let content = "00000000-0000-0000-0000-00000000000a";
    assert_eq!(live("engagement_events").await, [format!("{content}=c"), format!("{content}=d")]);
    // The archive gives the same again, the keys of rows before an update among them.
    let first: Value = serde_json::from_str(&p.records("page").await[0].value).unwrap();
    let (from, again) = (first["_lsn"].as_str().unwrap(), format!("{}.again.{{table}}", p.name));
    p.start(&["replay", "--from", from, "--sink", "kafka", "--topic", &again]).ends_well().await;
    for table in ["page", "pair", "pile", "content", "engagement_events"] {
        assert_eq!(ops(&p, &again.replace("{table}", table)).await, live(table).await, "{table}");
    }
    // A consumer reads them away.
    p.start(&["consume", "--sinks", "redis", "--until-end"]).ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compacted_topic_refuses_what_has_no_key_and_the_stream_says_so() {
    let mut p = published(
        Servers::shared(),
        "compacted",
        "CREATE TABLE page (id int PRIMARY KEY); CREATE PUBLICATION falaj FOR TABLE page",
    )
    .await;
    let topic = p.config.topic("page");
    kafka::configure(&p.config, &topic, "cleanup.policy", "compact").await;
    p.run("INSERT INTO page VALUES (1); TRUNCATE page; INSERT INTO page VALUES (2)").await;
    let ended = p.start(&["produce"]).end().await;
    assert_eq!(ended.code, Some(78), "{}", ended.log);
    for word in ["kafka_record", &topic, "found:", "needed:", "fix:", "kafka.tombstones = true"] {
        assert!(ended.log.contains(word), "{word} is not in: {}", ended.log);
    }
    p.set("FALAJ_KAFKA__TOMBSTONES", "true");
    p.produce().await;
    let ops: Vec<_> = p.values("page").await.iter().map(|v| v[v.find("_op").unwrap()..][..8].to_owned()).collect();
    assert_eq!(ops, ["_op\":\"c\"", "_op\":\"t\"", "_op\":\"c\""]);
}

const BIG: &str = "CREATE TABLE big (id int PRIMARY KEY, body text); ALTER TABLE big ALTER body SET STORAGE EXTERNAL;
                   CREATE PUBLICATION falaj FOR TABLE big";

/// An insert of a body of so many bytes between two small rows.
async fn insert(p: &Pipeline, bytes: usize) {
    p.run(&format!("INSERT INTO big VALUES (1, 'a'); INSERT INTO big VALUES (2, repeat('x', {bytes})); INSERT INTO big VALUES (3, 'c')"))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_100_mb_stops_the_stream_and_says_why() {
    let mut p = published(Servers::shared(), "toolarge", BIG).await;
    insert(&p, 100 << 20).await;
    let ended = p.start(&["produce"]).end().await;
    assert_eq!(ended.code, Some(78), "{}", ended.log);
    for word in ["kafka_too_large", "of table big", "at most 998976 bytes", "message.max.bytes", "dead_letter"] {
        assert!(ended.log.contains(word), "{word} is not in: {}", ended.log);
    }
    assert!(p.records("big").await.iter().all(|r| r.value.contains("\"id\":1")));

    p.set("FALAJ_KAFKA__TOO_LARGE", "dead_letter");
    p.produce().await;
    let ids: Vec<_> = p.values("big").await.iter().map(|v| v[..7].to_owned()).collect();
    assert_eq!(ids, ["{\"id\":1", "{\"id\":3"]);
    // Whole in the archive.
    let stored = p.rows("big");
    let lengths: Vec<_> = stored.iter().map(|row| row.len() > 100 << 20).collect();
    assert_eq!(lengths, [false, true, false]);
    let letters = kafka::records(&p.config, &p.config.dead_letter_topic()).await;
    let letter: Value = serde_json::from_str(&letters[0].value).unwrap();
    let large = id(&stored[1]);
    let body = stored[1].len();
    let expected = json!({
        "_id": large,
        "position": letter["position"],
        "reason": format!("too large for Kafka: {body} bytes and its key; at most 998976 (kafka.\"message.max.bytes\")"),
        "topic": p.config.topic("big"),
        "_op": "c",
        "_table": "big",
        "key": "2",
        "body": null,
        "body_omitted": body,
    });
    assert_eq!((letters.len(), letter), (1, expected));
    // Read again from an older place the note is not written again, and it is the same note.
    p.produce().await;
    assert_eq!(kafka::records(&p.config, &p.config.dead_letter_topic()).await, letters);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raised_limit_takes_the_row_once_the_topic_does() {
    let mut p = published(Servers::shared(), "raised", BIG).await;
    p.set("FALAJ_KAFKA__MESSAGE_MAX_BYTES", "20000000");
    insert(&p, 15_000_000).await;
    let topic = p.config.topic("big");
    let ended = p.start(&["produce"]).end().await;
    assert_eq!(ended.code, Some(78), "{}", ended.log);
    for word in [&topic, "max.message.bytes = 1048588", "message.max.bytes\" is 20000000", "fix:"] {
        assert!(ended.log.contains(word), "{word} is not in: {}", ended.log);
    }
    let checked = async |p: &Pipeline| -> Value {
        let out = p.start(&["check", "--json"]).end().await.out;
        let findings: Vec<Value> = serde_json::from_str(&out).unwrap();
        findings.into_iter().find(|f| f["check"] == "kafka_too_large").unwrap()
    };
    let finding = checked(&p).await;
    assert!(finding["ok"] == false && ended.log.contains(finding["found"].as_str().unwrap()), "{finding}");
    kafka::configure(&p.config, &topic, "max.message.bytes", "20000000").await;
    assert_eq!(checked(&p).await["ok"], true);
    p.produce().await;
    assert_eq!(
        events(&p, "big", &["_op", "id"]).await,
        ["1: _op=\"c\" id=1", "2: _op=\"c\" id=2", "3: _op=\"c\" id=3"]
    );
}

/// A topic that takes less than Kafka's default: nobody asks for that beforehand, the delivery says it.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_takes_less_than_the_default_is_named() {
    let mut p = published(Servers::shared(), "narrow", BIG).await;
    let topic = p.config.topic("big");
    kafka::configure(&p.config, &topic, "max.message.bytes", "100000").await;
    insert(&p, 200_000).await;
    // The topic's limit is one of compressed batches.
    p.set("FALAJ_KAFKA__COMPRESSION_TYPE", "none");
    let ended = p.start(&["produce"]).end().await;
    assert_eq!(ended.code, Some(78), "{}", ended.log);
    for word in ["kafka_too_large", &topic, "max.message.bytes", "fix:"] {
        assert!(ended.log.contains(word), "{word} is not in: {}", ended.log);
    }
    p.set("FALAJ_KAFKA__MESSAGE_MAX_BYTES", "90000");
    p.set("FALAJ_KAFKA__TOO_LARGE", "dead_letter");
    p.produce().await;
    assert_eq!(p.values("big").await.len(), 2);
    assert_eq!(kafka::records(&p.config, &p.config.dead_letter_topic()).await.len(), 1);
}

/// The delete of a row that is too large has no place in a compacted topic, but its key has.
#[tokio::test(flavor = "multi_thread")]
async fn a_tombstone_follows_a_delete_that_is_too_large() {
    let mut p = published(Servers::shared(), "bigtomb", BIG).await;
    p.set("FALAJ_KAFKA__TOO_LARGE", "dead_letter");
    p.set("FALAJ_KAFKA__TOMBSTONES", "true");
    p.run("ALTER TABLE big REPLICA IDENTITY FULL; INSERT INTO big VALUES (1, 'a')").await;
    p.run("UPDATE big SET body = repeat('x', 2000000); DELETE FROM big").await;
    p.produce().await;
    assert_eq!(ops(&p, &p.config.topic("big")).await, ["1=c", "1=tombstone"]);
    assert_eq!(kafka::records(&p.config, &p.config.dead_letter_topic()).await.len(), 2);
}

/// CloudEvents 1.0, Kafka protocol binding, binary content mode.
#[tokio::test(flavor = "multi_thread")]
async fn headers_are_those_of_cloudevents() {
    let mut p = published(Servers::shared(), "cloud", BIG).await;
    p.set("FALAJ_KAFKA__HEADERS", "cloudevents");
    p.run("INSERT INTO big VALUES (1, 'a'); DELETE FROM big").await;
    p.produce().await;
    let mut records = p.records("big").await;
    records.sort_by_key(|record| record.offset);
    for (record, kind) in records.iter().zip(["c", "d"]) {
        let event: Value = serde_json::from_str(&record.value).unwrap();
        let expected = [
            ("ce_specversion", "1.0"),
            ("ce_id", id(&record.value)),
            ("ce_source", &format!("/{}/big", p.name)),
            ("ce_type", &format!("falaj.{kind}")),
            ("ce_time", event["_commit_ts"].as_str().unwrap()),
            ("content-type", "application/json"),
        ];
        assert_eq!(record.headers, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
    assert_eq!(records.len(), 2);
}

/// Many large rows one behind the other: memory holds a few of them, not all.
#[tokio::test(flavor = "multi_thread")]
async fn memory_does_not_grow_with_the_number_of_large_rows() {
    let mut p = published(Servers::shared(), "heavy", BIG).await;
    p.set("FALAJ_KAFKA__TOO_LARGE", "dead_letter");
    p.run("INSERT INTO big SELECT g, repeat(md5(g::text), 625000) FROM generate_series(1, 40) AS g").await;
    let lsn = p.lsn().await;
    let mut produce = p.start(&["produce", "--until-lsn", &lsn.to_string()]);
    let mut peak = 0;
    until("it has ended", async || {
        peak = peak.max(produce.rss());
        !produce.runs()
    })
    .await;
    produce.ends_well().await;
    // 40 rows of 20 MB.
    assert_eq!(kafka::records(&p.config, &p.config.dead_letter_topic()).await.len(), 40);
    assert_eq!(archive::table(&p.archive(), "big").iter().map(|b| b.num_rows()).sum::<usize>(), 40);
    assert!(peak < 300 << 20, "{} MB", peak >> 20);
}

/// An event that Kafka refuses leaves nothing of its position in any sink: neither the messages that stand before its row nor
/// the row in the archive. What stands before it is stored once.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_in_the_middle_of_a_transaction_is_in_no_sink_and_comes_once() {
    let mut p = Pipeline::bare(Servers::shared(), "refused").await;
    p.set("FALAJ_PRODUCE__MESSAGES", "true");
    p.set("FALAJ_PRODUCE__SINKS", "archive,kafka");
    p.run("CREATE TABLE big (id int PRIMARY KEY, body text); CREATE PUBLICATION falaj FOR TABLE big").await;
    p.init().await;
    let large = "repeat('é', 700000)";
    p.run(&format!(
        "BEGIN; SELECT pg_logical_emit_message(true, 'm', 'one'); INSERT INTO big VALUES (1, 'small');
         SELECT pg_logical_emit_message(true, 'm', 'two'), pg_logical_emit_message(true, 'm', 'three');
         INSERT INTO big VALUES (2, {large}); COMMIT;
         BEGIN; INSERT INTO big VALUES (3, {large}); COMMIT;
         BEGIN; INSERT INTO big VALUES (4, 'small'); SELECT pg_logical_emit_message(true, 'm', 'four');
         SELECT pg_logical_emit_message(true, 'm', {large}); COMMIT"
    ))
    .await;
    let lsn = p.lsn().await.to_string();
    let until = ["produce", "--until-lsn", &lsn];
    let refused = p.start(&until).end().await;
    assert!(refused.code == Some(78) && refused.log.contains("kafka_too_large"), "{refused:?}");
    let bodies = |values: Vec<String>, name: &str| -> Vec<String> {
        let of = |value: &String| serde_json::from_str::<Value>(value).unwrap()[name].to_string();
        values.iter().map(of).map(|text| text.chars().take(9).collect()).collect()
    };
    // What stands before it is stored, and the messages before the refused row are not.
    assert_eq!(bodies(p.values("big").await, "id"), ["1"]);
    assert_eq!(bodies(p.values("_message").await, "content"), ["\"one\""]);
    assert_eq!((p.rows("big").len(), p.rows("_message").len()), (1, 1));
    for _ in 0..2 {
        let again = p.start(&until).end().await;
        assert!(again.code == Some(78) && again.log.contains("kafka_too_large"), "{again:?}");
    }
    p.set("FALAJ_KAFKA__TOO_LARGE", "dead_letter");
    p.start(&["init", "--yes"]).ends_well().await;
    p.start(&until).ends_well().await;
    assert_eq!(bodies(p.values("big").await, "id"), ["1", "4"]);
    assert_eq!(bodies(p.rows("big"), "id"), ["1", "2", "3", "4"]);
    let small = ["\"one\"", "\"two\"", "\"three\"", "\"four\""];
    assert_eq!(bodies(p.values("_message").await, "content"), small);
    assert_eq!(bodies(p.rows("_message"), "content"), [&small[..], &["\"éééééééé"]].concat());
    let notes = kafka::records(&p.config, &p.config.dead_letter_topic()).await;
    assert_eq!(notes.len(), 3);
}
