//! The change log while it is written. What the stream brings again is compared with what is there.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::{CHANGES, Entry, at, line, read_entries};
use crate::error::Result;

/// The open change log: appended by the stream, made durable before any sink gets what lies beyond it.
pub struct ChangeLog {
    dir: PathBuf,
    out: BufWriter<File>,
    dirty: bool,
    /// Entries beyond the position that was loaded, until the stream has brought all of them again.
    tail: Option<Tail>,
}

/// Entries that are there already.
struct Tail {
    lines: BufReader<File>,
    /// Where the next one begins.
    at: u64,
    /// The next one, once it has been looked at; empty behind the last.
    next: Option<Vec<u8>>,
}

impl Tail {
    /// Whether the next entry is this one; then it is passed over.
    fn is_next(&mut self, line: &[u8]) -> std::io::Result<bool> {
        let next = match self.next.take() {
            Some(next) => next,
            None => {
                let mut next = Vec::with_capacity(line.len());
                self.lines.read_until(b'\n', &mut next)?;
                next
            }
        };
        let same = next == line;
        self.at += if same { line.len() as u64 } else { 0 };
        self.next = (!same).then_some(next);
        Ok(same)
    }
}

impl ChangeLog {
    /// Reads entries while `loaded` says so. The others are the tail.
    pub(super) fn open(dir: &Path, loaded: impl FnMut(Entry) -> Result<bool>) -> Result<Self> {
        let path = dir.join(CHANGES);
        let file = at(dir, OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path))?;
        let read = read_entries(dir, BufReader::new(&file), loaded)?;
        let mut lines = BufReader::new(at(dir, File::open(&path))?);
        at(dir, lines.seek(SeekFrom::Start(read)))?;
        let tail = Some(Tail { lines, at: read, next: None });
        Ok(Self { dir: dir.to_owned(), out: BufWriter::new(file), dirty: false, tail })
    }

    /// Whether entries are there beyond the position that was loaded.
    ///
    /// # Errors
    /// [`crate::error::Error::Fatal`] with the path when the disk refuses.
    pub fn has_tail(&self) -> Result<bool> {
        let bytes = self.bytes()?;
        Ok(self.tail.as_ref().is_some_and(|tail| tail.at < bytes))
    }

    /// Size of the log, in bytes.
    ///
    /// # Errors
    /// [`crate::error::Error::Fatal`] with the path when the disk refuses.
    pub fn bytes(&self) -> Result<u64> {
        at(&self.dir, self.out.get_ref().metadata().map(|m| m.len()))
    }

    /// Opens the log of a base that was just written.
    ///
    /// # Errors
    /// [`crate::error::Error::Fatal`] with the path when the disk refuses.
    pub fn empty(dir: &Path) -> Result<Self> {
        Self::open(dir, |_| Ok(false))
    }

    /// Adds an entry, unless it is there already; durable only after [`ChangeLog::sync`].
    ///
    /// # Errors
    /// [`crate::error::Error::Fatal`] with the path when the disk refuses.
    pub fn append(&mut self, entry: &Entry) -> Result<()> {
        if self.is_next(entry)? {
            return Ok(());
        }
        self.dirty = true;
        if let Some(tail) = &mut self.tail {
            // The end, or what a crash has torn.
            let (file, end) = (self.out.get_mut(), tail.at);
            at(&self.dir, file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end))))?;
            self.tail = None;
        }
        at(&self.dir, line(&mut self.out, entry))
    }

    /// Whether the entry that the log goes on with is this one; then it is passed over.
    ///
    /// # Errors
    /// [`crate::error::Error::Fatal`] with the path when the disk refuses.
    pub fn is_next(&mut self, entry: &Entry) -> Result<bool> {
        let Some(tail) = &mut self.tail else { return Ok(false) };
        let mut text = Vec::new();
        at(&self.dir, line(&mut text, entry))?;
        let is_next = at(&self.dir, tail.is_next(&text))?;
        // Whoever wrote it may have been killed before it was durable.
        self.dirty |= is_next;
        Ok(is_next)
    }

    /// Makes every entry durable.
    ///
    /// # Errors
    /// [`crate::error::Error::Fatal`] with the path when the disk refuses.
    pub fn sync(&mut self) -> Result<()> {
        if self.dirty {
            at(&self.dir, self.out.flush().and_then(|()| self.out.get_ref().sync_data()))?;
            self.dirty = false;
        }
        Ok(())
    }
}
