//! A database, pipeline, slot and directories of a test's own, on the shared servers.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use falaj::source::conn::Conninfo;
use serde_json::Value;
use tempfile::TempDir;
use tokio_postgres::Client;

pub struct Place {
    /// Pipeline, slot, publication and database.
    pub name: String,
    pub url: String,
    pub dir: TempDir,
    /// Stands for the outside system: it accepts connections.
    external: TcpListener,
    /// Settings beyond the usual ones.
    pub env: Vec<(String, String)>,
}

impl Place {
    /// Makes the database.
    pub async fn new(test: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("setup_{test}_{}_{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let server = address("FALAJ_POSTGRES__URL");
        let admin = Conninfo::gather(&server, &|_| None).unwrap().sql("test").await.unwrap();
        admin.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        let url = format!("{}/{name}", server.rsplit_once('/').unwrap().0);
        let external = TcpListener::bind("127.0.0.1:0").unwrap();
        Self { name, url, dir: tempfile::tempdir().unwrap(), external, env: Vec::new() }
    }

    pub async fn sql(&self) -> Client {
        Conninfo::gather(&self.url, &|_| None).unwrap().sql("test").await.unwrap()
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Runs falaj in this place, with nothing else in its environment.
    pub fn falaj(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let dir = |name: &str| self.dir.path().join(name).display().to_string();
        let own = [
            ("FALAJ_PIPELINE", self.name.clone()),
            ("FALAJ_POSTGRES__URL", self.url.clone()),
            ("FALAJ_POSTGRES__SLOT", self.name.clone()),
            ("FALAJ_POSTGRES__PUBLICATION", self.name.clone()),
            ("FALAJ_STATE__DIR", dir("state")),
            ("FALAJ_ARCHIVE__DIR", dir("archive")),
            ("FALAJ_KAFKA__BOOTSTRAP_SERVERS", address("FALAJ_KAFKA__BOOTSTRAP_SERVERS")),
            ("FALAJ_REDIS__URL", address("FALAJ_REDIS__URL")),
            ("FALAJ_EXTERNAL__URL", format!("http://{}/events", self.external.local_addr().unwrap())),
        ];
        let mut command = Command::new(env!("CARGO_BIN_EXE_falaj"));
        command.args(arguments).env_clear().envs(own).envs(self.env.iter().cloned()).current_dir(self.dir.path());
        command
    }

    /// The findings of `check --json`, and its exit code.
    pub fn check(&self) -> (Vec<Value>, i32) {
        let out = self.falaj(&["check", "--json"]);
        let findings = serde_json::from_slice(&out.stdout).unwrap();
        (findings, out.status.code().unwrap())
    }

    /// Gives the slot back to the shared server.
    pub async fn leave(self) {
        let sql = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name::text = $1";
        self.sql().await.execute(sql, &[&self.name]).await.unwrap();
    }
}

pub fn stdout(out: &Output) -> String {
    String::from_utf8(out.stdout.clone()).unwrap()
}

pub fn stderr(out: &Output) -> String {
    String::from_utf8(out.stderr.clone()).unwrap()
}

fn address(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set: dev/stack up; eval \"$(dev/stack env)\""))
}
