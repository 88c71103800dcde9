//! The range to the outside system: the same keys, the same bytes, so that a peer which remembers keys takes nothing twice.
//!
//! Events of one record key go one after the other, keys go side by side. What the peer finally refuses is told with its
//! reason, and makes the result an error; there is no Kafka record that a dead letter could point to.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tracing::warn;

use super::EVENTS;
use super::walk::{Item, Walk};
use crate::change::Op;
use crate::consume::external::peer::{Outcome, Peer};
use crate::error::{Error, Result};

/// Events that wait in one lane.
const WAITING: usize = 16;

/// One event on its way, with its share of the bytes that may wait.
struct Parcel {
    id: String,
    body: Bytes,
    _bytes: OwnedSemaphorePermit,
}

/// What a lane has done.
#[derive(Default)]
struct Done {
    delivered: u64,
    refused: u64,
    abandoned: bool,
}

/// Delivers the range.
///
/// # Errors
/// As [`Peer`]; [`Error::Fatal`] when the peer has refused an event for good, after all others are delivered.
pub(super) async fn run(mut walk: Walk<'_>) -> Result<()> {
    let config = &walk.world.config;
    let peer = Arc::new(Peer::new(walk.world)?);
    peer.reach(walk.world).await?;
    let limit = config.produce.queue_bytes.0;
    let bytes = Arc::new(Semaphore::new(limit));
    let (mut lanes, mut tasks) = (Vec::new(), JoinSet::new());
    for _ in 0..config.external.in_flight.max(1) {
        let (sender, parcels) = mpsc::channel(WAITING);
        lanes.push(sender);
        tasks.spawn(deliver(Arc::clone(&peer), parcels));
    }
    while let Some(item) = walk.next()? {
        if item.event.layout.table != EVENTS || (item.event.op == Op::Read && !config.external.history) {
            continue;
        }
        let lane = lane(&item, lanes.len())?;
        let share = u32::try_from(item.json.len().clamp(1, limit)).unwrap_or(u32::MAX);
        let (id, body) = (item.event.at.event_id(), Bytes::copy_from_slice(item.json));
        let room =
            Arc::clone(&bytes).acquire_many_owned(share).await.map_err(|e| Error::fatal("waiting for room", e))?;
        // A lane ends early only with an error, which is found below.
        if lanes[lane].send(Parcel { id, body, _bytes: room }).await.is_err() {
            break;
        }
    }
    drop(lanes);
    let mut all = Done::default();
    while let Some(done) = tasks.join_next().await {
        let Done { delivered, refused, abandoned } = done.map_err(|e| Error::fatal("delivering", e))??;
        all = Done {
            delivered: all.delivered + delivered,
            refused: all.refused + refused,
            abandoned: all.abandoned | abandoned,
        };
    }
    walk.tally.stopped |= all.abandoned;
    walk.tally.summary(walk.range, &format!("{}, {} delivered", peer.shown_url(), all.delivered));
    match all.refused {
        0 => Ok(()),
        n => Err(Error::Fatal(format!(
            "{n} events were refused for good by {}; the log has their ids",
            peer.shown_url()
        ))),
    }
}

/// The lane of a record key; what has none goes through the first.
fn lane(item: &Item<'_>, lanes: usize) -> Result<usize> {
    let mut key = Vec::new();
    let written = item.event.write_key(&mut key);
    let has = written.map_err(|e| Error::fatal(format_args!("event {}", item.event.at), e))?;
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    Ok(if has { (hasher.finish() % lanes.max(1) as u64) as usize } else { 0 })
}

async fn deliver(peer: Arc<Peer>, mut parcels: mpsc::Receiver<Parcel>) -> Result<Done> {
    let mut done = Done::default();
    while let Some(parcel) = parcels.recv().await {
        match peer.deliver(&parcel.id, &parcel.body).await? {
            Outcome::Delivered => done.delivered += 1,
            Outcome::Refused(reason) => {
                warn!(id = parcel.id, reason, "refused for good");
                done.refused += 1;
            }
            Outcome::Abandoned => {
                done.abandoned = true;
                break;
            }
        }
    }
    Ok(done)
}
