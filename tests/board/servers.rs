//! Processes of one test alone: a Redis, and a `consume` that is looked at over HTTP.

use std::process::{Command, Stdio};

use serde_json::Value;

use super::{Rig, Running, block_on, eventually};

/// A Redis of the test's own, to be filled, stopped and misconfigured.
pub struct OwnRedis {
    pub running: Running,
    port: u16,
    pub dir: tempfile::TempDir,
}

impl OwnRedis {
    pub fn start(options: &[&str]) -> Self {
        let port = free_port();
        let dir = tempfile::tempdir().unwrap();
        Self { running: Self::spawn(port, &dir, options), port, dir }
    }

    fn spawn(port: u16, dir: &tempfile::TempDir, options: &[&str]) -> Running {
        let mut server = Command::new("redis-server");
        server.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"]);
        server.args(["--appendfsync", "always", "--dir"]).arg(dir.path()).args(options).stdout(Stdio::null());
        let running = Running(server.spawn().expect("redis-server is needed: apt-get install redis-server"));
        eventually("redis-server answers", || {
            redis::Client::open(("127.0.0.1", port)).unwrap().get_connection().is_ok()
        });
        running
    }

    pub fn restart(self) -> Self {
        let Self { running, port, dir } = self;
        running.kill();
        Self { running: Self::spawn(port, &dir, &[]), port, dir }
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    pub fn config_set(&self, key: &str, value: &str) {
        let mut redis = redis::Client::open(self.url()).unwrap().get_connection().unwrap();
        redis::cmd("CONFIG").arg("SET").arg(key).arg(value).exec(&mut redis).unwrap();
    }
}

/// A `consume` of the board that serves HTTP, its log in a file.
pub struct Served {
    pub running: Running,
    port: u16,
    dir: tempfile::TempDir,
}

impl Served {
    pub fn start(rig: &Rig) -> Self {
        let (port, dir) = (free_port(), tempfile::tempdir().unwrap());
        let mut command = rig.command(&["consume", "--sinks", "redis"]);
        command.env("FALAJ_HTTP__LISTEN", format!("127.0.0.1:{port}")).stdout(Stdio::null());
        command.stderr(std::fs::File::create(dir.path().join("log")).unwrap());
        Self { running: Running(command.spawn().unwrap()), port, dir }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// Why this check fails; `None` where it does not, or where nobody answers yet.
    pub fn failing(&self, check: &str) -> Option<String> {
        let (_, body) = self.get("/readyz")?;
        let readiness: Value = serde_json::from_str(&body).unwrap();
        readiness["failing"][check].as_str().map(str::to_owned)
    }

    pub fn is_ready(&self) -> bool {
        self.get("/readyz").is_some_and(|(status, _)| status == 200)
    }

    /// The lag of all partitions, in records; 0 where none is shown.
    pub fn lag(&self) -> f64 {
        let (_, text) = self.get("/metrics").unwrap();
        let lags = text.lines().filter(|line| line.starts_with("falaj_consume_redis_lag_records{"));
        lags.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
    }

    /// Status code and body; `None` while nobody listens.
    fn get(&self, path: &str) -> Option<(u16, String)> {
        block_on(async {
            let answer = reqwest::get(format!("http://127.0.0.1:{}{path}", self.port)).await.ok()?;
            Some((answer.status().as_u16(), answer.text().await.ok()?))
        })
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
