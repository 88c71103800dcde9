//! One session: from taking the slot to letting it go.
//!
//! Order of the start: connect → take the slot → fence every sink and read its position → refuse what does not fit →
//! build the lookup rows as of the lowest position → walk. Nothing is written before all of it has held.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::select_all;
use tokio_postgres::Client;
use tracing::{info, warn};

use super::until::{Reached, Until};
use super::walk::Walk;
use crate::config::{Config, SinkName};
use crate::enrich::Enricher;
use crate::enrich::state::require_header;
use crate::error::Result;
use crate::lsn::{Checkpoint, Lsn, SlotIdentity};
use crate::sink::discard::Discard;
use crate::sink::{self, Durable, Opened, Sink, Stored};
use crate::source::conn::Conninfo;
use crate::source::slot::{self, SlotState};
use crate::source::stream::{Chunk, Stream};
use crate::source::wire::{Wire, WireError, ident, literal};
use crate::world::World;

/// How often a slot in use is tried again.
const STANDBY: Duration = Duration::from_secs(1);
const APPLICATION: &str = "falaj produce";

/// A running session.
pub(super) struct Session {
    pub(super) stream: Stream,
    pub(super) outlets: Outlets,
    pub(super) walk: Walk,
}

/// The sinks of this run, and the positions of the configured ones that it leaves out.
pub(super) struct Outlets {
    pub(super) sinks: Vec<Box<dyn Sink>>,
    left_out: Vec<Stored>,
}

impl Session {
    /// Opens a session; `None` when a shutdown comes while another process holds the slot.
    pub(super) async fn open(world: &World, chosen: &[SinkName]) -> Result<Option<Self>> {
        let config = &world.config;
        let conninfo = Conninfo::parse(&config.postgres.url)?;
        let client = conninfo.sql(APPLICATION).await?;
        let Some((stream, identity)) = take_slot(world, &conninfo, &client).await? else { return Ok(None) };
        let slot = Slot { client: &client, database: conninfo.dbname(), identity: &identity };
        match slot
            .open_outlets(world, chosen)
            .await
            .and_then(|(outlets, from)| slot.lookups(world, from).map(|e| (outlets, from, e)))
        {
            Ok((outlets, from, enricher)) => Ok(Some(Self::start(world, client, stream, outlets, enricher, from))),
            Err(error) => {
                // Let the slot go before the caller tries again: else it would meet itself there.
                stream.finish().await;
                Err(error)
            }
        }
    }

    /// A session that encodes every event and keeps none: nothing is acknowledged. For measurements.
    pub(super) async fn discarding(world: &World) -> Result<Option<Self>> {
        let conninfo = Conninfo::parse(&world.config.postgres.url)?;
        let client = conninfo.sql(APPLICATION).await?;
        let Some((stream, identity)) = take_slot(world, &conninfo, &client).await? else { return Ok(None) };
        let slot = Slot { client: &client, database: conninfo.dbname(), identity: &identity };
        let from = slot.confirmed(world).await?;
        let enricher = slot.lookups(world, from)?;
        let outlets = Outlets { sinks: vec![Box::new(Discard::default())], left_out: Vec::new() };
        Ok(Some(Self::start(world, client, stream, outlets, enricher, from)))
    }

    fn start(world: &World, client: Client, stream: Stream, outlets: Outlets, enricher: Enricher, from: Lsn) -> Self {
        info!(%from, lookup_rows = enricher.rows(), "streaming");
        let walk = Walk::new(client, enricher, world.config.tables.clone(), Checkpoint::whole(from));
        Self { stream, outlets, walk }
    }

    /// Walks a chunk, then lets the sinks hand over what is due.
    pub(super) async fn walk(&mut self, chunk: &Chunk, until: Option<&mut Until>) -> Result<Option<Reached>> {
        let reached = self.walk.chunk(chunk, &mut self.outlets.sinks, until).await?;
        if reached.is_none() {
            self.settle(false).await?;
        }
        Ok(reached)
    }

    /// Marks how far the walk is. With `rest`, or when the server waits for it, sinks with nothing open store the bare position.
    pub(super) async fn settle(&mut self, rest: bool) -> Result<()> {
        let checkpoint = self.walk.checkpoint();
        let wanted = self.walk.take_wanted() && checkpoint.partial.is_none();
        for sink in &mut self.outlets.sinks {
            let behind = !sink.stored().checkpoint().covers(checkpoint);
            if behind && (wanted || (rest && sink.is_empty() && checkpoint.partial.is_none())) {
                sink.flush(checkpoint).await?;
            } else {
                sink.mark(checkpoint).await?;
            }
        }
        Ok(())
    }

    /// Acknowledges what every configured sink has. The lookup changes below it are made durable first.
    pub(super) fn acknowledge(&mut self) -> Result<()> {
        if let Some(durable) = self.outlets.durable()
            && durable.lsn() > self.stream.acknowledged()
        {
            self.walk.enricher.sync()?;
            self.stream.acknowledge(durable);
        }
        Ok(())
    }

    pub(super) fn measure(&mut self) {
        self.walk.measure(&self.outlets.sinks);
    }

    /// Sends the last acknowledgement, lets the slot go, and stops the sinks.
    pub(super) async fn close(mut self) {
        self.stream.finish().await;
        for sink in &mut self.outlets.sinks {
            sink.stop().await;
        }
    }
}

impl Outlets {
    fn durable(&self) -> Option<Durable> {
        Durable::lowest(self.sinks.iter().map(|s| s.stored()).chain(self.left_out.iter().copied()))
    }

    /// Waits until a sink has stored more.
    pub(super) async fn moved(&mut self) -> Result<()> {
        let waits: Vec<_> = self.sinks.iter_mut().map(|s| s.moved()).collect();
        select_all(waits).await.0
    }

    /// Makes everything up to `checkpoint` durable in every sink of this run, and waits for it.
    pub(super) async fn store(&mut self, checkpoint: Checkpoint) -> Result<()> {
        for sink in &mut self.sinks {
            if !sink.stored().checkpoint().covers(checkpoint) {
                sink.flush(checkpoint).await?;
            }
        }
        for sink in &mut self.sinks {
            while !sink.stored().checkpoint().covers(checkpoint) {
                sink.moved().await?;
            }
        }
        Ok(())
    }
}

/// The slot while this session holds it: nobody else can move it.
struct Slot<'a> {
    client: &'a Client,
    database: &'a str,
    identity: &'a SlotIdentity,
}

impl Slot<'_> {
    async fn confirmed(&self, world: &World) -> Result<Lsn> {
        let name = &world.config.postgres.slot;
        let state = slot::read(self.client, name).await?;
        Ok(slot::require(name, state, self.database)?.confirmed_flush_lsn)
    }

    /// Fences the sinks, reads their positions, and refuses those that do not fit. Also says where the walk begins.
    async fn open_outlets(&self, world: &World, chosen: &[SinkName]) -> Result<(Outlets, Lsn)> {
        let config = &world.config;
        let confirmed = self.confirmed(world).await?;
        let server = slot::server_lsn(self.client).await?;
        let origin = require_header(&config.state.dir)?.origin;
        let (mut outlets, mut from) = (Outlets { sinks: Vec::new(), left_out: Vec::new() }, None::<Lsn>);
        for name in &config.produce.sinks {
            let (label, position) = if chosen.contains(name) {
                let Opened { sink, position } = open_sink(*name, world, self.identity).await?;
                outlets.sinks.push(sink);
                (outlets.sinks[outlets.sinks.len() - 1].name(), position)
            } else {
                let (label, position) = peek(*name, config, self.identity).await?;
                // Without a stored position it holds the acknowledgement where it is.
                outlets.left_out.push(position.unwrap_or(Stored::NOTHING));
                (label, position)
            };
            let at = slot::require_position(label, position.map(Stored::checkpoint), confirmed, origin, server)?;
            from = Some(from.map_or(at.resume, |lowest| lowest.min(at.resume)));
        }
        Ok((outlets, from.unwrap_or(confirmed)))
    }

    fn lookups(&self, world: &World, from: Lsn) -> Result<Enricher> {
        let config = &world.config;
        Enricher::load(&config.state.dir, Checkpoint::whole(from), self.identity, &config.tables)
    }
}

/// Takes the slot by starting to stream from it. While another process has it, waits as its standby and writes nothing.
async fn take_slot(world: &World, conninfo: &Conninfo, client: &Client) -> Result<Option<(Stream, SlotIdentity)>> {
    let (config, mut told) = (&world.config.postgres, None::<Instant>);
    let binary = slot::can_be_binary(client, &config.publication).await?;
    let command = start_command(&config.slot, &config.publication, binary);
    loop {
        slot::require(&config.slot, slot::read(client, &config.slot).await?, conninfo.dbname())?;
        let (conninfo, command) = (conninfo.clone(), command.clone());
        let connect = move || async move {
            let mut wire = Wire::connect(&conninfo, APPLICATION).await?;
            let system = wire.identify_system().await?;
            Ok((wire.copy_both(&command).await?, system))
        };
        match Stream::open(world.config.produce.queue_bytes.0, connect).await {
            Ok((stream, system)) => {
                world.health.ok("slot");
                let (system_id, timeline) = (system.system_id, system.timeline);
                return Ok(Some((stream, SlotIdentity { system_id, timeline, slot: config.slot.clone() })));
            }
            Err(WireError::Server(e)) if e.code == "55006" => {
                world.health.failing("slot", &e.message);
                if told.is_none_or(|t| t.elapsed() > Duration::from_secs(60)) {
                    let holder = slot::read(client, &config.slot).await?.and_then(|s: SlotState| s.active_pid);
                    warn!("slot in use by pid {}, waiting", holder.map_or("(just gone)".into(), |pid| pid.to_string()));
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

/// From 0/0 Postgres starts at confirmed_flush_lsn; what a sink has beyond that, the sink skips by its own position.
fn start_command(slot: &str, publication: &str, binary: bool) -> String {
    format!(
        "START_REPLICATION SLOT {} LOGICAL 0/0 (proto_version '1', publication_names {}, binary '{binary}')",
        ident(slot),
        literal(&ident(publication)),
    )
}

async fn open_sink(name: SinkName, world: &World, identity: &SlotIdentity) -> Result<Opened> {
    match name {
        SinkName::Kafka => sink::kafka::open(world.config.clone(), identity).await,
        SinkName::Archive => sink::parquet::open(&world.config, identity),
    }
}

/// Reads a sink's position without taking the sink over.
pub(super) async fn peek(
    name: SinkName,
    config: &Arc<Config>,
    identity: &SlotIdentity,
) -> Result<(&'static str, Option<Stored>)> {
    Ok(match name {
        SinkName::Kafka => ("kafka", sink::kafka::peek(Arc::clone(config), identity).await?),
        SinkName::Archive => ("archive", sink::parquet::peek(config, identity)?),
    })
}
