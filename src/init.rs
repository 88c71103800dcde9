//! `falaj init`: publication, topics, slot, and the first lookup rows from the slot's own snapshot.
//!
//! It prints its plan first, changes nothing that exists, and is the only verb that creates a slot.

pub mod base;
mod plan;

use std::io::{IsTerminal, Write};

use crate::cli;
use crate::error::{Error, Result};
use crate::world::World;
use plan::Plan;

/// Runs the verb.
///
/// # Errors
/// [`Error::Unreachable`] when Postgres or Kafka does not answer within 30 s; [`Error::Refused`] for whatever is missing,
/// with nothing changed when that shows while planning.
pub async fn run(world: &World, args: &cli::Init) -> Result<()> {
    let plan = Plan::make(world, args).await?;
    print!("{plan}");
    if plan.is_empty() {
        println!("everything is there: nothing to do");
        return Ok(());
    }
    if !args.yes && !confirmed().await? {
        println!("nothing was changed; falaj init --yes carries it out");
        return Ok(());
    }
    plan.carry_out(world).await?;
    println!("done");
    Ok(())
}

/// Asks on a terminal; without one the answer is no.
async fn confirmed() -> Result<bool> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        return Ok(false);
    }
    let ask = || {
        print!("carry it out? [y/N] ");
        std::io::stdout().flush()?;
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        Ok::<_, std::io::Error>(matches!(answer.trim(), "y" | "Y" | "yes"))
    };
    let answer = tokio::task::spawn_blocking(ask).await.map_err(|e| Error::fatal("asking", e))?;
    answer.map_err(|e| Error::fatal("asking", e))
}
