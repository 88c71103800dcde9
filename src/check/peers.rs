//! What falaj needs of everything else: the archive's directory, Redis, the outside HTTP system, BigQuery. An empty URL
//! says that nobody uses it.

use std::path::Path;
use std::sync::Arc;

use reqwest::Url;
use tokio::net::TcpStream;

use super::{Finding, Found, within};
use crate::config::{self, Config, SinkName};
use crate::error::{Error, Result};
use crate::upload::bigquery::BigQuery;

/// Tries everything at the same time.
pub(super) async fn findings(config: &Arc<Config>) -> Vec<Finding> {
    let has = |sink| config.produce.sinks.contains(&sink);
    let (kafka, archive) = (has(SinkName::Kafka), has(SinkName::Archive));
    let redis = async {
        if !kafka || config.redis.url.is_empty() {
            return None;
        }
        let outcome = within("Redis", crate::consume::redis::preflight(config)).await;
        Some(Finding::of("redis", "Redis 7 or later that evicts nothing", outcome))
    };
    let external = async {
        if !kafka || config.external.url.is_empty() {
            return None;
        }
        Some(Finding::of("external", "an HTTP server that answers", external(&config.external.url).await))
    };
    let bigquery = async {
        let project = config.bigquery.project.as_deref().filter(|p| archive && !p.is_empty())?;
        let outcome = within("BigQuery", bigquery(&config.bigquery, project)).await;
        Some(Finding::of("bigquery", "a project and the right to load into it", outcome))
    };
    let (redis, external, bigquery) = tokio::join!(redis, external, bigquery);
    let directory =
        |check, key: &str, dir: &Path| Finding::of(check, "a directory to write to", writable(check, key, dir));
    let state = Some(directory("state_dir", "state.dir", &config.state.dir));
    let archive = archive.then(|| directory("archive_dir", "archive.dir", &config.archive.dir));
    [state, archive, redis, external, bigquery].into_iter().flatten().collect()
}

/// Writes and removes a file in the directory, or in the nearest one above it that exists.
///
/// # Errors
/// [`Error::Refused`] under the name of the check; `key` is the setting to change.
pub fn writable(check: &'static str, key: &str, dir: &Path) -> Result<String> {
    let refuse = |at: &Path, e: std::io::Error| {
        let fix = format!("mend its rights, or choose another {key}");
        Error::refused(check, format!("{}: {e}", at.display()), "a directory that this user may write", fix)
    };
    let absolute = std::path::absolute(dir).map_err(|e| refuse(dir, e))?;
    let existing = absolute.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    // In a container every process has the same id: one may have left its probe behind.
    let probe = existing.join(format!(".falaj-check-{}", std::process::id()));
    let opened = std::fs::OpenOptions::new().write(true).create(true).truncate(true).open(&probe);
    opened.map_err(|e| refuse(existing, e))?;
    match std::fs::remove_file(&probe) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(refuse(&probe, e)),
        _ => {}
    }
    let made = if existing == absolute { "" } else { " (to be made)" };
    Ok(format!("{}{made}", dir.display()))
}

/// A connection is enough: no request is sent that the other side could take for an event.
async fn external(url: &str) -> Result<String> {
    let refuse =
        |found: String| Error::refused("external_url", found, "an http:// or https:// address", "mend external.url");
    let parsed = Url::parse(url).map_err(|e| refuse(format!("external.url: {e}")))?;
    let (Some(host), Some(port)) = (parsed.host_str(), parsed.port_or_known_default()) else {
        return Err(refuse("external.url names no host".to_owned()));
    };
    let what = format!("the outside system at {host}:{port}");
    let address = (host.trim_matches(['[', ']']), port);
    let connect = async { TcpStream::connect(address).await.map_err(|e| Error::unreachable(&what, e)) };
    within(&what, connect).await?;
    Ok(format!("{host}:{port} accepts connections"))
}

/// Looks at the data set and makes nothing.
async fn bigquery(config: &config::BigQuery, project: &str) -> Result<Found> {
    let service = BigQuery::new(config, project).await?;
    if service.has_dataset().await? {
        return Ok(service.target().into());
    }
    Ok(Found::with_advice(format!("{} is not there yet", service.target()), "upload makes it"))
}
