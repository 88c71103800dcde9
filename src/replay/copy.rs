//! The range to a new Kafka topic, exactly once: see [`crate::sink::kafka::copy`]. Record key, timestamp and partitioner are
//! those of the first time; order is kept per record key.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use super::walk::{Walk, tables};
use crate::change::Op;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::lsn::{Checkpoint, Position};
use crate::playback;
use crate::sink::kafka::copy::{Copy, open};
use crate::sink::{Opened, Sink};
use crate::world::backoff;

/// The sink hands over after so many rows …
const MARK_EVERY: u32 = 256;
/// … or so many bytes: rows may be large.
const MARK_BYTES: usize = 256 << 10;

/// Sends the range into `topic`.
///
/// # Errors
/// [`Error::Refused`] for a topic that holds something else; as the Kafka sink.
pub(super) async fn run(mut walk: Walk<'_>, topic: &str) -> Result<()> {
    let world = walk.world;
    let config = Arc::new(into_topic(&world.config, topic));
    let copy = what(&walk, topic)?;
    refuse_live(&world.config, &config, &copy)?;
    let mut delays = backoff();
    loop {
        let opened = tokio::select! {
            opened = world.at_start("kafka", || open(Arc::clone(&config), &copy, &world.stop)) => opened?,
            () = world.stop.cancelled() => return Ok(()),
        };
        match send(&mut walk, opened).await {
            Ok(()) => return Ok(walk.tally.summary(walk.range, &format!("topic {topic}"))),
            Err(error) if error.is_transient() && !world.stop.is_cancelled() => {
                let delay = delays.next().unwrap_or(Duration::from_secs(5));
                warn!(%error, ?delay, "taking the replay up again from its stored position");
                let _ = world.pause(delay).await;
                walk = Walk::new(world, walk.range)?;
            }
            Err(error) => return Err(error),
        }
    }
}

fn into_topic(config: &Config, topic: &str) -> Config {
    let mut config = config.clone();
    config.kafka.topic = topic.to_owned();
    config
}

fn what(walk: &Walk<'_>, topic: &str) -> Result<Copy> {
    let config = &walk.world.config;
    let tables = tables(walk.world, walk.range)?;
    let kept =
        playback::kept(&config.archive.dir)?.ok_or_else(|| Error::Fatal("the archive has become empty".into()))?;
    let (from, to) = (walk.range.from, walk.range.to);
    Ok(Copy { name: topic.to_owned(), identity: kept.slot, from, to, tables })
}

/// The pipeline's own topics have these events already, or will get them.
fn refuse_live(live: &Config, config: &Config, copy: &Copy) -> Result<()> {
    let own = [live.checkpoint_topic(), live.dead_letter_topic()];
    let is_own = |topic: &String| own.contains(topic) || copy.tables.iter().any(|table| live.topic(table) == *topic);
    match copy.tables.iter().map(|table| config.topic(table)).find(is_own) {
        None => Ok(()),
        Some(topic) => Err(Error::refused(
            "replay_topic",
            format!("topic {topic} is one of pipeline \"{}\" itself", live.pipeline),
            "a topic of its own: in the stream's the events would stand twice",
            format!("--topic {topic}.replay"),
        )),
    }
}

async fn send(walk: &mut Walk<'_>, opened: Opened) -> Result<()> {
    let Opened { mut sink, position } = opened;
    let outcome = feed(walk, sink.as_mut(), position.map(|stored| stored.checkpoint())).await;
    sink.stop().await;
    outcome
}

/// Pushes what is not in yet, and waits until all of it is durable. A position is done when a later one begins: a message
/// stands at that of the row behind it.
async fn feed(walk: &mut Walk<'_>, sink: &mut dyn Sink, had: Option<Checkpoint>) -> Result<()> {
    let from = walk.range.from;
    let at = |position: Option<Position>| Checkpoint { partial: position, ..Checkpoint::whole(from) };
    let (mut prepared, mut pushed, mut skipped) = (BTreeSet::new(), (0_u32, 0_usize), 0);
    let (mut last, mut is_message) = (had.and_then(|had| had.partial), false);
    while let Some(item) = walk.next()? {
        if had.is_some_and(|had| had.has(item.event.at)) {
            skipped += 1;
        }
        if (pushed.0 >= MARK_EVERY || pushed.1 >= MARK_BYTES) && last < Some(item.event.at) {
            pushed = (0, 0);
            sink.mark(at(last), true).await?;
        }
        if prepared.insert(item.event.layout.generation) {
            sink.prepare(item.event.layout).await?;
        }
        sink.push(&item.event)?;
        last = last.max(Some(item.event.at));
        is_message = matches!(item.event.op, Op::Message { .. });
        pushed = (pushed.0 + 1, pushed.1 + item.json.len());
    }
    walk.tally.skipped = skipped;
    if walk.tally.stopped && is_message {
        // Its row has not been sent: what came since the last mark is rolled back, and sent by the next run.
        return Ok(());
    }
    if last.is_some() && !sink.stored().checkpoint().covers(at(last)) {
        sink.flush(at(last)).await?;
        while !sink.stored().checkpoint().covers(at(last)) {
            sink.moved().await?;
        }
    }
    Ok(())
}
