//! falaj streams Postgres changes, exactly once, to Kafka, Parquet/BigQuery, Redis and HTTP, from one LSN.
//!
//! Modules in the order a change meets them.

pub mod archive; //     names of batches and files
pub mod error; //       what can go wrong, by what is done about it
pub mod lsn; //         places in the WAL
pub mod schema; //      relations and types

pub mod pgoutput; //    bytes → Message: pure, total
pub mod source; //      Postgres: connections, the slot, the stream, the catalogue
pub mod value; //       one cell, to the forms the sinks need

pub mod change; //      numbered changes
pub mod enrich; //      the lookup fold, derived columns
pub mod envelope; //    the same in Debezium's envelope
pub mod event; //       one event and its bytes
pub mod message; //     pg_logical_emit_message, as events
pub mod playback; //    the archive read back: Parquet → events
pub mod sink; //        outlets of produce

pub mod bookmark; //    a copy of the slot, with its lookup rows
pub mod check; //       every requirement: found, needed, fix
pub mod init; //        publication, topics, slot, first lookup state

pub mod backfill; //    history → sinks, beside the stream
pub mod consume; //     Kafka → Redis board, Kafka → outside HTTP system
pub mod generate; //    seeded load
pub mod mock_external; // the simulated outside system
pub mod produce; //     slot → sinks: the one loop
pub mod replay; //      archive → a sink, once more
pub mod upload; //      archive → BigQuery
pub mod verify; //      source against sinks

mod dashboard; //       the page of the HTTP listener
pub mod demo; //        the whole system in one terminal
pub mod http; //        livez, readyz, metrics, status, board, dashboard over HTTP
pub mod metrics; //     the figures of this process
pub mod run; //         produce, consume and upload in one process
pub mod status; //      where everything stands
pub mod tap; //         events as they become readable
pub mod top; //         where everything stands, again and again

pub mod cli; //         the command line
pub mod config; //      defaults < file < environment < flags
pub mod kafka; //       what every Kafka client shares
pub mod world; //       what main injects; the one retry policy
