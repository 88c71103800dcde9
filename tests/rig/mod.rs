//! What the tests of the promises share: a pipeline of its own on real servers, the binary under test, readers of the
//! sinks that know nothing of falaj's own code for it, and an oracle in SQL.

pub mod archive;
pub mod bigquery;
pub mod check;
pub mod kafka;
pub mod load;
pub mod oracle;
pub mod peer;
pub mod process;
pub mod pyarrow;
pub mod stack;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use falaj::config::Config;
use falaj::lsn::Lsn;
use tokio_postgres::{Client, NoTls};

use process::Falaj;

/// No condition of these tests may take longer.
pub const DEADLINE: Duration = Duration::from_secs(90);
pub const POSTGRES: &str = "FALAJ_POSTGRES__URL";
const KAFKA: &str = "FALAJ_KAFKA__BOOTSTRAP_SERVERS";
const REDIS: &str = "FALAJ_REDIS__URL";
/// Base URL of the BigQuery server.
pub const BIGQUERY: &str = "FALAJ_BIGQUERY__ENDPOINT";

/// Addresses of servers, as `dev/stack env` names them.
#[derive(Clone)]
pub struct Servers(BTreeMap<String, String>);

impl Servers {
    /// The servers that all tests share.
    pub fn shared() -> Self {
        let given = |name: &str| {
            std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: dev/stack up; eval \"$(dev/stack env)\""))
        };
        Self([POSTGRES, KAFKA, REDIS, BIGQUERY].map(|name| (name.to_owned(), given(name))).into())
    }

    /// These, with the ones of `own` in their place.
    pub fn with(mut self, own: BTreeMap<String, String>) -> Self {
        self.0.extend(own.into_iter().filter(|(name, _)| [POSTGRES, KAFKA, REDIS, BIGQUERY].contains(&name.as_str())));
        self
    }

    /// The URL of a database.
    pub fn postgres(&self, database: &str) -> String {
        let url = &self.0[POSTGRES];
        format!("{}/{database}", url.rsplit_once('/').expect("a URL with a database").0)
    }
}

/// A database, a slot, topics and directories that belong to one test.
pub struct Pipeline {
    /// Name of pipeline, database and slot.
    pub name: String,
    pub config: Config,
    pub sql: Client,
    pub env: BTreeMap<String, String>,
    servers: Servers,
    dir: tempfile::TempDir,
}

impl Pipeline {
    /// With the built-in tables, after `falaj init`.
    pub async fn new(name: &str) -> Self {
        Self::on(Servers::shared(), name).await
    }

    /// As [`Pipeline::new`], on other servers.
    pub async fn on(servers: Servers, name: &str) -> Self {
        let pipeline = Self::bare(servers, name).await;
        pipeline.init().await;
        pipeline
    }

    /// As [`Pipeline::new`], with everything that [`oracle::expected`] needs.
    pub async fn with_oracle(servers: Servers, name: &str) -> Self {
        let pipeline = Self::bare(servers, name).await;
        oracle::install(&pipeline).await;
        pipeline.init().await;
        oracle::follow(&pipeline).await;
        pipeline
    }

    /// An empty database; nothing else is there.
    pub async fn bare(servers: Servers, name: &str) -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let name = format!("{name}_{:x}", since.as_micros() % (1 << 40));
        let admin = connect(&servers.0[POSTGRES]).await;
        admin.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        let dir = tempfile::Builder::new().prefix(&name).tempdir().unwrap();
        let path = |part: &str| dir.path().join(part).display().to_string();
        let url = servers.postgres(&name);
        let mut env = servers.0.clone();
        env.extend(
            [
                ("FALAJ_PIPELINE", name.clone()),
                (POSTGRES, url.clone()),
                ("FALAJ_POSTGRES__SLOT", name.clone()),
                ("FALAJ_STATE__DIR", path("state")),
                ("FALAJ_ARCHIVE__DIR", path("archive")),
                ("FALAJ_HTTP__LISTEN", String::new()),
                ("FALAJ_BIGQUERY__PROJECT", bigquery::PROJECT.to_owned()),
                ("FALAJ_BIGQUERY__DATASET", name.clone()),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        let config = Config::load(None, env.clone()).unwrap();
        let sql = connect(&url).await;
        Self { name, config, sql, env, servers, dir }
    }

    /// `falaj init --yes --with-tables`.
    pub async fn init(&self) {
        self.start(&["init", "--yes", "--with-tables"]).ends_well().await;
    }

    /// Sets a configuration key by its environment variable.
    pub fn set(&mut self, key: &str, value: &str) {
        self.env.insert(key.to_owned(), value.to_owned());
        self.config = Config::load(None, self.env.clone()).unwrap();
    }

    /// Another pipeline on the same database, with a slot that begins at the same place while nothing is written.
    pub async fn sibling(&self, suffix: &str, publication: &str) -> Self {
        let name = format!("{}_{suffix}", self.name);
        let dir = tempfile::Builder::new().prefix(&name).tempdir().unwrap();
        let mut env = self.env.clone();
        for (key, value) in [("FALAJ_PIPELINE", &*name), ("FALAJ_POSTGRES__SLOT", &name)] {
            env.insert(key.into(), value.into());
        }
        env.insert("FALAJ_POSTGRES__PUBLICATION".into(), publication.into());
        for (key, part) in [("FALAJ_STATE__DIR", "state"), ("FALAJ_ARCHIVE__DIR", "archive")] {
            env.insert(key.into(), dir.path().join(part).display().to_string());
        }
        let config = Config::load(None, env.clone()).unwrap();
        let sql = connect(&config.postgres.url).await;
        let sibling = Self { name, config, sql, env, servers: self.servers.clone(), dir };
        sibling.init().await;
        sibling
    }

    /// The same after the server has been restarted.
    pub async fn reconnect(mut self) -> Self {
        self.sql = connect(&self.config.postgres.url).await;
        self
    }

    /// Starts the binary under test.
    pub fn start(&self, args: &[&str]) -> Falaj {
        Falaj::start(args, &self.env, self.dir.path())
    }

    /// `falaj produce --until-lsn` the present end of the WAL; gives that LSN.
    pub async fn produce(&self) -> Lsn {
        let lsn = self.lsn().await;
        self.produce_until(lsn, &[]).await;
        lsn
    }

    /// `falaj produce --until-lsn`, with more flags, to its clean end.
    pub async fn produce_until(&self, lsn: Lsn, flags: &[&str]) {
        let lsn = lsn.to_string();
        self.start(&[&["produce", "--until-lsn", &lsn], flags].concat()).ends_well().await;
    }

    pub async fn run(&self, sql: &str) {
        self.sql.batch_execute(sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    }

    /// The only value of the only row, as text.
    pub async fn text(&self, sql: &str) -> String {
        let row = self.sql.query_one(&format!("SELECT ({sql})::text"), &[]).await;
        row.unwrap_or_else(|e| panic!("{sql}: {e:?}")).get::<_, Option<String>>(0).unwrap_or_default()
    }

    /// The end of what is flushed.
    pub async fn lsn(&self) -> Lsn {
        self.text("pg_current_wal_flush_lsn()").await.parse().unwrap()
    }

    /// What the slot has been acknowledged up to.
    pub async fn confirmed(&self) -> Lsn {
        let sql = format!("SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{}'", self.name);
        self.text(&sql).await.parse().unwrap()
    }

    /// The process that reads the slot; empty without one.
    pub async fn reader(&self) -> String {
        self.text(&format!("SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{}'", self.name)).await
    }

    /// Waits until another process than `before` reads the slot.
    pub async fn streams(&self, before: &str) -> String {
        let mut now = String::new();
        until("somebody reads the slot", async || {
            now = self.reader().await;
            !now.is_empty() && now != before
        })
        .await;
        now
    }

    /// Waits until several more Kafka transactions have been committed: the load is on its way.
    pub async fn flows(&self) {
        let topic = [self.config.checkpoint_topic()];
        let end = async || kafka::ends(&self.config, &topic).await[0];
        let before = end().await;
        until("it flows", async || end().await > before + 10).await;
    }

    /// Writes the configuration file that falaj finds where it is started.
    pub fn configure(&mut self, toml: &str) {
        let path = self.dir.path().join("falaj.toml");
        std::fs::write(&path, toml).unwrap();
        self.config = Config::load(Some(&path), self.env.clone()).unwrap();
    }

    pub fn archive(&self) -> PathBuf {
        self.config.archive.dir.clone()
    }

    /// Every committed record of a table's topic.
    pub async fn records(&self, table: &str) -> Vec<kafka::Record> {
        kafka::records(&self.config, &self.config.topic(table)).await
    }

    /// The values of a table's topic, in the order of their ids.
    pub async fn values(&self, table: &str) -> Vec<String> {
        let mut values: Vec<_> = self.records(table).await.into_iter().map(|r| r.value).collect();
        values.sort_by_cached_key(|v| id(v).to_owned());
        values
    }

    /// The rows of a table in the archive as events, in the order of the batches.
    pub fn rows(&self, table: &str) -> Vec<String> {
        archive::events(&self.archive(), table)
    }
}

impl Drop for Pipeline {
    /// Slots are few on a server, and each holds its WAL back.
    fn drop(&mut self) {
        let (url, name) = (self.servers.0[POSTGRES].clone(), self.name.clone());
        let work = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(drop_database(&url, &name)).map_err(std::io::Error::other)
        };
        if let Ok(Err(error)) = std::thread::spawn(work).join() {
            eprintln!("{} is left behind: {error}", self.name);
        }
    }
}

async fn drop_database(url: &str, name: &str) -> Result<(), tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    let of_ours = format!("FROM pg_replication_slots WHERE database = '{name}'");
    let began = Instant::now();
    loop {
        client.batch_execute(&format!("SELECT pg_terminate_backend(active_pid) {of_ours} AND active")).await?;
        let dropped = client.batch_execute(&format!("SELECT pg_drop_replication_slot(slot_name) {of_ours}")).await;
        match dropped {
            Err(_) if began.elapsed() < Duration::from_secs(10) => {}
            outcome => break outcome?,
        }
    }
    client.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await
}

/// A plain SQL connection.
pub async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("Postgres answers");
    tokio::spawn(connection);
    client
}

/// The `_id` of an event.
pub fn id(event: &str) -> &str {
    let at = event.rfind("\"_id\":\"").unwrap_or_else(|| panic!("no _id in {event}")) + 7;
    &event[at..at + 27]
}

/// Waits for a condition, up to [`DEADLINE`].
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Two lists of events must be the same; says the first difference, not both lists.
#[track_caller]
pub fn assert_same(what: &str, found: &[String], expected: &[String]) {
    let first = found.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(found.len().min(expected.len()));
    let at = |list: &[String]| list.get(first).cloned().unwrap_or_else(|| "(end)".into());
    assert!(
        found == expected,
        "{what}: {} found, {} expected; first difference at {first}:\n found    {}\n expected {}",
        found.len(),
        expected.len(),
        at(found),
        at(expected)
    );
}
