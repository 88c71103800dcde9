//! `status` and `/api/v1/status`: where everything stands, by asking the servers themselves. No role needs to run.
//!
//! Each part is asked for by itself and in a bounded time; one that cannot be told says why, and the others are told.

mod kafka;
mod postgres;
pub(crate) mod text;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::archive;
use crate::backfill::{self, Told};
use crate::config::{Config, SinkName};
use crate::error::{Error, Result};
use crate::lsn::{Lsn, SlotIdentity};
use crate::sink::{self, Stored};
use crate::upload::record::{Record, Through};
use crate::world::{World, print};
use crate::{cli, upload};
pub use kafka::{Reader, ReaderAt};
pub use postgres::Slot;

/// How long one part may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The whole; serializes to the shape of `status --json`.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The moment of asking, RFC 3339.
    pub as_of: String,
    /// Name of the pipeline.
    pub pipeline: String,
    /// The replication slot, and how far the server is.
    pub slot: Part<Slot>,
    /// The configured sinks of `produce`.
    pub sinks: Vec<Sink>,
    /// The Parquet archive.
    pub archive: Part<Archive>,
    /// Each table that a backfill was begun of.
    pub backfill: Part<Vec<Told>>,
    /// What feeds the board in Redis; `null` without `redis.url` or without the Kafka sink.
    pub board: Option<Part<Reader>>,
    /// What feeds the outside system; `null` without `external.url` or without the Kafka sink.
    pub external: Option<Part<Reader>>,
    /// What is loaded into BigQuery; `null` without a project.
    pub upload: Option<Part<Vec<Loaded>>>,
}

/// A part of the status, or why it is not known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Part<T> {
    /// Known.
    Is(T),
    /// Not known.
    Unknown {
        /// Why.
        error: String,
    },
}

/// A sink of `produce`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sink {
    /// `kafka` or `archive`.
    pub name: &'static str,
    /// Where it stands.
    #[serde(flatten)]
    pub at: Part<SinkAt>,
}

/// What a sink has durably.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SinkAt {
    /// Everything committed below it is in; `null` when the sink has never stored a position.
    pub position: Option<Lsn>,
    /// Of a transaction that is half in: its last row that is in.
    pub partial: Option<String>,
    /// WAL between the position and the server's end; not all of it need be for this slot.
    pub lag_bytes: Option<u64>,
}

/// The archive, as its listing shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Archive {
    /// The directory.
    pub dir: String,
    /// Sealed batches.
    pub batches: usize,
    /// Directory name of the last one.
    pub last: Option<String>,
}

/// A table in BigQuery.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loaded {
    /// Name, as in the archive.
    pub table: String,
    /// `project.dataset`, with the address where that is not Google's; `null` when nothing was loaded yet.
    pub target: Option<String>,
    /// Position of the last row that is loaded.
    pub loaded: Option<String>,
    /// Sealed files that are not loaded.
    pub pending_files: usize,
}

/// Prints the status once.
///
/// # Errors
/// [`Error::Fatal`] when stdout cannot be written; a server that is away is part of the status.
pub async fn run(world: &World, args: &cli::Json) -> Result<()> {
    let status = tokio::select! {
        status = gather(world) => status,
        () = world.stop.cancelled() => return Ok(()),
    };
    let printed = match args.json {
        true => serde_json::to_string(&status).map_err(|e| Error::fatal("writing the status as JSON", e))? + "\n",
        false => text::text(&status),
    };
    print(&printed)
}

/// Asks every server at once.
pub async fn gather(world: &World) -> Status {
    let config = &world.config;
    let sinks = async {
        let identity = part(postgres::identity(config)).await;
        let mut sinks = Vec::new();
        for name in &config.produce.sinks {
            sinks.push(sink(world, *name, &identity).await);
        }
        sinks
    };
    let (slot, mut sinks, archive, backfill, board, external, upload) = tokio::join!(
        part(postgres::slot(config)),
        sinks,
        part(blocking(config, archive)),
        part(backfill::progress(config)),
        used(config, &config.redis.url, kafka::board(config)),
        used(config, &config.external.url, kafka::external(config)),
        upload(world),
    );
    if let Part::Is(slot) = &slot {
        for sink in &mut sinks {
            if let Part::Is(at) = &mut sink.at {
                at.lag_bytes = at.position.map(|p| slot.server_lsn.0.saturating_sub(p.0));
            }
        }
    }
    let as_of = format!("{:.6}", Timestamp::now());
    Status { as_of, pipeline: config.pipeline.clone(), slot, sinks, archive, backfill, board, external, upload }
}

async fn part<T>(asked: impl Future<Output = Result<T>>) -> Part<T> {
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(value)) => Part::Is(value),
        Ok(Err(error)) => Part::Unknown { error: error.to_string() },
        Err(_) => Part::Unknown { error: format!("no answer within {PATIENCE:?}") },
    }
}

/// An outlet of `consume`. An empty address says that nobody uses it, and nothing feeds it without Kafka.
async fn used<T>(config: &Config, url: &str, asked: impl Future<Output = Result<T>>) -> Option<Part<T>> {
    let is_used = !url.is_empty() && config.produce.sinks.contains(&SinkName::Kafka);
    if is_used { Some(part(asked).await) } else { None }
}

/// Where one sink stands; its position counts for one stream only.
async fn sink(world: &World, name: SinkName, identity: &Part<SlotIdentity>) -> Sink {
    let label = match name {
        SinkName::Kafka => "kafka",
        SinkName::Archive => "archive",
    };
    let identity = match identity {
        Part::Is(identity) => identity,
        Part::Unknown { error } => {
            let error = format!("its position belongs to a Postgres that does not answer: {error}");
            return Sink { name: label, at: Part::Unknown { error } };
        }
    };
    let peek = async {
        let stored = match name {
            SinkName::Kafka => sink::kafka::peek(world.config.clone(), identity, None).await?,
            SinkName::Archive => sink::parquet::peek(&world.config, identity)?,
        };
        let at = stored.map(Stored::checkpoint);
        Ok(SinkAt {
            position: at.map(|c| c.resume),
            partial: at.and_then(|c| c.partial).map(|p| p.to_string()),
            lag_bytes: None,
        })
    };
    Sink { name: label, at: part(peek).await }
}

fn archive(config: &Config) -> Result<Archive> {
    let batches = archive::list(&config.archive.dir)?;
    let last = batches
        .iter()
        .rev()
        .find(|batch| batch.is_streamed())
        .map(|batch| archive::Batch::name(batch.first, batch.last));
    Ok(Archive { dir: config.archive.dir.display().to_string(), batches: batches.len(), last })
}

async fn upload(world: &World) -> Option<Part<Vec<Loaded>>> {
    world.config.bigquery.project.as_deref().filter(|p| !p.is_empty())?;
    Some(part(loaded(world)).await)
}

async fn loaded(world: &World) -> Result<Vec<Loaded>> {
    let mut tables: BTreeMap<String, (Loaded, Option<Record>)> = BTreeMap::new();
    let Some(records) = upload::records(world).await? else { return Ok(Vec::new()) };
    for record in records.all()? {
        let told = Loaded {
            table: record.table.clone(),
            target: Some(record.target.clone()),
            loaded: record.loaded.map(|p| p.to_string()),
            pending_files: 0,
        };
        tables.insert(record.table.clone(), (told, Some(record)));
    }
    for (table, at) in blocking(&world.config, sealed).await? {
        let unknown = || (Loaded { table: table.clone(), target: None, loaded: None, pending_files: 0 }, None);
        let (told, record) = tables.entry(table.clone()).or_insert_with(unknown);
        let done = record.as_ref().is_some_and(|r| Some(at.bound) <= r.loaded || Some(at) <= r.through);
        told.pending_files += usize::from(!done);
    }
    for (table, pending) in upload::pending_history(world, &records).await? {
        let unknown = || (Loaded { table: table.clone(), target: None, loaded: None, pending_files: 0 }, None);
        tables.entry(table.clone()).or_insert_with(unknown).0.pending_files += pending;
    }
    Ok(tables.into_values().map(|(told, _)| told).collect())
}

/// Table and place of every sealed file of the stream.
fn sealed(config: &Config) -> Result<Vec<(String, Through)>> {
    let mut files = Vec::new();
    for batch in archive::list(&config.archive.dir)?.into_iter().filter(archive::Batch::is_streamed) {
        let place = |part| Through { bound: batch.last, part };
        files.extend(batch.files()?.into_iter().map(|file| (file.table, place(file.part))));
    }
    Ok(files)
}

/// Files are read off the runtime's threads.
async fn blocking<T: Send + 'static>(config: &Arc<Config>, op: fn(&Config) -> Result<T>) -> Result<T> {
    let config = config.clone();
    tokio::task::spawn_blocking(move || op(&config)).await.map_err(|e| Error::fatal("reading the archive", e))?
}
