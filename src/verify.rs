//! `falaj verify`: the source against every sink, up to an LSN, on live data. It reads only: the slot is not taken, nobody is
//! fenced, and nothing is written but a temporary copy of the slot, which goes with the session.
//!
//! `source` takes one snapshot and finds out which transactions it sees. Each sink's events up to its position are folded
//! into the latest row of each key (`fold`), and the source's rows compared with those (`compare`). Rows that the source
//! has changed since the sink's position are left out and counted. docs/verify.md says the rule, and what is printed.

mod archive;
mod board;
mod compare;
mod fold;
mod kafka;
mod report;
mod source;
mod table;
mod warehouse;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::info;

use crate::cli;
use crate::config::{Config, Envelope, SinkName};
use crate::error::{Error, Result};
use crate::lsn::{Lsn, Position, SlotIdentity};
use crate::sink;
use crate::source::conn::Conninfo;
use crate::source::slot;
use crate::source::wire::Wire;
use crate::upload::bigquery::BigQuery;
use crate::upload::record::{Record, Records};
use crate::world::{World, print};
use compare::Comparison;
use fold::{Fold, Range};
use report::{Report, SinkReport, TableReport};
use source::Source;
use table::{Form, Table};
use warehouse::Warehouse;

const APPLICATION: &str = "falaj verify";
/// How long a sink may take to reach the LSN that was asked for, at least.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a batch of the archive may take to be sealed, once it has come of age.
const SEALING: Duration = Duration::from_secs(15);
/// Nobody waits longer than this for one that is sealed by the hour.
const LONGEST: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Runs the verb.
///
/// # Errors
/// [`Error::Fatal`] (exit 1) when something differs; [`Error::Refused`] for a slot or sink that cannot be compared;
/// [`Error::Unreachable`] for a server that does not answer.
pub async fn run(world: &World, args: &cli::Verify) -> Result<()> {
    let report = tokio::select! {
        report = work(world, args) => report?,
        () = world.stop.cancelled() => return Err(Error::Fatal("shut down before everything was compared".into())),
    };
    let json = || serde_json::to_string(&report).map_err(|e| Error::fatal("writing JSON", e));
    print(&if args.json { json()? + "\n" } else { report.text() })?;
    match report.equal {
        true => Ok(()),
        false => Err(Error::Fatal("verify: source and sinks differ".into())),
    }
}

async fn work(world: &World, args: &cli::Verify) -> Result<Report> {
    if let Some(until) = args.until_lsn {
        wait_for_server(world, until).await?;
    }
    let source = Source::open(world).await?;
    let mut report = Report {
        equal: true,
        until_lsn: args.until_lsn,
        snapshot: source.snapshot.xids.clone(),
        snapshot_lsn: source.snapshot.lsn,
        sinks: Vec::new(),
        board: None,
        not_compared: Vec::new(),
    };
    let identity = world.at_start("postgres", || identity(world)).await?;
    for name in &world.config.produce.sinks {
        if *name == SinkName::Kafka && world.config.kafka.envelope != Envelope::Flat {
            report.not_compared.push("kafka: kafka.envelope is not \"flat\"".to_owned());
            continue;
        }
        report.sinks.push(sink(world, &source, *name, &identity, args).await?);
    }
    if let Some(project) = world.config.bigquery.project.as_deref().filter(|project| !project.is_empty()) {
        report.sinks.push(bigquery(world, &source, project, args).await?);
    }
    if world.config.produce.sinks.contains(&SinkName::Kafka) {
        match board::compare(world).await? {
            Ok(board) => report.board = Some(board),
            Err(why) => report.not_compared.push(why),
        }
    }
    report.not_compared.extend(report.sinks.iter_mut().flat_map(|sink| std::mem::take(&mut sink.not_compared)));
    let tables = report.sinks.iter().flat_map(|sink| &sink.tables);
    report.equal = tables.into_iter().all(|table| table.equal) && report.board.as_ref().is_none_or(|board| board.equal);
    Ok(report)
}

async fn wait_for_server(world: &World, until: Lsn) -> Result<()> {
    let conninfo = Conninfo::parse(&world.config.postgres.url)?;
    let client = world.at_start("postgres", || conninfo.sql(APPLICATION)).await?;
    let mut told = false;
    loop {
        let at = slot::server_lsn(&client).await?;
        if at >= until {
            return Ok(());
        }
        if !std::mem::replace(&mut told, true) {
            info!("the server stands at {at}; waiting for {until}");
        }
        world.pause(LOOK_EVERY).await?;
    }
}

async fn identity(world: &World) -> Result<SlotIdentity> {
    let mut wire = Wire::connect(&Conninfo::parse(&world.config.postgres.url)?, APPLICATION).await?;
    let system = wire.identify_system().await.map_err(|e| e.into_error("IDENTIFY_SYSTEM"))?;
    let slot = world.config.postgres.slot.clone();
    Ok(SlotIdentity { system_id: system.system_id, timeline: system.timeline, slot })
}

/// Compares every table with a sink of `produce`.
async fn sink(
    world: &World,
    source: &Source,
    name: SinkName,
    identity: &SlotIdentity,
    args: &cli::Verify,
) -> Result<SinkReport> {
    let word = match name {
        SinkName::Kafka => "kafka",
        SinkName::Archive => "archive",
    };
    let up_to = position(world, name, word, identity, args.until_lsn).await?;
    let bound = Position { commit_lsn: up_to, ordinal: 0 };
    let (mut tables, mut not_compared) = (Vec::new(), Vec::new());
    for table in &source.tables {
        let mut report = TableReport::new(&table.name, up_to);
        let mut ranges = vec![Range::ALL];
        while let Some(range) = ranges.pop() {
            let fold = Fold::new(table, range, bound, source.changed(table), args.memory.0);
            let fold = tokio::task::block_in_place(|| match name {
                SinkName::Kafka => kafka::fold(world, table, fold, |lsn| source.sees(lsn)),
                SinkName::Archive => archive::fold(world, table, fold, |lsn| source.sees(lsn)),
            })?;
            compare(source, table, Form::Json, (range, fold), &mut ranges, &mut report).await?;
        }
        close(word, report, &mut tables, &mut not_compared);
    }
    Ok(SinkReport { sink: word, tables, not_compared })
}

/// Compares one range of keys; what the fold gave up of it comes next.
async fn compare(
    source: &Source,
    table: &Table,
    form: Form,
    (range, fold): (Range, Fold),
    ranges: &mut Vec<Range>,
    report: &mut TableReport,
) -> Result<()> {
    if fold.range.last < range.last {
        ranges.push(Range { first: fold.range.last + 1, last: range.last });
    }
    report.passes += 1;
    report.unclear += fold.unclear;
    let mut comparison = Comparison::new(table, fold, report);
    source.compare(table, form, &mut comparison).await?;
    comparison.finish();
    Ok(())
}

/// Up to where a sink is compared: its position, or the LSN that was asked for once it has come that far.
async fn position(
    world: &World,
    name: SinkName,
    word: &str,
    identity: &SlotIdentity,
    until: Option<Lsn>,
) -> Result<Lsn> {
    let (began, patience) = (Instant::now(), patience(name, &world.config));
    loop {
        let stored = match name {
            SinkName::Kafka => {
                world
                    .at_start("kafka", || sink::kafka::peek(Arc::clone(&world.config), identity, Some(&world.stop)))
                    .await?
            }
            SinkName::Archive => sink::parquet::peek(&world.config, identity)?,
        };
        let at = stored.map(|stored| stored.checkpoint().resume).unwrap_or_default();
        match until {
            None => return Ok(at),
            Some(until) if at >= until => return Ok(until),
            Some(until) if began.elapsed() > patience => {
                return Err(Error::refused(
                    "verify_position",
                    format!("{word} stands at {at}, and has not come further within {} s", patience.as_secs()),
                    format!("{word} at {until} or beyond"),
                    format!("falaj produce --until-lsn {until}, or falaj verify --until-lsn {at}"),
                ));
            }
            Some(_) => world.pause(LOOK_EVERY).await?,
        }
    }
}

/// How long a sink may take. Beside a `produce` that runs, the archive's position moves when a batch is sealed.
fn patience(name: SinkName, config: &Config) -> Duration {
    match name {
        SinkName::Kafka => PATIENCE,
        SinkName::Archive => PATIENCE.max(config.archive.seal_after.0 + SEALING).min(LONGEST),
    }
}

/// Compares every table with BigQuery. What is in the archive and not loaded yet is left out. History is loaded file by file,
/// beside the stream: it counts however far that is.
async fn bigquery(world: &World, source: &Source, project: &str, args: &cli::Verify) -> Result<SinkReport> {
    let service = BigQuery::new(&world.config.bigquery, project).await?;
    let is_there = world.at_start("bigquery", || service.has_dataset()).await?;
    let records = Records::look(&world.config.archive.dir, &service.target());
    let loaded = records.all()?;
    let (mut tables, mut not_compared) = (Vec::new(), Vec::new());
    for table in &source.tables {
        // Read before the rows: a file whose load ends in between is left out.
        let copied = records.history(&table.name);
        let found = if is_there { Warehouse::open(&service, table).await? } else { None };
        let recorded = loaded.iter().find(|record| record.table == table.name).and_then(recorded);
        let until = args.until_lsn.map_or(END, |until| Position { commit_lsn: until, ordinal: 0 });
        let bound = found.as_ref().and_then(|found| found.bound).max(recorded).unwrap_or(START).min(until);
        let mut report = TableReport::new(&table.name, bound.commit_lsn);
        let mut ranges = vec![Range::ALL];
        while let Some(range) = ranges.pop() {
            let mut fold = Fold::new(table, range, bound, source.changed(table), args.memory.0).with_copies(until);
            if let Some(found) = &found {
                fold = found.fold(fold, |lsn| source.sees(lsn)).await?;
            }
            let fold = tokio::task::block_in_place(|| {
                archive::beyond(world, table, bound, &copied, fold, |lsn| source.sees(lsn))
            })?;
            compare(source, table, Form::Warehouse, (range, fold), &mut ranges, &mut report).await?;
        }
        close("bigquery", report, &mut tables, &mut not_compared);
    }
    Ok(SinkReport { sink: "bigquery", tables, not_compared })
}

/// Takes a table's verdict, unless its events do not say which rows they changed.
fn close(sink: &str, mut report: TableReport, tables: &mut Vec<TableReport>, not_compared: &mut Vec<String>) {
    report.close();
    match report.unclear {
        0 => tables.push(report),
        n => not_compared.push(format!(
            "{sink}: table {}: {n} updates do not say which row they changed; a primary key (whose values are not TOASTed) makes it \
             comparable",
            report.table
        )),
    }
}

/// Before everything.
const START: Position = Position { commit_lsn: Lsn(0), ordinal: 0 };
/// Behind everything.
const END: Position = Position { commit_lsn: Lsn(u64::MAX), ordinal: u64::MAX };

/// The first position that `upload` has not loaded, by its own record: rows that were removed at the end of a table are missed.
fn recorded(record: &Record) -> Option<Position> {
    record.loaded.map(|last| Position { ordinal: last.ordinal + 1, ..last })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_waited_for_until_its_batch_is_sealed() {
        let seconds = |seal_after: &str| {
            let env = [("FALAJ_ARCHIVE__SEAL_AFTER".to_owned(), seal_after.to_owned())];
            let config = Config::load(None, env).unwrap();
            [SinkName::Kafka, SinkName::Archive].map(|name| patience(name, &config).as_secs())
        };
        assert_eq!([seconds("60s"), seconds("1s"), seconds("1h")], [[30, 75], [30, 30], [30, 120]]);
    }
}
