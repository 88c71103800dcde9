//! `init`: publication, topics, slot and the first lookup base. Prints its plan first; repeatable; the only verb that
//! creates a slot.

use std::io::{IsTerminal, Write};

use futures_util::TryStreamExt;
use tokio_postgres::Client;

use crate::cli;
use crate::config::{Config, SinkName};
use crate::enrich::{self, state};
use crate::error::{Error, Result};
use crate::kafka;
use crate::lsn::{Lsn, SlotIdentity};
use crate::source::conn::{Conninfo, sql_error};
use crate::source::slot;
use crate::source::wire::{Wire, WireError, ident, literal};
use crate::world::World;
use state::{BaseHeader, BaseWriter, ColumnType, LookupTable};

const TABLES: &str = include_str!("../sql/01_tables.sql");
const APPLICATION: &str = "falaj init";

/// One thing to do.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Tables,
    Publication(Vec<String>),
    Topic { name: String, partitions: i32, compacted: bool },
    Slot,
    Adopt(Lsn),
}

/// Runs the verb.
///
/// # Errors
/// [`Error::Refused`] with the way out for a slot without state, and for rights; [`Error::Unreachable`].
pub async fn run(world: &World, args: &cli::Init) -> Result<()> {
    let config = &world.config;
    let conninfo = Conninfo::parse(&config.postgres.url)?;
    let client = world.at_start("postgres", || conninfo.sql(APPLICATION)).await?;
    let steps = plan(world, &client, conninfo.dbname(), args).await?;
    if steps.is_empty() {
        println!("everything is there: nothing to do");
        return Ok(());
    }
    println!("plan:");
    for step in &steps {
        println!("  - {}", describe(config, step));
    }
    if !args.yes && !confirmed() {
        println!("nothing was changed; falaj init --yes carries it out");
        return Ok(());
    }
    for step in &steps {
        carry_out(config, &conninfo, &client, step).await?;
        println!("done: {}", describe(config, step));
    }
    Ok(())
}

fn confirmed() -> bool {
    if !std::io::stdin().is_terminal() {
        return false;
    }
    print!("carry it out? [y/N] ");
    let mut answer = String::new();
    let asked = std::io::stdout().flush().and_then(|()| std::io::stdin().read_line(&mut answer));
    asked.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}

fn describe(config: &Config, step: &Step) -> String {
    let slot = &config.postgres.slot;
    match step {
        Step::Tables => "tables content and engagement_events".into(),
        Step::Publication(tables) => format!("publication {} for {}", config.postgres.publication, tables.join(", ")),
        Step::Topic { name, partitions, compacted } => {
            format!("topic {name}, {partitions} partition(s){}", if *compacted { ", compacted" } else { "" })
        }
        Step::Slot => {
            format!("slot {slot}, and the lookup state as of its first LSN in {}", config.state.dir.display())
        }
        Step::Adopt(from) => format!(
            "adopt slot {slot}: rebuild the lookup state in {} from the rows of now; events from {from} until now get these rows, not those of their own time",
            config.state.dir.display()
        ),
    }
}

async fn plan(world: &World, client: &Client, database: &str, args: &cli::Init) -> Result<Vec<Step>> {
    let config = &world.config;
    let mut steps = Vec::new();
    if args.with_tables && !(exists(client, "content").await? && exists(client, "engagement_events").await?) {
        steps.push(Step::Tables);
    }
    let mut published = published(client, &config.postgres.publication).await?;
    if published.is_none() {
        let tables = tables_to_publish(client, config, args.with_tables).await?;
        steps.push(Step::Publication(tables.clone()));
        published = Some(tables);
    }
    if config.produce.sinks.contains(&SinkName::Kafka) {
        steps.extend(topics(world, &published.unwrap_or_default()).await?);
    }
    let name = &config.postgres.slot;
    let found = slot::read(client, name).await?;
    let base = state::header(&config.state.dir)?;
    match (found, base, args.adopt_slot) {
        (None, ..) => steps.push(Step::Slot),
        (Some(found), _, true) => {
            steps.push(Step::Adopt(slot::require(name, Some(found), database)?.confirmed_flush_lsn));
        }
        (Some(found), Some(_), false) => drop(slot::require(name, Some(found), database)?),
        (Some(found), None, false) => return Err(stateless(config, found.confirmed_flush_lsn)),
    }
    Ok(steps)
}

fn stateless(config: &Config, confirmed: Lsn) -> Error {
    Error::refused(
        "lookup_state",
        format!(
            "slot {} exists (acknowledged up to {confirmed}), and {} holds no lookup state",
            config.postgres.slot,
            config.state.dir.display()
        ),
        "the lookup state that belongs to the slot",
        "restore state.dir; or falaj init --adopt-slot, which rebuilds it from the rows of now (events from that LSN until now are then enriched with these); or drop the slot and start anew",
    )
}

/// The configured tables and their lookup tables, as far as they exist.
async fn tables_to_publish(client: &Client, config: &Config, with_tables: bool) -> Result<Vec<String>> {
    let lookups = enrich::wanted(&config.tables).into_iter().map(|(table, _)| table);
    let mut tables = Vec::new();
    for table in lookups.chain(config.tables.iter().map(|t| t.name.clone())) {
        let ours = with_tables && matches!(table.as_str(), "content" | "engagement_events");
        if !tables.contains(&table) && (ours || exists(client, &table).await?) {
            tables.push(table);
        }
    }
    if tables.is_empty() {
        return Err(Error::refused(
            "tables",
            "none of the configured tables exists",
            "the tables of [[table]] in the configuration",
            "create them, name your own tables under [[table]], or falaj init --with-tables for the built-in ones",
        ));
    }
    Ok(tables)
}

async fn topics(world: &World, tables: &[String]) -> Result<Vec<Step>> {
    let config = &world.config;
    let step = |name: String, partitions, compacted| Step::Topic { name, partitions, compacted };
    let mut wanted = vec![step(config.checkpoint_topic(), 1, true), step(config.dead_letter_topic(), 1, false)];
    wanted.extend(tables.iter().map(|t| step(config.topic(t), config.kafka.partitions, false)));
    let mut absent = Vec::new();
    for topic in wanted {
        let Step::Topic { name, .. } = &topic else { continue };
        let found = world.at_start("kafka", || {
            let (config, name) = (config.clone(), name.clone());
            async move {
                let look = tokio::task::spawn_blocking(move || kafka::partitions(&config.kafka, &name));
                look.await.map_err(|e| Error::fatal("looking up a topic", e))?
            }
        });
        if found.await?.is_none() {
            absent.push(topic);
        }
    }
    Ok(absent)
}

async fn carry_out(config: &Config, conninfo: &Conninfo, client: &Client, step: &Step) -> Result<()> {
    match step {
        Step::Tables => execute(client, "creating the tables", TABLES).await,
        Step::Publication(tables) => {
            let list: Vec<_> = tables.iter().map(|t| qualified(t)).collect();
            let sql =
                format!("CREATE PUBLICATION {} FOR TABLE {}", ident(&config.postgres.publication), list.join(", "));
            execute(client, "creating the publication", &sql).await
        }
        Step::Topic { name, partitions, compacted } => {
            // Small segments: the topic is read to its end at each start, and only closed segments are compacted.
            let compact =
                [("cleanup.policy", "compact"), ("segment.bytes", "1048576"), ("min.cleanable.dirty.ratio", "0.01")];
            kafka::create_topic(&config.kafka, name, *partitions, if *compacted { &compact } else { &[] }).await
        }
        Step::Slot => create_slot(config, conninfo, client).await,
        Step::Adopt(from) => {
            let mut wire = Wire::connect(conninfo, APPLICATION).await?;
            let identity = identity(config, &mut wire).await?;
            write_base(config, client, identity, *from, None).await
        }
    }
}

/// The slot's own snapshot shows the lookup rows exactly as of its first LSN: nothing between the two is lost or doubled.
async fn create_slot(config: &Config, conninfo: &Conninfo, client: &Client) -> Result<()> {
    let slot = &config.postgres.slot;
    let mut wire = Wire::connect(conninfo, APPLICATION).await?;
    let identity = identity(config, &mut wire).await?;
    let command = format!("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput (SNAPSHOT 'export')", ident(slot));
    let rows = wire.query(&command).await.map_err(|e| no_slot(slot, e))?;
    let made = rows.into_iter().next().and_then(|row| {
        let mut row = row.into_iter().skip(1);
        Some((row.next()??.parse::<Lsn>().ok()?, row.next()??))
    });
    let (lsn, snapshot) =
        made.ok_or_else(|| Error::Fatal("CREATE_REPLICATION_SLOT gave no LSN and snapshot".into()))?;
    let written = write_base(config, client, identity, lsn, Some(&snapshot)).await;
    if written.is_err() {
        // A slot without its state would only hold WAL back.
        let dropped = wire.query(&format!("DROP_REPLICATION_SLOT {}", ident(slot))).await;
        tracing::warn!(
            slot,
            dropped = dropped.is_ok(),
            "the lookup state could not be written: the new slot is dropped again"
        );
    }
    written
}

async fn identity(config: &Config, wire: &mut Wire) -> Result<SlotIdentity> {
    let system = wire.identify_system().await.map_err(|e| e.into_error("IDENTIFY_SYSTEM"))?;
    Ok(SlotIdentity { system_id: system.system_id, timeline: system.timeline, slot: config.postgres.slot.clone() })
}

fn no_slot(slot: &str, e: WireError) -> Error {
    match e {
        WireError::Server(e) if matches!(e.code.as_str(), "42501" | "53400" | "55000" | "42602") => Error::refused(
            "slot",
            format!("creating slot \"{slot}\": {e}"),
            "wal_level = logical, a free replication slot, the REPLICATION right, a name of a–z, 0–9 and _",
            "falaj check says which of them is missing, and how to mend it",
        ),
        e => e.into_error("CREATE_REPLICATION_SLOT"),
    }
}

/// Writes the lookup rows that `snapshot` (or now) shows, as the state at `lsn`.
async fn write_base(
    config: &Config,
    client: &Client,
    identity: SlotIdentity,
    lsn: Lsn,
    snapshot: Option<&str>,
) -> Result<()> {
    execute(client, "opening a snapshot", "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    if let Some(snapshot) = snapshot {
        execute(client, "importing the slot's snapshot", &format!("SET TRANSACTION SNAPSHOT {}", literal(snapshot)))
            .await?;
    }
    let mut tables = Vec::new();
    for (table, columns) in enrich::wanted(&config.tables) {
        tables.push(lookup_table(client, table, &columns).await?);
    }
    let header = BaseHeader { version: 1, identity, lsn, origin: lsn, adopted: snapshot.is_none(), tables };
    let mut base = BaseWriter::create(&config.state.dir, &header)?;
    for (index, table) in header.tables.iter().enumerate() {
        copy_rows(client, index, table, &mut base).await?;
    }
    base.finish()?;
    execute(client, "closing the snapshot", "COMMIT").await
}

async fn copy_rows(client: &Client, index: usize, table: &LookupTable, base: &mut BaseWriter) -> Result<()> {
    let columns = [&table.key].into_iter().chain(&table.columns).map(|c| format!("{}::text", ident(&c.name)));
    let sql = format!("SELECT {} FROM {}", columns.collect::<Vec<_>>().join(", "), qualified(&table.table));
    let doing = format!("reading lookup table {}", table.table);
    let none: [&str; 0] = [];
    let rows = client.query_raw(&sql, none).await.map_err(|e| sql_error(&doing, &e))?;
    futures_util::pin_mut!(rows);
    while let Some(row) = rows.try_next().await.map_err(|e| sql_error(&doing, &e))? {
        let values: Vec<Option<&str>> = (1..row.len()).map(|i| row.get(i)).collect();
        base.row(index, row.get(0), &values)?;
    }
    Ok(())
}

/// Types of the key and the joined columns. The key must be the whole primary key: one row an event, no more.
async fn lookup_table(client: &Client, table: String, columns: &[String]) -> Result<LookupTable> {
    let refuse = |found: String| {
        Error::refused(
            "lookup_table",
            format!("lookup table {table}: {found}"),
            "an existing table with a primary key of one column, and the columns of [table.lookup]",
            "mend [table.lookup], or the table",
        )
    };
    let sql = "SELECT a.attname::text, a.atttypid, a.atttypmod, coalesce(a.attnum = ANY (i.indkey::int2[]), false) \
               FROM pg_catalog.pg_attribute a \
               LEFT JOIN pg_catalog.pg_index i ON i.indrelid = a.attrelid AND i.indisprimary \
               WHERE a.attrelid = pg_catalog.to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped";
    let rows = client.query(sql, &[&qualified(&table)]).await.map_err(|e| sql_error("reading the catalogue", &e))?;
    let column =
        |row: &tokio_postgres::Row| ColumnType { name: row.get(0), type_oid: row.get(1), type_mod: row.get(2) };
    let keys: Vec<_> = rows.iter().filter(|row| row.get(3)).map(column).collect();
    let [key] = <[ColumnType; 1]>::try_from(keys).map_err(|keys| match rows.len() {
        0 => refuse("it does not exist".into()),
        _ => refuse(format!("a primary key of {} columns", keys.len())),
    })?;
    let find = |name: &String| {
        let row = rows.iter().find(|row| row.get::<_, &str>(0) == name);
        row.map(column).ok_or_else(|| refuse(format!("no column \"{name}\"")))
    };
    let columns = columns.iter().map(find).collect::<Result<_>>()?;
    Ok(LookupTable { key, columns, table })
}

/// `table` or `schema.table`, quoted.
fn qualified(table: &str) -> String {
    match table.split_once('.') {
        Some((schema, table)) => format!("{}.{}", ident(schema), ident(table)),
        None => format!("public.{}", ident(table)),
    }
}

async fn exists(client: &Client, table: &str) -> Result<bool> {
    let sql = "SELECT pg_catalog.to_regclass($1) IS NOT NULL";
    let row = client.query_one(sql, &[&qualified(table)]).await.map_err(|e| sql_error("reading the catalogue", &e))?;
    Ok(row.get(0))
}

/// Tables of the publication by their outside names; `None` when there is no such publication.
async fn published(client: &Client, publication: &str) -> Result<Option<Vec<String>>> {
    let failed = |e| sql_error("reading the publication", &e);
    let known = "SELECT 1 FROM pg_catalog.pg_publication WHERE pubname::text = $1";
    if client.query_opt(known, &[&publication]).await.map_err(failed)?.is_none() {
        return Ok(None);
    }
    let sql = "SELECT CASE schemaname WHEN 'public' THEN tablename::text ELSE schemaname || '.' || tablename END \
               FROM pg_catalog.pg_publication_tables WHERE pubname::text = $1 ORDER BY 1";
    let rows = client.query(sql, &[&publication]).await.map_err(failed)?;
    Ok(Some(rows.iter().map(|row| row.get(0)).collect()))
}

async fn execute(client: &Client, doing: &str, sql: &str) -> Result<()> {
    client.batch_execute(sql).await.map_err(|e| sql_error(doing, &e))
}
