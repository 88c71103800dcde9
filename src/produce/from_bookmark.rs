//! `--from-bookmark NAME`: Postgres itself replays, from a bookmark's place on, into a pipeline of another name.
//!
//! The bookmark stays as it is. The pipeline streams from a copy of its slot and of its lookup rows, both named after the two,
//! so that a run which was killed is taken up again, and the bookmark can be replayed into a further pipeline.

use std::sync::Arc;

use tracing::info;

use crate::bookmark::{Bookmark, replay_slot};
use crate::check::postgres::{free_slot, identity};
use crate::config::Config;
use crate::enrich::copy_state;
use crate::error::{Error, Result};
use crate::source::conn::Conninfo;
use crate::source::{pins, slot};
use crate::world::World;

const APPLICATION: &str = "falaj produce";

/// The world of the run: the same, but for its slot and its state.
///
/// # Errors
/// [`Error::Refused`] for a bookmark that is not there or of this very pipeline, and for a pipeline that has rows already.
pub(super) async fn prepare(world: &World, name: &str) -> Result<World> {
    let config = &world.config;
    let bookmark = Bookmark::find(&config.state.dir, name)?;
    if bookmark.pipeline == config.pipeline {
        return Err(Error::refused(
            "bookmark_pipeline",
            format!(
                "bookmark \"{name}\" is one of pipeline \"{}\", whose sinks have these events already",
                config.pipeline
            ),
            "a pipeline of another name, with topics and an archive of its own",
            "FALAJ_PIPELINE=<other> falaj init (its topics), then FALAJ_PIPELINE=<other> FALAJ_ARCHIVE__DIR=<other> \
             falaj produce --from-bookmark (or FALAJ_PRODUCE__SINKS=kafka without an archive)",
        ));
    }
    let conninfo = Conninfo::parse(&config.postgres.url)?;
    let client = world.at_start("postgres", || conninfo.sql(APPLICATION)).await?;
    slot::require(name, slot::read(&client, name).await?, conninfo.dbname())?;
    let copy = replay_slot(name, &config.pipeline);
    let other = moved(config, &bookmark, &copy);
    if slot::read(&client, &copy).await?.is_none() {
        let identity = identity(&conninfo, &copy).await?;
        for (sink, position) in world.at_start("kafka", || super::positions(&other, &identity)).await? {
            if position.is_some() {
                return Err(not_empty(&config.pipeline, sink, &copy));
            }
        }
        free_slot(&client, &copy).await?;
        copy_state(bookmark.dir(), bookmark.lsn, &other.state.dir, &copy)?;
        pins::copy(&client, name, &copy).await?;
        info!(slot = copy, from = %bookmark.lsn, "slot and lookup rows copied from bookmark \"{name}\"");
    }
    Ok(World { config: other, ..world.clone() })
}

fn moved(config: &Config, bookmark: &Bookmark, slot: &str) -> Arc<Config> {
    let mut other = config.clone();
    other.postgres.slot = slot.to_owned();
    other.state.dir = bookmark.dir().join(slot);
    Arc::new(other)
}

fn not_empty(pipeline: &str, sink: &str, slot: &str) -> Error {
    Error::refused(
        "bookmark_pipeline",
        format!("{sink} of pipeline \"{pipeline}\" has a position, and the slot \"{slot}\" that it came from is gone"),
        "a pipeline that has not begun, or the slot that it goes on from",
        "choose another FALAJ_PIPELINE",
    )
}
