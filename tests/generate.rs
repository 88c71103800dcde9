//! `falaj generate` against a real Postgres.

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tokio_postgres::{Client, Config, NoTls};

use crate::rig::POSTGRES;
use crate::rig::process::Falaj;
use crate::rig::stack::Stack;

/// A database of its own for one test, with the tables of sql/.
struct Database {
    client: Client,
    url: String,
}

impl Database {
    async fn with_tables(name: &str) -> Self {
        Self::empty(name).await.and_tables().await
    }

    async fn and_tables(self) -> Self {
        self.client.batch_execute(include_str!("../sql/01_tables.sql")).await.unwrap();
        self
    }

    /// The same database under another role; the stack's Postgres trusts whoever comes.
    fn as_role(&self, role: &str) -> String {
        self.url.replace("user=postgres", &format!("user={role}"))
    }

    async fn empty(name: &str) -> Self {
        let url = std::env::var(POSTGRES)
            .expect("FALAJ_POSTGRES__URL is not set; start servers with dev/stack up and eval \"$(dev/stack env)\"");
        Self::empty_on(&url, name).await
    }

    async fn empty_on(url: &str, name: &str) -> Self {
        let mut config: Config = url.parse().unwrap();
        let admin = connect(&config).await;
        admin.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await.unwrap();
        admin.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        config.dbname(name);
        let tokio_postgres::config::Host::Tcp(host) = &config.get_hosts()[0] else { panic!("a TCP address is needed") };
        let user = config.get_user().unwrap_or("postgres");
        let url = format!("host={host} port={} user={user} dbname={name}", config.get_ports()[0]);
        Self { client: connect(&config).await, url }
    }

    fn generate(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_falaj"));
        command.arg("generate").args(flags).env("FALAJ_POSTGRES__URL", &self.url).stdin(Stdio::null());
        command
    }

    fn run(&self, flags: &[&str]) -> Summary {
        summary(self.generate(flags).output().unwrap())
    }

    async fn one<T: for<'a> tokio_postgres::types::FromSql<'a>>(&self, sql: &str) -> T {
        self.client.query_one(sql, &[]).await.unwrap().get(0)
    }

    async fn rows(&self) -> i64 {
        self.one("SELECT count(*) FROM engagement_events").await
    }

    /// Everything but the ids of the sequence, with the times counted from the oldest one.
    async fn fingerprint(&self) -> String {
        self.one(
            "SELECT md5(string_agg(md5(ROW(content_id, user_id, event_type, event_ts - first, duration_ms, device, raw_payload)::text), \
             '' ORDER BY id)) FROM engagement_events, (SELECT min(event_ts) AS first FROM engagement_events) AS f",
        )
        .await
    }

    async fn contents(&self) -> String {
        self.one(
            "SELECT md5(string_agg(ROW(id, slug, title, content_type, length_seconds)::text, '' ORDER BY id)) FROM content",
        )
        .await
    }
}

async fn connect(config: &Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.expect("the stack's Postgres answers");
    tokio::spawn(connection);
    client
}

/// The summary line: `generated rows=… …`.
#[derive(Debug)]
struct Summary(String);

impl Summary {
    fn get(&self, key: &str) -> f64 {
        let value = self.0.split_whitespace().find_map(|word| word.strip_prefix(&format!("{key}=")));
        value.unwrap_or_else(|| panic!("no {key} in {}", self.0)).parse().unwrap()
    }
}

fn summary(output: Output) -> Summary {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    Summary(String::from_utf8(output.stdout).unwrap())
}

fn finish(child: Child) -> Summary {
    summary(child.wait_with_output().unwrap())
}

/// Asks until `done` is true.
async fn wait_until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done().await {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_seed_gives_the_same_rows() {
    let (a, b) = tokio::join!(Database::with_tables("generate_seed_a"), Database::with_tables("generate_seed_b"));
    for database in [&a, &b] {
        let summary = database.run(&["--count", "5000", "--seed", "7"]);
        assert_eq!((summary.get("rows"), database.rows().await), (5000.0, 5000));
    }
    assert_eq!(a.fingerprint().await, b.fingerprint().await);
    assert_eq!(a.contents().await, b.contents().await);
    let other = Database::with_tables("generate_seed_c").await;
    other.run(&["--count", "5000", "--seed", "8"]);
    assert_ne!(a.fingerprint().await, other.fingerprint().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_with_the_same_seed_adds_exactly_its_rows() {
    let database = Database::with_tables("generate_twice").await;
    database.run(&["--count", "2000"]);
    let contents: i64 = database.one("SELECT count(*) FROM content").await;
    database.run(&["--count", "2000"]);
    assert_eq!(database.rows().await, 4000);
    assert!(database.one::<i64>("SELECT count(*) FROM content").await >= contents);
}

#[tokio::test(flavor = "multi_thread")]
async fn contents_that_are_there_are_used_and_left_as_they_are() {
    let database = Database::with_tables("generate_existing").await;
    database.client.batch_execute(include_str!("../sql/04_sample_content.sql")).await.unwrap();
    database.run(&["--count", "20000"]);
    let used: i64 = database
        .one("SELECT count(DISTINCT content_id) FROM engagement_events WHERE content_id::text LIKE '0a5b1f6e-51d0%'")
        .await;
    assert_eq!(used, 13);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_load_on_two_connections_is_exact_and_has_the_rows_that_break_naive_readers() {
    let database = Database::with_tables("generate_large").await;
    let summary = database.run(&["--count", "200000", "--seed", "3"]);
    assert_eq!((summary.get("rows"), database.rows().await), (200_000.0, 200_000));
    assert!(summary.get("rolled_back_rows") > 0.0);
    for condition in [
        "content_id IS NULL",
        "user_id IS NULL",
        "event_type IS NULL",
        "duration_ms IS NULL AND event_type = 'play'",
        "duration_ms < 0",
        "duration_ms BETWEEN 1 AND 999",
        "device IS NULL",
        "device = 'web-safari'",
        "device = U&'web\\2011safari'",
        "raw_payload IS NULL",
        "raw_payload #>> '{geo,city}' = 'الرياض'",
        "event_ts < now() - interval '1 day'",
        "event_ts > now() + interval '1 minute'",
    ] {
        let found: bool =
            database.one(&format!("SELECT EXISTS (SELECT FROM engagement_events WHERE {condition})")).await;
        assert!(found, "no row with {condition}");
    }
    let clicks: i64 = database
        .one("SELECT count(*) FROM engagement_events WHERE event_type = 'click' AND duration_ms IS NOT NULL")
        .await;
    assert_eq!(clicks, 0);
    let newsletters: i64 = database
        .one("SELECT count(*) FROM content WHERE content_type = 'newsletter' AND length_seconds IS NOT NULL")
        .await;
    assert_eq!(newsletters, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rate_is_held() {
    let database = Database::with_tables("generate_rate").await;
    let summary = database.run(&["--rate", "500", "--count", "1500"]);
    assert_eq!(database.rows().await, 1500);
    // The schedule never runs ahead; how far it falls behind is the machine's affair.
    let rate = summary.get("rows_per_second");
    assert!((300.0..=501.0).contains(&rate), "{summary:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_neither_loses_nor_doubles_a_row() {
    let database = Database::with_tables("generate_broken").await;
    let child = database
        .generate(&["--count", "60000", "--rate", "20000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    for round in 1..=5 {
        wait_until("the load goes on", async || database.rows().await > round * 5000).await;
        database
            .client
            .batch_execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                 WHERE datname = current_database() AND application_name = 'falaj generate'",
            )
            .await
            .unwrap();
    }
    assert_eq!((finish(child).get("rows"), database.rows().await), (60_000.0, 60_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_with_a_summary_of_what_is_in_the_table() {
    let database = Database::with_tables("generate_term").await;
    let child = database.generate(&["--rate", "1000"]).stdout(Stdio::piped()).spawn().unwrap();
    wait_until("some rows are in", async || database.rows().await > 300).await;
    let kill = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(kill.success());
    assert_eq!(finish(child).get("rows") as i64, database.rows().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_while_postgres_is_away_ends_with_a_summary_too() {
    let stack = Stack::up("away", &["postgres"]);
    let url = stack.addresses()[POSTGRES].clone();
    let mut database = Database::empty_on(&url, "generate_away").await.and_tables().await;
    let (dir, env) = (tempfile::tempdir().unwrap(), [(POSTGRES.to_owned(), database.url.clone())].into());
    let mut load = Falaj::start(&["generate", "--rate", "1000"], &env, dir.path());
    wait_until("some rows are in", async || database.rows().await > 300).await;
    stack.call(&["stop", "postgres"]);
    load.says("trying again").await;
    load.signal("-TERM");
    let summary = Summary(load.ends_well().await);
    stack.call(&["up", "postgres"]);
    database.client = connect(&database.url.parse().unwrap()).await;
    assert_eq!(summary.get("rows") as i64, database.rows().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn absent_tables_are_refused_with_the_fix() {
    let database = Database::empty("generate_absent").await;
    let output = database.generate(&["--count", "1"]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{stderr}");
    assert!(stderr.contains("falaj init --with-tables"), "{stderr}");
    assert_eq!(output.stdout, b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_of_zero_is_a_usage_error() {
    let database = Database::with_tables("generate_zero").await;
    assert_eq!(database.generate(&["--rate", "0"]).output().unwrap().status.code(), Some(2));
    assert_eq!(database.run(&["--count", "0"]).get("rows"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sql_files_can_be_run_twice_and_give_each_role_what_it_needs_and_no_more() {
    let database = Database::empty("generate_roles").await;
    for _ in 0..2 {
        for file in [
            include_str!("../sql/01_tables.sql"),
            include_str!("../sql/02_publication.sql"),
            include_str!("../sql/03_roles.sql"),
            include_str!("../sql/04_sample_content.sql"),
        ] {
            database.client.batch_execute(file).await.unwrap();
        }
    }
    let published: i64 = database.one("SELECT count(*) FROM pg_publication_tables WHERE pubname = 'falaj'").await;
    assert_eq!(published, 2);

    let as_role = |role| {
        let mut command = database.generate(&["--count", "500"]);
        command.env("FALAJ_POSTGRES__URL", database.as_role(role));
        command.output().unwrap()
    };
    assert_eq!(summary(as_role("falaj_load")).get("rows") as i64, database.rows().await);
    let refused = as_role("falaj_stream");
    let stderr = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(78), "{stderr}");
    assert!(stderr.contains("sql/03_roles.sql"), "{stderr}");
    assert_eq!(database.rows().await, 500);

    let stream = connect(&database.as_role("falaj_stream").parse().unwrap()).await;
    let seen: i64 = stream.query_one("SELECT count(*) FROM public.engagement_events", &[]).await.unwrap().get(0);
    assert_eq!(seen, 500);
}
