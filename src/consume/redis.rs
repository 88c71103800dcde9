//! The board's Redis: connection, requirements, and the scripts. Nothing outside this file knows the client.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, FromRedisValue, RedisError, Script};
use tokio::sync::Mutex;

use super::batch::Batch;
use super::external::peer::tls_error;
use crate::config::Config;
use crate::error::{Error, Result};

/// How long Redis may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long Redis may take to answer; a call without an answer is made again, which its compare-and-set makes safe.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Stands in the place of the topic's id on a board that a replay has rebuilt.
pub const FROM_ARCHIVE: &str = "archive";
/// The scripts need `#!lua` lines, ZUNION and EXPIREAT GT.
const LEAST_VERSION: u32 = 7;
/// How far Redis's clock may be ahead: it lets the counts expire, two minutes after they leave the window.
const AHEAD: Duration = Duration::from_secs(60);

/// The board of one pipeline in Redis. Connects when needed; every call may be repeated.
pub struct Store {
    client: Client,
    name: String,
    key: String,
    connection: Mutex<Option<MultiplexedConnection>>,
    /// Whether there has been any connection so far.
    met: AtomicBool,
    apply: Script,
    claim: Script,
    read: Script,
    bucket: Script,
}

/// Where the board stands, as one script saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Names the current set of counts; a rebuild begins a new one.
    pub generation: String,
    /// The topic that the board was built from before this call, when that was another one; [`FROM_ARCHIVE`] after a replay, and
    /// then the offsets count its events.
    pub replaced: Option<String>,
    /// The next offset of each partition that has one.
    pub offsets: BTreeMap<i32, i64>,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// The counts and the offset are in, now or by an earlier try of the same call.
    Yes,
    /// Redis stands elsewhere; nothing was applied.
    Elsewhere,
}

/// One batch on its way.
pub struct Call<'a> {
    /// The generation that the counts belong to.
    pub generation: &'a str,
    /// Partition of the topic.
    pub partition: i32,
    /// The stored offset that the batch builds on.
    pub from: Option<i64>,
    /// The offset to store.
    pub next: i64,
    /// The counts.
    pub batch: &'a Batch,
}

/// The board as `board.lua` gives it: contents, devices, late, future.
pub type Rows = (Vec<ContentRow>, Vec<DeviceRow>, u64, u64);
/// Id, thousandths of a second, events, users, title, type; see [`nullable`].
pub type ContentRow = (String, i64, u64, u64, String, String);
/// Name, events, last use in microseconds since 1970; see [`nullable`].
pub type DeviceRow = (String, u64, i64);

/// What ten seconds of event time count, by content or by device; see [`nullable`].
#[derive(Debug)]
pub struct Bucket {
    /// Thousandths of a second, by content.
    pub millis: BTreeMap<String, i64>,
    /// Events by content.
    pub events: BTreeMap<String, u64>,
    /// Events by device.
    pub devices: BTreeMap<String, u64>,
    /// Last use in microseconds since 1970, by device.
    pub last: BTreeMap<String, i64>,
    /// `late` and `future` events that were left out, where there are any.
    pub dropped: BTreeMap<String, u64>,
}

type BucketRows = (
    BTreeMap<String, String>,
    BTreeMap<String, i64>,
    BTreeMap<String, u64>,
    BTreeMap<String, u64>,
    BTreeMap<String, i64>,
    BTreeMap<String, u64>,
);

/// A text that may be NULL, as the scripts carry it: "" is NULL, anything else has an `=` before it.
pub fn nullable(text: String) -> Option<String> {
    text.strip_prefix('=').map(str::to_owned)
}

/// Tries what the board needs of Redis, and says what was found.
///
/// # Errors
/// [`Error::Refused`] for an old version, an eviction policy or a clock that would drop counts, or missing rights;
/// [`Error::Unreachable`] otherwise.
pub async fn preflight(config: &Config) -> Result<String> {
    Store::new(config)?.preflight().await
}

impl Store {
    /// The board of the configured pipeline. Does not connect yet.
    ///
    /// # Errors
    /// [`Error::Refused`] for a URL that is none.
    pub fn new(config: &Config) -> Result<Self> {
        let client = Client::open(config.redis.url.as_str()).map_err(|e| {
            Error::refused(
                "redis_url",
                format!("redis.url: {e}"),
                "redis://[user:password@]host:port/db, or rediss:// for TLS",
                "mend redis.url",
            )
        })?;
        let name = format!("Redis at {}", client.get_connection_info().addr());
        Ok(Self {
            client,
            name,
            key: format!("{{falaj:{}}}", config.pipeline),
            connection: Mutex::new(None),
            met: AtomicBool::new(false),
            apply: Script::new(include_str!("apply.lua")),
            claim: Script::new(include_str!("claim.lua")),
            read: Script::new(include_str!("board.lua")),
            bucket: Script::new(include_str!("bucket.lua")),
        })
    }

    /// Connects, which checks version and eviction policy, and the clock; gives the first two.
    ///
    /// # Errors
    /// As the function [`preflight`] says.
    pub async fn preflight(&self) -> Result<String> {
        let info: String = self.call(&redis::cmd("INFO")).await?;
        self.require_clock(&info)?;
        self.requirements(&info)
    }

    /// Only at the start: a clock that is being set while a connection is made anew is no reason to end.
    fn require_clock(&self, info: &str) -> Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let theirs = Duration::from_micros(field(info, "server_time_usec").parse().unwrap_or(0));
        if theirs <= now + AHEAD {
            return Ok(());
        }
        Err(Error::refused(
            "redis_clock",
            format!("{}: its clock is {} s ahead", self.name, (theirs - now).as_secs()),
            format!("at most {} s: by its clock the counts of the last ten minutes expire", AHEAD.as_secs()),
            "set both clocks by NTP",
        ))
    }

    fn requirements(&self, info: &str) -> Result<String> {
        let (version, policy) = (field(info, "redis_version"), field(info, "maxmemory_policy"));
        let major = version.split('.').next().and_then(|n| n.parse().ok());
        if major.is_none_or(|n: u32| n < LEAST_VERSION) {
            return Err(Error::refused(
                "redis_version",
                format!("{}: version {version}", self.name),
                format!("Redis {LEAST_VERSION}.0 or later"),
                "upgrade Redis, or point redis.url to a newer one",
            ));
        }
        if policy.starts_with("allkeys-") || policy.starts_with("volatile-") {
            return Err(Error::refused(
                "redis_eviction",
                format!("{}: maxmemory-policy {policy}", self.name),
                "noeviction: any other policy may drop counts of the board unseen (its buckets carry an expiry)",
                "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in redis.conf",
            ));
        }
        Ok(format!("version {version}, {policy}"))
    }

    /// Where the board stands for this topic id. A board of another topic id, or of the generation to `give_up`,
    /// is left to expire and an empty one begun.
    ///
    /// # Errors
    /// [`Error::Unreachable`] or [`Error::Refused`].
    pub async fn claim(&self, topic_id: &str, give_up: Option<&str>) -> Result<Claim> {
        let claim = self.claim_script(topic_id, give_up.unwrap_or("")).await?;
        Ok(Claim { replaced: claim.replaced.filter(|id| id != topic_id), ..claim })
    }

    /// Where the board stands, whatever it was built from; that is told. The generation is empty when there is no board.
    ///
    /// # Errors
    /// [`Error::Unreachable`] or [`Error::Refused`].
    pub async fn look(&self) -> Result<Claim> {
        self.claim_script("", "").await
    }

    async fn claim_script(&self, topic_id: &str, give_up: &str) -> Result<Claim> {
        let mut call = self.script(&self.claim);
        call.arg(topic_id).arg(give_up);
        let (before, fields): (String, BTreeMap<String, String>) = self.call(&call).await?;
        self.stands(before, &fields)
    }

    /// From the fields of the board's hash, which was built from the topic `before`.
    fn stands(&self, before: String, fields: &BTreeMap<String, String>) -> Result<Claim> {
        let mut offsets = BTreeMap::new();
        for (name, offset) in fields {
            if let Some(partition) = name.strip_prefix("offset:") {
                offsets.insert(self.number(partition)?, self.number(offset)?);
            }
        }
        let generation = fields.get("generation").cloned().unwrap_or_default();
        Ok(Claim { generation, replaced: Some(before).filter(|id| !id.is_empty()), offsets })
    }

    /// Applies one batch with its offset, or finds that Redis stands elsewhere.
    ///
    /// # Errors
    /// [`Error::Unreachable`], also when memory is full: nothing was applied then.
    pub async fn apply(&self, call: &Call<'_>) -> Result<Applied> {
        let mut command = self.script(&self.apply);
        let from = call.from.map(|n| n.to_string()).unwrap_or_default();
        command.arg(call.generation).arg(call.partition).arg(from).arg(call.next);
        call.batch.encode(|argument| {
            command.arg(argument);
        });
        let answer: Vec<String> = self.call(&command).await?;
        let applied = match answer.as_slice() {
            [yes] => yes == "1",
            // An earlier try whose answer was lost.
            [_, generation, offset] => generation == call.generation && *offset == call.next.to_string(),
            _ => false,
        };
        Ok(if applied { Applied::Yes } else { Applied::Elsewhere })
    }

    /// The window of these buckets, with the best `top` contents.
    ///
    /// # Errors
    /// [`Error::Unreachable`] or [`Error::Refused`].
    pub async fn read(&self, first: i64, last: i64, top: usize) -> Result<Rows> {
        let mut command = self.script(&self.read);
        command.arg(first).arg(last).arg(top);
        self.call(&command).await
    }

    /// What one bucket counts, and where the board stands at that moment.
    ///
    /// # Errors
    /// [`Error::Unreachable`] or [`Error::Refused`].
    pub async fn bucket(&self, bucket: i64) -> Result<(Claim, Bucket)> {
        let mut command = self.script(&self.bucket);
        command.arg(bucket);
        let (fields, millis, events, devices, last, dropped): BucketRows = self.call(&command).await?;
        let claim = self.stands(fields.get("topic").cloned().unwrap_or_default(), &fields)?;
        Ok((claim, Bucket { millis, events, devices, last, dropped }))
    }

    fn script(&self, script: &Script) -> Cmd {
        let mut command = redis::cmd("EVALSHA");
        command.arg(script.get_hash()).arg(1).arg(&self.key);
        command
    }

    fn number<T: std::str::FromStr>(&self, text: &str) -> Result<T> {
        text.parse().map_err(|_| Error::fatal(format!("reading {} on {}", self.key, self.name), format!("{text:?}")))
    }

    async fn call<T: FromRedisValue>(&self, command: &Cmd) -> Result<T> {
        let mut connection = self.connection().await?;
        match command.query_async(&mut connection).await {
            Ok(value) => Ok(value),
            Err(e) => {
                // An answer proves the connection; without one, with the scripts gone, or from a server that is no primary any
                // more (its name may lead to another one by now), the next call connects anew.
                if matches!(e.code(), None | Some("NOSCRIPT" | "READONLY")) {
                    *self.connection.lock().await = None;
                }
                Err(self.error(&e))
            }
        }
    }

    async fn connection(&self) -> Result<MultiplexedConnection> {
        let mut held = self.connection.lock().await;
        if let Some(connection) = held.as_ref() {
            return Ok(connection.clone());
        }
        let limits = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(ANSWER_TIMEOUT));
        let connecting = self.client.get_multiplexed_async_connection_with_config(&limits).await;
        let mut connection = connecting.map_err(|e| self.not_connected(&e))?;
        self.met.store(true, Ordering::Relaxed);
        let failed = |e: RedisError| self.error(&e);
        let info: String = redis::cmd("INFO").query_async(&mut connection).await.map_err(failed)?;
        self.requirements(&info)?;
        for script in [&self.apply, &self.claim, &self.read, &self.bucket] {
            script.load_async(&mut connection).await.map_err(failed)?;
        }
        Ok(held.insert(connection).clone())
    }

    /// A certificate that does not pass says that address or authority are wrong, unless there has been a connection before:
    /// then it is an outage, which may pass.
    fn not_connected(&self, e: &RedisError) -> Error {
        match tls_error(e) {
            Some(why) if !self.met.load(Ordering::Relaxed) => Error::refused(
                "redis_tls",
                format!("{}: {why}", self.name),
                "a TLS server whose certificate a public authority has signed for that name",
                "mend redis.url (redis:// is without TLS), or give Redis such a certificate",
            ),
            _ => self.error(e),
        }
    }

    fn error(&self, e: &RedisError) -> Error {
        let refused =
            |check, needed: &str, fix: &str| Error::refused(check, format!("{}: {e}", self.name), needed, fix);
        match e.code() {
            Some("NOAUTH" | "WRONGPASS") => {
                refused("redis_password", "a user and password that Redis knows", "mend them in redis.url")
            }
            Some("NOPERM") => refused(
                "redis_rights",
                "EVALSHA, SCRIPT LOAD, INFO, and the commands of the scripts on keys {falaj:*",
                "extend the user's rights with ACL SETUSER",
            ),
            Some("MOVED" | "ASK" | "CROSSSLOT") => {
                refused("redis_cluster", "a single Redis (one board lies in one hash slot)", "point redis.url to one")
            }
            Some("OOM") => Error::unreachable(
                format!("{}, whose memory is full (nothing was applied; raise maxmemory)", self.name),
                e,
            ),
            _ if e.kind() == redis::ErrorKind::AuthenticationFailed => {
                refused("redis_password", "a user and password that Redis knows", "mend them in redis.url")
            }
            Some("ERR" | "WRONGTYPE") => Error::fatal(&self.name, e),
            _ if e.kind() == redis::ErrorKind::UnexpectedReturnType => Error::fatal(&self.name, e),
            _ => Error::unreachable(&self.name, e),
        }
    }
}

/// A field of INFO.
fn field<'a>(info: &'a str, name: &str) -> &'a str {
    let found = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    found.map_or("(not told)", str::trim)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_redis_that_would_lose_counts_is_refused() {
        let store = Store::new(&Config::defaults().unwrap()).unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros();
        let told = |version: &str, policy: &str, at: u128| {
            let info = format!("redis_version:{version}\r\nserver_time_usec:{at}\r\nmaxmemory_policy:{policy}\r\n");
            match store.require_clock(&info).and_then(|()| store.requirements(&info)) {
                Ok(found) => found,
                Err(Error::Refused(refusal)) => refusal.check.to_owned(),
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!(told("7.0.15", "noeviction", now), "version 7.0.15, noeviction");
        assert_eq!(told("7.0.15", "noeviction", now - 900_000_000), "version 7.0.15, noeviction");
        assert_eq!(told("7.0.15", "noeviction", now + 90_000_000), "redis_clock");
        assert_eq!(told("7.0.15", "allkeys-lru", now), "redis_eviction");
        assert_eq!(told("6.2.1", "noeviction", now), "redis_version");
    }

    #[test]
    fn a_certificate_that_does_not_pass_is_refused_until_there_has_been_a_connection() {
        let store = Store::new(&Config::defaults().unwrap()).unwrap();
        // As tokio-rustls gives it.
        let failed = |why: rustls::Error| RedisError::from(io::Error::new(io::ErrorKind::InvalidData, why));
        let unknown = failed(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer));
        let away = RedisError::from(io::Error::from(io::ErrorKind::ConnectionRefused));
        let code = |e: &RedisError| store.not_connected(e).exit_code();
        assert_eq!((code(&unknown), code(&away)), (78, 69));
        assert!(store.not_connected(&unknown).to_string().contains("UnknownIssuer"));
        store.met.store(true, Ordering::Relaxed);
        assert_eq!(code(&unknown), 69);
    }
}
