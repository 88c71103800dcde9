//! The one loop: slot → decode → enrich → sinks → feedback.
//!
//! Every failure that can pass ends the session: open transactions are rolled back, and the next session starts from the
//! positions that the sinks have stored. There is no other way to recover, so this one is well trodden.

mod from_bookmark;
mod held;
mod history;
mod lag;
mod messages;
mod row;
mod session;
mod start;
mod until;
mod walk;

use std::sync::Arc;
use std::time::Instant;

use tokio::time::{Duration, MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::cli;
use crate::config::{Config, Envelope, SinkName};
use crate::error::{Error, Result};
use crate::lsn::{Lsn, SlotIdentity};
use crate::sink::Stored;
use crate::source::slot::WireForm;
use crate::world::{START_PATIENCE, World, backoff};
pub(crate) use held::peek;
use session::Session;
use until::Until;

/// How often age limits are looked at and lag is measured.
const TICK: Duration = Duration::from_millis(500);
/// How often a position that moves without events is stored.
const IDLE: Duration = Duration::from_secs(10);
/// How long the sinks may take to store what stands before a refused change.
const FAREWELL: Duration = Duration::from_secs(10);
/// A session that has run this long is worth another one at once.
const STEADY: Duration = Duration::from_secs(5);

/// How a session ended.
enum End {
    /// All that was asked for is durable and acknowledged.
    Done,
    /// The stream has to be read again, with what this session has learnt about its values.
    Again(Option<WireForm>),
}

/// Runs the role until shutdown, or until `--until-lsn` is reached.
///
/// # Errors
/// [`Error::Refused`] before anything is written; [`Error::Fenced`] when another owner has taken over;
/// [`Error::Unreachable`] when a server cannot be reached at the start.
pub async fn run(world: &World, args: &cli::Produce) -> Result<()> {
    let world = &with_envelope(world, args.envelope);
    let chosen = choose(&world.config.produce.sinks, args.sinks.as_deref())?;
    let other = match &args.from_bookmark {
        Some(name) => Some(from_bookmark::prepare(world, name).await?),
        None => None,
    };
    let world = other.as_ref().unwrap_or(world);
    if let Some(lsn) = args.start {
        start::begin(world, lsn).await?;
    }
    let mut until = args.until_lsn.map(Until::new);
    let (started, mut delays, mut has_run, mut form) = (Instant::now(), backoff(), false, None);
    while !world.stop.is_cancelled() {
        let outcome = match Session::open(world, &chosen, form).await {
            Ok(None) => return Ok(()),
            Ok(Some(session)) => {
                has_run = true;
                world.health.ok("replication");
                let opened = Instant::now();
                let outcome = run_session(world, session, until.as_mut()).await;
                if opened.elapsed() > STEADY {
                    delays = backoff();
                }
                outcome
            }
            // Nothing has been written: there is nothing to drain.
            Err(_) if world.stop.is_cancelled() => return Ok(()),
            Err(error) => Err(error),
        };
        let error = match outcome {
            Ok(End::Done) => return Ok(()),
            Ok(End::Again(learnt)) => {
                form = learnt.or(form);
                continue;
            }
            Err(error) => error,
        };
        world.health.failing("replication", &error);
        if !error.is_transient() || (!has_run && started.elapsed() > START_PATIENCE) {
            return Err(error);
        }
        let delay = delays.next().unwrap_or(Duration::from_secs(5));
        warn!(%error, ?delay, "starting again from the stored positions");
        metrics::counter!("falaj_produce_restarts_total").increment(1);
        let _ = world.pause(delay).await;
    }
    Ok(())
}

/// The world with the flag's envelope in its configuration.
fn with_envelope(world: &World, flag: Option<Envelope>) -> World {
    let mut world = world.clone();
    if let Some(envelope) = flag {
        Arc::make_mut(&mut world.config).kafka.envelope = envelope;
    }
    world
}

/// The sinks of this run: all configured ones, or those of the flag.
fn choose(configured: &[SinkName], flag: Option<&[SinkName]>) -> Result<Vec<SinkName>> {
    let chosen = flag.unwrap_or(configured);
    match chosen.iter().find(|sink| !configured.contains(sink)) {
        None => Ok(chosen.to_vec()),
        Some(sink) => Err(Error::Usage(format!(
            "--sinks names {sink:?}, which is not configured: only the sinks of produce.sinks hold the acknowledgement back; add it there"
        ))),
    }
}

/// Positions of the configured sinks, read without taking them over.
///
/// # Errors
/// As the sinks' own: unreachable, or the position of another stream.
pub async fn positions(config: &Arc<Config>, identity: &SlotIdentity) -> Result<Vec<(&'static str, Option<Stored>)>> {
    let mut found = Vec::new();
    for name in &config.produce.sinks {
        found.push(peek(*name, config, identity, None).await?);
    }
    Ok(found)
}

/// Decodes, enriches and encodes everything up to `lsn`, keeps nothing and acknowledges nothing. For measurements.
/// Prints rows and seconds as one line of JSON.
///
/// # Errors
/// As [`run`].
pub async fn measure(world: &World, lsn: Lsn) -> Result<()> {
    let Some(mut session) = Session::discarding(world).await? else { return Ok(()) };
    let (mut until, started) = (Until::new(lsn), Instant::now());
    loop {
        let chunk = session.stream.next().await?;
        if session.walk(&chunk, Some(&mut until)).await?.is_some() {
            break;
        }
    }
    let (rows, seconds) = (session.walk.events(), started.elapsed().as_secs_f64());
    println!("{}", serde_json::json!({ "rows": rows, "seconds": seconds, "rows_per_second": rows as f64 / seconds }));
    session.close().await;
    Ok(())
}

async fn run_session(world: &World, mut session: Session, mut until: Option<&mut Until>) -> Result<End> {
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut idle = Instant::now();
    let outcome = loop {
        tokio::select! {
            biased;
            () = world.stop.cancelled() => {
                // What may be of another history comes again.
                let drained = if session.walk.history.is_proven() { drain(&mut session).await } else { Ok(()) };
                break drained.map(|()| End::Done);
            }
            moved = session.outlets.moved() => match moved.and_then(|()| session.acknowledge()) {
                Ok(()) => {}
                Err(error) => break Err(error),
            },
            _ = tick.tick() => {
                session.measure();
                let rest = idle.elapsed() >= IDLE;
                if rest {
                    idle = Instant::now();
                }
                if let Err(error) = session.settle(rest).await {
                    break Err(error);
                }
                match session.is_outgrown() {
                    Ok(false) => {}
                    Ok(true) => {
                        info!("the lookup log has grown long: another session makes a new base of it");
                        break drain(&mut session).await.map(|()| End::Again(None));
                    }
                    Err(error) => break Err(error),
                }
            }
            chunk = session.stream.next() => {
                let walked = match chunk {
                    Ok(chunk) => session.walk(&chunk, until.as_deref_mut()).await,
                    Err(error) => Err(error),
                };
                match walked {
                    Ok(None) => {}
                    Ok(Some(until::Reached::End(at))) => break finish(&mut session, at).await,
                    Ok(Some(until::Reached::ReadAgain)) => break Ok(End::Again(None)),
                    Ok(Some(until::Reached::ReadInText)) => break Ok(End::Again(Some(WireForm::Text))),
                    Err(error @ Error::Refused(_)) => {
                        if session.walk.history.is_proven() {
                            keep(world, &mut session).await;
                        }
                        break Err(error);
                    }
                    Err(error) => break Err(error),
                }
            }
        }
    };
    session.close().await;
    outcome
}

/// What stands before a change that was refused is stored and acknowledged, so that a mended configuration need not know the
/// schemas that were before it. Where that fails it comes again.
async fn keep(world: &World, session: &mut Session) {
    let drained = tokio::select! {
        drained = tokio::time::timeout(FAREWELL, drain(session)) => drained.unwrap_or(Ok(())),
        () = world.stop.cancelled() => Ok(()),
    };
    if let Err(error) = drained {
        warn!(%error, "what stands before the refused change comes again");
    }
}

/// Makes everything that has been walked durable and acknowledges it.
async fn drain(session: &mut Session) -> Result<()> {
    let checkpoint = session.walk.checkpoint();
    info!(%checkpoint.resume, "draining");
    session.store().await?;
    session.acknowledge()
}

async fn finish(session: &mut Session, at: Lsn) -> Result<End> {
    session.walk.reach(at);
    drain(session).await?;
    info!(lsn = %at, rows = session.walk.events(), seconds = session.walk.seconds(), "reached");
    Ok(End::Done)
}
