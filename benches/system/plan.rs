//! What is measured and what has to hold: a table of workloads and a table of bars. A new figure is a new line here.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

/// A backlog of rows in the WAL that every reader reads.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Workload {
    /// Its name in tables and bars.
    pub name: &'static str,
    /// Rows of `engagement_events`.
    pub rows: u64,
    /// Rows in each transaction.
    pub per_transaction: u64,
    /// How often each reader reads it; the readers take turns.
    pub rounds: usize,
    /// The readers, in the order of their turns.
    pub readers: &'static [Reader],
}

/// Something that reads a slot from its start to a fixed LSN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Reader {
    /// `pg_recvlogical -f /dev/null`: what every ratio is to.
    Baseline,
    /// decode, enrich, JSON; nothing is kept.
    Discard,
    /// Kafka transactions with the checkpoint inside.
    Kafka,
    /// Parquet batches.
    Archive,
    /// Both sinks.
    Both,
}

impl fmt::Display for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Baseline => "pg_recvlogical -f /dev/null",
            Self::Discard => "decode, enrich, JSON, discard",
            Self::Kafka => "→ Kafka, exactly once",
            Self::Archive => "→ archive (Parquet, zstd)",
            Self::Both => "→ Kafka + archive",
        })
    }
}

impl Reader {
    /// Value of `produce.sinks`; `None` where `produce` does not run.
    pub fn sinks(self) -> Option<&'static str> {
        match self {
            Self::Baseline | Self::Discard => None,
            Self::Kafka => Some("kafka"),
            Self::Archive => Some("archive"),
            Self::Both => Some("kafka,archive"),
        }
    }

    /// Whether it writes events into Kafka.
    pub fn feeds_kafka(self) -> bool {
        matches!(self, Self::Kafka | Self::Both)
    }

    /// Whether it writes events into the archive.
    pub fn feeds_archive(self) -> bool {
        matches!(self, Self::Archive | Self::Both)
    }
}

const ALL: &[Reader] = &[Reader::Baseline, Reader::Discard, Reader::Kafka, Reader::Archive, Reader::Both];

const HUNDRED: &str = "100 rows/tx";
const ONE: &str = "1 row/tx";
const MANY: &str = "100k rows/tx";
const HUGE: &str = "one transaction";

/// The workloads, and how long the latency is measured.
pub fn plan(quick: bool) -> (Vec<Workload>, Duration) {
    let workload =
        |name, rows, per_transaction, rounds, readers| Workload { name, rows, per_transaction, rounds, readers };
    if quick {
        let hundred = workload(HUNDRED, 400_000, 100, 3, ALL);
        let huge = workload(HUGE, 400_000, u64::MAX, 1, &[Reader::Both]);
        return (vec![hundred, huge], Duration::from_secs(18));
    }
    let workloads = vec![
        workload(HUNDRED, 500_000, 100, 5, ALL),
        workload(ONE, 150_000, 1, 3, ALL),
        workload(MANY, 500_000, 100_000, 3, ALL),
        workload(HUGE, 2_000_000, u64::MAX, 1, &[Reader::Both]),
    ];
    (workloads, Duration::from_secs(40))
}

/// Rows a second while latency is measured.
pub const LATENCY_RATE: u64 = 2000;

/// A bar: a figure that has to hold.
#[derive(Clone, Copy, Debug)]
pub struct Bar {
    /// Name of the workload.
    pub workload: &'static str,
    /// Whose figure.
    pub reader: Reader,
    /// Which figure.
    pub limit: Limit,
}

/// A figure and its limit.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// Median rows a second, divided by the baseline's median in the same run.
    RatioAtLeast(f64),
    /// Highest resident memory of the process, in MB (10⁶ bytes).
    PeakRssAtMost(f64),
}

/// All bars. That every sink holds every row once is asked of each run besides.
pub const BARS: [Bar; 5] = [
    Bar { workload: HUNDRED, reader: Reader::Discard, limit: Limit::RatioAtLeast(1.4) },
    Bar { workload: HUNDRED, reader: Reader::Kafka, limit: Limit::RatioAtLeast(0.9) },
    Bar { workload: HUNDRED, reader: Reader::Archive, limit: Limit::RatioAtLeast(1.0) },
    Bar { workload: HUNDRED, reader: Reader::Both, limit: Limit::RatioAtLeast(0.7) },
    Bar { workload: HUGE, reader: Reader::Both, limit: Limit::PeakRssAtMost(200.0) },
];
