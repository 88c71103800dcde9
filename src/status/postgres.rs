//! The slot's part of the status.

use serde::Serialize;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::lsn::{Lsn, SlotIdentity};
use crate::source::conn::{Conninfo, sql_error};
use crate::source::wire::Wire;

const APPLICATION: &str = "falaj status";
const SLOT: &str = "SELECT slot.active_pid, slot.wal_status::text, slot.confirmed_flush_lsn::text, slot.restart_lsn::text, wal.ends::text \
     FROM (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END AS ends) AS wal \
     LEFT JOIN pg_catalog.pg_replication_slots AS slot ON slot.slot_name::text = $1 AND slot.slot_type = 'logical'";

/// The replication slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// End of the server's WAL.
    pub server_lsn: Lsn,
    /// Everything committed below it has been acknowledged.
    pub confirmed_flush_lsn: Lsn,
    /// Process of the server that serves it now.
    pub active_pid: Option<i32>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// WAL between what is acknowledged and the server's end.
    pub lag_bytes: u64,
    /// WAL that the server keeps for the slot; `null` once it is lost.
    pub retained_wal_bytes: Option<u64>,
}

/// Reads the slot and the server's position in one statement.
pub(super) async fn slot(config: &Config) -> Result<Slot> {
    let name = &config.postgres.slot;
    let client = Conninfo::parse(&config.postgres.url)?.sql(APPLICATION).await?;
    let row = client.query_one(SLOT, &[name]).await.map_err(|e| sql_error("reading the slot", &e))?;
    let lsn = |n| row.get::<_, Option<&str>>(n).map(parse).transpose();
    let server_lsn = lsn(4)?.unwrap_or_default();
    let Some(confirmed_flush_lsn) = lsn(2)? else {
        return Err(Error::Fatal(format!("no slot \"{name}\"; falaj init makes it")));
    };
    let behind = |at: Lsn| server_lsn.0.saturating_sub(at.0);
    Ok(Slot {
        name: name.clone(),
        server_lsn,
        confirmed_flush_lsn,
        active_pid: row.get(0),
        wal_status: row.get(1),
        lag_bytes: behind(confirmed_flush_lsn),
        retained_wal_bytes: lsn(3)?.map(behind),
    })
}

/// The stream that positions belong to.
pub(super) async fn identity(config: &Config) -> Result<SlotIdentity> {
    let mut wire = Wire::connect(&Conninfo::parse(&config.postgres.url)?, APPLICATION).await?;
    let system = wire.identify_system().await.map_err(|e| e.into_error("IDENTIFY_SYSTEM"))?;
    Ok(SlotIdentity { system_id: system.system_id, timeline: system.timeline, slot: config.postgres.slot.clone() })
}

fn parse(text: &str) -> Result<Lsn> {
    text.parse().map_err(|e| Error::fatal("reading an LSN from Postgres", e))
}
