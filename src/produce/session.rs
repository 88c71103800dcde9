//! One session: from taking the slot to letting it go.
//!
//! Order of the start: connect → take the slot → fence every sink and read its position → refuse what does not fit →
//! build the lookup rows as of the lowest position → walk. Nothing is written before all of it has held.

use std::time::{Duration, Instant};

use futures_util::future::select_all;
use tokio_postgres::Client;
use tracing::{info, warn};

use super::until::{Reached, Until};
use super::walk::Walk;
use crate::config::SinkName;
use crate::enrich::Enricher;
use crate::error::{Error, Result};
use crate::lsn::{Checkpoint, Lsn, SlotIdentity};
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
        match Self::build(world, chosen, client, stream, identity).await {
            Ok(session) => Ok(Some(session)),
            Err(error) => Err(error),
        }
    }

    async fn build(
        world: &World,
        chosen: &[SinkName],
        client: Client,
        stream: Stream,
        identity: SlotIdentity,
    ) -> Result<Self> {
        let config = &world.config;
        // Read anew: only now, with the slot in our hands, can nobody else move it.
        let state = slot::read(&client, &config.postgres.slot).await?;
        let confirmed = slot::require(&config.postgres.slot, state, &database(&client).await?)?.confirmed_flush_lsn;
        let server = slot::server_lsn(&client).await?;
        let origin = crate::enrich::state::header(&config.state.dir)?.map_or(Lsn(0), |h| h.origin);
        let (mut sinks, mut left_out, mut lowest) = (Vec::new(), Vec::new(), None::<Checkpoint>);
        for name in &config.produce.sinks {
            let (label, position) = if chosen.contains(name) {
                let Opened { sink, position } = open_sink(*name, world, &identity).await?;
                let label = sink.name();
                sinks.push(sink);
                (label, position)
            } else {
                peek(*name, world, &identity).await?
            };
            let at = slot::require_position(label, position.map(Stored::checkpoint), confirmed, origin, server)?;
            lowest = Some(lowest.map_or(at, |l| if l.covers(at) { at } else { l }));
            if !chosen.contains(name) {
                // Without a stored position it holds the acknowledgement where it is.
                left_out.push(position.unwrap_or(Stored::NOTHING));
            }
        }
        let lowest = lowest.unwrap_or(Checkpoint::whole(confirmed));
        let start = Checkpoint::whole(lowest.resume);
        let enricher = Enricher::load(&config.state.dir, start, &identity, &config.tables)?;
        info!(%confirmed, from = %lowest.resume, lookup_rows = enricher.rows(), "streaming");
        let walk = Walk::new(client, enricher, config.tables.clone(), start);
        Ok(Self { stream, outlets: Outlets { sinks, left_out }, walk })
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

/// Takes the slot by starting to stream from it. While another process has it, waits as its standby and writes nothing.
async fn take_slot(world: &World, conninfo: &Conninfo, client: &Client) -> Result<Option<(Stream, SlotIdentity)>> {
    let (config, mut told) = (&world.config.postgres, None::<Instant>);
    let binary = slot::can_be_binary(client, &config.publication).await?;
    loop {
        slot::require(&config.slot, slot::read(client, &config.slot).await?, &database(client).await?)?;
        let mut wire = Wire::connect(conninfo, APPLICATION).await?;
        let system = wire.identify_system().await.map_err(|e| e.into_error("IDENTIFY_SYSTEM"))?;
        let identity =
            SlotIdentity { system_id: system.system_id, timeline: system.timeline, slot: config.slot.clone() };
        match wire.copy_both(&start_command(&config.slot, &config.publication, binary)).await {
            Ok(connection) => {
                world.health.ok("slot");
                return Ok(Some((Stream::start(connection, world.config.produce.queue_bytes.0)?, identity)));
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

async fn database(client: &Client) -> Result<String> {
    let row = client.query_one("SELECT pg_catalog.current_database()::text", &[]).await;
    row.map(|row| row.get(0)).map_err(|e| Error::unreachable("Postgres", e))
}

async fn open_sink(name: SinkName, world: &World, identity: &SlotIdentity) -> Result<Opened> {
    match name {
        SinkName::Kafka => sink::kafka::open(world.config.clone(), identity).await,
        SinkName::Archive => sink::parquet::open(&world.config, identity),
    }
}

async fn peek(name: SinkName, world: &World, identity: &SlotIdentity) -> Result<(&'static str, Option<Stored>)> {
    Ok(match name {
        SinkName::Kafka => ("kafka", sink::kafka::peek(world.config.clone(), identity).await?),
        SinkName::Archive => ("archive", sink::parquet::peek(&world.config, identity)?),
    })
}
