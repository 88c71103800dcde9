//! The base: the lookup rows at a position, in a file that is there as a whole or not at all.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{BaseHeader, CHANGES, LookupChange, RESTORE, Row, at, line, missing};
use crate::error::{Error, Result};
use crate::lsn::Lsn;

pub(super) const BASE: &str = "base.jsonl";
/// A base that counts no more: that of a slot that is gone, or that of before an adoption.
const ASIDE: &str = "base.jsonl.old";

/// Last line of the base.
#[derive(Serialize, Deserialize)]
struct End {
    rows: u64,
}

/// Writes a base so that it appears whole or not at all.
pub struct BaseWriter {
    dir: PathBuf,
    tmp: PathBuf,
    out: BufWriter<File>,
    rows: u64,
}

impl BaseWriter {
    /// Starts a base in `dir`, which is created when absent.
    ///
    /// # Errors
    /// [`Error::Fatal`] with the path when the disk refuses.
    pub fn create(dir: &Path, header: &BaseHeader) -> Result<Self> {
        let tmp = dir.join("base.tmp");
        let mut out = at(dir, fs::create_dir_all(dir).and_then(|()| File::create(&tmp)).map(BufWriter::new))?;
        at(dir, line(&mut out, header))?;
        Ok(Self { dir: dir.to_owned(), tmp, out, rows: 0 })
    }

    /// Adds a row of table number `table`: key and values as Postgres's text.
    ///
    /// # Errors
    /// [`Error::Fatal`] with the path when the disk refuses.
    pub fn row(&mut self, table: usize, key: &str, values: &[Option<&str>]) -> Result<()> {
        self.rows += 1;
        at(&self.dir, line(&mut self.out, &(table, key, values)))
    }

    /// Makes the base the current one, durably, and empties the change log.
    ///
    /// # Errors
    /// [`Error::Fatal`] with the path when the disk refuses.
    pub fn finish(mut self) -> Result<()> {
        let dir = self.dir;
        let whole = (|| {
            line(&mut self.out, &End { rows: self.rows })?;
            self.out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
            fs::rename(&self.tmp, dir.join(BASE))?;
            // Never an old base without its log.
            File::open(&dir)?.sync_all()?;
            // Entries that the new base already holds are told apart by position, so a crash between the two steps is harmless.
            empty_log(&dir)
        })();
        at(&dir, whole)
    }
}

/// A new file: who still has the old one open and should not write any more does no harm to this one.
fn empty_log(dir: &Path) -> std::io::Result<()> {
    let empty = dir.join("changes.tmp");
    File::create(&empty)?.sync_all()?;
    fs::rename(&empty, dir.join(CHANGES))?;
    File::open(dir)?.sync_all()
}

/// Takes base and log away before [`BaseWriter::finish`] of a base whose rows are as of a later moment than its `lsn`: with it,
/// the log's entries would count a second time. A crash in between leaves no state, which is refused.
///
/// # Errors
/// [`Error::Fatal`] with the path when the disk refuses.
pub fn clear(dir: &Path) -> Result<()> {
    set_aside(dir)?;
    at(dir, empty_log(dir))
}

/// Sets the base aside, where there is one, so that there is none until another one is written.
///
/// # Errors
/// [`Error::Fatal`] with the path when the disk refuses.
pub fn set_aside(dir: &Path) -> Result<()> {
    renamed(dir, BASE, ASIDE)
}

/// Undoes [`set_aside`].
///
/// # Errors
/// [`Error::Fatal`] with the path when the disk refuses.
pub fn put_back(dir: &Path) -> Result<()> {
    renamed(dir, ASIDE, BASE)
}

fn renamed(dir: &Path, from: &str, to: &str) -> Result<()> {
    match fs::rename(dir.join(from), dir.join(to)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        renamed => at(dir, renamed.and_then(|()| File::open(dir)?.sync_all())),
    }
}

/// Reads the header of the base; `None` when there is no base.
///
/// # Errors
/// [`Error::Refused`] when the file is there and is not a base.
pub fn header(dir: &Path) -> Result<Option<BaseHeader>> {
    match File::open(dir.join(BASE)) {
        Ok(file) => Ok(Some(read_header(dir, &mut BufReader::new(file))?)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => at(dir, Err(e)),
    }
}

/// Size of the base, in bytes.
///
/// # Errors
/// [`Error::Fatal`] with the path when the disk refuses.
pub fn base_bytes(dir: &Path) -> Result<u64> {
    at(dir, fs::metadata(dir.join(BASE)).map(|m| m.len()))
}

/// Like [`header`], where the state of this slot is needed.
///
/// # Errors
/// [`Error::Refused`] when there is none.
pub fn require_header(dir: &Path, slot: &str) -> Result<BaseHeader> {
    header(dir)?.ok_or_else(|| unknown(dir, slot))
}

/// The refusal of a slot whose lookup rows nobody knows.
pub fn unknown(dir: &Path, slot: &str) -> Error {
    Error::refused(
        "lookup_state",
        format!("{} holds no lookup state of slot \"{slot}\"", dir.display()),
        "the lookup rows as of the slot's position, which `falaj init` writes when it makes the slot",
        RESTORE,
    )
}

/// Reads the base, which must not lie beyond `upto`.
pub(super) fn read_base(
    dir: &Path,
    upto: Lsn,
    apply: &mut impl FnMut(&BaseHeader, usize, LookupChange) -> Result<()>,
) -> Result<BaseHeader> {
    let file = File::open(dir.join(BASE)).map_err(|e| missing(dir, &e.to_string()))?;
    let mut lines = BufReader::new(file);
    let header = read_header(dir, &mut lines)?;
    if header.lsn > upto {
        return Err(Error::refused(
            "lookup_state",
            format!("{}: the lookup rows are as of {}, the sinks stand at {upto}", dir.display(), header.lsn),
            "a state that reaches back to the sinks' position",
            "falaj init --adopt-slot (older events are then enriched with the lookup rows of now)",
        ));
    }
    read_rows(dir, lines, |table, row| apply(&header, table, LookupChange::Put(row)))?;
    Ok(header)
}

fn read_header(dir: &Path, lines: &mut impl BufRead) -> Result<BaseHeader> {
    let mut text = String::new();
    at(dir, lines.read_line(&mut text))?;
    let header: BaseHeader = serde_json::from_str(&text).map_err(|e| missing(dir, &format!("{BASE}, line 1: {e}")))?;
    match header.version {
        1 => Ok(header),
        v => Err(missing(dir, &format!("{BASE} has version {v}"))),
    }
}

fn read_rows(dir: &Path, mut lines: impl BufRead, mut row: impl FnMut(usize, Row) -> Result<()>) -> Result<()> {
    let (mut seen, mut text) = (0, String::new());
    while at(dir, lines.read_line(&mut text))? > 0 {
        let torn = |e: serde_json::Error| missing(dir, &format!("{BASE}, row {}: {e}", seen + 1));
        if !text.starts_with('[') {
            let End { rows } = serde_json::from_str(&text).map_err(torn)?;
            return match rows == seen {
                true => Ok(()),
                false => Err(missing(dir, &format!("{BASE} says {rows} rows and holds {seen}"))),
            };
        }
        let (table, key, values) = serde_json::from_str(&text).map_err(torn)?;
        row(table, (key, values))?;
        seen += 1;
        text.clear();
    }
    Err(missing(dir, &format!("{BASE} ends after {seen} rows without its last line")))
}
