//! Kafka → batches → Redis: the one loop of the board's outlet.
//!
//! Gather what is waiting, add it up, apply it, again. With little traffic a batch is what one Kafka transaction
//! brought; under load it is what came in while the batch before was applied.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use tokio::runtime::Handle;
use tracing::{error, info, warn};

use super::batch::{FUTURE_SECONDS, WINDOW_SECONDS};
use super::board;
use super::input::{Input, Polled, Share};
use super::inquiry::{self, Answer, Inquiry};
use super::latency::Latency;
use super::malformed::Malformed;
use super::part::{Part, lag_gauge};
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
/// How long the group may take to give this member its share: a member that is held up delays it for as long.
const GROUP_PATIENCE: Duration = Duration::from_secs(45);

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
        shown: Vec::new(),
        others: BTreeMap::new(),
        until: args.until_end.then_some(ends),
        malformed: Malformed::default(),
        troubled: false,
        left_out: false,
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
    /// The partitions of the last share: their lag is shown until the next share leaves them to others.
    shown: Vec<i32>,
    /// Stored offsets of all partitions, as of the last comparison.
    others: BTreeMap<i32, i64>,
    /// Where to stop, by partition.
    until: Option<BTreeMap<i32, i64>>,
    /// Asks Kafka for the lag.
    inquiry: Inquiry,
    malformed: Malformed,
    /// Kafka has not answered since the client reported trouble.
    troubled: bool,
    /// The group has given us nothing for longer than it may take.
    left_out: bool,
}

impl Reader {
    fn run(mut self) -> Result<()> {
        let outcome = self.follow();
        self.malformed.close();
        // What is not applied is read again by the next one.
        self.world.ended(outcome)
    }

    fn follow(&mut self) -> Result<()> {
        self.input.subscribe()?;
        let mut compared = Instant::now();
        while !self.world.stop.is_cancelled() {
            if let Some(share) = self.input.reassigned() {
                self.take_share(share);
                self.find_places()?;
            }
            let found = self.gather()?;
            let events = self.parts.values().map(|part| part.batch.events()).sum();
            let in_step = self.apply()? == Applied::Yes;
            if in_step {
                self.malformed.applied(events, &self.world.health);
            }
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

    /// Between two shares nobody feeds the board from a partition: its lag is not 0 before another member has it.
    fn take_share(&mut self, share: Share) {
        let Share::Assigned(partitions) = share else { return self.given.clear() };
        for elsewhere in self.shown.iter().filter(|partition| !partitions.contains(partition)) {
            lag_gauge(*elsewhere).set(0.0);
        }
        self.shown.clone_from(&partitions);
        self.given = partitions;
    }

    /// Reads our partitions from where Redis stands, or from where the window begins.
    fn find_places(&mut self) -> Result<()> {
        // Anything gathered but not applied is dropped here and read again.
        self.parts.clear();
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
            self.parts.insert(partition, Part::at(self.input.topic(), partition, stored, place));
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
                    if let Some(part) = self.parts.get_mut(&record.partition())
                        && let Err(why) = part.take(&record)
                    {
                        self.latency.malformed();
                        metrics::counter!("falaj_consume_redis_malformed_total").increment(1);
                        self.malformed.note(self.input.topic(), record.partition(), record.offset(), &why);
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
        self.look_at_group();
        if std::mem::take(&mut self.troubled) {
            info!("Kafka answers again");
        }
        self.show_lag(&answer.ends);
        let same = answer.topic_id == self.topic_id && self.parts.len() == self.given.len();
        if self.given.is_empty() || same { Ok(()) } else { self.find_places() }
    }

    /// Kafka answers; whether this member may read is its group's business.
    fn look_at_group(&mut self) {
        let Some(waited) = self.input.waited().filter(|waited| *waited > GROUP_PATIENCE) else {
            self.world.health.ok("kafka_board");
            if std::mem::take(&mut self.left_out) {
                info!("the group has given this process its share");
            }
            return;
        };
        let group = format!("{}.redis", self.world.config.pipeline);
        let why = format!(
            "the group {group} has given this process nothing yet, for {} s: its coordinator is away, or it waits for \
             another member that does not answer (kafka-consumer-groups.sh --describe --members --group {group})",
            waited.as_secs()
        );
        if !std::mem::replace(&mut self.left_out, true) {
            warn!("{why}");
        }
        self.world.health.failing("kafka_board", why);
    }

    fn show_lag(&self, ends: &BTreeMap<i32, i64>) {
        for (partition, end) in ends {
            // Another member may have it by now.
            if let Some(part) = self.parts.get(partition) {
                lag_gauge(*partition).set(part.lag(*end) as f64);
            }
        }
    }

    /// Shows the lag while Redis is waited for, and with it the loop.
    async fn go_on_showing_lag(&self) -> Infallible {
        loop {
            tokio::time::sleep(inquiry::EVERY).await;
            if let Ok(answer) = inquiry::answer(&self.input, self.parts.keys().copied().collect()).await {
                self.show_lag(&answer.ends);
            }
        }
    }

    fn at_end(&self) -> bool {
        let stored = |p| self.parts.get(p).map_or(self.others.get(p).copied(), |part| part.stored);
        self.until.as_ref().is_some_and(|ends| ends.iter().all(|(p, end)| stored(p) >= Some(*end)))
    }

    fn kafka<T>(&self, mut op: impl FnMut(&Input) -> Result<T>) -> Result<T> {
        self.runtime.block_on(self.world.for_ever("kafka_board", || std::future::ready(op(&self.input))))
    }

    fn redis<'a, T, F: Future<Output = Result<T>>>(&'a self, mut op: impl FnMut(&'a Store) -> F) -> Result<T> {
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                answer = self.world.for_ever("redis", || op(&self.store)) => answer,
                never = self.go_on_showing_lag() => match never {},
            }
        })
    }
}

#[derive(PartialEq, Eq)]
enum Found {
    InOrder,
    Lost,
}
