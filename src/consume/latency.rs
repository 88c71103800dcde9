//! How long a committed row takes to be on the board, as the reader measures it and the report shows it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hdrhistogram::Histogram;
use serde::Serialize;

/// Latencies beyond this count as this, in microseconds: an hour says enough.
const MAX_MICROS: u64 = 3_600_000_000;

/// What was applied since the last report. Shared by the reader, which records, and the report, which takes.
pub struct Latency(Mutex<Interval>);

struct Interval {
    histogram: Histogram<u64>,
    malformed: u64,
}

/// Commit → applied over one interval, in milliseconds; `None` when nothing was applied.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Events applied, with those that were left out.
    pub events: u64,
    /// Records that are no events.
    pub malformed: u64,
    /// Percentiles.
    pub latency_ms: Option<Percentiles>,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Percentiles {
    /// Half of the events took no longer.
    pub p50: f64,
    /// 95 of 100.
    pub p95: f64,
    /// 99 of 100.
    pub p99: f64,
    /// None took longer.
    pub max: f64,
}

impl Latency {
    /// Nothing recorded.
    pub fn new() -> Self {
        // Three significant digits; the constructor refuses only bounds and digits that make no sense.
        let histogram = Histogram::new_with_bounds(1, MAX_MICROS, 3).expect("the bounds are constants");
        Self(Mutex::new(Interval { histogram, malformed: 0 }))
    }

    /// `events` were applied `micros` after their commit.
    pub fn record(&self, micros: i64, events: u64) {
        let micros = u64::try_from(micros).unwrap_or(0).clamp(1, MAX_MICROS);
        self.interval().histogram.saturating_record_n(micros, events);
    }

    /// A record was no event.
    pub fn malformed(&self) {
        self.interval().malformed += 1;
    }

    /// What was recorded since the last call.
    pub fn take(&self) -> Report {
        let mut interval = self.interval();
        let milliseconds = |micros: u64| micros as f64 / 1000.0;
        let at = |q| milliseconds(interval.histogram.value_at_quantile(q));
        let report = Report {
            events: interval.histogram.len(),
            malformed: interval.malformed,
            latency_ms: (!interval.histogram.is_empty()).then(|| Percentiles {
                p50: at(0.50),
                p95: at(0.95),
                p99: at(0.99),
                max: milliseconds(interval.histogram.max()),
            }),
        };
        interval.histogram.reset();
        interval.malformed = 0;
        report
    }

    fn interval(&self) -> MutexGuard<'_, Interval> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Latency {
    fn default() -> Self {
        Self::new()
    }
}
