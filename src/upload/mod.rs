//! Sealed Parquet batches → BigQuery load jobs.
