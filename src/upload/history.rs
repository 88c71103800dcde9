//! Files of backfills: each is a load job of its own, whose id is made of the file's own name.
//!
//! They follow no position, so they are no part of the [`chain`](super::chain). A file is loaded when its job has ended well.
//! Where nobody has seen that end, or the record of it is lost, the rows tell, for a job loads all of a file or nothing; and
//! where they are not there, a job that still runs is found under its id. The service forgets jobs, so that an absent one alone
//! tells nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tracing::info;

use super::chain::Link;
use super::columns;
use super::files::Source;
use super::media::CHECK;
use super::record::{Turn, now, wait, wait_after};
use super::table::{Outcome, TableLoad, prepare, told};
use crate::archive::{Batch, DataFile};
use crate::error::{Error, Result};
use crate::lsn::Lsn;

/// Which files of a table's history are loaded.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct History {
    /// Batch and file.
    loaded: BTreeSet<String>,
    /// Files that may be loaded too: one whose job was sent and whose end is not known, or all that were there when the record
    /// was lost.
    #[serde(default)]
    unsure: BTreeSet<String>,
    /// Files whose jobs have failed, each with the first generation that is not known to have.
    #[serde(default)]
    failed: BTreeMap<String, u32>,
    /// When the last job was sent, in seconds since 1970.
    sent_at: u64,
}

impl History {
    /// Whether a file is loaded.
    pub fn has(&self, batch: &Batch, file: &DataFile) -> bool {
        self.loaded.contains(&name(batch, file))
    }

    /// How long a file's next job has to wait, by the rule of [`Record::wait`](super::record::Record::wait).
    fn wait(&self, file: &str, every: Duration) -> Duration {
        wait_after(self.sent_at, every, self.generation(file))
    }

    fn generation(&self, file: &str) -> u32 {
        self.failed.get(file).copied().unwrap_or_default()
    }

    /// When the last job was sent, in seconds since 1970.
    pub(super) fn sent_at(&self) -> u64 {
        self.sent_at
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.loaded.is_empty()
    }
}

/// A file's name within the archive.
pub(super) fn name(batch: &Batch, file: &DataFile) -> String {
    let file = file.path.file_name().unwrap_or_default().to_string_lossy();
    format!("{}/{file}", Batch::name(batch.first, batch.last))
}

impl TableLoad<'_> {
    /// Loads the history that is new. Without `once`, at most one job, and none while it is too soon after the table's last one. A
    /// file that cannot be loaded does not hold up those behind it.
    pub(super) async fn run_history(&self, turn: &Turn, table_id: &str) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        if self.history.is_empty() {
            return Ok(outcome);
        }
        let all = || self.history.iter().map(|(batch, file)| name(batch, file)).collect();
        let lost = || History { unsure: all(), ..History::default() };
        let mut record = turn.read_history().unwrap_or_else(lost);
        let (every, mut failed) = (self.world.config.bigquery.load_every.0, None);
        for (batch, file) in self.history {
            if record.has(batch, file) {
                continue;
            }
            if self.rests(wait(record.sent_at, every), turn.read().map(|stream| stream.sent_at)) {
                break;
            }
            if !self.once && !record.wait(&name(batch, file), every).is_zero() {
                continue;
            }
            match self.load_file(turn, table_id, batch, file, &mut record).await {
                Ok(Some(rows)) => (outcome.jobs, outcome.rows) = (outcome.jobs + 1, outcome.rows + rows),
                Ok(None) => {}
                Err(failure) => {
                    failed.get_or_insert(failure);
                    continue;
                }
            }
            let file = name(batch, file);
            record.unsure.remove(&file);
            record.failed.remove(&file);
            record.loaded.insert(file);
            turn.write_history(&record)?;
            self.tell_pending(turn);
        }
        failed.map_or(Ok(outcome), Err)
    }

    /// Gives the number of rows; `None` when no job had to be sent.
    async fn load_file(
        &self,
        turn: &Turn,
        table_id: &str,
        batch: &Batch,
        file: &DataFile,
        record: &mut History,
    ) -> Result<Option<u64>> {
        let (begun, path) = (Instant::now(), file.path.clone());
        let source = spawn_blocking(move || Source::open(&path)).await;
        let source = source.map_err(|e| Error::fatal("reading a footer", e))??;
        let mut chain = self.chain(&source, table_id);
        // That of a replay's record.
        if let (Some(_), Some(record)) = (self.copy, turn.read()) {
            chain.owner = record.owner;
        }
        let fields = self.ensure_table(&chain, turn, &source).await?;
        let file = name(batch, file);
        let key = &source.primary_key;
        let key: Vec<_> = key.iter().cloned().zip(columns::names_in(key, source.schema())).collect();
        let is_there = || self.service.has_history(table_id, batch.first, batch.last);
        if record.unsure.contains(&file) && self.world.for_ever(CHECK, is_there).await? {
            // Who sent the job may have ended before the table had its view.
            return self.ensure_view(&chain, &key, &fields).await.map(|()| None);
        }
        let load = prepare(vec![source], None, Lsn(u64::MAX), fields.clone(), turn.scratch()).await?;
        let Some(load) = load else { return Ok(None) };
        let (job, sent) = match chain.look_for_history(&file, load.first, load.last, record.generation(&file)).await? {
            Link::Followed(job) => (job, false),
            Link::Free(mut generation) => {
                record.sent_at = now();
                record.unsure.insert(file.clone());
                turn.write_history(record)?;
                let ended = chain.load_history(&file, &mut generation, &load, &fields).await;
                if ended.is_err() && generation > record.generation(&file) {
                    record.failed.insert(file, generation);
                    turn.write_history(record)?;
                }
                (ended?, true)
            }
        };
        if job.rows.is_some_and(|rows| rows != load.rows) {
            let why = format!("BigQuery counts {:?} rows, the file has {}", job.rows, load.rows);
            return Err(Error::fatal(format_args!("loading {}: job {}", chain.name, job.id), why));
        }
        self.ensure_view(&chain, &key, &fields).await?;
        if !sent {
            info!(job.id, "had been loaded before");
            return Ok(None);
        }
        told(&chain, &load, &job, begun);
        Ok(Some(load.rows))
    }
}
