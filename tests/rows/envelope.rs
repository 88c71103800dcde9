//! `envelope = "debezium"`: the shapes of the documentation of Debezium's PostgreSQL connector, field by field.

use serde_json::{Value, json};

use crate::rig::{Pipeline, Servers, kafka};

const TABLES: &str = "CREATE TABLE customers (id serial PRIMARY KEY, first_name varchar(255) NOT NULL, bio text);
     ALTER TABLE customers ALTER bio SET STORAGE EXTERNAL;
     CREATE SCHEMA inventory;
     CREATE TABLE inventory.whole (id int PRIMARY KEY, v int, bio text);
     ALTER TABLE inventory.whole ALTER bio SET STORAGE EXTERNAL;
     ALTER TABLE inventory.whole REPLICA IDENTITY FULL;
     CREATE TABLE transactions (n serial, xid xid);
     CREATE PUBLICATION falaj FOR TABLE customers, inventory.whole";

async fn pipeline(name: &str) -> Pipeline {
    let mut p = Pipeline::bare(Servers::shared(), name).await;
    p.set("FALAJ_KAFKA__TOMBSTONES", "true");
    p.set("FALAJ_KAFKA__PARTITIONS", "1");
    p.set("FALAJ_PRODUCE__MESSAGES", "true");
    p.run(TABLES).await;
    p.init().await;
    p
}

/// The records of a topic with one partition, in its order.
async fn ordered(p: &Pipeline, table: &str) -> Vec<kafka::Record> {
    let mut records = p.records(table).await;
    records.sort_by_key(|r| r.offset);
    records
}

/// Key and value of each record; `null` is a tombstone.
async fn records(p: &Pipeline, table: &str) -> Vec<(String, Value)> {
    let value = |record: &kafka::Record| serde_json::from_str(&record.value).unwrap_or(Value::Null);
    ordered(p, table).await.iter().map(|r| (r.key.clone().unwrap(), value(r))).collect()
}

/// The transactions that [`TABLES`] has noted, in their order.
async fn xids(p: &Pipeline) -> Vec<String> {
    let all = p.text("SELECT string_agg(xid::text, ' ' ORDER BY n) FROM transactions").await;
    all.split(' ').map(str::to_owned).collect()
}

/// The commit's time in µs and its LSN as a number, as the event itself says them.
fn stamp(event: &Value) -> (i64, u64) {
    (event["source"]["ts_us"].as_i64().unwrap(), event["source"]["lsn"].as_u64().unwrap())
}

/// `source` of an event, every field of it.
fn source(p: &Pipeline, schema: &str, table: &str, found: &Value) -> Value {
    let (micros, lsn) = stamp(found);
    json!({
        "version": "falaj-1", "connector": "postgresql", "name": p.name,
        "ts_ms": micros / 1000, "ts_us": micros, "ts_ns": micros * 1000,
        "snapshot": false, "db": p.name, "sequence": format!("[null,\"{lsn}\"]"),
        "schema": schema, "table": table, "txId": found["source"]["txId"], "lsn": lsn, "xmin": null,
    })
}

/// An event with the fields of the documentation, and `_id`.
fn row(p: &Pipeline, place: (&str, &str), found: &Value, op: &str, before: Value, after: Value) -> Value {
    let at = stamp(found);
    json!({
        "before": before, "after": after, "source": source(p, place.0, place.1, found), "op": op,
        "ts_ms": at.0 / 1000, "ts_us": at.0, "ts_ns": at.0 * 1000, "_id": found["_id"],
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_debezium_envelope_is_as_documented() {
    let p = pipeline("debezium").await;
    for sql in [
        "INSERT INTO customers (first_name, bio) VALUES ('Anne', repeat('b', 3000))",
        "UPDATE customers SET first_name = 'Anne Marie'",
        "UPDATE customers SET id = 7",
        "DELETE FROM customers",
        "TRUNCATE customers",
    ] {
        p.run(&format!("{sql}; INSERT INTO transactions (xid) SELECT pg_current_xact_id()::xid")).await;
    }
    p.run("INSERT INTO inventory.whole VALUES (1, 1, repeat('b', 3000)); UPDATE inventory.whole SET v = 2; DELETE FROM inventory.whole").await;
    let lsn = p.lsn().await;
    p.produce_until(lsn, &["--envelope", "debezium"]).await;

    let found = records(&p, "customers").await;
    let big = "b".repeat(3000);
    let unknown = "__debezium_unavailable_value";
    let row = |at: usize, op, before, after| row(&p, ("public", "customers"), &found[at].1, op, before, after);
    let truncate = {
        let at = stamp(&found[7].1);
        json!({
            "source": source(&p, "public", "customers", &found[7].1), "op": "t",
            "ts_ms": at.0 / 1000, "ts_us": at.0, "ts_ns": at.0 * 1000, "_id": found[7].1["_id"],
        })
    };
    let expected = vec![
        ("1".to_owned(), row(0, "c", Value::Null, json!({"id": 1, "first_name": "Anne", "bio": big}))),
        ("1".to_owned(), row(1, "u", Value::Null, json!({"id": 1, "first_name": "Anne Marie", "bio": unknown}))),
        // A changed key: delete, tombstone, create.
        ("1".to_owned(), row(2, "d", json!({"id": 1}), Value::Null)),
        ("1".to_owned(), Value::Null),
        ("7".to_owned(), row(4, "c", Value::Null, json!({"id": 7, "first_name": "Anne Marie", "bio": unknown}))),
        ("7".to_owned(), row(5, "d", json!({"id": 7}), Value::Null)),
        ("7".to_owned(), Value::Null),
    ];
    assert_eq!(found.len(), 8);
    assert_eq!(found[..7], expected);
    assert_eq!(found[7].1, truncate);
    let found_xids: Vec<_> = [0, 1, 2, 4, 5, 7].map(|at| found[at].1["source"]["txId"].to_string()).into();
    let [insert, update, key, delete, truncate] = &xids(&p).await[..] else { panic!() };
    assert_eq!(found_xids.iter().collect::<Vec<_>>(), [insert, update, key, key, delete, truncate]);
    // Each half of the changed key names the other one.
    let headers: Vec<_> = ordered(&p, "customers").await.into_iter().map(|record| record.headers).collect();
    let header = |name: &str, key: &str| vec![(format!("__debezium.{name}"), key.to_owned())];
    assert_eq!([&headers[2], &headers[4]], [&header("newkey", "7"), &header("oldkey", "1")]);
    assert!([0, 1, 3, 5, 6, 7].iter().all(|at: &usize| headers[*at].is_empty()), "{headers:?}");

    let found = records(&p, "inventory.whole").await;
    let whole = |v: u32| json!({"id": 1, "v": v, "bio": big});
    let place = ("inventory", "whole");
    let expected = vec![
        ("1".to_owned(), self::row(&p, place, &found[0].1, "c", Value::Null, whole(1))),
        ("1".to_owned(), self::row(&p, place, &found[1].1, "u", whole(1), whole(2))),
        ("1".to_owned(), self::row(&p, place, &found[2].1, "d", whole(2), Value::Null)),
        ("1".to_owned(), Value::Null),
    ];
    assert_eq!(found, expected);
    // The archive keeps the flat form: an update that changes the key is one row there.
    let stored: Vec<Value> = p.rows("customers").iter().map(|row| serde_json::from_str(row).unwrap()).collect();
    let ops: Vec<_> = stored.iter().map(|e| (e["_op"].as_str().unwrap(), e["_old_key"].clone())).collect();
    let none = Value::Null;
    assert_eq!(
        ops,
        [("c", none.clone()), ("u", none.clone()), ("u", json!({"id": 1})), ("d", none.clone()), ("t", none)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_row_in_the_debezium_envelope_is_one_of_a_snapshot() {
    let mut p = pipeline("debezium_read").await;
    p.set("FALAJ_KAFKA__ENVELOPE", "debezium");
    p.run("INSERT INTO customers (first_name) VALUES ('Anne')").await;
    p.start(&["backfill", "customers"]).ends_well().await;
    let found = records(&p, "customers").await;
    let after = json!({"id": 1, "first_name": "Anne", "bio": null});
    let mut expected = row(&p, ("public", "customers"), &found[0].1, "r", Value::Null, after);
    expected["source"]["snapshot"] = json!(true);
    expected["source"]["txId"] = Value::Null;
    assert_eq!(found, [("1".to_owned(), expected)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn consume_does_not_take_the_debezium_envelope_for_its_own() {
    let mut p = pipeline("debeziumread").await;
    p.set("FALAJ_KAFKA__ENVELOPE", "debezium");
    let ended = p.start(&["consume", "--until-end"]).end().await;
    assert!(ended.code == Some(78) && ended.log.contains("kafka_envelope"), "{ended:?}");
}
