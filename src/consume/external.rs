//! Kafka → outside HTTP system: one POST an event, at least once, under a stable `Idempotency-Key`, the same bytes each time.
//!
//! The path has its own consumer group, so that a slow peer delays nobody else. The promise: an offset is committed only
//! when every event below it is delivered or stands in the dead-letter topic. Exactly once needs a peer that honours the
//! key. Events of one record key are sent one after the other, in the order of Kafka; keys go side by side. An event that
//! is tried again holds back its own key; its partition runs ahead of it by a bounded distance.

mod answer;
mod dead_letter;
mod envelope;
mod group;
mod identity;
mod ledger;
pub(crate) mod peer;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use metrics::{counter, gauge, histogram};
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio::time::{Interval, MissedTickBehavior, interval, timeout};
use tracing::{error, info, warn};

use crate::cli;
use crate::error::{Error, Result};
use crate::world::World;
use dead_letter::{DeadLetter, DeadLetters};
use envelope::Content;
use group::{Group, Next, SharedLedger};
use identity::Identity;
use ledger::{Job, Record};
use peer::{Outcome, Peer};

/// The one table whose events go out.
const TABLE: &str = "engagement_events";
/// How often offsets are committed.
const COMMIT_EVERY: Duration = Duration::from_millis(500);
/// How long requests under way may take after a shutdown signal.
const DRAIN: Duration = Duration::from_secs(4);
/// Events that are being sent or wait to be sent again, per request that may be under way. The waiting ones keep other
/// keys from nothing; this bounds how many there are.
const LANES: usize = 16;

/// Delivers every event of the topic to `external.url`, until the shutdown, or with `--until-end` until the events that
/// were there at the start are delivered or dead letters.
///
/// # Errors
/// [`Error::Refused`] for a bad address or missing topics, [`Error::Unreachable`] when Kafka or the peer does not answer
/// at the start. Later outages are waited for.
pub async fn run(world: &World, args: &cli::Consume) -> Result<()> {
    match start(world, args).await {
        Ok((outlet, group)) => outlet.run(group).await,
        Err(e) => world.ended(Err(e)),
    }
}

async fn start<'a>(world: &'a World, args: &cli::Consume) -> Result<(Outlet<'a>, Group)> {
    let sender = Sender {
        peer: Peer::new(world)?,
        letters: DeadLetters::new(&world.config.kafka, world.config.dead_letter_topic())?,
        topic: world.config.topic(TABLE),
        world: world.clone(),
    };
    group::require_topics(world, [sender.topic.clone(), world.config.dead_letter_topic()]).await?;
    sender.peer.reach(world).await?;
    let group = Group::join(world, TABLE, args.until_end)?;
    let ends = match args.until_end {
        true => Some(world.at_start(group::CHECK, || group.ends()).await?),
        false => None,
    };
    info!(topic = group.topic(), url = sender.peer.shown_url(), "delivering");
    let (sender, tasks, identity) = (Arc::new(sender), JoinSet::new(), Identity::new());
    Ok((Outlet { world, sender, tasks, ends, identity, troubled: false, asked: None }, group))
}

/// The read loop with everything it holds.
struct Outlet<'a> {
    world: &'a World,
    sender: Arc<Sender>,
    tasks: JoinSet<Sent>,
    /// With `--until-end`: the last stable offset of each partition, as found at the start.
    ends: Option<BTreeMap<i32, i64>>,
    identity: Identity,
    /// Kafka has not answered since.
    troubled: bool,
    /// The question whether it answers again, under way.
    asked: Option<JoinHandle<Result<BTreeMap<i32, i64>>>>,
}

impl Outlet<'_> {
    async fn run(mut self, mut group: Group) -> Result<()> {
        while let Read::Anew = self.read(&group).await? {
            let topic = group.topic().to_owned();
            warn!(topic, "the topic was made anew: what is in hand is delivered, then it is read from its beginning");
            let left = group.give_up(&self.world.stop).await;
            if !self.finish(&left).await? {
                let unfinished = left.lock().unfinished();
                error!(topic, unfinished, "stopped; these events are in Kafka no more: falaj replay --sink external");
                return Ok(());
            }
            group = Group::join(self.world, TABLE, self.ends.is_some())?;
            if self.ends.is_some() {
                self.ends = Some(self.world.for_ever(group::CHECK, || group.ends()).await?);
            }
        }
        self.drain(group).await
    }

    async fn read(&mut self, group: &Group) -> Result<Read> {
        let mut tick = ticks();
        while !self.world.stop.is_cancelled() {
            self.launch(group.ledger());
            group.balance()?;
            tokio::select! {
                () = self.world.stop.cancelled() => {}
                next = group.next() => self.take(group, next?),
                Some(sent) = self.tasks.join_next() => note(group.ledger(), sent)?,
                _ = tick.tick() => {
                    if self.identity.has_changed(group).await {
                        return Ok(Read::Anew);
                    }
                    group.commit();
                    self.ask(group).await;
                    if group.ledger().lock().owns_nothing() {
                        self.sender.rest();
                    }
                    if self.at_end(group).await? {
                        // Its offsets would be of another topic.
                        if self.identity.changes_now(group).await {
                            return Ok(Read::Anew);
                        }
                        break;
                    }
                }
            }
        }
        Ok(Read::Whole)
    }

    /// Delivers what a ledger still has; `false` when a shutdown comes before.
    async fn finish(&mut self, left: &SharedLedger) -> Result<bool> {
        while left.lock().unfinished() > 0 {
            self.launch(left);
            tokio::select! {
                () = self.world.stop.cancelled() => return Ok(false),
                Some(sent) = self.tasks.join_next() => note(left, sent)?,
            }
        }
        Ok(true)
    }

    /// Starts what may be sent now.
    fn launch(&mut self, ledger: &SharedLedger) {
        let lanes = self.world.config.external.in_flight.saturating_mul(LANES);
        let mut ledger = ledger.lock();
        while self.tasks.len() < lanes {
            let Some(job) = ledger.next_job() else { break };
            self.tasks.spawn(self.sender.clone().send(job));
        }
        gauge!("falaj_external_waiting_events").set(ledger.unfinished() as f64);
    }

    fn take(&mut self, group: &Group, next: Next) {
        match next {
            Next::Record(record) => {
                self.admit(group.ledger(), record);
                self.answered();
            }
            Next::End(partition) => {
                // Behind the last event stands the mark of its transaction, which is passed as well: once retention has
                // deleted that too, the log begins where nothing is missing.
                let end = self.ends.as_ref().and_then(|ends| ends.get(&partition).copied());
                if let Some(read) = end.max(group.passed(partition)) {
                    group.ledger().lock().reached(partition, read);
                }
                self.answered();
            }
            Next::Trouble(why) => {
                // The client connects again by itself and says so for each of its connections: one line is enough.
                if !std::mem::replace(&mut self.troubled, true) {
                    warn!(why, "reading from Kafka; the client goes on trying");
                }
                self.world.health.failing(group::CHECK, why);
            }
        }
    }

    fn answered(&mut self) {
        self.world.health.ok(group::CHECK);
        if std::mem::take(&mut self.troubled) {
            self.asked = None;
            info!("Kafka answers again");
        }
    }

    /// A quiet topic brings nothing that shows that Kafka answers again: it is asked, beside the reading.
    async fn ask(&mut self, group: &Group) {
        if !self.troubled {
            return;
        }
        if let Some(asked) = self.asked.take_if(|asked| asked.is_finished())
            && matches!(asked.await, Ok(Ok(_)))
        {
            return self.answered();
        }
        self.asked.get_or_insert_with(|| tokio::spawn(group.ends()));
    }

    fn admit(&self, ledger: &SharedLedger, record: Record) {
        let mut ledger = ledger.lock();
        match record.content {
            // A tombstone says nothing that the delete before it has not said.
            _ if record.body.is_none() => ledger.pass(record.partition, record.offset + 1),
            Content::History { .. } if !self.world.config.external.history => {
                counter!("falaj_external_history_skipped_total").increment(1);
                ledger.pass(record.partition, record.offset + 1);
            }
            _ => ledger.admit(record),
        }
    }

    /// Whether all that was there at the start is done, here or by another member of the group, and Kafka knows.
    async fn at_end(&self, group: &Group) -> Result<bool> {
        let Some(ends) = &self.ends else { return Ok(false) };
        if ends.iter().any(|(&partition, &end)| group.ledger().lock().is_done_to(partition, end) == Some(false)) {
            return Ok(false);
        }
        match group.is_done_to(ends).await {
            Err(e) if e.is_transient() => Ok(false),
            answer => answer,
        }
    }

    /// Lets requests under way finish, commits, leaves the group.
    async fn drain(mut self, group: Group) -> Result<()> {
        let finish = async {
            while let Some(sent) = self.tasks.join_next().await {
                note(group.ledger(), sent)?;
            }
            Ok(())
        };
        let outcome = timeout(DRAIN, finish).await;
        let unfinished = group.ledger().lock().unfinished();
        self.tasks.abort_all();
        match self.identity.changes_now(&group).await {
            true => drop(group.give_up(&self.world.stop).await),
            false => group.leave().await,
        }
        if unfinished > 0 {
            info!(unfinished, "stopped; these events are delivered after the next start");
        }
        outcome.unwrap_or(Ok(()))
    }
}

/// How the reading ended.
enum Read {
    /// All that was wanted was read, or a shutdown came.
    Whole,
    /// The topic is another one.
    Anew,
}

fn note(ledger: &SharedLedger, sent: Result<Sent, JoinError>) -> Result<()> {
    let Sent { job, finished } = sent.map_err(|e| Error::fatal("delivering", e))?;
    if finished? {
        ledger.lock().done(&job.record, job.generation);
    }
    Ok(())
}

/// What a delivery needs; shared by all of them.
struct Sender {
    peer: Peer,
    letters: DeadLetters,
    topic: String,
    world: World,
}

/// The end of a job: `true` when the event is delivered or a dead letter, `false` when it was given up.
struct Sent {
    job: Job,
    finished: Result<bool>,
}

impl Sender {
    async fn send(self: Arc<Self>, job: Job) -> Sent {
        let finished = tokio::select! {
            finished = self.finish(&job.record) => finished,
            () = job.revoked.cancelled() => Ok(false),
        };
        Sent { job, finished }
    }

    /// Nothing is to be sent by this process; what has failed is for others to tell.
    fn rest(&self) {
        self.peer.rest();
        self.world.health.mend("dead_letter");
    }

    async fn finish(&self, record: &Record) -> Result<bool> {
        let outcome = match (&record.content, &record.body) {
            (Content::Event { id } | Content::History { id }, Some(body)) => self.peer.deliver(id, body).await?,
            (Content::Malformed(why), _) => Outcome::Refused(why.clone()),
            (_, None) => Outcome::Refused("a record without a value".into()),
        };
        match outcome {
            Outcome::Delivered => {
                delivered(record);
                Ok(true)
            }
            Outcome::Refused(reason) => self.bury(record, &reason).await,
            Outcome::Abandoned => Ok(false),
        }
    }

    /// Writes the dead letter, however long Kafka may be away.
    async fn bury(&self, record: &Record, reason: &str) -> Result<bool> {
        let url = self.peer.shown_url();
        let letter = DeadLetter::new(record, reason, &url, &self.topic);
        let written = self.world.for_ever("dead_letter", || self.letters.put(record.key.as_deref(), &letter)).await;
        match written {
            Ok(()) => {
                warn!(id = record.content.id(), reason, "dead letter");
                counter!("falaj_external_dead_letters_total").increment(1);
                Ok(true)
            }
            Err(_) if self.world.stop.is_cancelled() => Ok(false),
            Err(e) => Err(e),
        }
    }
}

fn delivered(record: &Record) {
    counter!("falaj_external_delivered_total").increment(1);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    if let Some(committed) = record.timestamp.and_then(|ms| u64::try_from(ms).ok()) {
        histogram!("falaj_external_latency_seconds").record(now.saturating_sub(Duration::from_millis(committed)));
    }
}

fn ticks() -> Interval {
    let mut tick = interval(COMMIT_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick
}
