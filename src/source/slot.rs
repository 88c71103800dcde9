//! The slot and the catalogue, as SQL sees them.

use std::collections::BTreeMap;

use tokio_postgres::{Client, Row};

use super::catalog::KEY;
use super::types::{self, Told};
use crate::error::{Error, Result};
use crate::lsn::{Checkpoint, Lsn};
use crate::schema::{Column, Relation};

/// Where what the sinks have is no beginning of what the slot brings.
pub(crate) const ANEW: &str = "start anew: another pipeline, archive.dir and bigquery.dataset, drop the slot, falaj init --snapshot (docs/operations.md)";

/// A row of `pg_replication_slots`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// Output plugin.
    pub plugin: Option<String>,
    /// Database that the slot belongs to.
    pub database: Option<String>,
    /// Process that reads it now.
    pub active_pid: Option<i32>,
    /// Everything committed below it has been acknowledged.
    pub confirmed_flush_lsn: Lsn,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Why it is lost, from Postgres 17 on: `wal_removed`, `rows_removed`, `wal_level_insufficient`, `idle_timeout`.
    pub invalidation: Option<String>,
    /// Postgres copies it to its standbys (17 and later).
    pub failover: bool,
    /// It sends transactions when they are prepared, not when they are committed.
    pub two_phase: bool,
}

/// Reads the slot; `None` when there is none of that name.
///
/// # Errors
/// [`Error::Unreachable`] when the connection is lost.
pub async fn read(client: &Client, slot: &str) -> Result<Option<SlotState>> {
    // Two of them came with Postgres 17; to_jsonb gives NULL where there is no such column.
    let sql = "SELECT plugin::text, database::text, active_pid, confirmed_flush_lsn::text, wal_status::text, \
               pg_catalog.to_jsonb(s) ->> 'invalidation_reason', \
               coalesce((pg_catalog.to_jsonb(s) ->> 'failover')::bool, false), two_phase \
               FROM pg_catalog.pg_replication_slots s WHERE slot_name::text = $1 AND slot_type = 'logical'";
    let Some(row) = client.query_opt(sql, &[&slot]).await.map_err(lost)? else { return Ok(None) };
    Ok(Some(SlotState {
        plugin: row.get(0),
        database: row.get(1),
        active_pid: row.get(2),
        confirmed_flush_lsn: parse_lsn(row.get::<_, Option<&str>>(3).unwrap_or("0/0"))?,
        wal_status: row.get(4),
        invalidation: row.get(5),
        failover: row.get(6),
        two_phase: row.get(7),
    }))
}

/// Refuses a slot that cannot be streamed from: absent, of another plugin or database, or lost.
///
/// # Errors
/// [`Error::Refused`] with the ways out.
pub fn require(slot: &str, state: Option<SlotState>, database: &str) -> Result<SlotState> {
    let refuse = |found: String, fix: String| {
        Error::refused(
            "slot",
            found,
            format!("a pgoutput slot \"{slot}\" in database \"{database}\", with its WAL"),
            fix,
        )
    };
    let Some(state) = state else {
        return Err(refuse(format!("no slot \"{slot}\""), format!("falaj init; where it was there before, {ANEW}")));
    };
    if state.plugin.as_deref() != Some("pgoutput") {
        return Err(refuse(
            format!("slot \"{slot}\" has plugin {:?}", state.plugin),
            "choose another postgres.slot, then falaj init".to_owned(),
        ));
    }
    if state.two_phase {
        return Err(refuse(
            format!("slot \"{slot}\" was made with two_phase: it sends what is prepared, and may be rolled back"),
            "drop it and let falaj init make one, or choose another postgres.slot".to_owned(),
        ));
    }
    if state.database.as_deref() != Some(database) {
        return Err(refuse(
            format!("slot \"{slot}\" belongs to database {:?}", state.database.unwrap_or_default()),
            "connect to that database, or choose another postgres.slot".to_owned(),
        ));
    }
    if state.wal_status.as_deref() == Some("lost") {
        return Err(refuse(
            format!("slot \"{slot}\" is lost: {}", why_lost(state.invalidation.as_deref())),
            format!("changes are missing for good; {ANEW}"),
        ));
    }
    Ok(state)
}

fn why_lost(invalidation: Option<&str>) -> &str {
    match invalidation {
        None | Some("wal_removed") => "Postgres has removed WAL that was not acknowledged (max_slot_wal_keep_size)",
        Some("rows_removed") => {
            "the primary has removed catalogue rows that decoding needs (hot_standby_feedback was off)"
        }
        Some("wal_level_insufficient") => "wal_level was below logical for a while",
        Some("idle_timeout") => "it was not read for idle_replication_slot_timeout",
        Some(other) => other,
    }
}

/// The refusal of a sink that has lost what it had.
pub fn lost_sink(sink: &str, found: String, confirmed: Lsn) -> Error {
    Error::refused(
        "sink_position",
        found,
        format!("a {sink} that has everything below {confirmed}"),
        format!("put the {sink} data back, or take \"{sink}\" out of produce.sinks, or {ANEW}"),
    )
}

/// Refuses a sink's position that does not fit the slot: nothing may be skipped, and nothing invented.
///
/// # Errors
/// [`Error::Refused`] with both LSNs, what happened, and the ways out.
pub fn require_position(
    sink: &str,
    position: Option<Checkpoint>,
    confirmed: Lsn,
    origin: Lsn,
    server: Lsn,
) -> Result<Checkpoint> {
    let Some(position) = position else {
        if confirmed == origin {
            return Ok(Checkpoint::whole(origin));
        }
        let found = format!(
            "{sink} has no position, and the slot has been acknowledged up to {confirmed} (it began at {origin})"
        );
        return Err(lost_sink(sink, found, confirmed));
    };
    if confirmed > position.resume {
        return Err(Error::refused(
            "sink_position",
            format!(
                "{sink} stands at {}, the slot has been acknowledged up to {confirmed}: somebody advanced it, or {sink} lost data",
                position.resume
            ),
            format!("confirmed_flush_lsn at or below the position of every sink ({})", position.resume),
            format!(
                "the changes in between will not come again: put back the {sink} data that reaches {confirmed}, or {ANEW}"
            ),
        ));
    }
    if position.resume > server {
        return Err(Error::refused(
            "sink_position",
            format!(
                "{sink} stands at {}, the server's WAL ends at {server}: this is another server, or it was restored from an older backup",
                position.resume
            ),
            "a server that has everything the sinks have",
            format!("connect to the right server; after a restore {ANEW}"),
        ));
    }
    Ok(position)
}

/// Whether the server is a standby.
///
/// # Errors
/// [`Error::Unreachable`] when the connection is lost.
pub async fn is_standby(client: &Client) -> Result<bool> {
    let row = client.query_one("SELECT pg_catalog.pg_is_in_recovery()", &[]).await.map_err(lost)?;
    Ok(row.get(0))
}

/// End of the server's WAL.
///
/// # Errors
/// [`Error::Unreachable`] when the connection is lost.
pub async fn server_lsn(client: &Client) -> Result<Lsn> {
    let sql = "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END)::text";
    let row = client.query_one(sql, &[]).await.map_err(lost)?;
    parse_lsn(row.get(0))
}

/// How the server is asked to send values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireForm {
    /// Send functions: smaller, cheaper for both sides.
    Binary,
    /// Output functions: every type has one.
    Text,
}

/// Binary where every published column has a type whose binary form is known; one other column, and the stream runs in text.
///
/// # Errors
/// [`Error::Refused`] when the publication does not exist; [`Error::Unreachable`] when the connection is lost.
pub async fn wire_form(client: &Client, publication: &str) -> Result<WireForm> {
    let exists = "SELECT 1 FROM pg_catalog.pg_publication WHERE pubname::text = $1";
    if client.query_opt(exists, &[&publication]).await.map_err(lost)?.is_none() {
        return Err(Error::refused(
            "publication",
            format!("no publication \"{publication}\""),
            "a publication of the tables to stream",
            "falaj init",
        ));
    }
    let sql = "SELECT DISTINCT a.atttypid FROM pg_catalog.pg_publication_tables p \
               JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname \
               JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename \
               JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
               WHERE p.pubname::text = $1";
    let rows = client.query(sql, &[&publication]).await.map_err(lost)?;
    let column = |row: &Row| Column { name: String::new(), type_oid: row.get(0), type_mod: -1, identity: false };
    let mut columns: Vec<_> = rows.iter().map(column).collect();
    types::resolve(client, &mut columns, &Told::default()).await?;
    let known = columns.iter().all(|c| c.ty().has_binary());
    Ok(if known { WireForm::Binary } else { WireForm::Text })
}

/// Indexes, in column order, of the columns that a relation's rows are known by: the primary key. Under the default identity
/// the stream says it, as of the rows; else the catalogue says what it is now. Where deletes do not bring the primary key
/// (REPLICA IDENTITY USING INDEX of other columns), they are the index's columns, so that every change of a row has the same
/// key. Where the key has been changed since, so that the rows lack a column of it, they have the columns of the identity
/// index, or no key: never a part of one.
///
/// # Errors
/// [`Error::Unreachable`] when the connection is lost.
pub async fn primary_key(client: &Client, relation: &Relation) -> Result<Vec<usize>> {
    let identity = || (0..relation.columns.len()).filter(|i| relation.columns[*i].identity).collect();
    if relation.replica_identity == b'd' {
        return Ok(identity());
    }
    let sql = format!(
        "SELECT a.attname::text FROM pg_catalog.pg_index i \
         JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY ({KEY}) \
         WHERE i.indrelid = $1 AND i.indisprimary ORDER BY a.attnum"
    );
    let rows = client.query(&sql, &[&relation.oid]).await.map_err(lost)?;
    let now: Option<Vec<usize>> = rows.iter().map(|row| relation.index_of(row.get(0))).collect();
    let is_brought = |key: &[usize]| !key.is_empty() && key.iter().all(|i| relation.columns[*i].identity);
    Ok(match now {
        Some(key) if relation.replica_identity != b'i' || is_brought(&key) => key,
        _ if relation.replica_identity == b'i' => identity(),
        _ => Vec::new(),
    })
}

/// The columns of a table by name, but for generated ones, with `pg_attribute.attnum`: a column keeps its number, whatever it is called.
///
/// # Errors
/// [`Error::Unreachable`] when the connection is lost.
pub async fn column_numbers(client: &Client, table: u32) -> Result<BTreeMap<String, i16>> {
    let sql = "SELECT attname::text, attnum FROM pg_catalog.pg_attribute \
               WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped AND attgenerated = ''";
    let rows = client.query(sql, &[&table]).await.map_err(lost)?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

pub(super) fn parse_lsn(text: &str) -> Result<Lsn> {
    text.parse().map_err(|e| Error::fatal("reading an LSN from Postgres", e))
}

pub(super) fn lost(e: tokio_postgres::Error) -> Error {
    match e.as_db_error() {
        Some(db) if db.code().code().starts_with("42") => Error::refused(
            "postgres_rights",
            db.to_string(),
            "LOGIN, REPLICATION, and SELECT on the published tables",
            "GRANT the right that is named (sql/03_roles.sql)",
        ),
        _ => Error::unreachable("Postgres", e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> SlotState {
        SlotState {
            plugin: Some("pgoutput".into()),
            database: Some("app".into()),
            active_pid: None,
            confirmed_flush_lsn: Lsn(100),
            wal_status: Some("reserved".into()),
            invalidation: None,
            failover: false,
            two_phase: false,
        }
    }

    #[test]
    fn an_unfit_slot_is_refused_with_the_way_out() {
        assert_eq!(require("falaj", Some(state()), "app").unwrap(), state());
        for (unfit, word) in [
            (None, "no slot"),
            (Some(SlotState { plugin: Some("test_decoding".into()), ..state() }), "test_decoding"),
            (Some(SlotState { two_phase: true, ..state() }), "two_phase"),
            (Some(SlotState { database: Some("other".into()), ..state() }), "other"),
            (Some(SlotState { wal_status: Some("lost".into()), ..state() }), "lost"),
        ] {
            let error = require("falaj", unfit, "app").unwrap_err();
            assert!(error.exit_code() == 78 && error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn a_position_that_does_not_fit_the_slot_is_refused_with_both_lsns() {
        let at = |lsn| Some(Checkpoint::whole(Lsn(lsn)));
        let check = |position, confirmed| require_position("kafka", position, Lsn(confirmed), Lsn(50), Lsn(1000));
        assert_eq!(check(at(200), 100).unwrap().resume, Lsn(200));
        assert_eq!(check(None, 50).unwrap().resume, Lsn(50));
        for (position, confirmed, both) in
            [(None, 100, ["0/64", "0/32"]), (at(99), 100, ["0/63", "0/64"]), (at(1001), 100, ["0/3E9", "0/3E8"])]
        {
            let text = check(position, confirmed).unwrap_err().to_string();
            assert!(both.iter().all(|lsn| text.contains(lsn)), "{text}");
        }
    }
}
