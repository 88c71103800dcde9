//! Postgres itself replays: from a bookmark into another pipeline; and a saved LSN given to a fresh installation.

use falaj::lsn::Lsn;

use super::commit;
use crate::rig::{POSTGRES, Pipeline, Servers, archive, assert_same, check, load};

/// The same database and state directory, another pipeline with an archive of its own.
fn other(p: &Pipeline, name: &str) -> (String, Vec<(&'static str, String)>) {
    let pipeline = format!("{}.{name}", p.name);
    let archive = p.archive().with_file_name(name).display().to_string();
    (pipeline.clone(), vec![("FALAJ_PIPELINE", pipeline), ("FALAJ_ARCHIVE__DIR", archive)])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bookmark_is_replayed_into_another_pipeline_with_the_same_bytes() {
    let mut p = Pipeline::new("bm_replay").await;
    load::mixed(&p, 500, 41).await;
    p.produce().await;
    let before = p.values("engagement_events").await.len();
    let made = p.start(&["bookmark", "mark"]).ends_well().await;
    let at = p.confirmed().await;
    assert!(made.starts_with(&format!("mark  at {at}, of slot \"{0}\" (pipeline \"{0}\"): pins ", p.name)), "{made}");
    let (content, events) = (p.values("content").await.len(), before);
    p.start(&["generate", "--count", "1500", "--seed", "42"]).ends_well().await;
    load::titles(&p).await;
    load::changes(&p).await;
    let lsn = p.produce().await;
    let expected =
        [p.values("content").await.split_off(content), p.values("engagement_events").await.split_off(events)];

    let refused = p.start(&["produce", "--from-bookmark", "mark"]).end().await;
    assert!(refused.code == Some(78) && refused.log.contains("bookmark_pipeline"), "{refused:?}");
    let unknown = p.start(&["produce", "--from-bookmark", "none"]).end().await;
    assert!(unknown.code == Some(78) && unknown.log.contains("there is mark"), "{unknown:?}");

    let (own, own_archive) = (p.name.clone(), p.archive());
    for name in ["first", "second"] {
        let (_, settings) = other(&p, name);
        settings.iter().for_each(|(key, value)| p.set(key, value));
        p.start(&["init", "--yes"]).ends_well().await;
        for until in [Lsn((at.0 + lsn.0) / 2 / 8 * 8), lsn] {
            let until = until.to_string();
            p.start(&["produce", "--from-bookmark", "mark", "--until-lsn", &until]).ends_well().await;
        }
        for (table, expected) in check::TABLES.iter().zip(&expected) {
            assert_same(name, &p.values(table).await, expected);
            assert_same(name, &p.rows(table), expected);
        }
        p.set("FALAJ_PIPELINE", &own);
        p.set("FALAJ_ARCHIVE__DIR", &own_archive.display().to_string());
    }
    let listed = p.start(&["bookmark"]).ends_well().await;
    assert_eq!(listed.lines().filter(|line| line.contains("pins")).count(), 3, "{listed}");
    let again = p.start(&["bookmark", "mark"]).end().await;
    assert!(again.code == Some(78) && again.log.contains("already"), "{again:?}");
    p.start(&["bookmark", "--drop", "mark"]).ends_well().await;
    assert_eq!(p.start(&["bookmark"]).ends_well().await, "no bookmark\n");
    let slots = p.text("SELECT count(*) FROM pg_replication_slots WHERE database = current_database()").await;
    assert_eq!(slots, "1");
    // The stream itself has not noticed any of it.
    load::changes(&p).await;
    p.produce().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bookmark_is_made_while_produce_runs() {
    let p = Pipeline::new("bm_live").await;
    let produce = p.start(&["produce"]);
    p.streams("").await;
    let loading = p.start(&["generate", "--count", "3000", "--rate", "1500"]);
    p.flows().await;
    p.start(&["bookmark", "live"]).ends_well().await;
    loading.ends_well().await;
    produce.drains().await;
    assert!(p.start(&["bookmark"]).ends_well().await.starts_with("live  at "));
    p.start(&["bookmark", "--drop", "live"]).ends_well().await;
}

/// What a process leaves that is killed before its bookmark is whole.
fn unfinished(p: &Pipeline, name: &str, lsn: Lsn) -> std::path::PathBuf {
    let dir = p.config.state.dir.join("bookmarks").join(name);
    std::fs::create_dir_all(&dir).unwrap();
    let text = serde_json::json!({ "pipeline": p.name, "slot": p.name, "lsn": lsn, "finished": false });
    std::fs::write(dir.join("bookmark.json"), text.to_string()).unwrap();
    dir
}

async fn slots(p: &Pipeline, name: &str) -> String {
    p.text(&format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{name}'")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bookmark_that_was_never_finished_is_listed_and_dropped() {
    let p = Pipeline::new("bm_torn").await;
    let name = format!("{}_torn", p.name);
    let dir = unfinished(&p, &name, p.confirmed().await);
    p.run(&format!("SELECT pg_copy_logical_replication_slot('{}', '{name}')", p.name)).await;
    let listed = p.start(&["bookmark"]).ends_well().await;
    assert!(listed.starts_with(&format!("{name}  unfinished: falaj bookmark --drop {name}")), "{listed}");
    let from = p.start(&["produce", "--from-bookmark", &name]).end().await;
    assert!(from.code == Some(78) && from.log.contains("there is none"), "{from:?}");
    for _ in 0..2 {
        let again = p.start(&["bookmark", &name]).end().await;
        assert!(again.code == Some(78) && again.log.contains(&format!("--drop {name}")), "{again:?}");
        assert!(dir.join("bookmark.json").exists());
        // Then the same without a slot.
        p.run(&format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{name}'"
        ))
        .await;
    }
    p.run(&format!("SELECT pg_copy_logical_replication_slot('{}', '{name}')", p.name)).await;
    p.start(&["bookmark", "--drop", &name]).ends_well().await;
    assert_eq!((slots(&p, &name).await.as_str(), dir.exists()), ("0", false));
    p.start(&["bookmark", &name]).ends_well().await;
    p.start(&["bookmark", "--drop", &name]).ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_somebody_made_under_the_name_of_a_bookmark_is_not_dropped_with_it() {
    let p = Pipeline::new("bm_taken").await;
    for (plugin, finished) in [("test_decoding", true), ("pgoutput", true), ("test_decoding", false)] {
        let name = format!("{}_{plugin}", p.name);
        if finished {
            p.start(&["bookmark", &name]).ends_well().await;
            p.run("INSERT INTO engagement_events (event_ts) VALUES (now())").await;
            p.run(&format!("SELECT pg_drop_replication_slot('{name}')")).await;
        } else {
            unfinished(&p, &name, Lsn(0));
        }
        p.run(&format!("SELECT pg_create_logical_replication_slot('{name}', '{plugin}')")).await;
        let told = p.start(&["bookmark", "--drop", &name]).ends_well().await;
        assert!(told.contains("it is left"), "{told}");
        assert_eq!(slots(&p, &name).await, "1", "{plugin}");
        p.run(&format!("SELECT pg_drop_replication_slot('{name}')")).await;
    }
    assert_eq!(p.start(&["bookmark"]).ends_well().await, "no bookmark\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bookmark_is_dropped_only_where_its_slots_are() {
    let mut p = Pipeline::new("bm_home").await;
    let other = Pipeline::bare(Servers::shared(), "bm_other").await;
    let (name, url) = (format!("{}_home", p.name), p.env[POSTGRES].clone());
    p.start(&["bookmark", &name]).ends_well().await;
    p.set(POSTGRES, &other.env[POSTGRES]);
    let refused = p.start(&["bookmark", "--drop", &name]).end().await;
    let words = format!("is of database \"{}\"", p.name);
    assert!(refused.code == Some(78) && refused.log.contains(&words), "{refused:?}");
    assert_eq!(slots(&p, &name).await, "1");
    p.set(POSTGRES, &url);
    p.start(&["bookmark", "--drop", &name]).ends_well().await;
    assert_eq!(slots(&p, &name).await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_lsn_begins_a_fresh_installation_only_where_the_slot_still_has_it() {
    let p = Pipeline::new("bm_start").await;
    let whole = p.sibling("whole", "falaj").await;
    let origin = p.confirmed().await;
    load::mixed(&p, 500, 51).await;
    let saved = p.lsn().await;
    load::titles(&p).await;
    load::changes(&p).await;
    let end = p.lsn().await;
    for lsn in [Lsn(origin.0 - 8), Lsn(end.0 + (1 << 30))] {
        let ended = p.start(&["produce", "--start", &lsn.to_string()]).end().await;
        assert_eq!(ended.code, Some(78), "{ended:?}");
        assert!(ended.log.contains("start_lsn") && ended.log.contains(&format!("from {origin}")), "{}", ended.log);
    }
    assert_eq!((p.confirmed().await, archive::batches(&p.archive()).len()), (origin, 0));

    let (start, until) = (saved.to_string(), end.to_string());
    p.start(&["produce", "--start", &start, "--until-lsn", &until]).ends_well().await;
    assert_eq!(p.confirmed().await, end);
    // What another installation, which has read everything, says of the part behind the saved LSN.
    whole.produce_until(end, &[]).await;
    let mut count = 0;
    for table in check::TABLES {
        let behind = |v: &String| commit(v) >= saved;
        let expected: Vec<_> = whole.values(table).await.into_iter().filter(behind).collect();
        assert_same(table, &p.values(table).await, &expected);
        assert_same(table, &p.rows(table), &expected);
        count += expected.len();
    }
    assert!(count > 500);
    // The same flag once more changes nothing; another LSN is refused.
    p.start(&["produce", "--start", &start, "--until-lsn", &until]).ends_well().await;
    let ended = p.start(&["produce", "--start", &until]).end().await;
    assert!(ended.code == Some(78) && ended.log.contains("stands at"), "{ended:?}");
    // The archive knows where it begins.
    let all = p.start(&["replay", "--from", &start, "--sink", "stdout"]).ends_well().await;
    assert_eq!(all.lines().count(), count);
    let before = Lsn(saved.0 - 8).to_string();
    let ended = p.start(&["replay", "--from", &before, "--sink", "stdout"]).end().await;
    assert!(ended.code == Some(78) && ended.log.contains(&format!("commits from {saved}")), "{ended:?}");
}
