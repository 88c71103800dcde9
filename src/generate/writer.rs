//! Writes the model's transactions into Postgres, each exactly once, also when the connection breaks.

use bytes::Bytes;
use futures_util::SinkExt;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};
use tracing::warn;

use super::catalog::{Content, Kind, Subject};
use super::model::{End, Op, Transaction};
use super::text;
use crate::error::{Error, Result};
use crate::source::conn::{self, Conninfo};
use crate::world::World;

/// COPY data is handed to the socket in pieces of about this size, so that the server parses while we write.
const CHUNK: usize = 64 << 10;
/// Most existing contents that a load uses: the newest.
const MOST_CONTENTS: i64 = 10_000;

/// A connection, and the transaction that is under way on it.
pub struct Writer {
    world: World,
    conninfo: Conninfo,
    client: Client,
    /// Set from the first statement of a transaction to its known end.
    open: Option<TransactionId>,
}

/// Postgres's 64-bit transaction id (`xid8`), as text.
#[derive(Clone, Debug)]
struct TransactionId(String);

/// What became of a transaction whose COMMIT got no answer.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Committed,
    RolledBack,
}

impl Writer {
    /// Connects, and sees that the tables are there.
    ///
    /// # Errors
    /// [`Error::Unreachable`] after 30 s; [`Error::Refused`] without tables or rights.
    pub async fn open(world: &World) -> Result<Self> {
        let conninfo = Conninfo::parse(&world.config.postgres.url)?;
        let client = world.at_start("postgres", || connect(&conninfo)).await?;
        let writer = Self { world: world.clone(), conninfo, client, open: None };
        writer.tables_exist().await?;
        Ok(writer)
    }

    async fn tables_exist(&self) -> Result<()> {
        for table in ["public.content", "public.engagement_events"] {
            let row = self.client.query_one("SELECT to_regclass($1::text) IS NOT NULL", &[&table]).await;
            if !row.map_err(|e| sorted(&e))?.get::<_, bool>(0) {
                return Err(Error::refused(
                    "tables",
                    format!("{table} does not exist"),
                    "the tables of sql/01_tables.sql",
                    "falaj init --with-tables",
                ));
            }
        }
        Ok(())
    }

    /// Inserts the contents that are absent, in one transaction.
    ///
    /// # Errors
    /// As [`Writer::write`]. Repeating it changes nothing.
    pub async fn stock(&mut self, contents: &[Content], start: i64) -> Result<()> {
        let ops = contents.iter().cloned().map(Op::AddContent).collect();
        self.write(&Transaction { ops, end: End::Commit, committed: 0, rolled_back: 0 }, start).await
    }

    /// All contents, oldest first.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub async fn contents(&self) -> Result<Vec<Subject>> {
        let sql =
            "SELECT id::text, content_type, length_seconds FROM public.content ORDER BY publish_ts DESC, id LIMIT $1";
        let rows = self.client.query(sql, &[&MOST_CONTENTS]).await.map_err(|e| sorted(&e))?;
        let subject = |row: &tokio_postgres::Row| -> Result<Subject> {
            let id: String = row.get(0);
            let id = id.parse().map_err(|e| Error::fatal(format_args!("content.id {id}"), e))?;
            let kind = row.get::<_, Option<String>>(1).and_then(|kind| Kind::parse(&kind));
            Ok(Subject { id, kind, length_seconds: row.get(2) })
        };
        rows.iter().rev().map(subject).collect()
    }

    /// Writes one transaction. `start` is the load's start in microseconds since 1970.
    ///
    /// Where the connection breaks, Postgres is asked after the next connect what became of the transaction; it is
    /// written again
    /// only if it was not committed. So no row is lost and none is there twice.
    ///
    /// # Errors
    /// [`Error::Refused`] or [`Error::Fatal`] when Postgres says no; an outage is waited for.
    pub async fn write(&mut self, transaction: &Transaction, start: i64) -> Result<()> {
        loop {
            match self.attempt(transaction, start).await {
                Ok(()) => return Ok(()),
                Err(error) if error.is_transient() => {
                    warn!(%error, "connection lost within a transaction");
                    metrics::counter!("falaj_generate_retries_total").increment(1);
                    if self.reconnect().await? == Fate::Committed && transaction.end == End::Commit {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn attempt(&mut self, transaction: &Transaction, start: i64) -> Result<()> {
        self.begin().await?;
        let mut sql = String::new();
        for op in &transaction.ops {
            match op {
                Op::Insert(rows) => text::insert(&mut sql, rows, start)?,
                Op::AddContent(content) => text::insert_content(&mut sql, content, start)?,
                Op::ChangeContent(change) => text::update_content(&mut sql, change),
                Op::Savepoint => sql.push_str("SAVEPOINT s; "),
                Op::RollbackToSavepoint => sql.push_str("ROLLBACK TO SAVEPOINT s; RELEASE SAVEPOINT s; "),
                Op::ReleaseSavepoint => sql.push_str("RELEASE SAVEPOINT s; "),
                Op::Copy(rows) => {
                    self.flush(&mut sql).await?;
                    self.copy(rows, start).await?;
                }
            }
        }
        self.flush(&mut sql).await?;
        // Alone, and after everything else was answered: only here can the outcome be in doubt.
        let end = match transaction.end {
            End::Commit => "COMMIT",
            End::Rollback => "ROLLBACK",
        };
        self.client.batch_execute(end).await.map_err(|e| sorted(&e))?;
        self.open = None;
        Ok(())
    }

    async fn begin(&mut self) -> Result<()> {
        let answer = self.client.simple_query("BEGIN; SELECT pg_catalog.pg_current_xact_id()").await;
        let messages = answer.map_err(|e| sorted(&e))?;
        self.open = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(|xid| TransactionId(xid.to_owned())),
            _ => None,
        });
        Ok(())
    }

    async fn flush(&self, sql: &mut String) -> Result<()> {
        if !sql.is_empty() {
            self.client.batch_execute(sql).await.map_err(|e| sorted(&e))?;
            sql.clear();
        }
        Ok(())
    }

    async fn copy(&self, rows: &[super::event::Engagement], start: i64) -> Result<()> {
        let sink = self.client.copy_in(&text::copy_statement()).await.map_err(|e| sorted(&e))?;
        let mut sink = std::pin::pin!(sink);
        let mut chunk = String::with_capacity(CHUNK + 1024);
        for row in rows {
            text::copy_line(&mut chunk, row, start)?;
            if chunk.len() >= CHUNK {
                let full = std::mem::replace(&mut chunk, String::with_capacity(CHUNK + 1024));
                sink.send(Bytes::from(full)).await.map_err(|e| sorted(&e))?;
            }
        }
        if !chunk.is_empty() {
            sink.send(Bytes::from(chunk)).await.map_err(|e| sorted(&e))?;
        }
        sink.finish().await.map_err(|e| sorted(&e))?;
        Ok(())
    }

    /// Connects again, for as long as it takes, and finds out what became of the open transaction.
    async fn reconnect(&mut self) -> Result<Fate> {
        let (conninfo, open) = (&self.conninfo, self.open.take());
        let (client, fate) = self
            .world
            .for_ever("postgres", || async {
                let client = connect(conninfo).await?;
                let fate = match &open {
                    Some(xid) => fate(&client, xid).await?,
                    None => Fate::RolledBack,
                };
                Ok((client, fate))
            })
            .await?;
        self.client = client;
        Ok(fate)
    }
}

/// The previous connection's server process may still be about to end its transaction: then the answer is "not yet".
///
/// After a crash of the server an id that no WAL record has kept is unknown to it, and was not committed.
async fn fate(client: &Client, xid: &TransactionId) -> Result<Fate> {
    let answer = client.query_one("SELECT pg_catalog.pg_xact_status($1::text::xid8)", &[&xid.0]).await;
    let status: Option<String> = match answer {
        Ok(row) => row.get(0),
        Err(e) if e.code() == Some(&SqlState::INVALID_PARAMETER_VALUE) => return Ok(Fate::RolledBack),
        Err(e) => return Err(sorted(&e)),
    };
    match status.as_deref() {
        Some("committed") => Ok(Fate::Committed),
        Some("aborted") => Ok(Fate::RolledBack),
        Some(_) => Err(Error::unreachable("the end of the interrupted transaction", "it is still in progress")),
        None => Err(Error::fatal(format_args!("transaction {}", xid.0), "Postgres no longer knows its outcome")),
    }
}

async fn connect(conninfo: &Conninfo) -> Result<Client> {
    let client = conninfo.sql("falaj generate").await?;
    client.batch_execute("SET standard_conforming_strings = on").await.map_err(|e| sorted(&e))?;
    Ok(client)
}

/// Sorts an error: what a writer may meet beside a reader. A deadlock or serialization failure can be tried again.
fn sorted(error: &tokio_postgres::Error) -> Error {
    let Some(answer) = error.as_db_error() else { return conn::sql_error("writing the load", error) };
    let text = format!("{} (SQLSTATE {})", answer.message(), answer.code().code());
    match answer.code().code() {
        code if code.starts_with("40") => Error::unreachable("Postgres", text),
        "42501" => Error::refused("rights", text, "the rights of falaj_load", "grant them as sql/03_roles.sql does"),
        "42P01" | "42703" => Error::refused(
            "tables",
            text,
            "the tables of sql/01_tables.sql",
            "drop or mend the tables, then: falaj init --with-tables",
        ),
        _ => conn::sql_error("writing the load", error),
    }
}
