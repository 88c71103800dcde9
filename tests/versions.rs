//! What not every major of Postgres can: failover slots, decoding on a standby. `make test-all-pg` runs all of them.

use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use crate::produce::shown;
use crate::rig::stack::Stack;
use crate::rig::{Pipeline, Servers, connect, until};

async fn major(p: &Pipeline) -> u32 {
    p.text("current_setting('server_version_num')::int / 10000").await.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn init_makes_a_failover_slot_or_says_which_postgres_can() {
    let p = Pipeline::bare(Servers::shared(), "failover").await;
    let ended = p.start(&["init", "--yes", "--with-tables", "--failover"]).end().await;
    let slots = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{}'", p.name);
    if major(&p).await < 17 {
        for words in [
            "failover_slot",
            "found:  Postgres 1",
            "needed: the primary of a Postgres 17 or later",
            "leave --failover out",
        ] {
            assert!(ended.code == Some(78) && ended.log.contains(words), "{words}: {}", ended.log);
        }
        assert_eq!(p.text(&slots).await, "0");
        return;
    }
    assert_eq!(ended.code, Some(0), "{}", ended.log);
    assert!(ended.out.contains("failover slot"), "{}", ended.out);
    assert_eq!(p.text(&format!("{slots} AND failover")).await, "1");
    p.start(&["init", "--yes", "--failover"]).ends_well().await;
    let checked = p.start(&["check"]).end().await.out;
    assert!(checked.contains("failover slot") && checked.contains("synchronized_standby_slots"), "{checked}");
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 3)").await;
    p.produce().await;
    assert_eq!((p.values("engagement_events").await.len(), p.rows("engagement_events").len()), (3, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_there_is_not_made_a_failover_slot_by_the_way() {
    let p = Pipeline::new("nofailover").await;
    if major(&p).await >= 17 {
        let ended = p.start(&["init", "--yes", "--failover"]).end().await;
        assert!(ended.code == Some(78) && ended.log.contains("ALTER_REPLICATION_SLOT"), "{}", ended.log);
    }
}

/// From Postgres 17 on a transaction may be bounded, and a walsender that sends one has one open as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_and_a_large_transaction_outlast_the_bound_of_transactions() {
    let mut p = Pipeline::new("outlast").await;
    if major(&p).await < 17 {
        return;
    }
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 100000)").await;
    p.run(&format!("ALTER DATABASE {} SET transaction_timeout = '100ms'", p.name)).await;
    p.set("FALAJ_PRODUCE__SINKS", "archive");
    p.produce().await;
    assert_eq!(p.rows("engagement_events").len(), 100_000);
    p.start(&["backfill", "engagement_events", "--where", "id <= 3000", "--rate", "3000"]).ends_well().await;
    assert_eq!(p.rows("engagement_events").len(), 103_000);
}

/// A primary with a database of the test's own, and what is to be its standby.
async fn pair(name: &str) -> (Stack, Stack, Pipeline) {
    let primary = Stack::up(&format!("{name}-primary"), &["postgres"]);
    let p = Pipeline::bare(Servers::shared().with(primary.addresses()), name).await;
    p.run(include_str!("../sql/01_tables.sql")).await;
    p.run("SELECT pg_create_physical_replication_slot('standby', true)").await;
    primary.call(&["stop", "postgres"]);
    let standby = Stack::named(&format!("{name}-standby"));
    make_standby(&primary, &standby, &p.config.postgres.url);
    primary.call(&["up", "postgres"]);
    standby.call(&["up", "postgres"]);
    (primary, standby, p.reconnect().await)
}

/// The URL of the pipeline's database on the standby.
fn on_standby(standby: &Stack, p: &Pipeline) -> String {
    let url = standby.addresses()["FALAJ_POSTGRES__URL"].clone();
    format!("{}/{}", url.rsplit_once('/').unwrap().0, p.name)
}

/// The data directory of a stopped server becomes that of its standby.
fn make_standby(primary: &Stack, standby: &Stack, url: &str) {
    let (from, home) = (primary.dir().join("postgres"), standby.dir().join("postgres"));
    std::fs::create_dir_all(&home).unwrap();
    let copied = std::process::Command::new("cp").arg("-a").arg(from.join("data")).arg(&home).status().unwrap();
    assert!(copied.success());
    for dir in [standby.dir(), &home] {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let data = home.join("data");
    let port = url.rsplit_once(':').and_then(|(_, rest)| rest.split_once('/')).unwrap().0;
    let major: u32 = std::fs::read_to_string(data.join("PG_VERSION")).unwrap().trim().parse().unwrap();
    let mut settings = std::fs::read_to_string(data.join("postgresql.auto.conf")).unwrap();
    settings += &format!("primary_conninfo = 'host=127.0.0.1 port={port} user=postgres dbname=postgres'\n");
    settings += "primary_slot_name = 'standby'\nhot_standby_feedback = on\n";
    settings += if major >= 17 { "sync_replication_slots = on\n" } else { "" };
    std::fs::write(data.join("postgresql.auto.conf"), settings).unwrap();
    std::fs::write(data.join("standby.signal"), "").unwrap();
    own(&data, &data.join("standby.signal"));
}

fn own(like: &Path, file: &Path) {
    use std::os::unix::fs::MetadataExt;
    let owner = like.metadata().unwrap();
    chown(file, Some(owner.uid()), Some(owner.gid())).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_streamed_from_where_postgres_can_and_refused_where_not() {
    let (_primary, standby, mut p) = pair("standby").await;
    let of_standby = on_standby(&standby, &p);
    let replica = connect(&of_standby).await;
    p.set("FALAJ_POSTGRES__URL", &of_standby);

    if major(&p).await < 16 {
        let ended = p.start(&["init", "--yes"]).end().await;
        for words in
            ["server_role", "found:  a standby of Postgres 1", "needed: the primary, or a standby of Postgres 16"]
        {
            assert!(ended.code == Some(78) && ended.log.contains(words), "{words}: {}", ended.log);
        }
        let checked = p.start(&["check"]).end().await;
        assert!(checked.out.contains("FAIL  server_role"), "{}", checked.out);
        return;
    }
    let ended = p.start(&["init", "--yes"]).end().await;
    for words in ["server_role", "a standby, without publication", "run on the primary: CREATE PUBLICATION"] {
        assert!(ended.code == Some(78) && ended.log.contains(words), "{words}: {}", ended.log);
    }
    p.run("CREATE PUBLICATION falaj FOR TABLE content, engagement_events").await;
    let content = "00000000-0000-0000-0000-00000000000a";
    p.run(&format!("INSERT INTO content VALUES ('{content}', 's', 'one', 'podcast', 100, now())")).await;
    let mut init = p.start(&["init", "--yes"]);
    // A slot begins where the primary says which transactions run.
    until("the slot is made", async || {
        p.run("SELECT pg_log_standby_snapshot()").await;
        !init.runs()
    })
    .await;
    init.ends_well().await;
    let produce = p.start(&["produce"]);
    let event =
        format!("INSERT INTO engagement_events (content_id, event_ts, duration_ms) VALUES ('{content}', now(), 1000)");
    p.run(&event).await;
    p.run(&format!("BEGIN; UPDATE content SET title = 'two'; {event}; COMMIT")).await;
    until("both events are there", async || p.values("engagement_events").await.len() == 2).await;
    let role = replica.query_one("SELECT pg_is_in_recovery()", &[]).await.unwrap().get::<_, bool>(0);
    assert!(role, "the stream came from the standby");
    produce.drains().await;
    let expected = [r#"id=1 title="one""#, r#"id=2 title="two""#];
    assert_eq!(shown(&p.values("engagement_events").await, &["id", "title"]), expected);
    assert_eq!(shown(&p.rows("engagement_events"), &["id", "title"]), expected);
    let checked = p.start(&["check"]).end().await;
    assert!(checked.out.contains("standby, with hot_standby_feedback"), "{}", checked.out);
    let ended = p.start(&["init", "--yes", "--failover"]).end().await;
    assert!(ended.code == Some(78) && ended.log.contains("name the primary in postgres.url"), "{}", ended.log);
}

/// The primary is lost, its standby takes over with the slot: a new pipeline on that slot begins where it stands, without a gap.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_a_new_pipeline_on_the_failover_slot_leaves_no_gap() {
    let shared = connect(&Servers::shared().postgres("postgres")).await;
    let version = shared.query_one("SELECT current_setting('server_version_num')::int / 10000", &[]).await.unwrap();
    if version.get::<_, i32>(0) < 17 {
        return;
    }
    let (primary, standby, mut p) = pair("takeover").await;
    p.run("ALTER SYSTEM SET synchronized_standby_slots = 'standby'").await;
    p.run("SELECT pg_reload_conf()").await;
    p.start(&["init", "--yes", "--with-tables", "--failover"]).ends_well().await;
    // The slot is copied once what is acknowledged has moved.
    p.set("FALAJ_ARCHIVE__SEAL_AFTER", "200ms");
    let replica = connect(&on_standby(&standby, &p)).await;
    let one = async |sql: &str| replica.query_one(sql, &[]).await.unwrap().get::<_, bool>(0);
    let produce = p.start(&["produce"]);
    let event = "INSERT INTO engagement_events (event_ts) VALUES (now())";
    let copied = format!(
        "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = '{}' AND synced AND NOT temporary)",
        p.name
    );
    let mut written = 0;
    until("the standby has the slot", async || {
        p.run(event).await;
        p.run("SELECT pg_log_standby_snapshot()").await;
        written += 1;
        one(&copied).await
    })
    .await;
    until("all is streamed", async || p.values("engagement_events").await.len() == written).await;
    produce.kill();
    let old = p.values("engagement_events").await;
    for _ in 0..5 {
        p.run(event).await;
        written += 1;
    }
    let end = p.lsn().await;
    until("the standby has it all", async || one(&format!("SELECT pg_last_wal_replay_lsn() >= '{end}'")).await).await;
    primary.call(&["stop-immediate", "postgres"]);
    assert!(one("SELECT pg_promote()").await);

    p.set("FALAJ_POSTGRES__URL", &on_standby(&standby, &p));
    let ended = p.start(&["produce"]).end().await;
    assert!(ended.code == Some(78) && ended.log.contains("timeline 2"), "{}", ended.log);
    p.set("FALAJ_PIPELINE", &format!("{}_2", p.name));
    for (key, part) in [("FALAJ_STATE__DIR", "state2"), ("FALAJ_ARCHIVE__DIR", "archive2")] {
        let dir = p.archive().with_file_name(part).display().to_string();
        p.set(key, &dir);
    }
    p.start(&["init", "--yes", "--adopt-slot"]).ends_well().await;
    p = p.reconnect().await;
    p.run(event).await;
    written += 1;
    p.produce().await;
    let new = p.values("engagement_events").await;
    assert!(new.len() >= 6, "{new:?}");
    assert_eq!(p.rows("engagement_events").len(), new.len());
    let all: BTreeSet<String> = [old, new].concat().into_iter().collect();
    let ids: Vec<String> = shown(&all.into_iter().collect::<Vec<_>>(), &["id"]);
    let ids: BTreeSet<u64> = ids.iter().map(|id| id.trim_start_matches("id=").parse().unwrap()).collect();
    assert_eq!(ids.len(), written);
    assert_eq!(p.text("SELECT count(*) FROM engagement_events").await, written.to_string());
}
