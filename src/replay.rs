//! `falaj replay`: a range of the archive to one sink, once more, in the order of the stream, each event with the bytes that
//! it had the first time. Postgres is not needed.
//!
//! What keeps a replay from doubling anything differs from sink to sink, and stands at the head of each one's file.

mod board;
mod copy;
mod dry_run;
mod external;
mod range;
mod stdout;
mod walk;
mod warehouse;

use crate::cli::{self, Target};
use crate::error::{Error, Result};
use crate::world::World;
use walk::Walk;

/// The one table that board and outside system know.
const EVENTS: &str = "engagement_events";

/// Runs the verb.
///
/// # Errors
/// [`Error::Usage`] for flags that do not fit each other; [`Error::Refused`] for a range that the archive does not hold, and
/// for a sink in which something would be doubled; else as the sink.
pub async fn run(world: &World, args: &cli::Replay) -> Result<()> {
    let name = name(args)?;
    let range = range::resolve(world, args).await?;
    let walk = Walk::new(world, range)?;
    if args.dry_run {
        return dry_run::run(walk);
    }
    match args.sink {
        Target::Stdout => stdout::run(walk),
        Target::Kafka => copy::run(walk, name.unwrap_or_default()).await,
        Target::Redis => board::run(walk).await,
        Target::External => external::run(walk).await,
        Target::Bigquery => warehouse::run(world, range, name).await,
    }
}

/// The name that Kafka needs, BigQuery may have, and no other sink has.
fn name(args: &cli::Replay) -> Result<Option<&str>> {
    match (args.sink, args.topic.as_deref()) {
        (Target::Kafka, None | Some("")) => Err(Error::Usage(
            "replay --sink kafka needs --topic: the name of a new topic ({table} may stand in it)".into(),
        )),
        (Target::Redis | Target::External | Target::Stdout, Some(_)) => {
            Err(Error::Usage("replay: --topic goes with --sink kafka or bigquery".into()))
        }
        (_, name) => Ok(name),
    }
}
