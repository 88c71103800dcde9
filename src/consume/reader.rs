//! Kafka → batches → Redis: the one loop of the board's outlet.
//!
//! Gather what is waiting, add it up, apply it, again. With little traffic a batch is what one Kafka transaction
//! brought; under load it is what came in while the batch before was applied.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use tokio::runtime::Handle;
use tracing::{error, info, warn};

use super::batch::{Batch, FUTURE_SECONDS, WINDOW_SECONDS};
use super::board;
use super::event;
use super::input::{Input, Place, Polled, Record};
use super::inquiry::{Answer, Inquiry};
use super::latency::Latency;
use super::redis::{Applied, Call, FROM_ARCHIVE, Store};
use crate::cli::Consume;
use crate::error::{Error, Result};
use crate::kafka::blocking;
use crate::world::World;

/// The table that the board counts.
const TABLE: &str = "engagement_events";
/// Records committed longer ago than this cannot count into the window: an event may lie `FUTURE_SECONDS` ahead of
/// its commit; the last minute is for clocks that differ.
const NEEDED_SECONDS: i64 = WINDOW_SECONDS + FUTURE_SECONDS + 60;
/// A batch is applied at this number of events …
const MAX_EVENTS: usize = 50_000;
/// … or at this age, whichever comes first; with nothing more waiting, at once.
const MAX_AGE: Duration = Duration::from_millis(250);
/// How long to wait for a first record before looking around.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long the report at the end may take.
const LAST_REPORT: Duration = Duration::from_secs(2);
/// How often Redis is asked whether it still stands where we left it, also without traffic.
const COMPARE_EVERY: Duration = Duration::from_secs(1);

/// Feeds the board and reports on stdout until the shutdown, or until what was readable at the start is applied.
///
/// # Errors
/// Kafka or Redis unreachable at the start, or refusing; later outages are retried for ever.
pub async fn run(world: &World, args: &Consume) -> Result<()> {
    let store = Arc::new(Store::new(&world.config)?);
    let input = Arc::new(Input::open(&world.config, TABLE, args.until_end)?);
    let ready = async {
        info!("Redis: {}", world.at_start("redis", || store.preflight()).await?);
        let ends = || {
            let input = input.clone();
            blocking(move || input.ends())
        };
        world.at_start("kafka_board", ends).await
    };
    let ends = tokio::select! {
        ends = ready => match ends {
            Ok(ends) => ends,
            // The shutdown may also be seen from within, a moment before it is seen here.
            Err(e) => return world.ended(Err(e)),
        },
        () = world.stop.cancelled() => return Ok(()),
    };
    let latency = Arc::new(Latency::new());
    let reader = Reader {
        world: world.clone(),
        runtime: Handle::current(),
        store: store.clone(),
        latency: latency.clone(),
        inquiry: Inquiry::new(input.clone()),
        input,
        topic_id: String::new(),
        generation: String::new(),
        given: Vec::new(),
        parts: BTreeMap::new(),
        others: BTreeMap::new(),
        until: args.until_end.then_some(ends),
        troubled: false,
    };
    let reading = tokio::task::spawn_blocking(move || reader.run());
    tokio::select! {
        ended = reading => ended.map_err(|e| Error::fatal("the board's reader", e))??,
        never = board::report(&store, &latency) => match never {},
    }
    // The last word, unless Redis is away.
    let _ = tokio::time::timeout(LAST_REPORT, board::report_once(&store, &latency)).await;
    Ok(())
}

struct Reader {
    world: World,
    runtime: Handle,
    store: Arc<Store>,
    latency: Arc<Latency>,
    input: Arc<Input>,
    topic_id: String,
    generation: String,
    /// The partitions that the group has given us …
    given: Vec<i32>,
    /// … and those of them that the topic has: these are read.
    parts: BTreeMap<i32, Part>,
    /// Stored offsets of all partitions, as of the last comparison.
    others: BTreeMap<i32, i64>,
    /// Where to stop, by partition.
    until: Option<BTreeMap<i32, i64>>,
    /// Asks Kafka for the lag.
    inquiry: Inquiry,
    /// Kafka has not answered since the client reported trouble.
    troubled: bool,
}

/// A partition that is read: Redis stands at `stored`; `batch` leads from there to `next`.
struct Part {
    stored: Option<i64>,
    next: i64,
    batch: Batch,
}

impl Reader {
    fn run(mut self) -> Result<()> {
        let outcome = self.follow();
        // What is not applied is read again by the next one.
        self.world.ended(outcome)
    }

    fn follow(&mut self) -> Result<()> {
        self.input.subscribe()?;
        let mut compared = Instant::now();
        while !self.world.stop.is_cancelled() {
            if let Some(partitions) = self.input.reassigned() {
                self.given = partitions;
                self.find_places()?;
            }
            let found = self.gather()?;
            let in_step = self.apply()? == Applied::Yes;
            if found == Found::Lost || !in_step {
                self.find_places()?;
            }
            if compared.elapsed() >= COMPARE_EVERY {
                self.compare()?;
                compared = Instant::now();
            }
            if let Some(answer) = self.inquiry.poll(&self.runtime, self.parts.keys().copied()) {
                self.heed(answer)?;
            }
            if self.at_end() {
                break;
            }
        }
        Ok(())
    }

    /// Reads our partitions from where Redis stands, or from where the window begins.
    fn find_places(&mut self) -> Result<()> {
        // Anything gathered but not applied is dropped here and read again.
        for partition in std::mem::take(&mut self.parts).into_keys() {
            lag_gauge(partition).set(0.0);
        }
        metrics::gauge!("falaj_consume_redis_partitions").set(self.given.len() as f64);
        if self.given.is_empty() {
            return Ok(());
        }
        self.topic_id = self.kafka(Input::topic_id)?;
        let mut claim = self.redis(|store| store.claim(&self.topic_id, None))?;
        match claim.replaced.as_deref() {
            None => {}
            Some(FROM_ARCHIVE) => {
                warn!(topic = self.input.topic(), "the board is a replay's: it is rebuilt from the topic")
            }
            Some(_) => warn!(topic = self.input.topic(), "the topic was made anew: the board is rebuilt from it"),
        }
        // Redis is asked first, so that its offsets cannot have passed the ends by honest reading.
        let since = (jiff::Timestamp::now().as_second() - NEEDED_SECONDS) * 1000;
        let places = self.kafka(|input| input.places(&self.given, since))?;
        let beyond = places.iter().any(|(p, place)| claim.offsets.get(p).is_some_and(|stored| *stored > place.end));
        if beyond {
            error!(topic = self.input.topic(), stored = ?claim.offsets, found = ?places,
                "the topic ends before what the board has counted (records were lost in Kafka): the board is rebuilt");
            claim = self.redis(|store| store.claim(&self.topic_id, Some(&claim.generation)))?;
        }
        self.generation = claim.generation;
        for (partition, place) in places {
            let stored = claim.offsets.get(&partition).copied();
            let next = start(self.input.topic(), partition, stored, place);
            self.parts.insert(partition, Part { stored, next, batch: Batch::default() });
        }
        self.others = claim.offsets;
        self.input.assign(self.parts.iter().map(|(p, part)| (*p, part.next)))
    }

    /// Adds up what is waiting, in batches by partition.
    fn gather(&mut self) -> Result<Found> {
        let began = Instant::now();
        let mut wait = PATIENCE;
        for gathered in 0..MAX_EVENTS {
            match self.input.poll(wait) {
                Polled::Record(record) => {
                    if let Some(part) = self.parts.get_mut(&record.partition()) {
                        part.take(&record, self.input.topic(), &self.latency);
                    }
                }
                Polled::CaughtUp(partition) => self.caught_up(partition),
                Polled::Nothing => break,
                Polled::Lost(why) => {
                    warn!(error = %why, "finding the place in Kafka anew");
                    return Ok(Found::Lost);
                }
                Polled::Trouble(e) if e.is_transient() => self.note_trouble(&e),
                Polled::Trouble(e) => return Err(e),
            }
            // The clock costs as much as a tenth of a record does.
            let old = gathered % 16 == 0 && began.elapsed() >= MAX_AGE;
            if old || self.input.is_reassigned() {
                break;
            }
            wait = Duration::ZERO;
        }
        Ok(Found::InOrder)
    }

    /// The end may be a control record, which no record's offset reaches.
    fn caught_up(&mut self, partition: i32) {
        let Some(part) = self.parts.get_mut(&partition) else { return };
        // The end was asked for before the first record was fetched, so that being caught up means to be past it.
        let end = self.until.as_ref().and_then(|ends| ends.get(&partition).copied());
        part.next = part.next.max(end.unwrap_or(0)).max(self.input.passed(partition).unwrap_or(0));
    }

    /// Applies every partition's batch, all calls in one go. Redis being away is waited out here, for ever.
    fn apply(&mut self) -> Result<Applied> {
        let began = Instant::now();
        let due = self.parts.iter().filter(|(_, part)| part.stored != Some(part.next));
        let calls: Vec<Call<'_>> = due.map(|(partition, part)| part.call(*partition, &self.generation)).collect();
        if calls.is_empty() {
            return Ok(Applied::Yes);
        }
        let outcomes = self.redis(|store| try_join_all(calls.iter().map(|call| store.apply(call))))?;
        let partitions: Vec<i32> = calls.iter().map(|call| call.partition).collect();
        let mut all = Applied::Yes;
        for (partition, applied) in partitions.into_iter().zip(outcomes) {
            match applied {
                Applied::Yes => self.applied(partition),
                Applied::Elsewhere => {
                    info!(partition, "Redis stands elsewhere; reading on from there");
                    metrics::counter!("falaj_consume_redis_refused_batches_total").increment(1);
                    all = Applied::Elsewhere;
                }
            }
        }
        metrics::histogram!("falaj_consume_redis_apply_seconds").record(began.elapsed());
        Ok(all)
    }

    fn applied(&mut self, partition: i32) {
        let Some(part) = self.parts.get_mut(&partition) else { return };
        part.stored = Some(part.next);
        let batch = std::mem::take(&mut part.batch);
        let now = jiff::Timestamp::now().as_microsecond();
        let histogram = metrics::histogram!("falaj_consume_redis_commit_to_applied_seconds");
        for &(commit_ts, events) in batch.commits() {
            let micros = now.saturating_sub(commit_ts).max(0);
            self.latency.record(micros, events);
            histogram.record_many(micros as f64 / 1e6, events as usize);
        }
        let (late, future) = batch.dropped();
        metrics::counter!("falaj_consume_redis_events_total").increment(batch.events());
        metrics::counter!("falaj_consume_redis_late_dropped_total").increment(late);
        metrics::counter!("falaj_consume_redis_future_dropped_total").increment(future);
        metrics::counter!("falaj_consume_redis_batches_total").increment(1);
    }

    /// Sees a lost or changed Redis also when no record comes.
    fn compare(&mut self) -> Result<()> {
        let found = self.redis(Store::look)?;
        let same = self.parts.iter().all(|(p, part)| part.stored == found.offsets.get(p).copied());
        self.others = found.offsets;
        if self.parts.is_empty() || (same && found.generation == self.generation) {
            return Ok(());
        }
        info!("Redis stands elsewhere; reading on from there");
        self.find_places()
    }

    /// The client connects again by itself and says so for each of its connections: one line is enough.
    fn note_trouble(&mut self, why: &Error) {
        if !self.troubled {
            warn!(error = %why, "Kafka is in trouble; the client goes on trying");
            self.troubled = true;
            self.inquiry.hurry();
        }
    }

    /// Shows the lag. Also sees a topic made anew that already holds as many records as the old one did.
    fn heed(&mut self, answer: Result<Answer>) -> Result<()> {
        let answer = match answer {
            Ok(answer) => answer,
            Err(e) if e.is_transient() => {
                self.world.health.failing("kafka_board", e);
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        self.world.health.ok("kafka_board");
        if std::mem::take(&mut self.troubled) {
            info!("Kafka answers again");
        }
        for (partition, end) in answer.ends {
            // Another member may have it by now.
            if let Some(part) = self.parts.get(&partition) {
                lag_gauge(partition).set((end - part.next).max(0) as f64);
            }
        }
        let same = answer.topic_id == self.topic_id && self.parts.len() == self.given.len();
        if self.given.is_empty() || same { Ok(()) } else { self.find_places() }
    }

    fn at_end(&self) -> bool {
        let stored = |p| self.parts.get(p).map_or(self.others.get(p).copied(), |part| part.stored);
        self.until.as_ref().is_some_and(|ends| ends.iter().all(|(p, end)| stored(p) >= Some(*end)))
    }

    fn kafka<T>(&self, mut op: impl FnMut(&Input) -> Result<T>) -> Result<T> {
        self.runtime.block_on(self.world.for_ever("kafka_board", || std::future::ready(op(&self.input))))
    }

    fn redis<'a, T, F: Future<Output = Result<T>>>(&'a self, mut op: impl FnMut(&'a Store) -> F) -> Result<T> {
        self.runtime.block_on(self.world.for_ever("redis", || op(&self.store)))
    }
}

fn lag_gauge(partition: i32) -> metrics::Gauge {
    metrics::gauge!("falaj_consume_redis_lag_records", "partition" => partition.to_string())
}

#[derive(PartialEq, Eq)]
enum Found {
    InOrder,
    Lost,
}

impl Part {
    fn call<'a>(&'a self, partition: i32, generation: &'a str) -> Call<'a> {
        Call { generation, partition, from: self.stored, next: self.next, batch: &self.batch }
    }

    fn take(&mut self, record: &Record<'_>, topic: &str, latency: &Latency) {
        if record.offset() < self.next {
            return;
        }
        self.next = record.offset() + 1;
        if record.is_tombstone() {
            return;
        }
        match event::parse(record.value()) {
            Ok(Some(event)) => self.batch.add(&event),
            Ok(None) => {}
            // One foreign record must not hold the board up; it is named, counted and passed.
            Err(why) => {
                error!(topic, partition = record.partition(), offset = record.offset(), why, "no engagement event");
                latency.malformed();
                metrics::counter!("falaj_consume_redis_malformed_total").increment(1);
            }
        }
    }
}

/// The offset to read from: where Redis stands, but nothing that is too old to count into the window.
fn start(topic: &str, partition: i32, stored: Option<i64>, place: Place) -> i64 {
    match stored {
        None => info!(topic, partition, from = place.needed, "building the board from the window's events"),
        Some(stored) if stored < place.first && place.needed == place.first => warn!(
            topic,
            partition,
            stored,
            first = place.first,
            "Kafka's retention has removed records of the window before they were counted: the board lacks them until \
             they have left the window; raise retention.ms of the topic"
        ),
        Some(_) => {}
    }
    stored.map_or(place.needed, |stored| stored.max(place.needed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_starts_where_redis_stands_but_never_before_what_the_window_needs() {
        let place = Place { first: 10, end: 100, needed: 40 };
        assert_eq!(start("t", 0, None, place), 40);
        assert_eq!(start("t", 0, Some(70), place), 70);
        assert_eq!(start("t", 0, Some(20), place), 40);
        assert_eq!(start("t", 0, Some(5), Place { needed: 10, ..place }), 10);
    }
}
