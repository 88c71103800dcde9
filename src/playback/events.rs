//! A range of the archive over all its tables, merged into the order of the stream.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use super::footer::Footer;
use super::rows::Rows;
use crate::archive::{Batch, bound};
use crate::error::{Error, Result};
use crate::event::Layout;
use crate::lsn::{Lsn, Position, SlotIdentity};

/// What all open files together may hold decoded, in bytes.
const HELD: usize = 8 << 20;

/// Commit LSNs, both inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first.
    pub from: Lsn,
    /// The last.
    pub to: Lsn,
}

impl Range {
    fn has(&self, at: Position) -> bool {
        (self.from..=self.to).contains(&at.commit_lsn)
    }

    /// Whether a batch may hold rows of the range.
    pub fn overlaps(&self, batch: &Batch) -> bool {
        batch.last.commit_lsn >= self.from && batch.first.commit_lsn <= self.to
    }
}

/// A file's next row: its position, whether it is a row (a message goes before the row of the same position), the file.
type Next = (Position, bool, usize);

/// The events of a range, each table's files merged by position. Batches are opened when their turn comes.
pub struct Events {
    range: Range,
    table: Option<String>,
    /// Batches that are not open yet, oldest first.
    waiting: VecDeque<Batch>,
    /// Files with rows left; `None` where one has ended.
    files: Vec<Option<Rows>>,
    /// The next row of each file but the current one.
    next: BinaryHeap<Reverse<Next>>,
    current: Option<usize>,
    last: Option<Position>,
    layouts: Vec<Arc<Layout>>,
    opened: u64,
}

impl Events {
    /// The events of the archive whose commits lie in `range`; of one table, or of all. Looks at the footer of every batch
    /// in the range before the first event is given out. Blocking, as [`Events::advance`] is.
    ///
    /// # Errors
    /// [`Error::Refused`] for a batch that is missing or of another stream; [`Error::Fatal`] for one that cannot be read.
    pub fn open(dir: &Path, range: Range, table: Option<&str>) -> Result<Self> {
        let (mut waiting, mut before, mut slot) = (VecDeque::new(), None::<Batch>, None);
        for batch in super::batches(dir)? {
            if batch.is_streamed() {
                require_chain(&range, &batch, before.as_ref())?;
                before = Some(batch.clone());
            }
            if range.overlaps(&batch) {
                require_stream(&batch, &mut slot)?;
                waiting.push_back(batch);
            }
        }
        let (files, next, current, last, layouts, opened) = Default::default();
        Ok(Self { range, table: table.map(str::to_owned), waiting, files, next, current, last, layouts, opened })
    }

    /// Batches opened so far.
    pub fn batches(&self) -> u64 {
        self.opened
    }

    /// Moves to the next event and gives the file that stands at it; `None` at the end of the range.
    ///
    /// # Errors
    /// [`Error::Fatal`] for a file that cannot be read.
    pub fn advance(&mut self) -> Result<Option<&Rows>> {
        loop {
            if let Some(file) = self.current.take() {
                self.step(file)?;
            }
            self.open_due()?;
            let Some(Reverse((at, _, file))) = self.next.pop() else { return Ok(None) };
            self.current = Some(file);
            if at.commit_lsn > self.range.to {
                return Ok(None);
            }
            if self.last.is_some_and(|last| at < last) {
                return Err(Error::Fatal(format!(
                    "the archive is out of order: {at} stands in a batch behind its own"
                )));
            }
            self.last = Some(at);
            if self.range.has(at) {
                return Ok(self.files[file].as_ref());
            }
        }
    }

    fn step(&mut self, file: usize) -> Result<()> {
        let Some(rows) = &mut self.files[file] else { return Ok(()) };
        match rows.advance()? {
            Some(at) => self.next.push(Reverse((at, !rows.is_message(), file))),
            None => self.files[file] = None,
        }
        Ok(())
    }

    /// Opens every batch that may hold the smallest position: a copy's batches lie within the range of streamed ones.
    fn open_due(&mut self) -> Result<()> {
        let due = |first: Position, next: Option<&Reverse<Next>>| next.is_none_or(|n| first <= n.0.0);
        while self.waiting.front().is_some_and(|batch| due(batch.first, self.next.peek())) {
            if let Some(batch) = self.waiting.pop_front() {
                self.open_batch(&batch)?;
            }
        }
        Ok(())
    }

    fn open_batch(&mut self, batch: &Batch) -> Result<()> {
        let mut files = batch.files()?;
        files.retain(|file| self.table.as_ref().is_none_or(|table| *table == file.table));
        let share = HELD / files.len().max(1);
        self.opened += 1;
        for file in files {
            let mut rows = Rows::open(&file, self.layouts.len() as u32, share)?;
            rows.share(self.layout(&rows));
            self.add(rows)?;
        }
        Ok(())
    }

    fn add(&mut self, mut rows: Rows) -> Result<()> {
        let Some(at) = rows.advance()? else { return Ok(()) };
        let free = self.files.iter().position(Option::is_none).unwrap_or_else(|| {
            self.files.push(None);
            self.files.len() - 1
        });
        self.next.push(Reverse((at, !rows.is_message(), free)));
        self.files[free] = Some(rows);
        Ok(())
    }

    /// The same layout for all files of one table and schema, so that the sinks see a new one only when it is new.
    fn layout(&mut self, rows: &Rows) -> Arc<Layout> {
        let found = rows.layout();
        let same = |known: &&Arc<Layout>| {
            known.table == found.table
                && known.columns == found.columns
                && known.primary_key == found.primary_key
                && known.key == found.key
        };
        if let Some(known) = self.layouts.iter().find(same) {
            return Arc::clone(known);
        }
        self.layouts.push(Arc::clone(found));
        Arc::clone(found)
    }
}

fn require_stream(batch: &Batch, slot: &mut Option<SlotIdentity>) -> Result<()> {
    let found = Footer::of_batch(batch)?.slot;
    match slot.get_or_insert_with(|| found.clone()) {
        slot if *slot == found => Ok(()),
        slot => Err(Error::refused(
            "archive_identity",
            format!("{} is of {found}, batches before it are of {slot}", batch.path.display()),
            "one archive directory a pipeline and slot: positions of two streams cannot be compared",
            "move the files of the other one to a directory of their own",
        )),
    }
}

/// Each batch names the row before it, so that one that was taken away is not passed over.
fn require_chain(range: &Range, batch: &Batch, before: Option<&Batch>) -> Result<()> {
    // A gap before the range is of no concern, and neither is what lies before the oldest batch that is kept.
    let begin = Position { commit_lsn: range.from, ordinal: 0 };
    let Some(before) = before.filter(|_| batch.first > begin) else { return Ok(()) };
    if reaches_end(range, before)? || Footer::of_batch(batch)?.previous == Some(before.last) {
        return Ok(());
    }
    let next = Lsn(batch.first.commit_lsn.0 + u64::from(batch.first.ordinal > 0));
    let fix = match next > range.to {
        true => "put what is missing back".to_owned(),
        false => format!("put what is missing back, or --from {next} (what lies before it is then left out)"),
    };
    Err(Error::refused(
        "archive_gap",
        format!("{} does not follow the batch before it, which ends with {}", batch.path.display(), bound(before.last)),
        "every batch of the range",
        fix,
    ))
}

/// Whether nothing of the range lies behind a batch. The range's last transaction may be sealed in several.
fn reaches_end(range: &Range, batch: &Batch) -> Result<bool> {
    let last = batch.last.commit_lsn;
    Ok(last > range.to || (last == range.to && !Footer::of_batch(batch)?.partial))
}
