//! What was committed when the slot began: `verify` tells rows that are older than the slot from rows that were lost.

use std::fs::{self, File};
use std::path::Path;

use crate::enrich::state::{self, Snapshot};
use crate::error::{Error, Result};

const FILE: &str = "origin.json";

/// Stores the snapshot that the creation of the slot exported; the directory is there.
///
/// # Errors
/// [`Error::Fatal`] when the disk refuses.
pub(super) fn write(dir: &Path, snapshot: &Snapshot) -> Result<()> {
    let (path, tmp) = (dir.join(FILE), dir.join("origin.tmp"));
    let written = (|| {
        let file = File::create(&tmp)?;
        serde_json::to_writer(&file, snapshot)?;
        file.sync_all()?;
        fs::rename(&tmp, &path)?;
        File::open(dir)?.sync_all()
    })();
    written.map_err(|e: std::io::Error| Error::fatal(format_args!("writing {}", path.display()), e))
}

/// The snapshot, where there is one of the slot that the lookup state belongs to.
///
/// # Errors
/// [`Error::Fatal`] for a file that cannot be read.
pub fn read(dir: &Path) -> Result<Option<Snapshot>> {
    let path = dir.join(FILE);
    let text = match fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(|e| Error::fatal(format_args!("reading {}", path.display()), e))?,
    };
    let snapshot: Snapshot =
        serde_json::from_slice(&text).map_err(|e| Error::fatal(format_args!("reading {}", path.display()), e))?;
    // A slot that was adopted without a state began elsewhere.
    let origin = state::header(dir)?.map(|header| header.origin);
    Ok(Some(snapshot).filter(|snapshot| origin == Some(snapshot.lsn)))
}
