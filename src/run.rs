//! `run`: produce, consume and upload in one process.

use tokio::task::JoinSet;
use tracing::{error, info};

use crate::cli;
use crate::error::{Error, Result};
use crate::world::World;
use crate::{consume, produce, upload};

/// Runs every role until the shutdown. Where one fails for good, the others are drained.
///
/// # Errors
/// That of the role that failed first.
pub async fn run(world: &World) -> Result<()> {
    let world = World { stop: world.stop.child_token(), ..world.clone() };
    let mut roles = JoinSet::new();
    let w = world.clone();
    roles.spawn(async move { ("produce", produce::run(&w, &cli::Produce::default()).await) });
    let args = cli::Consume::default();
    if !consume::outlets(&world.config, &args).is_empty() {
        let w = world.clone();
        roles.spawn(async move { ("consume", consume::run(&w, &args).await) });
    }
    // Without a project it says so and ends; that is no reason for the others to end.
    let w = world.clone();
    roles.spawn(async move { ("upload", upload::run(&w, &cli::Upload::default()).await) });
    let mut first = Ok(());
    while let Some(ended) = roles.join_next().await {
        let (role, outcome) = ended.unwrap_or_else(|panic| ("a role", Err(Error::fatal("running the roles", panic))));
        match outcome {
            Ok(()) => info!(role, "ended"),
            Err(failure) => {
                error!(role, "{failure}");
                world.stop.cancel();
                first = first.and(Err(failure));
            }
        }
    }
    first
}
