//! One session: from taking the slot to letting it go.
//!
//! Order of the start: connect → take the slot → fence every sink and read its position → refuse what does not fit →
//! build the lookup rows as of the lowest position → walk. Nothing is written before all of it has held.

use futures_util::future::select_all;

use super::held::Held;
use super::history::History;
use super::until::{Reached, Until};
use super::walk::Walk;
use crate::config::SinkName;
use crate::error::Result;
use crate::lsn::{Checkpoint, Lsn};
use crate::sink::discard::Discard;
use crate::sink::{Durable, Sink, Stored};
use crate::source::chunk::Chunk;
use crate::source::slot::WireForm;
use crate::source::stream::Stream;
use crate::world::World;

/// A running session.
pub(super) struct Session {
    pub(super) stream: Stream,
    pub(super) outlets: Outlets,
    pub(super) walk: Walk,
}

/// The sinks of this run, and the positions of the configured ones that it leaves out.
#[derive(Default)]
pub(super) struct Outlets {
    pub(super) sinks: Vec<Box<dyn Sink>>,
    pub(super) left_out: Vec<Stored>,
    /// What their positions are of, for the walk.
    pub(super) history: History,
}

impl Session {
    /// Opens a session; `None` when a shutdown comes while another process holds the slot. `form` overrides the choice.
    pub(super) async fn open(world: &World, chosen: &[SinkName], form: Option<WireForm>) -> Result<Option<Self>> {
        let Some(held) = Held::take(world, form).await? else { return Ok(None) };
        let opened = match held.open_outlets(world, chosen).await {
            Ok((outlets, from, have)) => {
                held.lookups(world, from).map(|enricher| (outlets, enricher, from.resume, have))
            }
            Err(error) => Err(error),
        };
        match opened {
            Ok((outlets, enricher, from, have)) => Ok(Some(held.start(world, outlets, enricher, from, have))),
            Err(error) => {
                // Let the slot go before the caller tries again: else it would meet itself there.
                held.stream.finish().await;
                Err(error)
            }
        }
    }

    /// A session that encodes every event and keeps none: nothing is acknowledged. For measurements.
    pub(super) async fn discarding(world: &World) -> Result<Option<Self>> {
        let Some(held) = Held::take(world, None).await? else { return Ok(None) };
        let from = held.confirmed(world).await?;
        let enricher = held.lookups(world, Checkpoint::whole(from))?;
        let outlets = Outlets { sinks: vec![Box::new(Discard::default())], ..Outlets::default() };
        Ok(Some(held.start(world, outlets, enricher, from, Checkpoint::whole(Lsn(0)))))
    }

    /// A session without a sink, which folds the lookup changes and nothing else.
    pub(super) async fn folding(world: &World, form: Option<WireForm>) -> Result<Option<Self>> {
        let Some(held) = Held::take(world, form).await? else { return Ok(None) };
        let from = held.confirmed(world).await?;
        let enricher = held.lookups(world, Checkpoint::whole(from))?;
        Ok(Some(held.start(world, Outlets::default(), enricher, from, Checkpoint::whole(Lsn(0)))))
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
        // The log is written ahead of the sinks: after a crash the lookup state reaches at least as far as each of them.
        self.walk.enricher.sync()?;
        let checkpoint = self.walk.checkpoint();
        // A sink that is behind another one gets what may turn out to be of another history: not before it has to.
        let proven = self.walk.history.is_proven();
        let wanted = proven && self.walk.take_wanted() && checkpoint.partial.is_none();
        for sink in &mut self.outlets.sinks {
            let behind = !sink.stored().checkpoint().covers(checkpoint);
            if behind && proven && (wanted || (rest && sink.is_empty() && checkpoint.partial.is_none())) {
                sink.flush(checkpoint).await?;
            } else {
                sink.mark(checkpoint, proven).await?;
            }
        }
        Ok(())
    }

    /// Makes everything that has been walked durable, in the lookup state first, and waits for it.
    pub(super) async fn store(&mut self) -> Result<()> {
        self.walk.enricher.sync()?;
        self.outlets.store(self.walk.checkpoint()).await
    }

    /// Acknowledges what every configured sink has, but not before the server has shown that it is of the sinks' history: what is
    /// acknowledged does not come again.
    pub(super) fn acknowledge(&mut self) -> Result<()> {
        if let Some(durable) = self.outlets.durable()
            && self.walk.history.allows(durable.lsn())
            && durable.lsn() > self.stream.acknowledged()
        {
            self.stream.acknowledge(durable);
        }
        Ok(())
    }

    /// Whether the lookup log has grown so long that the session should end where it is. Only where all sinks will have
    /// everything can the next one fold it.
    ///
    /// # Errors
    /// [`crate::error::Error::Fatal`] when the disk refuses.
    pub(super) fn is_outgrown(&self) -> Result<bool> {
        let whole = self.walk.checkpoint().partial.is_none() && self.walk.history.is_proven();
        Ok(whole && self.outlets.left_out.is_empty() && self.walk.enricher.is_outgrown()?)
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
    async fn store(&mut self, checkpoint: Checkpoint) -> Result<()> {
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
