//! To the board, to the outside system, to BigQuery.

use std::collections::BTreeMap;

use falaj::mock_external::Faults;
use serde_json::Value;

use super::{commit, lsn, replay, replayed, values};
use crate::rig::peer::Peer;
use crate::rig::{BIGQUERY, Pipeline, assert_same, bigquery, check, id, load};

/// The board but for the moment of reading.
async fn board(p: &Pipeline) -> Value {
    let out = p.start(&["board", "--json", "--top", "1000"]).ends_well().await;
    let mut board: Value = serde_json::from_str(&out).unwrap();
    board.as_object_mut().unwrap().remove("as_of");
    board
}

#[tokio::test(flavor = "multi_thread")]
async fn a_board_that_is_rebuilt_by_replay_has_the_same_numbers_however_often() {
    let mut p = Pipeline::new("rp_board").await;
    p.set("FALAJ_ARCHIVE__SEAL_BYTES", "64KiB");
    p.run(
        "INSERT INTO content SELECT md5(g::text)::uuid, 's' || g, 'title ' || g, 'video', g, now() FROM generate_series(1, 20) g;
         INSERT INTO engagement_events (content_id, user_id, event_ts, duration_ms, device)
             SELECT md5((g % 20 + 1)::text)::uuid, md5((g % 300)::text)::uuid, now() - (g % 60) * interval '1 s', g, CASE g % 3 WHEN 0 THEN 'ios' WHEN 1 THEN 'web‑safari' END
             FROM generate_series(1, 5000) g;
         INSERT INTO engagement_events (event_ts) VALUES (now() - interval '11 min'), (now() + interval '61.5 s'), ('infinity');
         UPDATE engagement_events SET duration_ms = 0; DELETE FROM engagement_events WHERE id % 2 = 0",
    )
    .await;
    p.produce().await;
    p.start(&["consume", "--sinks", "redis", "--until-end"]).ends_well().await;
    let expected = board(&p).await;
    assert_eq!((expected["late_dropped"].as_u64(), expected["future_dropped"].as_u64()), (Some(1), Some(2)));
    assert_eq!(expected["top"].as_array().unwrap().len(), 20);
    let from = lsn(&values(&p, &check::TABLES).await[0]);
    for _ in 0..2 {
        replayed(&p, &["--from", &from, "--sink", "redis"]).await;
        assert_eq!(board(&p).await, expected);
    }
    // Its offsets are none of Kafka's meanwhile, and nobody takes them for such.
    let verified: Value = serde_json::from_str(&p.start(&["verify", "--json"]).ends_well().await).unwrap();
    let told = |value: &Value| value.to_string().contains("falaj replay has rebuilt it from the archive");
    assert!(verified["board"].is_null() && told(&verified["not_compared"]), "{verified}");
    let status: Value = serde_json::from_str(&p.start(&["status", "--json"]).end().await.out).unwrap();
    assert!(told(&status["board"]), "{status}");
    // The stream takes its board back, and counts nothing twice.
    p.start(&["consume", "--sinks", "redis", "--until-end"]).ends_well().await;
    assert_eq!(board(&p).await, expected);
    // So does one that runs meanwhile: the replay is through before that is seen, or it is fenced.
    let consume = p.start(&["consume", "--sinks", "redis"]);
    let ended = replay(&p, &["--from", &from, "--sink", "redis"]).await;
    assert!(ended.code == Some(0) || (ended.code == Some(1) && ended.log.contains("fenced")), "{ended:?}");
    let again = p.start(&["replay", "--from", &from, "--sink", "redis"]).end().await;
    assert!(again.code == Some(0) || (again.code == Some(1) && again.log.contains("fenced")), "{again:?}");
    // It may be told to stop just when it has taken the board back; the next one goes on from there.
    consume.drains().await;
    p.start(&["consume", "--sinks", "redis", "--until-end"]).ends_well().await;
    assert_eq!(board(&p).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_to_the_outside_system_sends_the_same_bytes_under_the_same_keys() {
    let mut p = Pipeline::new("rp_outside").await;
    let peer = Peer::start(&mut p, Faults::random(0.05, 8)).await;
    load::mixed(&p, 1000, 31).await;
    p.produce().await;
    p.start(&["consume", "--until-end", "--sinks", "external"]).ends_well().await;
    let values = p.values("engagement_events").await;
    let before = peer.mock.received().counts();
    assert_eq!((before.unique, before.conflicts), (values.len() as u64, 0));
    let from = lsn(&values[0]);
    replayed(&p, &["--from", &from, "--sink", "external"]).await;
    let after = peer.mock.received().counts();
    assert_eq!((after.unique, after.conflicts), (before.unique, 0));
    assert!(after.duplicates - before.duplicates >= values.len() as u64, "{after:?}");
    // To a peer that has nothing: all of them, each record key in its order.
    let fresh = Peer::start(&mut p, Faults::random(0.05, 9)).await;
    replayed(&p, &["--from", &from, "--sink", "external"]).await;
    let mut order = BTreeMap::<String, Vec<String>>::new();
    let keys: BTreeMap<_, _> =
        p.records("engagement_events").await.into_iter().map(|r| (id(&r.value).to_owned(), r.key)).collect();
    let ids = fresh.mock.received().ids();
    assert_eq!(ids.len(), values.len());
    for id in ids {
        order.entry(keys[&id].clone().unwrap_or_default()).or_default().push(id);
    }
    assert!(order.values().all(|ids| ids.is_sorted()), "order within a key");
}

#[tokio::test(flavor = "multi_thread")]
async fn bigquery_is_not_doubled_and_a_new_table_has_the_range_once() {
    let mut p = Pipeline::new("rp_bigquery").await;
    p.set("FALAJ_ARCHIVE__SEAL_BYTES", "32KiB");
    load::mixed(&p, 1000, 61).await;
    p.produce().await;
    p.start(&["upload", "--once"]).ends_well().await;
    let values = values(&p, &check::TABLES).await;
    let (from, to) = (lsn(&values[300]), lsn(&values[1500]));
    let ids = async |table: &str| -> Vec<String> {
        bigquery::rows(&p, "_id", table, "_id").await.into_iter().map(|mut row| row.remove(0).unwrap()).collect()
    };
    let before = ids("engagement_events").await;
    replayed(&p, &["--from", &from, "--sink", "bigquery"]).await;
    assert_same("its own table", &ids("engagement_events").await, &before);

    let flags = ["--from", &from, "--to", &to, "--sink", "bigquery", "--table", "{table}_again"];
    for round in 0..3 {
        if round == 2 {
            // A table that was dropped is made and filled anew.
            drop_table(&p, "content_again").await;
        }
        replayed(&p, &flags).await;
        for table in check::TABLES {
            let within = |v: &&String| (commit(&values[300])..=commit(&values[1500])).contains(&commit(v));
            let expected: Vec<_> = p.values(table).await.iter().filter(within).map(|v| id(v).to_owned()).collect();
            assert_same(table, &ids(&format!("{table}_again")).await, &expected);
        }
    }
    let other = replay(&p, &["--from", &to, "--sink", "bigquery", "--table", "{table}_again"]).await;
    assert!(other.code == Some(78) && other.log.contains("bigquery_table"), "{other:?}");
    let own = replay(&p, &["--from", &from, "--sink", "bigquery", "--table", "{table}"]).await;
    assert!(own.code == Some(78) && own.log.contains("own table"), "{own:?}");
    let one = replay(&p, &["--from", &from, "--sink", "bigquery", "--table", "one"]).await;
    assert_eq!(one.code, Some(2), "{one:?}");
}

/// Backfilled rows of the range are loaded too, once.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_table_has_the_backfilled_rows_of_the_range_once() {
    let p = Pipeline::new("rp_history").await;
    load::mixed(&p, 500, 71).await;
    p.produce().await;
    p.start(&["backfill", "engagement_events"]).ends_well().await;
    load::titles(&p).await;
    p.produce().await;
    let rows = p.rows("engagement_events");
    let copies: Vec<_> = rows.iter().filter(|row| row.contains(r#""_op":"r""#)).cloned().collect();
    assert!(copies.len() >= 400 && rows.len() > 2 * copies.len(), "{} {}", copies.len(), rows.len());
    let (first, copy) = (lsn(&values(&p, &check::TABLES).await[0]), lsn(&copies[0]));
    for (flags, name, expected) in
        [(&["--from", &first][..], "{table}_all", &rows), (&["--from", &copy, "--to", &copy], "{table}_copy", &copies)]
    {
        let mut expected: Vec<_> = expected.iter().map(|row| id(row).to_owned()).collect();
        expected.sort();
        let table = name.replace("{table}", "engagement_events");
        for round in 0..3 {
            if round == 2 {
                drop_table(&p, &table).await;
            }
            replayed(&p, &[flags, &["--sink", "bigquery", "--table", name]].concat()).await;
            let ids = bigquery::rows(&p, "_id", &table, "_id").await;
            assert_same(&table, &ids.into_iter().map(|mut row| row.remove(0).unwrap()).collect::<Vec<_>>(), &expected);
        }
    }
}

async fn drop_table(p: &Pipeline, table: &str) {
    let path = format!("bigquery/v2/projects/{}/datasets/{}/tables/{table}", bigquery::PROJECT, p.name);
    let answer = reqwest::Client::new().delete(format!("{}/{path}", p.env[BIGQUERY])).send().await.unwrap();
    assert!(answer.status().is_success(), "{answer:?}");
}
