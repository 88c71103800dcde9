//! `backfill` and `init --snapshot`: a consistent copy of what was there before the stream, beside the stream.
//!
//! One snapshot that belongs to an LSN; lanes that copy ranges of the table in it, each with sinks of its own; the sinks keep
//! how far they are, atomically with the rows. A copied row is an event `r` whose position lies directly below the
//! snapshot's LSN: above all that the snapshot has seen, below all that it has not. So the events of a table, in the order
//! of their ids, give its state, whatever was written meanwhile. The stream itself is left as it is.
//!
//! As in `produce`, whatever can pass ends the session, and the next one goes on from what is stored, under a new snapshot.

mod lane;
mod outlet;
mod pace;
mod plan;
mod reader;
mod row;
mod source;
mod statement;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde::Serialize;
use tracing::{info, warn};

use crate::cli;
use crate::config::Config;
use crate::enrich::Moment;
use crate::error::{Error, Result};
use crate::source::catalog::Table;
use crate::source::conn::Conninfo;
use crate::source::slot;
use crate::source::snapshot::Files;
use crate::world::{START_PATIENCE, World, backoff, print};
use lane::{Copied, Lane, Shared};
pub(crate) use outlet::has_history;
use outlet::{Fenced, Outlet};
use pace::{Pace, Progress};
use plan::{Mark, Plan};
pub(crate) use source::Source;
use source::find;
use statement::Columns;

const APPLICATION: &str = "falaj backfill";
/// Lanes where nothing else is said.
pub const JOBS: u16 = 2;

/// A table to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Name outside.
    pub table: String,
    /// Which rows; absent: all.
    pub filter: Option<String>,
}

/// How fast.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Speed {
    /// Lanes.
    pub jobs: u16,
    /// Rows a second.
    pub rate: Option<u64>,
}

/// Runs the verb, until all is copied or the shutdown comes.
///
/// # Errors
/// [`Error::Refused`] before anything is written; [`Error::Fenced`] when another backfill has taken over;
/// [`Error::Unreachable`] when a server cannot be reached at the start.
pub async fn run(world: &World, args: &cli::Backfill) -> Result<()> {
    let wanted = [Wanted { table: args.table.clone(), filter: args.filter.clone() }];
    copy(world, &wanted, Speed { jobs: args.jobs, rate: args.rate }, None).await
}

/// Copies tables. `first` is a snapshot that is there already.
pub(crate) async fn copy(world: &World, wanted: &[Wanted], speed: Speed, first: Option<Source>) -> Result<()> {
    let (started, mut delays, mut has_run, mut first) = (Instant::now(), backoff(), false, first);
    loop {
        let outcome = match first.take() {
            Some(source) => session(world, wanted, speed, source, &mut has_run).await,
            None => match Source::take(world, wanted).await {
                Ok(source) => session(world, wanted, speed, source, &mut has_run).await,
                Err(error) => Err(error),
            },
        };
        let error = match outcome {
            Ok(told) => return print(&told),
            Err(_) if world.stop.is_cancelled() => return print(&stopped(0)),
            Err(error) => error,
        };
        if !error.is_transient() || (!has_run && started.elapsed() > START_PATIENCE) {
            return Err(error);
        }
        let delay = delays.next().unwrap_or(Duration::from_secs(5));
        warn!(%error, ?delay, "going on from what is stored");
        if world.pause(delay).await.is_err() {
            return print(&stopped(0));
        }
    }
}

/// How far the copy of a table is; serializes to a part of `status --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Told {
    /// Name outside.
    pub table: String,
    /// All of it is in every sink.
    pub finished: bool,
    /// Rows that every sink has.
    pub rows: u64,
    /// Rows when it began, as the planner estimated them.
    pub estimated_rows: u64,
    /// Ranges that every sink has whole.
    pub ranges_done: usize,
    /// Ranges that the table was cut into.
    pub ranges: usize,
}

/// How far each copy is, whether one runs or not, by what the sinks hold.
///
/// # Errors
/// [`Error::Refused`] for a plan or a note that cannot be read; [`Error::Unreachable`] without a broker.
pub async fn progress(config: &Arc<Config>) -> Result<Vec<Told>> {
    let plans = Plan::all(&config.state.dir)?;
    let marks = if plans.is_empty() { Vec::new() } else { outlet::marks(config, None).await? };
    let told = |plan: Plan| {
        let (rows, ranges_done) = plan.stored_in_all(&marks);
        let (estimated_rows, ranges) = (plan.rows, plan.ranges.len());
        // A range without a row leaves nothing in an archive that could say so.
        let ranges_done = if plan.finished { ranges } else { ranges_done };
        Told { table: plan.table, finished: plan.finished, rows, estimated_rows, ranges_done, ranges }
    };
    Ok(plans.into_iter().map(told).collect())
}

/// Removes the plans of all copies: they belong to a slot that is gone.
///
/// # Errors
/// [`Error::Fatal`] when the disk refuses.
pub(crate) fn forget(state: &Path) -> Result<()> {
    let dir = Plan::dir(state);
    match std::fs::remove_dir_all(&dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(|e| Error::fatal(format_args!("removing {}", dir.display()), e)),
    }
}

/// Names of the published tables that have an unfinished plan, and of those that have none at all.
pub(crate) fn unfinished(world: &World, tables: &[String]) -> Result<(Vec<String>, Vec<String>)> {
    let (mut unfinished, mut unknown) = (Vec::new(), Vec::new());
    for table in tables {
        match Plan::read(&world.config.state.dir, table)? {
            Some(plan) if plan.finished => {}
            Some(_) => unfinished.push(table.clone()),
            None => unknown.push(table.clone()),
        }
    }
    Ok((unfinished, unknown))
}

/// A session for a snapshot that is made next, and the files of the tables that are to be read in it.
///
/// # Errors
/// [`Error::Refused`] for a table that is not published or cannot be read.
pub(crate) async fn begin(
    world: &World,
    conninfo: &Conninfo,
    wanted: &[Wanted],
) -> Result<(tokio_postgres::Client, Files)> {
    let client = conninfo.sql(APPLICATION).await?;
    let files = source::begin(world, &client, wanted).await?;
    Ok((client, files))
}

/// Stores the plans of tables that are to be copied from a new slot's snapshot: from now on it is known that they are not
/// there yet.
///
/// # Errors
/// [`Error::Unreachable`]; [`Error::Fatal`] when the disk refuses.
pub(crate) async fn prepare(world: &World, source: &Source, wanted: &[Wanted], jobs: u16) -> Result<()> {
    let config = &world.config;
    for (wanted, found) in wanted.iter().zip(find(config, &source.client, wanted).await?) {
        source.new_plan(config, wanted, &found, jobs.into()).await?.write(&config.state.dir)?;
    }
    Ok(())
}

/// From a snapshot to its end. Gives what is to be told.
async fn session(world: &World, wanted: &[Wanted], speed: Speed, source: Source, has_run: &mut bool) -> Result<String> {
    let config = &world.config;
    let state = slot::read(&source.client, &config.postgres.slot).await?;
    slot::require(&config.postgres.slot, state, source.conninfo.dbname())?;
    let jobs = usize::from(speed.jobs);
    let names: Vec<String> = wanted.iter().map(|w| w.table.clone()).collect();
    let mut fenced = Fenced::take(config, &source.identity, jobs.max(Plan::lanes(&config.state.dir)?), &names).await?;
    let marks = outlet::marks(config, Some(&world.stop)).await?;
    let moment = source.lookups(config).await?;
    let tables = describe(config, &source, wanted, &moment, jobs).await?;
    let items: VecDeque<_> = tables.iter().enumerate().flat_map(|(n, table)| table.plan.left(n, &marks)).collect();
    let lanes = jobs.min(items.len()).max(1);
    let layouts: Vec<_> = tables.iter().map(|t| Arc::clone(&t.layout)).collect();
    let outlets = fenced.open(config, &source.identity, &layouts, lanes).await?;
    let sum = |rows: fn(&Plan, &[Vec<Mark>]) -> u64| tables.iter().map(|t| rows(&t.plan, &marks)).sum();
    let progress = Progress::new(sum(|plan, marks| plan.stored(marks)), sum(|plan, _| plan.rows));
    info!(lsn = %source.lsn, ranges = items.len(), lanes, "copying");
    *has_run = true;
    let shared = Arc::new(Shared {
        tables,
        moment,
        lsn: source.lsn,
        commit_ts: source.moment().await?,
        items: Mutex::new(items),
        blocks: AtomicU64::new(0),
        pace: Pace::new(speed.rate),
        progress,
        halt: world.stop.child_token(),
    });
    let outcome = run_lanes(&shared, source, outlets).await;
    shared.progress.end();
    outcome?;
    finish(world, &shared)
}

/// The tables as the snapshot has them, each with its plan, which is stored before anything is copied.
async fn describe(
    config: &Config,
    source: &Source,
    wanted: &[Wanted],
    moment: &Moment,
    jobs: usize,
) -> Result<Vec<Copied>> {
    let mut tables = Vec::new();
    for (index, found) in find(config, &source.client, wanted).await?.into_iter().enumerate() {
        let plan = source.plan(config, &wanted[index], &found, jobs).await?;
        plan.write(&config.state.dir)?;
        let Table { relation, row_filter, .. } = found;
        let columns = Columns::new(&relation, &plan.order);
        let conditions = statement::conditions(row_filter.as_deref(), plan.filter.as_deref());
        let primary_key = slot::primary_key(&source.client, &relation).await?;
        let configured = config.tables.iter().find(|t| t.name == plan.table);
        let layout = Arc::new(moment.layout(index as u32, relation, primary_key, configured)?);
        tables.push(Copied { plan, layout, columns, conditions, rows: AtomicU64::new(0) });
    }
    Ok(tables)
}

/// Runs the lanes to their end. The sessions of a copy that was broken off are ended: else they would send all of it.
async fn run_lanes(shared: &Arc<Shared>, mut source: Source, outlets: Vec<Vec<Outlet>>) -> Result<()> {
    let (mut clients, mut pids) = (Vec::new(), vec![source::pid(&source.client).await?]);
    source.hold_alone().await?;
    for _ in 1..outlets.len() {
        let (client, pid) = source.another().await?;
        clients.push(client);
        pids.push(pid);
    }
    let Source { conninfo, client, .. } = source;
    clients.insert(0, client);
    let lanes = clients.into_iter().zip(outlets).map(|(client, outlets)| {
        let lane = Lane { client, outlets, shared: Arc::clone(shared) };
        tokio::spawn(lane.run())
    });
    let ended = tokio::select! {
        ended = join_all(lanes.collect::<Vec<_>>()) => ended,
        never = shared.progress.tell() => match never {},
    };
    let outcome: Result<Vec<_>> =
        ended.into_iter().map(|lane| lane.map_err(|e| Error::fatal("a lane", e)).and_then(|outcome| outcome)).collect();
    if shared.halt.is_cancelled()
        && let Ok(client) = conninfo.sql(APPLICATION).await
    {
        let _ = client.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", &[&pids]).await;
    }
    outcome.map(drop)
}

/// Notes what is whole, and says what was done.
fn finish(world: &World, shared: &Shared) -> Result<String> {
    let config = &world.config;
    if shared.halt.is_cancelled() {
        return Ok(stopped(shared.progress.rows.load(Relaxed)));
    }
    let mut told = String::new();
    let seconds = shared.progress.seconds();
    for Copied { plan, rows, .. } in &shared.tables {
        Plan { finished: true, ..plan.clone() }.write(&config.state.dir)?;
        let rows = rows.load(Relaxed);
        let (table, ranges, lsn) = (&plan.table, plan.ranges.len(), shared.lsn);
        let sinks: Vec<_> = config.produce.sinks.iter().map(|sink| format!("{sink:?}").to_lowercase()).collect();
        told += &format!(
            "{table}: {rows} rows in {ranges} ranges as of {lsn}, {seconds:.1} s, {:.0} rows/s → {}\n",
            rows as f64 / seconds.max(0.001),
            sinks.join(", ")
        );
    }
    Ok(told)
}

fn stopped(rows: u64) -> String {
    format!("stopped after {rows} rows; the same command goes on from there\n")
}
