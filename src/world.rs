//! What `main` injects into a role: configuration, the shutdown token, health; and the one retry policy.

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::config::Config;
use crate::error::{Error, Result};

/// How long a server may stay unreachable at the start before the verb gives up with exit code 69.
pub const START_PATIENCE: Duration = Duration::from_secs(30);

/// How long a server may take to answer what it was asked before a shutdown.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// Everything a role gets from outside.
#[derive(Clone)]
pub struct World {
    /// The whole configuration, parsed and checked.
    pub config: Arc<Config>,
    /// Cancelled by the first SIGTERM or SIGINT: drain and return `Ok`.
    pub stop: CancellationToken,
    /// What /readyz answers from.
    pub health: Health,
}

/// Named checks, each passing or failing with a reason. Cheap to clone; all clones share one state.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<BTreeMap<&'static str, Option<String>>>>);

impl Health {
    /// The check passes.
    pub fn ok(&self, check: &'static str) {
        self.set(check, None);
    }

    /// The check fails; the process is not ready meanwhile.
    pub fn failing(&self, check: &'static str, why: impl ToString) {
        self.set(check, Some(why.to_string()));
    }

    /// A check that has failed passes again, because nobody tries any more; one that nobody has tried stays unknown.
    pub fn mend(&self, check: &'static str) {
        if let Some(state) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get_mut(check) {
            *state = None;
        }
    }

    /// Every check with its reason for failing, `None` where it passes.
    pub fn report(&self) -> BTreeMap<&'static str, Option<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, check: &'static str, state: Option<String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(check, state);
    }
}

/// The one retry policy: 100 ms doubling to 5 s, with jitter, without end.
pub fn backoff() -> ExponentialBackoff {
    backoff_from(Duration::from_millis(100))
}

/// The same policy with another first delay.
pub fn backoff_from(first: Duration) -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(first)
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times()
        .build()
}

/// For blocking loops, which nobody can cancel.
///
/// # Errors
/// [`Error::Fatal`] once the shutdown has been asked for.
pub fn go_on(stop: &CancellationToken) -> Result<()> {
    match stop.is_cancelled() {
        true => Err(Error::Fatal("shut down before everything was read".into())),
        false => Ok(()),
    }
}

/// Writes to stdout. A pipe whose reader has seen enough is no error.
///
/// # Errors
/// [`Error::Fatal`] when stdout cannot be written.
pub fn print(text: &str) -> Result<()> {
    print_on(text).map(drop)
}

/// As [`print()`]; says whether somebody still reads.
///
/// # Errors
/// As [`print()`].
pub fn print_on(text: impl AsRef<[u8]>) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_ref()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).map_err(|e| Error::fatal("writing to stdout", e)),
    }
}

/// Shows a view in the place of the one before, as much of it as the terminal has lines for; where stdout is no terminal,
/// below it, whole. Says whether somebody still reads.
///
/// # Errors
/// As [`print()`].
pub fn redraw(view: &str) -> Result<bool> {
    let out = std::io::stdout();
    if !out.is_terminal() {
        return print_on(view);
    }
    let lines = rustix::termios::tcgetwinsize(out).map_or(0, |size| usize::from(size.ws_row));
    // A terminal that does not know its size gets all.
    let room = lines.checked_sub(1).unwrap_or(usize::MAX);
    let mut text = "\x1b[H\x1b[?7l".to_owned();
    for line in view.lines().take(room) {
        text.extend([line, "\x1b[K\n"]);
    }
    print_on(text + "\x1b[?7h\x1b[J")
}

impl World {
    /// Tries `op` until it succeeds, fails for good, or [`START_PATIENCE`] is over. For the first contact with a server.
    ///
    /// # Errors
    /// The last error of `op`; a shutdown meanwhile gives that error too.
    pub async fn at_start<T, F: Future<Output = Result<T>>>(
        &self,
        check: &'static str,
        op: impl FnMut() -> F,
    ) -> Result<T> {
        self.retry(check, Some(Instant::now() + START_PATIENCE), op).await
    }

    /// Tries `op` until it succeeds or fails for good. For outages of a server that was there before.
    ///
    /// # Errors
    /// An error of `op` that is not transient; the last one when a shutdown comes meanwhile.
    pub async fn for_ever<T, F: Future<Output = Result<T>>>(
        &self,
        check: &'static str,
        op: impl FnMut() -> F,
    ) -> Result<T> {
        self.retry(check, None, op).await
    }

    async fn retry<T, F: Future<Output = Result<T>>>(
        &self,
        check: &'static str,
        until: Option<Instant>,
        mut op: impl FnMut() -> F,
    ) -> Result<T> {
        let mut delays = backoff();
        loop {
            let error = match self.answer(check, op()).await {
                Ok(value) => {
                    self.health.ok(check);
                    return Ok(value);
                }
                Err(error) => error,
            };
            self.health.failing(check, &error);
            let delay = delays.next().unwrap_or(Duration::from_secs(5));
            if !error.is_transient() || until.is_some_and(|t| Instant::now() + delay > t) {
                return Err(error);
            }
            warn!(%error, ?delay, "trying again");
            if self.pause(delay).await.is_err() {
                return Err(error);
            }
        }
    }

    /// How a role ends: where it was shut down, a server that was away then is no failure.
    ///
    /// # Errors
    /// That of the role, unless it is transient and a shutdown came.
    pub fn ended(&self, outcome: Result<()>) -> Result<()> {
        match outcome {
            Err(e) if e.is_transient() && self.stop.is_cancelled() => Ok(()),
            outcome => outcome,
        }
    }

    /// Writes to stdout from another thread: who takes nothing of it must not hold up a shutdown. Says whether somebody still reads.
    ///
    /// # Errors
    /// Those of `write`; [`Error::Unreachable`] when it has not come to its end some seconds after a shutdown.
    pub async fn show(&self, write: impl FnOnce() -> Result<bool> + Send + 'static) -> Result<bool> {
        let written = tokio::task::spawn_blocking(write);
        self.answer("stdout", async { written.await.map_err(|e| Error::fatal("writing to stdout", e))? }).await
    }

    /// The outcome of a request; after a shutdown it is not waited for much longer.
    async fn answer<T>(&self, check: &str, request: impl Future<Output = Result<T>>) -> Result<T> {
        let mut request = std::pin::pin!(request);
        tokio::select! {
            biased;
            outcome = &mut request => return outcome,
            () = self.stop.cancelled() => {}
        }
        let late = |_| Error::unreachable(check, "no answer at the shutdown");
        tokio::time::timeout(STOP_PATIENCE, request).await.map_err(late)?
    }

    /// Waits, but not past a shutdown.
    ///
    /// # Errors
    /// [`Error::Fatal`] when the shutdown came first.
    pub async fn pause(&self, delay: Duration) -> Result<()> {
        tokio::select! {
            () = tokio::time::sleep(delay) => Ok(()),
            () = self.stop.cancelled() => Err(Error::Fatal("shut down while waiting".into())),
        }
    }
}
