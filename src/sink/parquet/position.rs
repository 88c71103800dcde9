//! Whose the archive is, and how far it has got: work directories, the last batch, the idle position.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use parquet::file::metadata::ParquetMetaDataReader;

use crate::archive::{self, Batch, IdlePosition};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::lsn::{Checkpoint, Lsn, SlotIdentity};

/// The later of the last batch and the idle position.
pub(super) fn position(config: &Config, identity: &SlotIdentity) -> Result<Option<Checkpoint>> {
    let dir = &config.archive.dir;
    let last = archive::list(dir)?.into_iter().rev().find(Batch::is_streamed);
    let last = last.map(|batch| batch_position(&batch, identity)).transpose()?;
    let idle = idle_position(dir, identity)?;
    // An idle position is stored only at a transaction boundary, so the later of the two has everything of the other.
    Ok(match (last, idle) {
        (Some(batch), Some(idle))
            if idle.resume >= batch.resume && batch.partial.is_none_or(|p| p.commit_lsn < idle.resume) =>
        {
            Some(idle)
        }
        (batch, idle) => batch.or(idle),
    })
}

/// Creates the archive and this owner's work directory, and removes those of earlier owners with the same prefix.
pub(super) fn take_over(dir: &Path, prefix: &str) -> std::io::Result<PathBuf> {
    fs::create_dir_all(dir)?;
    let epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let work = dir.join(format!("{prefix}{epoch}-{}", std::process::id()));
    fs::create_dir(&work)?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let foreign = entry.file_name().to_string_lossy().starts_with(prefix) && entry.path() != work;
        if foreign {
            remove_work(&entry.path(), &work)?;
        }
    }
    sync_dir(dir)?;
    Ok(work)
}

/// Moves the directory away first: a rename takes it from a zombie in one step, removing it file by file does not.
fn remove_work(theirs: &Path, ours: &Path) -> std::io::Result<()> {
    let grave = ours.join("fenced");
    match fs::rename(theirs, &grave) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(()) => fs::remove_dir_all(&grave),
    }
}

/// A full disk and the like may pass by themselves; a directory that must not be written does not.
pub(super) fn not_writable(dir: &Path, e: &std::io::Error) -> Error {
    if !matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem | ErrorKind::NotADirectory) {
        return Error::fatal(format_args!("making a directory in {}", dir.display()), e);
    }
    Error::refused(
        "archive_dir",
        format!("{}: {e}", dir.display()),
        "a directory that this user may write",
        "mend its rights, or choose another archive.dir",
    )
}

pub(super) fn sync_dir(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Position after a batch, from the footer of its first file.
fn batch_position(batch: &Batch, identity: &SlotIdentity) -> Result<Checkpoint> {
    let refuse = |found: String| {
        Error::refused(
            "archive_position",
            format!("{}: {found}", batch.path.display()),
            format!("a sealed batch of {identity}"),
            "give archive.dir another directory, or put back the batch or the slot that is meant",
        )
    };
    let file = batch.files()?.into_iter().next().ok_or_else(|| refuse("no Parquet file".into()))?;
    let open = File::open(&file.path).map_err(|e| refuse(e.to_string()))?;
    let metadata =
        ParquetMetaDataReader::new().parse_and_finish(&open).map_err(|e| refuse(format!("its footer: {e}")))?;
    let pairs = metadata.file_metadata().key_value_metadata().map_or(&[][..], Vec::as_slice);
    let value = |key: &str| pairs.iter().find(|p| p.key == key).and_then(|p| p.value.as_deref());
    let slot: Option<SlotIdentity> = value(archive::META_SLOT).and_then(|s| serde_json::from_str(s).ok());
    match slot {
        Some(slot) if slot == *identity => {}
        Some(slot) => return Err(refuse(format!("a batch of {slot}"))),
        None => return Err(refuse("no slot identity in its footer".into())),
    }
    let lsn = |key| value(key).and_then(|v| v.parse::<Lsn>().ok());
    let lookups = value(archive::META_LOOKUPS).and_then(archive::parse_bound);
    let commit = value(archive::META_COMMIT).and_then(|s| serde_json::from_str(s).ok());
    match (lsn(archive::META_END_LSN), lsn(archive::META_RESUME)) {
        (Some(end), _) => Ok(Checkpoint { lookups, commit, ..Checkpoint::whole(end) }),
        (None, Some(resume)) => Ok(Checkpoint { resume, partial: Some(batch.last), lookups, commit }),
        (None, None) => Err(refuse("no position in its footer".into())),
    }
}

fn idle_position(dir: &Path, identity: &SlotIdentity) -> Result<Option<Checkpoint>> {
    let path = dir.join(archive::POSITION_FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::fatal(format_args!("reading {}", path.display()), e)),
    };
    let refuse = |found: String| {
        Error::refused(
            "archive_position",
            format!("{}: {found}", path.display()),
            format!("a position of {identity}"),
            "give archive.dir another directory, or put back the slot that is meant",
        )
    };
    let idle: IdlePosition = serde_json::from_slice(&text).map_err(|e| refuse(e.to_string()))?;
    if idle.identity != *identity {
        return Err(refuse(format!("the position of {}", idle.identity)));
    }
    Ok(Some(Checkpoint { lookups: idle.lookups, commit: idle.commit, ..Checkpoint::whole(idle.lsn) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_no_wrong_directory() {
        let code = |kind: ErrorKind| not_writable(Path::new("archive"), &kind.into()).exit_code();
        assert_eq!([ErrorKind::PermissionDenied, ErrorKind::ReadOnlyFilesystem].map(code), [78, 78]);
        assert_eq!([ErrorKind::StorageFull, ErrorKind::QuotaExceeded].map(code), [1, 1]);
    }
}
