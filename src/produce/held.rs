//! The slot in our hands: nobody else can move it while the stream runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::history::History;
use super::session::{Outlets, Session};
use super::walk::Walk;
use crate::config::{self, Config, Envelope, SinkName};
use crate::enrich::Enricher;
use crate::enrich::state::require_header;
use crate::error::{Error, Result};
use crate::lsn::{Checkpoint, Lsn, SlotIdentity};
use crate::sink::{self, Opened, Stored};
use crate::source::catalog;
use crate::source::conn::Conninfo;
use crate::source::slot::{self, WireForm};
use crate::source::stream::{Pace, Stream};
use crate::source::wire::{Wire, WireError, ident, literal};
use crate::world::World;

/// How often a slot in use is tried again.
const STANDBY: Duration = Duration::from_secs(1);
/// How often it is said that the slot is in use.
const REMIND: Duration = Duration::from_secs(60);
const APPLICATION: &str = "falaj produce";

/// A slot that this process streams from, before the sinks are open.
pub(super) struct Held {
    client: Client,
    form: WireForm,
    pub(super) stream: Stream,
    identity: SlotIdentity,
    database: String,
}

impl Held {
    /// Takes the slot by starting to stream from it. While another process has it, waits as its standby and writes
    /// nothing; `None` when a shutdown comes meanwhile.
    pub(super) async fn take(world: &World, form: Option<WireForm>) -> Result<Option<Self>> {
        let config = &world.config.postgres;
        let conninfo = Conninfo::parse(&config.url)?;
        let client = conninfo.sql(APPLICATION).await?;
        let possible = slot::wire_form(&client, &config.publication).await?;
        let form = form.unwrap_or(possible);
        let (command, database) =
            (start_command(config, form, world.config.produce.messages), conninfo.dbname().to_owned());
        let mut told = None::<Instant>;
        loop {
            let state = slot::require(&config.slot, slot::read(&client, &config.slot).await?, &database)?;
            let (conninfo, command) = (conninfo.clone(), command.clone());
            let connect = move || async move {
                let mut wire = Wire::connect(&conninfo, APPLICATION).await?;
                let system = wire.identify_system().await?;
                let stream = wire.copy_both(&command).await?;
                let pace = Pace::new(stream.bound_window());
                Ok((stream, pace, system))
            };
            // The reader needs to be ahead by a gulp or two alone; what waits longer waits in front of the sinks.
            match Stream::open(world.config.produce.queue_bytes.0 / 4, connect).await {
                Ok((stream, system)) => {
                    world.health.ok("slot");
                    let (system_id, timeline) = (system.system_id, system.timeline);
                    let identity = SlotIdentity { system_id, timeline, slot: config.slot.clone() };
                    return Ok(Some(Self { client, form, stream, identity, database }));
                }
                Err(WireError::Server(e)) if e.code == "55006" => {
                    world.health.failing("slot", &e.message);
                    if told.is_none_or(|t| t.elapsed() > REMIND) {
                        let holder = state.active_pid.map_or("(just gone)".into(), |pid| pid.to_string());
                        warn!("slot in use by pid {holder}, waiting");
                        told = Some(Instant::now());
                    }
                }
                Err(e) => return Err(e.into_error("START_REPLICATION")),
            }
            if world.pause(STANDBY).await.is_err() {
                return Ok(None);
            }
        }
    }

    /// How far the slot has been acknowledged. Read anew: only now can nobody else move it.
    pub(super) async fn confirmed(&self, world: &World) -> Result<Lsn> {
        let name = &world.config.postgres.slot;
        let state = slot::read(&self.client, name).await?;
        Ok(slot::require(name, state, &self.database)?.confirmed_flush_lsn)
    }

    /// Fences the sinks, reads their positions, and refuses those that do not fit. Also says where the walk begins, and what
    /// all the chosen sinks have.
    pub(super) async fn open_outlets(
        &self,
        world: &World,
        chosen: &[SinkName],
    ) -> Result<(Outlets, Checkpoint, Checkpoint)> {
        let config = &world.config;
        let confirmed = self.confirmed(world).await?;
        let server = slot::server_lsn(&self.client).await?;
        // A standby that was restarted takes connections before it is back where it was.
        let replaying = slot::is_standby(&self.client).await?;
        let origin = require_header(&config.state.dir, &config.postgres.slot)?.origin;
        let tables = config.sources(catalog::published_names(&self.client, &config.postgres.publication).await?)?;
        let (mut outlets, mut from, mut have) = (Outlets::default(), None::<Checkpoint>, None::<Checkpoint>);
        let mut positions = Vec::new();
        for name in &config.produce.sinks {
            let ours = chosen.contains(name);
            let (label, position) = if ours {
                let Opened { sink, position } = open_sink(*name, world, &self.identity, &tables).await?;
                let label = sink.name();
                outlets.sinks.push(sink);
                (label, position)
            } else {
                let (label, position) = peek(*name, config, &self.identity, Some(&world.stop)).await?;
                // Without a stored position it holds the acknowledgement where it is.
                outlets.left_out.push(position.unwrap_or(Stored::NOTHING));
                (label, position)
            };
            let position = position.map(Stored::checkpoint);
            positions.push(position);
            if let Some(ahead) = position.filter(|position| replaying && position.resume > server) {
                return Err(Error::unreachable(
                    "the standby",
                    format!("it has replayed WAL up to {server} again, {label} stands at {}", ahead.resume),
                ));
            }
            let at = slot::require_position(label, position, confirmed, origin, server)?;
            from = from.into_iter().chain([at]).min_by_key(|position| position.resume);
            have = if ours { Some(have.map_or(at, |lowest| lowest.min(at))) } else { have };
        }
        outlets.sinks.sort_by_key(|sink| !sink.may_refuse());
        outlets.history = History::new(&positions, confirmed);
        let from = from.unwrap_or(Checkpoint::whole(confirmed));
        Ok((outlets, from, have.unwrap_or(Checkpoint::whole(Lsn(0)))))
    }

    /// The lookup rows as of where `from` resumes.
    pub(super) fn lookups(&self, world: &World, from: Checkpoint) -> Result<Enricher> {
        let config = &world.config;
        Enricher::load(&config.state.dir, from, &self.identity, &config.tables)
    }

    /// Everything has held: the walk may begin.
    pub(super) fn start(
        self,
        world: &World,
        mut outlets: Outlets,
        enricher: Enricher,
        from: Lsn,
        have: Checkpoint,
    ) -> Session {
        info!(%from, lookup_rows = enricher.rows(), form = ?self.form, "streaming");
        let (tables, history) = (world.config.tables.clone(), std::mem::take(&mut outlets.history));
        let mut walk = Walk::new(self.client, self.form, enricher, tables, from, have, history);
        walk.keep_old = world.config.kafka.envelope == Envelope::Debezium;
        Session { stream: self.stream, outlets, walk }
    }
}

/// From 0/0 Postgres starts at confirmed_flush_lsn; what a sink has beyond that, the sink skips by its own position.
fn start_command(config: &config::Postgres, form: WireForm, messages: bool) -> String {
    format!(
        "START_REPLICATION SLOT {} LOGICAL 0/0 (proto_version '1', publication_names {}, binary '{}'{})",
        ident(&config.slot),
        literal(&ident(&config.publication)),
        form == WireForm::Binary,
        if messages { ", messages 'true'" } else { "" },
    )
}

async fn open_sink(name: SinkName, world: &World, identity: &SlotIdentity, tables: &[String]) -> Result<Opened> {
    let config = &world.config;
    match name {
        SinkName::Kafka => sink::kafka::open(Arc::clone(config), identity, tables, &world.stop).await,
        SinkName::Archive => sink::parquet::open(config, identity),
    }
}

/// Reads a sink's position without taking the sink over; `settled` as in [`sink::kafka::peek`].
pub(crate) async fn peek(
    name: SinkName,
    config: &Arc<Config>,
    identity: &SlotIdentity,
    settled: Option<&CancellationToken>,
) -> Result<(&'static str, Option<Stored>)> {
    Ok(match name {
        SinkName::Kafka => ("kafka", sink::kafka::peek(Arc::clone(config), identity, settled).await?),
        SinkName::Archive => ("archive", sink::parquet::peek(config, identity)?),
    })
}
