//! What these tests need: a pipeline of its own on the real servers, the simulated peer, the binary under test.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use falaj::archive;
use falaj::mock_external::{Faults, Mock, serve};
use falaj::source::conn::Conninfo;
use falaj::source::slot;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// No condition of these tests may take longer.
const DEADLINE: Duration = Duration::from_secs(90);

/// The variables by which `dev/stack env` names these servers.
pub fn servers(wanted: &[&str]) -> BTreeMap<String, String> {
    let name = |server: &&str| match *server {
        "postgres" => "FALAJ_POSTGRES__URL",
        "kafka" => "FALAJ_KAFKA__BOOTSTRAP_SERVERS",
        "redis" => "FALAJ_REDIS__URL",
        "bigquery" => "FALAJ_BIGQUERY__ENDPOINT",
        other => panic!("no server {other}"),
    };
    let value = |name: &str| {
        std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: dev/stack up; eval \"$(dev/stack env)\""))
    };
    wanted.iter().map(name).map(|name| (name.to_owned(), value(name))).collect()
}

/// A pipeline: database, slot, topics, directories, made by `init`; and a peer to deliver to.
pub struct Stage {
    pub name: String,
    pub mock: Mock,
    env: BTreeMap<String, String>,
    home: String,
    dir: TempDir,
}

impl Stage {
    pub async fn new(name: &str) -> Self {
        let mut env = servers(&["postgres", "kafka", "redis"]);
        let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
        let name = format!("face_{name}_{nanos}");
        let home = env["FALAJ_POSTGRES__URL"].clone();
        let sql = Conninfo::gather(&home, &|_| None).unwrap().sql("falaj-test").await.unwrap();
        sql.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        let (dir, mock) = (tempfile::tempdir().unwrap(), Mock::new(Faults::default()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, mock.clone(), CancellationToken::new()));
        for (key, value) in [
            ("FALAJ_PIPELINE", name.clone()),
            ("FALAJ_POSTGRES__URL", format!("{}/{name}", home.rsplit_once('/').unwrap().0)),
            ("FALAJ_POSTGRES__SLOT", name.clone()),
            ("FALAJ_ARCHIVE__DIR", dir.path().join("archive").display().to_string()),
            ("FALAJ_STATE__DIR", dir.path().join("state").display().to_string()),
            ("FALAJ_EXTERNAL__URL", format!("http://{peer}/events")),
            ("FALAJ_HTTP__LISTEN", "127.0.0.1:0".into()),
            ("FALAJ_BIGQUERY__PROJECT", String::new()),
        ] {
            env.insert(key.to_owned(), value);
        }
        let stage = Self { name, mock, env, home, dir };
        let init = stage.start(&["init", "--yes", "--with-tables"]);
        assert_eq!(init.end().await, 0, "{}", init.log());
        stage
    }

    pub fn set(&mut self, key: &str, value: &str) {
        self.env.insert(key.to_owned(), value.to_owned());
    }

    pub fn env(&self) -> BTreeMap<String, String> {
        self.env.clone()
    }

    pub fn start(&self, args: &[&str]) -> Process {
        Process::start(args, &self.env)
    }

    pub async fn generate(&self, count: u64) {
        let load = self.start(&["generate", "--count", &count.to_string()]);
        assert_eq!(load.end().await, 0, "{}", load.log());
    }

    /// A session in the pipeline's database.
    pub async fn sql(&self) -> tokio_postgres::Client {
        Conninfo::gather(&self.env["FALAJ_POSTGRES__URL"], &|_| None).unwrap().sql("falaj-test").await.unwrap()
    }

    pub async fn server_lsn(&self) -> String {
        let client = Conninfo::gather(&self.home, &|_| None).unwrap().sql("falaj-test").await.unwrap();
        slot::server_lsn(&client).await.unwrap().to_string()
    }

    pub fn batches(&self) -> Vec<archive::Batch> {
        archive::list(&self.dir.path().join("archive")).unwrap()
    }
}

impl Drop for Stage {
    /// A slot that stays keeps WAL from being removed.
    fn drop(&mut self) {
        std::thread::scope(|scope| {
            let work = || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(drop_slot(&self.home, &self.name));
            };
            let _ = scope.spawn(work).join();
        });
    }
}

async fn drop_slot(home: &str, name: &str) {
    let client = Conninfo::gather(home, &|_| None).unwrap().sql("falaj-test").await.unwrap();
    let sql = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name::text = $1";
    client.execute(sql, &[&name]).await.unwrap();
    let sql = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name::text = $1";
    until("the slot is dropped", async || client.execute(sql, &[&name]).await.is_ok()).await;
}

/// The binary under test, its output in files; killed when dropped.
pub struct Process {
    child: Mutex<Child>,
    dir: TempDir,
}

impl Process {
    pub fn start(args: &[&str], env: &BTreeMap<String, String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| File::create(dir.path().join(name)).unwrap();
        let inherited = std::env::vars().filter(|(name, _)| name.starts_with("FALAJ_"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_falaj"));
        inherited.for_each(|(name, _)| {
            command.env_remove(name);
        });
        if let Some(endpoint) = env.get("FALAJ_BIGQUERY__ENDPOINT") {
            command.env("FALAJ_BIGQUERY__PROJECT", "local").env("FALAJ_BIGQUERY__ENDPOINT", endpoint);
        }
        command.args(args).envs(env).stdin(Stdio::null()).stdout(file("out")).stderr(file("log"));
        Self { child: Mutex::new(command.spawn().unwrap()), dir }
    }

    /// What it has said on stdout.
    pub fn out(&self) -> String {
        std::fs::read_to_string(self.path("out")).unwrap()
    }

    /// What it has said on stderr.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Waits for the end; the exit code.
    pub async fn end(&self) -> i32 {
        let mut status = None;
        until("the process ends", async || {
            status = self.child.lock().unwrap().try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap().code().expect("it exits, no signal kills it")
    }

    /// Sends a signal, then waits for the end.
    pub async fn ends(&self, signal: &str) -> i32 {
        let pid = self.child.lock().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        self.end().await
    }

    /// Its HTTP listener, once that is there.
    pub async fn http(&self) -> Http {
        let mut address = None;
        until("the listener is there", async || {
            assert!(self.child.lock().unwrap().try_wait().unwrap().is_none(), "{}", self.log());
            let log = self.log();
            address =
                log.split_once("serving http://").and_then(|(_, rest)| rest.split_once('/')).map(|(a, _)| a.to_owned());
            address.is_some()
        })
        .await;
        Http { address: address.unwrap(), client: reqwest::Client::new() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A process's HTTP listener.
pub struct Http {
    pub address: String,
    client: reqwest::Client,
}

impl Http {
    /// Status code and body.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let answer = self.client.get(format!("http://{}{path}", self.address)).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    pub async fn json(&self, path: &str) -> Value {
        serde_json::from_str(&self.get(path).await.1).unwrap()
    }
}

/// Waits for a condition, up to [`DEADLINE`].
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
