//! The board in Redis against what the events in Kafka make of it, up to the offsets that the board stands at.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::report::{BoardReport, MOST_NAMED};
use crate::config::Config;
use crate::consume::batch::{FUTURE_SECONDS, LATE_SECONDS, WINDOW_BUCKETS, bucket_of};
use crate::consume::event::{self, Event};
use crate::consume::redis::{Claim, FROM_ARCHIVE, Rows, Store, nullable};
use crate::error::{Error, Result};
use crate::kafka;
use crate::world::World;

/// The table that the board counts.
const TABLE: &str = "engagement_events";
const MICROS: i64 = 1_000_000;
/// How often the board is read until it stands still for as long as that takes.
const TRIES: usize = 50;
const PAUSE: Duration = Duration::from_millis(20);
/// More contents than a board has.
const ALL: usize = 1_000_000_000;

/// What a board shows.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Thousandths of a second and events, by content.
    contents: BTreeMap<String, (i64, u64)>,
    /// Events and last use, by device.
    devices: BTreeMap<Option<String>, (u64, i64)>,
    late: u64,
    future: u64,
}

/// Compares the board; the text is why it was not compared.
///
/// # Errors
/// As Kafka is read.
pub(super) async fn compare(world: &World) -> Result<Result<BoardReport, String>> {
    let store = Store::new(&world.config)?;
    let last = bucket_of(jiff::Timestamp::now().as_microsecond());
    let first = last - WINDOW_BUCKETS + 1;
    let (claim, rows) = match still(world, &store, first, last).await {
        Ok(Some(found)) => found,
        Ok(None) => return Ok(Err("board: it moved all the time while it was read".to_owned())),
        Err(error) if error.is_transient() => return Ok(Err(format!("board: {error}"))),
        Err(error) => return Err(error),
    };
    if claim.generation.is_empty() || claim.offsets.is_empty() {
        return Ok(Err("board: there is none (falaj consume has not run)".to_owned()));
    }
    if claim.replaced.as_deref() == Some(FROM_ARCHIVE) {
        return Ok(Err(
            "board: falaj replay has rebuilt it from the archive, and falaj consume has not taken it over".to_owned()
        ));
    }
    let (config, stop) = (Arc::clone(&world.config), world.stop.clone());
    let counted = tokio::task::spawn_blocking(move || recount(&config, &stop, &claim, first, last)).await;
    let counted = counted.map_err(|e| Error::fatal("recounting the board", e))??;
    Ok(Ok(report(&shown(rows), &counted)))
}

/// The board, and the offsets that it stands at.
async fn still(world: &World, store: &Store, first: i64, last: i64) -> Result<Option<(Claim, Rows)>> {
    for _ in 0..TRIES {
        let before = store.look().await?;
        let rows = store.read(first, last, ALL).await?;
        if store.look().await? == before {
            return Ok(Some((before, rows)));
        }
        world.pause(PAUSE).await?;
    }
    Ok(None)
}

fn shown((contents, devices, late, future): Rows) -> Counts {
    Counts {
        contents: contents.into_iter().map(|(id, millis, events, ..)| (id, (millis, events))).collect(),
        devices: devices.into_iter().map(|(name, events, last)| (nullable(name), (events, last))).collect(),
        late,
        future,
    }
}

fn recount(config: &Config, stop: &CancellationToken, claim: &Claim, first: i64, last: i64) -> Result<Counts> {
    let topic = config.topic(TABLE);
    let mut counts = Counts::default();
    kafka::read_committed(config, &topic, stop, |partition, offset, value| {
        if claim.offsets.get(&partition).is_some_and(|next| offset < *next) {
            let strange =
                |why| Error::fatal(format_args!("reading {topic}, partition {partition}, offset {offset}"), why);
            if let Some(event) = event::parse(value).map_err(strange)? {
                counts.add(&event, first, last);
            }
        }
        Ok(())
    })?;
    Ok(counts)
}

impl Counts {
    fn add(&mut self, event: &Event<'_>, first: i64, last: i64) {
        let within = |micros: i64| (first..=last).contains(&bucket_of(micros));
        match event.commit_ts.saturating_sub(event.event_ts) {
            age if age > LATE_SECONDS * MICROS => self.late += u64::from(within(event.commit_ts)),
            age if age < -FUTURE_SECONDS * MICROS => self.future += u64::from(within(event.commit_ts)),
            _ if within(event.event_ts) => self.count(event),
            _ => {}
        }
    }

    fn count(&mut self, event: &Event<'_>) {
        if let Some(content) = &event.content_id {
            let (millis, events) = self.contents.entry(content.to_string()).or_default();
            (*millis, *events) = (*millis + event.millis, *events + 1);
        }
        let device = event.device.as_ref().map(|device| device.to_string());
        let (events, last) = self.devices.entry(device).or_insert((0, i64::MIN));
        (*events, *last) = (*events + 1, event.event_ts.max(*last));
    }

    fn events(&self) -> u64 {
        self.devices.values().map(|(events, _)| events).sum()
    }
}

fn report(board: &Counts, kafka: &Counts) -> BoardReport {
    let content = |id: &String, (millis, events): (i64, u64)| format!("content {id}: {events} events, {millis} ms");
    let mut differences = differ(&board.contents, &kafka.contents, content);
    let device = |name: &Option<String>, (events, last): (u64, i64)| {
        let name = name.as_deref().unwrap_or("(null)");
        format!("device {name}: {events} events, the last {last} µs after 1970")
    };
    differences.extend(differ(&board.devices, &kafka.devices, device));
    for (what, board, kafka) in [("late", board.late, kafka.late), ("future", board.future, kafka.future)] {
        if board != kafka {
            differences.push(format!("{what} events left out: {board}; by Kafka {kafka}"));
        }
    }
    let equal = differences.is_empty();
    differences.truncate(MOST_NAMED);
    BoardReport { equal, board_events: board.events(), kafka_events: kafka.events(), differences }
}

/// A line for each key whose counts differ; one that is not there counts nothing.
fn differ<K: Ord, V: PartialEq + Copy + Default>(
    board: &BTreeMap<K, V>,
    kafka: &BTreeMap<K, V>,
    shown: impl Fn(&K, V) -> String,
) -> Vec<String> {
    let keys: BTreeSet<&K> = board.keys().chain(kafka.keys()).collect();
    let counts = |side: &BTreeMap<K, V>, key: &K| side.get(key).copied().unwrap_or_default();
    let differing = keys.into_iter().filter(|key| board.get(*key) != kafka.get(*key));
    differing
        .map(|key| format!("{}; by Kafka {}", shown(key, counts(board, key)), shown(key, counts(kafka, key))))
        .collect()
}
