//! The archive sink of a backfill: batches like the stream's, by way of a work directory of its own, each with a file that
//! says how far it reaches.

use std::fs;
use std::path::{Path, PathBuf};

use super::ParquetSink;
use super::position::{not_writable, position, take_over};
use super::writer::Progress;
use crate::archive;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::lsn::{Checkpoint, Lsn, SlotIdentity};
use crate::sink::Sink;

/// Makes the work directory of a backfill and removes that of an earlier one, whose next rename then fails.
///
/// # Errors
/// [`Error::Refused`] for a directory that is not writable, or that holds another stream.
pub fn fence(config: &Config, identity: &SlotIdentity) -> Result<PathBuf> {
    let dir = &config.archive.dir;
    position(config, identity)?;
    take_over(dir, archive::HISTORY_WORK_PREFIX).map_err(|e| not_writable(dir, &e))
}

/// Starts the sink of lane number `lane`. `progress` gives what stands in a batch about a checkpoint.
///
/// # Errors
/// [`Error::Refused`] for a directory that is not writable; [`Error::Fatal`] when no thread can be started.
pub fn open_history(
    config: &Config,
    identity: &SlotIdentity,
    work: &Path,
    lane: usize,
    progress: impl Fn(Checkpoint) -> Result<Vec<u8>> + Send + 'static,
) -> Result<Box<dyn Sink>> {
    let work = work.join(format!("lane-{lane}"));
    fs::create_dir(&work).map_err(|e| not_writable(&work, &e))?;
    let progress = Progress::History(Box::new(progress));
    Ok(Box::new(ParquetSink::start(config, work, identity, progress, Checkpoint::whole(Lsn(0)))?))
}

/// What the batches of all backfills say of how far they reach. Read it when the archive is fenced. Blocking.
///
/// # Errors
/// [`Error::Fatal`] from the disk.
pub fn read_history(dir: &Path) -> Result<Vec<Vec<u8>>> {
    let batches = archive::list(dir)?;
    let read = |batch: &archive::Batch| {
        let path = batch.path.join(archive::HISTORY_FILE);
        fs::read(&path).map_err(|e| Error::fatal(format_args!("reading {}", path.display()), e))
    };
    batches.iter().filter(|batch| batch.is_history()).map(read).collect()
}
