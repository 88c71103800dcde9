//! The record beside the archive: what of a table is loaded. And the lock by which several processes take turns at a table.
//!
//! Losing the record costs a query, and one for each file of history, and nothing else: see [`super::chain`].

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::warn;

use super::history::History;
use crate::archive;
use crate::error::{Error, Result};
use crate::lsn::Position;

/// Directory of the records, inside the archive.
const DIR: &str = ".upload";
/// Extension of the record of a table's history: not that of the records themselves.
const HISTORY: &str = "history";
/// Longest readable part of a file name.
const NAME_CHARS: usize = 100;
/// The longest pause after failed jobs, in intervals: failed ones count towards the service's 1,500 a day.
const MOST_INTERVALS: u32 = 30;

/// What of one table is loaded into one data set.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Table name, as in the archive.
    pub table: String,
    /// Project and data set.
    pub target: String,
    /// Hash of the stream that the positions belong to.
    pub owner: String,
    /// Position of the last row that is loaded.
    pub loaded: Option<Position>,
    /// Every file up to this one is done with.
    pub through: Option<Through>,
    /// A job after `loaded` may have been sent: set before it is, removed once its end is known.
    pub open: bool,
    /// The first generation of that job that is not known to have failed.
    pub generation: u32,
    /// When the last job was sent, in seconds since 1970.
    pub sent_at: u64,
}

/// A file of a table, by the bound of its batch and its part.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Through {
    /// Last position of the batch.
    pub bound: Position,
    /// Part of the table within the batch.
    pub part: u32,
}

impl Record {
    /// A record of nothing.
    pub fn new(table: &str, target: &str, owner: &str) -> Self {
        let (table, target, owner) = (table.to_owned(), target.to_owned(), owner.to_owned());
        Self { table, target, owner, loaded: None, through: None, open: false, generation: 0, sent_at: 0 }
    }

    /// How long the next job has to wait, when there is to be `every` between two of them, and more after failures.
    pub fn wait(&self, every: Duration) -> Duration {
        wait_after(self.sent_at, every, self.generation)
    }
}

/// The same after so many jobs that have failed.
pub(super) fn wait_after(sent_at: u64, every: Duration, failed: u32) -> Duration {
    wait(sent_at, every * (1 + failed).min(MOST_INTERVALS))
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// How long is left of `every` since `sent_at`.
pub(super) fn wait(sent_at: u64, every: Duration) -> Duration {
    let due = SystemTime::UNIX_EPOCH + Duration::from_secs(sent_at) + every;
    // A clock that was set back must not stop loading for longer than the interval.
    due.duration_since(SystemTime::now()).unwrap_or(Duration::ZERO).min(every)
}

/// Where the records of one target are.
pub struct Records {
    dir: PathBuf,
}

/// Held while a table is worked on; other processes wait or take another table.
pub struct Turn {
    path: PathBuf,
    _lock: File,
}

impl Records {
    /// The records of a target, in a directory that is made where it is absent. Blocking.
    ///
    /// # Errors
    /// [`Error::Refused`] when the archive cannot be written.
    pub fn open(archive: &Path, target: &str) -> Result<Self> {
        let records = Self::look(archive, target);
        let refused = |e| {
            Error::refused(
                "archive_directory",
                format!("creating {}: {e}", records.dir.display()),
                "an archive directory that upload may write its record into",
                "mend archive.dir or its rights",
            )
        };
        std::fs::create_dir_all(&records.dir).map_err(refused)?;
        Ok(records)
    }

    /// The same to be read alone: nothing is made, and where there is no directory there are no records.
    pub fn look(archive: &Path, target: &str) -> Self {
        Self { dir: archive.join(DIR).join(short_name(target)) }
    }

    /// Takes a table; `None` while another process has it. Blocking, but never for long.
    ///
    /// # Errors
    /// [`Error::Fatal`] when the lock file cannot be used.
    pub fn take(&self, table: &str) -> Result<Option<Turn>> {
        let path = self.dir.join(short_name(table));
        let lock = beside(&path, "lock");
        let failed = |e: std::io::Error| Error::fatal(format_args!("locking {}", lock.display()), e);
        let file = File::options().create(true).truncate(false).write(true).open(&lock).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Turn { path, _lock: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(failed(e)),
        }
    }

    /// What of a table's history is loaded. Blocking.
    pub fn history(&self, table: &str) -> History {
        read(&beside(&self.dir.join(short_name(table)), HISTORY)).unwrap_or_default()
    }

    /// All records that can be read, by table. Blocking.
    ///
    /// # Errors
    /// [`Error::Fatal`] when the directory cannot be read.
    pub fn all(&self) -> Result<Vec<Record>> {
        let failed = |e| Error::fatal(format_args!("reading {}", self.dir.display()), e);
        let mut records = Vec::new();
        let entries = match std::fs::read_dir(&self.dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(records),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|e| e == "json") {
                records.extend(read::<Record>(&path));
            }
        }
        records.sort_by(|a: &Record, b| a.table.cmp(&b.table));
        Ok(records)
    }
}

impl Turn {
    /// The record; `None` when it is lost or torn. Blocking.
    pub fn read(&self) -> Option<Record> {
        read(&self.record())
    }

    /// Stores the record: whole, and on the disk when this returns. Blocking.
    ///
    /// # Errors
    /// [`Error::Fatal`] when it cannot be written.
    pub fn write(&self, record: &Record) -> Result<()> {
        self.store(&self.record(), record)
    }

    /// What of the table's history is loaded; `None` when that record is lost or torn. Blocking.
    pub fn read_history(&self) -> Option<History> {
        read(&self.history())
    }

    /// Stores what is loaded of the table's history, as [`Turn::write`] does. Blocking.
    ///
    /// # Errors
    /// As [`Turn::write`].
    pub fn write_history(&self, history: &History) -> Result<()> {
        self.store(&self.history(), history)
    }

    fn store(&self, path: &Path, record: &impl Serialize) -> Result<()> {
        let temporary = beside(path, "tmp");
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(record)?)?;
            file.sync_all()?;
            std::fs::rename(&temporary, path)?;
            File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
        };
        write().map_err(|e: std::io::Error| Error::fatal(format_args!("writing {}", path.display()), e))
    }

    /// Where a merged file may be built.
    pub fn scratch(&self) -> PathBuf {
        beside(&self.path, "parquet")
    }

    /// File of the record.
    pub fn record(&self) -> PathBuf {
        beside(&self.path, "json")
    }

    /// File of the record of the table's history.
    pub fn history(&self) -> PathBuf {
        beside(&self.path, HISTORY)
    }

    /// The command that removes both.
    pub fn removal(&self) -> String {
        format!("rm -f '{}' '{}'", self.record().display(), self.history().display())
    }
}

fn beside(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
        Err(e) => {
            warn!("{} cannot be read ({e}); the table itself is asked what it has", path.display());
            return None;
        }
    };
    serde_json::from_slice(&text)
        .inspect_err(|e| warn!("{} is no record ({e}); the table itself is asked what it has", path.display()))
        .ok()
}

/// A readable file name that is one-to-one and never too long.
pub(crate) fn short_name(text: &str) -> String {
    let readable: String = archive::encode_name(text).chars().take(NAME_CHARS).collect();
    format!("{readable}-{}", &hash(text)[..12])
}

/// SHA-256 in hexadecimal.
pub fn hash(text: &str) -> String {
    Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lsn::Lsn;

    #[test]
    fn a_record_reads_back_and_a_torn_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path(), "http://127.0.0.1:1/p.d").unwrap();
        let turn = records.take("a/b").unwrap().unwrap();
        assert_eq!(turn.read(), None);
        let at = Position { commit_lsn: Lsn(7), ordinal: 1 };
        let record = Record { loaded: Some(at), ..Record::new("a/b", "t", "me") };
        turn.write(&record).unwrap();
        assert_eq!(turn.read(), Some(record.clone()));
        assert_eq!(records.all().unwrap(), [record]);
        std::fs::write(turn.record(), "{\"torn").unwrap();
        assert_eq!(turn.read(), None);
    }

    #[test]
    fn who_looks_makes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::look(dir.path(), "t");
        assert_eq!((records.all().unwrap(), records.history("a")), (vec![], History::default()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_table_is_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path(), "t").unwrap();
        let turn = records.take("a").unwrap().unwrap();
        assert!(records.take("a").unwrap().is_none());
        assert!(records.take("b").unwrap().is_some());
        drop(turn);
        assert!(records.take("a").unwrap().is_some());
    }

    #[test]
    fn names_stay_short_and_apart() {
        let (a, b) = (short_name(&"é".repeat(200)), short_name(&"é".repeat(201)));
        assert!(a.len() < 130 && a != b);
    }
}
