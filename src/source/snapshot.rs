//! Exported snapshots that belong to an LSN: those that the creation of a slot gives.
//!
//! The transactions that committed below the slot's consistent point are visible in its snapshot, and no other one is.
//! `pg_export_snapshot()` beside `pg_current_wal_insert_lsn()` does not promise that: a transaction writes its commit record
//! first and becomes visible only when that is flushed, or even confirmed by a standby.

use std::time::Duration;

use tracing::info;

use super::wire::{Wire, WireError, ident};
use crate::error::{Error, Result};
use crate::lsn::Lsn;

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
