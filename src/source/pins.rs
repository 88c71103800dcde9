//! Slots as bookmarks: copied, moved and dropped by SQL, and what they pin.

use tokio_postgres::Client;

use super::slot::{lost, parse_lsn, read};
use crate::error::{Error, Result};
use crate::lsn::Lsn;

/// Copies a slot at its present position, under a name that no slot has. Gives the position.
///
/// # Errors
/// [`Error::Refused`] for a name that is taken, or for want of REPLICATION; [`Error::Unreachable`].
pub async fn copy(client: &Client, from: &str, to: &str) -> Result<Lsn> {
    let sql = "SELECT pg_catalog.pg_copy_logical_replication_slot($1::text::name, $2::text::name)";
    client.query_one(sql, &[&from, &to]).await.map_err(|e| changing("copying", from, e))?;
    match read(client, to).await? {
        Some(copied) => Ok(copied.confirmed_flush_lsn),
        None => Err(Error::Fatal(format!("slot \"{to}\" was made and is not there"))),
    }
}

/// Copies a slot, as [`copy`] does, for as long as the session lasts.
///
/// # Errors
/// As [`copy`].
pub async fn copy_for_session(client: &Client, from: &str, to: &str) -> Result<()> {
    let sql = "SELECT pg_catalog.pg_copy_logical_replication_slot($1::text::name, $2::text::name, true)";
    client.query_one(sql, &[&from, &to]).await.map(drop).map_err(|e| changing("copying", from, e))
}

/// Moves a slot that nobody reads to an LSN ahead of it: everything committed below will not come again.
///
/// # Errors
/// [`Error::Refused`] when Postgres refuses; [`Error::Unreachable`].
pub async fn advance(client: &Client, slot: &str, to: Lsn) -> Result<()> {
    let sql = "SELECT pg_catalog.pg_replication_slot_advance($1::text::name, $2::text::pg_lsn)";
    client.query_one(sql, &[&slot, &to.to_string()]).await.map(drop).map_err(|e| changing("advancing", slot, e))
}

/// Drops a slot; one that is not there is no error.
///
/// # Errors
/// [`Error::Refused`] while somebody reads it; [`Error::Unreachable`].
pub async fn drop_slot(client: &Client, slot: &str) -> Result<()> {
    let sql = "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots \
               WHERE slot_name::text = $1";
    client.query(sql, &[&slot]).await.map(drop).map_err(|e| changing("dropping", slot, e))
}

/// What a slot keeps from being removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// Oldest WAL that is kept.
    pub restart_lsn: Option<Lsn>,
    /// Bytes of WAL since then.
    pub wal_bytes: i64,
    /// Transactions since the oldest one whose catalogue rows are kept.
    pub catalog_age: i32,
}

/// Reads what a slot pins; `None` when there is no such slot.
///
/// # Errors
/// [`Error::Unreachable`] when the connection is lost.
pub async fn pinned(client: &Client, slot: &str) -> Result<Option<Pinned>> {
    let sql = "SELECT restart_lsn::text, coalesce(pg_catalog.pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() \
                   THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END, restart_lsn), 0)::bigint, \
                   coalesce(pg_catalog.age(catalog_xmin), 0) \
               FROM pg_catalog.pg_replication_slots WHERE slot_name::text = $1";
    let Some(row) = client.query_opt(sql, &[&slot]).await.map_err(lost)? else { return Ok(None) };
    let restart_lsn = row.get::<_, Option<&str>>(0).map(parse_lsn).transpose()?;
    Ok(Some(Pinned { restart_lsn, wal_bytes: row.get(1), catalog_age: row.get(2) }))
}

fn changing(doing: &str, slot: &str, e: tokio_postgres::Error) -> Error {
    let Some(db) = e.as_db_error() else { return Error::unreachable("Postgres", e) };
    let fix = match db.code().code() {
        "55006" => "stop the process that reads it first",
        "42710" => "choose another name",
        "53400" => "raise max_replication_slots, or drop a slot that nobody needs",
        "42501" => "connect as a role with REPLICATION",
        _ => "see the server's message",
    };
    let found = format!("{doing} slot \"{slot}\": {} (SQLSTATE {})", db.message(), db.code().code());
    Error::refused("slot", found, "a slot that can be changed", fix)
}
