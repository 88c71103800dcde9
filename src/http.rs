//! The operator's listener: the dashboard, `/livez`, `/readyz`, `/metrics`, `/api/v1/status`, `/api/v1/board`. And the
//! `healthcheck` verb.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, lookup_host};
use tokio::sync::Mutex;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::consume::SharedBoard;
use crate::dashboard;
use crate::error::{Error, Result};
use crate::status::{self, Status};
use crate::world::World;

/// The Prometheus text format.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
/// A status younger than this is shown again: gathering one asks every server.
const STATUS_AGE: Duration = Duration::from_secs(1);
/// How long `healthcheck` waits.
const HEALTHCHECK: Duration = Duration::from_secs(5);
/// Contents on the board unless `?top=N` says otherwise.
const TOP: usize = 10;
/// … and at most: Redis answers nobody else while it reads them.
const MOST: usize = 1000;

/// Starts to serve on `http.listen`, until the process ends: it answers while the roles drain, too.
///
/// Gives the address; `None` where nothing is served: `listen` is empty, or the address cannot be had, which is logged.
///
/// # Errors
/// [`Error::Refused`] for an address that is none.
pub async fn start(world: &World, metrics: PrometheusHandle) -> Result<Option<SocketAddr>> {
    let listen = &world.config.http.listen;
    if listen.is_empty() {
        return Ok(None);
    }
    let bound = TcpListener::bind(&*addresses(listen).await?).await.and_then(|l| Ok((l.local_addr()?, l)));
    let (address, listener) = match bound {
        Ok(bound) => bound,
        Err(e) => {
            warn!(
                "http.listen = {listen:?}: {e}; the dashboard, /metrics, /livez and /readyz are not served by this process"
            );
            return Ok(None);
        }
    };
    info!("serving http://{address}/, /metrics, /livez, /readyz, /api/v1/status, /api/v1/board");
    let face = Face { world: world.clone(), metrics, status: Arc::default(), board: Arc::default() };
    tokio::spawn(async move {
        if let Err(e) = axum::serve(listener, routes(face)).await {
            error!("the HTTP listener has ended: {e}");
        }
    });
    Ok(Some(address))
}

async fn addresses(listen: &str) -> Result<Vec<SocketAddr>> {
    lookup_host(listen).await.map(Iterator::collect).map_err(|e| {
        Error::refused(
            "http_listen",
            format!("http.listen = {listen:?}: {e}"),
            "HOST:PORT of this machine, or \"\" for off",
            "http.listen = \"127.0.0.1:9464\"",
        )
    })
}

#[derive(Clone)]
struct Face {
    world: World,
    metrics: PrometheusHandle,
    status: Arc<Mutex<Option<(Instant, Status)>>>,
    board: Arc<Mutex<SharedBoard>>,
}

fn routes(face: Face) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route(
            "/metrics",
            get(async |State(face): State<Face>| ([(header::CONTENT_TYPE, METRICS)], face.metrics.render())),
        )
        .route("/api/v1/status", get(async |State(face): State<Face>| Json(face.status().await)))
        .route("/api/v1/board", get(board))
        .merge(dashboard::routes())
        .with_state(face)
}

/// Answer of `/readyz`.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Readiness {
    ready: bool,
    /// Checks that fail, with the reason.
    failing: BTreeMap<&'static str, String>,
    /// Checks that pass.
    passing: Vec<&'static str>,
}

async fn ready(State(face): State<Face>) -> Response {
    let readiness = readiness(face.world.health.report(), face.world.stop.is_cancelled());
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(readiness)).into_response()
}

/// Ready is what has reported, passes every check, and is not on its way out.
fn readiness(report: BTreeMap<&'static str, Option<String>>, draining: bool) -> Readiness {
    let passing: Vec<_> = report.iter().filter(|(_, why)| why.is_none()).map(|(check, _)| *check).collect();
    let mut failing: BTreeMap<_, _> = report.into_iter().filter_map(|(check, why)| Some((check, why?))).collect();
    if draining {
        failing.insert("shutdown", "draining".into());
    }
    if passing.is_empty() && failing.is_empty() {
        failing.insert("start", "no role has reported yet".into());
    }
    Readiness { ready: failing.is_empty(), failing, passing }
}

impl Face {
    async fn status(&self) -> Status {
        let mut held = self.status.lock().await;
        match &*held {
            Some((at, status)) if at.elapsed() < STATUS_AGE => status.clone(),
            _ => {
                let status = status::gather(&self.world).await;
                *held = Some((Instant::now(), status.clone()));
                status
            }
        }
    }
}

#[derive(Deserialize)]
struct Top {
    top: Option<usize>,
}

async fn board(State(face): State<Face>, Query(Top { top }): Query<Top>) -> Response {
    match face.board.lock().await.read(&face.world.config, top.unwrap_or(TOP).min(MOST)).await {
        Ok(view) => Json(view).into_response(),
        Err(e) => {
            let status =
                if e.is_transient() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::INTERNAL_SERVER_ERROR };
            (status, Json(BTreeMap::from([("error", e.to_string())]))).into_response()
        }
    }
}

/// Asks the process that serves `http.listen` on this machine whether it lives.
///
/// # Errors
/// [`Error::Fatal`] with the reason why it is not known to live.
pub async fn healthcheck(config: &Config) -> Result<()> {
    let listen = &config.http.listen;
    if listen.is_empty() {
        return Err(Error::Fatal("http.listen is empty: there is nothing to ask".into()));
    }
    let Some(address) = addresses(listen).await?.first().copied() else {
        return Err(Error::Fatal(format!("http.listen = {listen:?} names no address")));
    };
    let url = format!("http://{}/livez", reachable(address));
    let client = reqwest::Client::builder().timeout(HEALTHCHECK).no_proxy().build();
    let client = client.map_err(|e| Error::fatal("making an HTTP client", e))?;
    match client.get(&url).send().await {
        Ok(answer) if answer.status().is_success() => Ok(()),
        Ok(answer) => Err(Error::Fatal(format!("{url}: HTTP {}", answer.status()))),
        Err(e) => Err(Error::fatal(&url, chain(&e))),
    }
}

/// An address that stands for every one of this machine is asked at its loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// reqwest says the reason only in the sources of its error.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = inner.to_string();
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_means_reported_passing_and_not_draining() {
        let unready = |report: &[(&'static str, Option<&str>)], draining| {
            let report = report.iter().map(|(check, why)| (*check, why.map(str::to_owned))).collect();
            readiness(report, draining)
                .failing
                .into_iter()
                .map(|(check, why)| format!("{check}: {why}"))
                .collect::<Vec<_>>()
        };
        assert_eq!(unready(&[], false), ["start: no role has reported yet"]);
        assert_eq!(unready(&[("redis", None)], false), [""; 0]);
        assert_eq!(unready(&[("redis", None), ("slot", Some("in use"))], false), ["slot: in use"]);
        assert_eq!(unready(&[("redis", None)], true), ["shutdown: draining"]);
    }

    #[test]
    fn every_address_is_asked_at_the_loopback() {
        let asked = |address: &str| reachable(address.parse().unwrap()).to_string();
        assert_eq!(asked("0.0.0.0:9464"), "127.0.0.1:9464");
        assert_eq!(asked("[::]:9464"), "[::1]:9464");
        assert_eq!(asked("10.0.0.5:1"), "10.0.0.5:1");
    }
}
