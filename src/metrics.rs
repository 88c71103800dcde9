//! The figures of this process: one Prometheus recorder, installed once by `main`, and a reader of what it renders.
//!
//! Roles count with the macros of the `metrics` crate. Names are `falaj_<role>_<what>_<unit|total>`; times are in seconds,
//! sizes in bytes.

use std::time::Duration;

use metrics::Unit;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use crate::error::{Error, Result};

/// Upper bounds of every histogram, in seconds: fine where commit → visible lies, up to a long load job.
const BUCKETS: &[f64] = &[
    0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5,
    2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0,
];
/// How often samples of histograms are folded into their buckets; without it they pile up until somebody asks.
const UPKEEP: Duration = Duration::from_secs(5);

/// Installs the recorder. Within a tokio runtime, whose end stops the upkeep.
///
/// # Errors
/// [`Error::Fatal`] when there is a recorder already.
pub fn install() -> Result<PrometheusHandle> {
    let failed = |e: &dyn std::fmt::Display| Error::fatal("installing the metrics recorder", e);
    let builder = PrometheusBuilder::new().set_buckets(BUCKETS).map_err(|e| failed(&e))?;
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|e| failed(&e))?;
    describe();
    let kept = handle.clone();
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(UPKEEP);
        loop {
            tick.tick().await;
            kept.run_upkeep();
        }
    });
    Ok(handle)
}

/// The help lines of `/metrics`.
fn describe() {
    for (name, help) in COUNTERS {
        metrics::describe_counter!(*name, Unit::Count, *help);
    }
    for (name, help) in GAUGES {
        metrics::describe_gauge!(*name, *help);
    }
    for (name, help) in HISTOGRAMS {
        metrics::describe_histogram!(*name, Unit::Seconds, *help);
    }
}

const COUNTERS: &[(&str, &str)] = &[
    ("falaj_produce_events_total", "Row changes that the stream has brought."),
    ("falaj_produce_lookup_hits_total", "Events whose lookup row was found."),
    ("falaj_produce_lookup_misses_total", "Events without a lookup row: their lookup columns are NULL."),
    ("falaj_produce_restarts_total", "Sessions that were begun again from the stored positions."),
    ("falaj_produce_kafka_bytes_total", "Bytes of keys and values committed to Kafka."),
    ("falaj_produce_archive_batches_total", "Batches sealed in the archive."),
    ("falaj_produce_archive_bytes_total", "Bytes of Parquet files sealed in the archive."),
    ("falaj_consume_redis_events_total", "Events applied to the board."),
    ("falaj_consume_redis_batches_total", "Scripts that applied a batch to the board."),
    ("falaj_consume_redis_refused_batches_total", "Batches that Redis did not take because it stood elsewhere."),
    ("falaj_consume_redis_malformed_total", "Records that are no engagement events, and are not on the board."),
    ("falaj_consume_redis_rebalances_total", "Times that its group gave a board's reader partitions or took them."),
    ("falaj_consume_redis_late_dropped_total", "Events left out because they were too old at their commit."),
    ("falaj_consume_redis_future_dropped_total", "Events left out because they lay too far ahead of their commit."),
    ("falaj_external_delivered_total", "Events that the outside system has taken."),
    ("falaj_external_retries_total", "Requests that are made again, by reason."),
    ("falaj_external_dead_letters_total", "Events that the outside system has finally refused."),
    ("falaj_external_history_skipped_total", "Rows of a backfill that are not sent."),
    ("falaj_external_expired_records_total", "Records that Kafka deleted before they were delivered."),
    ("falaj_upload_jobs_total", "Load jobs that have loaded their rows."),
    ("falaj_upload_jobs_failed_total", "Load jobs that have failed and loaded nothing."),
    ("falaj_upload_rows_total", "Rows loaded."),
    ("falaj_upload_bytes_total", "Bytes of Parquet sent to load jobs."),
    ("falaj_upload_table_failures_total", "Rounds in which a table could not be loaded."),
    ("falaj_generate_rows_total", "Engagement rows committed by the generator."),
    ("falaj_generate_rolled_back_rows_total", "Engagement rows that the generator rolled back."),
    ("falaj_generate_transactions_total", "Transactions of the generator."),
    ("falaj_generate_retries_total", "Transactions that the generator began again because the connection was lost."),
];

const GAUGES: &[(&str, &str)] = &[
    ("falaj_produce_lag_bytes", "WAL between what the stream has brought and what a sink has durably."),
    ("falaj_produce_lag_seconds", "Age of the oldest commit that a sink does not have durably."),
    ("falaj_produce_lookup_rows", "Rows in the lookup cache."),
    ("falaj_consume_redis_lag_records", "Records of a partition that the board has not applied."),
    ("falaj_consume_redis_partitions", "Partitions that this process feeds the board from."),
    ("falaj_external_waiting_events", "Events read from Kafka and not yet delivered."),
    ("falaj_external_in_flight_requests", "Requests under way to the outside system."),
    ("falaj_upload_pending_batches", "Sealed files of a table that are not loaded, of the stream and of history."),
    ("falaj_upload_loaded_lsn", "Commit LSN of the last row loaded into a table, as a number."),
];

const HISTOGRAMS: &[(&str, &str)] = &[
    ("falaj_produce_kafka_transaction_seconds", "From a Kafka transaction's begin to its commit."),
    ("falaj_consume_redis_apply_seconds", "Duration of applying batches to Redis."),
    ("falaj_consume_redis_commit_to_applied_seconds", "From the commit in Postgres until visible on the board."),
    ("falaj_external_latency_seconds", "From the commit in Postgres until delivered to the outside system."),
    ("falaj_external_request_seconds", "Duration of one request to the outside system."),
    ("falaj_upload_job_seconds", "Duration of one load job, upload included."),
];

/// One reading of the recorder: every sample by name and labels.
#[derive(Clone, Debug, Default)]
pub struct Reading(Vec<Sample>);

#[derive(Clone, Debug, PartialEq)]
struct Sample {
    name: String,
    labels: String,
    value: f64,
}

impl Reading {
    /// What the recorder has now.
    pub fn take(handle: &PrometheusHandle) -> Self {
        Self::parse(&handle.render())
    }

    fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(sample).collect())
    }

    /// The sum over all labels; 0 for a name that nothing was counted under.
    pub fn total(&self, name: &str) -> f64 {
        self.0.iter().filter(|s| s.name == name).fold(0.0, |sum, s| sum + s.value)
    }

    /// The value with one label, as in `("falaj_produce_lag_bytes", "sink", "kafka")`.
    pub fn labelled(&self, name: &str, label: &str, value: &str) -> Option<f64> {
        let wanted = format!("{label}=\"{value}\"");
        self.0.iter().find(|s| s.name == name && s.labels.split(',').any(|l| l == wanted)).map(|s| s.value)
    }

    /// A quantile of what a histogram has got since `before`, in seconds, interpolated within its bucket; `None` without samples.
    pub fn quantile_since(&self, before: &Self, name: &str, quantile: f64) -> Option<f64> {
        let bucket = format!("{name}_bucket");
        let mut bounds: Vec<(f64, f64)> =
            self.0.iter().filter(|s| s.name == bucket).filter_map(|s| Some((bound(s)?, s.value))).collect();
        for (le, count) in &mut bounds {
            let earlier = before.0.iter().filter(|s| s.name == bucket && bound(s) == Some(*le));
            *count -= earlier.map(|s| s.value).sum::<f64>();
        }
        let all = bounds.last()?.1;
        let wanted = all * quantile;
        let at = bounds.iter().position(|(_, count)| *count >= wanted && *count > 0.0)?;
        let (low, below) = if at == 0 { (0.0, 0.0) } else { bounds[at - 1] };
        let (high, count) = bounds[at];
        if high.is_infinite() { Some(low) } else { Some(low + (high - low) * (wanted - below) / (count - below)) }
    }
}

fn bound(sample: &Sample) -> Option<f64> {
    sample.labels.split(',').find_map(|l| l.strip_prefix("le=\"")?.strip_suffix('"')?.parse().ok())
}

/// `name{labels} value` or `name value`.
fn sample(line: &str) -> Option<Sample> {
    let (series, value) = line.rsplit_once(' ').filter(|_| !line.starts_with('#'))?;
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    Some(Sample { name: name.to_owned(), labels: labels.strip_suffix('}')?.to_owned(), value: value.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# HELP a_total all\n# TYPE a_total counter\na_total{table=\"x\",kind=\"k\"} 3\na_total{table=\"y\"} 4\n\n\
        b_seconds_bucket{le=\"0.01\"} 10\nb_seconds_bucket{le=\"0.02\"} 20\nb_seconds_bucket{le=\"+Inf\"} 20\nb_seconds_sum 0.2\n";

    #[test]
    fn a_reading_finds_sums_labels_and_quantiles() {
        let reading = Reading::parse(TEXT);
        assert_eq!(reading.total("a_total"), 7.0);
        assert_eq!(reading.total("none_total").to_string(), "0");
        assert_eq!(reading.labelled("a_total", "table", "y"), Some(4.0));
        assert_eq!(reading.labelled("a_total", "table", "z"), None);
        let none = Reading::default();
        assert_eq!(reading.quantile_since(&none, "b_seconds", 0.5), Some(0.01));
        assert_eq!(reading.quantile_since(&none, "b_seconds", 0.75), Some(0.015));
        assert_eq!(reading.quantile_since(&reading, "b_seconds", 0.5), None);
        assert_eq!(reading.quantile_since(&none, "c_seconds", 0.5), None);
    }

    #[test]
    fn every_bucket_is_above_the_one_before() {
        assert!(BUCKETS.is_sorted_by(|a, b| a < b));
    }
}
