//! How fast, and how far: the rate limit and what is told on the way.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::info;

/// How often a line is written.
const LINE: Duration = Duration::from_secs(5);
/// How often the bar of a terminal is drawn.
const DRAWN: Duration = Duration::from_millis(250);
/// Width of the bar.
const WIDTH: usize = 30;

/// Rows a second, over all lanes together.
pub(super) struct Pace {
    rate: Option<u64>,
    /// When the next row is due.
    next: Mutex<Option<Instant>>,
}

impl Pace {
    pub fn new(rate: Option<u64>) -> Self {
        Self { rate, next: Mutex::default() }
    }

    /// After how many rows a lane asks again.
    pub fn step(&self, most: u64) -> u64 {
        self.rate.map_or(most, |rate| (rate / 20).clamp(1, most))
    }

    /// How long a lane has to rest that has read `rows` at `now`.
    pub fn rest(&self, rows: u64, now: Instant) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let due = next.map_or(now, |next| next.max(now)) + Duration::from_secs_f64(rows as f64 / rate as f64);
        *next = Some(due);
        due.saturating_duration_since(now)
    }
}

/// What is told while it runs.
pub(super) struct Progress {
    /// Rows of this run.
    pub rows: AtomicU64,
    /// Rows of earlier runs, that the sinks have.
    before: u64,
    /// All rows, as the planner guesses.
    expected: u64,
    since: Instant,
}

impl Progress {
    pub fn new(before: u64, expected: u64) -> Self {
        Self { rows: AtomicU64::new(0), before, expected, since: Instant::now() }
    }

    /// Tells how far it is, over and over. Never ends.
    pub async fn tell(&self) -> std::convert::Infallible {
        let terminal = std::io::stderr().is_terminal();
        loop {
            tokio::time::sleep(if terminal { DRAWN } else { LINE }).await;
            let line = self.line(self.since.elapsed());
            if terminal {
                let _ = write!(std::io::stderr(), "\r\x1b[2K{} {line}", self.bar());
            } else {
                info!("{line}");
            }
        }
    }

    /// How long it has taken.
    pub fn seconds(&self) -> f64 {
        self.since.elapsed().as_secs_f64()
    }

    /// Removes the bar of a terminal.
    pub fn end(&self) {
        if std::io::stderr().is_terminal() {
            let _ = write!(std::io::stderr(), "\r\x1b[2K");
        }
    }

    fn line(&self, elapsed: Duration) -> String {
        let rows = self.rows.load(Relaxed);
        let rate = rows as f64 / elapsed.as_secs_f64().max(0.001);
        let left = self.expected.saturating_sub(self.before + rows);
        let eta = match (rate > 0.0, left) {
            (_, 0) => "soon".to_owned(),
            (true, left) => format!("in {:.0} s", left as f64 / rate),
            (false, _) => "unknown".to_owned(),
        };
        format!("{} of about {} rows, {rate:.0} rows/s, done {eta}", self.before + rows, self.expected)
    }

    fn bar(&self) -> String {
        let done = self.before + self.rows.load(Relaxed);
        let full = (WIDTH as u64 * done).checked_div(self.expected).map_or(WIDTH, |n| WIDTH.min(n as usize));
        format!("[{}{}]", "#".repeat(full), ".".repeat(WIDTH - full))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_together_keep_the_rate() {
        let (pace, now) = (Pace::new(Some(100)), Instant::now());
        assert_eq!(pace.step(1024), 5);
        assert_eq!(pace.rest(50, now), Duration::from_millis(500));
        assert_eq!(pace.rest(50, now), Duration::from_secs(1));
        // What was not used is not made up for.
        assert_eq!(pace.rest(10, now + Duration::from_secs(9)), Duration::from_millis(100));
        assert_eq!((Pace::new(None).step(1024), Pace::new(None).rest(9, now)), (1024, Duration::ZERO));
    }

    #[test]
    fn the_line_says_rows_rate_and_when() {
        let progress = Progress::new(100, 1000);
        progress.rows.store(300, Relaxed);
        assert_eq!(progress.line(Duration::from_secs(3)), "400 of about 1000 rows, 100 rows/s, done in 6 s");
        assert_eq!(progress.bar(), format!("[{}{}]", "#".repeat(12), ".".repeat(18)));
        progress.rows.store(2000, Relaxed);
        assert!(progress.line(Duration::from_secs(3)).ends_with("done soon"));
        assert_eq!(Progress::new(0, 0).bar(), format!("[{}]", "#".repeat(WIDTH)));
    }
}
