//! What the sinks must hold, computed by Postgres alone: see oracle.sql.

use falaj::lsn::Lsn;

use super::{DEADLINE, Pipeline};

/// Adds the ledger and its triggers, and a slot of its own that says in which order transactions were committed.
///
/// Call it before the first row is written, and before or after `init`.
pub async fn install(pipeline: &Pipeline) {
    pipeline.run(include_str!("../../sql/01_tables.sql")).await;
    pipeline.run(include_str!("oracle.sql")).await;
}

/// Starts to follow; the publication must be there.
pub async fn follow(pipeline: &Pipeline) {
    pipeline.run("SELECT pg_create_logical_replication_slot(current_database() || '_oracle', 'pgoutput')").await;
}

/// The expected events of one table.
pub struct Expected {
    /// Record key and body, in the order of the ids.
    pub events: Vec<(String, String)>,
}

impl Expected {
    pub fn bodies(&self) -> Vec<String> {
        self.events.iter().map(|(_, body)| body.clone()).collect()
    }
}

/// Every event of `table` from transactions with end_lsn ≤ `upto`.
pub async fn expected(pipeline: &Pipeline, table: &str, upto: Lsn) -> Expected {
    let reading = async {
        // Two transactions: within one, decoding sees the catalogue as it was and loses the files of a truncated table.
        pipeline.run(&format!("SELECT oracle_commits('{upto}')")).await;
        pipeline.run("SELECT oracle_number(); ANALYZE numbered").await;
        pipeline.sql.query(&format!("SELECT key, body FROM oracle_{table} ORDER BY id"), &[]).await.unwrap()
    };
    let rows = tokio::time::timeout(DEADLINE, reading).await.expect("the oracle answers in time");
    Expected { events: rows.iter().map(|row| (row.get(0), row.get(1))).collect() }
}
