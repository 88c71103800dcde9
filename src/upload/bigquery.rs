//! The BigQuery service: jobs, tables, views and the resumable media upload.
//!
//! Creating things and querying goes through gcp-bigquery-client. Load jobs go through requests of our own, because that
//! client has no media upload; and jobs and tables are read here, because it loses the HTTP status of an answer that is
//! not JSON.

use std::time::Duration;

use gcp_bigquery_client::client_builder::ClientBuilder;
use gcp_bigquery_client::error::BQError;
use gcp_bigquery_client::model::dataset::Dataset;
use gcp_bigquery_client::model::get_query_results_parameters::GetQueryResultsParameters;
use gcp_bigquery_client::model::job::Job;
use gcp_bigquery_client::model::query_request::QueryRequest;
use gcp_bigquery_client::model::query_response::QueryResponse;
use gcp_bigquery_client::model::table::Table;
use gcp_bigquery_client::model::table_row::TableRow;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{RequestBuilder, Response, StatusCode};
use serde::de::DeserializeOwned;

use super::auth::Credentials;
use crate::config;
use crate::error::{Error, Result};
use crate::lsn::{Lsn, Position};

/// Google's own address.
const GOOGLE: &str = "https://bigquery.googleapis.com";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest silence on a connection: a request with a chunk of a file may take this long.
const READ_TIMEOUT: Duration = Duration::from_secs(120);
/// What stands bare in a segment of an address.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');
/// How much of an answer that is no JSON goes into a message.
const BODY_CHARS: usize = 300;

/// One data set of the service.
pub struct BigQuery {
    pub(super) http: reqwest::Client,
    /// Project that holds the data set and pays for the jobs.
    pub project: String,
    /// The data set.
    pub dataset: String,
    /// Location of the data set and of the jobs.
    pub location: String,
    base: String,
    client: gcp_bigquery_client::Client,
    credentials: Credentials,
}

/// An answer, as far as the caller acts on it.
#[derive(Debug)]
pub enum Answer<T> {
    /// What was asked for.
    Is(T),
    /// 404: there is no such thing.
    Absent,
    /// 409: there is such a thing already.
    Exists,
}

impl BigQuery {
    /// A client for the configured data set; `project` is set. Nothing is sent yet.
    ///
    /// # Errors
    /// [`Error::Refused`] for credentials that cannot be used.
    pub async fn new(config: &config::BigQuery, project: &str) -> Result<Self> {
        let base = base(config.endpoint.as_deref(), std::env::var("BIGQUERY_EMULATOR_HOST").ok());
        let credentials = if is_google(&base) { Credentials::find().await? } else { Credentials::None };
        // A 308 answer of the upload protocol means "go on", not "go elsewhere".
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|e| Error::fatal("making an HTTP client", e))?;
        let client = ClientBuilder::new()
            .with_v2_base_url(format!("{base}/bigquery/v2"))
            .with_client(http.clone())
            .build_from_authenticator(std::sync::Arc::new(credentials.clone()))
            .await
            .map_err(|e| Error::fatal("making a BigQuery client", e))?;
        let (dataset, location) = (config.dataset.clone(), config.location.clone());
        Ok(Self { http, project: project.to_owned(), dataset, location, base, client, credentials })
    }

    /// `project.dataset`, with the address where that is not Google's.
    pub fn target(&self) -> String {
        let Self { project, dataset, base, .. } = self;
        if is_google(base) { format!("{project}.{dataset}") } else { format!("{base}/{project}.{dataset}") }
    }

    /// Looks a job up, at its location.
    ///
    /// # Errors
    /// As every request: [`Error::Unreachable`] for what may pass, [`Error::Refused`] for rights, else [`Error::Fatal`].
    pub async fn job(&self, id: &str) -> Result<Answer<Job>> {
        let url = format!("{}/bigquery/v2/projects/{}/jobs/{}", self.base, segment(&self.project), segment(id));
        self.get(&format!("looking up job {id}"), &url, &[("location", &self.location)]).await
    }

    /// A table or view with its schema and labels.
    ///
    /// # Errors
    /// As [`BigQuery::job`].
    pub async fn table(&self, id: &str) -> Result<Answer<Table>> {
        self.get(&format!("looking up table {id}"), &self.table_url(id), &[]).await
    }

    fn table_url(&self, id: &str) -> String {
        let Self { base, project, dataset, .. } = self;
        let (project, dataset, id) = (segment(project), segment(dataset), segment(id));
        format!("{base}/bigquery/v2/projects/{project}/datasets/{dataset}/tables/{id}")
    }

    /// Creates the data set where it is absent.
    ///
    /// # Errors
    /// As [`BigQuery::job`]; a location other than the configured one is refused.
    pub async fn ensure_dataset(&self) -> Result<()> {
        if self.has_dataset().await? {
            return Ok(());
        }
        let wanted = Dataset::new(&self.project, &self.dataset).location(&self.location);
        let doing = format!("creating data set {}", self.target());
        match self.sort(&doing, self.client.dataset().create(wanted).await).await {
            Ok(Answer::Is(_) | Answer::Exists) => Ok(()),
            Ok(Answer::Absent) => Err(self.no_project()),
            // Whatever went wrong, another process may have made it meanwhile.
            Err(error) => match self.find_dataset().await? {
                Answer::Is(_) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Whether the data set is there, at the configured location. Makes nothing.
    ///
    /// # Errors
    /// As [`BigQuery::job`]; another location is refused.
    pub async fn has_dataset(&self) -> Result<bool> {
        match self.find_dataset().await? {
            Answer::Is(found) => self.check_location(found.location.as_deref()).map(|()| true),
            Answer::Absent | Answer::Exists => Ok(false),
        }
    }

    async fn find_dataset(&self) -> Result<Answer<Dataset>> {
        let url = format!(
            "{}/bigquery/v2/projects/{}/datasets/{}",
            self.base,
            segment(&self.project),
            segment(&self.dataset)
        );
        self.get(&format!("looking up data set {}", self.target()), &url, &[]).await
    }

    fn check_location(&self, found: Option<&str>) -> Result<()> {
        match found {
            Some(found) if !found.eq_ignore_ascii_case(&self.location) => Err(Error::refused(
                "bigquery_location",
                format!("data set {} is in {found}, bigquery.location = {:?}", self.target(), self.location),
                "jobs at the location of their data set",
                format!("set bigquery.location = {found:?}"),
            )),
            _ => Ok(()),
        }
    }

    fn no_project(&self) -> Error {
        Error::refused(
            "bigquery_project",
            format!("project {:?} or data set {:?} does not exist at {}", self.project, self.dataset, self.base),
            "an existing project, and the right to use it",
            "mend bigquery.project and bigquery.endpoint, or create the project",
        )
    }

    /// Creates a table or view; one that exists is no error.
    ///
    /// # Errors
    /// As [`BigQuery::job`].
    pub async fn create_table(&self, table: Table) -> Result<()> {
        let id = table.table_id().clone();
        let doing = format!("creating {}.{id}", self.target());
        match self.sort(&doing, self.client.table().create(table).await).await {
            Ok(Answer::Is(_) | Answer::Exists) => Ok(()),
            Ok(Answer::Absent) => Err(self.no_project()),
            Err(error) => match self.table(&id).await? {
                Answer::Is(_) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Gives a view another query and one label, in one step.
    ///
    /// # Errors
    /// As [`BigQuery::job`].
    pub async fn replace_view(&self, id: &str, query: &str, label: (&str, &str)) -> Result<()> {
        let Self { project, dataset, .. } = self;
        let options = format!("OPTIONS(labels=[({:?}, {:?})])", label.0, label.1);
        let sql = format!("CREATE OR REPLACE VIEW `{project}.{dataset}.{id}` {options} AS\n{query}");
        self.query(sql).await.map(|_| ())
    }

    /// Lets a column of a table (`project.dataset.table`) hold NULL.
    ///
    /// # Errors
    /// As [`BigQuery::job`].
    pub async fn drop_not_null(&self, table: &str, column: &str) -> Result<()> {
        self.query(format!("ALTER TABLE `{table}` ALTER COLUMN `{column}` DROP NOT NULL")).await.map(|_| ())
    }

    /// The highest position among the rows that the stream has brought; `None` when there are none.
    ///
    /// # Errors
    /// As [`BigQuery::job`].
    pub async fn highest(&self, table_id: &str) -> Result<Option<Position>> {
        let sql = format!(
            "SELECT _commit_lsn, _ordinal FROM `{}.{}.{table_id}` WHERE _op <> 'r' \
             ORDER BY _commit_lsn DESC, _ordinal DESC LIMIT 1",
            self.project, self.dataset
        );
        let Some(row) = self.query(sql).await?.into_iter().next() else { return Ok(None) };
        let cell = |n: usize| -> Option<u64> { row.columns.as_ref()?.get(n)?.value.as_ref()?.as_str()?.parse().ok() };
        match (cell(0), cell(1)) {
            (Some(lsn), Some(ordinal)) => Ok(Some(Position { commit_lsn: Lsn(lsn), ordinal })),
            _ => Err(Error::fatal(format_args!("reading the highest position of {table_id}"), "a row without one")),
        }
    }

    /// Whether a table has copied rows with positions from `first` to `last`.
    ///
    /// # Errors
    /// As [`BigQuery::job`].
    pub async fn has_history(&self, table_id: &str, first: Position, last: Position) -> Result<bool> {
        let sql = format!(
            "SELECT _ordinal FROM `{}.{}.{table_id}` WHERE _op = 'r' AND _commit_lsn = {} \
             AND _ordinal BETWEEN {} AND {} LIMIT 1",
            self.project, self.dataset, first.commit_lsn.0, first.ordinal, last.ordinal
        );
        Ok(!self.query(sql).await?.is_empty())
    }

    /// The first rows of a query: all of them where they fit one answer.
    ///
    /// # Errors
    /// As [`BigQuery::job`].
    pub async fn query(&self, sql: String) -> Result<Vec<TableRow>> {
        let doing = format!("querying {}", self.target());
        let request = QueryRequest { location: Some(self.location.clone()), ..QueryRequest::new(sql) };
        let mut answer = self.here(&doing, self.client.job().query(&self.project, request).await).await?;
        while answer.job_complete != Some(true) {
            let job = answer.job_reference.and_then(|r| r.job_id);
            let job = job.ok_or_else(|| Error::fatal(&doing, "an answer without a job"))?;
            let wait = GetQueryResultsParameters { location: Some(self.location.clone()), ..Default::default() };
            let next = self.client.job().get_query_results(&self.project, &job, wait).await;
            answer = QueryResponse::from(self.here(&doing, next).await?);
        }
        Ok(answer.rows.unwrap_or_default())
    }

    async fn here<T>(&self, doing: &str, answer: Result<T, BQError>) -> Result<T> {
        match self.sort(doing, answer).await? {
            Answer::Is(value) => Ok(value),
            Answer::Absent | Answer::Exists => Err(Error::fatal(doing, "not found")),
        }
    }

    async fn get<T: DeserializeOwned>(&self, doing: &str, url: &str, query: &[(&str, &str)]) -> Result<Answer<T>> {
        let request = self.http.get(url).query(query);
        let response = self.send(doing, request).await?;
        self.read(doing, response).await
    }

    /// The address that starts a resumable upload.
    pub(super) fn upload_url(&self) -> String {
        format!("{}/upload/bigquery/v2/projects/{}/jobs?uploadType=resumable", self.base, segment(&self.project))
    }

    pub(super) async fn send(&self, doing: &str, mut request: RequestBuilder) -> Result<Response> {
        if let Some(token) = self.credentials.token().await? {
            request = request.bearer_auth(token);
        }
        request.send().await.map_err(|e| self.unreachable(doing, e))
    }

    /// A JSON answer, or what its status means.
    pub(super) async fn read<T: DeserializeOwned>(&self, doing: &str, response: Response) -> Result<Answer<T>> {
        let status = response.status();
        let body = response.bytes().await.map_err(|e| self.unreachable(doing, e))?;
        if !status.is_success() {
            return self.judge(doing, status, &body);
        }
        let odd = |e: serde_json::Error| {
            let said = format!("HTTP {status}, but {e}: {}", excerpt(&body));
            // Whole, and not what falaj knows: it would be the same next time.
            if e.is_data() { Error::fatal(doing, said) } else { self.unreachable(doing, said) }
        };
        serde_json::from_slice(&body).map(Answer::Is).map_err(odd)
    }

    fn judge<T>(&self, doing: &str, status: StatusCode, body: &[u8]) -> Result<Answer<T>> {
        let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
        let error = json.as_ref().map(|j| &j["error"]).filter(|e| e.is_object());
        let reason = error.and_then(|e| e["errors"][0]["reason"].as_str()).unwrap_or("");
        let message = error.and_then(|e| e["message"].as_str()).map_or_else(|| excerpt(body), str::to_owned);
        // A 404 that BigQuery did not write comes from a wrong address: nothing follows from it about jobs.
        match status {
            StatusCode::NOT_FOUND if error.is_none() => Err(self.wrong_address(doing, status, &message)),
            status => self.verdict(doing, status, reason, &message),
        }
    }

    fn verdict<T>(&self, doing: &str, status: StatusCode, reason: &str, message: &str) -> Result<Answer<T>> {
        let busy = matches!(
            reason,
            "rateLimitExceeded"
                | "quotaExceeded"
                | "userRateLimitExceeded"
                | "backendError"
                | "internalError"
                | "jobRateLimitExceeded"
        );
        let said = format!("HTTP {status}: {message}");
        match status.as_u16() {
            404 => Ok(Answer::Absent),
            409 => Ok(Answer::Exists),
            _ if busy => Err(self.unreachable(doing, said)),
            408 | 429 | 500 | 502..=599 => Err(self.unreachable(doing, said)),
            401 | 403 => Err(Error::refused(
                "bigquery_rights",
                format!("{doing}: {said}"),
                "roles/bigquery.jobUser on the project and roles/bigquery.dataEditor on the data set",
                format!(
                    "gcloud projects add-iam-policy-binding {} --member=serviceAccount:… --role=roles/bigquery.jobUser \
                     (and dataEditor), or use other credentials",
                    self.project
                ),
            )),
            _ => Err(Error::fatal(doing, said)),
        }
    }

    fn wrong_address(&self, doing: &str, status: StatusCode, message: &str) -> Error {
        Error::refused(
            "bigquery_endpoint",
            format!("{doing} at {}: HTTP {status}: {message}", self.base),
            "a server that speaks the BigQuery API",
            "mend bigquery.endpoint, or remove it for Google's own service",
        )
    }

    /// Sorts an answer of gcp-bigquery-client as one of ours.
    async fn sort<T>(&self, doing: &str, answer: Result<T, BQError>) -> Result<Answer<T>> {
        match answer {
            Ok(value) => Ok(Answer::Is(value)),
            Err(BQError::ResponseError { error }) => {
                let status = u16::try_from(error.error.code).ok().and_then(|code| StatusCode::from_u16(code).ok());
                let reason = error.error.errors.first().and_then(|e| e.get("reason")).map_or("", String::as_str);
                self.verdict(doing, status.unwrap_or(StatusCode::BAD_REQUEST), reason, &error.error.message)
            }
            Err(BQError::RequestError(e)) if e.is_decode() => Err(self.explain(doing, e).await),
            Err(BQError::RequestError(e)) => Err(self.unreachable(doing, e)),
            // The token's own error is sorted where tokens are made.
            Err(other) => match self.credentials.token().await {
                Ok(_) => Err(Error::fatal(doing, other)),
                Err(error) => Err(error),
            },
        }
    }

    /// The client drops the status of an answer that is no JSON; the same address, read again, usually gives it.
    async fn explain(&self, doing: &str, e: reqwest::Error) -> Error {
        let Some(url) = e.url().cloned() else { return self.unreachable(doing, e) };
        match self.get::<serde_json::Value>(doing, url.as_str(), &[]).await {
            Err(error) => error,
            Ok(_) => self.unreachable(doing, e),
        }
    }

    pub(super) fn unreachable(&self, doing: &str, why: impl std::fmt::Display) -> Error {
        Error::unreachable(format!("BigQuery at {}", self.base), format_args!("{doing}: {why}"))
    }
}

/// Text for messages of an answer's body.
fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let text = text.trim();
    if text.is_empty() { "(no body)".to_owned() } else { text.chars().take(BODY_CHARS).collect() }
}

fn segment(text: &str) -> impl std::fmt::Display {
    utf8_percent_encode(text, SEGMENT)
}

/// The base address: configured, else the emulator's (`host:port` or a URL), else Google's. An empty one counts as none.
pub(crate) fn base(endpoint: Option<&str>, emulator: Option<String>) -> String {
    let is_given = |address: &String| !address.is_empty();
    let chosen = endpoint.map(str::to_owned).filter(is_given).or(emulator.filter(is_given));
    let url = match chosen {
        Some(url) if url.contains("://") => url,
        Some(host) => format!("http://{host}"),
        None => GOOGLE.to_owned(),
    };
    url.trim_end_matches('/').to_owned()
}

/// Whether requests to this address need Google's tokens; private endpoints are under the same domain.
pub(crate) fn is_google(base: &str) -> bool {
    base.strip_prefix("https://")
        .is_some_and(|host| host.split(['/', ':']).next().unwrap_or("").ends_with(".googleapis.com"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_the_configured_one_then_the_emulators_then_googles() {
        assert_eq!(base(Some("http://a:1/"), Some("b:2".into())), "http://a:1");
        assert_eq!(base(None, Some("b:2".into())), "http://b:2");
        assert_eq!(base(Some(""), Some("b:2".into())), "http://b:2");
        assert_eq!(base(Some(""), Some("".into())), GOOGLE);
        assert_eq!(base(None, None), GOOGLE);
        assert!(is_google(GOOGLE) && is_google("https://bigquery-x.p.googleapis.com"));
        assert!(!is_google("http://127.0.0.1:9050") && !is_google("https://googleapis.com.evil.example"));
    }
}
