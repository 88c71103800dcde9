//! The board in Redis against what the events in Kafka make of it. Each bucket is read with the offsets that it counts
//! up to, so that neither a long script nor a board that moves is in the way.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::report::{BoardReport, MOST_NAMED};
use crate::config::Config;
use crate::consume::batch::{FUTURE_SECONDS, LATE_SECONDS, WINDOW_BUCKETS, bucket_of};
use crate::consume::event::{self, Event};
use crate::consume::redis::{Bucket, Claim, FROM_ARCHIVE, Store, nullable};
use crate::error::{Error, Result};
use crate::kafka;
use crate::world::World;

/// The table that the board counts.
const TABLE: &str = "engagement_events";
const MICROS: i64 = 1_000_000;

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

/// The board as it was found.
#[derive(Debug)]
struct Found {
    counts: Counts,
    /// The first bucket of the window.
    first: i64,
    /// The next offsets when each of its buckets was read.
    offsets: Vec<BTreeMap<i32, i64>>,
}

/// Compares the board; the text is why it was not compared.
///
/// # Errors
/// As Kafka is read.
pub(super) async fn compare(world: &World) -> Result<Result<BoardReport, String>> {
    let found = match find(&Store::new(&world.config)?).await {
        Ok(Ok(found)) => found,
        Ok(Err(why)) => return Ok(Err(format!("board: {why}"))),
        Err(error) if error.is_transient() => return Ok(Err(format!("board: {error}"))),
        Err(error) => return Err(error),
    };
    let (config, stop) = (Arc::clone(&world.config), world.stop.clone());
    let compared = tokio::task::spawn_blocking(move || {
        Ok(report(&found.counts, &recount(&config, &stop, found.first, &found.offsets)?))
    });
    compared.await.map_err(|e| Error::fatal("recounting the board", e))?.map(Ok)
}

/// The text is why there is nothing to compare.
async fn find(store: &Store) -> Result<Result<Found, &'static str>> {
    let begun = store.look().await?;
    if begun.generation.is_empty() || begun.offsets.is_empty() {
        return Ok(Err("there is none (falaj consume has not run)"));
    }
    if begun.replaced.as_deref() == Some(FROM_ARCHIVE) {
        return Ok(Err("falaj replay has rebuilt it from the archive, and falaj consume has not taken it over"));
    }
    let last = bucket_of(jiff::Timestamp::now().as_microsecond());
    let first = last - WINDOW_BUCKETS + 1;
    let mut found = Found { counts: Counts::default(), first, offsets: Vec::new() };
    for at in first..=last {
        let (Claim { generation, offsets, .. }, bucket) = store.bucket(at).await?;
        if generation != begun.generation {
            return Ok(Err("it was rebuilt while it was read"));
        }
        found.counts.show(bucket);
        found.offsets.push(offsets);
    }
    Ok(Ok(found))
}

/// What the events in Kafka make of each bucket, up to the offsets that it was read at.
fn recount(config: &Config, stop: &CancellationToken, first: i64, offsets: &[BTreeMap<i32, i64>]) -> Result<Counts> {
    let topic = config.topic(TABLE);
    let mut counts = Counts::default();
    let is_below = |ends: &BTreeMap<i32, i64>, partition, offset| ends.get(&partition).is_some_and(|end| offset < *end);
    kafka::read_committed(config, &topic, stop, |partition, offset, value| {
        // None of the buckets has what lies beyond the offsets of the last one.
        if !offsets.last().is_some_and(|ends| is_below(ends, partition, offset)) {
            return Ok(());
        }
        let strange = |why| Error::fatal(format_args!("reading {topic}, partition {partition}, offset {offset}"), why);
        if let Some(event) = event::parse(value).map_err(strange)? {
            let place = Place::of(&event);
            let ends = usize::try_from(place.bucket() - first).ok().and_then(|at| offsets.get(at));
            if ends.is_some_and(|ends| is_below(ends, partition, offset)) {
                counts.add(&event, place);
            }
        }
        Ok(())
    })?;
    Ok(counts)
}

/// The bucket that an event is counted in.
#[derive(Clone, Copy, Debug)]
enum Place {
    Counted(i64),
    Late(i64),
    Future(i64),
}

impl Place {
    fn of(event: &Event<'_>) -> Self {
        match event.commit_ts.saturating_sub(event.event_ts) {
            age if age > LATE_SECONDS * MICROS => Self::Late(bucket_of(event.commit_ts)),
            age if age < -FUTURE_SECONDS * MICROS => Self::Future(bucket_of(event.commit_ts)),
            _ => Self::Counted(bucket_of(event.event_ts)),
        }
    }

    fn bucket(self) -> i64 {
        let (Self::Counted(bucket) | Self::Late(bucket) | Self::Future(bucket)) = self;
        bucket
    }
}

impl Counts {
    /// Adds what a bucket of the board shows.
    fn show(&mut self, Bucket { millis, events, devices, last, dropped }: Bucket) {
        for (id, millis) in millis {
            self.contents.entry(id).or_default().0 += millis;
        }
        for (id, events) in events {
            self.contents.entry(id).or_default().1 += events;
        }
        for (name, events) in devices {
            self.device(nullable(name)).0 += events;
        }
        for (name, last) in last {
            let device = self.device(nullable(name));
            device.1 = device.1.max(last);
        }
        self.late += dropped.get("late").copied().unwrap_or(0);
        self.future += dropped.get("future").copied().unwrap_or(0);
    }

    /// Adds an event of Kafka.
    fn add(&mut self, event: &Event<'_>, place: Place) {
        match place {
            Place::Late(_) => self.late += 1,
            Place::Future(_) => self.future += 1,
            Place::Counted(_) => self.count(event),
        }
    }

    fn device(&mut self, name: Option<String>) -> &mut (u64, i64) {
        self.devices.entry(name).or_insert((0, i64::MIN))
    }

    fn count(&mut self, event: &Event<'_>) {
        if let Some(content) = &event.content_id {
            let (millis, events) = self.contents.entry(content.to_string()).or_default();
            (*millis, *events) = (*millis + event.millis, *events + 1);
        }
        let (events, last) = self.device(event.device.as_ref().map(|device| device.to_string()));
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
