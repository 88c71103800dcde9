//! The simulated outside system: an idempotent receiver with switchable faults.
//!
//! `POST /events` stores the event under its `Idempotency-Key`. The same key with the same bytes is answered as the first
//! time, with other bytes 422; without a key 400. `GET /received` counts, `GET /ids` lists the keys, one a line, in the
//! order of their first storing. Everything is kept in memory, some 150 bytes an event, until the process ends: it is a simulator.

mod connection;
mod faults;
mod store;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, DefaultBodyLimit, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::cli;
use crate::error::{Error, Result};
use crate::world::World;
use connection::{Connection, Cuttable};
pub use faults::{Fault, Faults};
use store::Stored;
pub use store::{Counts, Received};

/// The faults of one run come in the same order as those of the next.
const SEED: u64 = 1;

/// Runs the simulator until the shutdown.
///
/// # Errors
/// [`Error::Usage`] for a rate outside 0 to 1, [`Error::Refused`] when the address cannot be listened on.
pub async fn run(world: &World, args: &cli::MockExternal) -> Result<()> {
    if !(0.0..=1.0).contains(&args.fail) {
        return Err(Error::Usage(format!("--fail {}: needed is a share from 0.0 to 1.0", args.fail)));
    }
    let listener = TcpListener::bind(&args.listen).await.map_err(|e| {
        Error::refused(
            "mock_listen",
            format!("{}: {e}", args.listen),
            "a free address of this machine, as in 127.0.0.1:8088",
            "stop what listens there, or choose another address with --listen",
        )
    })?;
    let address = listener.local_addr().map_err(|e| Error::fatal("listening", e))?;
    tracing::info!(fail = args.fail, delay = %args.delay, "listening on http://{address}/events");
    let faults = Faults::random(args.fail, SEED).with_delay(args.delay.0);
    serve(listener, Mock::new(faults), world.stop.clone()).await
}

/// The simulator's state. Cheap to clone; all clones share it, so that a test can look inside while it serves.
#[derive(Clone, Default)]
pub struct Mock {
    received: Arc<Received>,
    faults: Arc<Faults>,
}

impl Mock {
    /// Empty, with these faults.
    pub fn new(faults: Faults) -> Self {
        Self { received: Arc::default(), faults: Arc::new(faults) }
    }

    /// What has been received.
    pub fn received(&self) -> &Received {
        &self.received
    }

    /// The faults, to be changed while it serves.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }
}

/// Serves until `stop`; from then on every connection is reset when it is used.
///
/// # Errors
/// [`Error::Fatal`] when the listener breaks.
pub async fn serve(listener: TcpListener, mock: Mock, stop: CancellationToken) -> Result<()> {
    let routes = Router::new()
        .route("/events", post(receive))
        .route("/received", get(async |State(mock): State<Mock>| axum::Json(mock.received.counts())))
        .route("/ids", get(async |State(mock): State<Mock>| mock.received.ids().join("\n")))
        .layer(DefaultBodyLimit::disable())
        .with_state(mock);
    let service = routes.into_make_service_with_connect_info::<Connection>();
    let serving = axum::serve(Cuttable { listener, stop: stop.clone() }, service);
    tokio::select! {
        done = serving.into_future() => done.map_err(|e| Error::fatal("serving", e)),
        () = stop.cancelled() => Ok(()),
    }
}

async fn receive(
    State(mock): State<Mock>,
    ConnectInfo(connection): ConnectInfo<Connection>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let Mock { received, faults } = &mock;
    received.count_request();
    let Some(key) = headers.get("idempotency-key").and_then(|v| v.to_str().ok()).filter(|k| !k.is_empty()) else {
        return (StatusCode::BAD_REQUEST, r#"{"status":"error","message":"no Idempotency-Key"}"#).into_response();
    };
    let fault = faults.next(key);
    tokio::time::sleep(faults.delay() + fault.as_ref().map_or(Duration::ZERO, Fault::delay)).await;
    match fault {
        None | Some(Fault::Slow(_)) => answer(received.store(key, &body)),
        Some(Fault::LostAnswer) => {
            received.store(key, &body);
            connection.cut()
        }
        Some(Fault::Reset) => connection.cut(),
        Some(Fault::Answer { status, retry_after, body }) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let mut response = (status, body).into_response();
            if let Some(value) = retry_after.and_then(|v| HeaderValue::try_from(v).ok()) {
                response.headers_mut().insert(header::RETRY_AFTER, value);
            }
            response
        }
    }
}

fn answer(stored: Stored) -> Response {
    match stored {
        Stored::First | Stored::Again => {
            ([(header::CONTENT_TYPE, "application/json")], r#"{"status":"ok"}"#).into_response()
        }
        Stored::Conflict => {
            let body = r#"{"status":"error","message":"this Idempotency-Key was used with another body"}"#;
            (StatusCode::UNPROCESSABLE_ENTITY, body).into_response()
        }
    }
}
