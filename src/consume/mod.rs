//! Kafka → Redis board, Kafka → outside HTTP system.
//!
//! Each outlet reads Kafka by itself, in a consumer group of its own: a slow one never delays the other.

pub mod batch; //      what a run of records adds to the board
pub mod board; //      the board as it is read and shown
pub mod event; //      what the board reads of a record
pub mod external; //   Kafka → outside HTTP system
pub mod input; //      the board's side of Kafka
mod inquiry; //        lag and topic, asked beside the reading
pub mod latency; //    commit → applied
pub mod reader; //     Kafka → batches → Redis: the loop
pub mod redis; //      the board's side of Redis

use futures_util::future::join_all;

pub use board::{SharedBoard, board, read_board};

use crate::cli::{Consume, Outlet};
use crate::config::Envelope;
use crate::error::{Error, Result};
use crate::world::World;

/// Feeds the chosen outlets (all without `--sinks`) until the shutdown or, with `--until-end`, until each has
/// applied what was readable at its start.
///
/// # Errors
/// [`Error::Refused`] for events in another form than the flat one; else the first error of an outlet; the others are drained before it is returned.
pub async fn run(world: &World, args: &Consume) -> Result<()> {
    if world.config.kafka.envelope != Envelope::Flat {
        return Err(Error::refused(
            "kafka_envelope",
            format!("kafka.envelope = {:?}", world.config.kafka.envelope),
            "the flat form, which the board and the outside system read",
            "kafka.envelope = \"flat\", or another pipeline of its own slot for the Debezium form",
        ));
    }
    let mut outlets = args.sinks.clone().unwrap_or_else(|| vec![Outlet::Redis, Outlet::External]);
    outlets.sort_by_key(|outlet| *outlet as u8);
    outlets.dedup();
    let world = World { stop: world.stop.child_token(), ..world.clone() };
    let ended = join_all(outlets.into_iter().map(|outlet| {
        let world = &world;
        async move {
            let ended = feed(world, args, outlet).await;
            if ended.is_err() {
                world.stop.cancel();
            }
            ended
        }
    }));
    ended.await.into_iter().collect()
}

async fn feed(world: &World, args: &Consume, outlet: Outlet) -> Result<()> {
    match outlet {
        Outlet::Redis => reader::run(world, args).await,
        Outlet::External => external::run(world, args).await,
    }
}
