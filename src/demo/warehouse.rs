//! The local BigQuery server, as the demo looks at it.

use std::time::Duration;

use serde_json::{Value, json};
use tracing::warn;

use super::stage::is_demo;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::upload::bigquery;

/// A count over a small table.
const PATIENCE: Duration = Duration::from_secs(30);

/// A local server's REST interface.
pub(super) struct Warehouse {
    base: String,
    project: String,
    dataset: String,
    http: reqwest::Client,
}

impl Warehouse {
    /// Whether the configuration leads to a server that is not Google's.
    pub(super) fn is_local(config: &Config) -> bool {
        !bigquery::is_google(&base(config))
    }

    /// `None` without a project.
    pub(super) fn of(config: &Config) -> Result<Option<Self>> {
        let Some(project) = config.bigquery.project.clone() else { return Ok(None) };
        let http = reqwest::Client::builder().timeout(PATIENCE).build();
        let http = http.map_err(|e| Error::fatal("making an HTTP client", e))?;
        Ok(Some(Self { base: base(config), project, dataset: config.bigquery.dataset.clone(), http }))
    }

    /// Address of the server.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// The address that takes queries.
    pub(super) fn queries(&self) -> String {
        format!("{}/bigquery/v2/projects/{}/queries", self.base, self.project)
    }

    /// Removes the data sets of earlier demos. One that stays does no harm.
    pub(super) async fn forget(&self) {
        let url = format!("{}/bigquery/v2/projects/{}/datasets", self.base, self.project);
        let removed = async {
            let listed: Value = self.http.get(&url).send().await?.json().await?;
            let sets = listed["datasets"].as_array().cloned().unwrap_or_default();
            let names = sets.iter().filter_map(|set| set["datasetReference"]["datasetId"].as_str());
            for name in names.filter(|name| is_demo(name)) {
                self.http.delete(format!("{url}/{name}?deleteContents=true")).send().await?.error_for_status()?;
            }
            Ok::<_, reqwest::Error>(())
        };
        if let Err(error) = removed.await {
            warn!(%error, "data sets of earlier demos stay");
        }
    }

    /// Rows of a table, and how many different `_id` they have.
    pub(super) async fn count(&self, table: &str) -> Result<(u64, u64)> {
        let Self { project, dataset, .. } = self;
        let sql = format!("SELECT COUNT(*), COUNT(DISTINCT _id) FROM `{project}.{dataset}.{table}`");
        let asked = async {
            let request = self.http.post(self.queries()).json(&json!({"query": sql, "useLegacySql": false}));
            request.send().await?.error_for_status()?.json::<Value>().await
        };
        let answer = asked.await.map_err(|e| Error::unreachable(format!("BigQuery at {}", self.base), e))?;
        let cell = |n: usize| answer["rows"][0]["f"][n]["v"].as_str()?.parse().ok();
        match (cell(0), cell(1)) {
            (Some(rows), Some(ids)) => Ok((rows, ids)),
            _ => Err(Error::fatal(format_args!("counting {dataset}.{table}"), format_args!("the answer is {answer}"))),
        }
    }
}

fn base(config: &Config) -> String {
    bigquery::base(config.bigquery.endpoint.as_deref(), std::env::var("BIGQUERY_EMULATOR_HOST").ok())
}
