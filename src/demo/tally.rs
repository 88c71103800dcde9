//! The count at the end: what Postgres has committed stands everywhere, once.

use std::collections::HashSet;
use std::fs::File;
use std::sync::Arc;

use arrow_array::{Array, Int64Array};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::stage::Stage;
use super::warehouse::Warehouse;
use crate::archive;
use crate::config::Config;
use crate::consume::batch::{FUTURE_SECONDS, LATE_SECONDS, WINDOW_BUCKETS, bucket_of};
use crate::consume::board::BoardView;
use crate::consume::event;
use crate::consume::read_board;
use crate::error::{Error, Result};
use crate::kafka;
use crate::lsn::{Lsn, Position};
use crate::mock_external::{Counts, Mock};
use crate::source::conn::sql_error;
use crate::world::World;

const TABLE: &str = "engagement_events";
const LOOKUP: &str = "content";
const MICROS: i64 = 1_000_000;

/// What was found, place by place.
pub(super) struct Tally {
    rows: u64,
    findings: Vec<Finding>,
}

struct Finding {
    place: &'static str,
    found: String,
    holds: bool,
}

impl Tally {
    /// One line a place.
    pub(super) fn text(&self) -> String {
        let mut text = format!("\ncounted    Postgres   {} rows committed in {TABLE}", self.rows);
        for Finding { place, found, holds } in &self.findings {
            let verdict = if *holds { "PASS" } else { "FAIL" };
            text.push_str(&format!("\n{verdict}       {place:<10} {found}"));
        }
        text
    }

    /// # Errors
    /// [`Error::Fatal`] naming the places that differ.
    pub(super) fn verdict(&self) -> Result<()> {
        let differ: Vec<_> = self.findings.iter().filter(|f| !f.holds).map(|f| f.place).collect();
        match differ.is_empty() {
            true => Ok(()),
            false => Err(Error::Fatal(format!("the counts differ: {}", differ.join(", ")))),
        }
    }
}

/// Reads every place to its end, and compares ids, not only numbers.
pub(super) async fn count(stage: &Stage, mock: &Mock) -> Result<Tally> {
    let config = &stage.world.config;
    let sql = format!("SELECT count(*) FROM public.{TABLE}");
    let counted = stage.client().await?.query_one(&sql, &[]).await;
    let rows = counted.map_err(|e| sql_error("counting the rows", &e))?.get::<_, i64>(0).unsigned_abs();

    let board = read_board(config, 1).await?;
    let events = topic(&stage.world, TABLE).await?;
    let changes = topic(&stage.world, LOOKUP).await?;
    let (files, lookup_files) = (parquet(config, TABLE).await?, parquet(config, LOOKUP).await?);
    let ids = |ids: &Ids| format!("{} events, {} ids", ids.rows, ids.ids.len());
    let mut findings = vec![
        Finding { place: "Kafka", found: ids(&events), holds: events.rows == rows && events.ids.len() as u64 == rows },
        Finding { place: "Parquet", found: ids(&files), holds: files.rows == rows && files.ids == events.ids },
    ];
    let loaded = match Warehouse::of(config)? {
        None => None,
        Some(warehouse) => Some((warehouse.count(TABLE).await?, warehouse.count(LOOKUP).await?)),
    };
    if let Some(((found, distinct), _)) = loaded {
        let holds = (found, distinct) == (rows, rows);
        findings.push(Finding { place: "BigQuery", found: format!("{found} rows, {distinct} ids"), holds });
    }
    findings.push(outside(mock, &events));
    findings.push(redis(&board, &events)?);
    let in_bigquery = loaded.map(|(_, (rows, _))| rows);
    findings.push(Finding {
        place: LOOKUP,
        found: format!(
            "{} changes in Kafka, {} in Parquet{}",
            changes.rows,
            lookup_files.rows,
            in_bigquery.map(|n| format!(", {n} in BigQuery")).unwrap_or_default()
        ),
        holds: changes.rows == lookup_files.rows
            && changes.ids == lookup_files.ids
            && in_bigquery.is_none_or(|n| n == changes.rows),
    });
    Ok(Tally { rows, findings })
}

/// The ids of a table's events in one place.
#[derive(Default)]
struct Ids {
    rows: u64,
    ids: HashSet<Position>,
    /// Commit time and event time in microseconds, of what the board counts.
    times: Vec<(i64, i64)>,
}

fn outside(mock: &Mock, events: &Ids) -> Finding {
    let Counts { unique, requests, duplicates, conflicts } = mock.received().counts();
    let received: HashSet<Position> =
        mock.received().ids().iter().filter_map(|id| Position::from_event_id(id)).collect();
    Finding {
        place: "outside",
        found: format!("{unique} ids in {requests} requests, {duplicates} repeated, {conflicts} with other bytes"),
        holds: received == events.ids && unique == events.rows && conflicts == 0,
    }
}

/// The board as it must be by the events, as of the moment at which it was read.
fn redis(board: &BoardView, events: &Ids) -> Result<Finding> {
    let as_of: jiff::Timestamp = board.as_of.parse().map_err(|e| Error::fatal("reading the board's time", e))?;
    let last = bucket_of(as_of.as_microsecond());
    let within = |micros: i64| (last - WINDOW_BUCKETS + 1..=last).contains(&bucket_of(micros));
    let (mut counted, mut late, mut future) = (0, 0, 0);
    for &(commit, event) in &events.times {
        match commit.saturating_sub(event) {
            age if age > LATE_SECONDS * MICROS => late += u64::from(within(commit)),
            age if age < -FUTURE_SECONDS * MICROS => future += u64::from(within(commit)),
            _ => counted += u64::from(within(event)),
        }
    }
    let shown: u64 = board.devices.iter().map(|device| device.events).sum();
    let (dropped, wanted) = ((board.late_dropped, board.future_dropped), (late, future));
    Ok(Finding {
        place: "Redis",
        found: format!(
            "{shown} events of the last 10 minutes ({counted} in Kafka), {} late, {} future left out",
            dropped.0, dropped.1
        ),
        holds: shown == counted && dropped == wanted,
    })
}

/// All events of a table's topic.
async fn topic(world: &World, table: &'static str) -> Result<Ids> {
    let World { config, stop, .. } = world.clone();
    let read = tokio::task::spawn_blocking(move || {
        let mut ids = Ids::default();
        kafka::read_committed(&config, &config.topic(table), &stop, |_, _, value| ids.add(value, table))?;
        Ok(ids)
    });
    read.await.map_err(|e| Error::fatal("counting in Kafka", e))?
}

impl Ids {
    fn add(&mut self, value: &[u8], table: &str) -> Result<()> {
        #[derive(serde::Deserialize)]
        struct Id<'a> {
            #[serde(rename = "_id")]
            id: &'a str,
        }
        let strange = |why: &dyn std::fmt::Display| Error::fatal(format_args!("an event of {table} in Kafka"), why);
        let Id { id } = serde_json::from_slice(value).map_err(|e| strange(&e))?;
        self.ids.insert(Position::from_event_id(id).ok_or_else(|| strange(&format!("_id = {id:?}")))?);
        self.rows += 1;
        if table == TABLE
            && let Some(event) = event::parse(value).map_err(|e| strange(&e))?
        {
            self.times.push((event.commit_ts, event.event_ts));
        }
        Ok(())
    }
}

async fn parquet(config: &Arc<Config>, table: &'static str) -> Result<Ids> {
    let dir = config.archive.dir.clone();
    let read = tokio::task::spawn_blocking(move || {
        let mut ids = Ids::default();
        for batch in archive::list(&dir)? {
            for file in batch.files()?.into_iter().filter(|file| file.table == table) {
                let failed =
                    |e: &dyn std::fmt::Display| Error::fatal(format_args!("reading {}", file.path.display()), e);
                let rows = File::open(&file.path).map_err(|e| failed(&e))?;
                read_file(rows, &mut ids).map_err(|e| failed(&e))?;
            }
        }
        Ok(ids)
    });
    read.await.map_err(|e| Error::fatal("counting in the archive", e))?
}

fn read_file(file: File, ids: &mut Ids) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| text(&e))?;
    let columns = ProjectionMask::columns(reader.parquet_schema(), ["_commit_lsn", "_ordinal"]);
    for batch in reader.with_projection(columns).build().map_err(|e| text(&e))? {
        let batch = batch.map_err(|e| text(&e))?;
        let column = |name: &str| {
            let found = batch.column_by_name(name).and_then(|c| c.as_any().downcast_ref::<Int64Array>());
            found.ok_or_else(|| format!("no int64 column {name}"))
        };
        let (lsns, ordinals) = (column("_commit_lsn")?, column("_ordinal")?);
        ids.rows += lsns.len() as u64;
        let at = |(lsn, ordinal): (&i64, &i64)| Position { commit_lsn: Lsn(*lsn as u64), ordinal: *ordinal as u64 };
        ids.ids.extend(lsns.values().iter().zip(ordinals.values()).map(at));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_names_what_differs() {
        let finding = |place, holds| Finding { place, found: "1 rows".into(), holds };
        let tally = Tally { rows: 1, findings: vec![finding("Kafka", true), finding("Parquet", false)] };
        assert_eq!(tally.verdict().unwrap_err().to_string(), "the counts differ: Parquet");
        assert!(
            tally.text().ends_with("\nPASS       Kafka      1 rows\nFAIL       Parquet    1 rows"),
            "{}",
            tally.text()
        );
        assert!(Tally { rows: 1, findings: vec![finding("Kafka", true)] }.verdict().is_ok());
    }
}
