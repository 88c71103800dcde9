//! One table's turn: its new files are merged into load jobs, one after the other.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use gcp_bigquery_client::model::table_field_schema::TableFieldSchema;
use tokio::task::spawn_blocking;
use tracing::{error, info, warn};

use super::bigquery::BigQuery;
use super::chain::{self, Chain, Followed, Link};
use super::copy::Part;
use super::files::{self, Load, Source};
use super::media::CHECK;
use super::record::{Record, Records, Through, Turn, now, wait};
use super::{LIST_EVERY, TableFiles, columns, tell};
use crate::archive::{Batch, DataFile};
use crate::error::{Error, Result};
use crate::lsn::{Lsn, Position};
use crate::world::World;

/// Files are merged into one job up to this size.
const JOB_BYTES: u64 = 256 << 20;
/// … and up to this many: each is held open.
const JOB_FILES: usize = 128;

/// What a turn has done.
#[derive(Default)]
pub struct Outcome {
    /// Jobs that have ended well.
    pub jobs: u64,
    /// Rows that they loaded.
    pub rows: u64,
}

impl Outcome {
    pub(super) fn and(self, other: Self) -> Self {
        Self { jobs: self.jobs + other.jobs, rows: self.rows + other.rows }
    }
}

/// One table's turn.
pub struct TableLoad<'a> {
    /// Configuration and shutdown.
    pub world: &'a World,
    /// The service.
    pub service: &'a BigQuery,
    /// The records beside the archive.
    pub records: &'a Records,
    /// Table name, as in the archive.
    pub table: &'a str,
    /// All its sealed files that the stream has brought, oldest first.
    pub files: &'a TableFiles,
    /// All its sealed files that backfills have copied.
    pub history: &'a TableFiles,
    /// Load everything now, rather than a job every `load_every`.
    pub once: bool,
    /// A replay into a table of its own; `None` for the stream's.
    pub copy: Option<Part>,
}

/// The next job's files.
struct Group {
    sources: Vec<Source>,
    /// The last file in it.
    through: Through,
}

impl TableLoad<'_> {
    /// Loads what is new. Without `once`, a job every `load_every` at most, of the stream or of history, and none while another
    /// process has the table.
    ///
    /// # Errors
    /// [`Error::Fatal`] naming the file or the job that failed; [`Error::Refused`] where BigQuery or its table says no.
    pub async fn run(&self, table_id: &str) -> Result<Outcome> {
        let Some(turn) = self.take().await? else { return Ok(Outcome::default()) };
        self.tell_pending(&turn);
        if self.once {
            let stream = self.run_stream(&turn, table_id).await?;
            return Ok(stream.and(self.run_history(&turn, table_id).await?));
        }
        // They share one pace, so the one that was not the last to send goes first; what holds one up does not hold up the other.
        let [stream, history] = [turn.read().map(|r| r.sent_at), turn.read_history().map(|h| h.sent_at())];
        let (first, second) = match history < stream {
            true => (self.run_history(&turn, table_id).await, self.run_stream(&turn, table_id).await),
            false => (self.run_stream(&turn, table_id).await, self.run_history(&turn, table_id).await),
        };
        match (first, second) {
            (Ok(first), second) => second.map(|second| first.and(second)),
            (Err(why), Ok(_)) => Err(why),
            (Err(why), Err(other)) => {
                error!(table = self.table, "{other}");
                Err(why)
            }
        }
    }

    /// Whether the table has to rest: for `own`, or because the other kind of its files was loaded a moment ago. Failed jobs and
    /// those of both kinds count towards the service's 1,500 a day.
    pub(super) fn rests(&self, own: Duration, other_sent_at: Option<u64>) -> bool {
        let since_other = wait(other_sent_at.unwrap_or_default(), self.world.config.bigquery.load_every.0);
        !self.once && !own.max(since_other).is_zero()
    }

    /// Sets the figure of the files that are not loaded, by the records.
    pub(super) fn tell_pending(&self, turn: &Turn) {
        let stream = turn.read().map_or(self.files.len(), |record| self.new_files(&record).count());
        let loaded = turn.read_history().unwrap_or_default();
        let history = self.history.iter().filter(|(batch, file)| !loaded.has(batch, file)).count();
        let pending = metrics::gauge!("falaj_upload_pending_batches", "table" => self.table.to_owned());
        pending.set((stream + history) as f64);
    }

    async fn run_stream(&self, turn: &Turn, table_id: &str) -> Result<Outcome> {
        let found = match self.copy {
            None => self.find_new(turn)?,
            Some(part) => super::copy::begin(self, turn, table_id, part).await?,
        };
        let Some((mut record, known, oldest)) = found else { return Ok(Outcome::default()) };
        let own = record.wait(self.world.config.bigquery.load_every.0);
        if self.rests(own, turn.read_history().map(|history| history.sent_at())) {
            return Ok(Outcome::default());
        }
        // A replay has an owner of its own.
        let chain = Chain { owner: record.owner.clone(), ..self.chain(&oldest, table_id) };
        if !known || record.open {
            self.ensure_table(&chain, turn, &oldest).await?;
            recover(&chain, &mut record).await?;
            turn.write(&record)?;
        }
        self.load(&chain, turn, &mut record).await
    }

    /// The jobs of the stream that a file is of.
    pub(super) fn chain(&self, source: &Source, table_id: &str) -> Chain<'_> {
        Chain {
            world: self.world,
            service: self.service,
            name: format!("{}-{}", source.origin.pipeline, self.table),
            owner: chain::owner(&source.origin, self.table),
            table_id: table_id.to_owned(),
        }
    }

    /// The lock; with `once` the table is waited for, because it is to be loaded when this ends.
    async fn take(&self) -> Result<Option<Turn>> {
        loop {
            match self.records.take(self.table)? {
                None if self.once => self.world.pause(LIST_EVERY).await?,
                turn => return Ok(turn),
            }
        }
    }

    /// The record (`true`: it was there) and the oldest file that is new by it; `None` when none is.
    fn find_new(&self, turn: &Turn) -> Result<Option<(Record, bool, Source)>> {
        if let Some(record) = turn.read() {
            let Some(file) = self.new_files(&record).next() else { return Ok(None) };
            let source = Source::open(&file.1.path)?;
            if record.owner == chain::owner(&source.origin, self.table) {
                return Ok(Some((record, true, source)));
            }
            warn!(table = self.table, "the record is of another stream and does not count");
        }
        let Some(file) = self.files.first() else { return Ok(None) };
        let source = Source::open(&file.1.path)?;
        let owner = chain::owner(&source.origin, self.table);
        Ok(Some((Record::new(self.table, &self.service.target(), &owner), false, source)))
    }

    pub(super) fn new_files(&self, record: &Record) -> impl Iterator<Item = &(Batch, DataFile)> {
        let (through, loaded) = (record.through, record.loaded);
        self.files
            .iter()
            .filter(move |(batch, file)| Some(batch.last) > loaded && Some(self::through(batch, file)) > through)
    }

    async fn group(&self, record: &Record) -> Result<Option<Group>> {
        let place = |(batch, file): &(Batch, DataFile)| (through(batch, file), file.path.clone());
        let files: Vec<_> = self.new_files(record).take(JOB_FILES + 1).map(place).collect();
        spawn_blocking(move || group(&files)).await.map_err(|e| Error::fatal("reading footers", e))?
    }

    async fn load(&self, chain: &Chain<'_>, turn: &Turn, record: &mut Record) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        while let Some(group) = self.group(record).await? {
            let fields = self.ensure_table(chain, turn, &group.sources[0]).await?;
            let key = &group.sources[0].primary_key;
            let names = columns::names_in(key, group.sources[0].schema());
            let key: Vec<_> = key.iter().cloned().zip(names).collect();
            let through = group.through;
            let upto = self.copy.map_or(Lsn(u64::MAX), |part| part.to);
            let load = prepare(group.sources, record.loaded, upto, fields.clone(), turn.scratch()).await?;
            let end = load.as_ref().map(|load| load.last);
            if let Some(load) = load {
                outcome.rows += job(chain, turn, record, &load, &fields).await?;
                outcome.jobs += 1;
                // Only now has the table the columns that this job has brought.
                self.ensure_view(chain, &key, &fields).await?;
            }
            // A job of another process may have ended before the end of this group: then the rest of it is next.
            if record.loaded >= end {
                record.through = Some(through);
                turn.write(record)?;
            }
            self.tell_pending(turn);
            if !self.once && outcome.jobs > 0 {
                break;
            }
        }
        Ok(outcome)
    }
}

fn through(batch: &Batch, file: &DataFile) -> Through {
    Through { bound: batch.last, part: file.part }
}

/// The oldest files that one job can take: of one schema, up to [`JOB_BYTES`] and [`JOB_FILES`]. Blocking.
fn group(files: &[(Through, PathBuf)]) -> Result<Option<Group>> {
    let mut group: Option<Group> = None;
    let mut bytes = 0;
    for (through, path) in files {
        let source = match Source::open(path) {
            Ok(source) => source,
            // What stands before a bad file is loaded all the same; then the bad one is first, and its error is told.
            Err(_) if group.is_some() => break,
            Err(error) => return Err(error),
        };
        bytes += source.bytes;
        match &mut group {
            None => group = Some(Group { sources: vec![source], through: *through }),
            Some(g) if g.sources.len() < JOB_FILES && bytes <= JOB_BYTES && g.sources[0].fits(&source) => {
                g.sources.push(source);
                g.through = *through;
            }
            Some(_) => break,
        }
    }
    Ok(group)
}

/// Finds out what is loaded when the record is lost, or when a job may have been sent whose end nobody has seen.
async fn recover(chain: &Chain<'_>, record: &mut Record) -> Result<()> {
    let highest = chain.world.for_ever(CHECK, || chain.service.highest(&chain.table_id)).await?;
    if highest > record.loaded {
        (record.loaded, record.generation) = (highest, 0);
    }
    loop {
        match chain.look(record.loaded, record.generation).await? {
            Link::Followed(job) => {
                info!(job.id, "had been loaded before");
                (record.loaded, record.generation) = (Some(job.to), 0);
            }
            Link::Free(generation) => {
                (record.generation, record.open) = (generation, false);
                return Ok(());
            }
        }
    }
}

/// Reads and merges files off the runtime's threads.
pub(super) async fn prepare(
    sources: Vec<Source>,
    after: Option<Position>,
    upto: Lsn,
    fields: Vec<TableFieldSchema>,
    scratch: PathBuf,
) -> Result<Option<Load>> {
    let work = move || files::prepare(&sources, after, upto, &fields, &scratch);
    spawn_blocking(work).await.map_err(|e| Error::fatal("merging files", e))?
}

/// One job, with its intent on the disk before it is sent. Gives the number of rows.
async fn job(
    chain: &Chain<'_>,
    turn: &Turn,
    record: &mut Record,
    load: &Load,
    fields: &[TableFieldSchema],
) -> Result<u64> {
    let begun = Instant::now();
    record.open = true;
    record.sent_at = now();
    turn.write(record)?;
    let ended = chain.follow(record.loaded, &mut record.generation, load, fields).await;
    let job = match ended {
        Ok(job) => job,
        Err(error) => {
            turn.write(record)?;
            return Err(error);
        }
    };
    (record.loaded, record.generation, record.open) = (Some(job.to), 0, false);
    turn.write(record)?;
    if job.to == load.last && job.rows.is_some_and(|rows| rows != load.rows) {
        let why = format!("BigQuery counts {:?} rows, the archive has {} in this range", job.rows, load.rows);
        return Err(Error::fatal(format_args!("loading {}: job {}", chain.name, job.id), why));
    }
    told(chain, load, &job, begun);
    let lsn = job.to.commit_lsn.0 as f64;
    metrics::gauge!("falaj_upload_loaded_lsn", "table" => chain.table_id.clone()).set(lsn);
    Ok(job.rows.unwrap_or(load.rows))
}

/// The progress line, and the figures.
pub(super) fn told(chain: &Chain<'_>, load: &Load, job: &Followed, begun: Instant) {
    let (table, seconds) = (&chain.table_id, begun.elapsed().as_secs_f64());
    let rows = job.rows.unwrap_or(load.rows);
    let range = format_args!("{} – {}", load.first, job.to);
    tell(format_args!("{table}  {range}  {rows} rows  {} bytes  {seconds:.1} s  {}", load.bytes, job.id));
    let label = || [("table", table.clone())];
    metrics::counter!("falaj_upload_jobs_total", &label()).increment(1);
    metrics::counter!("falaj_upload_rows_total", &label()).increment(rows);
    metrics::counter!("falaj_upload_bytes_total", &label()).increment(load.bytes);
    metrics::histogram!("falaj_upload_job_seconds", &label()).record(seconds);
}
