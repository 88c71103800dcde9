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
mod malformed; //      records that are no events
mod part; //           a partition of the board's topic while it is read
pub mod reader; //     Kafka → batches → Redis: the loop
pub mod redis; //      the board's side of Redis

use futures_util::future::join_all;

pub use board::{SharedBoard, board, read_board};

use crate::cli::{Consume, Outlet};
use crate::config::{Config, Envelope};
use crate::error::{Error, Result};
use crate::world::World;

/// Feeds the [`outlets`] until the shutdown or, with `--until-end`, until each has applied what was readable at its start.
///
/// # Errors
/// [`Error::Refused`] for events in another form than the flat one, and where there is no outlet; else the first error of an
/// outlet; the others are drained before it is returned.
pub async fn run(world: &World, args: &Consume) -> Result<()> {
    if world.config.kafka.envelope != Envelope::Flat {
        return Err(Error::refused(
            "kafka_envelope",
            format!("kafka.envelope = {:?}", world.config.kafka.envelope),
            "the flat form, which the board and the outside system read",
            "kafka.envelope = \"flat\", or another pipeline of its own slot for the Debezium form",
        ));
    }
    let outlets = outlets(&world.config, args);
    if outlets.is_empty() {
        return Err(Error::refused(
            "consume_outlets",
            "redis.url and external.url are empty",
            "the address of the board's Redis, of the outside system, or of both",
            "set redis.url or external.url, or leave consume out",
        ));
    }
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

/// The outlets that `--sinks` names, each once; without it those that have an address: an empty one says that nobody uses it.
pub fn outlets(config: &Config, args: &Consume) -> Vec<Outlet> {
    let is_fed = |outlet: &Outlet| match (&args.sinks, outlet) {
        (Some(chosen), _) => chosen.contains(outlet),
        (None, Outlet::Redis) => !config.redis.url.is_empty(),
        (None, Outlet::External) => !config.external.url.is_empty(),
    };
    [Outlet::Redis, Outlet::External].into_iter().filter(is_fed).collect()
}

async fn feed(world: &World, args: &Consume, outlet: Outlet) -> Result<()> {
    match outlet {
        Outlet::Redis => reader::run(world, args).await,
        Outlet::External => external::run(world, args).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outlet_without_an_address_is_left_out_unless_it_is_named() {
        let fed = |redis: &str, external: &str, sinks: Option<Vec<Outlet>>| {
            let mut config = Config::defaults().unwrap();
            (config.redis.url, config.external.url) = (redis.to_owned(), external.to_owned());
            outlets(&config, &Consume { sinks, until_end: false })
        };
        let (redis, external) = (Outlet::Redis, Outlet::External);
        assert_eq!(fed("redis://h", "http://h", None), [redis, external]);
        assert_eq!(fed("redis://h", "", None), [redis]);
        assert_eq!(fed("", "http://h", None), [external]);
        assert!(fed("", "", None).is_empty());
        assert_eq!(fed("redis://h", "", Some(vec![external, redis, external])), [redis, external]);
    }
}
