//! The archive read back: Parquet → [`Event`](crate::event::Event), in the order of the stream, each with the bytes that it
//! had the first time.
//!
//! [`kept`] says what the archive holds, [`Events`] walks a range of it over all tables or one, [`Rows`] reads one file.
//! Memory is bounded by the number of files that are open at once, which is that of the tables of a batch.

mod column;
mod events;
mod footer;
mod rows;
#[cfg(test)]
mod tests;

use std::path::Path;

use crate::archive::{self, Batch};
use crate::error::{Error, Result};
use crate::lsn::{Lsn, SlotIdentity};
pub use events::{Events, Range};
pub use footer::Footer;
pub use rows::Rows;

/// What an archive holds: every commit from `from` on that lies below `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The stream that the LSNs belong to.
    pub slot: SlotIdentity,
    /// The first LSN from which on nothing is missing.
    pub from: Lsn,
    /// Everything committed below it is there.
    pub to: Lsn,
}

/// The sealed batches, oldest first: a listing that runs while batches are sealed may miss one and show a later one; what
/// a first listing shows was sealed after all that is older, so a second one is whole up to there.
///
/// # Errors
/// [`Error::Fatal`] when the directory cannot be read.
pub fn batches(dir: &Path) -> Result<Vec<Batch>> {
    let first = archive::list(dir)?;
    // History stands between the rows of the stream, and ends where no batch of theirs does.
    let newest = |history| first.iter().filter(|batch| batch.is_history() == history).map(|batch| batch.last).max();
    let newest = [newest(false), newest(true)];
    let is_seen = |batch: &Batch| Some(batch.last) <= newest[usize::from(batch.is_history())];
    Ok(archive::list(dir)?.into_iter().filter(is_seen).collect())
}

/// What the archive holds; `None` when nothing has been sealed. Blocking.
///
/// # Errors
/// [`Error::Fatal`] for a file that cannot be read; [`Error::Refused`] for one that an older falaj wrote.
pub fn kept(dir: &Path) -> Result<Option<Kept>> {
    let batches = batches(dir)?;
    let streamed = || batches.iter().filter(|batch| batch.is_streamed());
    let (Some(first), Some(last)) = (streamed().next(), streamed().next_back()) else { return copies(dir, &batches) };
    let (oldest, newest) = (Footer::of_batch(first)?, Footer::of_batch(last)?);
    let begin = match (oldest.origin, oldest.previous) {
        (Some(origin), _) => origin,
        // The row may have been the last of its commit or not: what comes after it is whole in any case.
        (None, Some(previous)) => Lsn(previous.commit_lsn.0 + 1),
        (None, None) => return Err(footer::missing(&first.path, archive::META_ORIGIN)),
    };
    // A copy of what was there at the beginning stands just below it.
    let copy = batches.iter().any(|batch| !batch.is_streamed() && batch.first.commit_lsn.0 + 1 == begin.0);
    let from = if copy { Lsn(begin.0 - 1) } else { begin };
    let end = match newest.partial {
        true => Lsn(last.last.commit_lsn.0 - 1),
        false => newest.resume.max(idle(dir, &newest.slot)?),
    };
    Ok(Some(Kept { slot: newest.slot, from, to: end }))
}

/// What an archive holds that has nothing but copies of rows that were there before.
fn copies(dir: &Path, batches: &[Batch]) -> Result<Option<Kept>> {
    let (Some(first), Some(last)) = (batches.first(), batches.last()) else { return Ok(None) };
    let slot = Footer::of_batch(first)?.slot;
    let to = idle(dir, &slot)?.max(last.last.commit_lsn);
    Ok(Some(Kept { slot, from: first.first.commit_lsn, to }))
}

/// The idle position, where it is one of the same stream.
fn idle(dir: &Path, slot: &SlotIdentity) -> Result<Lsn> {
    let path = dir.join(archive::POSITION_FILE);
    let failed = |e: &dyn std::fmt::Display| Error::fatal(format_args!("reading {}", path.display()), e);
    match std::fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Lsn(0)),
        Err(e) => Err(failed(&e)),
        Ok(text) => {
            let idle: archive::IdlePosition = serde_json::from_slice(&text).map_err(|e| failed(&e))?;
            Ok(if idle.identity == *slot { idle.lsn } else { Lsn(0) })
        }
    }
}
