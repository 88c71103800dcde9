//! Every change of a row as it was: replica identities, TOAST, TRUNCATE, partitions, inheritance, filters, names.

mod envelope;
mod messages;
mod records;

use std::collections::BTreeMap;

use crate::produce::shown;
use crate::rig::stack::Stack;
use crate::rig::{Pipeline, Servers, assert_same, id};

/// An empty database with these tables, all of them published, after `falaj init`.
async fn published(servers: Servers, name: &str, sql: &str) -> Pipeline {
    let p = Pipeline::bare(servers, name).await;
    p.run(sql).await;
    p.init().await;
    p
}

/// The events of a table in their order, with the record key in front; the archive must hold the same.
async fn events(p: &Pipeline, table: &str, names: &[&str]) -> Vec<String> {
    let mut records = p.records(table).await;
    records.sort_by_cached_key(|r| id(&r.value).to_owned());
    let values: Vec<_> = records.iter().map(|r| r.value.clone()).collect();
    assert_same(&format!("archive, {table}"), &p.rows(table), &values);
    let keys = records.iter().map(|r| r.key.clone().unwrap_or_else(|| "no key".into()));
    keys.zip(shown(&values, names)).map(|(key, event)| format!("{key}: {event}")).collect()
}

/// Whether the server has what came with `major`.
async fn has(p: &Pipeline, major: u32) -> bool {
    p.text("current_setting('server_version_num')").await.parse::<u32>().unwrap() >= major * 10_000
}

const COLUMNS: [&str; 7] = ["_op", "id", "code", "v", "body", "_old_key", "_unchanged"];

#[tokio::test(flavor = "multi_thread")]
async fn toast_updates_and_deletes_under_each_replica_identity() {
    let table = |name: &str| {
        format!(
            "CREATE TABLE {name} (id int PRIMARY KEY, code text NOT NULL UNIQUE, v int, body text);
             ALTER TABLE {name} ALTER body SET STORAGE EXTERNAL;"
        )
    };
    let tables = ["by_key", "by_row", "by_index", "by_nothing"].map(table).concat();
    let p = published(
        Servers::shared(),
        "identity",
        &format!(
            "{tables}
             ALTER TABLE by_row REPLICA IDENTITY FULL;
             ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_code_key;
             ALTER TABLE by_nothing REPLICA IDENTITY NOTHING;
             CREATE PUBLICATION falaj FOR TABLE by_key, by_row, by_index, by_nothing"
        ),
    )
    .await;
    for table in ["by_key", "by_row", "by_index", "by_nothing"] {
        p.run(&format!("INSERT INTO {table} VALUES (1, 'a', 1, repeat('x', 3000))")).await;
    }
    for table in ["by_key", "by_row", "by_index"] {
        for change in ["v = 2", "code = 'b'", "id = 2", "body = NULL"] {
            p.run(&format!("UPDATE {table} SET {change}")).await;
        }
        p.run(&format!("DELETE FROM {table}")).await;
    }
    // What could not be told to anybody is refused by Postgres itself.
    let refused = p.sql.batch_execute("UPDATE by_nothing SET v = 2").await.unwrap_err();
    assert!(format!("{refused:?}").contains("replica identity"), "{refused:?}");
    p.produce().await;

    let big = format!("\"{}\"", "x".repeat(3000));
    let seen = async |table: &str| -> Vec<String> {
        events(&p, table, &COLUMNS).await.into_iter().map(|e| e.replace(&big, "BIG")).collect()
    };
    assert_eq!(
        seen("by_key").await,
        [
            r#"1: _op="c" id=1 code="a" v=1 body=BIG _old_key=- _unchanged=-"#,
            r#"1: _op="u" id=1 code="a" v=2 body=- _old_key=- _unchanged=["body"]"#,
            r#"1: _op="u" id=1 code="b" v=2 body=- _old_key=- _unchanged=["body"]"#,
            r#"2: _op="u" id=2 code="b" v=2 body=- _old_key={"id":1} _unchanged=["body"]"#,
            r#"2: _op="u" id=2 code="b" v=2 body=null _old_key=- _unchanged=-"#,
            r#"2: _op="d" id=2 code=null v=null body=null _old_key=- _unchanged=-"#,
        ]
    );
    assert_eq!(
        seen("by_row").await,
        [
            r#"1: _op="c" id=1 code="a" v=1 body=BIG _old_key=- _unchanged=-"#,
            r#"1: _op="u" id=1 code="a" v=2 body=BIG _old_key=- _unchanged=-"#,
            r#"1: _op="u" id=1 code="b" v=2 body=BIG _old_key=- _unchanged=-"#,
            r#"2: _op="u" id=2 code="b" v=2 body=BIG _old_key={"id":1} _unchanged=-"#,
            r#"2: _op="u" id=2 code="b" v=2 body=null _old_key=- _unchanged=-"#,
            r#"2: _op="d" id=2 code="b" v=2 body=null _old_key=- _unchanged=-"#,
        ]
    );
    // The stream brings the index's columns alone: they are the key, and of the old primary key it says nothing.
    assert_eq!(
        seen("by_index").await,
        [
            r#"a: _op="c" id=1 code="a" v=1 body=BIG _old_key=- _unchanged=-"#,
            r#"a: _op="u" id=1 code="a" v=2 body=- _old_key=- _unchanged=["body"]"#,
            r#"b: _op="u" id=1 code="b" v=2 body=- _old_key={"code":"a"} _unchanged=["body"]"#,
            r#"b: _op="u" id=2 code="b" v=2 body=- _old_key=- _unchanged=["body"]"#,
            r#"b: _op="u" id=2 code="b" v=2 body=null _old_key=- _unchanged=-"#,
            r#"b: _op="d" id=null code="b" v=null body=null _old_key=- _unchanged=-"#,
        ]
    );
    assert_eq!(seen("by_nothing").await, [r#"1: _op="c" id=1 code="a" v=1 body=BIG _old_key=- _unchanged=-"#]);
}

/// What is sent of the old row goes by the root's identity, what the WAL has of it by the partition's: here the key alone.
#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_toast_value_is_marked_where_a_partition_has_another_identity_than_its_root() {
    let p = published(
        Servers::shared(),
        "partidentity",
        "CREATE TABLE m (id int PRIMARY KEY, body text) PARTITION BY RANGE (id);
         CREATE TABLE m1 PARTITION OF m FOR VALUES FROM (0) TO (100);
         ALTER TABLE m ALTER body SET STORAGE EXTERNAL; ALTER TABLE m1 ALTER body SET STORAGE EXTERNAL;
         ALTER TABLE m REPLICA IDENTITY FULL;
         CREATE PUBLICATION falaj FOR TABLE m WITH (publish_via_partition_root = true)",
    )
    .await;
    p.run("INSERT INTO m VALUES (1, repeat('x', 3000))").await;
    p.run("UPDATE m SET id = 2").await;
    p.produce().await;
    let big = format!("\"{}\"", "x".repeat(3000));
    let found = events(&p, "m", &["_op", "id", "body", "_old_key", "_unchanged"]).await;
    let found: Vec<_> = found.iter().map(|e| e.replace(&big, "BIG")).collect();
    assert_eq!(
        found,
        [
            r#"1: _op="c" id=1 body=BIG _old_key=- _unchanged=-"#,
            r#"2: _op="u" id=2 body=- _old_key={"id":1} _unchanged=["body"]"#,
        ]
    );
}

/// Postgres logs a TOASTed key with every update: the new row says "unchanged", the old key has it.
#[tokio::test(flavor = "multi_thread")]
async fn a_toasted_key_is_known_although_it_did_not_change() {
    let p = published(
        Servers::shared(),
        "toastkey",
        "CREATE TABLE long_key (id text PRIMARY KEY, v int);
         ALTER TABLE long_key ALTER id SET STORAGE EXTERNAL;
         CREATE PUBLICATION falaj FOR TABLE long_key",
    )
    .await;
    p.run("INSERT INTO long_key VALUES (repeat('k', 2400), 1); UPDATE long_key SET v = 2; DELETE FROM long_key").await;
    p.produce().await;
    let key = "k".repeat(2400);
    let found = events(&p, "long_key", &["_op", "id", "v", "_old_key", "_unchanged"]).await;
    let found: Vec<_> = found.iter().map(|e| e.replace(&key, "K")).collect();
    assert_eq!(
        found,
        [
            r#"K: _op="c" id="K" v=1 _old_key=- _unchanged=-"#,
            r#"K: _op="u" id="K" v=2 _old_key=- _unchanged=-"#,
            r#"K: _op="d" id="K" v=null _old_key=- _unchanged=-"#,
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_without_a_key_are_known_by_the_event() {
    let p = published(
        Servers::shared(),
        "keyless",
        "CREATE TABLE log (v int); CREATE TABLE pile (v int, note text); ALTER TABLE pile REPLICA IDENTITY FULL;
         CREATE TABLE coded (code text NOT NULL UNIQUE, v int);
         ALTER TABLE coded REPLICA IDENTITY USING INDEX coded_code_key;
         CREATE PUBLICATION falaj FOR TABLE log, pile, coded",
    )
    .await;
    p.run("INSERT INTO log VALUES (1), (1)").await;
    p.run("INSERT INTO pile VALUES (1, NULL), (1, NULL); UPDATE pile SET v = 2; DELETE FROM pile").await;
    p.run("INSERT INTO coded VALUES ('a', 1); UPDATE coded SET code = 'b'; DELETE FROM coded").await;
    assert!(p.sql.batch_execute("DELETE FROM log").await.is_err());
    p.produce().await;
    let names = ["_op", "v", "note", "_old_key"];
    let own_key = |events: Vec<String>, values: Vec<String>| -> Vec<String> {
        events.iter().zip(&values).map(|(e, v)| e.replace(id(v), "ID")).collect()
    };
    let log = own_key(events(&p, "log", &names).await, p.values("log").await);
    assert_eq!(log, [r#"ID: _op="c" v=1 note=- _old_key=-"#; 2]);
    let pile = own_key(events(&p, "pile", &names).await, p.values("pile").await);
    let twice = |event: &'static str| [event; 2];
    let expected = [
        twice(r#"ID: _op="c" v=1 note=null _old_key=-"#),
        twice(r#"ID: _op="u" v=2 note=null _old_key=-"#),
        twice(r#"ID: _op="d" v=2 note=null _old_key=-"#),
    ];
    assert_eq!(pile, expected.concat());
    assert_eq!(
        events(&p, "coded", &["_op", "code", "v", "_old_key"]).await,
        [
            r#"a: _op="c" code="a" v=1 _old_key=-"#,
            r#"b: _op="u" code="b" v=1 _old_key={"code":"a"}"#,
            r#"b: _op="d" code="b" v=null _old_key=-"#,
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn truncate_of_several_tables_and_cascade_is_one_event_a_table() {
    let p = published(
        Servers::shared(),
        "truncate",
        "CREATE TABLE author (id int PRIMARY KEY); CREATE TABLE book (id int PRIMARY KEY, author int REFERENCES author);
         CREATE TABLE page (id int PRIMARY KEY, book int REFERENCES book); CREATE TABLE other (id serial PRIMARY KEY);
         CREATE PUBLICATION falaj FOR TABLE author, page, other",
    )
    .await;
    p.run("INSERT INTO author VALUES (1); INSERT INTO page VALUES (1, NULL)").await;
    p.run("BEGIN; INSERT INTO other DEFAULT VALUES; TRUNCATE author CASCADE; INSERT INTO author VALUES (2); COMMIT")
        .await;
    p.run("TRUNCATE other, page RESTART IDENTITY").await;
    p.run("INSERT INTO other DEFAULT VALUES").await;
    // Emptied and filled again in one transaction, and an emptying that is undone.
    p.run("BEGIN; SAVEPOINT s; TRUNCATE author CASCADE; ROLLBACK TO s; INSERT INTO author VALUES (3); COMMIT").await;
    p.produce().await;
    assert_eq!(
        events(&p, "author", &["_op", "id"]).await,
        [r#"1: _op="c" id=1"#, r#"no key: _op="t" id=-"#, r#"2: _op="c" id=2"#, r#"3: _op="c" id=3"#]
    );
    assert_eq!(
        events(&p, "page", &["_op", "id"]).await,
        [r#"1: _op="c" id=1"#, r#"no key: _op="t" id=-"#, r#"no key: _op="t" id=-"#]
    );
    assert_eq!(
        events(&p, "other", &["_op", "id"]).await,
        [r#"1: _op="c" id=1"#, r#"no key: _op="t" id=-"#, r#"1: _op="c" id=1"#]
    );
    // book is emptied too, but is not published: it takes no ordinal. The insert is 0, the two tables 1 and 2.
    let author = p.values("author").await;
    let transaction = &id(&author[1])[..16];
    let mut ids = Vec::new();
    for table in ["author", "page", "other"] {
        ids.extend(p.values(table).await.iter().map(|v| id(v).to_owned()).filter(|i| i.starts_with(transaction)));
    }
    ids.sort();
    assert_eq!(ids, (0..4).map(|n| format!("{transaction}:{n:010}")).collect::<Vec<_>>());
}

/// A partitioned table with a partition whose columns stand in another order.
const MEASURE: &str = "CREATE TABLE measure (id int, at int, v int, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
     CREATE TABLE measure_old PARTITION OF measure FOR VALUES FROM (MINVALUE) TO (2020);
     CREATE TABLE measure_new (v int, gone int, at int NOT NULL, id int NOT NULL);
     ALTER TABLE measure_new DROP COLUMN gone;
     ALTER TABLE measure ATTACH PARTITION measure_new FOR VALUES FROM (2020) TO (MAXVALUE);";

async fn measure(p: &Pipeline) {
    p.run("INSERT INTO measure VALUES (1, 2019, 10), (2, 2021, 20)").await;
    p.run("UPDATE measure SET v = v + 1").await;
    // Into the other partition: for Postgres a delete and an insert.
    p.run("UPDATE measure SET at = 2022 WHERE id = 1").await;
    p.run("UPDATE measure SET at = 2022 WHERE id = 2").await;
    p.run("DELETE FROM measure WHERE id = 1").await;
    p.run("TRUNCATE measure_new").await;
    p.run("TRUNCATE measure").await;
    p.produce().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partitioned_table_is_one_table_via_its_root() {
    let sql = format!("{MEASURE} CREATE PUBLICATION falaj FOR TABLE measure WITH (publish_via_partition_root = true)");
    let p = published(Servers::shared(), "root", &sql).await;
    measure(&p).await;
    // TRUNCATE of one partition is not told by Postgres then; that of the root is.
    assert_eq!(
        events(&p, "measure", &["_op", "id", "v", "_old_key", "_table"]).await,
        [
            r#"["1","2019"]: _op="c" id=1 v=10 _old_key=- _table="measure""#,
            r#"["2","2021"]: _op="c" id=2 v=20 _old_key=- _table="measure""#,
            r#"["1","2019"]: _op="u" id=1 v=11 _old_key=- _table="measure""#,
            r#"["2","2021"]: _op="u" id=2 v=21 _old_key=- _table="measure""#,
            r#"["1","2019"]: _op="d" id=1 v=null _old_key=- _table="measure""#,
            r#"["1","2022"]: _op="c" id=1 v=11 _old_key=- _table="measure""#,
            r#"["2","2022"]: _op="u" id=2 v=21 _old_key={"id":2,"at":2021} _table="measure""#,
            r#"["1","2022"]: _op="d" id=1 v=null _old_key=- _table="measure""#,
            r#"no key: _op="t" id=- v=- _old_key=- _table="measure""#,
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn each_partition_is_a_table_without_its_root() {
    let sql = format!("{MEASURE} CREATE PUBLICATION falaj FOR TABLE measure");
    let p = published(Servers::shared(), "leaves", &sql).await;
    measure(&p).await;
    assert_eq!(
        events(&p, "measure_old", &["_op", "id", "v"]).await,
        [
            r#"["1","2019"]: _op="c" id=1 v=10"#,
            r#"["1","2019"]: _op="u" id=1 v=11"#,
            r#"["1","2019"]: _op="d" id=1 v=null"#,
            r#"no key: _op="t" id=- v=-"#,
        ]
    );
    assert_eq!(
        events(&p, "measure_new", &["_op", "id", "v", "_old_key"]).await,
        [
            r#"["2021","2"]: _op="c" id=2 v=20 _old_key=-"#,
            r#"["2021","2"]: _op="u" id=2 v=21 _old_key=-"#,
            r#"["2022","1"]: _op="c" id=1 v=11 _old_key=-"#,
            r#"["2022","2"]: _op="u" id=2 v=21 _old_key={"at":2021,"id":2}"#,
            r#"["2022","1"]: _op="d" id=1 v=null _old_key=-"#,
            r#"no key: _op="t" id=- v=- _old_key=-"#,
            r#"no key: _op="t" id=- v=- _old_key=-"#,
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn children_by_inheritance_are_tables_of_their_own() {
    let p = published(
        Servers::shared(),
        "inherit",
        "CREATE TABLE city (id int PRIMARY KEY, name text);
         CREATE TABLE capital (country text, PRIMARY KEY (id)) INHERITS (city);
         CREATE PUBLICATION falaj FOR TABLE city",
    )
    .await;
    p.run("INSERT INTO city VALUES (1, 'Nizwa'); INSERT INTO capital VALUES (2, 'Muscat', 'Oman')").await;
    p.run("UPDATE city SET name = upper(name)").await;
    p.run("TRUNCATE city").await;
    p.produce().await;
    let names = ["_op", "id", "name", "country"];
    assert_eq!(
        events(&p, "city", &names).await,
        [
            r#"1: _op="c" id=1 name="Nizwa" country=-"#,
            r#"1: _op="u" id=1 name="NIZWA" country=-"#,
            r#"no key: _op="t" id=- name=- country=-"#,
        ]
    );
    assert_eq!(
        events(&p, "capital", &names).await,
        [
            r#"2: _op="c" id=2 name="Muscat" country="Oman""#,
            r#"2: _op="u" id=2 name="MUSCAT" country="Oman""#,
            r#"no key: _op="t" id=- name=- country=-"#,
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn row_filters_and_column_lists_are_what_the_publication_says() {
    let p = Pipeline::bare(Servers::shared(), "filter").await;
    p.run(
        "CREATE TABLE person (id int PRIMARY KEY, secret inet, name text, age int NOT NULL);
           ALTER TABLE person REPLICA IDENTITY FULL;
           CREATE TABLE listed (id int PRIMARY KEY, secret inet, name text);
           CREATE TABLE kept (id int PRIMARY KEY, big text); ALTER TABLE kept ALTER big SET STORAGE EXTERNAL",
    )
    .await;
    let publication =
        "CREATE PUBLICATION falaj FOR TABLE person WHERE (age >= 18), listed (id, name), kept WHERE (id > 100)";
    if !has(&p, 15).await {
        // Both came with Postgres 15: an older server does not take them.
        assert!(p.sql.batch_execute(publication).await.is_err());
        return;
    }
    p.run(publication).await;
    p.init().await;
    p.run("INSERT INTO person VALUES (1, '10.0.0.1', 'Amal', 30), (2, NULL, 'Badr', 10)").await;
    // Into what the filter lets pass, within it, and out of it again.
    p.run("UPDATE person SET age = 18 WHERE id = 2").await;
    p.run("UPDATE person SET name = 'Badr b.' WHERE id = 2").await;
    p.run("UPDATE person SET age = 17 WHERE id = 1").await;
    p.run("DELETE FROM person").await;
    p.run("INSERT INTO kept VALUES (1, repeat('x', 10000)); UPDATE kept SET id = 101").await;
    p.run("INSERT INTO listed VALUES (1, '10.0.0.1', 'x'); UPDATE listed SET secret = NULL; DELETE FROM listed").await;
    p.produce().await;
    assert_eq!(
        events(&p, "person", &["_op", "id", "name", "age"]).await,
        [
            r#"1: _op="c" id=1 name="Amal" age=30"#,
            r#"2: _op="c" id=2 name="Badr" age=18"#,
            r#"2: _op="u" id=2 name="Badr b." age=18"#,
            r#"1: _op="d" id=1 name="Amal" age=30"#,
            r#"2: _op="d" id=2 name="Badr b." age=18"#,
        ]
    );
    assert_eq!(
        events(&p, "listed", &["_op", "id", "name", "secret"]).await,
        [
            r#"1: _op="c" id=1 name="x" secret=-"#,
            r#"1: _op="u" id=1 name="x" secret=-"#,
            r#"1: _op="d" id=1 name=null secret=-"#,
        ]
    );
    // Postgres does not send the value: for the sinks an insert that lacks it, and says so.
    let entered = [r#"101: _op="c" id=101 big=- _unchanged=["big"]"#];
    assert_eq!(events(&p, "kept", &["_op", "id", "big", "_unchanged"]).await, entered);
    assert_eq!(p.rows("kept"), p.values("kept").await);
}

const ORDER: &str = "CREATE TABLE item (id int PRIMARY KEY, net numeric(8,2), gross numeric(8,2) GENERATED ALWAYS AS (net * 1.05) STORED);";

async fn order(p: &Pipeline) -> Vec<String> {
    p.run("INSERT INTO item (id, net) VALUES (1, 100.00); UPDATE item SET net = 200.00").await;
    p.produce().await;
    events(p, "item", &["_op", "net", "gross"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn generated_columns_are_not_streamed_unless_they_are_published() {
    let sql = format!("{ORDER} CREATE PUBLICATION falaj FOR TABLE item");
    let p = published(Servers::shared(), "generated", &sql).await;
    assert_eq!(order(&p).await, [r#"1: _op="c" net=100.00 gross=-"#, r#"1: _op="u" net=200.00 gross=-"#]);
}

/// On a server of its own: the shared one may be older.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_18_publishes_generated_columns() {
    let stack = Stack::up_with("pg18", &["postgres"], &[("FALAJ_PG_MAJOR", "18")]);
    let sql = format!("{ORDER} CREATE PUBLICATION falaj FOR TABLE item WITH (publish_generated_columns = stored)");
    let mut p = published(Servers::shared().with(stack.addresses()), "generated18", &sql).await;
    assert!(has(&p, 18).await);
    assert_eq!(order(&p).await, [r#"1: _op="c" net=100.00 gross=105.00"#, r#"1: _op="u" net=200.00 gross=210.00"#]);
    // The catalogue knows of it before the first row: it may be configured.
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "[[table]]\nname = \"item\"\nkey = \"gross\"\n").unwrap();
    p.set("FALAJ_HTTP__LISTEN", "");
    let out = p.start(&["-c", &file.path().display().to_string(), "check", "--json"]).end().await.out;
    let findings: Vec<BTreeMap<String, serde_json::Value>> = serde_json::from_str(&out).unwrap();
    let columns = findings.iter().find(|f| f["check"] == "columns").unwrap();
    assert_eq!(columns["ok"], true, "{columns:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_names_come_through_as_they_are() {
    let tables = [
        "a/b",
        "../up",
        "..",
        "with \"quotes\"",
        "new\nline",
        "🎧",
        "semi;colon -- x",
        "UPPER case",
        "%41",
        "a-b",
        "x.1",
    ];
    let long = "n".repeat(63);
    let names: Vec<&str> = tables.into_iter().chain([&*long]).collect();
    let ident = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let column = "c/\"é\n🎧' .x";
    let mut sql = String::from("CREATE SCHEMA \"my.schema\";");
    let mut listed = Vec::new();
    for name in &names {
        sql += &format!("CREATE TABLE {0} (id int PRIMARY KEY, {1} text);", ident(name), ident(column));
        listed.push(ident(name));
    }
    sql += "CREATE TABLE \"my.schema\".\"t\" (id int PRIMARY KEY);";
    listed.push("\"my.schema\".t".to_owned());
    sql += &format!("CREATE PUBLICATION falaj FOR TABLE {}", listed.join(", "));
    let p = published(Servers::shared(), "names", &sql).await;
    for name in &listed {
        p.run(&format!("INSERT INTO {name} VALUES (1)")).await;
    }
    for name in &names {
        p.run(&format!("UPDATE {} SET {} = 'v'", ident(name), ident(column))).await;
    }
    p.produce().await;
    let mut files = std::collections::BTreeSet::new();
    for batch in falaj::archive::list(&p.archive()).unwrap() {
        files.extend(batch.files().unwrap().into_iter().map(|f| f.table));
    }
    let expected = names.iter().map(|n| (*n).to_owned()).chain(["my.schema.t".to_owned()]).collect();
    assert_eq!(files, expected);
    for name in &names {
        let found: Vec<serde_json::Value> =
            p.values(name).await.iter().map(|v| serde_json::from_str(v).unwrap()).collect();
        let cells: Vec<_> = found.iter().map(|e| (e["_table"].clone(), e[column].clone())).collect();
        assert_eq!(cells, [((*name).into(), serde_json::Value::Null), ((*name).into(), "v".into())]);
    }
    assert_eq!(p.values("my.schema.t").await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_would_share_a_topic_of_falajs_own_is_refused() {
    let mut p = Pipeline::bare(Servers::shared(), "ownname").await;
    p.run("CREATE TABLE checkpoint (id int PRIMARY KEY); CREATE PUBLICATION falaj FOR TABLE checkpoint").await;
    let refused = p.start(&["init", "--yes", "--with-tables"]).end().await;
    assert!(refused.code == Some(78) && refused.log.contains("table_names"), "{refused:?}");
    p.set("FALAJ_KAFKA__TOPIC", "{pipeline}.table.{table}");
    p.init().await;
    p.run("INSERT INTO checkpoint VALUES (1)").await;
    p.produce().await;
    assert_eq!(events(&p, "checkpoint", &["_op", "id"]).await, [r#"1: _op="c" id=1"#]);
}

/// What is filtered out is not streamed, so that its lookup row would stay for ever as it was.
#[tokio::test(flavor = "multi_thread")]
async fn lookup_rows_that_the_publication_filters_out_are_not_joined() {
    let p = Pipeline::bare(Servers::shared(), "lookupfilter").await;
    if !has(&p, 15).await {
        return;
    }
    p.run(include_str!("../sql/01_tables.sql")).await;
    p.run(
        "INSERT INTO content (id, slug, title, content_type, publish_ts) VALUES
             ('00000000-0000-0000-0000-000000000001', 'a', 'shown', 'video', now()),
             ('00000000-0000-0000-0000-000000000002', 'b', 'hidden', 'podcast', now());
         CREATE PUBLICATION falaj FOR TABLE content WHERE (content_type = 'video'), engagement_events",
    )
    .await;
    p.init().await;
    p.run("INSERT INTO engagement_events (content_id, event_ts) SELECT id, now() FROM content ORDER BY id").await;
    p.produce().await;
    let mut titles = shown(&p.values("engagement_events").await, &["title"]);
    titles.sort();
    assert_eq!(titles, [r#"title="shown""#, "title=null"]);
}

/// Each database has its own idea of how values look; an event that is sent again must not depend on it.
#[tokio::test(flavor = "multi_thread")]
async fn values_do_not_depend_on_the_settings_of_the_database() {
    let mut seen = Vec::new();
    for (name, settings) in [
        ("plain", &[][..]),
        (
            "settings",
            &[
                "quote_all_identifiers = on",
                "array_nulls = off",
                "default_transaction_isolation = serializable",
                "default_transaction_deferrable = on",
                "DateStyle = 'SQL, DMY'",
                "IntervalStyle = 'sql_standard'",
                "bytea_output = 'escape'",
                "extra_float_digits = -3",
                "TimeZone = 'Asia/Muscat'",
            ],
        ),
    ] {
        let p = Pipeline::bare(Servers::shared(), name).await;
        for setting in settings {
            p.run(&format!("ALTER DATABASE {} SET {setting}", p.name)).await;
        }
        p.run(
            "CREATE TYPE mood AS ENUM ('fine');
             CREATE TABLE seen (id int PRIMARY KEY, kin regclass, at timestamptz, day date, span interval, raw bytea, share float8, mood mood);
             CREATE PUBLICATION falaj FOR TABLE seen",
        )
        .await;
        p.init().await;
        let row = r"(1, 'pg_class', '2026-01-02 03:04:05.5Z', '2026-01-02', '1 day 02:00', '\x00ff', 0.1, 'fine')";
        p.run(&format!("INSERT INTO seen VALUES {row}")).await;
        p.produce().await;
        seen.push(shown(&p.values("seen").await, &["kin", "at", "day", "span", "raw", "share", "mood"]));
    }
    assert!(seen[0][0].contains(r#"kin="pg_class" at="2026-01-02T03:04:05.500000Z""#), "{:?}", seen[0]);
    assert_eq!(seen[0], seen[1]);
}
