//! The servers of this run: addresses, one SQL session, and the machine that they share.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use falaj::config::Config;
use falaj::lsn::Lsn;
use falaj::source::conn::Conninfo;
use serde::Serialize;
use tokio_postgres::Client;

use crate::process::Servers;

/// A fresh stack of servers that nothing else uses.
pub struct Stack {
    /// Addresses, from the environment that `dev/stack env` prints.
    pub config: Config,
    /// A session as superuser.
    pub sql: Arc<Client>,
    /// Processes.
    pub servers: Servers,
    /// Where the runs keep their files.
    pub dir: PathBuf,
}

/// What the figures depend on.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// Processors.
    pub cpus: usize,
    /// Model of the first one.
    pub cpu: String,
    /// Gigabytes (10⁹) of memory.
    pub memory_gb: f64,
    /// Load average of the last minute, before anything was measured.
    pub load: f64,
    /// Kernel release.
    pub kernel: String,
    /// How TCP paces what it sends: it decides how a walsender's messages travel.
    pub congestion_control: String,
    /// Postgres.
    pub postgres: String,
    /// Broker.
    pub kafka: String,
    /// Client library.
    pub librdkafka: String,
    /// Redis.
    pub redis: String,
    /// Of falaj.
    pub commit: String,
}

impl Stack {
    /// Connects to the stack of the environment.
    pub async fn open() -> Result<Self> {
        let dir = std::env::var("FALAJ_STACK_DIR").context("FALAJ_STACK_DIR is not set. Try: make bench")?;
        let dir = PathBuf::from(dir);
        let config = Config::load(None, std::env::vars())?;
        let sql = Conninfo::parse(&config.postgres.url)?.sql("falaj bench").await?;
        sql.batch_execute("SET search_path = public").await?;
        let pid = |server: &str| -> Result<u32> {
            let file = dir.join("run").join(format!("{server}.pid"));
            let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
            Ok(text.trim().parse()?)
        };
        let servers = Servers { postgres: pid("postgres")?, kafka: pid("kafka")?, redis: pid("redis")? };
        Ok(Self { config, sql: Arc::new(sql), servers, dir: dir.join("runs") })
    }

    /// One text of one row.
    pub async fn ask(&self, sql: &str) -> Result<String> {
        let row = self.sql.query_one(sql, &[]).await.with_context(|| sql.to_owned())?;
        row.try_get::<_, Option<String>>(0)?.with_context(|| format!("{sql}: NULL"))
    }

    /// One LSN.
    pub async fn lsn(&self, sql: &str) -> Result<Lsn> {
        self.ask(sql).await?.parse().map_err(anyhow::Error::msg)
    }

    /// Statements without an answer.
    pub async fn execute(&self, sql: &str) -> Result<()> {
        self.sql.batch_execute(sql).await.with_context(|| sql.to_owned())
    }

    /// The machine and the versions.
    pub async fn machine(&self) -> Result<Machine> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or(": unknown");
        let memory = fs::read_to_string("/proc/meminfo")?;
        let kib: f64 = memory.split_whitespace().nth(1).context("MemTotal")?.parse()?;
        let load = fs::read_to_string("/proc/loadavg")?;
        let command_line = fs::read_to_string(format!("/proc/{}/cmdline", self.servers.kafka))?;
        let jar = command_line.split([':', '\0', '/']).find_map(|p| p.strip_prefix("kafka_")?.strip_suffix(".jar"));
        Ok(Machine {
            cpus: std::thread::available_parallelism()?.get(),
            cpu: model.trim_start_matches(['\t', ' ', ':']).to_owned(),
            memory_gb: (kib * 1024.0 / 1e8).round() / 10.0,
            load: load.split(' ').next().context("/proc/loadavg")?.parse()?,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            congestion_control: fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control")?.trim().to_owned(),
            postgres: self.ask("SHOW server_version").await?,
            kafka: jar.map_or("unknown", |name| name.rsplit('-').next().unwrap_or(name)).to_owned(),
            librdkafka: rdkafka::util::get_rdkafka_version().1,
            redis: output("redis-server", &["--version"]).split_whitespace().nth(2).unwrap_or("unknown").to_owned(),
            commit: output("git", &["describe", "--always", "--dirty", "--abbrev=8"]),
        })
    }
}

/// First line that a program prints; "unknown" where it cannot be run.
fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().ok().filter(|o| o.status.success());
    let text = output.and_then(|o| String::from_utf8(o.stdout).ok());
    text.and_then(|t| t.lines().next().map(str::to_owned)).unwrap_or_else(|| "unknown".into())
}
