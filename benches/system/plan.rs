//! What is measured: a table of workloads. A new one is a new line here; what has to hold is in `bars.rs`.

use std::fmt;

use serde::Serialize;

use crate::parts::Parts;
use crate::shape::Shape;

/// A backlog of rows in the WAL that every reader reads.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Workload {
    /// Its name in tables and bars.
    pub name: &'static str,
    /// What the rows are.
    pub shape: Shape,
    /// Number of rows.
    pub rows: u64,
    /// Rows in each transaction.
    pub per_transaction: u64,
    /// How often each reader reads it; the readers take turns.
    pub rounds: usize,
    /// The readers, in the order of their turns.
    pub readers: &'static [Reader],
    /// Readers that come last in every second round, from the first one on: they take long.
    pub peers: &'static [Reader],
}

/// Something that reads a slot from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Reader {
    /// `pg_recvlogical -f /dev/null`: what most ratios are to.
    Baseline,
    /// decode, enrich, JSON; nothing is kept.
    Discard,
    /// Kafka transactions with the checkpoint inside.
    Kafka,
    /// Parquet batches.
    Archive,
    /// Both sinks.
    Both,
    /// mq-bridge to Kafka.
    MqBridgeKafka,
    /// mq-bridge to Parquet files.
    MqBridgeParquet,
    /// Debezium in a standalone worker.
    Debezium,
    /// Debezium in a distributed worker, with Kafka transactions.
    DebeziumExactlyOnce,
}

impl fmt::Display for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Baseline => "pg_recvlogical -f /dev/null",
            Self::Discard => "decode, enrich, JSON, discard",
            Self::Kafka => "→ Kafka, exactly once",
            Self::Archive => "→ archive (Parquet, zstd)",
            Self::Both => "→ Kafka + archive",
            Self::MqBridgeKafka => "mq-bridge → Kafka",
            Self::MqBridgeParquet => "mq-bridge → Parquet",
            Self::Debezium => "Debezium → Kafka",
            Self::DebeziumExactlyOnce => "Debezium, exactly once",
        })
    }
}

impl Reader {
    /// Value of `produce.sinks`; `None` where `produce` does not run.
    pub fn sinks(self) -> Option<&'static str> {
        match self {
            Self::Kafka => Some("kafka"),
            Self::Archive => Some("archive"),
            Self::Both => Some("kafka,archive"),
            _ => None,
        }
    }

    /// What `dev/bench/peers/peer` calls it; `None` where it is none.
    pub fn peer(self) -> Option<&'static str> {
        match self {
            Self::MqBridgeKafka => Some("mq-bridge-kafka"),
            Self::MqBridgeParquet => Some("mq-bridge-parquet"),
            Self::Debezium => Some("debezium"),
            Self::DebeziumExactlyOnce => Some("debezium-exactly-once"),
            _ => None,
        }
    }

    /// Whether it writes events into Kafka.
    pub fn feeds_kafka(self) -> bool {
        matches!(self, Self::Kafka | Self::Both | Self::MqBridgeKafka | Self::Debezium | Self::DebeziumExactlyOnce)
    }

    /// Whether it writes events into falaj's archive.
    pub fn feeds_archive(self) -> bool {
        matches!(self, Self::Archive | Self::Both)
    }
}

const ALL: &[Reader] = &[Reader::Baseline, Reader::Discard, Reader::Kafka, Reader::Archive, Reader::Both];
const SINGLE: &[Reader] = &[Reader::Baseline, Reader::Discard, Reader::Kafka, Reader::Archive];
const BOTH: &[Reader] = &[Reader::Both];
const MQ_BRIDGE: &[Reader] = &[Reader::MqBridgeKafka, Reader::MqBridgeParquet];
const PEERS: &[Reader] =
    &[Reader::MqBridgeKafka, Reader::MqBridgeParquet, Reader::Debezium, Reader::DebeziumExactlyOnce];

/// 100 rows in each transaction.
pub const HUNDRED: &str = "100 rows/tx";
/// Each row in a transaction of its own.
pub const ONE: &str = "1 row/tx";
/// Five large transactions.
pub const MANY: &str = "100k rows/tx";
/// One transaction.
pub const HUGE: &str = "one transaction";

/// The workloads of the chosen parts.
pub fn plan(quick: bool, parts: &Parts) -> Vec<Workload> {
    use Shape::{FullUpdates, Inserts, Tables, Wide};
    let workload = |name, shape, rows, per_transaction, rounds, readers| Workload {
        name,
        shape,
        rows,
        per_transaction,
        rounds,
        readers,
        peers: &[],
    };
    let mut workloads = if quick {
        vec![workload(HUNDRED, Inserts, 300_000, 100, 3, ALL), workload(HUGE, Inserts, 400_000, u64::MAX, 1, BOTH)]
    } else {
        vec![
            workload(HUNDRED, Inserts, 500_000, 100, 5, ALL),
            workload(ONE, Inserts, 150_000, 1, 3, ALL),
            workload(MANY, Inserts, 500_000, 100_000, 3, ALL),
            workload(HUGE, Inserts, 2_000_000, u64::MAX, 1, BOTH),
            workload("rows of 4 kB", Wide, 60_000, 100, 3, SINGLE),
            workload("updates, FULL identity", FullUpdates, 200_000, 100, 3, SINGLE),
            workload("20 tables", Tables, 300_000, 100, 3, SINGLE),
        ]
    };
    if !parts.has("speed") {
        // Without the readers beside them the peers' figures would be no ratios.
        workloads.retain(|workload| workload.name == HUNDRED && parts.has("peers"));
    }
    if parts.has("peers") {
        workloads
            .iter_mut()
            .filter(|w| w.name == HUNDRED)
            .for_each(|w| w.peers = if quick { MQ_BRIDGE } else { PEERS });
    }
    workloads
}
