//! x
use crate::cli;
use crate::error::Result;
use crate::world::World;
/// x
pub async fn run(_world: &World, _args: &cli::Bookmark) -> Result<()> {
    Ok(())
}
