//! Names that need quoting in SQL and encoding in topics and paths.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::rig::{Pipeline, Servers, archive, bigquery, pyarrow};

const SCHEMA: &str = "sch/e.ma \"é\"";
const TABLES: [&str; 12] = [
    "a/b",
    "..",
    ".hidden",
    "quo\"te'd; DROP TABLE",
    "new\nline\ttab",
    "emoji 🎧",
    "UPPER and space",
    "app.1",
    "%41-2D",
    "back\\slash$1",
    "select",
    "جدول_باسم_طويل_جدا_يملأ_كل_البايت_x",
];
const COLUMNS: [&str; 6] = [
    "a/b",
    "..",
    "q\"u'o\\te",
    "new\nline",
    "select 🎧",
    "sixty-three bytes of a column's name, which is as long as it gets",
];

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Bare in schema public, else with its schema.
fn outside(n: usize, table: &str) -> String {
    if n.is_multiple_of(2) { table.to_owned() } else { format!("{SCHEMA}.{table}") }
}

fn in_sql(n: usize, table: &str) -> String {
    format!("{}.{}", quoted(if n.is_multiple_of(2) { "public" } else { SCHEMA }), quoted(table))
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_need_quoting_reach_every_sink_as_they_are() {
    let p = Pipeline::bare(Servers::shared(), "names").await;
    p.run(&format!("CREATE SCHEMA {}", quoted(SCHEMA))).await;
    let columns: Vec<_> = COLUMNS.iter().map(|c| quoted(&c[..c.len().min(63)])).collect();
    for (n, table) in TABLES.iter().enumerate() {
        assert!(table.len() <= 63);
        let name = in_sql(n, table);
        p.run(&format!(
            "CREATE TABLE {name} ({} int, PRIMARY KEY ({}, {}))",
            columns.join(" int, "),
            columns[0],
            columns[4]
        ))
        .await;
        p.run(&format!("ALTER TABLE {name} REPLICA IDENTITY FULL")).await;
    }
    let all: Vec<_> = TABLES.iter().enumerate().map(|(n, table)| in_sql(n, table)).collect();
    p.run(&format!("CREATE PUBLICATION falaj FOR TABLE {}", all.join(", "))).await;
    p.init().await;
    for table in &all {
        p.run(&format!("INSERT INTO {table} VALUES (1, 2, 3, 4, 5, 6), (11, 12, 13, 14, 15, 16)")).await;
        p.run(&format!("UPDATE {table} SET {} = 7, {} = 8 WHERE {} = 1", columns[0], columns[1], columns[0])).await;
        p.run(&format!("DELETE FROM {table} WHERE {} = 11", columns[0])).await;
    }
    p.produce().await;
    p.start(&["upload", "--once"]).ends_well().await;
    let batches = falaj::archive::list(&p.archive()).unwrap();
    assert_eq!(batches.len(), archive::batches(&p.archive()).len());
    let files = batches[0].files().unwrap();
    assert_eq!((batches.len(), files.len()), (1, TABLES.len()));
    for (n, table) in TABLES.iter().enumerate() {
        in_sinks(&p, &outside(n, table)).await;
        let file =
            files.iter().find(|f| f.table == outside(n, table)).unwrap_or_else(|| panic!("no file of {table:?}"));
        let found = pyarrow::read(std::slice::from_ref(&file.path));
        let values = |c: &str| found.rows.iter().map(|row| row[c].clone().unwrap()).collect::<Vec<_>>();
        assert_eq!(values(COLUMNS[0]), ["1", "11", "7", "11"], "{table:?}");
        assert_eq!(values(COLUMNS[2]), ["3", "13", "3", "13"], "{table:?}");
        assert_eq!(values("_table"), vec![outside(n, table); 4]);
    }
}

async fn in_sinks(p: &Pipeline, table: &str) {
    let topic = p.config.topic(table);
    assert!(topic.len() < 250 && topic.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)), "{topic}");
    let events: Vec<BTreeMap<String, Value>> =
        p.values(table).await.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let names: Vec<_> = COLUMNS.iter().map(|c| c[..c.len().min(63)].to_owned()).collect();
    let row = |event: &BTreeMap<String, Value>| names.iter().map(|c| event[c].as_i64().unwrap()).collect::<Vec<_>>();
    assert_eq!(
        events.iter().map(row).collect::<Vec<_>>(),
        [[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16], [7, 8, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]],
        "{table:?}"
    );
    assert!(events.iter().all(|event| event["_table"] == table));
    assert_eq!(events[2]["_old_key"], serde_json::json!({ "a/b": 1, "select 🎧": 5 }));
    let keys: Vec<_> = p.records(table).await.into_iter().filter_map(|r| r.key).collect();
    let count = |key: &str| keys.iter().filter(|k| *k == key).count();
    assert_eq!([count(r#"["1","5"]"#), count(r#"["7","5"]"#), count(r#"["11","15"]"#)], [1, 1, 2]);
    let id = falaj::upload::columns::table_id(table).unwrap();
    let rows = bigquery::rows(p, "`a_b`, `q_u'o_te`, `_op`, `_table`", &id, "_id").await;
    let text = |cells: [&str; 3]| cells.into_iter().chain([table]).map(|c| Some(c.to_owned())).collect::<Vec<_>>();
    assert_eq!(rows, [["1", "3", "c"], ["11", "13", "c"], ["7", "3", "u"], ["11", "13", "d"]].map(text), "{id}");
    let latest = bigquery::rows(p, "`a_b`, `q_u'o_te`", &falaj::upload::columns::view_id(&id), "1").await;
    assert_eq!(latest, [["7", "3"].map(|c| Some(c.to_owned()))], "{id}");
}
