//! `falaj init`: publication, topics, slot, and the first lookup rows from the slot's own snapshot.
//!
//! It prints its plan first, changes nothing that exists, and is the only verb that creates a slot.

pub mod base;
pub mod origin;
mod plan;
mod step;

use std::io::IsTerminal;

use crate::cli;
use crate::error::{Error, Result};
use crate::world::{World, print};
use plan::Plan;

/// Runs the verb.
///
/// # Errors
/// [`Error::Unreachable`] when Postgres or Kafka does not answer within 30 s; [`Error::Refused`] for whatever is missing,
/// with nothing changed when that shows while planning.
pub async fn run(world: &World, args: &cli::Init) -> Result<()> {
    let plan = Plan::make(world, args).await?;
    print(&plan.to_string())?;
    if plan.is_empty() {
        return print("everything is there: nothing to do\n");
    }
    if !args.yes && !confirmed(world).await? {
        return print("nothing was changed; falaj init --yes carries it out\n");
    }
    plan.carry_out(world).await?;
    if world.stop.is_cancelled() { Ok(()) } else { print("done\n") }
}

/// Asks on a terminal; without one, or when a signal comes instead of an answer, it is no.
async fn confirmed(world: &World) -> Result<bool> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        return Ok(false);
    }
    print("carry it out? [y/N] ")?;
    let ask = || {
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).map(|_| matches!(answer.trim(), "y" | "Y" | "yes"))
    };
    tokio::select! {
        asked = tokio::task::spawn_blocking(ask) => {
            asked.map_err(|e| Error::fatal("asking", e))?.map_err(|e| Error::fatal("asking", e))
        }
        () = world.stop.cancelled() => Ok(false),
    }
}
