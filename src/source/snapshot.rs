//! Exported snapshots that belong to an LSN: those that the creation of a slot gives.
//!
//! The transactions that committed below the slot's consistent point are visible in its snapshot, and no other one is.
//! `pg_export_snapshot()` beside `pg_current_wal_insert_lsn()` does not promise that: a transaction writes its commit record
//! first and becomes visible only when that is flushed, or even confirmed by a standby.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tracing::info;

use super::catalog::Table;
use super::conn::sql_error;
use super::wire::{Wire, WireError, ident, literal};
use crate::error::{Error, Result};
use crate::lsn::Lsn;

/// How long a session waits for the locks of the tables that it is to read.
const LOCK_PATIENCE_SECONDS: u32 = 10;

/// What becomes of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It ends with its connection.
    Temporary,
    /// It stays.
    Permanent,
    /// It stays, and Postgres copies it to its standbys (17 and newer).
    Failover,
}

/// Creates a slot. Gives its consistent point and the snapshot's name, which holds until the next command of `wire`.
///
/// # Errors
/// [`Error::Refused`] for a name that is taken; [`Error::Unreachable`] when the connection is lost.
pub async fn new_slot(wire: &mut Wire, slot: &str, kind: Kind) -> Result<(Lsn, String)> {
    // The older spelling of SNAPSHOT 'export': Postgres 14 knows no other, and no FAILOVER either.
    let (temporary, options) = match kind {
        Kind::Temporary => ("TEMPORARY ", "EXPORT_SNAPSHOT"),
        Kind::Permanent => ("", "EXPORT_SNAPSHOT"),
        Kind::Failover => ("", "(SNAPSHOT 'export', FAILOVER)"),
    };
    let command = format!("CREATE_REPLICATION_SLOT {} {temporary}LOGICAL pgoutput {options}", ident(slot));
    let rows = wire.query(&command).await.map_err(|e| match e {
        WireError::Server(e) if e.code == "42710" => Error::refused(
            "slot",
            e.to_string(),
            "a name that no other slot has",
            "run falaj init again, or choose another postgres.slot",
        ),
        other => other.into_error("CREATE_REPLICATION_SLOT"),
    })?;
    match rows.into_iter().next().map(Vec::into_iter).map(Iterator::flatten).map(Iterator::collect::<Vec<_>>).as_deref()
    {
        Some([_, at, snapshot, _]) => match at.parse() {
            Ok(at) => Ok((at, snapshot.clone())),
            Err(e) => Err(Error::fatal("CREATE_REPLICATION_SLOT", e)),
        },
        other => Err(Error::fatal("CREATE_REPLICATION_SLOT", format_args!("the answer {other:?}"))),
    }
}

/// The files of tables at a moment. A table that is rewritten, or emptied by TRUNCATE, has others from then on, and looks empty in
/// every snapshot from before. A lock that is taken before the snapshot is made would keep that away too, but a transaction that
/// waits for it would hold up the slot, which waits for that transaction.
#[derive(Clone)]
pub struct Files {
    oids: Vec<u32>,
    sources: Vec<String>,
    /// Oid and file of each table and partition.
    found: BTreeSet<String>,
}

impl Files {
    /// Notes them, for a snapshot that is made next.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when the connection is lost.
    pub async fn note(client: &Client, tables: &[&Table]) -> Result<Self> {
        let oids: Vec<u32> = tables.iter().map(|t| t.relation.oid).collect();
        let sources = tables.iter().map(|t| t.sql_source()).collect();
        let found = now(client, &oids).await?;
        Ok(Self { oids, sources, found })
    }

    /// Gives the session's transaction, which has just begun, the snapshot, and locks the tables against what it could not see.
    /// Each session that reads in the snapshot has to: another one's locks may end before it does. (A partition that is new has
    /// its rows from within the snapshot or from the stream.)
    ///
    /// # Errors
    /// [`Error::Refused`] when a table has been rewritten since its files were noted; [`Error::Unreachable`], also when
    /// another transaction is in the way: it may wait for a session of ours that has entered before, and has to go first.
    pub async fn enter(&self, client: &Client, snapshot: &str) -> Result<()> {
        let import = format!(
            "SET TRANSACTION SNAPSHOT {}; SET LOCAL lock_timeout = '{LOCK_PATIENCE_SECONDS}s'; {}; \
             SET LOCAL lock_timeout TO DEFAULT",
            literal(snapshot),
            lock(&self.sources)
        );
        client.batch_execute(&import).await.map_err(|e| match e.code() {
            Some(&SqlState::LOCK_NOT_AVAILABLE) => Error::unreachable(
                "Postgres",
                format!(
                    "another transaction locks one of {}, or waits for a lock of it (see pg_locks): it goes first",
                    self.sources.join(", ")
                ),
            ),
            _ => failed(&e),
        })?;
        if now(client, &self.oids).await?.is_superset(&self.found) {
            return Ok(());
        }
        Err(Error::refused(
            "snapshot",
            format!(
                "one of {} was rewritten or truncated, or lost a partition, while the snapshot was made",
                self.sources.join(", ")
            ),
            "tables that stay as they are for that moment",
            "run the same command again",
        ))
    }
}

/// SQL that keeps tables from being rewritten until the transaction ends.
pub fn lock(sources: &[String]) -> String {
    if sources.is_empty() { String::new() } else { format!("LOCK TABLE {} IN ACCESS SHARE MODE", sources.join(", ")) }
}

/// As they are now, whatever the session's transaction sees.
async fn now(client: &Client, oids: &[u32]) -> Result<BTreeSet<String>> {
    let sql = "SELECT f.oid::text || '/' || coalesce(pg_catalog.pg_relation_filenode(f.oid)::text, '') \
               FROM (SELECT unnest($1::oid[]) AS oid UNION \
                   SELECT t.relid FROM unnest($1::oid[]) AS o(oid), pg_catalog.pg_partition_tree(o.oid) AS t) AS f";
    let rows = client.query(sql, &[&oids]).await.map_err(|e| failed(&e))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

fn failed(e: &tokio_postgres::Error) -> Error {
    sql_error("entering a snapshot", e)
}

/// Postgres makes a slot only once every running transaction has ended; says so when that takes long. Never ends.
pub async fn said_waiting(is_standby: bool) -> std::convert::Infallible {
    tokio::time::sleep(Duration::from_secs(2)).await;
    if is_standby {
        info!(
            "waiting for the primary to say which transactions run, as it does at a checkpoint; at once: SELECT \
             pg_log_standby_snapshot() on the primary"
        );
    } else {
        info!("waiting for running transactions to end: a slot begins between them (see pg_stat_activity.xact_start)");
    }
    std::future::pending().await
}
