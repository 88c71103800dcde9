//! The replication connection: startup with `replication=database`, simple queries, and the way into CopyBoth.
//!
//! Protocol: "Message Flow" and "Streaming Replication Protocol" of the Postgres manual.

use std::fmt;
use std::time::Duration;

use pgwire_replication::PgWireError;
use pgwire_replication::protocol::framing::{
    BackendMessage, read_backend_message, write_password_message, write_query, write_startup_message,
};
use pgwire_replication::protocol::messages::{ErrorFields, auth, parse_auth_request};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use tokio::io::AsyncWriteExt;

use super::conn::{Conninfo, Login, Session, Stream, UNLIMITED, is_transient};
use crate::error::{Error, Result};
use crate::lsn::Lsn;

/// Protocol version 3.0.
const PROTOCOL: i32 = 196_608;
/// The message Terminate.
const TERMINATE: &[u8] = b"X\0\0\0\x04";
/// How long the server may take to end a session.
const END: Duration = Duration::from_secs(5);

/// A replication connection that waits for a command.
///
/// A command whose future is dropped half-way leaves the connection out of step: drop the `Wire` with it.
pub struct Wire {
    stream: Stream,
    what: String,
    server_version: String,
}

/// What a command can end in.
#[derive(Debug)]
pub enum WireError {
    /// The server answered with an error; the connection is still good, unless the SQLSTATE says otherwise.
    Server(ServerError),
    /// The connection is gone or out of step.
    Broken(Error),
}

/// An ErrorResponse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerError {
    /// SQLSTATE, such as `55006` (object in use).
    pub code: String,
    /// The message, in the server's language.
    pub message: String,
    /// DETAIL, where given.
    pub detail: Option<String>,
    /// HINT, where given.
    pub hint: Option<String>,
}

/// The answer to IDENTIFY_SYSTEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    /// Identifies the cluster; the same after a restore from a base backup.
    pub system_id: String,
    /// Current timeline; grows with each promotion.
    pub timeline: u32,
    /// Current flush position of the WAL.
    pub xlogpos: Lsn,
    /// Database that we are connected to.
    pub dbname: Option<String>,
}

/// Rows of a simple query: columns as text, NULL as `None`.
pub type Rows = Vec<Vec<Option<String>>>;

impl Wire {
    /// Opens a replication connection to the database of `to`.
    ///
    /// # Errors
    /// As [`Conninfo::sql`]; a role without REPLICATION is refused.
    pub async fn connect(to: &Conninfo, application_name: &str) -> Result<Self> {
        to.session(application_name).await
    }

    /// Runs a replication command or simple query and reads its answer to the end.
    ///
    /// # Errors
    /// [`WireError::Server`] with its SQLSTATE, or [`WireError::Broken`].
    pub async fn query(&mut self, sql: &str) -> Result<Rows, WireError> {
        self.send(sql).await?;
        let mut rows = Rows::new();
        let mut error = None;
        loop {
            let message = self.read().await?;
            match message.tag {
                b'D' => rows.push(data_row(&message.payload).ok_or_else(|| self.strange("a malformed DataRow"))?),
                b'E' => error = Some(self.server_error(&message)?),
                b'Z' => return error.map_or(Ok(rows), |e| Err(WireError::Server(e))),
                b'W' | b'G' | b'H' => return Err(self.strange("a copy that the command did not ask for")),
                _ => {}
            }
        }
    }

    /// Which cluster and timeline this is.
    ///
    /// # Errors
    /// As [`Wire::query`].
    pub async fn identify_system(&mut self) -> Result<System, WireError> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        rows.into_iter().next().and_then(system).ok_or_else(|| self.strange("an answer to IDENTIFY_SYSTEM"))
    }

    /// Sends a command that starts CopyBoth (START_REPLICATION) and hands out the stream behind CopyBothResponse.
    ///
    /// Messages are read exactly, so the stream's next byte is the first of the first CopyData.
    ///
    /// # Errors
    /// [`WireError::Server`] when the server refuses (55006: slot in use; 55000: slot lost); [`WireError::Broken`].
    pub async fn copy_both(mut self, sql: &str) -> Result<Stream, WireError> {
        self.send(sql).await?;
        loop {
            let message = self.read().await?;
            match message.tag {
                b'W' => return Ok(self.stream),
                b'E' => return Err(WireError::Server(self.server_error(&message)?)),
                b'Z' | b'C' => return Err(self.strange("an end instead of CopyBothResponse")),
                _ => {}
            }
        }
    }

    /// The server's version, as `server_version` has it.
    pub fn server_version(&self) -> &str {
        &self.server_version
    }

    /// Ends the session, and waits until the server has: it is no connection any more, and its temporary slots are gone.
    pub async fn end(mut self) {
        let goodbye = async {
            self.stream.write_all(TERMINATE).await?;
            self.stream.flush().await
        };
        if goodbye.await.is_ok() {
            let _ = tokio::time::timeout(END, async { while self.read().await.is_ok() {} }).await;
        }
    }

    async fn send(&mut self, sql: &str) -> Result<(), WireError> {
        write_query(&mut self.stream, sql).await.map_err(|e| WireError::Broken(broken(&self.what, &e)))
    }

    async fn read(&mut self) -> Result<BackendMessage, WireError> {
        read_backend_message(&mut self.stream).await.map_err(|e| WireError::Broken(broken(&self.what, &e)))
    }

    /// The server may end the session at any time; that is no answer to the command.
    fn server_error(&self, message: &BackendMessage) -> Result<ServerError, WireError> {
        let error = ServerError::parse(&message.payload);
        match error.code.as_str() {
            "57P01" | "57P02" | "57P03" => Err(WireError::Broken(Error::unreachable(&self.what, error))),
            _ => Ok(error),
        }
    }

    fn strange(&self, got: &str) -> WireError {
        WireError::Broken(Error::fatal(&self.what, format!("sent {got}")))
    }
}

impl Session for Wire {
    async fn start(mut stream: Stream, login: &Login<'_>) -> Result<Self> {
        let params = [
            ("user", login.user),
            ("database", login.dbname),
            ("replication", "database"),
            ("client_encoding", "UTF8"),
            ("application_name", login.application_name),
            ("options", &login.options),
        ];
        let lost = |e: PgWireError| broken(&login.what, &e);
        write_startup_message(&mut stream, PROTOCOL, &params).await.map_err(lost)?;
        let mut scram = None;
        let mut server_version = String::new();
        loop {
            let message = read_backend_message(&mut stream).await.map_err(lost)?;
            match message.tag {
                b'R' => authenticate(&mut stream, login, &mut scram, &message.payload).await?,
                b'S' => server_version = parameter(&message.payload, "server_version").unwrap_or(server_version),
                b'E' => {
                    let error = ServerError::parse(&message.payload);
                    return Err(login.refusal(&error.code, &error.message));
                }
                b'Z' => break,
                _ => {}
            }
        }
        let mut wire = Self { stream, what: login.what.clone(), server_version };
        match wire.query(UNLIMITED).await {
            Ok(_) => Ok(wire),
            Err(WireError::Server(error)) => Err(login.refusal(&error.code, &error.message)),
            Err(WireError::Broken(error)) => Err(error),
        }
    }
}

/// Answers one Authentication message.
async fn authenticate(
    stream: &mut Stream,
    login: &Login<'_>,
    scram: &mut Option<ScramSha256>,
    payload: &[u8],
) -> Result<()> {
    let lost = |e: PgWireError| broken(&login.what, &e);
    let (kind, data) = parse_auth_request(payload).map_err(lost)?;
    if kind == auth::OK {
        // A server that skips the last SCRAM message has not proved that it knows the password.
        return if scram.is_none() { Ok(()) } else { Err(login.no_password("the server did not finish SCRAM")) };
    }
    let password = login.password.ok_or_else(|| login.no_password("the server asks for a password"))?;
    let malformed = || login.no_password("a malformed authentication message");
    let answer = match kind {
        auth::CLEARTEXT_PASSWORD => terminated(password.as_bytes()),
        auth::MD5_PASSWORD => {
            let salt = data.try_into().map_err(|_| malformed())?;
            terminated(md5_hash(login.user.as_bytes(), password.as_bytes(), salt).as_bytes())
        }
        auth::SASL => {
            if !data.split(|b| *b == 0).any(|name| name == SCRAM_SHA_256.as_bytes()) {
                return Err(login.no_password("the server offers no SCRAM-SHA-256"));
            }
            let exchange = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
            let first = initial_response(exchange.message());
            *scram = Some(exchange);
            first
        }
        auth::SASL_CONTINUE => {
            let exchange = scram.as_mut().ok_or_else(malformed)?;
            exchange.update(data).map_err(|e| login.no_password(&e.to_string()))?;
            exchange.message().to_vec()
        }
        auth::SASL_FINAL => {
            let mut exchange = scram.take().ok_or_else(malformed)?;
            return exchange.finish(data).map_err(|e| login.no_password(&e.to_string()));
        }
        other => {
            return Err(Error::refused(
                "postgres_login",
                format!("{}: authentication method {other} (Kerberos, SSPI, …)", login.what),
                "scram-sha-256, md5, password, trust, peer or cert",
                "choose one of them for this role in pg_hba.conf",
            ));
        }
    };
    write_password_message(stream, &answer).await.map_err(lost)
}

/// SASLInitialResponse: the mechanism's name, the length, the first message.
fn initial_response(message: &[u8]) -> Vec<u8> {
    let length = i32::try_from(message.len()).unwrap_or(i32::MAX);
    [SCRAM_SHA_256.as_bytes(), b"\0", &length.to_be_bytes(), message].concat()
}

fn terminated(bytes: &[u8]) -> Vec<u8> {
    [bytes, b"\0"].concat()
}

fn broken(what: &str, e: &PgWireError) -> Error {
    match e {
        PgWireError::Io(io) => Error::unreachable(what, io),
        other => Error::fatal(what, other),
    }
}

fn parameter(payload: &[u8], wanted: &str) -> Option<String> {
    let mut parts = payload.split(|b| *b == 0);
    (parts.next()? == wanted.as_bytes()).then(|| parts.next().map(|v| String::from_utf8_lossy(v).into()))?
}

fn data_row(mut payload: &[u8]) -> Option<Vec<Option<String>>> {
    let columns = u16::from_be_bytes(take(&mut payload, 2)?.try_into().ok()?);
    (0..columns)
        .map(|_| match i32::from_be_bytes(take(&mut payload, 4)?.try_into().ok()?) {
            -1 => Some(None),
            length => {
                let bytes = take(&mut payload, usize::try_from(length).ok()?)?;
                Some(Some(String::from_utf8(bytes.to_vec()).ok()?))
            }
        })
        .collect()
}

fn take<'a>(payload: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (head, tail) = payload.split_at_checked(count)?;
    *payload = tail;
    Some(head)
}

fn system(row: Vec<Option<String>>) -> Option<System> {
    let [system_id, timeline, xlogpos, dbname] = <[_; 4]>::try_from(row).ok()?;
    Some(System { system_id: system_id?, timeline: timeline?.parse().ok()?, xlogpos: xlogpos?.parse().ok()?, dbname })
}

impl ServerError {
    /// Reads the fields of an ErrorResponse; an absent one is empty or `None`.
    pub fn parse(payload: &[u8]) -> Self {
        let fields = ErrorFields::parse(payload);
        Self {
            code: fields.code.unwrap_or_default(),
            message: fields.message.unwrap_or_default(),
            detail: fields.detail,
            hint: fields.hint,
        }
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (SQLSTATE {})", self.message, self.code)?;
        self.detail.iter().try_for_each(|d| write!(f, "; {d}"))?;
        self.hint.iter().try_for_each(|h| write!(f, "; {h}"))
    }
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(e) => e.fmt(f),
            Self::Broken(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for WireError {}

impl From<Error> for WireError {
    fn from(e: Error) -> Self {
        Self::Broken(e)
    }
}

impl WireError {
    /// The crate's error, with what was being done: transient SQLSTATEs as unreachable, others fatal.
    pub fn into_error(self, doing: &str) -> Error {
        match self {
            Self::Broken(e) => e,
            Self::Server(e) if is_transient(&e.code) => Error::unreachable("Postgres", format!("{doing}: {e}")),
            Self::Server(e) => Error::fatal(doing, e),
        }
    }
}

/// A name, quoted for SQL and for replication commands alike.
pub fn ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A string literal for SQL and for replication commands: quotes doubled. Replication commands know no other escape.
///
/// In SQL it holds with `standard_conforming_strings=on`, the default since 9.1.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_stay_one_token() {
        assert_eq!(ident(r#"a"b/..🎧"#), r#""a""b/..🎧""#);
        assert_eq!(literal(r"o'b\r"), r"'o''b\r'");
    }

    #[test]
    fn a_data_row_reads_whole_or_not_at_all() {
        let row = [0, 2, 0, 0, 0, 1, b'x', 0xff, 0xff, 0xff, 0xff];
        assert_eq!(data_row(&row), Some(vec![Some("x".into()), None]));
        assert!((0..row.len()).all(|cut| data_row(&row[..cut]).is_none()));
    }
}
