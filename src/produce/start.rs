//! `--start LSN`: a saved LSN, given to a fresh installation. Everything committed below it is somewhere else already.
//!
//! The slot must still have it. The stream is walked from where the slot stands up to the LSN, for the sake of the lookup
//! rows alone; then the installation's origin is moved there, and the slot after it. From then on it is as if `init` had
//! made the slot at that place: no sink has a position, and each begins at the origin.

use std::time::{Duration, Instant};

use tracing::info;

use super::session::Session;
use super::until::{Reached, Until};
use crate::check::postgres::identity;
use crate::enrich::state::require_header;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::source::conn::Conninfo;
use crate::source::pins;
use crate::source::slot::{self, SlotState, WireForm};
use crate::world::World;

const APPLICATION: &str = "falaj produce";
/// How long the server may take to see that the slot is free again.
const RELEASE: Duration = Duration::from_secs(10);

/// Moves the beginning of a fresh installation to `lsn`. One that began there already is left as it is.
///
/// # Errors
/// [`Error::Refused`], with nothing written, when the slot has not that LSN, or when a sink has a position.
pub(super) async fn begin(world: &World, lsn: Lsn) -> Result<()> {
    let config = &world.config;
    let name = &config.postgres.slot;
    let conninfo = Conninfo::parse(&config.postgres.url)?;
    let client = world.at_start("postgres", || conninfo.sql(APPLICATION)).await?;
    let state = slot::require(name, slot::read(&client, name).await?, conninfo.dbname())?;
    let header = require_header(&config.state.dir, name)?;
    let begun = header.origin == lsn;
    if begun && state.confirmed_flush_lsn >= lsn {
        return Ok(());
    }
    require_kept(&state, lsn, slot::server_lsn(&client).await?)?;
    let identity = identity(&conninfo, name).await?;
    for (sink, position) in world.at_start("kafka", || super::positions(config, &identity)).await? {
        if let Some(position) = position {
            return Err(not_fresh(sink, position.checkpoint().resume, lsn));
        }
    }
    if !begun {
        fold(world, lsn).await?;
    }
    let deadline = Instant::now() + RELEASE;
    loop {
        match pins::advance(&client, name, lsn).await {
            Err(Error::Refused(_)) if Instant::now() < deadline => world.pause(Duration::from_millis(50)).await?,
            outcome => break outcome?,
        }
    }
    info!(%lsn, "the installation begins here");
    Ok(())
}

fn require_kept(state: &SlotState, lsn: Lsn, server: Lsn) -> Result<()> {
    let confirmed = state.confirmed_flush_lsn;
    if (confirmed..=server).contains(&lsn) {
        return Ok(());
    }
    Err(Error::refused(
        "start_lsn",
        format!("--start {lsn}; the slot has every commit from {confirmed} on, the server's WAL ends at {server}"),
        format!("an LSN from {confirmed} to {server}: what lies before is gone, what lies behind is not there yet"),
        format!("--start {confirmed}, and falaj replay (or backfill) for what lies before it"),
    ))
}

fn not_fresh(sink: &str, position: Lsn, lsn: Lsn) -> Error {
    Error::refused(
        "start_lsn",
        format!("--start {lsn}; {sink} stands at {position} already"),
        "a fresh installation: no sink with a position",
        "leave --start out (each sink goes on where it stands), or give the pipeline another name",
    )
}

/// Brings the lookup rows to `lsn` and makes them the base.
async fn fold(world: &World, lsn: Lsn) -> Result<()> {
    let (mut until, mut form) = (Until::new(lsn), None);
    loop {
        let Some(mut session) = Session::folding(world, form).await? else { return Err(stopped()) };
        let reached = walk(world, &mut session, &mut until).await;
        let Session { stream, walk, .. } = session;
        stream.finish().await;
        match reached? {
            Reached::End(at) if at == lsn => {
                return walk.enricher.begin_at(&world.config.state.dir, &world.config.postgres.slot, lsn);
            }
            Reached::End(at) => return Err(within_record(lsn, at)),
            Reached::ReadAgain => {}
            Reached::ReadInText => form = Some(WireForm::Text),
        }
    }
}

async fn walk(world: &World, session: &mut Session, until: &mut Until) -> Result<Reached> {
    loop {
        let chunk = tokio::select! {
            chunk = session.stream.next() => chunk?,
            () = world.stop.cancelled() => return Err(stopped()),
        };
        if let Some(reached) = session.walk(&chunk, Some(until)).await? {
            return Ok(reached);
        }
    }
}

fn stopped() -> Error {
    Error::Fatal("shut down before the LSN of --start was reached; nothing has begun".into())
}

fn within_record(lsn: Lsn, before: Lsn) -> Error {
    Error::refused(
        "start_lsn",
        format!("--start {lsn} lies within a commit record"),
        "an LSN at the end of a record, as sinks store it and pg_current_wal_flush_lsn() gives it",
        format!("--start {before}"),
    )
}
