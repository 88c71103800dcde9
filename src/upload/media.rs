//! The resumable media upload: begin with the job's JSON, send the file in chunks, ask how far it got after a cut.
//!
//! Protocol: <https://cloud.google.com/bigquery/docs/reference/api-uploads>.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use gcp_bigquery_client::model::job::Job;
use reqwest::{Response, StatusCode, header};

use super::bigquery::{Answer, BigQuery};
use crate::error::{Error, Result};
use crate::world::World;

/// Bytes of one request; a multiple of 256 KiB, as the protocol asks for. A slow line must get it through in one read timeout.
const CHUNK: u64 = 4 << 20;
/// Health check of the service.
pub(super) const CHECK: &str = "bigquery";

/// How an upload ended.
#[derive(Debug)]
pub enum Sent {
    /// The service has the whole file and has started the job.
    Accepted(Box<Job>),
    /// 409, at either step: there is a job of this id.
    Exists,
    /// The service does not know the upload any more; whether there is a job has to be looked up.
    Lost,
}

enum Step {
    Incomplete(u64),
    End(Sent),
}

impl BigQuery {
    /// Sends a load job with its file, over outages of any length.
    ///
    /// # Errors
    /// A refusal or a failure that will not pass; a shutdown gives the last transient error.
    pub async fn load(
        &self,
        world: &World,
        id: &str,
        job: &serde_json::Value,
        file: &File,
        bytes: u64,
    ) -> Result<Sent> {
        let doing = format!("sending job {id}");
        let session = match world.for_ever(CHECK, || self.begin(&doing, job, bytes)).await? {
            Answer::Is(url) => url,
            Answer::Exists => return Ok(Sent::Exists),
            Answer::Absent => {
                return Err(Error::refused(
                    "bigquery_project",
                    format!("{doing}: project {:?} or data set {:?} was not found", self.project, self.dataset),
                    "both exist",
                    "create them again, or mend [bigquery]",
                ));
            }
        };
        // Unknown (None) after a request that failed: the service may have taken any part of it.
        let offset = Mutex::new(Some(0));
        loop {
            let step = world.for_ever(CHECK, async || self.step(&doing, &session, file, bytes, &offset).await).await?;
            match step {
                Step::Incomplete(next) => *offset.lock().unwrap_or_else(PoisonError::into_inner) = Some(next),
                Step::End(sent) => return Ok(sent),
            }
        }
    }

    async fn begin(&self, doing: &str, job: &serde_json::Value, bytes: u64) -> Result<Answer<String>> {
        let request = self
            .http
            .post(self.upload_url())
            .header("X-Upload-Content-Type", "application/octet-stream")
            .header("X-Upload-Content-Length", bytes)
            .json(job);
        let response = self.send(doing, request).await?;
        if !response.status().is_success() {
            return self.read(doing, response).await;
        }
        let location = response.headers().get(header::LOCATION).and_then(|v| v.to_str().ok());
        location.map(|url| Answer::Is(url.to_owned())).ok_or_else(|| {
            self.unreachable(doing, format_args!("HTTP {} without a Location for the upload", response.status()))
        })
    }

    async fn step(
        &self,
        doing: &str,
        session: &str,
        file: &File,
        bytes: u64,
        offset: &Mutex<Option<u64>>,
    ) -> Result<Step> {
        let known = offset.lock().unwrap_or_else(PoisonError::into_inner).take();
        let at = match known {
            Some(at) => at,
            None => match self.ask(doing, session, bytes).await? {
                Step::Incomplete(at) => at,
                end => return Ok(end),
            },
        };
        let end = bytes.min(at + CHUNK);
        let mut chunk = vec![0; usize::try_from(end - at).unwrap_or(0)];
        file.read_exact_at(&mut chunk, at).map_err(|e| Error::fatal(format_args!("{doing}: reading its file"), e))?;
        let range = format!("bytes {at}-{}/{bytes}", end.saturating_sub(1));
        let request = self.http.put(session).header(header::CONTENT_RANGE, range).body(chunk);
        let response = self.send(doing, request).await?;
        self.progress(doing, response, bytes).await
    }

    async fn ask(&self, doing: &str, session: &str, bytes: u64) -> Result<Step> {
        let request = self.http.put(session).header(header::CONTENT_RANGE, format!("bytes */{bytes}"));
        let response = self.send(doing, request.header(header::CONTENT_LENGTH, 0)).await?;
        self.progress(doing, response, bytes).await
    }

    async fn progress(&self, doing: &str, response: Response, bytes: u64) -> Result<Step> {
        match response.status() {
            // With every byte it is still to say what has become of the job: then it is asked again.
            StatusCode::PERMANENT_REDIRECT => received(&response)
                .filter(|&offset| offset < bytes)
                .map(Step::Incomplete)
                .ok_or_else(|| self.unreachable(doing, "HTTP 308 with a Range that leaves nothing to send")),
            StatusCode::NOT_FOUND | StatusCode::GONE => Ok(Step::End(Sent::Lost)),
            _ => Ok(Step::End(match self.read(doing, response).await? {
                Answer::Is(job) => Sent::Accepted(job),
                Answer::Exists => Sent::Exists,
                Answer::Absent => Sent::Lost,
            })),
        }
    }
}

/// Bytes that the service has, from `Range: bytes=0-N`; none without that header.
fn received(response: &Response) -> Option<u64> {
    match response.headers().get(header::RANGE) {
        None => Some(0),
        Some(range) => range.to_str().ok()?.strip_prefix("bytes=0-")?.parse::<u64>().ok()?.checked_add(1),
    }
}
