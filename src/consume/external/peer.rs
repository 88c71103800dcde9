//! The outside system: one POST an event, again until there is an answer that is final.

use std::error::Error as _;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use metrics::{counter, gauge, histogram};
use reqwest::header::{CONTENT_TYPE, HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{Client, Response, Url};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::answer::{Answer, LONGEST_BODY, Verdict, judge};
use crate::config::External;
use crate::error::{Error, Result};
use crate::world::{Health, World, backoff_from};

/// Delay before the first repeat. Short, because the other events of that key wait behind it.
const FIRST_DELAY: Duration = Duration::from_millis(20);
/// How often, at least, a success whose body says "error" is tried before the event becomes a dead letter: where answers take
/// long, the time alone may be over with the first.
const ERROR_BODIES: u32 = 5;
/// So many requests in a row without an acceptable answer mean that the peer does not accept: not ready.
const MISSES: u32 = 5;
/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(5);

/// What has become of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The peer has it.
    Delivered,
    /// The peer will never take it, and why.
    Refused(String),
    /// Given up because of a shutdown or a rebalance; whoever owns the partition next sends it again.
    Abandoned,
}

/// The outside system at one address.
pub struct Peer {
    http: Client,
    url: Url,
    turns: Semaphore,
    /// How long, at least, a success whose body says "error" is tried.
    error_patience: Duration,
    acceptance: Acceptance,
    /// Whether there has been any answer so far.
    answered: AtomicBool,
    stop: CancellationToken,
}

impl Peer {
    /// Checks the address; connects to nothing yet.
    ///
    /// # Errors
    /// [`Error::Refused`] for an address that is none.
    pub fn new(world: &World) -> Result<Self> {
        let config = &world.config.external;
        let url = parse_url(&config.url)?;
        let http = client(config, url.scheme() == "https")?;
        let acceptance = Acceptance { misses: AtomicU32::new(0), health: world.health.clone() };
        let turns = Semaphore::new(config.in_flight.min(Semaphore::MAX_PERMITS));
        let (error_patience, answered) = (config.error_patience.0, AtomicBool::new(false));
        Ok(Self { http, url, turns, error_patience, acceptance, answered, stop: world.stop.clone() })
    }

    /// The address for messages, as [`shown`].
    pub fn shown_url(&self) -> String {
        shown(&self.url)
    }

    /// Waits until something accepts connections at the address. Behind an HTTP proxy that says nothing and is left out.
    ///
    /// # Errors
    /// [`Error::Unreachable`] after the patience that a start has.
    pub async fn reach(&self, world: &World) -> Result<()> {
        if proxied() {
            return Ok(());
        }
        let host = self.url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let port = self.url.port_or_known_default().unwrap_or(80);
        let what = || format!("the outside system at {}", self.shown_url());
        world
            .at_start("external", async || {
                match tokio::time::timeout(CONNECT, TcpStream::connect((host, port))).await {
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err(e)) => Err(Error::unreachable(what(), e)),
                    Err(_) => Err(Error::unreachable(what(), format!("no connection within {CONNECT:?}"))),
                }
            })
            .await
    }

    /// Sends an event until there is a final answer. Dropping it abandons the request.
    ///
    /// # Errors
    /// [`Error::Refused`] when TLS fails before the peer has ever answered: the address or a certificate is wrong.
    pub async fn deliver(&self, id: &str, body: &Bytes) -> Result<Outcome> {
        let mut delays = backoff_from(FIRST_DELAY);
        let mut error_bodies = 0;
        let mut first_error: Option<Instant> = None;
        for attempt in 1_u32.. {
            let (kind, reason, after) = match self.turn(id, body).await? {
                None => return Ok(Outcome::Abandoned),
                Some(Verdict::Delivered) => return Ok(Outcome::Delivered),
                Some(Verdict::Refused(reason)) => return Ok(Outcome::Refused(reason)),
                Some(Verdict::Error(reason)) => {
                    error_bodies += 1;
                    let lasting = first_error.get_or_insert_with(Instant::now).elapsed();
                    if error_bodies >= ERROR_BODIES && lasting >= self.error_patience {
                        return Ok(Outcome::Refused(format!("{reason} ({error_bodies} times)")));
                    }
                    ("error_body", reason, None)
                }
                Some(Verdict::Again { kind, reason, after }) => (kind, reason, after),
            };
            counter!("falaj_external_retries_total", "reason" => kind).increment(1);
            let delay = delays.next().unwrap_or_default() + after.unwrap_or_default();
            if attempt.is_power_of_two() && attempt >= 8 {
                warn!(id, attempt, reason, ?delay, "an event is not accepted yet");
            } else {
                debug!(id, attempt, reason, ?delay, "sending again");
            }
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.stop.cancelled() => return Ok(Outcome::Abandoned),
            }
        }
        Ok(Outcome::Abandoned)
    }

    /// One request, when it is its turn. `None` when a shutdown comes before that.
    async fn turn(&self, id: &str, body: &Bytes) -> Result<Option<Verdict>> {
        let _permit = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Ok(None),
            permit = self.turns.acquire() => permit.map_err(|e| Error::fatal("waiting for a request's turn", e))?,
        };
        let _counted = InFlight::new();
        let began = Instant::now();
        let answer = self.request(id, body).await;
        histogram!("falaj_external_request_seconds").record(began.elapsed());
        let verdict = match answer {
            Ok(verdict) => {
                self.answered.store(true, Ordering::Relaxed);
                verdict
            }
            Err(e) => match tls_error(&e) {
                Some(why) if !self.answered.load(Ordering::Relaxed) => return Err(self.tls_refused(why)),
                _ => no_answer(&e),
            },
        };
        self.acceptance.note(&verdict);
        Ok(Some(verdict))
    }

    /// Nothing is to be sent: whether the outside system accepts is not for this process to tell.
    pub fn rest(&self) {
        self.acceptance.misses.store(0, Ordering::Relaxed);
        self.acceptance.health.mend("external");
    }

    fn tls_refused(&self, why: &rustls::Error) -> Error {
        Error::refused(
            "external_tls",
            format!("{}: {why}", self.shown_url()),
            "a TLS server whose certificate an authority of this machine has signed for that name",
            "mend external.url, or add the authority to the machine's certificates (SSL_CERT_FILE)",
        )
    }

    async fn request(&self, id: &str, body: &Bytes) -> reqwest::Result<Verdict> {
        let request = self.http.post(self.url.clone()).header(CONTENT_TYPE, "application/json");
        let mut response = request.header("Idempotency-Key", id).body(body.clone()).send().await?;
        let answered = read_body(&mut response).await?;
        let header = |name| text(response.headers(), name);
        let answer = Answer {
            status: response.status().as_u16(),
            retry_after: header(RETRY_AFTER),
            location: header(LOCATION),
            body: &answered,
        };
        Ok(judge(&answer, SystemTime::now()))
    }
}

/// Whether the peer accepts, for /readyz: one log line when that changes, not one a request.
struct Acceptance {
    misses: AtomicU32,
    health: Health,
}

impl Acceptance {
    fn note(&self, verdict: &Verdict) {
        let Verdict::Again { reason, .. } = verdict else {
            if self.misses.swap(0, Ordering::Relaxed) >= MISSES {
                info!("the outside system accepts again");
            }
            return self.health.ok("external");
        };
        let misses = self.misses.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if misses == MISSES {
            warn!(reason, "the outside system does not accept; sending again until it does");
        }
        if misses >= MISSES {
            self.health.failing("external", reason);
        }
    }
}

/// A gauge that goes down again also when the request is abandoned.
struct InFlight;

impl InFlight {
    fn new() -> Self {
        gauge!("falaj_external_in_flight_requests").increment(1);
        Self
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        gauge!("falaj_external_in_flight_requests").decrement(1);
    }
}

fn client(config: &External, tls: bool) -> Result<Client> {
    let mut builder = Client::builder()
        .user_agent(concat!("falaj/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .tcp_nodelay(true)
        .timeout(config.timeout.0)
        .connect_timeout(config.timeout.0.min(CONNECT))
        .pool_max_idle_per_host(config.in_flight);
    if tls {
        // The machine's own authorities count beside the built-in ones: an outside system is often inside a company.
        let native = rustls_native_certs::load_native_certs().certs;
        let known = native.iter().filter_map(|c| reqwest::Certificate::from_der(c).ok());
        builder = known.fold(builder, reqwest::ClientBuilder::add_root_certificate);
    }
    builder.build().map_err(|e| Error::fatal("preparing the HTTP client", e))
}

/// The address without credentials; what follows `?` may be one.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    // Both fail only for addresses that cannot hold credentials in the first place.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.into()
}

fn parse_url(text: &str) -> Result<Url> {
    let bad = |why: String| {
        // It may hold a password.
        let found = format!("external.url: {why}");
        Error::refused("external_url", found, "an http:// or https:// address", "mend external.url")
    };
    let url = Url::parse(text).map_err(|e| bad(e.to_string()))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        other => Err(bad(format!("scheme {other}"))),
    }
}

fn proxied() -> bool {
    let names = ["http_proxy", "https_proxy", "all_proxy"];
    names.iter().any(|n| std::env::var_os(n).is_some() || std::env::var_os(n.to_ascii_uppercase()).is_some())
}

/// Reads to the end, so that the connection can be used again, or to [`LONGEST_BODY`].
async fn read_body(response: &mut Response) -> reqwest::Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        let room = LONGEST_BODY - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if body.len() == LONGEST_BODY {
            break;
        }
    }
    Ok(body)
}

fn text(headers: &HeaderMap, name: reqwest::header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|v| v.to_str().ok())
}

/// The TLS error among the causes of an error. An `io::Error` does not name what it holds as its source, and may hold another; of
/// an error that is shared, as in the client of Redis, the pointer alone is a source.
pub(crate) fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let shared = error.downcast_ref::<Arc<dyn std::error::Error + Send + Sync>>().map(|e| &**e);
    let held = shared.or_else(|| error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref));
    let cause = held.map(|e| e as &(dyn std::error::Error + 'static)).or_else(|| error.source());
    error.downcast_ref().or_else(|| tls_error(cause?))
}

/// No answer, or half of one: the peer may have the event or not, so that it is sent again.
fn no_answer(error: &reqwest::Error) -> Verdict {
    let kind = match error {
        e if e.is_timeout() => "timeout",
        e if e.is_connect() => "connect",
        _ => "reset",
    };
    let mut reason = kind.to_owned();
    let mut cause = error.source();
    while let Some(e) = cause {
        let _ = write!(reason, ": {e}");
        cause = e.source();
    }
    Verdict::Again { kind, reason, after: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_without_what_may_be_secret() {
        let url = parse_url("http://user:S3CRET@h:1/events?token=S3CRET").unwrap();
        assert_eq!(shown(&url), "http://h:1/events");
    }

    #[test]
    fn an_address_that_is_none_is_refused() {
        for bad in ["", "127.0.0.1:8088", "ftp://x/", "http://", "/events"] {
            assert_eq!(parse_url(bad).unwrap_err().exit_code(), 78, "{bad}");
        }
        assert_eq!(parse_url("http://[::1]:8088/events").unwrap().port(), Some(8088));
    }
}
