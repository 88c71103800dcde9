//! `falaj produce` on real servers: every kind of change, exact ends, drains, standby, idle acknowledgement.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use falaj::lsn::Lsn;
use rdkafka::producer::Producer;

use crate::rig::stack::Stack;
use crate::rig::{DEADLINE, Pipeline, Servers, archive, assert_same, check, id, kafka, load, oracle, until};

/// Fields of an event, each as its own bytes.
fn fields(event: &str) -> BTreeMap<String, Box<serde_json::value::RawValue>> {
    serde_json::from_str(event).unwrap_or_else(|e| panic!("{e}: {event}"))
}

/// The named fields of an event as `name=value …`; `-` where one is absent.
fn show(event: &str, names: &[&str]) -> String {
    let fields = fields(event);
    let one = |name: &&str| format!("{name}={}", fields.get(*name).map_or("-", |v| v.get()));
    names.iter().map(one).collect::<Vec<_>>().join(" ")
}

pub fn shown(events: &[String], names: &[&str]) -> Vec<String> {
    events.iter().map(|event| show(event, names)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_change_becomes_one_event() {
    let p = Pipeline::bare(Servers::shared(), "ops").await;
    p.run(
        "CREATE TABLE page (a int, b text, body text, n numeric, amount numeric(6,2), PRIMARY KEY (a, b));
         ALTER TABLE page ALTER body SET STORAGE EXTERNAL;
         CREATE TABLE whole (id int PRIMARY KEY, body text, v int);
         ALTER TABLE whole ALTER body SET STORAGE EXTERNAL;
         ALTER TABLE whole REPLICA IDENTITY FULL;
         CREATE TABLE silent (id int PRIMARY KEY);
         CREATE PUBLICATION falaj FOR TABLE page, whole",
    )
    .await;
    p.run(include_str!("../sql/01_tables.sql")).await;
    p.run("ALTER PUBLICATION falaj ADD TABLE content, engagement_events").await;
    p.init().await;
    p.run("INSERT INTO page VALUES (1, 'x', repeat('é', 3000), 1.10, 1.10), (2, 'y', NULL, NULL, NULL)").await;
    p.run("UPDATE page SET n = 2.500 WHERE a = 1").await;
    p.run("UPDATE page SET b = 'z' WHERE a = 1").await;
    p.run("UPDATE page SET body = 'short' WHERE a = 1").await;
    p.run("DELETE FROM page WHERE a = 2").await;
    p.run("INSERT INTO whole VALUES (1, repeat('w', 3000), 1)").await;
    p.run("UPDATE whole SET v = 2").await;
    p.run("BEGIN; INSERT INTO silent VALUES (1); DELETE FROM whole; INSERT INTO silent VALUES (2); TRUNCATE page, whole; COMMIT").await;
    p.produce().await;

    let page = p.values("page").await;
    let big = format!("\"{}\"", "é".repeat(3000));
    let short = |lines: Vec<String>| lines.iter().map(|l| l.replace(&big, "BIG")).collect::<Vec<_>>();
    assert_eq!(
        short(shown(&page, &["_op", "a", "b", "body", "n", "amount", "_old_key", "_unchanged"])),
        [
            r#"_op="c" a=1 b="x" body=BIG n=1.10 amount=1.10 _old_key=- _unchanged=-"#,
            r#"_op="c" a=2 b="y" body=null n=null amount=null _old_key=- _unchanged=-"#,
            r#"_op="u" a=1 b="x" body=- n=2.500 amount=1.10 _old_key=- _unchanged=["body"]"#,
            r#"_op="u" a=1 b="z" body=- n=2.500 amount=1.10 _old_key={"a":1,"b":"x"} _unchanged=["body"]"#,
            r#"_op="u" a=1 b="z" body="short" n=2.500 amount=1.10 _old_key=- _unchanged=-"#,
            r#"_op="d" a=2 b="y" body=null n=null amount=null _old_key=- _unchanged=-"#,
            r#"_op="t" a=- b=- body=- n=- amount=- _old_key=- _unchanged=-"#,
        ]
    );
    let whole = p.values("whole").await;
    let full = format!("\"{}\"", "w".repeat(3000));
    assert_eq!(
        shown(&whole, &["_op", "id", "body", "v", "_unchanged"]),
        [
            format!(r#"_op="c" id=1 body={full} v=1 _unchanged=-"#),
            format!(r#"_op="u" id=1 body={full} v=2 _unchanged=-"#),
            format!(r#"_op="d" id=1 body={full} v=2 _unchanged=-"#),
            r#"_op="t" id=- body=- v=- _unchanged=-"#.to_owned(),
        ]
    );
    // Rows of a table that is not published take no ordinal.
    let ordinals = |events: &[String]| events.iter().map(|e| id(e)[17..].to_owned()).collect::<Vec<_>>();
    assert_eq!(ordinals(&page)[..2], ["0000000000", "0000000001"]);
    assert_eq!(
        (&ordinals(&whole)[2..], &ordinals(&page)[6..]),
        (&["0000000000".into(), "0000000002".into()][..], &["0000000001".into()][..])
    );
    let records = p.records("page").await;
    let keys: BTreeMap<_, _> =
        records.iter().map(|r| (id(&r.value)[..].to_owned(), (r.key.clone(), r.partition))).collect();
    let keys: Vec<_> = keys.into_values().collect();
    assert_eq!(keys[0].0.as_deref(), Some(r#"["1","x"]"#));
    assert_eq!(keys[6], (None, 0));
    for (table, values) in [("page", page), ("whole", whole)] {
        let rows: Vec<_> = p
            .rows(table)
            .iter()
            .map(|row| row.replace("\"n\":\"1.10\"", "\"n\":1.10").replace("\"n\":\"2.500\"", "\"n\":2.500"))
            .collect();
        assert_same(&format!("archive, {table}"), &rows, &values);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_sees_earlier_changes_of_its_own_transaction_and_no_later_ones() {
    let p = Pipeline::new("fold").await;
    let content = "00000000-0000-0000-0000-00000000000a";
    p.run(&format!(
        "BEGIN;
         INSERT INTO engagement_events (content_id, event_ts) VALUES (NULL, now());
         INSERT INTO content VALUES ('{content}', 's', 'one', 'podcast', 100, now());
         INSERT INTO engagement_events (content_id, event_ts, duration_ms) VALUES ('{content}', now(), 1005);
         UPDATE content SET title = 'two', length_seconds = 0;
         INSERT INTO engagement_events (content_id, event_ts, duration_ms) VALUES ('{content}', now(), 900);
         COMMIT;"
    ))
    .await;
    p.run("ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey").await;
    p.run("BEGIN; UPDATE engagement_events SET duration_ms = -500 WHERE id = 2; TRUNCATE content; UPDATE engagement_events SET duration_ms = 1 WHERE id = 3; COMMIT").await;
    p.produce().await;
    let names = ["_op", "title", "length_seconds", "engagement_seconds", "engagement_pct"];
    let expected = [
        r#"_op="c" title=null length_seconds=null engagement_seconds=null engagement_pct=null"#,
        r#"_op="c" title="one" length_seconds=100 engagement_seconds=1.005 engagement_pct=0.01"#,
        r#"_op="c" title="two" length_seconds=0 engagement_seconds=0.900 engagement_pct=null"#,
        r#"_op="u" title="two" length_seconds=0 engagement_seconds=-0.500 engagement_pct=null"#,
        r#"_op="u" title=null length_seconds=null engagement_seconds=0.001 engagement_pct=null"#,
    ];
    assert_eq!(shown(&p.values("engagement_events").await, &names), expected);
    assert_eq!(shown(&p.rows("engagement_events"), &names), expected);
}

/// One commit of `rows` events; gives the LSN of its commit record and the record's end.
async fn commit(p: &Pipeline, rows: u32) -> (Lsn, Lsn) {
    p.run(&format!(
        "INSERT INTO engagement_events (event_ts, duration_ms) SELECT now(), g FROM generate_series(1, {rows}) AS g"
    ))
    .await;
    let peeked = "FROM pg_logical_slot_peek_binary_changes((current_database() || '_peek')::name, NULL, NULL, 'proto_version', '1', 'publication_names', 'falaj')";
    let at = |from: u32| {
        format!(
            "SELECT '0/0'::pg_lsn + ('x' || encode(substring(data FROM {from} FOR 8), 'hex'))::bit(64)::bigint {peeked} WHERE get_byte(data, 0) = 67 ORDER BY lsn DESC LIMIT 1"
        )
    };
    (p.text(&at(3)).await.parse().unwrap(), p.text(&at(11)).await.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn until_lsn_takes_exactly_the_transactions_that_end_there() {
    let p = Pipeline::new("until").await;
    p.run("SELECT pg_create_logical_replication_slot(current_database() || '_peek', 'pgoutput')").await;
    let (_, first) = commit(&p, 1).await;
    let (second_at, second) = commit(&p, 2).await;
    let (third_at, third) = commit(&p, 3).await;
    commit(&p, 4).await;
    let count = async || (p.values("engagement_events").await.len(), p.rows("engagement_events").len());
    // The end of a record; one byte short of it; its start; the middle of a commit record; and again.
    for (lsn, rows) in [
        (first, 1),
        (Lsn(second.0 - 1), 1),
        (second_at, 1),
        (Lsn(second_at.0 + 20), 1),
        (second, 3),
        (second, 3),
        (Lsn(third.0 - 8), 3),
        (Lsn(third_at.0 + 34), 3),
        (third, 6),
    ] {
        p.produce_until(lsn, &[]).await;
        assert_eq!(count().await, (rows, rows), "until {lsn}");
        assert!(p.confirmed().await <= lsn);
    }
    assert_eq!(p.confirmed().await, third);
    p.produce().await;
    assert_eq!(count().await, (10, 10));
}

#[tokio::test(flavor = "multi_thread")]
async fn until_lsn_waits_for_a_server_that_has_not_got_there() {
    let p = Pipeline::new("wait").await;
    let goal = Lsn(p.lsn().await.0 + (256 << 10));
    let mut produce = p.start(&["produce", "--until-lsn", &goal.to_string()]);
    p.streams("").await;
    let mut written = 0;
    while p.lsn().await < goal {
        assert!(produce.runs());
        p.run("INSERT INTO engagement_events (event_ts, device) SELECT now(), repeat('x', 500) FROM generate_series(1, 50)").await;
        written += 50;
    }
    produce.ends_well().await;
    let values = p.values("engagement_events").await;
    assert_same("archive", &p.rows("engagement_events"), &values);
    // The transaction that crosses the goal is left out, every one before it is in.
    assert_eq!(values.len(), written - 50);
    assert!(p.confirmed().await <= goal);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_left_out_for_a_run_holds_the_acknowledgement() {
    let p = Pipeline::new("leftout").await;
    let begin = p.confirmed().await;
    load::changes(&p).await;
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 500)").await;
    let lsn = p.lsn().await;
    p.produce_until(lsn, &["--sinks", "kafka"]).await;
    let values = p.values("engagement_events").await;
    assert_eq!((values.len(), archive::batches(&p.archive()).len(), p.confirmed().await), (520, 0, begin));
    p.produce_until(lsn, &["--sinks", "archive"]).await;
    assert_same("archive", &p.rows("engagement_events"), &values);
    assert_same("kafka", &p.values("engagement_events").await, &values);
    p.produce_until(lsn, &[]).await;
    assert_eq!((p.values("engagement_events").await.len(), p.rows("engagement_events").len()), (520, 520));
    assert_eq!(p.confirmed().await, lsn);
}

#[tokio::test(flavor = "multi_thread")]
async fn binary_and_text_streams_give_the_same_bytes() {
    let binary = Pipeline::bare(Servers::shared(), "forms").await;
    binary
        .run(
            "CREATE TABLE every (id bigint PRIMARY KEY, i2 smallint, f4 real, f8 double precision, n numeric, amount numeric(12,3),
                 b boolean, d date, t timestamp, tz timestamptz, u uuid, js json, jb jsonb, txt text, v varchar(9), c char(4), ia int[], ta text[], by bytea);
             CREATE TABLE address (id int PRIMARY KEY, a inet);
             CREATE PUBLICATION falaj FOR TABLE every;
             CREATE PUBLICATION falaj_text FOR TABLE every, address",
        )
        .await;
    binary.init().await;
    let text = binary.sibling("text", "falaj_text").await;
    binary
        .run(
            r#"INSERT INTO every VALUES
             (1, -32768, 1.5, 0.1, 1.10, 12345.100, true, '2024-02-29', '2024-02-29 12:00:00.000001', '2024-02-29 12:00:00.5+03', 'c0ffee00-0000-4000-8000-000000000001', '{"b": 1.10, "a":[ ]}', '{"b": 1.10, "a":[ ]}', E'tab\there "q" \\ \u0001 é 🎧', 'web‑saf', 'ab', '{{1,NULL},{3,4}}', '{"a,b",NULL,"NULL"}', '\xdeadbeef'),
             (2, 32767, 'NaN', '-Infinity', 'NaN', -0.001, false, 'infinity', '-infinity', 'infinity', NULL, 'null', 'null', '', '', '', '{}', '{}', ''),
             (3, 0, '-0', 1e300, 123456789012345678901234567890.123456789, 0, NULL, '0044-03-15 BC', '0044-03-15 10:00:00 BC', '0001-01-01 00:00:00+00', NULL, '"x"', '1e2', 'x', NULL, NULL, NULL, NULL, NULL),
             (9223372036854775807, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)"#,
        )
        .await;
    binary.run("UPDATE every SET n = -n, f8 = f8 / 3, f4 = f4 / 3 WHERE id < 4; DELETE FROM every WHERE id = 3").await;
    let lsn = binary.lsn().await;
    binary.produce_until(lsn, &[]).await;
    text.produce_until(lsn, &[]).await;
    let values = binary.values("every").await;
    assert_eq!(values.len(), 8);
    assert_same("kafka", &text.values("every").await, &values);
    let batch = |p: &Pipeline| archive::table(&p.archive(), "every");
    assert_eq!(batch(&text), batch(&binary));
    let names = ["f4", "n", "amount", "d", "t", "tz", "jb", "ia"];
    assert_eq!(
        shown(&values[..3], &names),
        [
            r#"f4=1.5 n=1.10 amount=12345.100 d="2024-02-29" t="2024-02-29T12:00:00.000001" tz="2024-02-29T09:00:00.500000Z" jb={"a": [], "b": 1.10} ia=[[1,null],[3,4]]"#,
            r#"f4="NaN" n="NaN" amount=-0.001 d="infinity" t="-infinity" tz="infinity" jb=null ia=[]"#,
            r#"f4=-0 n=123456789012345678901234567890.123456789 amount=0.000 d="0044-03-15 BC" t="0044-03-15 10:00:00 BC" tz="0001-01-01T00:00:00.000000Z" jb=100 ia=null"#,
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_range_again_gives_the_same_bytes() {
    let mut p = Pipeline::new("again").await;
    let other = p.sibling("other", "falaj").await;
    p.run("SELECT pg_copy_logical_replication_slot(current_database()::name, current_database() || '_mark')").await;
    load::mixed(&p, 3000, 5).await;
    let lsn = p.produce().await;
    other.produce_until(lsn, &[]).await;
    for table in check::TABLES {
        assert_same(table, &other.values(table).await, &p.values(table).await);
        assert_same(table, &other.rows(table), &p.rows(table));
    }
    let before = archive::files(&p.archive());
    assert_eq!(before.len(), 2);
    // The same slot at its old place, and an empty archive.
    p.run("SELECT pg_drop_replication_slot(current_database()::name)").await;
    p.run("SELECT pg_copy_logical_replication_slot(current_database() || '_mark', current_database()::name)").await;
    std::fs::remove_dir_all(p.archive()).unwrap();
    p.set("FALAJ_PRODUCE__SINKS", "archive");
    p.produce_until(lsn, &[]).await;
    assert!(archive::files(&p.archive()) == before, "the files differ");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drains_acknowledges_and_exits_0() {
    let p = Pipeline::with_oracle(Servers::shared(), "drain").await;
    let produce = p.start(&["produce"]);
    p.streams("").await;
    load::mixed(&p, 2000, 3).await;
    let lsn = p.lsn().await;
    let all = oracle::expected(&p, "engagement_events", lsn).await.events.len();
    until("Kafka has all", async || p.records("engagement_events").await.len() == all).await;
    assert_eq!(p.rows("engagement_events").len(), 0);
    produce.drains().await;
    assert!(p.confirmed().await >= lsn);
    check::produced(&p, lsn).await;
    p.produce().await;
    check::produced(&p, lsn).await;
}

/// 600 kB a change: the log grows past what one session keeps.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_lookup_log_becomes_a_new_base_while_the_stream_runs() {
    const CHANGES: usize = 170;
    let content = "00000000-0000-0000-0000-00000000000a";
    let p = Pipeline::new("longlog").await;
    p.run(&format!("INSERT INTO content VALUES ('{content}', 's', 'one', 'podcast', 100, now())")).await;
    let event = format!("INSERT INTO engagement_events (content_id, event_ts) VALUES ('{content}', now())");
    let mut produce = p.start(&["produce"]);
    let mut expected = Vec::new();
    for change in 0..CHANGES {
        p.run(&format!("UPDATE content SET title = repeat('x', 600000) || {change}")).await;
        if change % 10 == 0 {
            p.run(&event).await;
            expected.push(format!("x{change}"));
        }
    }
    produce.says("another session makes a new base").await;
    let lsn = p.lsn().await;
    until("all is acknowledged", async || p.confirmed().await >= lsn).await;
    produce.drains().await;
    let log = std::fs::metadata(p.config.state.dir.join("changes.jsonl")).unwrap().len();
    assert!(log < 50_000_000, "{log} bytes of {} that were logged", CHANGES * 600_000);
    // Every event has the row of its own moment.
    let titles = |values: Vec<String>| values.iter().map(|v| shown_end(v, "title")).collect::<Vec<_>>();
    assert_eq!(titles(p.values("engagement_events").await), expected);
    assert_eq!(titles(p.rows("engagement_events")), expected);
}

/// What stands in a text behind its many x, and the last of these.
fn shown_end(event: &str, name: &str) -> String {
    let text: String = serde_json::from_str(fields(event)[name].get()).unwrap();
    format!("x{}", text.trim_start_matches('x'))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_at_once_with_1() {
    let mut p = Pipeline::new("twice").await;
    // A broker that takes connections and never answers holds the drain back.
    let hole = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    p.set("FALAJ_KAFKA__BOOTSTRAP_SERVERS", &hole.local_addr().unwrap().to_string());
    let produce = p.start(&["produce"]);
    p.streams("").await;
    let mut produce = produce;
    produce.signal("-TERM");
    produce.says("a second signal ends at once").await;
    produce.signal("-TERM");
    assert_eq!(produce.end().await.code, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_produce_waits_writes_nothing_and_takes_over() {
    let p = Pipeline::with_oracle(Servers::shared(), "standby").await;
    let first = p.start(&["produce"]);
    let holder = p.streams("").await;
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 100)").await;
    until("the first has it", async || p.records("engagement_events").await.len() == 100).await;
    let began = Instant::now();
    let mut second = p.start(&["produce"]);
    second.says(&format!("slot in use by pid {holder}, waiting")).await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    // The first is not fenced: it goes on.
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 100)").await;
    until("the first goes on", async || p.records("engagement_events").await.len() == 200).await;
    assert_eq!(p.reader().await, holder);
    first.kill();
    p.streams(&holder).await;
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 100)").await;
    until("the second takes over", async || p.records("engagement_events").await.len() == 300).await;
    let lsn = p.lsn().await;
    second.drains().await;
    assert_eq!(check::produced(&p, lsn).await, 300);
}

/// A transaction of somebody else (the lane of a killed backfill, say) hides the positions that are stored behind it.
#[tokio::test(flavor = "multi_thread")]
async fn a_position_behind_an_open_transaction_is_waited_for() {
    let mut p = Pipeline::new("behind_open").await;
    p.set("FALAJ_ARCHIVE__SEAL_AFTER", "1h");
    let insert = async || {
        p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 100)").await;
    };
    insert().await;
    let running = p.start(&["produce"]);
    let kafka_has =
        async |count| until("Kafka has them", async || p.records("engagement_events").await.len() == count).await;
    kafka_has(100).await;
    let open = kafka::open_transaction(&p.config, &p.config.checkpoint_topic(), 1).await;
    insert().await;
    kafka_has(200).await;
    running.kill();
    let mut next = p.start(&["produce"]);
    next.says("waiting for open transactions").await;
    next.drains().await;
    let mut next = p.start(&["produce"]);
    next.says("waiting for open transactions").await;
    insert().await;
    tokio::task::spawn_blocking(move || open.abort_transaction(DEADLINE).unwrap()).await.unwrap();
    kafka_has(300).await;
    next.drains().await;
    let values = p.values("engagement_events").await;
    assert_eq!(values.len(), 300);
    assert_same("archive", &p.rows("engagement_events"), &values);
}

/// A process of the server that stands still until this is dropped.
struct Stopped(String);

impl Stopped {
    fn new(pid: String) -> Self {
        let stopped = Self(pid);
        stopped.signal("-STOP");
        stopped
    }

    fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.0]).status().unwrap().success());
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.signal("-CONT");
    }
}

/// The broker would roll back what stays open for longer than `transaction.timeout.ms`, and fence the producer.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_whose_next_rows_take_long_is_not_left_open() {
    const ROWS: usize = 100_000;
    let mut p = Pipeline::new("slowrows").await;
    p.set("FALAJ_PRODUCE__TRANSACTION_BYTES", "1GiB");
    p.set("FALAJ_KAFKA__TRANSACTION_TIMEOUT_MS", "3000");
    p.set("FALAJ_KAFKA__MESSAGE_TIMEOUT_MS", "3000");
    p.run(&format!(
        "INSERT INTO engagement_events (event_ts, duration_ms) SELECT now(), g FROM generate_series(1, {ROWS}) AS g"
    ))
    .await;
    let lsn = p.lsn().await;
    let produce = p.start(&["produce", "--until-lsn", &lsn.to_string()]);
    let sender = p.streams("").await;
    let topic = p.config.topic("engagement_events");
    until("rows are in Kafka", async || kafka::ends_of_all(&p.config, &topic).await.iter().sum::<i64>() > 0).await;
    let stopped = Stopped::new(sender);
    let checkpoints = async || kafka::records(&p.config, &p.config.checkpoint_topic()).await;
    until("what has come is committed", async || !checkpoints().await.is_empty()).await;
    let stored = checkpoints().await.pop().unwrap();
    let readable = p.records("engagement_events").await.len();
    assert!(stored.value.contains("\"position\":{") && (1..ROWS).contains(&readable), "{readable} {stored:?}");
    drop(stopped);
    produce.ends_well().await;
    let found: Vec<_> =
        p.values("engagement_events").await.iter().map(|v| number(v, "duration_ms").to_string()).collect();
    assert_same("kafka", &found, &(1..=ROWS).map(|n| n.to_string()).collect::<Vec<_>>());
    assert_eq!(p.confirmed().await, lsn);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_is_fenced_and_doubles_nothing() {
    let mut p = Pipeline::with_oracle(Servers::shared(), "zombie").await;
    p.set("FALAJ_ARCHIVE__SEAL_AFTER", "1s");
    for round in 1..=3 {
        let first = p.start(&["produce"]);
        let holder = p.streams("").await;
        let loading = p.start(&["generate", "--count", "6000", "--rate", "2000", "--seed", &round.to_string()]);
        p.flows().await;
        first.signal("-STOP");
        let second = p.start(&["produce"]);
        p.run(&format!("SELECT pg_terminate_backend({holder})")).await;
        p.streams(&holder).await;
        first.signal("-CONT");
        loading.ends_well().await;
        let lsn = p.lsn().await;
        let all = oracle::expected(&p, "engagement_events", lsn).await.events.len();
        until("the second has all", async || p.records("engagement_events").await.len() >= all).await;
        // The first has ended as fenced, or stands by; which of the two depends on what it was doing.
        first.signal("-TERM");
        let ended = first.end().await;
        assert!(ended.code == Some(0) || (ended.code == Some(1) && ended.log.contains("fenced")), "{ended:?}");
        second.drains().await;
        check::produced(&p, lsn).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_slot_follows_the_wal_of_other_tables() {
    let p = Pipeline::new("idle").await;
    p.run("CREATE TABLE elsewhere (t text)").await;
    let produce = p.start(&["produce"]);
    p.streams("").await;
    for _ in 0..2 {
        p.run("INSERT INTO elsewhere SELECT repeat('x', 1000) FROM generate_series(1, 500)").await;
        let lsn = p.lsn().await;
        until("the acknowledgement follows", async || p.confirmed().await >= lsn).await;
    }
    produce.drains().await;
    let ends = kafka::ends(&p.config, &check::TABLES.map(|t| p.config.topic(t))).await;
    assert_eq!((ends, archive::batches(&p.archive())), (vec![0; 6], vec![]));
    // What was stored when idle is a position to start from.
    p.run("INSERT INTO engagement_events (event_ts) VALUES (now())").await;
    p.produce().await;
    assert_eq!((p.values("engagement_events").await.len(), p.rows("engagement_events").len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fast_shutdown_of_postgres_does_not_hang() {
    let stack = Stack::up("fast", &["postgres"]);
    let p = Pipeline::on(Servers::shared().with(stack.addresses()), "fast").await;
    p.run("CREATE TABLE elsewhere (t text)").await;
    let produce = p.start(&["produce"]);
    p.streams("").await;
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 100)").await;
    p.run("INSERT INTO elsewhere SELECT repeat('x', 1000) FROM generate_series(1, 500)").await;
    let began = Instant::now();
    stack.call(&["stop", "postgres"]);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    stack.call(&["up", "postgres"]);
    let p = p.reconnect().await;
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 100)").await;
    until("it streams again", async || p.records("engagement_events").await.len() == 200).await;
    produce.drains().await;
    let values = p.values("engagement_events").await;
    assert_same("archive", &p.rows("engagement_events"), &values);
}

/// A field that is a plain number.
fn number<'a>(event: &'a str, name: &str) -> &'a str {
    let at = event.find(&format!("\"{name}\":")).unwrap() + name.len() + 3;
    event[at..].split(',').next().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_big_transaction_in_pieces_survives_sigkill_exactly() {
    const ROWS: usize = 150_000;
    let mut p = Pipeline::new("big").await;
    p.set("FALAJ_PRODUCE__TRANSACTION_BYTES", "1MiB");
    p.set("FALAJ_ARCHIVE__SEAL_BYTES", "512KiB");
    // Short queues keep the faster sink near the slower one.
    p.set("FALAJ_PRODUCE__QUEUE_BYTES", "256KiB");
    p.run(&format!("INSERT INTO engagement_events (event_ts, duration_ms, device) SELECT now(), g, md5(g::text) FROM generate_series(1, {ROWS}) AS g")).await;
    let lsn = p.lsn().await;
    let batches = || archive::batches(&p.archive()).len();
    for _ in 0..2 {
        let before = batches();
        let produce = p.start(&["produce", "--until-lsn", &lsn.to_string()]);
        until("batches are sealed", async || batches() >= before + 2).await;
        produce.kill();
        // It stands within the one transaction.
        let stored = kafka::records(&p.config, &p.config.checkpoint_topic()).await.pop().unwrap();
        assert!(stored.value.contains("\"position\"") && p.confirmed().await < lsn, "{stored:?}");
    }
    p.produce_until(lsn, &[]).await;
    let values = p.values("engagement_events").await;
    let head = id(&values[0])[..16].to_owned();
    let found: Vec<_> =
        values.iter().map(|v| format!("{} {} {}", number(v, "id"), number(v, "duration_ms"), id(v))).collect();
    let expected: Vec<_> = (0..ROWS).map(|n| format!("{0} {0} {head}:{n:010}", n + 1)).collect();
    assert_same("kafka", &found, &expected);
    assert_same("archive", &p.rows("engagement_events"), &values);
    assert_eq!(p.confirmed().await, lsn);
}
