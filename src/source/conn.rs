//! How to reach Postgres: [`Conninfo`], gathered once as libpq does, and the SQL connections made from it.
//!
//! One way in for both clients (SQL and replication): the same hosts, the same TLS rules, the same errors.

mod login;
mod passfile;
mod settings;
mod stream;
#[cfg(test)]
mod tests;
mod tls;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_postgres::{Client, NoTls};

pub use self::login::sql_error;
pub(super) use self::login::{Login, is_transient};
use self::settings::Settings;
pub use self::stream::Stream;
use self::tls::{Mode, Roots, Ssl};
use crate::error::{Error, Result};

/// Looks an environment variable up; a closure, so that tests need no real environment.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// How long one attempt at one host may take, unless `connect_timeout` says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long what we have sent may stay unanswered: a host that is gone does not say so, and while something is on its way to it,
/// as the stream's heartbeat always is, Linux asks for no sign of life and waits for a quarter of an hour.
const USER_TIMEOUT: Duration = Duration::from_secs(60);

/// Where `~/.pgpass` and Debian's servers take the socket to be.
const SOCKET_DIR: &str = "/var/run/postgresql";

/// What every session needs to be the same, whatever the role's or the database's settings are.
///
/// Text forms of values must not depend on anybody's settings; names resolve in `pg_catalog` alone, so that all SQL
/// qualifies its tables; row security raises an error instead of hiding rows; a copy of a large table may take its time, and
/// no index leaves rows out of it. A warning may say that changes are passed over: it has to come.
const SESSION: &str = "-c search_path=pg_catalog -c TimeZone=UTC -c DateStyle=ISO,MDY -c IntervalStyle=postgres \
    -c extra_float_digits=3 -c bytea_output=hex -c quote_all_identifiers=off -c standard_conforming_strings=on -c row_security=off \
    -c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0 -c idle_session_timeout=0 \
    -c client_min_messages=notice -c gin_fuzzy_search_limit=0 -c array_nulls=on \
    -c default_transaction_isolation=read\\ committed -c default_transaction_deferrable=off";

/// The same for a setting that no start may name, because it is there from Postgres 17 on only. A walsender too has a
/// transaction open while it sends one.
pub(super) const UNLIMITED: &str = "SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings \
    WHERE name = 'transaction_timeout'";

/// Where Postgres is and who we are there.
#[derive(Clone, PartialEq, Eq)]
pub struct Conninfo {
    targets: Vec<Target>,
    user: String,
    dbname: String,
    ssl: Ssl,
    /// Per host; `None` waits without end.
    connect_timeout: Option<Duration>,
    options: String,
    application_name: Option<String>,
    tcp: Tcp,
}

/// One host to try.
#[derive(Clone, PartialEq, Eq)]
struct Target {
    /// Name, address, or directory of a unix socket (starts with `/`). Certificates are checked against it.
    host: String,
    /// Address to connect to instead of resolving `host`.
    addr: Option<String>,
    port: u16,
    password: Option<String>,
}

/// Settings of a TCP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tcp {
    keepalive: bool,
    idle: Duration,
    interval: Duration,
    count: u32,
    user_timeout: Option<Duration>,
}

/// A session that can be started on an open connection.
pub(super) trait Session: Sized + Send {
    /// Sends the startup message, authenticates and waits until the server is ready.
    fn start(stream: Stream, login: &Login<'_>) -> impl Future<Output = Result<Self>> + Send;
}

/// The default of `[postgres].url`.
const BUILT_IN: &str = "postgres://postgres@127.0.0.1:5432/postgres";

/// Its parts, as PG* variables.
fn built_in(name: &str) -> Option<String> {
    let value = match name {
        "PGHOST" => "127.0.0.1",
        "PGPORT" => "5432",
        "PGUSER" | "PGDATABASE" => "postgres",
        _ => return None,
    };
    Some(value.to_owned())
}

impl Conninfo {
    /// Gathers `[postgres].url`, the service file, PG* variables and password files.
    ///
    /// # Errors
    /// [`Error::Refused`] for a setting that is malformed, unknown, or cannot be honoured.
    pub fn parse(url: &str) -> Result<Self> {
        Self::gather(url, &|name| std::env::var(name).ok())
    }

    /// [`Conninfo::parse`] with an injected environment.
    ///
    /// # Errors
    /// As [`Conninfo::parse`].
    pub fn gather(url: &str, env: Env<'_>) -> Result<Self> {
        if url == BUILT_IN {
            // Nobody chose this url: the environment's PG* variables come before each part of it.
            return Self::gather("", &|name| env(name).or_else(|| built_in(name)));
        }
        let settings = Settings::gather(url, env)?;
        let user = match settings.get("user") {
            Some(user) => user.to_owned(),
            None => os_user(env)?,
        };
        let dbname = settings.get("dbname").unwrap_or(&user).to_owned();
        let targets = targets(&settings, &user, &dbname, env)?;
        let connect_timeout = match settings.number("connect_timeout")? {
            Some(0) => None,
            Some(seconds) => Some(Duration::from_secs(seconds)),
            None => Some(CONNECT_TIMEOUT),
        };
        let name = settings.get("application_name").or(settings.get("fallback_application_name"));
        Ok(Self {
            targets,
            dbname,
            ssl: ssl(&settings, env)?,
            connect_timeout,
            options: settings.get("options").unwrap_or_default().to_owned(),
            application_name: name.map(str::to_owned),
            tcp: tcp(&settings)?,
            user,
        })
    }

    /// An SQL session with pinned settings: `search_path` is `pg_catalog` (qualify every table), times are UTC and ISO.
    ///
    /// The connection's task ends when the client is dropped.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when no host answers or the server is starting, stopping or full;
    /// [`Error::Refused`] when it answers no: password, role, database, pg_hba, TLS.
    pub async fn sql(&self, application_name: &str) -> Result<Client> {
        self.session(application_name).await
    }

    /// The role that is connected as.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The database.
    pub fn dbname(&self) -> &str {
        &self.dbname
    }

    /// Tries each host in order. A host that answers no is the last one tried, as with libpq.
    pub(super) async fn session<S: Session>(&self, application_name: &str) -> Result<S> {
        let mut last = None;
        for target in &self.targets {
            match self.within_timeout(target, self.session_at(target, application_name)).await {
                Err(e) if e.is_transient() => last = Some(e),
                other => return other,
            }
        }
        Err(last.unwrap_or_else(|| Error::unreachable("Postgres", "no host is given")))
    }

    async fn within_timeout<T>(&self, target: &Target, attempt: impl Future<Output = Result<T>>) -> Result<T> {
        let Some(limit) = self.connect_timeout else { return attempt.await };
        match tokio::time::timeout(limit, attempt).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::unreachable(self.name(target), format!("no answer within {limit:?}"))),
        }
    }

    /// One host. `prefer` falls back to plain text when TLS, or the session over TLS, is refused.
    async fn session_at<S: Session>(&self, target: &Target, application_name: &str) -> Result<S> {
        let login = self.login(target, application_name);
        let first = async { S::start(self.open(target, self.ssl.mode != Mode::Disable).await?, &login).await };
        match first.await {
            Err(Error::Refused(first)) if self.ssl.mode == Mode::Prefer && !target.is_socket() => {
                if !["postgres_tls", "postgres_login"].contains(&first.check) {
                    return Err(Error::Refused(first));
                }
                let plain = async { S::start(self.open(target, false).await?, &login).await };
                plain.await.map_err(|_| Error::Refused(first))
            }
            other => other,
        }
    }

    fn login<'a>(&'a self, target: &'a Target, application_name: &'a str) -> Login<'a> {
        Login {
            user: &self.user,
            dbname: &self.dbname,
            password: target.password.as_deref(),
            application_name: self.application_name.as_deref().unwrap_or(application_name),
            options: format!("{} {SESSION}", self.options).trim_start().to_owned(),
            what: self.name(target),
        }
    }

    fn name(&self, target: &Target) -> String {
        format!("Postgres at {}", target.address())
    }
}

impl fmt::Display for Conninfo {
    /// Hosts, database and role; never the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: Vec<_> = self.targets.iter().map(Target::address).collect();
        write!(f, "{}, database \"{}\", role \"{}\"", hosts.join(", "), self.dbname, self.user)
    }
}

impl fmt::Debug for Conninfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Conninfo({self}, {:?})", self.ssl.mode)
    }
}

impl Target {
    fn is_socket(&self) -> bool {
        self.addr.is_none() && self.host.starts_with('/')
    }

    fn address(&self) -> String {
        match self.host.as_str() {
            socket if self.is_socket() => format!("{socket}/.s.PGSQL.{}", self.port),
            v6 if v6.contains(':') => format!("[{v6}]:{}", self.port),
            host => format!("{host}:{}", self.port),
        }
    }
}

impl Session for Client {
    async fn start(stream: Stream, login: &Login<'_>) -> Result<Self> {
        let mut config = tokio_postgres::Config::new();
        // TLS, where it is wanted, is already up below this stream.
        config.ssl_mode(tokio_postgres::config::SslMode::Disable);
        config.user(login.user).dbname(login.dbname).application_name(login.application_name).options(&login.options);
        if let Some(password) = login.password {
            config.password(password);
        }
        let (client, connection) = config.connect_raw(stream, NoTls).await.map_err(|e| login.start_error(&e))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "SQL connection ended");
            }
        });
        client.simple_query(UNLIMITED).await.map_err(|e| login.start_error(&e))?;
        Ok(client)
    }
}

fn targets(settings: &Settings, user: &str, dbname: &str, env: Env<'_>) -> Result<Vec<Target>> {
    let (hosts, addrs, ports) = (settings.list("host"), settings.list("hostaddr"), settings.list("port"));
    let count = hosts.len().max(addrs.len()).max(1);
    let fits = |n: usize| n == 0 || n == count;
    if !fits(hosts.len()) || !fits(addrs.len()) || !(fits(ports.len()) || ports.len() == 1) {
        return Err(bad(
            format!("{} hosts, {} addresses, {} ports", hosts.len(), addrs.len(), ports.len()),
            "as many of each, or a single port for all",
            "mend host, hostaddr and port in [postgres].url (or PGHOST, PGHOSTADDR, PGPORT)",
        ));
    }
    let passfile = settings.get("passfile").map(PathBuf::from).or_else(|| home(env, ".pgpass"));
    (0..count)
        .map(|i| {
            let addr = addrs.get(i).filter(|a| !a.is_empty()).map(|a| (*a).to_owned());
            let named = hosts.get(i).filter(|h| !h.is_empty()).map(|h| (*h).to_owned());
            let host = named.or_else(|| addr.clone()).unwrap_or_else(default_host);
            let port = port(ports.get(i).or(ports.first()).copied().unwrap_or_default())?;
            let login = passfile::Login {
                host: if host == SOCKET_DIR { "localhost" } else { &host },
                port,
                database: dbname,
                user,
            };
            let password = settings.get("password").map(str::to_owned);
            let password = password.or_else(|| passfile.as_deref().and_then(|file| passfile::lookup(file, &login)));
            Ok(Target { host, addr, port, password })
        })
        .collect()
}

fn port(text: &str) -> Result<u16> {
    match text {
        "" => Ok(5432),
        text => text.parse().ok().filter(|p| *p > 0).ok_or_else(|| {
            bad("the port is no number from 1 to 65535", "for example 5432", "mend [postgres].url or PGPORT")
        }),
    }
}

fn default_host() -> String {
    if Path::new(SOCKET_DIR).is_dir() { SOCKET_DIR.to_owned() } else { "localhost".to_owned() }
}

fn ssl(settings: &Settings, env: Env<'_>) -> Result<Ssl> {
    let path = |key: &str, default: &str| match settings.get(key) {
        Some(given) => Some(PathBuf::from(given)),
        None => home(env, default).filter(|p| p.exists()),
    };
    let roots = match settings.get("sslrootcert") {
        Some("system") => Roots::System,
        _ => path("sslrootcert", ".postgresql/root.crt").map_or(Roots::None, Roots::File),
    };
    let mode = match (settings.get("sslmode"), &roots) {
        (None | Some("verify-full"), Roots::System) => Mode::VerifyFull,
        (Some(weak), Roots::System) => {
            return Err(bad(
                format!("sslrootcert = system with sslmode = {weak:?}"),
                "sslmode = verify-full: every name can get a certificate from a public authority",
                "set sslmode=verify-full",
            ));
        }
        (Some("disable"), _) => Mode::Disable,
        (None | Some("prefer" | "allow"), _) => Mode::Prefer,
        (Some("require"), Roots::None) => Mode::Require,
        (Some("require" | "verify-ca"), Roots::File(_)) => Mode::VerifyCa,
        (Some("verify-full"), Roots::File(_)) => Mode::VerifyFull,
        (Some(verify @ ("verify-ca" | "verify-full")), Roots::None) => {
            return Err(bad(
                format!("sslmode = {verify} without root certificates"),
                "sslrootcert, or ~/.postgresql/root.crt",
                "set sslrootcert to a PEM file, or to \"system\" with verify-full",
            ));
        }
        (Some(other), _) => {
            return Err(bad(
                format!("sslmode = {other:?}"),
                "disable, allow, prefer, require, verify-ca or verify-full",
                "mend it",
            ));
        }
    };
    let client = match (path("sslcert", ".postgresql/postgresql.crt"), path("sslkey", ".postgresql/postgresql.key")) {
        (Some(cert), Some(key)) => Some((cert, key)),
        (None, None) => None,
        _ if settings.get("sslcert").is_none() && settings.get("sslkey").is_none() => None,
        _ => return Err(bad("only one of sslcert and sslkey", "both, or none", "set the other one")),
    };
    Ok(Ssl { mode, roots, client, sni: settings.get("sslsni") != Some("0") })
}

fn tcp(settings: &Settings) -> Result<Tcp> {
    let seconds = |key: &str, default: u64| {
        Ok::<_, Error>(Duration::from_secs(settings.number(key)?.filter(|n| *n > 0).unwrap_or(default)))
    };
    Ok(Tcp {
        keepalive: settings.number("keepalives")? != Some(0),
        idle: seconds("keepalives_idle", 30)?,
        interval: seconds("keepalives_interval", 10)?,
        count: settings.number("keepalives_count")?.and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0).unwrap_or(6),
        user_timeout: match settings.number("tcp_user_timeout")? {
            None => Some(USER_TIMEOUT),
            Some(0) => None,
            Some(millis) => Some(Duration::from_millis(millis)),
        },
    })
}

/// libpq's default role: the operating system's user.
fn os_user(env: Env<'_>) -> Result<String> {
    let uid = std::fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m).to_string()).ok();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let known = passwd.lines().map(|l| l.split(':').collect::<Vec<_>>()).find(|f| f.get(2).copied() == uid.as_deref());
    known.map(|f| f[0].to_owned()).or_else(|| env("USER").filter(|s| !s.is_empty())).ok_or_else(|| {
        bad("no role is given and the system's user has no name", "a role", "set it in [postgres].url or PGUSER")
    })
}

fn home(env: Env<'_>, file: &str) -> Option<PathBuf> {
    env("HOME").filter(|h| !h.is_empty()).map(|home| Path::new(&home).join(file))
}

/// A refusal about the connection's settings.
fn bad(found: impl Into<String>, needed: &str, fix: impl Into<String>) -> Error {
    Error::refused("postgres_url", found, needed, fix)
}
