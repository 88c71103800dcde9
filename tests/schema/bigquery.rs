//! What BigQuery makes of a schema that changes.

use super::with_items;
use crate::rig::process::Ended;
use crate::rig::{Pipeline, bigquery};

async fn produce_and_upload(p: &Pipeline) -> Ended {
    p.produce().await;
    p.start(&["upload", "--once"]).end().await
}

async fn loads(p: &Pipeline) {
    let ended = produce_and_upload(p).await;
    assert_eq!(ended.code, Some(0), "{}", ended.log);
}

async fn rows(p: &Pipeline, columns: &str, table: &str) -> Vec<String> {
    let rows = bigquery::rows(p, columns, table, "_id").await;
    let cell = |cell: Option<String>| cell.unwrap_or("NULL".into());
    rows.into_iter().map(|row| row.into_iter().map(cell).collect::<Vec<_>>().join("|")).collect()
}

/// `name TYPE MODE` of each column that is not falaj's own.
async fn columns(p: &Pipeline, table: &str) -> Vec<String> {
    let url = format!(
        "{}/bigquery/v2/projects/{}/datasets/{}/tables/{table}",
        p.env[crate::rig::BIGQUERY],
        bigquery::PROJECT,
        p.name
    );
    let answer: serde_json::Value = reqwest::get(url).await.unwrap().json().await.unwrap();
    let word = |field: &serde_json::Value, part: &str| field[part].as_str().unwrap_or_default().to_owned();
    let fields = answer["schema"]["fields"].as_array().unwrap().iter();
    let mut all: Vec<_> =
        fields.map(|f| format!("{} {} {}", word(f, "name"), word(f, "type"), word(f, "mode"))).collect();
    all.retain(|field| !field.starts_with('_'));
    all
}

/// The SQL that a refusal names, run as it stands.
async fn run_the_fix(p: &Pipeline, ended: &Ended) -> String {
    let fix = ended.log.split("run in BigQuery: ").nth(1).unwrap_or_else(|| panic!("no SQL in {}", ended.log));
    let (sql, _) = fix.split_once(" Then this table's").unwrap();
    let sql = sql.split(" (the table is").next().unwrap().trim();
    for statement in sql.split_inclusive(';') {
        bigquery::query(p, statement.trim()).await;
    }
    sql.replace(&p.name, "d")
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_come_go_and_change_their_names_in_bigquery() {
    let p = with_items("bqcolumns").await;
    p.run("INSERT INTO item VALUES (1, 'one', 1)").await;
    loads(&p).await;
    p.run("ALTER TABLE item ADD b numeric(6,2) DEFAULT 1.5; INSERT INTO item VALUES (2, 'two', 2)").await;
    p.run("ALTER TABLE item DROP a; INSERT INTO item VALUES (3, 3)").await;
    p.run("ALTER TABLE item RENAME n TO m; UPDATE item SET m = -m WHERE id = 1").await;
    p.run("ALTER TABLE item ADD a text; UPDATE item SET a = 'back' WHERE id = 2").await;
    loads(&p).await;
    let expected =
        ["c|1|one|1|NULL|NULL", "c|2|two|2|15|NULL", "c|3|NULL|3|15|NULL", "u|1|NULL|NULL|15|-1", "u|2|back|NULL|15|2"];
    let all = "_op, CAST(id AS STRING), a, CAST(n AS STRING), CAST(CAST(b * 10 AS INT64) AS STRING), CAST(m AS STRING)";
    assert_eq!(rows(&p, all, "item").await, expected);
    let latest = "_op, CAST(id AS STRING), a, CAST(m AS STRING)";
    assert_eq!(rows(&p, latest, "item_latest").await, ["c|3|NULL|NULL", "u|1|NULL|-1", "u|2|back|2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_type_that_bigquery_cannot_change_stops_that_table_alone_until_the_sql_is_run() {
    let p = with_items("bqtype").await;
    p.run("CREATE TABLE other (id int PRIMARY KEY); ALTER PUBLICATION falaj ADD TABLE other").await;
    p.init().await;
    p.run("INSERT INTO item VALUES (1, 'one', 1); INSERT INTO other VALUES (1)").await;
    loads(&p).await;
    p.run("INSERT INTO item VALUES (2, 'two', 2)").await;
    p.run("ALTER TABLE item ALTER n TYPE text USING 'n' || n; INSERT INTO item VALUES (3, 'three', 'n3'); INSERT INTO other VALUES (2)").await;
    let ended = produce_and_upload(&p).await;
    for words in ["bigquery_table", "\"item\"", "column \"n\" is STRING now, and INT64 in the table", "needed:", "fix:"]
    {
        assert!(ended.code == Some(78) && ended.log.contains(words), "{words}: {}", ended.log);
    }
    // What was written under the old type is loaded; the other table goes on.
    assert_eq!(rows(&p, "CAST(n AS STRING)", "item").await, ["1", "2"]);
    assert_eq!(rows(&p, "CAST(id AS STRING)", "other").await, ["1", "2"]);
    assert_eq!(run_the_fix(&p, &ended).await, "ALTER TABLE `local.d.item` RENAME COLUMN `n` TO `n_int64`;");
    loads(&p).await;
    assert_eq!(rows(&p, "n, CAST(n_int64 AS STRING)", "item").await, ["NULL|1", "NULL|2", "n3|NULL"]);
    assert_eq!(rows(&p, "CAST(id AS STRING), n", "item_latest").await, ["1|NULL", "2|NULL", "3|n3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_type_that_grows_is_widened_in_bigquery_by_the_sql_that_is_told() {
    let p = with_items("bqwiden").await;
    p.run("INSERT INTO item VALUES (1, 'one', 1)").await;
    loads(&p).await;
    p.run("ALTER TABLE item ALTER n TYPE numeric(10,2); INSERT INTO item VALUES (2, 'two', 2.25)").await;
    let ended = produce_and_upload(&p).await;
    assert_eq!(ended.code, Some(78), "{}", ended.log);
    assert_eq!(run_the_fix(&p, &ended).await, "ALTER TABLE `local.d.item` ALTER COLUMN `n` SET DATA TYPE NUMERIC;");
    loads(&p).await;
    assert_eq!(rows(&p, "CAST(n * 100 AS INT64)", "item").await, ["100", "225"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_whose_type_changes_goes_on_in_a_new_table_by_the_sql_that_is_told() {
    let p = with_items("bqclustered").await;
    p.run("INSERT INTO item VALUES (1, 'one', 1)").await;
    loads(&p).await;
    p.run("ALTER TABLE item ALTER id TYPE text USING 'k' || id; INSERT INTO item VALUES ('k2', 'two', 2)").await;
    let ended = produce_and_upload(&p).await;
    assert_eq!(ended.code, Some(78), "{}", ended.log);
    let sql = run_the_fix(&p, &ended).await;
    assert!(
        sql.starts_with("ALTER TABLE `local.d.item` RENAME TO `item_int64`; CREATE TABLE `local.d.item` ("),
        "{sql}"
    );
    assert!(sql.contains("CLUSTER BY `id` OPTIONS(labels=[(\"falaj_owner\", \""), "{sql}");
    loads(&p).await;
    assert_eq!(rows(&p, "id, a", "item").await, ["k2|two"]);
    assert_eq!(rows(&p, "CAST(id AS STRING), a", "item_int64").await, ["1|one"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_latest_view_follows_a_changed_primary_key() {
    let p = with_items("bqkey").await;
    p.run("INSERT INTO item VALUES (1, 'one', 1), (2, 'two', 2)").await;
    loads(&p).await;
    p.run("ALTER TABLE item ADD uid text; UPDATE item SET uid = 'u' || id").await;
    p.run("ALTER TABLE item DROP CONSTRAINT item_pkey, ADD PRIMARY KEY (uid), DROP id").await;
    p.run("UPDATE item SET n = 10 WHERE uid = 'u1'; INSERT INTO item VALUES ('three', 3, 'u3')").await;
    loads(&p).await;
    let latest = rows(&p, "uid, a, CAST(n AS STRING)", "item_latest").await;
    assert_eq!(latest, ["u2|two|2", "u1|one|10", "u3|three|3"]);
    p.run(
        "ALTER TABLE item DROP CONSTRAINT item_pkey, ADD PRIMARY KEY (uid, n); UPDATE item SET n = 4 WHERE uid = 'u3'",
    )
    .await;
    p.run("DELETE FROM item WHERE uid = 'u2'").await;
    loads(&p).await;
    let latest = rows(&p, "uid, a, CAST(n AS STRING)", "item_latest").await;
    // Under the new key what u1 was before its last update is another row, which nobody has deleted.
    assert_eq!(latest, ["u1|one|1", "u1|one|10", "u3|three|4"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_a_table_requires_is_relaxed() {
    let p = with_items("bqrelax").await;
    p.run("INSERT INTO item VALUES (1, 'one', 1)").await;
    loads(&p).await;
    bigquery::query(&p, &format!("DROP TABLE `{}.item`", p.name)).await;
    let (url, dataset) = (&p.env[crate::rig::BIGQUERY], &p.name);
    let field = |name: &str, kind: &str| serde_json::json!({ "name": name, "type": kind, "mode": "REQUIRED" });
    let table = serde_json::json!({
        "tableReference": { "projectId": bigquery::PROJECT, "datasetId": dataset, "tableId": "item" },
        "schema": { "fields": [field("id", "INTEGER"), field("a", "STRING"), field("n", "INTEGER")] },
    });
    let tables = format!("{url}/bigquery/v2/projects/{}/datasets/{dataset}/tables", bigquery::PROJECT);
    assert!(reqwest::Client::new().post(tables).json(&table).send().await.unwrap().status().is_success());
    assert_eq!(columns(&p, "item").await, ["id INTEGER REQUIRED", "a STRING REQUIRED", "n INTEGER REQUIRED"]);
    p.run("ALTER TABLE item DROP n; INSERT INTO item VALUES (2, NULL)").await;
    loads(&p).await;
    assert_eq!(rows(&p, "CAST(id AS STRING), a, CAST(n AS STRING)", "item").await, ["2|NULL|NULL"]);
    let relaxed = columns(&p, "item").await;
    assert_eq!(relaxed, ["id INTEGER NULLABLE", "a STRING NULLABLE", "n INTEGER NULLABLE"]);
}
