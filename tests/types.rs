//! Types, bit-exact: what Postgres says of a value is what every sink has.

mod document;
mod floats;
mod names;
mod samples;
mod user;
mod zoo;

use std::collections::BTreeMap;

use falaj::source::slot::{WireForm, wire_form};
use serde_json::value::RawValue;

use crate::rig::{Pipeline, Servers, archive, bigquery, id, pyarrow};
use samples::{EXTENSIONS, NUMBERS_TEXT_AND_TIMES, OTHERS, USER_LIKE_BUILT_IN, USER_OTHERS, USER_TYPES, XML};
use zoo::{Expected, Zoo};

/// An amount of money looks like this there, and like `$1,234.50` elsewhere.
const MONETARY: &str = "de_DE.UTF-8";

/// An empty database with the user's types, and money as in Germany. Says whether there are the extensions.
async fn database(name: &str) -> (Pipeline, bool) {
    let p = Pipeline::bare(Servers::shared(), name).await;
    p.run(USER_TYPES).await;
    p.run(&format!("ALTER DATABASE {} SET lc_monetary = '{MONETARY}'", p.name)).await;
    let sql = "count(*) FROM pg_available_extensions WHERE name IN ('hstore', 'ltree', 'citext')";
    let extended = p.text(&format!("SELECT {sql}")).await == "3";
    if extended {
        p.run("CREATE EXTENSION hstore; CREATE EXTENSION ltree; CREATE EXTENSION citext").await;
    }
    (p.reconnect().await, extended)
}

/// A server that was built without libxml has the type, but takes no value of it.
async fn has_xml(p: &Pipeline) -> bool {
    p.sql.batch_execute("SELECT '<a/>'::xml").await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_value_of_every_type_is_what_postgres_says_it_is() {
    let (binary, extended) = database("zoo").await;
    let extensions = if extended { EXTENSIONS } else { &[] };
    let xml: &[_] = if has_xml(&binary).await { &[XML] } else { &[] };
    let (citext, others) = extensions.split_at(extensions.len().min(1));
    let like_built_in = [NUMBERS_TEXT_AND_TIMES, USER_LIKE_BUILT_IN, citext];
    let known = Zoo::new("known", &like_built_in, false);
    let all = Zoo::new("zoo", &[&like_built_in[..], &[OTHERS, xml, USER_OTHERS, others]].concat(), true);
    for zoo in [&known, &all] {
        zoo.create(&binary).await;
    }
    binary.run("CREATE PUBLICATION falaj FOR TABLE known; CREATE PUBLICATION falaj_text FOR TABLE known, zoo").await;
    binary.init().await;
    let mut text = binary.sibling("text", "falaj_text").await;
    let dataset = text.name.clone();
    text.set("FALAJ_BIGQUERY__DATASET", &dataset);
    assert_eq!(wire_form(&binary.sql, "falaj").await.unwrap(), WireForm::Binary);
    assert_eq!(wire_form(&binary.sql, "falaj_text").await.unwrap(), WireForm::Text);
    for zoo in [&known, &all] {
        zoo.fill(&binary).await;
    }
    let lsn = binary.lsn().await;
    binary.produce_until(lsn, &[]).await;
    text.produce_until(lsn, &[]).await;
    for (p, zoo) in [(&binary, &known), (&text, &known), (&text, &all)] {
        let expected = zoo.expected(p).await;
        assert!(expected.len() > 10);
        in_kafka(p, zoo, &expected).await;
        in_parquet(p, zoo, &expected);
        in_bigquery(p, zoo, &expected).await;
    }
    replayed_and_verified(&text, &[&known, &all]).await;
}

/// Every difference of a table in one message.
fn assert_none(what: &str, differences: &[String]) {
    assert!(differences.is_empty(), "{what}, {} differences:\n{}", differences.len(), differences.join("\n"));
}

fn short(text: &str) -> String {
    text.chars().take(200).collect()
}

async fn in_kafka(p: &Pipeline, zoo: &Zoo, expected: &[Expected]) {
    let events = p.values(zoo.table).await;
    assert_eq!(events.len(), expected.len());
    let mut differences = Vec::new();
    for (event, expected) in events.iter().zip(expected) {
        let fields: BTreeMap<&str, &RawValue> = serde_json::from_str(event).unwrap_or_else(|e| panic!("{e}: {event}"));
        for (name, wanted) in &expected.json {
            let found = fields[&**name].get();
            // serde_json leaves out the blanks around a `json` value.
            if found != wanted.trim_matches([' ', '\n', '\t', '\r']) {
                differences.push(format!("{} {name}: {}, Postgres says {}", id(event), short(found), short(wanted)));
            }
        }
    }
    assert_none(&format!("Kafka, {} of {}", zoo.table, p.name), &differences);
}

fn in_parquet(p: &Pipeline, zoo: &Zoo, expected: &[Expected]) {
    let found = pyarrow::read(&archive::files_of(&p.archive(), zoo.table));
    assert_eq!(found.rows.len(), expected.len());
    let mut differences = Vec::new();
    for (row, expected) in found.rows.iter().zip(expected) {
        for (name, wanted) in &expected.parquet {
            if row[name] != *wanted {
                differences.push(format!("{} {name}: {:?}, Postgres says {wanted:?}", found.types[name], row[name]));
            }
        }
        let raw = row["_raw"].as_ref().map(|raw| serde_json::from_str(raw).unwrap()).unwrap_or_default();
        assert_eq!(expected.raw, raw);
    }
    assert_none(&format!("Parquet, {} of {}", zoo.table, p.name), &differences);
    let rows = expected.iter().filter(|e| !e.raw.is_empty()).count();
    assert!(rows > 5, "{rows} rows with values that Parquet cannot hold");
}

/// From Parquet come the bytes of Kafka's values again; and what stands in the sinks is what Postgres has.
async fn replayed_and_verified(p: &Pipeline, zoos: &[&Zoo]) {
    let mut events = Vec::new();
    for zoo in zoos {
        events.extend(p.values(zoo.table).await);
    }
    events.sort_by_cached_key(|event| id(event).to_owned());
    let first: BTreeMap<&str, &RawValue> = serde_json::from_str(&events[0]).unwrap();
    let from = first["_lsn"].get().trim_matches('"');
    let out = p.start(&["replay", "--from", from, "--sink", "stdout"]).ends_well().await;
    // A value of type json may hold a line break.
    let expected: String = events.iter().map(|event| format!("{event}\n")).collect();
    let differs = out.lines().zip(expected.lines()).find(|(found, expected)| found != expected);
    assert!(out == expected, "{differs:?}");
    let report = p.start(&["verify"]).ends_well().await;
    for zoo in zoos {
        for sink in ["kafka", "archive", "bigquery"] {
            let equal = format!("{}: equal", zoo.table);
            assert!(report.lines().any(|line| line.starts_with(sink) && line.contains(&equal)), "{sink}: {report}");
        }
    }
}

async fn in_bigquery(p: &Pipeline, zoo: &Zoo, expected: &[Expected]) {
    p.start(&["upload", "--once"]).ends_well().await;
    let rows = bigquery::rows(p, &zoo.bigquery().join(", "), zoo.table, "id").await;
    assert_eq!(rows.len(), expected.len());
    let mut differences = Vec::new();
    for (row, expected) in rows.into_iter().zip(expected) {
        for (column, answer) in zoo.columns.iter().zip(row) {
            let (found, wanted) = (column.normal(answer), &expected.bigquery[&column.name]);
            if found != *wanted {
                differences.push(format!("{}: {found:?}, Postgres says {wanted:?}", column.name));
            }
        }
    }
    assert_none(&format!("BigQuery, {} of {}", zoo.table, p.name), &differences);
}
