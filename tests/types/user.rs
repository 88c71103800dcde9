//! User-defined types that come, change and go while rows of them are on the way.

use std::collections::BTreeMap;

use falaj::source::slot::{WireForm, wire_form};
use serde_json::value::RawValue;

use crate::rig::{Pipeline, Servers, archive, assert_same, pyarrow, until};

/// One field of each event, as its own bytes.
fn field(events: &[String], name: &str) -> Vec<String> {
    let one = |event: &String| {
        let fields: BTreeMap<&str, &RawValue> = serde_json::from_str(event).unwrap();
        fields.get(name).map_or("-".to_owned(), |v| v.get().to_owned())
    };
    events.iter().map(one).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_a_new_type_joins_a_binary_stream_while_it_flows() {
    let p = Pipeline::new("newtype").await;
    assert_eq!(wire_form(&p.sql, "falaj").await.unwrap(), WireForm::Binary);
    // Its topic has to be there before its first row.
    p.run("CREATE TYPE pair AS (a int, b text); CREATE TABLE deal (id int PRIMARY KEY, pair pair, pairs pair[])").await;
    let produce = p.start(&["produce"]);
    p.streams("").await;
    p.run("INSERT INTO engagement_events (event_ts, duration_ms) VALUES (now(), 1)").await;
    until("the first event is there", async || p.values("engagement_events").await.len() == 1).await;
    p.run("ALTER PUBLICATION falaj ADD TABLE deal").await;
    p.start(&["init", "--yes"]).ends_well().await;
    p.run("INSERT INTO engagement_events (event_ts, duration_ms) VALUES (now(), 2)").await;
    p.run(r#"INSERT INTO deal VALUES (1, '(1,"b c")', ARRAY[(2,'é'), NULL]::pair[])"#).await;
    p.run("INSERT INTO engagement_events (event_ts, duration_ms) VALUES (now(), 3)").await;
    until("all are there", async || p.values("engagement_events").await.len() == 3).await;
    produce.drains().await;
    let deals = p.values("deal").await;
    assert_eq!(
        (field(&deals, "pair"), field(&deals, "pairs")),
        (vec![r#""(1,\"b c\")""#.into()], vec![r#"["(2,é)",null]"#.into()])
    );
    let events = p.values("engagement_events").await;
    assert_eq!(field(&events, "duration_ms"), ["1", "2", "3"]);
    assert_same("archive", &p.rows("engagement_events"), &events);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_keep_the_look_of_a_type_that_has_changed_or_gone_meanwhile() {
    let p = Pipeline::bare(Servers::shared(), "oldtype").await;
    p.run(
        "CREATE TYPE mood AS ENUM ('sad', 'ok');
         CREATE DOMAIN count AS int; CREATE DOMAIN small AS count; CREATE DOMAIN tags AS text[];
         CREATE TABLE t (id int PRIMARY KEY, mood mood, moods mood[], small small, tags tags);
         CREATE PUBLICATION falaj FOR TABLE t",
    )
    .await;
    p.init().await;
    p.run("INSERT INTO t VALUES (1, 'sad', '{sad,NULL}', 7, '{a}')").await;
    p.run("ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'; ALTER TYPE mood ADD VALUE 'glad'").await;
    p.run("INSERT INTO t VALUES (2, 'blue', '{blue}', 8, '{b}'), (3, 'glad', '[0:0]={glad}', NULL, NULL)").await;
    p.run("ALTER TABLE t DROP small, DROP tags; DROP DOMAIN small; DROP DOMAIN count; DROP DOMAIN tags").await;
    p.run("INSERT INTO t VALUES (4, 'ok', '{}')").await;
    p.produce().await;
    let events = p.values("t").await;
    assert_eq!(field(&events, "mood"), [r#""sad""#, r#""blue""#, r#""glad""#, r#""ok""#]);
    assert_eq!(field(&events, "moods"), [r#"["sad",null]"#, r#"["blue"]"#, r#"["glad"]"#, "[]"]);
    assert_eq!(field(&events, "small"), ["7", "8", "null", "-"]);
    assert_eq!(field(&events, "tags"), [r#"["a"]"#, r#"["b"]"#, "null", "-"]);
    let files = archive::files_of(&p.archive(), "t");
    assert_eq!(files.len(), 2);
    let old = pyarrow::read(&files[..1]);
    assert_eq!((&*old.types["small"], &*old.types["mood"]), ("int32", "string"));
    assert_eq!((old.rows[2]["moods"].as_deref(), old.rows[0]["small"].as_deref()), (Some("[0:0]={glad}"), Some("7")));
}

/// A lookup table's first rows come from a query, later ones from the stream: both have to look the same.
#[tokio::test(flavor = "multi_thread")]
async fn lookup_columns_look_the_same_from_the_first_copy_and_from_the_stream() {
    let p = Pipeline::bare(Servers::shared(), "looktype").await;
    let config = std::env::temp_dir().join(format!("{}.toml", p.name));
    std::fs::write(
        &config,
        "[[table]]\nname = \"hit\"\n[table.lookup]\ntable = \"page\"\non = \"page\"\ncolumns = [\"b\", \"c\", \"i\", \"m\", \"d\", \"f\", \"p\", \"n\"]\n",
    )
    .unwrap();
    let config = config.to_str().unwrap();
    p.run(
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN count AS int; CREATE TYPE pair AS (a int, b text);
         CREATE TABLE page (id char(4) PRIMARY KEY, b bool, c char(3), i inet, m mood, d count, f float4, p pair, n text);
         CREATE TABLE hit (id int PRIMARY KEY, page char(4));
         INSERT INTO page VALUES ('a', true, 'x', '10.0.0.1', 'sad', 5, 117760704, '(,)', '');
         CREATE PUBLICATION falaj FOR TABLE page, hit",
    )
    .await;
    p.start(&["-c", config, "init", "--yes"]).ends_well().await;
    p.run("INSERT INTO hit VALUES (1, 'a')").await;
    p.run("INSERT INTO page SELECT 'b', b, c, i, m, d, f, p, n FROM page").await;
    p.run("INSERT INTO hit VALUES (2, 'b')").await;
    p.start(&["-c", config, "produce", "--until-lsn", &p.lsn().await.to_string()]).ends_well().await;
    let events = p.values("hit").await;
    let looked_up = |name| field(&events, name);
    for (name, value) in [
        ("b", "true"),
        ("c", r#""x  ""#),
        ("i", r#""10.0.0.1""#),
        ("m", r#""sad""#),
        ("d", "5"),
        ("f", "1.17760704e+08"),
        ("p", r#""(,)""#),
        ("n", r#""""#),
    ] {
        assert_eq!(looked_up(name), [value, value], "{name}");
    }
    std::fs::remove_file(config).unwrap();
}
