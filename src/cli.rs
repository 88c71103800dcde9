//! The command line: one subcommand a role.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::backfill::JOBS;
use crate::config::{ByteSize, Envelope, SinkName, Span};
use crate::lsn::Lsn;

/// Streams Postgres changes, exactly once, to Kafka, Parquet/BigQuery, Redis and HTTP, from one LSN.
#[derive(Debug, Parser)]
#[command(name = "falaj", version, max_term_width = 110)]
pub struct Cli {
    /// Configuration file; without it ./falaj.toml where that exists, else the defaults
    #[arg(short, long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// The roles.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create publication, slot, lookup state and topics; prints the plan first
    Init(Init),
    /// Try every requirement: found, needed, exact fix
    Check(Json),
    /// Write seeded, realistic engagement load into Postgres
    Generate(Generate),
    /// Slot → decode → enrich → Kafka and Parquet archive
    Produce(Produce),
    /// Copy the rows of a published table as they are now, beside the stream; again the same command goes on where it was
    Backfill(Backfill),
    /// Kafka → Redis board, Kafka → outside HTTP system
    Consume(Consume),
    /// Sealed Parquet batches → BigQuery load jobs
    Upload(Upload),
    /// An LSN range of the archive to a sink, once more, with the same bytes
    Replay(Replay),
    /// Source against sinks, up to an LSN: counts, checksums, and the rows that differ
    Verify(Verify),
    /// Copy the slot as it stands, with its lookup rows; without a name list such copies
    Bookmark(Bookmark),
    /// produce + consume + upload in one process
    Run,
    /// The whole system on one machine, in one terminal
    Demo(Demo),
    /// The live ranking and devices of the last 10 minutes
    Board(Board),
    /// One-shot state of every role's position and lag
    Status(Json),
    /// The same again and again, with rates and the head of the board; Ctrl-C ends it
    Top,
    /// Events as they become readable in Kafka, one a line, from now on
    Tap(Tap),
    /// The simulated outside system: an idempotent receiver with switchable faults
    MockExternal(MockExternal),
    /// Read the slot up to an LSN, encode every event, keep none, acknowledge nothing
    #[command(hide = true)]
    Measure(Measure),
    /// Exit 0 when the local process answers /livez; for containers
    Healthcheck,
}

/// Flags of `init`.
#[derive(Debug, Args)]
pub struct Init {
    /// Carry the plan out without asking
    #[arg(long)]
    pub yes: bool,
    /// Also create the tables of sql/ where they are absent
    #[arg(long)]
    pub with_tables: bool,
    /// Copy the rows that are there already to the sinks, from the snapshot at which the slot begins
    #[arg(long)]
    pub snapshot: bool,
    /// Take over a slot made by hand, or rebuild a lost lookup state from now
    #[arg(long)]
    pub adopt_slot: bool,
    /// Make a slot that Postgres copies to its standbys (17 and later)
    #[arg(long)]
    pub failover: bool,
}

/// Output form.
#[derive(Debug, Args)]
pub struct Json {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Flags of `generate`.
#[derive(Clone, Debug, Args)]
pub struct Generate {
    /// Engagement rows a second; without it as fast as Postgres takes them
    #[arg(long)]
    pub rate: Option<u64>,
    /// Stop after this many committed engagement rows
    #[arg(long)]
    pub count: Option<u64>,
    /// The same seed gives the same rows
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Flags of `produce`.
#[derive(Clone, Debug, Default, Args)]
pub struct Produce {
    /// Feed only these sinks in this run; the others still hold the acknowledgement back
    #[arg(long, value_delimiter = ',', value_name = "kafka,archive")]
    pub sinks: Option<Vec<SinkName>>,
    /// Stop when exactly the transactions with end_lsn ≤ LSN are durable
    #[arg(long, value_name = "LSN")]
    pub until_lsn: Option<Lsn>,
    /// Form of an event's body in Kafka; wins over kafka.envelope
    #[arg(long, value_enum)]
    pub envelope: Option<Envelope>,
    /// Begin a fresh installation here: everything committed below is somewhere else already
    #[arg(long, value_name = "LSN", conflicts_with = "from_bookmark")]
    pub start: Option<Lsn>,
    /// Stream again from this bookmark, into a pipeline of another name
    #[arg(long, value_name = "NAME")]
    pub from_bookmark: Option<String>,
}

/// Flags of `replay`.
#[derive(Clone, Debug, Args)]
pub struct Replay {
    /// First commit LSN, as in `_lsn` of an event
    #[arg(long, value_name = "LSN")]
    pub from: Lsn,
    /// Last commit LSN, inclusive; without it to the end of the archive
    #[arg(long, value_name = "LSN")]
    pub to: Option<Lsn>,
    /// Where to
    #[arg(long, value_enum)]
    pub sink: Target,
    /// The new topic (kafka, needed) or the new table (bigquery); {table} stands for each table's name
    #[arg(long, visible_alias = "table", value_name = "NAME")]
    pub topic: Option<String>,
    /// Print range, rows and bytes; send nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Where `replay` sends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Target {
    /// A new topic, exactly once.
    Kafka,
    /// The live board, rebuilt.
    Redis,
    /// The outside HTTP system, under the same keys.
    External,
    /// BigQuery, under the same job ids, or a new table.
    Bigquery,
    /// One event a line.
    Stdout,
}

/// Flags of `verify`.
#[derive(Clone, Debug, Args)]
pub struct Verify {
    /// Compare the transactions with end_lsn ≤ LSN; without it each sink up to its own position
    #[arg(long, value_name = "LSN")]
    pub until_lsn: Option<Lsn>,
    /// Rows and ids that may be held at once; a larger table is compared in several ranges of keys, and read once for each
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    pub memory: ByteSize,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Flags of `bookmark`.
#[derive(Clone, Debug, Args)]
pub struct Bookmark {
    /// Name of the bookmark, and of its slot
    pub name: Option<String>,
    /// Remove it, with its slot and every slot that was made from it
    #[arg(long, requires = "name")]
    pub drop: bool,
}

/// Flags of `backfill`.
#[derive(Clone, Debug, Args)]
pub struct Backfill {
    /// A published table: bare in schema public, else schema.table
    pub table: String,
    /// Only the rows for which this SQL condition holds
    #[arg(long = "where", value_name = "SQL")]
    pub filter: Option<String>,
    /// Ranges that are copied side by side, each over a connection of its own
    #[arg(long, default_value_t = JOBS, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub jobs: u16,
    /// At most so many rows a second
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u64).range(1..))]
    pub rate: Option<u64>,
}

/// Flags of `measure`.
#[derive(Debug, Args)]
pub struct Measure {
    /// Where to stop
    #[arg(long, value_name = "LSN")]
    pub until_lsn: Lsn,
}

/// Flags of `consume`.
#[derive(Clone, Debug, Default, Args)]
pub struct Consume {
    /// Feed only these outlets in this run
    #[arg(long, value_delimiter = ',', value_enum, value_name = "redis,external")]
    pub sinks: Option<Vec<Outlet>>,
    /// Stop when the end offsets found at the start are applied
    #[arg(long)]
    pub until_end: bool,
}

/// An outlet of `consume`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Outlet {
    /// The live board.
    Redis,
    /// The outside HTTP system.
    External,
}

/// Flags of `upload`.
#[derive(Clone, Debug, Default, Args)]
pub struct Upload {
    /// Load what is sealed now, then exit
    #[arg(long)]
    pub once: bool,
}

/// Flags of `demo`.
#[derive(Debug, Args)]
pub struct Demo {
    /// Run unattended for this long, then print a summary
    #[arg(long = "for", value_name = "30s")]
    pub length: Option<Span>,
}

/// Flags of `board`.
#[derive(Debug, Args)]
pub struct Board {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// How many contents
    #[arg(long, default_value_t = 10)]
    pub top: usize,
    /// Print again every second
    #[arg(long)]
    pub follow: bool,
}

/// Arguments of `tap`.
#[derive(Clone, Debug, Default, Args)]
pub struct Tap {
    /// Only the events of these tables, for which Postgres is not asked; bare in schema public, else schema.table
    #[arg(value_name = "TABLE")]
    pub tables: Vec<String>,
}

/// Flags of `mock-external`.
#[derive(Clone, Debug, Args)]
pub struct MockExternal {
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1:8088")]
    pub listen: String,
    /// Share of requests answered with a fault, 0.0 to 1.0
    #[arg(long, default_value_t = 0.0)]
    pub fail: f64,
    /// Wait this long before each answer
    #[arg(long, default_value = "0ms")]
    pub delay: Span,
}
