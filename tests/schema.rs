//! The source changes its schema: before, within and after transactions that touch it, while produce runs and while it is down.

mod bigquery;
mod configured;
mod tables;

use std::time::Duration;

use crate::produce::shown;
use crate::rig::{Pipeline, Servers, archive, assert_same, until};

/// Each line is sent as it is: one transaction, unless it says otherwise.
const HISTORY: [&str; 14] = [
    "INSERT INTO item VALUES (1, 'one', 1)",
    "ALTER TABLE item ADD b numeric(6,2) DEFAULT 1.50",
    "UPDATE item SET a = 'uno'",
    "BEGIN; INSERT INTO item VALUES (2, 'two', 2, 2.5); ALTER TABLE item DROP a; INSERT INTO item VALUES (3, 3, NULL); \
     ALTER TABLE item ADD a int; INSERT INTO item VALUES (4, 4, 4.25, 44); COMMIT",
    "ALTER TABLE item RENAME n TO m",
    "UPDATE item SET m = -m WHERE id = 1",
    "BEGIN; ALTER TABLE item ALTER m TYPE bigint; UPDATE item SET m = m + 4294967296 WHERE id = 2; \
     ALTER TABLE item ALTER m TYPE text USING 'm' || m; UPDATE item SET b = 0 WHERE id = 2; COMMIT",
    "BEGIN; SAVEPOINT s; ALTER TABLE item ADD never int DEFAULT 5; INSERT INTO item VALUES (0, 'never', 0, 0, 0); \
     ROLLBACK TO s; INSERT INTO item VALUES (5, 'five', 5, 55); COMMIT",
    "BEGIN; ALTER TABLE item ADD never int; INSERT INTO item VALUES (0, 'never', 0, 0, 0); ROLLBACK",
    "DELETE FROM item WHERE id = 3",
    "ALTER TABLE item DROP CONSTRAINT item_pkey, ADD PRIMARY KEY (id, m)",
    "UPDATE item SET m = 'x' WHERE id = 4",
    "BEGIN; ALTER TABLE item DROP CONSTRAINT item_pkey; ALTER TABLE item ADD PRIMARY KEY (m); UPDATE item SET id = 50 WHERE m = 'x'; COMMIT",
    "TRUNCATE item",
];

const EXPECTED: [&str; 13] = [
    r#"_op="c" id=1 a="one" n=1 b=- m=- _old_key=-"#,
    r#"_op="u" id=1 a="uno" n=1 b=1.50 m=- _old_key=-"#,
    r#"_op="c" id=2 a="two" n=2 b=2.50 m=- _old_key=-"#,
    r#"_op="c" id=3 a=- n=3 b=null m=- _old_key=-"#,
    r#"_op="c" id=4 a=44 n=4 b=4.25 m=- _old_key=-"#,
    r#"_op="u" id=1 a=null n=- b=1.50 m=-1 _old_key=-"#,
    r#"_op="u" id=2 a=null n=- b=2.50 m=4294967298 _old_key=-"#,
    r#"_op="u" id=2 a=null n=- b=0.00 m="m4294967298" _old_key=-"#,
    r#"_op="c" id=5 a=55 n=- b=5.00 m="five" _old_key=-"#,
    r#"_op="d" id=3 a=null n=- b=null m=null _old_key=-"#,
    r#"_op="u" id=4 a=44 n=- b=4.25 m="x" _old_key={"id":4,"m":"m4"}"#,
    r#"_op="u" id=50 a=44 n=- b=4.25 m="x" _old_key=-"#,
    r#"_op="t" id=- a=- n=- b=- m=- _old_key=-"#,
];

const NAMES: [&str; 7] = ["_op", "id", "a", "n", "b", "m", "_old_key"];

async fn with_items(name: &str) -> Pipeline {
    let p = Pipeline::bare(Servers::shared(), name).await;
    p.run("CREATE TABLE item (id int PRIMARY KEY, a text, n int); CREATE PUBLICATION falaj FOR TABLE item").await;
    p.init().await;
    p
}

/// Waits until the archive and Kafka hold as many events of a table.
async fn arrive(p: &Pipeline, table: &str, count: usize) {
    until(&format!("{count} events of {table}"), async || p.values(table).await.len() >= count).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_decoded_by_the_schema_that_they_were_written_under_live_and_after_a_rest() {
    let p = with_items("history").await;
    let live = p.sibling("live", "falaj").await;
    let running = live.start(&["produce"]);
    live.streams("").await;
    let mut seen = 0;
    for sql in HISTORY {
        p.run(sql).await;
        // What is live meets each change while the table still has that schema; what rests meets them all at the end.
        seen += events(sql);
        arrive(&live, "item", seen).await;
    }
    p.produce().await;
    running.drains().await;

    let values = p.values("item").await;
    assert_eq!(shown(&values, &NAMES), EXPECTED);
    assert_same("live", &live.values("item").await, &values);
    for pipeline in [&p, &live] {
        assert_eq!(shown(&pipeline.rows("item"), &NAMES), EXPECTED);
    }
    let keys = |records: Vec<crate::rig::kafka::Record>| {
        let mut all: Vec<_> = records.into_iter().map(|r| (crate::rig::id(&r.value).to_owned(), r.key)).collect();
        all.sort();
        all.into_iter().map(|(_, key)| key.unwrap_or("-".into())).collect::<Vec<_>>()
    };
    let by_key = ["1", "1", "2", "3", "4", "1", "2", "2", "5", "3", r#"["4","x"]"#, "x", "-"];
    assert_eq!(keys(p.records("item").await), by_key);
    assert_eq!(keys(live.records("item").await), by_key);
    // One batch, a file for each schema in it.
    let names: Vec<String> = archive::files(&p.archive()).into_keys().collect();
    let parts: Vec<_> = names.iter().map(|n| n.split_once('/').unwrap().1).collect();
    assert_eq!(parts.len(), 9, "{parts:?}");
}

/// How many events a line of [`HISTORY`] makes.
fn events(sql: &str) -> usize {
    match sql {
        s if s.ends_with("ROLLBACK") => 0,
        s if s.contains("ROLLBACK TO") => 1,
        s => ["INSERT", "UPDATE", "DELETE", "TRUNCATE"].iter().map(|verb| s.matches(verb).count()).sum(),
    }
}

/// The schema changes all the time while produce is killed again and again; a stream that nobody disturbs has the same bytes.
#[tokio::test(flavor = "multi_thread")]
async fn sigkill_of_produce_while_the_schema_changes() {
    let mut p = with_items("ddlkill").await;
    p.set("FALAJ_ARCHIVE__SEAL_AFTER", "300ms");
    p.set("FALAJ_PRODUCE__TRANSACTION_BYTES", "16KiB");
    let calm = p.sibling("calm", "falaj").await;
    let writer = crate::rig::connect(&p.config.postgres.url).await;
    let writing = tokio::spawn(async move {
        for n in 0..60 {
            let change = match n % 6 {
                0 => format!("ALTER TABLE item ADD c{n} int DEFAULT {n}"),
                1 => "ALTER TABLE item ALTER n TYPE bigint".to_owned(),
                2 => format!("ALTER TABLE item RENAME c{} TO d{n}", n - 2),
                3 => "ALTER TABLE item ALTER n TYPE text".to_owned(),
                4 => format!("ALTER TABLE item DROP d{}", n - 2),
                _ => "ALTER TABLE item ALTER n TYPE int USING n::int".to_owned(),
            };
            let from = n * 100;
            let rows = |k: i32| {
                let (low, high) = (from + k * 50, from + k * 50 + 49);
                format!(
                    "INSERT INTO item (id, a, n) SELECT g, repeat('é', 40), g FROM generate_series({low}, {high}) AS g"
                )
            };
            let sql = format!(
                "BEGIN; {}; UPDATE item SET a = 'u' WHERE id >= {from}; {change}; {}; COMMIT",
                rows(0),
                rows(1)
            );
            writer.batch_execute(&sql).await.unwrap();
        }
    });
    let mut kills = 0;
    while !writing.is_finished() || kills < 6 {
        let process = p.start(&["produce"]);
        tokio::time::sleep(Duration::from_millis(150 + 130 * (kills % 7))).await;
        process.kill();
        kills += 1;
    }
    writing.await.unwrap();
    p.produce().await;
    calm.produce().await;
    let values = calm.values("item").await;
    assert_eq!(values.len(), 60 * 150);
    assert_same("kafka", &p.values("item").await, &values);
    assert_same("archive", &p.rows("item"), &calm.rows("item"));
    assert_eq!(p.rows("item").len(), values.len());
}
