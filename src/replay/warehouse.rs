//! The range to BigQuery.
//!
//! Without a name: into the stream's own tables, by the stream's own jobs. A job's id says which position it follows, so what
//! is loaded is not loaded again, and what is not follows in its order; that is what `upload --once` does.
//! With a name: into new tables, under job ids of their own; a run that was killed is taken up again.

use super::walk::tables;
use crate::cli;
use crate::error::{Error, Result};
use crate::playback::Range;
use crate::upload::{self, copy::Part};
use crate::world::World;

/// Loads the range.
///
/// # Errors
/// [`Error::Usage`] for several tables under one name; [`Error::Refused`] for a table that holds something else; as `upload`.
pub(super) async fn run(world: &World, range: Range, name: Option<&str>) -> Result<()> {
    let Some(name) = name else {
        tracing::info!("into the stream's own tables: what is loaded already is not loaded again");
        return upload::run(world, &cli::Upload { once: true }).await;
    };
    let tables = tables(world, range)?;
    if !name.contains("{table}") && tables.len() > 1 {
        return Err(Error::Usage(format!(
            "replay: the range has rows of {}: a table each is needed, as in --table '{name}_{{table}}'",
            tables.join(", ")
        )));
    }
    refuse_live(name, &tables)?;
    let part = Part { from: range.from, to: range.to };
    let rows = tokio::select! {
        rows = upload::copy::run(world, part, |table| name.replace("{table}", table)) => rows?,
        () = world.stop.cancelled() => return Ok(()),
    };
    Ok(tracing::info!("replayed {} – {} to BigQuery: {rows} rows loaded", range.from, range.to))
}

/// The stream's own tables have these rows, or will get them.
fn refuse_live(name: &str, tables: &[String]) -> Result<()> {
    let own = |table: &&String| {
        let id = |name: &str| upload::columns::table_id(name).ok();
        id(&name.replace("{table}", table)) == id(table)
    };
    match tables.iter().find(own) {
        None => Ok(()),
        Some(table) => Err(Error::refused(
            "bigquery_table",
            format!("{name:?} is the name of the stream's own table {table:?}"),
            "a table of its own: in the stream's the rows would stand twice",
            format!("--table {table}_replay, or no --table: then what is not loaded yet is loaded"),
        )),
    }
}
