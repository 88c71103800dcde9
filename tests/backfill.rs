//! `falaj backfill` and `init --snapshot`: history beside the stream, each row once, whatever is written meanwhile.

mod fold;

use std::collections::BTreeMap;

use falaj::lsn::Lsn;
use serde_json::{Map, Value, json};

use crate::rig::stack::Stack;
use crate::rig::{POSTGRES, Pipeline, Servers, archive, assert_same, bigquery, connect, id, kafka, until};
use fold::{Writer, fold, source};

/// A table of so many rows that is published, and not yet in the stream: they are older than the slot.
async fn with_items(name: &str, rows: i64, columns: &str) -> Pipeline {
    with_items_on(Servers::shared(), name, rows, columns).await
}

async fn with_items_on(servers: Servers, name: &str, rows: i64, columns: &str) -> Pipeline {
    let p = Pipeline::bare(servers, name).await;
    p.run(include_str!("../sql/01_tables.sql")).await;
    p.run(&format!(
        "CREATE TABLE item ({columns}); ALTER TABLE item ALTER body SET STORAGE EXTERNAL;
         INSERT INTO item SELECT g, 0, CASE g % 50 WHEN 0 THEN repeat('é', 3000) WHEN 1 THEN NULL ELSE 'body ' || g END
             FROM generate_series(1, {rows}) AS g;
         ANALYZE item; CREATE PUBLICATION falaj FOR TABLE item, content, engagement_events"
    ))
    .await;
    p
}

const KEYED: &str = "id bigint PRIMARY KEY, v int NOT NULL, body text";
/// Not a primary key: it is cut by the place of its rows.
const UNIQUE: &str = "id bigint UNIQUE, v int NOT NULL, body text";
const KEYLESS: &str = "id bigint, v int NOT NULL, body text";

fn field(event: &str, name: &str) -> Value {
    serde_json::from_str::<Map<String, Value>>(event).unwrap().remove(name).unwrap_or_default()
}

fn of_op(events: &[String], op: &str) -> Vec<String> {
    events.iter().filter(|event| field(event, "_op") == op).cloned().collect()
}

/// The ids of rows, sorted.
fn keys(events: &[String]) -> Vec<i64> {
    let mut keys: Vec<_> = events.iter().map(|event| field(event, "id").as_i64().unwrap()).collect();
    keys.sort_unstable();
    keys
}

fn sorted(mut events: Vec<String>) -> Vec<String> {
    events.sort_by_cached_key(|event| id(event).to_owned());
    events
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_beside_a_writer_on_the_same_rows_folds_to_the_source() {
    let rows = 20_000;
    let p = with_items("bfold", rows, KEYED).await;
    p.init().await;
    let produce = p.start(&["produce"]);
    p.streams("").await;
    let writer = Writer::start(&p, rows, 7, true).await;
    let mut copy = p.start(&["backfill", "item", "--jobs", "3", "--rate", "10000"]);
    let mut most = 0;
    until("the copy has ended", async || {
        let ours = p.text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'falaj backfill' AND datname = current_database()").await;
        most = most.max(ours.parse().unwrap());
        !copy.runs()
    })
    .await;
    let told = copy.ends_well().await;
    let written = writer.stop().await;
    assert!(written > 100, "{written} transactions beside the copy");
    assert!((2..=3).contains(&most), "{most} connections");
    produce.drains().await;
    p.produce().await;
    let expected = source(&p).await;
    assert_eq!(fold(p.values("item").await), expected);
    assert_eq!(fold(p.rows("item")), expected);
    // Both sinks got the copy from the same pass: the same events.
    let (copied, archived) = (of_op(&p.values("item").await, "r"), sorted(of_op(&p.rows("item"), "r")));
    assert_same("copied rows", &archived, &copied);
    assert!(told.starts_with(&format!("item: {} rows in ", copied.len())), "{told}");
    let slots = p.text("SELECT count(*) FROM pg_replication_slots WHERE database = current_database()").await;
    assert_eq!(slots, "1");
}

/// The copy waits for a transaction that then rewrites what the copy reads, or what enriches it. Neither waits for the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_whose_tables_are_rewritten_while_its_snapshot_is_made_says_so() {
    let p = with_items("brewritten", 100, KEYED).await;
    p.init().await;
    for rewrite in ["ALTER TABLE item ALTER v TYPE bigint", "ALTER TABLE content ALTER length_seconds TYPE bigint"] {
        let other = connect(&p.env[POSTGRES]).await;
        other.batch_execute("SET lock_timeout = '60s'; BEGIN; SELECT pg_current_xact_id()").await.unwrap();
        let copy = p.start(&["backfill", "item"]);
        let making = "SELECT count(*) FROM pg_replication_slots WHERE temporary AND database = current_database()";
        until("a slot is being made", async || p.text(making).await == "1").await;
        other.batch_execute(&format!("{rewrite}; COMMIT")).await.unwrap();
        let ended = copy.end().await;
        assert!(ended.code == Some(78) && ended.log.contains("was rewritten or truncated"), "{rewrite}: {}", ended.log);
    }
    p.start(&["backfill", "item"]).ends_well().await;
    assert_eq!(keys(&of_op(&p.values("item").await, "r")), (1..=100).collect::<Vec<_>>());
}

/// A rewrite that waits for the lock of one session goes before another one has its own: behind it, that one would see no row.
#[tokio::test(flavor = "multi_thread")]
async fn a_rewrite_that_waits_for_a_copy_takes_no_row_from_it() {
    let p = with_items("bwaiting", 20_000, KEYED).await;
    p.init().await;
    let watch = connect(&p.env[POSTGRES]).await;
    let locks = async |granted: bool| -> i64 {
        let sql = "SELECT count(*) FROM pg_locks WHERE relation = 'public.item'::regclass AND granted = $1 \
                   AND mode = CASE WHEN granted THEN 'AccessShareLock' ELSE 'AccessExclusiveLock' END";
        watch.query_one(sql, &[&granted]).await.unwrap().get(0)
    };
    let mut copy = p.start(&["backfill", "item", "--jobs", "2"]);
    until("the copy has the lock", async || locks(true).await > 0).await;
    copy.signal("-STOP");
    let other = connect(&p.env[POSTGRES]).await;
    let rewrite = tokio::spawn(async move { other.batch_execute("ALTER TABLE item ALTER v TYPE bigint").await });
    until("the rewrite waits", async || locks(false).await > 0).await;
    copy.signal("-CONT");
    copy.says("it goes first").await;
    copy.ends_well().await;
    rewrite.await.unwrap().unwrap();
    p.produce().await;
    for copied in [p.values("item").await, p.rows("item")] {
        assert_eq!(keys(&of_op(&copied, "r")), (1..=20_000).collect::<Vec<_>>());
    }
}

/// Who makes a partition an hour need not hit the moment between two copies.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_made_while_the_snapshot_is_made_is_no_rewrite() {
    let p = Pipeline::bare(Servers::shared(), "bnewpart").await;
    p.run(include_str!("../sql/01_tables.sql")).await;
    p.run(
        "CREATE TABLE item (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
         CREATE TABLE item_1 PARTITION OF item FOR VALUES FROM (0) TO (500);
         CREATE PUBLICATION falaj FOR TABLE item, content WITH (publish_via_partition_root = true);
         INSERT INTO item SELECT g, 'v' FROM generate_series(1, 99) AS g",
    )
    .await;
    p.init().await;
    let other = connect(&p.env[POSTGRES]).await;
    other.batch_execute("SET lock_timeout = '60s'; BEGIN; SELECT pg_current_xact_id()").await.unwrap();
    let copy = p.start(&["backfill", "item"]);
    let making = "SELECT count(*) FROM pg_replication_slots WHERE temporary AND database = current_database()";
    until("a slot is being made", async || p.text(making).await == "1").await;
    let make = "CREATE TABLE item_2 PARTITION OF item FOR VALUES FROM (500) TO (1000); INSERT INTO item VALUES (500, 'v'); COMMIT";
    other.batch_execute(make).await.unwrap();
    copy.ends_well().await;
    p.produce().await;
    let (values, seen) = (p.values("item").await, p.rows("item"));
    assert_same("the same in both", &sorted(seen), &sorted(values.clone()));
    assert_eq!(keys(&of_op(&values, "r")), (1..=99).chain([500]).collect::<Vec<_>>());
}

/// Kills a copy again and again while it moves, until it ends by itself; slow enough, in rows a second, for a busy machine that looks
/// late.
async fn kill_and_go_on(p: &Pipeline, rate: &str) {
    let args = ["backfill", "item"];
    let topics = [p.config.checkpoint_topic(), p.config.topic("item")];
    let mut kills = 0;
    while kills < 6 {
        let mut copy = p.start(&[&args[..], &["--rate", rate]].concat());
        let before = kafka::ends(&p.config, &topics[..1]).await[0];
        until("the copy moves", async || kafka::ends(&p.config, &topics[..1]).await[0] > before + 6 || !copy.runs())
            .await;
        if !copy.runs() {
            copy.ends_well().await;
            break;
        }
        copy.kill();
        kills += 1;
    }
    assert!(kills >= 2, "killed {kills} times only: too fast for this test");
    p.start(&args).ends_well().await;
}

async fn killed(name: &str, columns: &str, alter: &str) {
    let rows = 40_000;
    let mut p = with_items(name, rows, columns).await;
    p.run(alter).await;
    p.set("FALAJ_PRODUCE__TRANSACTION_BYTES", "64KiB");
    p.set("FALAJ_ARCHIVE__SEAL_BYTES", "32KiB");
    p.init().await;
    kill_and_go_on(&p, "8000").await;
    let all: Vec<i64> = (1..=rows).collect();
    for (sink, events) in [("kafka", p.values("item").await), ("archive", p.rows("item"))] {
        assert_eq!(of_op(&events, "r").len(), events.len(), "{sink}");
        let mut ids: Vec<_> = events.iter().map(|event| id(event).to_owned()).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), events.len(), "{sink}: ids");
        assert!(keys(&events) == all, "{sink}: {} rows", events.len());
    }
    assert_eq!(fold(p.values("item").await), source(&p).await);
    assert_eq!(fold(p.rows("item")), source(&p).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_of_a_backfill_loses_and_doubles_no_row() {
    killed("bkill", KEYED, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_of_a_backfill_of_a_table_without_a_key_loses_and_doubles_no_row() {
    killed("bkillctid", KEYLESS, "").await;
}

/// A type with an order of its own, as extensions have them: that of `pg_catalog` for it is the other way round.
const OWN_ORDER: &str = "
    CREATE SCHEMA \"own order\"; SET search_path = \"own order\"; CREATE TYPE k AS (n bigint);
    CREATE FUNCTION lt(k, k) RETURNS bool LANGUAGE sql IMMUTABLE STRICT AS 'SELECT ($1).n > ($2).n';
    CREATE FUNCTION le(k, k) RETURNS bool LANGUAGE sql IMMUTABLE STRICT AS 'SELECT ($1).n >= ($2).n';
    CREATE FUNCTION eq(k, k) RETURNS bool LANGUAGE sql IMMUTABLE STRICT AS 'SELECT ($1).n = ($2).n';
    CREATE FUNCTION ge(k, k) RETURNS bool LANGUAGE sql IMMUTABLE STRICT AS 'SELECT ($1).n <= ($2).n';
    CREATE FUNCTION gt(k, k) RETURNS bool LANGUAGE sql IMMUTABLE STRICT AS 'SELECT ($1).n < ($2).n';
    CREATE FUNCTION cmp(k, k) RETURNS int LANGUAGE sql IMMUTABLE STRICT AS 'SELECT pg_catalog.btint8cmp(($2).n, ($1).n)';
    CREATE OPERATOR < (LEFTARG = k, RIGHTARG = k, FUNCTION = lt); CREATE OPERATOR <= (LEFTARG = k, RIGHTARG = k, FUNCTION = le);
    CREATE OPERATOR = (LEFTARG = k, RIGHTARG = k, FUNCTION = eq); CREATE OPERATOR >= (LEFTARG = k, RIGHTARG = k, FUNCTION = ge);
    CREATE OPERATOR > (LEFTARG = k, RIGHTARG = k, FUNCTION = gt);
    CREATE OPERATOR CLASS k_ops DEFAULT FOR TYPE k USING btree AS OPERATOR 1 \"own order\".< , OPERATOR 2 \"own order\".<= ,
        OPERATOR 3 \"own order\".= , OPERATOR 4 \"own order\".>= , OPERATOR 5 \"own order\".> , FUNCTION 1 cmp(k, k);
    SET search_path = public; ALTER TABLE item ADD k \"own order\".k; ALTER TABLE item REPLICA IDENTITY FULL;
    UPDATE item SET k = ROW(id), v = id % 5; ALTER TABLE item REPLICA IDENTITY DEFAULT;";

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_of_a_backfill_by_a_key_with_an_order_of_its_own_loses_and_doubles_no_row() {
    killed("bkillown", KEYLESS, &format!("{OWN_ORDER} ALTER TABLE item ADD PRIMARY KEY (k)")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_of_a_backfill_by_several_columns_one_with_an_order_of_its_own_loses_and_doubles_no_row() {
    killed("bkillowns", KEYLESS, &format!("{OWN_ORDER} ALTER TABLE item ADD PRIMARY KEY (v, k, id)")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_of_a_backfill_by_a_uuid_and_a_text_loses_and_doubles_no_row() {
    // The texts begin with a backslash, and the database takes it for an escape.
    let key = r"ALTER TABLE item ADD u uuid, ADD t text, REPLICA IDENTITY FULL;
        UPDATE item SET u = md5((id / 30)::text)::uuid, t = chr(92) || chr(97 + (id % 30)::int) || id;
        ALTER TABLE item ADD PRIMARY KEY (u, t), REPLICA IDENTITY DEFAULT;
        DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET standard_conforming_strings = off', current_database()); END $$";
    killed("bkilluuid", KEYLESS, key).await;
}

async fn killed_beside_a_writer(name: &str, columns: &str, moves: bool) {
    let rows = 20_000;
    let mut p = with_items(name, rows, columns).await;
    p.set("FALAJ_PRODUCE__TRANSACTION_BYTES", "64KiB");
    p.set("FALAJ_ARCHIVE__SEAL_BYTES", "32KiB");
    p.run("ALTER TABLE item REPLICA IDENTITY FULL").await;
    p.init().await;
    let writer = Writer::start(&p, rows, 11, moves).await;
    kill_and_go_on(&p, "4000").await;
    writer.stop().await;
    p.produce().await;
    let expected = source(&p).await;
    assert_eq!(fold(p.values("item").await), expected);
    assert_eq!(fold(p.rows("item")), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_copy_beside_a_writer_folds_to_the_source() {
    killed_beside_a_writer("bkillw", KEYED, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_copy_by_place_beside_a_writer_folds_to_the_source() {
    killed_beside_a_writer("bkillp", UNIQUE, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_copy_goes_on_where_it_was() {
    let rows = 20_000;
    let p = with_items("bdrain", rows, KEYED).await;
    p.init().await;
    let args = ["backfill", "item", "--rate", "5000"];
    let copy = p.start(&args);
    let topic = [p.config.topic("item")];
    until("rows come", async || kafka::ends(&p.config, &topic).await.iter().sum::<i64>() > 500).await;
    copy.signal("-TERM");
    let told = copy.ends_well().await;
    assert!(told.starts_with("stopped after "), "{told}");
    let stored = p.rows("item").len();
    assert!((500..20_000).contains(&stored), "{stored}");
    until("Kafka has as many", async || p.values("item").await.len() == stored).await;
    let status = copied(&p).await;
    assert_eq!(
        (&status["table"], &status["finished"], &status["rows"]),
        (&json!("item"), &json!(false), &json!(stored))
    );
    let other = p.start(&["backfill", "item", "--where", "id > 5"]).end().await;
    assert!(other.code == Some(78) && other.log.contains("unfinished backfill without --where"), "{}", other.log);
    p.start(&["backfill", "item"]).ends_well().await;
    let all: Vec<i64> = (1..=rows).collect();
    assert!(keys(&p.values("item").await) == all && keys(&p.rows("item")) == all);
    let status = copied(&p).await;
    assert_eq!(
        (&status["finished"], &status["rows"], &status["ranges_done"]),
        (&json!(true), &json!(rows), &status["ranges"])
    );
}

/// What `status` says of the one table that is copied.
async fn copied(p: &Pipeline) -> Value {
    let status: Value = serde_json::from_str(&p.start(&["status", "--json"]).ends_well().await).unwrap();
    assert_eq!(status["backfill"].as_array().unwrap().len(), 1, "{status}");
    status["backfill"][0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn where_chooses_the_rows_and_what_cannot_be_copied_is_refused() {
    let p = with_items("bwhere", 20_000, KEYED).await;
    p.init().await;
    let told = p.start(&["backfill", "item", "--where", "id % 3 = 0 OR body IS NULL", "--jobs", "1"]).ends_well().await;
    let expected: Vec<i64> = (1..=20_000).filter(|id| id % 3 == 0 || id % 50 == 1).collect();
    assert!(told.starts_with(&format!("item: {} rows in ", expected.len())), "{told}");
    assert_eq!(keys(&p.values("item").await), expected);
    assert_eq!(keys(&p.rows("item")), expected);
    for (args, words) in [
        (&["backfill", "nothing"][..], "not \"nothing\""),
        (&["backfill", "item", "--where", "id >"], "--where \"id >\""),
        (&["backfill", "item", "--where", "nowhere = 1"], "column \"nowhere\" does not exist"),
    ] {
        let ended = p.start(args).end().await;
        assert!(ended.code == Some(78) && ended.log.contains(words), "{args:?}: {:?} {}", ended.code, ended.log);
    }
    assert_eq!(keys(&p.values("item").await), expected);
    assert_eq!(p.start(&["backfill", "item", "--jobs", "0"]).end().await.code, Some(2));
}

/// A database may bound what a GIN index answers, and it then leaves rows out at random.
#[tokio::test(flavor = "multi_thread")]
async fn where_that_an_index_serves_leaves_no_row_out() {
    let p = with_items("bgin", 20_000, KEYED).await;
    p.run(
        "ALTER TABLE item ADD tags text[]; UPDATE item SET tags = ARRAY['tag ' || id % 20, 'all'];
           CREATE INDEX ON item USING gin (tags) WITH (fastupdate = off); ANALYZE item",
    )
    .await;
    for setting in ["gin_fuzzy_search_limit = 10", "enable_seqscan = off", "enable_indexscan = off"] {
        p.run(&format!("ALTER DATABASE {} SET {setting}", p.name)).await;
    }
    p.init().await;
    p.start(&["backfill", "item", "--where", "tags @> '{tag 7}'"]).ends_well().await;
    let expected: Vec<i64> = (1..=20_000).filter(|id| id % 20 == 7).collect();
    assert_eq!((keys(&p.values("item").await), keys(&p.rows("item"))), (expected.clone(), expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn init_snapshot_has_each_row_once_as_read_or_as_inserted() {
    let rows = 20_000;
    let p = with_items("bsnap", rows, KEYED).await;
    p.run(include_str!("../sql/04_sample_content.sql")).await;
    let contents = p.text("SELECT count(*) FROM content").await;
    p.run("INSERT INTO engagement_events (content_id, event_ts, duration_ms) SELECT id, now(), 900 FROM content").await;
    let writer = connect_and_insert(&p, rows).await;
    let init = p.start(&["init", "--yes", "--snapshot"]).ends_well().await;
    let last = writer.stop().await;
    assert!(init.contains("item: ") && init.ends_with("done\n"), "{init}");
    p.produce().await;
    let all: Vec<i64> = (1..=last).collect();
    for events in [p.values("item").await, p.rows("item")] {
        assert!(keys(&events) == all, "{} events of {last} rows", events.len());
        let read = of_op(&events, "r").len() as i64;
        assert!(read >= rows && read + of_op(&events, "c").len() as i64 == last, "{read} read");
    }
    assert_eq!(p.values("content").await.len().to_string(), contents);
    let titles = p.values("engagement_events").await.iter().filter(|e| field(e, "title").is_string()).count();
    assert_eq!(titles.to_string(), contents);
    // Everything is there now.
    let again = p.start(&["init", "--yes", "--snapshot"]).ends_well().await;
    assert!(again.ends_with("everything is there: nothing to do\n"), "{again}");
    assert!(keys(&p.values("item").await) == all);
}

#[tokio::test(flavor = "multi_thread")]
async fn init_snapshot_that_is_killed_goes_on_and_folds_to_the_source() {
    let rows = 40_000;
    let mut p = with_items("bsnapkill", rows, KEYED).await;
    p.set("FALAJ_PRODUCE__TRANSACTION_BYTES", "64KiB");
    p.set("FALAJ_ARCHIVE__SEAL_BYTES", "32KiB");
    let (args, checkpoints) = (["init", "--yes", "--snapshot"], [p.config.checkpoint_topic()]);
    let begun = async || kafka::ends(&p.config, &checkpoints).await.first().is_some_and(|end| *end > 6);
    p.start(&args).killed_midway(begun).await;
    p.run("INSERT INTO item VALUES (40001, 0, 'new'); UPDATE item SET v = 1 WHERE id % 1000 = 0; DELETE FROM item WHERE id = 7").await;
    let told = p.start(&args).ends_well().await;
    assert!(told.ends_with("done\n"), "{told}");
    p.produce().await;
    let expected = source(&p).await;
    assert_eq!(expected.len(), 40_000);
    assert_eq!(fold(p.values("item").await), expected);
    assert_eq!(fold(p.rows("item")), expected);
}

/// Rows that were deleted since the first copy would stay for ever, and the others come twice.
#[tokio::test(flavor = "multi_thread")]
async fn init_snapshot_is_not_begun_anew_over_the_rows_of_a_slot_that_is_gone() {
    let mut p = with_items("bsnapgone", 10, KEYED).await;
    p.start(&["init", "--yes", "--snapshot"]).ends_well().await;
    p.run(&format!("SELECT pg_drop_replication_slot('{}'); DELETE FROM item WHERE id = 7", p.name)).await;
    for (sink, word) in [("kafka", "kafka has rows"), ("archive", "archive has rows")] {
        p.set("FALAJ_PRODUCE__SINKS", sink);
        let again = p.start(&["init", "--yes", "--snapshot"]).end().await;
        assert!(again.code == Some(78) && again.log.contains(word), "{}", again.log);
    }
    assert_eq!(keys(&p.values("item").await), (1..=10).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn init_snapshot_of_a_slot_that_exists_is_refused() {
    let p = with_items("bsnaplate", 10, KEYED).await;
    p.init().await;
    let late = p.start(&["init", "--yes", "--snapshot"]).end().await;
    assert!(late.code == Some(78) && late.log.contains("falaj backfill"), "{}", late.log);
    assert_eq!(p.values("item").await, [""; 0]);
}

/// Inserts rows one by one, in the order of their ids.
struct Inserts(std::sync::Arc<std::sync::atomic::AtomicBool>, tokio::task::JoinHandle<i64>);

async fn connect_and_insert(p: &Pipeline, after: i64) -> Inserts {
    let client = connect(&p.config.postgres.url).await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = std::sync::Arc::clone(&stop);
    Inserts(
        stop,
        tokio::spawn(async move {
            let mut last = after;
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                last += 1;
                client.execute("INSERT INTO item VALUES ($1, 0, 'new')", &[&last]).await.unwrap();
            }
            last
        }),
    )
}

impl Inserts {
    /// Gives the last id.
    async fn stop(self) -> i64 {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
        self.1.await.unwrap()
    }
}

/// Types of every wire form, in rows that the stream has brought too.
const ZOO: &str = "
    CREATE TYPE mood AS ENUM ('glad', 'sad');
    CREATE TYPE pair AS (a int, b text);
    CREATE DOMAIN yes AS bool;
    CREATE TABLE item (
        a int, b text, i2 smallint, f8 double precision, n numeric, n2 numeric(6,2), flag bool, y yes, c5 char(5),
        js json, jb jsonb, u uuid, d date, ts timestamp, tz timestamptz, by bytea, net inet, m mood, p pair, ints int[],
        texts text[][], bools bool[], iv interval, r int4range, x xml, PRIMARY KEY (b, a));
    CREATE PUBLICATION falaj FOR TABLE item, content, engagement_events";
const ZOO_ROWS: &str = "INSERT INTO item VALUES
    (1, 'é''\"\\', -3, 1e-7, 'NaN', 2.50, true, true, 'ab', '{\"a\" : 1.10}', '{\"a\": 1.10}',
        '11111111-2222-3333-4444-555555555555', 'infinity', '2026-01-01 01:02:03.4', '0044-03-15 BC', '\\x00ff', '10.0.0.1', 'sad',
        '(1,\"x,y\")', '{1,NULL}', '{{a,\"b,c\"},{NULL,\"\"}}', '{t,f}', '1 day 02:00', '[1,5)', '<a>1</a>'),
    (2, E'tab\\tline\\n', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
        NULL, NULL, NULL, NULL, NULL),
    (3, '', 0, '-0', '-Infinity', 0, false, false, '', 'null', 'null', NULL, '4713-01-01 BC', '-infinity', 'infinity', '',
        '::1/64', 'glad', '(,)', '{}', '{}', '[0:1]={t,NULL}', '-1 mon', 'empty', NULL)";

/// An event without what tells when it was and why it came.
fn bare(event: &str) -> String {
    let cut = event.find(",\"_id\":").unwrap();
    event[..cut].to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_row_has_the_bytes_of_its_insert_and_lies_directly_below_its_snapshot() {
    let p = Pipeline::bare(Servers::shared(), "bbytes").await;
    p.run(include_str!("../sql/01_tables.sql")).await;
    p.run(ZOO).await;
    p.init().await;
    p.run(ZOO_ROWS).await;
    p.run(include_str!("../sql/04_sample_content.sql")).await;
    p.run("INSERT INTO engagement_events (content_id, event_ts, duration_ms) SELECT id, now(), 900 FROM content").await;
    // Not yet streamed: the copy is of a later place than the sinks have reached.
    for table in ["item", "engagement_events", "content"] {
        p.start(&["backfill", table]).ends_well().await;
    }
    p.run("UPDATE content SET title = title || '!'; DELETE FROM item WHERE a = 2").await;
    let lsn = p.produce().await;
    for table in ["item", "engagement_events", "content"] {
        for events in [p.values(table).await, sorted(p.rows(table))] {
            let (mut read, mut inserted) = (of_op(&events, "r"), of_op(&events, "c"));
            for events in [&mut read, &mut inserted] {
                events.sort_by_cached_key(|event| bare(event));
            }
            let bodies = |events: &[String]| events.iter().map(|event| bare(event)).collect::<Vec<_>>();
            assert!(!read.is_empty());
            assert_same(table, &bodies(&read), &bodies(&inserted));
            for event in &read {
                let at: Lsn = field(event, "_lsn").as_str().unwrap().parse().unwrap();
                assert!(at.0 % 8 == 7 && at < lsn, "{event}");
                let kind = field(event, "_table");
                assert_eq!(kind, table);
            }
            let (first, last) = (id(&read[0]).to_owned(), id(inserted.last().unwrap()).to_owned());
            assert!(first > last, "copied after its insert: {first} {last}");
            let later: Vec<_> =
                events.iter().filter(|e| ["u", "d"].contains(&field(e, "_op").as_str().unwrap())).collect();
            assert!(later.iter().all(|event| id(event) > &*first), "changes after the copy sort after it");
            assert_eq!(later.is_empty(), table == "engagement_events");
        }
    }
    let mut all = Vec::new();
    for table in ["item", "engagement_events", "content"] {
        all.extend(p.values(table).await);
    }
    let all = sorted(all);
    let from = field(&all[0], "_lsn");
    let again = p.start(&["replay", "--from", from.as_str().unwrap(), "--sink", "stdout"]).ends_well().await;
    assert!(again == all.iter().map(|value| format!("{value}\n")).collect::<String>(), "a replay differs");
    let keys: BTreeMap<String, Option<String>> =
        p.records("item").await.into_iter().map(|r| (id(&r.value).to_owned(), r.key)).collect();
    let of = |op: &str, events: &[String]| {
        let mut found: Vec<_> = of_op(events, op).iter().map(|e| keys[id(e)].clone()).collect();
        found.sort();
        found
    };
    let events = p.values("item").await;
    assert_eq!(of("r", &events), of("c", &events));
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_that_a_key_only_includes_are_no_part_of_it() {
    let p = with_items("binclude", 3, "id bigint, v int NOT NULL, body text, PRIMARY KEY (id) INCLUDE (v)").await;
    p.init().await;
    p.start(&["backfill", "item"]).ends_well().await;
    p.run("UPDATE item SET v = 1; ALTER TABLE item REPLICA IDENTITY FULL; UPDATE item SET v = 2").await;
    p.run("CREATE UNIQUE INDEX by_id ON item (id) INCLUDE (v); ALTER TABLE item REPLICA IDENTITY USING INDEX by_id")
        .await;
    p.run("UPDATE item SET v = 3; DELETE FROM item WHERE id = 2").await;
    p.produce().await;
    let records = p.records("item").await;
    let ops: Vec<_> = ["r", "u", "d"].iter().map(|op| of_op(&p.rows("item"), op).len()).collect();
    assert_eq!((records.len(), &ops[..]), (13, &[3, 9, 1][..]));
    for record in records {
        assert_eq!(record.key, Some(field(&record.value, "id").to_string()), "{}", record.value);
    }
    let verified = p.start(&["verify"]).ends_well().await;
    assert!(verified.contains("item: equal"), "{verified}");
}

/// Postgres identifies no row by it, and does not tell of it in the stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_deferrable_key_is_none_in_a_copy_as_in_the_stream() {
    let p = with_items("bdefer", 3, "id bigint PRIMARY KEY DEFERRABLE, v int NOT NULL, body text").await;
    p.init().await;
    p.start(&["backfill", "item"]).ends_well().await;
    p.run("INSERT INTO item (id, v) VALUES (11, 1), (12, 2)").await;
    p.produce().await;
    let records = p.records("item").await;
    let ops: Vec<_> = ["r", "c"].iter().map(|op| of_op(&p.rows("item"), op).len()).collect();
    assert_eq!((records.len(), &ops[..]), (5, &[3, 2][..]));
    for record in records {
        assert_eq!(record.key.as_deref(), Some(id(&record.value)), "{}", record.value);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_row_is_enriched_as_of_its_snapshot() {
    let p = Pipeline::new("bmoment").await;
    let title = async |title: &str| p.run(&format!("UPDATE content SET title = '{title}'")).await;
    p.run("INSERT INTO content VALUES (md5('a')::uuid, 'a', 'at the insert', 'podcast', 60, now())").await;
    p.run("INSERT INTO engagement_events (content_id, event_ts) SELECT md5('a')::uuid, now() FROM generate_series(1, 3000)")
        .await;
    title("at the snapshot").await;
    let copy = p.start(&["backfill", "engagement_events", "--jobs", "1", "--rate", "1000"]);
    let topic = [p.config.topic("engagement_events")];
    until("rows come", async || kafka::ends(&p.config, &topic).await.iter().sum::<i64>() > 100).await;
    title("too late").await;
    assert!(p.rows("engagement_events").len() < 3000, "the copy had ended");
    copy.ends_well().await;
    p.produce().await;
    for events in [p.values("engagement_events").await, p.rows("engagement_events")] {
        for (op, title) in [("r", "at the snapshot"), ("c", "at the insert")] {
            let found: Vec<_> = of_op(&events, op).iter().map(|event| field(event, "title")).collect();
            assert!(found == vec![json!(title); 3000], "{op}: {} events, {:?}", found.len(), found.first());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_row_filters_and_column_lists_are_copied_as_they_are_published() {
    let p = Pipeline::bare(Servers::shared(), "bparts").await;
    p.run(include_str!("../sql/01_tables.sql")).await;
    p.run(
        "CREATE TABLE keyed (id int, v text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
         CREATE TABLE keyed_low (v text, id int NOT NULL);
         ALTER TABLE keyed ATTACH PARTITION keyed_low FOR VALUES FROM (0) TO (500);
         CREATE TABLE keyed_high PARTITION OF keyed FOR VALUES FROM (500) TO (1000);
         CREATE TABLE loose (id int, v text) PARTITION BY HASH (id);
         CREATE TABLE loose_0 PARTITION OF loose FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         CREATE TABLE loose_1 PARTITION OF loose FOR VALUES WITH (MODULUS 2, REMAINDER 1);
         CREATE TABLE \"odd \"\"name\"\"/é\" (\"the \"\"id\"\"\" int PRIMARY KEY, secret text, v text);
         CREATE TABLE heir () INHERITS (\"odd \"\"name\"\"/é\");
         CREATE PUBLICATION falaj FOR TABLE keyed, loose, content, engagement_events,
             ONLY \"odd \"\"name\"\"/é\" (\"the \"\"id\"\"\", v) WHERE (\"the \"\"id\"\"\" % 2 = 0)
             WITH (publish_via_partition_root = true)",
    )
    .await;
    p.init().await;
    p.run(
        "INSERT INTO keyed SELECT g, 'v' || g FROM generate_series(1, 999) AS g;
         INSERT INTO loose SELECT g, 'v' || g FROM generate_series(1, 999) AS g;
         INSERT INTO \"odd \"\"name\"\"/é\" SELECT g, 'secret', 'v' || g FROM generate_series(1, 99) AS g;
         INSERT INTO heir VALUES (1000, 'secret', 'of the child')",
    )
    .await;
    let expected = |rows: &mut dyn Iterator<Item = i64>, name: &str| -> Vec<String> {
        rows.map(|n| format!("{{{}:{n},\"v\":\"v{n}\"", Value::from(name))).collect()
    };
    for (table, key, step, end) in
        [("keyed", "id", 1, 999), ("loose", "id", 1, 999), ("odd \"name\"/é", "the \"id\"", 2, 99)]
    {
        p.start(&["backfill", table]).ends_well().await;
        let mut bodies: Vec<String> = p.values(table).await.iter().map(|event| bare(event)).collect();
        let mut expected = expected(&mut (step..=end).step_by(step as usize), key);
        bodies.sort();
        expected.sort();
        assert_same(table, &bodies, &expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_whose_sessions_are_terminated_goes_on_by_itself() {
    let rows = 30_000;
    let p = with_items("bterm", rows, KEYED).await;
    p.init().await;
    let mut copy = p.start(&["backfill", "item", "--rate", "10000"]);
    let topic = [p.config.topic("item")];
    let end = async || kafka::ends(&p.config, &topic).await.iter().sum::<i64>();
    for n in 1..=2 {
        let before = end().await;
        until("rows come", async || end().await > before).await;
        p.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE application_name = 'falaj backfill' AND datname = current_database()",
        )
        .await;
        // What the sessions had sent before is taken first.
        until("it is noticed", async || copy.log().matches("going on from what is stored").count() == n).await;
        assert!(copy.runs(), "{}", copy.log());
    }
    copy.ends_well().await;
    let all: Vec<i64> = (1..=rows).collect();
    assert!(keys(&p.values("item").await) == all && keys(&p.rows("item")) == all);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_written_and_not_yet_seen_is_waited_for() {
    let stack = Stack::up("unseen", &["postgres"]);
    let p = with_items_on(Servers::shared().with(stack.addresses()), "bunseen", 10, KEYED).await;
    p.init().await;
    p.run("SET synchronous_commit = local").await;
    // Nobody confirms: the commit record is in the WAL, and the transaction stays out of every ordinary snapshot.
    p.run("ALTER SYSTEM SET synchronous_standby_names = 'nobody'").await;
    p.run("SELECT pg_reload_conf()").await;
    let writer = connect(&p.config.postgres.url).await;
    until("the server knows", async || p.text("current_setting('synchronous_standby_names')").await == "nobody").await;
    let update = tokio::spawn(async move { writer.batch_execute("UPDATE item SET v = 1 WHERE id = 1").await.unwrap() });
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    until("the commit waits", async || p.text(waits).await == "1").await;
    let mut copy = p.start(&["backfill", "item"]);
    copy.says("waiting for running transactions to end").await;
    p.run("ALTER SYSTEM RESET synchronous_standby_names").await;
    p.run("SELECT pg_reload_conf()").await;
    update.await.unwrap();
    copy.ends_well().await;
    p.produce().await;
    assert_eq!(fold(p.values("item").await), source(&p).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kafka_broker_is_killed_under_a_copy() {
    let stack = Stack::up("bbroker", &["kafka"]);
    let rows = 40_000;
    let p = with_items_on(Servers::shared().with(stack.addresses()), "bbroker", rows, KEYED).await;
    p.init().await;
    let copy = p.start(&["backfill", "item", "--rate", "5000"]);
    let topic = [p.config.topic("item")];
    until("rows come", async || kafka::ends(&p.config, &topic).await.iter().sum::<i64>() > 1000).await;
    stack.call(&["kill", "kafka"]);
    stack.call(&["up", "kafka"]);
    copy.ends_well().await;
    let all: Vec<i64> = (1..=rows).collect();
    assert!(keys(&p.values("item").await) == all && keys(&p.rows("item")) == all);
}

#[tokio::test(flavor = "multi_thread")]
async fn history_is_loaded_once_and_never_enters_the_board() {
    let p = Pipeline::new("bload").await;
    p.run(include_str!("../sql/04_sample_content.sql")).await;
    p.run(
        "INSERT INTO engagement_events (content_id, event_ts, duration_ms)
         SELECT id, now(), g FROM content, generate_series(1, 40) AS g",
    )
    .await;
    // The copy lies beyond the stream's place in BigQuery, and is loaded first.
    p.start(&["backfill", "engagement_events"]).ends_well().await;
    let copied = p.rows("engagement_events");
    let load = || async { p.start(&["upload", "--once"]).ends_well().await };
    let ids = || async {
        let rows = bigquery::rows(&p, "_id", "engagement_events", "_id").await;
        rows.into_iter().map(|mut row| row.remove(0).unwrap()).collect::<Vec<_>>()
    };
    let expected = |events: &[String]| {
        let mut ids: Vec<_> = events.iter().map(|event| id(event).to_owned()).collect();
        ids.sort();
        ids
    };
    load().await;
    assert_eq!(ids().await, expected(&copied));
    p.start(&["consume", "--sinks", "redis", "--until-end"]).ends_well().await;
    let board: Value = serde_json::from_str(&p.start(&["board", "--json"]).ends_well().await).unwrap();
    assert_eq!((&board["top"], &board["devices"]), (&Value::Array(vec![]), &Value::Array(vec![])));

    p.produce().await;
    std::fs::remove_dir_all(p.archive().join(".upload")).unwrap();
    let told = load().await;
    let streamed = p.rows("engagement_events");
    assert!(streamed.len() == 2 * copied.len(), "{} {}", streamed.len(), copied.len());
    assert_eq!(ids().await, expected(&streamed), "{told}");
    let told = load().await;
    assert!(told.ends_with(": 0 load jobs, 0 rows\n"), "{told}");
    let status: Value = serde_json::from_str(&p.start(&["status", "--json"]).ends_well().await).unwrap();
    assert_eq!(status["upload"][0]["pending_files"], 0, "{status}");
    let last = archive::batches(&p.archive()).into_iter().rfind(|name| !is_history(&p, name));
    assert_eq!(status["archive"]["last"].as_str().map(str::to_owned), last);
}

fn is_history(p: &Pipeline, batch: &str) -> bool {
    p.archive().join(batch).join("_backfill.json").exists()
}
