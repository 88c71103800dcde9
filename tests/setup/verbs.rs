//! `init` and `check` as they are run.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use falaj::config::Config;
use falaj::enrich::state;
use falaj::kafka::{TIMEOUT, create_topic, topics};
use falaj::source::conn::Conninfo;
use falaj::source::wire::Wire;
use serde_json::Value;

use super::place::{Place, stderr, stdout};
use super::server::Server;
use crate::rig::kafka;

async fn count(place: &Place, sql: &str) -> i64 {
    place.sql().await.query_one(&format!("SELECT count(*) FROM {sql}"), &[]).await.unwrap().get(0)
}

async fn slots(place: &Place) -> i64 {
    count(place, &format!("pg_replication_slots WHERE slot_name = '{}'", place.name)).await
}

fn finding<'a>(findings: &'a [Value], check: &str) -> &'a Value {
    findings.iter().find(|f| f["check"] == check).unwrap_or_else(|| panic!("no {check} in {findings:?}"))
}

#[tokio::test]
async fn init_plans_then_creates_then_finds_nothing_to_do() {
    let place = Place::new("init").await;
    let plan = place.falaj(&["init", "--with-tables"]);
    assert_eq!(plan.status.code(), Some(0));
    assert!(stdout(&plan).contains("nothing was changed; falaj init --yes carries it out"), "{}", stdout(&plan));
    assert_eq!((slots(&place).await, count(&place, "pg_publication").await), (0, 0));
    assert!(!place.state().exists());

    place.sql().await.batch_execute(include_str!("../../sql/01_tables.sql")).await.unwrap();
    let insert = "INSERT INTO public.content VALUES (gen_random_uuid(), 'a', 'Ünïcode ٤', 'podcast', 90, now()), \
                  (gen_random_uuid(), 'b', E'tab\\there \"quoted\"', NULL, NULL, now())";
    place.sql().await.batch_execute(insert).await.unwrap();
    let made = place.falaj(&["init", "--yes"]);
    assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
    let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name::text = $1";
    let confirmed: String = place.sql().await.query_one(sql, &[&place.name]).await.unwrap().get(0);
    let header = state::header(&place.state()).unwrap().unwrap();
    assert_eq!(
        (header.lsn.to_string(), header.origin.to_string(), header.adopted),
        (confirmed.clone(), confirmed, false)
    );
    let rows = base_rows(&place);
    let in_table = place
        .sql()
        .await
        .query("SELECT id::text, title, content_type, length_seconds::text FROM public.content", &[])
        .await
        .unwrap();
    let mut expected: Vec<Vec<Option<String>>> = in_table.iter().map(|r| (0..4).map(|i| r.get(i)).collect()).collect();
    expected.sort();
    assert_eq!(rows, expected);
    let (servers, letters) =
        (Config::load(None, std::env::vars()).unwrap().kafka, format!("{}.dead_letter", place.name));
    assert_eq!(kafka::setting(&servers, &letters, "retention.ms").await.as_deref(), Some("-1"));

    let again = place.falaj(&["init", "--yes"]);
    assert_eq!((again.status.code(), stdout(&again).contains("nothing to do")), (Some(0), true), "{}", stdout(&again));
    let (findings, code) = place.check();
    let failed: Vec<_> = findings.iter().filter(|f| f["ok"] != true).collect();
    assert_eq!((failed, code), (vec![], 0));
    place.leave().await;
}

/// A slot begins between transactions: what was running when it was asked for is in the first lookup rows.
#[tokio::test]
async fn init_waits_for_running_transactions_and_their_rows_are_in_the_base() {
    let place = Place::new("running").await;
    place.sql().await.batch_execute(include_str!("../../sql/01_tables.sql")).await.unwrap();
    let writer = place.sql().await;
    let insert = "BEGIN; INSERT INTO public.content VALUES (gen_random_uuid(), 'a', 'open', NULL, NULL, now())";
    for end in ["COMMIT", "ROLLBACK"] {
        writer.batch_execute(insert).await.unwrap();
        let init = place.command(&["init", "--yes"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while slots(&place).await == 0 {
            assert!(Instant::now() < deadline, "no slot is being made");
        }
        assert!(!place.state().exists());
        writer.batch_execute(end).await.unwrap();
        let out = init.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
        let titles: Vec<_> = base_rows(&place).into_iter().map(|row| row[1].clone().unwrap()).collect();
        assert_eq!(titles, ["open"], "the second transaction leaves no row");
        let sql = "SELECT pg_drop_replication_slot($1)";
        place.sql().await.execute(sql, &[&place.name]).await.unwrap();
        fs::remove_dir_all(place.state()).unwrap();
        place.sql().await.batch_execute("UPDATE public.content SET slug = 'b'").await.unwrap();
    }
}

/// The rows of a table that is rewritten behind the slot's snapshot are not seen in it.
#[tokio::test]
async fn init_whose_lookup_table_is_rewritten_while_the_slot_is_made_leaves_no_slot() {
    let place = Place::new("rewritten").await;
    place.sql().await.batch_execute(include_str!("../../sql/01_tables.sql")).await.unwrap();
    let writer = place.sql().await;
    writer.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
    let init = place.command(&["init", "--yes"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while slots(&place).await == 0 {
        assert!(Instant::now() < deadline, "no slot is being made");
    }
    let rewrite = "ALTER TABLE public.content ALTER length_seconds TYPE bigint; COMMIT";
    writer.batch_execute(rewrite).await.unwrap();
    let out = init.wait_with_output().unwrap();
    assert!(out.status.code() == Some(78) && stderr(&out).contains("was rewritten or truncated"), "{}", stderr(&out));
    assert_eq!(slots(&place).await, 0);
    assert_eq!(place.falaj(&["init", "--yes"]).status.code(), Some(0));
    place.leave().await;
}

#[tokio::test]
async fn a_lookup_table_that_may_be_read_in_part_is_told_before_there_is_a_slot() {
    let mut place = Place::new("columns").await;
    let (sql, role) = (place.sql().await, format!("{}_role", place.name));
    sql.batch_execute(include_str!("../../sql/01_tables.sql")).await.unwrap();
    sql.batch_execute(&format!(
        "CREATE PUBLICATION {} FOR TABLE public.content, public.engagement_events; CREATE ROLE {role} LOGIN REPLICATION;
         GRANT SELECT ON public.engagement_events TO {role};
         GRANT SELECT (id, title, content_type, length_seconds) ON public.content TO {role}",
        place.name
    ))
    .await
    .unwrap();
    let owner = place.url.clone();
    place.url = owner.replace("//postgres@", &format!("//{role}@"));
    let refused = place.falaj(&["init", "--yes"]);
    assert!(refused.status.code() == Some(78) && stderr(&refused).contains("table_rights"), "{}", stderr(&refused));
    place.url = owner;
    assert_eq!(slots(&place).await, 0);
    sql.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await.unwrap();
    place.leave().await;
}

/// Key and values of every row in the base, sorted.
fn base_rows(place: &Place) -> Vec<Vec<Option<String>>> {
    let text = fs::read_to_string(place.state().join("base.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let row = |line: &&str| {
        let (_, key, values): (usize, String, Vec<Option<String>>) = serde_json::from_str(line).unwrap();
        [Some(key)].into_iter().chain(values).collect()
    };
    let mut rows: Vec<Vec<Option<String>>> = lines[1..lines.len() - 1].iter().map(row).collect();
    rows.sort();
    rows
}

#[tokio::test]
async fn init_never_alters_a_publication_that_exists() {
    let place = Place::new("publication").await;
    let sql = place.sql().await;
    // A name with a dot, a quote and no letter of ASCII; the built-in tables are not there at all.
    let table = r#"public."🎧.""x/""#;
    sql.batch_execute(&format!(
        "CREATE TABLE {table} (id int PRIMARY KEY); CREATE PUBLICATION {} FOR TABLE {table} WITH (publish = 'insert')",
        place.name
    ))
    .await
    .unwrap();
    let made = place.falaj(&["init", "--yes"]);
    assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
    assert_eq!(count(&place, "pg_publication WHERE NOT pubupdate").await, 1);
    assert_eq!(count(&place, "pg_publication_tables").await, 1);
    let (findings, code) = place.check();
    assert_eq!(code, 0, "{findings:?}");
    assert!(finding(&findings, "published_changes")["fix"].as_str().unwrap().contains("SET (publish ="));
    assert!(finding(&findings, "configured_tables")["found"].as_str().unwrap().contains("engagement_events"));
    place.leave().await;
}

#[tokio::test]
async fn a_slot_without_lookup_state_is_refused_until_it_is_adopted() {
    let place = Place::new("adopt").await;
    place.sql().await.batch_execute(include_str!("../../sql/01_tables.sql")).await.unwrap();
    let sql = "SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'pgoutput')";
    let at: String = place.sql().await.query_one(sql, &[&place.name]).await.unwrap().get(0);
    let refused = place.falaj(&["init", "--yes"]);
    assert_eq!(refused.status.code(), Some(78));
    assert!(stderr(&refused).contains("falaj init --adopt-slot"), "{}", stderr(&refused));
    assert_eq!((place.state().exists(), count(&place, "pg_publication").await), (false, 0));
    let (findings, code) = place.check();
    let told = finding(&findings, "lookup_state");
    assert_eq!((code, &told["ok"]), (78, &Value::Bool(false)));
    for part in ["found", "needed", "fix"] {
        assert!(stderr(&refused).contains(told[part].as_str().unwrap()), "{part} of {told}");
    }
    let adopted = place.falaj(&["init", "--yes", "--adopt-slot"]);
    assert_eq!(adopted.status.code(), Some(0), "{}", stderr(&adopted));
    assert!(stdout(&adopted).contains("events from before now are enriched with the rows of now"));
    let header = state::header(&place.state()).unwrap().unwrap();
    assert_eq!((header.lsn.to_string(), header.adopted), (at, true));
    assert!(stdout(&place.falaj(&["init"])).contains("nothing to do"));
    place.leave().await;
}

#[tokio::test]
async fn a_base_that_nobody_can_read_is_replaced_by_an_adoption() {
    let place = Place::new("torn").await;
    assert_eq!(place.falaj(&["init", "--yes", "--with-tables"]).status.code(), Some(0));
    fs::write(place.state().join("base.jsonl"), "").unwrap();
    let refused = place.falaj(&["init", "--yes"]);
    let said = stderr(&refused);
    assert!(refused.status.code() == Some(78) && said.contains("falaj init --adopt-slot"), "{said}");
    let adopted = place.falaj(&["init", "--yes", "--adopt-slot"]);
    assert_eq!(adopted.status.code(), Some(0), "{}", stderr(&adopted));
    assert!(state::header(&place.state()).unwrap().unwrap().adopted);
    assert!(stdout(&place.falaj(&["init"])).contains("nothing to do"));
    place.leave().await;
}

/// Also a key that is DEFERRABLE identifies no row for Postgres.
#[tokio::test]
async fn init_notes_tables_whose_updates_fail_once_they_are_published() {
    let place = Place::new("bare").await;
    let sql = place.sql().await;
    sql.batch_execute(
        "CREATE TABLE public.bare (n int); CREATE TABLE public.late (n int PRIMARY KEY DEFERRABLE);
         CREATE TABLE public.whole (n int); ALTER TABLE public.whole REPLICA IDENTITY FULL;
         CREATE TABLE public.keyed (n int PRIMARY KEY)",
    )
    .await
    .unwrap();
    let tables = ["bare", "keyed", "late", "whole"];
    let blocks: String = tables.iter().map(|table| format!("[[table]]\nname = \"{table}\"\n")).collect();
    fs::write(place.dir.path().join("falaj.toml"), blocks).unwrap();
    let plan = stdout(&place.falaj(&["init"]));
    let notes: Vec<_> = plan.lines().filter_map(|line| line.strip_prefix("note: ")).collect();
    let note = |table: &str| {
        format!(
            "UPDATE and DELETE on {table} will fail once it is published: \
             give it a primary key or REPLICA IDENTITY FULL"
        )
    };
    assert_eq!(notes, ["bare", "late"].map(note), "{plan}");
    let topic = |name: &str, rest: &str| plan.contains(&format!("  +  topic {}.{name}, {rest}\n", place.name));
    assert!(topic("checkpoint", "1 partition, compacted"), "{plan}");
    assert!(topic("dead_letter", "1 partition, kept for ever") && topic("bare", "3 partitions"), "{plan}");
    let made = place.falaj(&["init", "--yes"]);
    assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
    // And so it is.
    let refused = sql.execute("UPDATE public.late SET n = 2", &[]).await.unwrap_err();
    assert!(refused.as_db_error().unwrap().message().contains("replica identity"), "{refused:?}");
    let (findings, code) = place.check();
    let told = finding(&findings, "replica_identity");
    assert_eq!((code, &told["found"]), (0, &Value::from(r#"none: "public"."bare", "public"."late""#)), "{told}");
    assert!(!stdout(&place.falaj(&["init"])).contains("note: "));
    place.leave().await;
}

#[tokio::test]
async fn a_slot_that_sends_what_is_only_prepared_is_refused() {
    let place = Place::new("prepared").await;
    place.sql().await.batch_execute(include_str!("../../sql/01_tables.sql")).await.unwrap();
    let sql = "SELECT pg_create_logical_replication_slot($1, 'pgoutput', false, true)";
    place.sql().await.execute(sql, &[&place.name]).await.unwrap();
    let refused = place.falaj(&["init", "--yes", "--adopt-slot"]);
    assert!(refused.status.code() == Some(78) && stderr(&refused).contains("two_phase"), "{}", stderr(&refused));
    place.leave().await;
}

/// The slot's creation waits for running transactions, so that it can be ended there.
#[tokio::test]
async fn what_an_older_slot_has_left_counts_no_more_once_a_new_one_is_made() {
    let place = Place::new("older").await;
    assert_eq!(place.falaj(&["init", "--yes", "--with-tables"]).status.code(), Some(0));
    let base = place.state().join("base.jsonl");
    let text = fs::read(&base).unwrap();
    place.sql().await.query_one("SELECT pg_drop_replication_slot($1::text::name)", &[&place.name]).await.unwrap();
    let holder = place.sql().await;
    for signal in ["-TERM", "-KILL"] {
        holder.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
        let mut waiting = place.command(&["init", "--yes"]).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        // The second time there is none from the beginning.
        let creating = format!("pg_stat_activity WHERE query LIKE 'CREATE_REPLICATION_SLOT%{}%'", place.name);
        while count(&place, &creating).await == 0 {
            assert!(Instant::now() < deadline, "{signal}: no slot is being made");
        }
        assert!(Command::new("kill").args([signal, &waiting.id().to_string()]).status().unwrap().success());
        waiting.wait().unwrap();
        // The server may still make the slot: nothing old must be taken for what belongs to it.
        assert!(!base.exists(), "{signal}");
        let sql = format!("SELECT pg_terminate_backend(pid, 10000) FROM {creating}");
        holder.batch_execute(&sql).await.unwrap();
        holder.batch_execute("COMMIT").await.unwrap();
    }
    let made = place.falaj(&["init", "--yes"]);
    assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
    assert!(stdout(&made).contains("made slot") && fs::read(&base).unwrap() != text, "{}", stdout(&made));
    place.leave().await;
}

#[tokio::test]
async fn a_slot_whose_lookup_rows_cannot_be_written_is_dropped_again() {
    let place = Place::new("undo").await;
    fs::create_dir_all(place.state().join("base.tmp")).unwrap();
    let failed = place.falaj(&["init", "--yes", "--with-tables"]);
    assert_eq!(failed.status.code(), Some(1), "{}", stderr(&failed));
    assert!(stderr(&failed).contains("was dropped again"), "{}", stderr(&failed));
    assert_eq!(slots(&place).await, 0);
}

#[tokio::test]
async fn directories_that_are_none_are_refused() {
    let place = Place::new("dirs").await;
    fs::write(place.state(), "a file where the directory should be").unwrap();
    fs::write(place.dir.path().join("archive"), "another one").unwrap();
    let refused = place.falaj(&["init", "--yes", "--with-tables"]);
    assert_eq!(
        (refused.status.code(), stderr(&refused).contains("state_dir")),
        (Some(78), true),
        "{}",
        stderr(&refused)
    );
    let (findings, _) = place.check();
    assert_eq!(
        (&finding(&findings, "state_dir")["ok"], &finding(&findings, "archive_dir")["ok"]),
        (&false.into(), &false.into())
    );
}

#[tokio::test]
async fn an_unfit_lookup_table_is_refused_before_the_slot_exists() {
    let place = Place::new("lookup").await;
    let sql = "CREATE TABLE public.content (id uuid, title text, content_type text, length_seconds int, PRIMARY KEY (id, title)); \
               CREATE TABLE public.engagement_events (id int PRIMARY KEY, content_id uuid, duration_ms int)";
    place.sql().await.batch_execute(sql).await.unwrap();
    let refused = place.falaj(&["init", "--yes"]);
    assert_eq!(refused.status.code(), Some(78));
    assert!(stderr(&refused).contains("a primary key of 2 columns"), "{}", stderr(&refused));
    assert_eq!(slots(&place).await, 0);
}

#[tokio::test]
async fn a_state_directory_of_another_slot_is_never_overwritten() {
    let mut place = Place::new("foreign").await;
    assert_eq!(place.falaj(&["init", "--yes", "--with-tables"]).status.code(), Some(0));
    let before = fs::read(place.state().join("base.jsonl")).unwrap();
    place.env = vec![("FALAJ_POSTGRES__SLOT".into(), format!("{}_b", place.name))];
    let refused = place.falaj(&["init", "--yes"]);
    assert_eq!((refused.status.code(), stderr(&refused).contains("belongs to system")), (Some(78), true));
    assert_eq!(fs::read(place.state().join("base.jsonl")).unwrap(), before);
    assert_eq!(count(&place, &format!("pg_replication_slots WHERE slot_name = '{}_b'", place.name)).await, 0);
    place.leave().await;
}

/// What an `init` that is killed behind its slot leaves.
#[tokio::test]
async fn a_slot_without_lookup_rows_may_be_dropped_where_no_sink_has_anything() {
    let place = Place::new("killed").await;
    let init = ["init", "--yes", "--with-tables"];
    assert_eq!(place.falaj(&init).status.code(), Some(0));
    fs::remove_dir_all(place.state()).unwrap();
    let drop = format!("SELECT pg_drop_replication_slot('{}')", place.name);
    let refused = place.falaj(&init);
    assert!(refused.status.code() == Some(78) && stderr(&refused).contains(&drop), "{}", stderr(&refused));
    place.sql().await.batch_execute(&drop).await.unwrap();
    assert_eq!(place.falaj(&init).status.code(), Some(0));
    place.sql().await.batch_execute("INSERT INTO public.engagement_events (event_ts) VALUES (now())").await.unwrap();
    let lsn: String = place.sql().await.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    let produced = place.falaj(&["produce", "--until-lsn", &lsn]);
    assert_eq!(produced.status.code(), Some(0), "{}", stderr(&produced));
    fs::remove_dir_all(place.state()).unwrap();
    let refused = place.falaj(&init);
    assert!(refused.status.code() == Some(78) && !stderr(&refused).contains("drop"), "{}", stderr(&refused));
    place.leave().await;
}

#[tokio::test]
async fn check_says_found_needed_and_fix_and_nothing_else() {
    let place = Place::new("check").await;
    let (findings, code) = place.check();
    assert_eq!(code, 78);
    for finding in &findings {
        let mut keys: Vec<_> = finding.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["check", "fix", "found", "needed", "ok"]);
    }
    assert_eq!(finding(&findings, "wal_level")["found"], "logical");
    assert!(finding(&findings, "clock")["found"].as_str().unwrap().ends_with(" Postgres's"));
    assert_eq!(finding(&findings, "publication")["fix"], "falaj init");
    assert_eq!(finding(&findings, "slot")["ok"], false);
    let plain = place.falaj(&["check"]);
    assert_eq!(plain.status.code(), Some(78));
    let lines = stdout(&plain);
    assert!(lines.lines().any(|l| l.starts_with("FAIL  slot")), "{lines}");
    assert!(lines.lines().any(|l| l.starts_with("ok    redis")), "{lines}");
}

#[tokio::test]
async fn check_notes_a_slot_in_use_and_tables_without_identity() {
    let place = Place::new("busy").await;
    assert_eq!(place.falaj(&["init", "--yes", "--with-tables"]).status.code(), Some(0));
    let sql = format!("CREATE TABLE public.bare (n int); ALTER PUBLICATION {} ADD TABLE public.bare", place.name);
    place.sql().await.batch_execute(&sql).await.unwrap();
    let wire = Wire::connect(&Conninfo::gather(&place.url, &|_| None).unwrap(), "test").await.unwrap();
    let start =
        format!("START_REPLICATION SLOT \"{0}\" LOGICAL 0/0 (proto_version '1', publication_names '{0}')", place.name);
    let stream = wire.copy_both(&start).await.unwrap();
    let (findings, code) = place.check();
    let slot = finding(&findings, "slot");
    assert_eq!(slot["ok"], true);
    assert!(slot["found"].as_str().unwrap().contains("slot in use by pid "), "{slot}");
    assert!(finding(&findings, "replica_identity")["found"].as_str().unwrap().contains("\"bare\""));
    // The new table has no topic yet: that alone is wrong.
    let failed: Vec<_> = findings.iter().filter(|f| f["ok"] != true).filter_map(|f| f["check"].as_str()).collect();
    assert_eq!((failed, code), (vec!["kafka_topics"], 78));
    let busy = place.falaj(&["init", "--yes", "--adopt-slot"]);
    assert_eq!((busy.status.code(), stderr(&busy).contains("is in use by pid")), (Some(78), true));
    drop(stream);
    let sql = "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots WHERE slot_name::text = $1";
    place.sql().await.query(sql, &[&place.name]).await.unwrap();
    place.leave().await;
}

#[tokio::test]
async fn init_tells_of_a_checkpoint_topic_that_forgets_and_refuses_a_table_that_is_not_there() {
    let place = Place::new("strict").await;
    place.sql().await.batch_execute(include_str!("../../sql/01_tables.sql")).await.unwrap();
    let kafka = Config::load(None, std::env::vars()).unwrap().kafka;
    create_topic(&kafka, &format!("{}.checkpoint", place.name), 1, &[("cleanup.policy", "delete")]).await.unwrap();
    fs::write(place.dir.path().join("falaj.toml"), "[[table]]\nname = \"engagement_event\"\n").unwrap();
    let refused = place.falaj(&["init", "--yes"]);
    let said = stderr(&refused);
    assert!(refused.status.code() == Some(78) && said.contains("no table engagement_event,"), "{said}");
    assert_eq!((slots(&place).await, count(&place, "pg_publication").await), (0, 0));

    fs::remove_file(place.dir.path().join("falaj.toml")).unwrap();
    let made = place.falaj(&["init", "--yes"]);
    let said = stderr(&made);
    assert!(made.status.code() == Some(0) && said.contains("kafka_checkpoint"), "{said}");
    let fix = said.split("fix:").nth(1).unwrap();
    assert!(fix.contains("--bootstrap-server ") && fix.contains("cleanup.policy=compact"), "{said}");
    let (findings, code) = place.check();
    assert_eq!((code, &finding(&findings, "kafka_checkpoint")["ok"]), (78, &Value::Bool(false)));
    place.leave().await;
}

#[tokio::test]
async fn check_notes_a_database_that_takes_bytes_of_any_encoding() {
    let mut place = Place::new("bytes").await;
    let sql = place.sql().await;
    let name = format!("{}_ascii", place.name);
    let made = format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'");
    sql.batch_execute(&made).await.unwrap();
    let is_told = |place: &Place| place.check().0.iter().any(|f| f["check"] == "server_encoding");
    assert!(!is_told(&place));
    place.url = place.url.replace(&place.name, &name);
    let note = finding(&place.check().0, "server_encoding").clone();
    assert_eq!((&note["ok"], &note["found"]), (&Value::Bool(true), &Value::from("SQL_ASCII")), "{note}");
    sql.batch_execute(&format!("DROP DATABASE {name}")).await.unwrap();
    place.url = place.url.replace(&name, &place.name);
    place.leave().await;
}

/// A broker says that a topic is made before it knows it itself.
#[tokio::test]
async fn a_topic_just_made_is_there_for_who_comes_next() {
    let kafka = Config::load(None, std::env::vars()).unwrap().kafka;
    for number in 0..10 {
        let topic = format!("setup_next_{}.{number}", std::process::id());
        create_topic(&kafka, &topic, 48, &[]).await.unwrap();
        let asked = kafka.clone();
        let topics = tokio::task::spawn_blocking(move || topics(&asked, TIMEOUT)).await.unwrap().unwrap();
        assert_eq!((number, topics.get(&topic)), (number, Some(&48)));
    }
}

#[tokio::test]
async fn unreachable_servers_alone_give_69() {
    let mut place = Place::new("away").await;
    assert_eq!(place.falaj(&["init", "--yes", "--with-tables"]).status.code(), Some(0));
    place.env = vec![("FALAJ_REDIS__URL".into(), "redis://127.0.0.1:1/".into())];
    let (findings, code) = place.check();
    assert_eq!((code, &finding(&findings, "redis")["ok"]), (69, &Value::Bool(false)));
    place.env = vec![("FALAJ_KAFKA__BOOTSTRAP_SERVERS".into(), "127.0.0.1:1".into())];
    let (findings, code) = place.check();
    assert_eq!((code, &finding(&findings, "kafka")["ok"]), (69, &Value::Bool(false)));
    place.env = vec![("FALAJ_POSTGRES__URL".into(), "postgres://postgres@127.0.0.1:1/postgres".into())];
    let (findings, code) = place.check();
    assert_eq!((code, &finding(&findings, "postgres")["ok"]), (69, &Value::Bool(false)));
    place.env = vec![("FALAJ_REDIS__URL".into(), "http://nonsense".into())];
    assert_eq!(place.check().1, 78);
    // What nobody uses is not asked for.
    place.env = ["FALAJ_REDIS__URL", "FALAJ_EXTERNAL__URL"].map(|name| (name.to_owned(), String::new())).into();
    let (findings, code) = place.check();
    assert!(findings.iter().all(|f| f["check"] != "redis" && f["check"] != "external"), "{findings:?}");
    assert_eq!(code, 0);
    place.leave().await;
}

#[tokio::test]
async fn a_server_that_cannot_stream_is_refused_by_init_and_check_in_the_same_words() {
    let server = Server::start("limits").await;
    let mut place = Place::new("limits").await;
    place.url.clone_from(&server.url);
    let refused = |place: &Place, check: &str| {
        let (findings, code) = place.check();
        let told = finding(&findings, check);
        let init = place.falaj(&["init", "--yes", "--with-tables"]);
        assert_eq!((code, init.status.code(), &told["ok"]), (78, Some(78), &Value::Bool(false)), "{told}");
        for part in ["found", "needed", "fix"] {
            assert!(stderr(&init).contains(told[part].as_str().unwrap()), "{told}: {}", stderr(&init));
        }
        told.clone()
    };
    server.configure("max_replication_slots = 0");
    server.restart();
    let told = refused(&place, "replication_slots");
    assert_eq!(told["found"], "0 of 0 in use");
    server.configure("wal_level = replica");
    server.restart();
    let told = refused(&place, "wal_level");
    assert_eq!(told["fix"], "ALTER SYSTEM SET wal_level = logical; then restart the server");
    server.configure("wal_level = logical\nmax_replication_slots = 5");
    server.restart();
    server.sql().await.batch_execute("CREATE ROLE plain LOGIN").await.unwrap();
    place.url = server.url.replace("postgres@", "plain@");
    let told = refused(&place, "role_replication");
    assert!(told["fix"].as_str().unwrap().starts_with("ALTER ROLE \"plain\" REPLICATION;"));
    server.hba("host all all all scram-sha-256").await;
    let told = refused(&place, "postgres_password");
    assert!(told["fix"].as_str().unwrap().contains("PGPASSWORD"));
}
