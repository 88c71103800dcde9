//! `pg_logical_emit_message`: off by default, and each message once when on.

use crate::produce::shown;
use crate::rig::{Pipeline, Servers, assert_same, bigquery, id, until};

const MESSAGES: &str = "_message";

/// A pipeline with messages on and table `t` published.
async fn listening(name: &str) -> Pipeline {
    let mut p = Pipeline::bare(Servers::shared(), name).await;
    p.set("FALAJ_PRODUCE__MESSAGES", "true");
    p.run("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION falaj FOR TABLE t").await;
    p.init().await;
    p
}

/// `_id` of a message.
fn message_id(event: &str) -> String {
    let value: serde_json::Value = serde_json::from_str(event).unwrap();
    value["_id"].as_str().unwrap().to_owned()
}

/// The messages, partition by partition and so by prefix, in the order of their ids.
async fn messages(p: &Pipeline) -> Vec<String> {
    let mut values: Vec<_> = p.records(MESSAGES).await.into_iter().map(|r| r.value).collect();
    values.sort_by_cached_key(|v| message_id(v));
    values
}

/// `_id` as it must be: of the row before it, and the end of the message's record.
fn expected_id(before: &str, returned: &str) -> String {
    let (high, low) = returned.split_once('/').unwrap();
    format!("{before}+{:0>8}{:0>8}", high, low)
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_events_with_ids_of_their_own_and_rows_keep_theirs() {
    let p = listening("messages").await;
    let silent = {
        // The same stream without messages: rows must have the same bytes.
        let mut silent = p.sibling("silent", "falaj").await;
        silent.set("FALAJ_PRODUCE__MESSAGES", "false");
        silent
    };
    let emit = async |transactional: bool, prefix: &str, content: &str| -> String {
        p.text(&format!("pg_logical_emit_message({transactional}, '{prefix}', {content})")).await
    };
    p.run("BEGIN").await;
    let first = emit(true, "a", "'before any row'").await;
    p.run("INSERT INTO t VALUES (1)").await;
    let second = emit(true, "a", r#"'{"quoted": "\\"}'"#).await;
    let third = emit(true, "b", "''").await;
    p.run("INSERT INTO t VALUES (2)").await;
    let last = emit(true, "a", r"'\xff00'::bytea").await;
    // Of no transaction: it comes before the one that it is sent within, and when that rolls back.
    let free = emit(false, "free", "'قناة'").await;
    p.run("COMMIT").await;
    p.run("BEGIN").await;
    emit(true, "a", "'never'").await;
    let kept = emit(false, "free", "'kept'").await;
    p.run("ROLLBACK").await;
    p.run("BEGIN").await;
    let alone = emit(true, "a", "'alone'").await;
    p.run("COMMIT").await;
    let lsn = p.produce().await;
    silent.produce_until(lsn, &[]).await;

    let rows = p.values("t").await;
    assert_eq!(rows.len(), 2);
    assert_same("rows without messages", &silent.values("t").await, &rows);
    let (one, two) = (id(&rows[0]), id(&rows[1]));
    let commit = &one[..16];
    assert_eq!((&one[16..], &two[16..]), (":0000000000", ":0000000001"));

    let found = messages(&p).await;
    let ids: Vec<_> = found.iter().map(|m| message_id(m)).collect();
    // A message of no transaction stands at the last byte of its own record: the next one may be a commit.
    let own = |returned: &str| format!("{:016X}", returned.parse::<falaj::lsn::Lsn>().unwrap().0 - 1);
    let alone_commit = ids[6][..16].to_owned();
    assert_eq!(
        ids,
        [
            expected_id(&own(&free), &free),
            expected_id(commit, &first),
            expected_id(one, &second),
            expected_id(one, &third),
            expected_id(two, &last),
            expected_id(&own(&kept), &kept),
            expected_id(&alone_commit, &alone),
        ]
    );
    let commit_ts = shown(&rows[..1], &["_commit_ts"]).remove(0);
    let lsn_of = |row: &str| shown(&[row.to_owned()], &["_lsn"]).remove(0);
    assert_eq!(lsn_of(&found[1]), lsn_of(&rows[0]));
    assert_eq!(lsn_of(&found[0]), format!("_lsn=\"{free}\""));
    assert_eq!(
        shown(&found[..6], &["_op", "_table", "prefix", "content", "content_bytes", "transactional"]),
        [
            r#"_op="m" _table="_message" prefix="free" content="قناة" content_bytes=null transactional=false"#,
            r#"_op="m" _table="_message" prefix="a" content="before any row" content_bytes=null transactional=true"#,
            r#"_op="m" _table="_message" prefix="a" content="{\"quoted\": \"\\\\\"}" content_bytes=null transactional=true"#,
            r#"_op="m" _table="_message" prefix="b" content="" content_bytes=null transactional=true"#,
            r#"_op="m" _table="_message" prefix="a" content=null content_bytes="\\xff00" transactional=true"#,
            r#"_op="m" _table="_message" prefix="free" content="kept" content_bytes=null transactional=false"#,
        ]
    );
    assert_eq!(shown(&found[..2], &["_commit_ts"]), ["_commit_ts=null".to_owned(), commit_ts]);
    for record in p.records(MESSAGES).await {
        let prefix = shown(std::slice::from_ref(&record.value), &["prefix"]).remove(0);
        assert_eq!(prefix, format!("prefix=\"{}\"", record.key.unwrap()));
    }
    // The archive leaves NULLs of falaj's own columns out.
    let stored: Vec<_> = found.iter().map(|m| m.replace(",\"_commit_ts\":null", "")).collect();
    assert_same("archive", &p.rows(MESSAGES), &stored);
    assert_eq!(silent.rows(MESSAGES), Vec::<String>::new());
    p.start(&["upload", "--once"]).ends_well().await;
    let loaded: Vec<_> = bigquery::rows(&p, "_id", MESSAGES, "_id").await.into_iter().flatten().flatten().collect();
    assert_eq!(loaded, ids);
}

/// Neither a stop between two messages nor a kill doubles or loses one.
#[tokio::test(flavor = "multi_thread")]
async fn messages_survive_sigkill_exactly() {
    const ROUNDS: usize = 40;
    let mut p = listening("messagekill").await;
    p.set("FALAJ_PRODUCE__TRANSACTION_BYTES", "4KiB");
    p.set("FALAJ_ARCHIVE__SEAL_BYTES", "8KiB");
    p.set("FALAJ_PRODUCE__QUEUE_BYTES", "16KiB");
    for round in 0..ROUNDS {
        p.run(&format!(
            "SELECT pg_logical_emit_message(false, 'free', '{round}');
             BEGIN;
             SELECT pg_logical_emit_message(true, 'in', {round} || '.' || g || repeat('x', 300)) FROM generate_series(1, 40) AS g;
             INSERT INTO t SELECT {round} * 1000 + g FROM generate_series(1, 100) AS g;
             SELECT pg_logical_emit_message(true, 'in', {round} || '.' || g) FROM generate_series(41, 50) AS g;
             COMMIT"
        ))
        .await;
    }
    let lsn = p.lsn().await;
    let written = async || p.records(MESSAGES).await.len();
    for _ in 0..3 {
        let before = written().await;
        let produce = p.start(&["produce", "--until-lsn", &lsn.to_string()]);
        until("more messages are there", async || written().await > before || p.confirmed().await >= lsn).await;
        produce.kill();
    }
    p.produce_until(lsn, &[]).await;
    let found = messages(&p).await;
    let ids: std::collections::BTreeSet<_> = found.iter().map(|m| message_id(m)).collect();
    assert_eq!((found.len(), ids.len()), (ROUNDS * 51, ROUNDS * 51));
    let contents: Vec<_> = found
        .iter()
        .map(|m| {
            let event: serde_json::Value = serde_json::from_str(m).unwrap();
            event["content"].as_str().unwrap().trim_end_matches('x').to_owned()
        })
        .collect();
    let expected: Vec<_> = (0..ROUNDS)
        .flat_map(|r| std::iter::once(r.to_string()).chain((1..=50).map(move |g| format!("{r}.{g}"))))
        .collect();
    assert_same("messages", &contents, &expected);
    let stored: Vec<_> = found.iter().map(|m| m.replace(",\"_commit_ts\":null", "")).collect();
    assert_same("archive", &p.rows(MESSAGES), &stored);
    assert_eq!(p.values("t").await.len(), ROUNDS * 100);
    assert_eq!(p.rows("t").len(), ROUNDS * 100);
    assert_eq!(p.confirmed().await, lsn);
}

#[tokio::test(flavor = "multi_thread")]
async fn until_lsn_takes_the_messages_that_end_there() {
    let p = listening("messageuntil").await;
    let first = p.text("pg_logical_emit_message(false, 'p', 'one')").await;
    let second = p.text("pg_logical_emit_message(false, 'p', 'two')").await;
    // Messages of no transaction are flushed by the commit of another one.
    p.run("INSERT INTO t VALUES (1)").await;
    for (lsn, count) in [(&first, 1), (&first, 1), (&second, 2)] {
        p.produce_until(lsn.parse().unwrap(), &[]).await;
        assert_eq!((messages(&p).await.len(), p.values("t").await.len()), (count, 0), "until {lsn}");
    }
    p.produce().await;
    assert_eq!((messages(&p).await.len(), p.values("t").await.len()), (2, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_off_by_default() {
    let p = Pipeline::bare(Servers::shared(), "messageoff").await;
    p.run("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION falaj FOR TABLE t").await;
    p.init().await;
    p.run("SELECT pg_logical_emit_message(true, 'p', 'x'); INSERT INTO t VALUES (1)").await;
    p.run("SELECT pg_logical_emit_message(false, 'p', 'x')").await;
    p.produce().await;
    assert_eq!((p.values("t").await.len(), p.rows("t").len(), p.rows(MESSAGES).len()), (1, 1, 0));
    let mut on = p;
    on.set("FALAJ_PRODUCE__MESSAGES", "true");
    // Their topic is made by init, never by accident.
    let ended = on.start(&["produce"]).end().await;
    let missing = format!("missing: {}", on.config.topic(MESSAGES));
    assert!(ended.code == Some(78) && ended.log.contains(&missing), "{ended:?}");
}
