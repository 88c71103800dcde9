//! The range to the live board, which is cleared and rebuilt: it then holds the events of the range and no other, however
//! often that is done.
//!
//! The board is claimed as one that was built from the archive, not from a topic. `consume` builds on a board of its topic
//! alone: when it starts, it clears this one and rebuilds it from Kafka. When one runs meanwhile, it takes the board back,
//! and the replay ends as fenced. So nothing is ever counted twice.

use tracing::warn;

use super::EVENTS;
use super::walk::Walk;
use crate::consume::batch::Batch;
use crate::consume::event;
use crate::consume::redis::{Applied, Call, FROM_ARCHIVE, Store};
use crate::error::{Error, Result};
use crate::world::World;

/// A batch is applied at this number of events.
const MAX_EVENTS: u64 = 50_000;

/// Clears the board and applies the range.
///
/// # Errors
/// [`Error::Unreachable`] or [`Error::Refused`] as Redis answers; [`Error::Fenced`] when a `consume` takes the board.
pub(super) async fn run(mut walk: Walk<'_>) -> Result<()> {
    let world = walk.world;
    let store = Store::new(&world.config)?;
    world.at_start("redis", || store.preflight()).await?;
    let mut board =
        Board { world, generation: claim(world, &store).await?, store, applied: None, batch: Batch::default() };
    let mut malformed = 0_u64;
    while let Some(item) = walk.next()? {
        if item.event.layout.table != EVENTS {
            continue;
        }
        match event::parse(item.json) {
            Ok(Some(event)) => board.batch.add(&event),
            Ok(None) => {}
            Err(why) => {
                malformed += 1;
                warn!(at = %item.event.at, why, "not an event that the board can count");
            }
        }
        if board.batch.events() >= MAX_EVENTS {
            board.apply().await?;
        }
    }
    board.apply().await?;
    walk.tally.summary(walk.range, "the board");
    match malformed {
        0 => Ok(()),
        n => Err(Error::Fatal(format!("{n} events could not be counted; see the log"))),
    }
}

/// Begins an empty board, whatever there was.
async fn claim(world: &World, store: &Store) -> Result<String> {
    let before = world.at_start("redis", || store.look()).await?;
    let claim = world.at_start("redis", || store.claim(FROM_ARCHIVE, Some(&before.generation))).await?;
    Ok(claim.generation)
}

struct Board<'a> {
    world: &'a World,
    store: Store,
    generation: String,
    /// Events applied so far: the place in the one "partition" that the archive is.
    applied: Option<i64>,
    batch: Batch,
}

impl Board<'_> {
    async fn apply(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() {
            return Ok(());
        }
        let next = self.applied.unwrap_or(0) + batch.events() as i64;
        let call = Call { generation: &self.generation, partition: 0, from: self.applied, next, batch: &batch };
        match self.world.for_ever("redis", || self.store.apply(&call)).await? {
            Applied::Yes => Ok(self.applied = Some(next)),
            Applied::Elsewhere => Err(Error::Fenced(
                "another process has taken the board over: stop falaj consume (and run) while the board is rebuilt from the archive, \
                 or rebuild one of another name (FALAJ_PIPELINE)"
                    .into(),
            )),
        }
    }
}
