//! The load jobs of one table form a chain, and that is why no row is loaded twice.
//!
//! A table's rows are loaded strictly in order of their positions, each job from where the one before ended. A job's id says
//! which stream and table it belongs to and *which position it follows*, and nothing else. BigQuery takes an id once. So of
//! all jobs that might follow a position, from whatever process and with whatever batches merged into them, exactly one
//! can come to be; where it ended stands in its label. A job that failed has loaded nothing (a load is atomic); only then
//! does the next generation of the id, `-g{n}`, come into play.
//!
//! The position to follow stands in the record beside the archive. Without a record it is the highest position in the
//! table itself; a job that runs at that moment follows exactly that position, and is found under its id.

use std::collections::HashMap;
use std::time::Duration;

use gcp_bigquery_client::model::error_proto::ErrorProto;
use gcp_bigquery_client::model::job::Job;
use gcp_bigquery_client::model::table_field_schema::TableFieldSchema;
use serde_json::json;
use tracing::{info, warn};

use super::bigquery::{Answer, BigQuery};
use super::columns;
use super::files::{Load, Origin};
use super::media::{CHECK, Sent};
use super::record::hash;
use crate::error::{Error, Result};
use crate::lsn::{Lsn, Position};
use crate::world::{World, backoff};

/// Label of a job: position of its last row.
const LABEL_TO: &str = "falaj_to";
/// How many generations of one job are tried before its table is given up for this round.
const ATTEMPTS: u32 = 3;
/// The readable part of a job id, besides position and hash.
const ID_CHARS: usize = 100;

/// The chain of one table.
pub struct Chain<'a> {
    /// Configuration and shutdown.
    pub world: &'a World,
    /// The service.
    pub service: &'a BigQuery,
    /// Stream and table, for people.
    pub name: String,
    /// Stream and table, as a hash.
    pub owner: String,
    /// The table's id in BigQuery.
    pub table_id: String,
}

/// Whether a position has been followed.
#[derive(Debug)]
pub enum Link {
    /// No job follows it; the next one is of this generation.
    Free(u32),
    /// A job has loaded the rows from there up to another position.
    Followed(Followed),
}

/// A job that has loaded its rows.
#[derive(Debug)]
pub struct Followed {
    /// Position of its last row.
    pub to: Position,
    /// Its id.
    pub id: String,
    /// Rows, where the service says so.
    pub rows: Option<u64>,
}

/// Hash of what positions of a table's rows belong to.
pub fn owner(origin: &Origin, table: &str) -> String {
    let slot = &origin.slot;
    hash(&json!([origin.pipeline, slot.system_id, slot.timeline, slot.slot, table]).to_string())
}

impl Chain<'_> {
    /// Id of a generation of the job that follows a position.
    pub fn job_id(&self, after: Option<Position>, generation: u32) -> String {
        let place = after.map_or("start".to_owned(), label);
        let full = hash(&json!([self.owner, self.service.dataset, self.table_id, place]).to_string());
        let name = self.readable();
        match generation {
            0 => format!("falaj-{name}-{place}-{}", &full[..24]),
            n => format!("falaj-{name}-{place}-{}-g{n}", &full[..24]),
        }
    }

    /// What has become of the job that follows `after`; waits while one runs.
    ///
    /// # Errors
    /// As every request of the service.
    pub async fn look(&self, after: Option<Position>, from: u32) -> Result<Link> {
        match self.find(from, |generation| self.job_id(after, generation)).await? {
            (generation, None) => Ok(Link::Free(generation)),
            (_, Some((id, job))) => self.followed(after, id, &job).await.map(Link::Followed),
        }
    }

    /// Loads rows that follow `after`. `generation` is moved past every failure, also when this returns an error.
    ///
    /// # Errors
    /// [`Error::Fatal`] after three failed jobs, with BigQuery's reason; else as every request of the service.
    pub async fn follow(
        &self,
        after: Option<Position>,
        generation: &mut u32,
        load: &Load,
        fields: &[TableFieldSchema],
    ) -> Result<Followed> {
        let (id, job) = self.run(generation, |generation| self.job_id(after, generation), load, fields).await?;
        self.followed(after, id, &job).await
    }

    /// Id of a generation of the job that loads one file of history, and nothing else: it follows no position.
    fn history_id(&self, file: &str, first: Position, generation: u32) -> String {
        let full = hash(&json!([self.owner, self.service.dataset, self.table_id, "history", file]).to_string());
        let (name, place) = (self.readable(), label(first));
        match generation {
            0 => format!("falaj-{name}-r-{place}-{}", &full[..24]),
            n => format!("falaj-{name}-r-{place}-{}-g{n}", &full[..24]),
        }
    }

    /// What has become of the job that loads a file of history, whose rows have these positions; waits while one runs.
    ///
    /// # Errors
    /// As every request of the service.
    pub async fn look_for_history(&self, file: &str, first: Position, last: Position, from: u32) -> Result<Link> {
        match self.find(from, |generation| self.history_id(file, first, generation)).await? {
            (generation, None) => Ok(Link::Free(generation)),
            (_, Some((id, job))) => Ok(Link::Followed(Followed { to: last, rows: output_rows(&job), id })),
        }
    }

    /// Loads one file of history. `generation` is moved past every failure, also when this returns an error.
    ///
    /// # Errors
    /// As [`Chain::follow`].
    pub async fn load_history(
        &self,
        file: &str,
        generation: &mut u32,
        load: &Load,
        fields: &[TableFieldSchema],
    ) -> Result<Followed> {
        let id = |generation| self.history_id(file, load.first, generation);
        let (id, job) = self.run(generation, id, load, fields).await?;
        Ok(Followed { to: load.last, rows: output_rows(&job), id })
    }

    /// The job that has loaded its rows under the id of some generation, or the first generation that no job has had.
    async fn find(&self, from: u32, id: impl Fn(u32) -> String) -> Result<(u32, Option<(String, Box<Job>)>)> {
        let mut generation = from;
        loop {
            let id = id(generation);
            match self.settled(&id, None).await? {
                None => return Ok((generation, None)),
                Some(Ok(job)) => return Ok((generation, Some((id, job)))),
                Some(Err(failure)) => {
                    info!(%id, "failed earlier: {}", said(&failure));
                    generation += 1;
                }
            }
        }
    }

    /// Sends a job until one generation of it has loaded its rows, or three have failed.
    async fn run(
        &self,
        generation: &mut u32,
        id: impl Fn(u32) -> String,
        load: &Load,
        fields: &[TableFieldSchema],
    ) -> Result<(String, Box<Job>)> {
        let mut delays = backoff();
        let mut attempt = 0;
        loop {
            attempt += 1;
            let id = id(*generation);
            let failure = match self.submit(&id, load, fields).await? {
                Ok(job) => return Ok((id, job)),
                Err(failure) => failure,
            };
            *generation += 1;
            metrics::counter!("falaj_upload_jobs_failed_total", "table" => self.table_id.clone()).increment(1);
            warn!(%id, "the load job has failed and loaded nothing: {}", said(&failure));
            if attempt == ATTEMPTS {
                return Err(Error::fatal(format_args!("loading {}: job {id}", self.name), said(&failure)));
            }
            self.world.pause(delays.next().unwrap_or(Duration::from_secs(5))).await?;
        }
    }

    /// The part of a job's id that is for people.
    fn readable(&self) -> String {
        let name = self.name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' });
        name.take(ID_CHARS).collect()
    }

    /// Sends one job until it is settled, over lost answers: the same id cannot load twice.
    async fn submit(&self, id: &str, load: &Load, fields: &[TableFieldSchema]) -> Result<Settled> {
        let body = self.body(id, load, fields);
        let mut delays = backoff();
        loop {
            let sent = self.service.load(self.world, id, &body, &load.file, load.bytes).await?;
            let answer = match sent {
                Sent::Accepted(job) => Some(*job),
                Sent::Exists | Sent::Lost => None,
            };
            if let Some(settled) = self.settled(id, answer).await? {
                return Ok(settled);
            }
            warn!(%id, "the service has lost the upload; sending it again under the same id");
            self.world.pause(delays.next().unwrap_or(Duration::from_secs(5))).await?;
        }
    }

    fn body(&self, id: &str, load: &Load, fields: &[TableFieldSchema]) -> serde_json::Value {
        let BigQuery { project, dataset, location, .. } = self.service;
        let labels = HashMap::from([(LABEL_TO, label(load.last)), ("falaj_owner", short_owner(&self.owner))]);
        let mut config = json!({
            "destinationTable": { "projectId": project, "datasetId": dataset, "tableId": self.table_id },
            "sourceFormat": "PARQUET",
            "parquetOptions": { "enableListInference": true },
            "createDisposition": "CREATE_NEVER",
            "writeDisposition": "WRITE_APPEND",
            "schema": { "fields": fields },
            "schemaUpdateOptions": ["ALLOW_FIELD_ADDITION"],
        });
        if !columns::all_plain(fields) {
            config["columnNameCharacterMap"] = "V2".into();
        }
        json!({
            "jobReference": { "projectId": project, "jobId": id, "location": location },
            "configuration": { "labels": labels, "load": config },
        })
    }

    /// Waits for the end of a job; `None` when there is no such job.
    async fn settled(&self, id: &str, mut seen: Option<Job>) -> Result<Option<Settled>> {
        let mut delays = backoff();
        loop {
            let job = match seen.take() {
                Some(job) => job,
                None => match self.world.for_ever(CHECK, || self.service.job(id)).await? {
                    Answer::Is(job) => job,
                    Answer::Absent | Answer::Exists => return Ok(None),
                },
            };
            let status = job.status.clone().unwrap_or_default();
            match (status.state.as_deref(), status.error_result) {
                (Some("DONE"), None) => return Ok(Some(Ok(Box::new(job)))),
                (Some("DONE"), Some(failure)) => return Ok(Some(Err(failure))),
                _ => self.world.pause(delays.next().unwrap_or(Duration::from_secs(5))).await?,
            }
        }
    }

    async fn followed(&self, after: Option<Position>, id: String, job: &Job) -> Result<Followed> {
        let labels = job.configuration.as_ref().and_then(|c| c.labels.as_ref());
        let to = match labels.and_then(|l| l.get(LABEL_TO)).and_then(|l| parse_label(l)) {
            Some(to) => Some(to),
            None => self.world.for_ever(CHECK, || self.service.highest(&self.table_id)).await?,
        };
        match to.filter(|&to| Some(to) > after) {
            Some(to) => Ok(Followed { to, id, rows: output_rows(job) }),
            None => Err(Error::refused(
                "bigquery_job",
                format!("job {id} is done, but neither its label nor table {} says how far it loaded", self.table_id),
                "the label that falaj gives each of its jobs",
                "load into another data set (bigquery.dataset)",
            )),
        }
    }
}

/// A job's end: done, or failed with nothing loaded.
type Settled = Result<Box<Job>, ErrorProto>;

/// Rows that a job has loaded, where the service says so.
fn output_rows(job: &Job) -> Option<u64> {
    let rows = job.statistics.as_ref()?.load.as_ref()?.output_rows.as_deref()?;
    rows.parse().ok()
}

fn said(failure: &ErrorProto) -> String {
    let text = |part: &Option<String>| part.clone().unwrap_or_default();
    format!("{}: {}", text(&failure.reason), text(&failure.message))
}

/// The owner as a table's or job's label (63 characters at most).
pub fn short_owner(owner: &str) -> String {
    owner.chars().take(32).collect()
}

/// A position in the characters of a label and of a job id.
fn label(at: Position) -> String {
    format!("{:016x}-{:010}", at.commit_lsn.0, at.ordinal)
}

fn parse_label(text: &str) -> Option<Position> {
    let (lsn, ordinal) = text.split_once('-')?;
    let commit_lsn = Lsn(u64::from_str_radix(lsn, 16).ok()?);
    Some(Position { commit_lsn, ordinal: ordinal.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_read_back() {
        let at = Position { commit_lsn: Lsn(0x16_B374_D848), ordinal: 3 };
        assert_eq!(label(at), "00000016b374d848-0000000003");
        assert_eq!(parse_label(&label(at)), Some(at));
        assert_eq!(parse_label("x"), None);
    }
}
