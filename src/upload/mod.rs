//! Sealed Parquet batches → BigQuery load jobs, never a row twice.
//!
//! The archive is listed again and again, and each table takes its turns: see [`table`]; the reason why a crash, a lost answer,
//! a second process or a lost record doubles nothing is in [`chain`].

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::Semaphore;
use tracing::{error, info};

use crate::archive::{self, Batch, DataFile};
use crate::cli;
use crate::error::{Error, Result};
use crate::world::World;

pub mod auth;
pub mod bigquery;
pub mod chain;
pub mod columns;
pub mod copy;
mod destination;
pub mod files;
pub mod history;
pub mod media;
pub mod record;
pub mod table;

use bigquery::BigQuery;
use record::Records;
use table::{Outcome, TableLoad};

/// How often the archive is listed while nothing else happens.
const LIST_EVERY: Duration = Duration::from_secs(1);
/// How many tables are loaded at once.
const TABLES_AT_ONCE: usize = 4;
/// Health check of the tables themselves.
const CHECK: &str = "upload";

/// A table's files, oldest first, each with the batch that it is in.
pub type TableFiles = Vec<(Batch, DataFile)>;

/// What is sealed of one table.
#[derive(Clone, Default)]
pub struct Sealed {
    /// What the stream has brought.
    pub stream: TableFiles,
    /// What backfills have copied.
    pub history: TableFiles,
}

/// Loads what is sealed: once, or until the shutdown.
///
/// A table that cannot be loaded (a torn file, a type that does not fit) does not hold up the others; it is tried again
/// later, or with `--once` makes the result an error.
///
/// # Errors
/// [`Error::Refused`] for configuration and rights, [`Error::Unreachable`] when the service does not answer within 30 s of
/// the start; with `--once` also the first table's failure.
pub async fn run(world: &World, args: &cli::Upload) -> Result<()> {
    let Some(project) = world.config.bigquery.project.as_deref().filter(|p| !p.is_empty()) else {
        tell(format_args!("nothing to do: no project"));
        return Ok(());
    };
    tokio::select! {
        biased;
        // Whatever is under way may be left: the next start finds it by its id.
        () = world.stop.cancelled() => Ok(()),
        // The shutdown may also be seen from within, a moment before it is seen here.
        outcome = work(world, args, project) => if world.stop.is_cancelled() { Ok(()) } else { outcome },
    }
}

/// The records of what is loaded, to be read alone; `None` without a project. For `status`.
///
/// # Errors
/// [`Error::Refused`] for unusable credentials.
pub async fn records(world: &World) -> Result<Option<Records>> {
    let Some(project) = world.config.bigquery.project.as_deref().filter(|p| !p.is_empty()) else {
        return Ok(None);
    };
    let target = BigQuery::new(&world.config.bigquery, project).await?.target();
    Ok(Some(Records::look(&world.config.archive.dir, &target)))
}

/// How many files of history are not loaded, by table. For `status`.
///
/// # Errors
/// [`Error::Fatal`] when the archive cannot be read.
pub async fn pending_history(world: &World, records: &Records) -> Result<BTreeMap<String, usize>> {
    let mut pending = BTreeMap::new();
    let dir = world.config.archive.dir.clone();
    let history = tokio::task::spawn_blocking(move || history_files(&dir)).await;
    for (table, files) in history.map_err(|e| Error::fatal("listing the archive", e))?? {
        let loaded = records.history(&table);
        pending.insert(table, files.iter().filter(|(batch, file)| !loaded.has(batch, file)).count());
    }
    Ok(pending)
}

/// What backfills have copied, by table. Of an archive's many batches only these are opened.
fn history_files(dir: &Path) -> Result<BTreeMap<String, TableFiles>> {
    let mut tables: BTreeMap<String, TableFiles> = BTreeMap::new();
    for batch in archive::list(dir)?.into_iter().filter(Batch::is_history) {
        match batch.files() {
            // Retention has removed it since.
            Err(_) if !batch.path.exists() => {}
            files => files?.into_iter().for_each(|file| {
                tables.entry(file.table.clone()).or_default().push((batch.clone(), file));
            }),
        }
    }
    Ok(tables)
}

async fn work(world: &World, args: &cli::Upload, project: &str) -> Result<()> {
    let service = BigQuery::new(&world.config.bigquery, project).await?;
    world.at_start(media::CHECK, || service.ensure_dataset()).await?;
    let records = Records::open(&world.config.archive.dir, &service.target())?;
    let places = Semaphore::new(TABLES_AT_ONCE);
    let work = Work { world, service: &service, records: &records, once: args.once, places: &places };
    match args.once {
        true => work.once().await,
        false => work.go_on().await,
    }
}

/// A line on stdout. A reader that has gone away is no reason to stop loading.
fn tell(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// What the turns of all tables share.
#[derive(Clone, Copy)]
struct Work<'a> {
    world: &'a World,
    service: &'a BigQuery,
    records: &'a Records,
    /// Everything that is sealed is loaded.
    once: bool,
    places: &'a Semaphore,
}

/// A table, and how its turn has ended.
type Ended = (String, Result<Outcome>);

impl<'a> Work<'a> {
    /// Each table's one turn.
    async fn once(self) -> Result<()> {
        let (mut all, mut failed) = (Outcome::default(), None);
        let mut turns: FuturesUnordered<_> = self.turns(&self.sealed()?, |_| true).into_values().collect();
        while let Some((table, outcome)) = turns.next().await {
            match outcome {
                Ok(outcome) => all = all.and(outcome),
                Err(failure) => {
                    self.tell_failure(&table, &failure);
                    failed.get_or_insert(failure);
                }
            }
        }
        tell(format_args!("{}: {} load jobs, {} rows", self.service.target(), all.jobs, all.rows));
        failed.map_or(Ok(()), Err)
    }

    /// Turn after turn of each table, without waiting for those of the others: a job that does not end holds up its own table.
    async fn go_on(self) -> Result<()> {
        let every = self.world.config.bigquery.load_every;
        info!(target = self.service.target(), %every, "loading sealed batches");
        let (mut busy, mut turns) = (BTreeSet::new(), FuturesUnordered::new());
        // Tables whose last turn has failed, with the time of the next one.
        let mut resting: BTreeMap<String, Instant> = BTreeMap::new();
        loop {
            let tables = self.sealed()?;
            resting.retain(|table, _| tables.contains_key(table));
            let is_due =
                |table: &str| !busy.contains(table) && resting.get(table).is_none_or(|until| *until <= Instant::now());
            for (table, turn) in self.turns(&tables, is_due) {
                busy.insert(table);
                turns.push(turn);
            }
            let mut pause = pin!(self.world.pause(LIST_EVERY));
            loop {
                let (table, outcome) = tokio::select! {
                    Some(ended) = turns.next() => ended,
                    passed = &mut pause => break passed?,
                };
                busy.remove(&table);
                match outcome {
                    Ok(_) => _ = resting.remove(&table),
                    Err(failure) => {
                        self.tell_failure(&table, &failure);
                        resting.insert(table, Instant::now() + every.0);
                    }
                }
            }
            if resting.is_empty() {
                self.world.health.ok(CHECK);
            }
        }
    }

    fn sealed(self) -> Result<BTreeMap<String, Sealed>> {
        sealed(&self.world.config.archive.dir)
    }

    fn tell_failure(self, table: &str, failure: &Error) {
        error!(table, "{failure}");
        metrics::counter!("falaj_upload_table_failures_total", "table" => table.to_owned()).increment(1);
        self.world.health.failing(CHECK, failure);
    }

    /// The turns of those tables that are due.
    fn turns(
        self,
        tables: &BTreeMap<String, Sealed>,
        is_due: impl Fn(&str) -> bool,
    ) -> BTreeMap<String, BoxFuture<'a, Ended>> {
        let ids = table_ids(tables.keys());
        let due = tables.iter().filter(|(table, _)| is_due(table));
        due.map(|(table, sealed)| {
            let turn = self.turn(table.clone(), sealed.clone(), ids[table].clone());
            (table.clone(), turn.boxed())
        })
        .collect()
    }

    async fn turn(self, table: String, sealed: Sealed, id: Result<String, String>) -> Ended {
        let Self { world, service, records, once, places } = self;
        let Sealed { stream: files, history } = &sealed;
        let load = TableLoad { world, service, records, table: &table, files, history, once, copy: None };
        let run = async {
            let id =
                id.map_err(|why| Error::refused("bigquery_table", why, "a name of its own in BigQuery", RENAME))?;
            let _place = places.acquire().await.map_err(|e| Error::fatal("waiting for a turn", e))?;
            load.run(&id).await
        };
        let outcome = run.await;
        (table, outcome)
    }
}

const RENAME: &str = "rename the table in Postgres, or leave it out of the publication";

/// The sealed files by table, oldest first.
///
/// A listing that runs while batches are sealed may miss one and show a later one. What a first listing shows was sealed
/// after all that is older, so a second one is whole up to there.
fn sealed(dir: &Path) -> Result<BTreeMap<String, Sealed>> {
    'list: loop {
        let newest = archive::list(dir)?.into_iter().rev().find(Batch::is_streamed).map(|batch| batch.last);
        let mut tables: BTreeMap<String, Sealed> = BTreeMap::new();
        for batch in archive::list(dir)? {
            let is_history = batch.is_history();
            if !is_history && Some(batch.last) > newest {
                continue;
            }
            let files = match batch.files() {
                // Retention has removed it since: the next listing does not show it.
                Err(_) if !batch.path.exists() => continue 'list,
                files => files?,
            };
            for file in files {
                let Sealed { stream, history } = tables.entry(file.table.clone()).or_default();
                let files = if is_history { history } else { stream };
                files.push((batch.clone(), file));
            }
        }
        return Ok(tables);
    }
}

/// Names in BigQuery; an error where two tables, or a table and another one's view, would share one.
fn table_ids<'a>(tables: impl Iterator<Item = &'a String>) -> BTreeMap<String, Result<String, String>> {
    let ids: BTreeMap<String, Result<String, String>> =
        tables.map(|t| (t.clone(), columns::table_id(t).map_err(|why| format!("table {t:?}: {why}")))).collect();
    let clash = |table: &str, id: &str| {
        let taken = |other: &str| other == id || columns::view_id(other) == id || other == columns::view_id(id);
        let other = ids.iter().find(|(name, other)| *name != table && other.as_deref().is_ok_and(taken));
        other.map(|(name, _)| {
            format!("tables {table:?} and {name:?} would share a name in BigQuery, {id:?} or its view")
        })
    };
    let apart = |(table, id): (&String, &Result<String, String>)| match id {
        Ok(id) => (table.clone(), clash(table, id).map_or(Ok(id.clone()), Err)),
        Err(why) => (table.clone(), Err(why.clone())),
    };
    ids.iter().map(apart).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_would_share_a_name_are_refused_and_others_go_on() {
        let tables = ["a.b", "a_b", "c", "d", "d_latest"].map(String::from);
        let ids = table_ids(tables.iter());
        assert_eq!(ids["c"], Ok("c".into()));
        for table in ["a.b", "a_b", "d", "d_latest"] {
            assert!(ids[table].is_err(), "{table}");
        }
    }
}
