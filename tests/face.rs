//! What an operator sees: the HTTP listener and its dashboard, `status`, `top`, `tap`, `healthcheck`, `run` and `demo`, against real servers.

mod live;
mod page;
mod troupe;

use std::collections::BTreeSet;

use futures_util::future::join_all;
use serde_json::{Value, json};

use self::troupe::{Process, Stage, until};

/// A standby is alive and not ready, and says what it waits for; once the slot is free it is ready.
#[tokio::test]
async fn a_process_is_ready_once_every_check_passes() {
    let stage = Stage::new("ready").await;
    let owner = stage.start(&["produce"]);
    let first = owner.http().await;
    until("the owner is ready", async || first.get("/readyz").await.0 == 200).await;
    let standby = stage.start(&["produce"]);
    let http = standby.http().await;
    assert_eq!(http.get("/livez").await, (200, "ok\n".into()));
    let failing = async || -> Value {
        let (status, body) = http.get("/readyz").await;
        assert_eq!(status, 503, "{body}");
        serde_json::from_str::<Value>(&body).unwrap()["failing"].take()
    };
    until("the standby has met the slot in use", async || failing().await.get("slot").is_some()).await;
    assert_eq!(failing().await["replication"], "starting");
    assert_eq!(owner.ends("-TERM").await, 0, "{}", owner.log());
    until("the standby is ready", async || http.get("/readyz").await.0 == 200).await;
    let (_, body) = http.get("/readyz").await;
    assert_eq!(
        serde_json::from_str::<Value>(&body).unwrap(),
        json!({"ready": true, "failing": {}, "passing": ["replication", "slot"]})
    );
}

#[tokio::test]
async fn metrics_carry_the_names_that_dashboards_rely_on() {
    let stage = Stage::new("metrics").await;
    let run = stage.start(&["run"]);
    let http = run.http().await;
    stage.generate(50).await;
    until("the board has events", async || !http.json("/api/v1/board").await["devices"].as_array().unwrap().is_empty())
        .await;
    // Who asks together is answered by one look.
    let asked = join_all((0..20).map(|_| http.json("/api/v1/board?top=3"))).await;
    let moments: BTreeSet<&str> = asked.iter().map(|board| board["as_of"].as_str().unwrap()).collect();
    assert!(moments.len() <= 3, "{moments:?}");
    let wanted = [
        "falaj_produce_events_total ",
        "falaj_produce_lag_bytes{sink=\"kafka\"} ",
        "falaj_produce_lag_seconds{sink=\"archive\"} ",
        "falaj_produce_lookup_hits_total ",
        "falaj_produce_kafka_transaction_seconds_bucket{le=\"0.05\"} ",
        "falaj_consume_redis_events_total ",
        "falaj_consume_redis_commit_to_applied_seconds_bucket{le=\"+Inf\"} ",
        "# HELP falaj_produce_lag_bytes ",
    ];
    until("every name is there", async || {
        let (status, text) = http.get("/metrics").await;
        assert_eq!(status, 200);
        wanted.iter().all(|name| text.lines().any(|line| line.starts_with(name)))
    })
    .await;
}

#[tokio::test]
async fn a_busy_port_is_a_warning_and_an_address_that_is_none_is_refused() {
    let mut stage = Stage::new("busy").await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    stage.set("FALAJ_HTTP__LISTEN", &address);
    let done = stage.start(&["produce", "--until-lsn", &stage.server_lsn().await]);
    assert_eq!(done.end().await, 0, "{}", done.log());
    assert!(done.log().contains("Address already in use"), "{}", done.log());
    stage.set("FALAJ_HTTP__LISTEN", "nowhere");
    let refused = stage.start(&["produce"]);
    assert_eq!(refused.end().await, 78, "{}", refused.log());
    assert!(refused.log().contains("http_listen"), "{}", refused.log());
}

#[tokio::test]
async fn healthcheck_tells_a_living_process_from_none() {
    let mut stage = Stage::new("health").await;
    let living = stage.start(&["produce"]);
    let http = living.http().await;
    stage.set("FALAJ_HTTP__LISTEN", &http.address.replace("127.0.0.1", "0.0.0.0"));
    assert_eq!(stage.start(&["healthcheck"]).end().await, 0);
    assert_eq!(living.ends("-TERM").await, 0);
    let dead = stage.start(&["healthcheck"]);
    assert_eq!(dead.end().await, 1);
    assert!(dead.log().contains("Connection refused"), "{}", dead.log());
    stage.set("FALAJ_HTTP__LISTEN", "");
    assert_eq!(stage.start(&["healthcheck"]).end().await, 1);
}

/// 60 rows through `run`; SIGTERM; then the status of a pipeline at rest, asked of the servers alone.
#[tokio::test]
async fn run_drains_on_sigterm_and_status_shows_it() {
    let stage = Stage::new("drain").await;
    let run = stage.start(&["run"]);
    let http = run.http().await;
    stage.generate(60).await;
    until("all is delivered", async || stage.mock.received().counts().unique == 60).await;
    until("all is on the board", async || http.json("/api/v1/status").await["board"]["lag_records"] == 0).await;
    let end = stage.server_lsn().await;
    assert_eq!(run.ends("-TERM").await, 0, "{}", run.log());
    assert!(run.out().lines().any(|line| line == "nothing to do: no project"), "{}", run.out());

    let status = stage.start(&["status", "--json"]);
    assert_eq!(status.end().await, 0);
    let status: Value = serde_json::from_str(&status.out()).unwrap();
    assert_eq!(status["pipeline"], stage.name);
    assert_eq!(status["slot"]["name"], stage.name);
    assert_eq!(status["slot"]["active_pid"], Value::Null);
    assert_eq!(status["slot"]["wal_status"], "reserved");
    let names: Vec<_> = status["sinks"].as_array().unwrap().iter().map(|sink| sink["name"].clone()).collect();
    assert_eq!(names, ["kafka", "archive"]);
    let lsn = |value: &Value| value.as_str().unwrap().parse::<falaj::lsn::Lsn>().unwrap();
    for sink in status["sinks"].as_array().unwrap() {
        assert_eq!(sink["position"], status["slot"]["confirmed_flush_lsn"]);
    }
    // What was committed before the signal is durable; keepalives may have moved the position further.
    assert_eq!(
        lsn(&status["slot"]["confirmed_flush_lsn"]).max(end.parse().unwrap()),
        lsn(&status["slot"]["confirmed_flush_lsn"])
    );
    assert_eq!(status["archive"]["batches"], stage.batches().len());
    assert_eq!((&status["board"]["lag_records"], &status["upload"]), (&json!(0), &Value::Null));
    assert_eq!(status["external"]["partitions"].as_array().unwrap().len(), 3);
}

/// No server answers: each part says so, and the command has still done its work.
#[tokio::test]
async fn status_tells_what_it_can_when_every_server_is_away() {
    let mut env = std::collections::BTreeMap::new();
    for (key, value) in [
        ("FALAJ_POSTGRES__URL", "postgres://nobody@127.0.0.1:1/none"),
        ("FALAJ_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1"),
        ("FALAJ_REDIS__URL", "redis://127.0.0.1:1/0"),
        ("FALAJ_ARCHIVE__DIR", "/nonexistent/archive"),
    ] {
        env.insert(key.to_owned(), value.to_owned());
    }
    let status = Process::start(&["status", "--json"], &env);
    assert_eq!(status.end().await, 0, "{}", status.log());
    let status: Value = serde_json::from_str(&status.out()).unwrap();
    for part in ["slot", "board", "external"] {
        assert!(status[part]["error"].is_string(), "{status}");
    }
    assert_eq!(status["archive"], json!({"dir": "/nonexistent/archive", "batches": 0, "last": null}));
    let people = Process::start(&["status"], &env);
    assert_eq!(people.end().await, 0);
    let names: Vec<String> =
        people.out().lines().map(|line| line.split_whitespace().next().unwrap().to_owned()).collect();
    assert_eq!(names, ["pipeline", "slot", "kafka", "archive", "batches", "board", "external", "bigquery"]);
    // What nobody uses is no part that is away.
    env.insert("FALAJ_REDIS__URL".into(), String::new());
    let without = Process::start(&["status", "--json"], &env);
    assert_eq!(without.end().await, 0);
    let without: Value = serde_json::from_str(&without.out()).unwrap();
    assert!(without["board"].is_null() && without["external"]["error"].is_string(), "{without}");
}

/// Whoever ends a role that waits for its first server finds a clean end, whatever the role.
#[tokio::test]
async fn a_role_that_waits_for_its_server_ends_with_0_on_sigterm() {
    let dir = tempfile::tempdir().unwrap();
    let mut env = std::collections::BTreeMap::new();
    for (key, value) in [
        ("FALAJ_POSTGRES__URL", "postgres://nobody@127.0.0.1:1/none"),
        ("FALAJ_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1"),
        ("FALAJ_REDIS__URL", "redis://127.0.0.1:1/0"),
        ("FALAJ_EXTERNAL__URL", "http://127.0.0.1:1/"),
        ("FALAJ_BIGQUERY__ENDPOINT", "http://127.0.0.1:1"),
        ("FALAJ_BIGQUERY__PROJECT", "local"),
        ("FALAJ_ARCHIVE__DIR", dir.path().to_str().unwrap()),
        ("FALAJ_HTTP__LISTEN", ""),
    ] {
        env.insert(key.to_owned(), value.to_owned());
    }
    for args in [
        &["produce"][..],
        &["consume", "--sinks", "redis"],
        &["consume", "--sinks", "external"],
        &["upload"],
        &["run"],
        &["generate"],
        &["board", "--follow"],
    ] {
        let role = Process::start(args, &env);
        let waits = |log: &str| log.contains("trying again") || log.contains("starting again");
        until("it tries again", async || waits(&role.log())).await;
        assert_eq!(role.ends("-TERM").await, 0, "{args:?}: {}", role.log());
    }
}

/// The roles are drained when one of them is refused, and its code is the process's.
#[tokio::test]
async fn run_ends_with_the_code_of_the_role_that_failed() {
    let mut stage = Stage::new("fails").await;
    stage.set("FALAJ_POSTGRES__SLOT", "no_such_slot");
    let run = stage.start(&["run"]);
    assert_eq!(run.end().await, 78, "{}", run.log());
    assert!(run.log().contains("no_such_slot"), "{}", run.log());
}

#[tokio::test]
async fn the_demo_counts_the_same_rows_in_every_place() {
    let dir = tempfile::tempdir().unwrap();
    let mut env = troupe::servers(&["postgres", "kafka", "redis", "bigquery"]);
    env.insert("FALAJ_ARCHIVE__DIR".into(), dir.path().join("archive").display().to_string());
    env.insert("FALAJ_HTTP__LISTEN".into(), String::new());
    let demo = Process::start(&["demo", "--for", "10s"], &env);
    assert_eq!(demo.end().await, 0, "{}\n{}", demo.out(), demo.log());
    let out = demo.out();
    let number = |line: &str, word: usize| line.split_whitespace().nth(word).unwrap().parse::<u64>().unwrap();
    let line = |place: &str| {
        let found = out.lines().find(|line| line.split_whitespace().nth(1) == Some(place) && !line.contains(" at "));
        found.unwrap_or_else(|| panic!("no line of {place}:\n{out}")).to_owned()
    };
    let rows = number(&line("Postgres"), 2);
    assert!(rows > 0, "{out}");
    for place in ["Kafka", "Parquet", "BigQuery"] {
        let line = line(place);
        assert_eq!((number(&line, 2), number(&line, 4)), (rows, rows), "{line}");
    }
    assert_eq!(number(&line("outside"), 2), rows);
    let verdicts: Vec<&str> = out.lines().filter(|l| l.starts_with("PASS") || l.starts_with("FAIL")).collect();
    assert_eq!(verdicts.iter().filter(|l| l.starts_with("PASS")).count(), 6, "{out}");
    assert_eq!(verdicts.len(), 6, "{out}");
}
