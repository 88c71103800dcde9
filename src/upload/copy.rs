//! A replay into tables of its own, a part of the archive each.
//!
//! The chain of its jobs is as the stream's, but belongs to the one table that was made for it: the owner, which stands in
//! the table's label and in each job's id, is made anew with the table.

use std::time::SystemTime;

use super::bigquery::{Answer, BigQuery};
use super::destination::label;
use super::files::Source;
use super::history::History;
use super::media::CHECK;
use super::record::{Record, Records, Turn, hash};
use super::table::TableLoad;
use super::{RENAME, Sealed, chain, columns, sealed};
use crate::error::{Error, Result};
use crate::lsn::{Lsn, Position};
use crate::world::World;

/// Commit LSNs that a replay loads, both inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The first.
    pub from: Lsn,
    /// The last.
    pub to: Lsn,
}

impl Part {
    /// What its first job follows: a position before all of it.
    pub fn before(self) -> Option<Position> {
        Some(Position { commit_lsn: Lsn(self.from.0.saturating_sub(1)), ordinal: u64::MAX })
    }
}

/// A replay into tables of its own: `name` gives a table's name in BigQuery. Gives the number of rows loaded.
///
/// # Errors
/// As [`super::run`]; [`Error::Refused`] for a table that holds something else.
pub async fn run(world: &World, part: Part, name: impl Fn(&str) -> String) -> Result<u64> {
    let Some(project) = world.config.bigquery.project.as_deref().filter(|p| !p.is_empty()) else {
        return Err(Error::refused(
            "bigquery_project",
            "bigquery.project is not set",
            "the project to load into",
            "set bigquery.project (FALAJ_BIGQUERY__PROJECT)",
        ));
    };
    let service = BigQuery::new(&world.config.bigquery, project).await?;
    world.at_start(CHECK, || service.ensure_dataset()).await?;
    let mut rows = 0;
    for (table, Sealed { stream: mut files, mut history }) in sealed(&world.config.archive.dir)? {
        files.retain(|(b, _)| b.first.commit_lsn <= part.to && b.last.commit_lsn >= part.from);
        // All rows of such a batch have one commit LSN, so it is within the part as a whole.
        history.retain(|(b, _)| (part.from..=part.to).contains(&b.first.commit_lsn));
        if files.is_empty() && history.is_empty() {
            continue;
        }
        let name = name(&table);
        let id = columns::table_id(&name).map_err(|why| {
            Error::refused("bigquery_table", format!("table {name:?}: {why}"), "a name for BigQuery", RENAME)
        })?;
        let target = format!("{} {id} from {}", service.target(), part.from);
        let records = Records::open(&world.config.archive.dir, &target)?;
        let load = TableLoad {
            world,
            service: &service,
            records: &records,
            table: &table,
            files: &files,
            history: &history,
            once: true,
            copy: Some(part),
        };
        rows += load.run(&id).await?.rows;
    }
    Ok(rows)
}

/// A replay's record, and the oldest file that is new by it. The table has to be new, or that of the record: each time that
/// one is made, its jobs get ids of their own, so that those of a table that was dropped are no hindrance.
pub(super) async fn begin(
    load: &TableLoad<'_>,
    turn: &Turn,
    table_id: &str,
    part: Part,
) -> Result<Option<(Record, bool, Source)>> {
    let there = match load.world.for_ever(CHECK, || load.service.table(table_id)).await? {
        Answer::Is(table) => Some(table),
        Answer::Absent | Answer::Exists => None,
    };
    let record = match (turn.read(), there) {
        (Some(record), Some(table)) if label(&table) == Some(&chain::short_owner(&record.owner)) => record,
        (_, Some(_)) => return Err(not_new(table_id, part)),
        (_, None) => {
            let Some(file) = load.files.first().or(load.history.first()) else { return Ok(None) };
            let origin = chain::owner(&Source::open(&file.1.path)?.origin, load.table);
            let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let owner = hash(&format!("{origin} {table_id} {} {}", part.from, since.as_nanos()));
            let record = Record { loaded: part.before(), ..Record::new(load.table, &load.service.target(), &owner) };
            turn.write_history(&History::default())?;
            turn.write(&record)?;
            record
        }
    };
    let Some(file) = load.new_files(&record).next() else { return Ok(None) };
    let source = Source::open(&file.1.path)?;
    Ok(Some((record, true, source)))
}

fn not_new(table_id: &str, part: Part) -> Error {
    Error::refused(
        "bigquery_table",
        format!("table {table_id} exists, and does not hold the beginning of a replay from {}", part.from),
        "a new table, or that of the same replay: anything else would be doubled or mixed",
        "another --table",
    )
}
