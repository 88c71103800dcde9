//! The range to BigQuery.
use crate::error::Result;
use crate::playback::Range;
use crate::world::World;
pub(super) async fn run(_world: &World, _range: Range, _table: Option<&str>) -> Result<()> {
    Ok(())
}
