//! What `falaj produce` refuses: with which code and words, and that it has written nothing and moved nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use falaj::lsn::{Lsn, SlotIdentity};

use crate::rig::process::Ended;
use crate::rig::stack::Stack;
use crate::rig::{Pipeline, Servers, archive, check, kafka, until};

/// A pipeline that has streamed 100 events.
async fn streamed(name: &str) -> Pipeline {
    let p = Pipeline::new(name).await;
    rows(&p).await;
    p.produce().await;
    p
}

async fn rows(p: &Pipeline) {
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 100)").await;
}

/// What a refusal must leave as it is.
#[derive(PartialEq, Debug)]
struct Trace {
    ends: Vec<i64>,
    files: BTreeMap<String, Vec<u8>>,
    idle: Option<String>,
    confirmed: String,
}

async fn trace(p: &Pipeline) -> Trace {
    let topics = [p.config.checkpoint_topic(), p.config.topic("content"), p.config.topic("engagement_events")];
    let slot = format!("SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{}'", p.name);
    let exists = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{}'", p.name);
    Trace {
        ends: kafka::settled_ends(&p.config, &topics).await,
        files: archive::files(&p.archive()),
        idle: std::fs::read_to_string(p.archive().join("position.json")).ok(),
        confirmed: if p.text(&exists).await == "1" { p.text(&slot).await } else { "no slot".into() },
    }
}

/// `falaj produce` must end with 78 and these words, and leave everything as it was.
async fn must_refuse(p: &Pipeline, words: &[&str]) -> Ended {
    let before = trace(p).await;
    let ended = p.start(&["produce"]).end().await;
    assert_eq!(ended.code, Some(78), "{}", ended.log);
    for word in [words, &["found:", "needed:", "fix:"]].concat() {
        assert!(ended.log.contains(word), "{word} is not in: {}", ended.log);
    }
    assert_eq!(trace(p).await, before);
    assert_eq!(p.reader().await, "");
    ended
}

async fn identity(p: &Pipeline) -> SlotIdentity {
    let system_id = p.text("SELECT system_identifier FROM pg_control_system()").await;
    SlotIdentity { system_id, timeline: 1, slot: p.name.clone() }
}

async fn checkpoint(p: &Pipeline, identity: &SlotIdentity, lsn: Lsn) {
    let value = serde_json::json!({ "identity": identity, "end_lsn": lsn }).to_string();
    kafka::write(&p.config, &p.config.checkpoint_topic(), &p.name, &value).await;
}

fn idle_position(p: &Pipeline, identity: &SlotIdentity, lsn: Lsn) {
    let value = serde_json::json!({ "identity": identity, "lsn": lsn }).to_string();
    std::fs::write(p.archive().join("position.json"), value).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_somebody_advanced() {
    let p = streamed("advanced").await;
    let stood = p.confirmed().await;
    rows(&p).await;
    p.run(&format!("SELECT pg_replication_slot_advance('{}', pg_current_wal_lsn())", p.name)).await;
    let confirmed = p.confirmed().await;
    assert!(confirmed > stood);
    must_refuse(&p, &["sink_position", &format!("stands at {stood}"), &format!("acknowledged up to {confirmed}")])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_of_another_system_or_timeline() {
    let p = streamed("foreign").await;
    let ours = identity(&p).await;
    let (at, path) = (p.confirmed().await, p.archive().join("position.json"));
    for other in [
        SlotIdentity { system_id: "7000000000000000001".into(), ..ours.clone() },
        SlotIdentity { timeline: 2, ..ours.clone() },
    ] {
        let words = other.to_string();
        checkpoint(&p, &other, at).await;
        must_refuse(&p, &["kafka_position", &words, &ours.to_string()]).await;
        checkpoint(&p, &ours, at).await;
        idle_position(&p, &other, at);
        must_refuse(&p, &["archive_position", &words, &ours.to_string()]).await;
        std::fs::remove_file(&path).unwrap();
    }
    let base = p.config.state.dir.join("base.jsonl");
    let text = std::fs::read_to_string(&base).unwrap();
    std::fs::write(&base, text.replace(&ours.system_id, "7000000000000000001")).unwrap();
    must_refuse(&p, &["lookup_state", "7000000000000000001"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_that_is_pointed_to_the_archive_of_another_one_disturbs_it_not() {
    let p = streamed("archive").await;
    let mut other = p.sibling("other", "falaj").await;
    other.set("FALAJ_ARCHIVE__DIR", &p.archive().display().to_string());
    let produce = p.start(&["produce"]);
    p.streams("").await;
    for verb in [&["produce"][..], &["backfill", "content"]] {
        let ended = other.start(verb).end().await;
        assert!(ended.code == Some(78) && ended.log.contains("archive_position"), "{verb:?}: {}", ended.log);
    }
    rows(&p).await;
    until("it goes on", async || p.records("engagement_events").await.len() == 200).await;
    produce.drains().await;
    assert_eq!(p.rows("engagement_events"), p.values("engagement_events").await);
}

/// A staging server with the names of production, and by mistake with its brokers.
#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_that_is_pointed_to_the_topics_of_another_one_disturbs_it_not() {
    let p = streamed("brokers").await;
    let stack = Stack::up("brokers", &["postgres"]);
    let mut other = Pipeline::on(Servers::shared().with(stack.addresses()), "staging").await;
    rows(&other).await;
    other.run(&format!("SELECT pg_create_logical_replication_slot('{}', 'pgoutput')", p.name)).await;
    other.set("FALAJ_PIPELINE", &p.name);
    other.set("FALAJ_POSTGRES__SLOT", &p.name);
    let produce = p.start(&["produce"]);
    p.streams("").await;
    let before = kafka::ends_of_all(&p.config, &p.config.topic("engagement_events")).await;
    for verb in [&["produce"][..], &["backfill", "engagement_events"]] {
        let ended = other.start(verb).end().await;
        assert!(ended.code == Some(78) && ended.log.contains("kafka_position"), "{verb:?}: {}", ended.log);
    }
    assert_eq!(kafka::ends_of_all(&p.config, &p.config.topic("engagement_events")).await, before);
    rows(&p).await;
    until("it goes on", async || p.records("engagement_events").await.len() == 200).await;
    produce.drains().await;
    assert_eq!(p.rows("engagement_events"), p.values("engagement_events").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_ahead_of_the_server() {
    let p = streamed("ahead").await;
    let (ours, at, ahead) = (identity(&p).await, p.confirmed().await, Lsn(0xFFFF_0000_0000));
    let ends = |log: &str| -> Lsn {
        let rest = &log[log.find("WAL ends at ").expect("the server's LSN") + 12..];
        rest[..rest.find(':').unwrap()].parse().unwrap()
    };
    checkpoint(&p, &ours, ahead).await;
    let ended = must_refuse(&p, &["sink_position", "kafka stands at FFFF/0"]).await;
    assert!(ends(&ended.log) >= at && ends(&ended.log) < ahead);
    checkpoint(&p, &ours, at).await;
    idle_position(&p, &ours, ahead);
    must_refuse(&p, &["sink_position", "archive stands at FFFF/0"]).await;
}

/// A server whose files are set back to an older state, and which goes on until its WAL is longer than before: by identity,
/// timeline and LSNs it is the same.
struct SetBack {
    stack: Stack,
    data: PathBuf,
    copy: PathBuf,
}

impl SetBack {
    async fn new(name: &str) -> (Self, Pipeline) {
        let stack = Stack::up(name, &["postgres"]);
        let p = Pipeline::on(Servers::shared().with(stack.addresses()), name).await;
        let data = stack.dir().join("postgres").canonicalize().unwrap().join("data");
        let copy = data.with_file_name("copy");
        (Self { stack, data, copy }, p)
    }

    /// Between the server's end and its next start.
    async fn meanwhile(&self, p: Pipeline, command: String) -> Pipeline {
        self.stack.call(&["stop", "postgres"]);
        assert!(Command::new("sh").args(["-c", &command]).status().unwrap().success());
        self.stack.call(&["up", "postgres"]);
        p.reconnect().await
    }

    async fn copy(&self, p: Pipeline) -> Pipeline {
        self.meanwhile(p, format!("cp -a {} {}", self.data.display(), self.copy.display())).await
    }

    /// Until the new history has rows behind `stood`.
    async fn set_back_and_go_on(&self, p: Pipeline, stood: Lsn) -> Pipeline {
        let p = self.meanwhile(p, format!("rm -r {0} && mv {1} {0}", self.data.display(), self.copy.display())).await;
        assert!(p.lsn().await < stood);
        while p.lsn().await < stood {
            rows(&p).await;
        }
        rows(&p).await;
        p
    }
}

const RESTORED: [&str; 2] = ["sink_position", "restored from an older state of its files"];

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_set_back_and_went_on() {
    let (server, mut p) = SetBack::new("setback").await;
    rows(&p).await;
    p.produce().await;
    p = server.copy(p).await;
    rows(&p).await;
    let stood = p.produce().await;
    p.produce().await;
    p = server.set_back_and_go_on(p, stood).await;
    for _ in 0..2 {
        must_refuse(&p, &RESTORED).await;
    }
}

/// The sinks' last transaction is in what was set back too; behind it they have an idle position alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_set_back_to_where_the_sinks_had_nothing_more() {
    for idle_from_the_start in [false, true] {
        let (server, mut p) = SetBack::new(&format!("setidle{idle_from_the_start}").to_lowercase()).await;
        if !idle_from_the_start {
            rows(&p).await;
        }
        p.produce().await;
        p = server.copy(p).await;
        p.run("CREATE TABLE unpublished AS SELECT g, repeat('x', 100) FROM generate_series(1, 20000) AS g").await;
        let stood = p.produce().await;
        p = server.set_back_and_go_on(p, stood).await;
        for _ in 0..2 {
            must_refuse(&p, &RESTORED).await;
        }
    }
}

/// What is refused in the end because one sink has another history is not given to the one that is behind it either.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_set_back_gives_nothing_to_the_sink_that_is_behind() {
    let (server, mut p) = SetBack::new("setbehind").await;
    rows(&p).await;
    p.produce().await;
    p = server.copy(p).await;
    rows(&p).await;
    let stood = p.lsn().await;
    p.produce_until(stood, &["--sinks", "kafka"]).await;
    p = server.set_back_and_go_on(p, stood).await;
    p.set("FALAJ_ARCHIVE__SEAL_AFTER", "1ms");
    must_refuse(&p, &RESTORED).await;
    // The one that knows may even be left out.
    let before = trace(&p).await;
    let ended = p.start(&["produce", "--sinks", "archive"]).end().await;
    assert_eq!((ended.code, trace(&p).await), (Some(78), before), "{}", ended.log);
}

/// What the one has must come again, and does not hold back what the other gets meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_sink_that_catches_up_is_acknowledged_on_the_way() {
    let p = streamed("catchup").await;
    rows(&p).await;
    let half = p.lsn().await;
    rows(&p).await;
    let before = p.confirmed().await;
    p.produce_until(p.lsn().await, &["--sinks", "kafka"]).await;
    assert_eq!(p.confirmed().await, before);
    p.produce_until(half, &[]).await;
    assert_eq!(p.confirmed().await, half);
    p.produce().await;
    assert_eq!(
        (p.rows("engagement_events"), 300),
        (p.values("engagement_events").await, p.rows("engagement_events").len())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_slot_before_the_start_and_while_streaming() {
    let stack = Stack::up("lost", &["postgres"]);
    let p = Pipeline::on(Servers::shared().with(stack.addresses()), "lost").await;
    rows(&p).await;
    p.produce().await;
    p.run("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'").await;
    p.run("SELECT pg_reload_conf()").await;
    p.run("CREATE TABLE elsewhere (t text)").await;
    let produce = p.start(&["produce"]);
    p.streams("").await;
    produce.signal("-STOP");
    lose_wal(&p).await;
    produce.signal("-CONT");
    let ended = produce.end().await;
    assert_eq!(
        (ended.code, ended.log.contains("is lost: Postgres has removed WAL")),
        (Some(78), true),
        "{}",
        ended.log
    );
    must_refuse(&p, &["slot", "is lost", "max_slot_wal_keep_size", "init --snapshot"]).await;
}

/// Fills segments until the slot has lost one of its own.
async fn lose_wal(p: &Pipeline) {
    let status = format!("SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{}'", p.name);
    let began = Instant::now();
    while p.text(&status).await != "lost" {
        assert!(began.elapsed() < Duration::from_secs(60), "the slot keeps its WAL");
        p.run("INSERT INTO elsewhere SELECT repeat('x', 1000) FROM generate_series(1, 1000)").await;
        p.run("SELECT pg_switch_wal()").await;
        p.run("CHECKPOINT").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absent_slot_one_of_another_plugin_one_of_another_database() {
    let p = streamed("plugin").await;
    let drop = format!("SELECT pg_drop_replication_slot('{}')", p.name);
    p.run(&drop).await;
    must_refuse(&p, &[&format!("no slot \"{}\"", p.name), "falaj init"]).await;
    // Nor is the table copied once more into sinks that have it.
    let before = trace(&p).await;
    let init = p.start(&["init", "--yes", "--snapshot"]).end().await;
    assert!(init.code == Some(78) && init.log.contains("of one that has gone"), "{}", init.log);
    assert_eq!(trace(&p).await, before);
    p.run(&format!("SELECT pg_create_logical_replication_slot('{}', 'test_decoding')", p.name)).await;
    must_refuse(&p, &["test_decoding", "pgoutput"]).await;
    p.run(&drop).await;
    let other = Pipeline::bare(Servers::shared(), "elsewhere").await;
    other.run(&format!("SELECT pg_create_logical_replication_slot('{}', 'pgoutput')", p.name)).await;
    must_refuse(&p, &[&format!("belongs to database \"{}\"", other.name), &p.name]).await;
}

/// What a listener refuses is refused by every verb that needs Kafka, at its start and without the password.
#[tokio::test(flavor = "multi_thread")]
async fn a_kafka_password_or_tls_that_is_not_taken() {
    let stack = Stack::up_with("sasl", &["kafka"], &[("FALAJ_STACK_KAFKA_PASSWORD", "r1ght")]);
    let ports = std::fs::read_to_string(stack.dir().join("ports")).unwrap();
    let port = ports.lines().find_map(|line| line.strip_prefix("kafka_sasl ")).unwrap();
    let listener = [("FALAJ_KAFKA__BOOTSTRAP_SERVERS".to_owned(), format!("127.0.0.1:{port}"))].into();
    let mut p = Pipeline::bare(Servers::shared().with(listener), "sasl").await;
    p.set("FALAJ_KAFKA__SECURITY_PROTOCOL", "sasl_plaintext");
    p.set("FALAJ_KAFKA__SASL_MECHANISMS", "PLAIN");
    p.set("FALAJ_KAFKA__SASL_USERNAME", "falaj");
    p.set("FALAJ_KAFKA__SASL_PASSWORD", "r1ght");
    p.init().await;
    rows(&p).await;
    p.produce().await;
    assert_eq!(p.values("engagement_events").await.len(), 100);
    let verbs: [&[&str]; 6] = [
        &["produce"],
        &["init", "--yes"],
        &["consume", "--sinks", "redis"],
        &["consume", "--sinks", "external"],
        &["backfill", "content"],
        &["check"],
    ];
    let mut refused = async |key: &str, value: &str, words: &str, verbs: &[&[&str]]| {
        p.set(key, value);
        for verb in verbs {
            let ended = p.start(verb).end().await;
            let said = format!("{}{}", ended.out, ended.log);
            assert!(ended.code == Some(78) && said.contains(words), "{verb:?}: {said}");
            assert!(!said.contains("wr0ng") && !said.contains("r1ght"), "{verb:?}: {said}");
        }
    };
    refused("FALAJ_KAFKA__SASL_PASSWORD", "wr0ng", "kafka_rights", &verbs).await;
    // A listener that hangs up may do so for another reason: it is asked for a while.
    refused("FALAJ_KAFKA__SECURITY_PROTOCOL", "sasl_ssl", "kafka_tls", &[&["produce"], &["init", "--yes"], &["check"]])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_made_by_hand() {
    let p = Pipeline::bare(Servers::shared(), "byhand").await;
    p.run(include_str!("../sql/01_tables.sql")).await;
    p.run(include_str!("../sql/02_publication.sql")).await;
    p.run(&format!("SELECT pg_create_logical_replication_slot('{}', 'pgoutput')", p.name)).await;
    let ended = p.start(&["init", "--yes"]).end().await;
    let words = ended.log.contains("lookup_state") && ended.log.contains(&p.name) && ended.log.contains("--adopt-slot");
    assert_eq!((ended.code, words), (Some(78), true), "{}", ended.log);
    p.start(&["init", "--yes", "--adopt-slot"]).ends_well().await;
    rows(&p).await;
    p.produce().await;
    assert_eq!(p.values("engagement_events").await.len(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_or_torn_lookup_state() {
    let p = streamed("nostate").await;
    let dir = p.config.state.dir.clone();
    let base = dir.join("base.jsonl");
    let text = std::fs::read_to_string(&base).unwrap();
    std::fs::write(&base, &text[..text.len() - 4]).unwrap();
    must_refuse(&p, &["lookup_state", "base.jsonl"]).await;
    std::fs::remove_dir_all(&dir).unwrap();
    must_refuse(&p, &["lookup_state", &dir.display().to_string(), "--adopt-slot"]).await;
    assert!(!base.exists());
    // An archive that is lost with it must not begin where the slot stands, as if it were new.
    let kept = p.archive().with_extension("kept");
    std::fs::rename(p.archive(), &kept).unwrap();
    let ended = p.start(&["init", "--yes", "--adopt-slot"]).end().await;
    assert!(ended.log.contains("archive has no position, kafka has"), "{}", ended.log);
    assert_eq!(ended.code, Some(78));
    std::fs::rename(&kept, p.archive()).unwrap();
    p.start(&["init", "--yes", "--adopt-slot"]).ends_well().await;
    // Nor after an adoption for another reason.
    rows(&p).await;
    p.produce().await;
    std::fs::remove_dir_all(p.archive()).unwrap();
    p.start(&["init", "--yes", "--adopt-slot"]).ends_well().await;
    must_refuse(&p, &["sink_position", "archive has no position"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_of_the_lookup_state() {
    // The archive's position stands in its last batch, or, when nothing of ours has come since, in a file.
    for (sinks, idle) in [("kafka", false), ("archive", false), ("archive", true), ("kafka,archive", true)] {
        let mut p = Pipeline::new("older").await;
        p.set("FALAJ_PRODUCE__SINKS", sinks);
        let play = "INSERT INTO engagement_events (content_id, event_ts) SELECT id, now() FROM content";
        p.run("INSERT INTO content VALUES (md5('a')::uuid, 'a', 'first', 'podcast', 60, now())").await;
        p.run(play).await;
        p.produce().await;
        let (dir, aside) = (p.config.state.dir.clone(), p.config.state.dir.with_extension("aside"));
        copy(&dir, &aside);
        p.run("UPDATE content SET title = 'second'").await;
        p.run(play).await;
        p.produce().await;
        if idle {
            p.run("CREATE TABLE not_published ()").await;
            p.produce().await;
        }
        assert_eq!(p.archive().join("position.json").exists(), idle);
        let swap = || {
            let between = dir.with_extension("between");
            std::fs::rename(&dir, &between).unwrap();
            std::fs::rename(&aside, &dir).unwrap();
            std::fs::rename(&between, &aside).unwrap();
        };
        swap();
        p.run(play).await;
        must_refuse(&p, &["lookup_state", "an older copy", "--adopt-slot"]).await;
        swap();
        p.produce().await;
        let events = if sinks == "archive" { p.rows("engagement_events") } else { p.values("engagement_events").await };
        let titles: Vec<_> =
            events.iter().map(|e| e.split("\"title\":").nth(1).unwrap().split(',').next().unwrap()).collect();
        assert_eq!(titles, [r#""first""#, r#""second""#, r#""second""#]);
        // The other way out: the rows of now.
        swap();
        p.start(&["init", "--yes", "--adopt-slot"]).ends_well().await;
        p.run(play).await;
        p.produce().await;
    }
}

fn copy(dir: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap()) {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_without_a_position_while_the_slot_has_moved_on() {
    let mut p = Pipeline::new("moved").await;
    let origin = p.confirmed().await;
    p.set("FALAJ_PRODUCE__SINKS", "kafka");
    rows(&p).await;
    let confirmed = p.produce().await;
    p.set("FALAJ_PRODUCE__SINKS", "kafka,archive");
    must_refuse(&p, &["archive has no position", &confirmed.to_string(), &origin.to_string()]).await;
    // The same when it had one and lost it.
    let p = streamed("lostsink").await;
    std::fs::remove_dir_all(p.archive()).unwrap();
    must_refuse(&p, &["archive has no position"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_lost_its_last_batch() {
    let p = streamed("lastbatch").await;
    let first = p.confirmed().await;
    rows(&p).await;
    let confirmed = p.produce().await;
    let last = archive::batches(&p.archive()).pop().unwrap();
    std::fs::remove_dir_all(p.archive().join(last)).unwrap();
    let _ = std::fs::remove_file(p.archive().join("position.json"));
    let ended = must_refuse(&p, &["sink_position", "archive stands at", &confirmed.to_string()]).await;
    let stands: Lsn = ended.log.split("stands at ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    assert!(stands <= first && stands < confirmed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_topic() {
    let mut p = Pipeline::bare(Servers::shared(), "notopic").await;
    p.set("FALAJ_PRODUCE__SINKS", "archive");
    p.init().await;
    rows(&p).await;
    p.set("FALAJ_PRODUCE__SINKS", "kafka,archive");
    let before = p.confirmed().await;
    let ended = p.start(&["produce"]).end().await;
    let words = ended.log.contains(&p.config.checkpoint_topic()) && ended.log.contains("falaj init");
    assert_eq!((ended.code, words), (Some(78), true), "{}", ended.log);
    assert_eq!((archive::batches(&p.archive()).len(), p.confirmed().await), (0, before));
    for topic in [p.config.checkpoint_topic(), p.config.topic("content")] {
        falaj::kafka::create_topic(&p.config.kafka, &topic, 1, &[]).await.unwrap();
    }
    let ended = p.start(&["produce"]).end().await;
    let words = ended.log.contains(&p.config.topic("engagement_events")) && ended.log.contains("falaj init");
    assert_eq!((ended.code, words), (Some(78), true), "{}", ended.log);
    assert_eq!((archive::batches(&p.archive()).len(), p.confirmed().await), (0, before));
    p.init().await;
    p.produce().await;
    assert_eq!((p.values("engagement_events").await.len(), p.rows("engagement_events").len()), (100, 100));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_publication() {
    let p = streamed("nopub").await;
    p.run("DROP PUBLICATION falaj").await;
    must_refuse(&p, &["no publication \"falaj\"", "falaj init"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_without_the_right_to_stream() {
    let mut p = streamed("rights").await;
    let role = format!("{}_role", p.name);
    p.run(&format!("CREATE ROLE {role} LOGIN")).await;
    let url = p.config.postgres.url.replace("postgres://postgres@", &format!("postgres://{role}@"));
    p.set("FALAJ_POSTGRES__URL", &url);
    must_refuse(&p, &["REPLICATION"]).await;
    p.run(&format!("DROP ROLE {role}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_said_at_once() {
    let stack = Stack::up("password", &["postgres"]);
    let mut p = Pipeline::on(Servers::shared().with(stack.addresses()), "password").await;
    p.run("CREATE ROLE app LOGIN SUPERUSER PASSWORD 'right'").await;
    let file = p.text("current_setting('hba_file')").await;
    let rules = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("host all app 127.0.0.1/32 scram-sha-256\n{rules}")).unwrap();
    p.run("SELECT pg_reload_conf()").await;
    let (right, wrong) = ["right", "wrong"]
        .map(|word| p.config.postgres.url.replace("postgres://postgres@", &format!("postgres://app:{word}@")))
        .into();
    p.set("FALAJ_POSTGRES__URL", &wrong);
    let began = Instant::now();
    let ended = must_refuse(&p, &["postgres_password"]).await;
    assert!(began.elapsed() < Duration::from_secs(10) && !ended.log.contains("wrong"), "{}", ended.log);
    p.set("FALAJ_POSTGRES__URL", &right);
    rows(&p).await;
    p.produce().await;
    assert_eq!(p.values("engagement_events").await.len(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_cannot_be_reached_are_69_after_half_a_minute() {
    let mut p = streamed("nobody").await;
    let before = trace(&p).await;
    let config = p.config.clone();
    let began = Instant::now();
    let kafka = {
        p.set("FALAJ_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1");
        let process = p.start(&["produce"]);
        p.set("FALAJ_KAFKA__BOOTSTRAP_SERVERS", config.kafka.servers());
        process
    };
    p.set("FALAJ_POSTGRES__URL", "postgres://postgres@127.0.0.1:1/postgres");
    let postgres = p.start(&["produce"]);
    p.set("FALAJ_POSTGRES__URL", &config.postgres.url);
    for (process, words) in [(postgres, "127.0.0.1:1"), (kafka, "Kafka at 127.0.0.1:1")] {
        let ended = process.end().await;
        assert_eq!((ended.code, ended.log.contains(words)), (Some(69), true), "{}", ended.log);
        let took = began.elapsed();
        assert!(took > Duration::from_secs(25) && took < Duration::from_secs(60), "{words}: {took:?}");
    }
    assert_eq!(trace(&p).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_words_are_2_and_wrong_settings_78() {
    let mut p = Pipeline::new("words").await;
    for args in [
        &["produce", "--until-lsn", "17"][..],
        &["produce", "--until-lsn"],
        &["produce", "--sinks", "nowhere"],
        &["produce", "--no-such-flag"],
        &["no-such-verb"],
        &[],
    ] {
        let ended = p.start(args).end().await;
        assert_eq!((ended.code, ended.out.as_str()), (Some(2), ""), "{args:?}: {}", ended.log);
    }
    p.set("FALAJ_PRODUCE__SINKS", "kafka");
    let ended = p.start(&["produce", "--sinks", "archive"]).end().await;
    assert_eq!((ended.code, ended.log.contains("produce.sinks")), (Some(2), true), "{}", ended.log);
    let file = p.archive().with_file_name("wrong.toml");
    for (text, word) in [
        ("[postgres]\nslott = \"x\"\n", "slott"),
        ("[kafka]\npartitions = \"x\"\n", "partitions"),
        ("[produce]\ntransaction_bytes = \"lots\"\n", "lots"),
        ("[produce\n", "wrong.toml"),
        ("[kafka]\n\"no.such.key\" = \"x\"\n", "no.such.key"),
    ] {
        std::fs::write(&file, text).unwrap();
        let ended = p.start(&["-c", &file.display().to_string(), "produce"]).end().await;
        assert_eq!((ended.code, ended.log.contains(word)), (Some(78), true), "{text}: {}", ended.log);
    }
    let ended = p.start(&["-c", "/nowhere.toml", "produce"]).end().await;
    assert_eq!((ended.code, ended.log.contains("/nowhere.toml")), (Some(78), true), "{}", ended.log);
    let ends = kafka::ends(&p.config, &check::TABLES.map(|t| p.config.topic(t))).await;
    assert_eq!(ends, [0; 6]);
}
