//! The rows of one copy on their way to the sinks.

use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;

use super::lane::{BLOCK, Copied, Shared};
use super::outlet::Outlet;
use super::plan::{Item, Key, Mark, Plan};
use super::row;
use super::statement::is_by_place;
use crate::change::Op;
use crate::error::{Error, Result};
use crate::event::{Cells, Event};
use crate::pgoutput::Cell;
use crate::value;

/// Sinks are told how far it is after this many rows …
const ROWS: u64 = 1024;
/// … or this many bytes.
const BYTES: usize = 128 << 10;

/// When a mark is to be stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// When the sink's own limits say so.
    Due,
    /// At once.
    Now,
    /// At once, and the range is whole.
    End,
}

/// The rows of one item on their way from the copy to the sinks.
pub(super) struct Reader<'a> {
    shared: &'a Shared,
    table: &'a Copied,
    item: &'a Item,
    /// The last row, without the copy's header.
    last: Option<Bytes>,
    is_first: bool,
    number: u64,
    /// End of the block that the numbers are from.
    block_end: u64,
    rows: u64,
    marked_rows: u64,
    bytes: usize,
    unpaced: u64,
    step: u64,
    is_by_place: bool,
    /// Place of the last row, where the table is cut by it.
    place: Option<(u32, u16)>,
    scratch: Vec<u8>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(shared: &'a Shared, table: &'a Copied, item: &'a Item) -> Result<Self> {
        let number = shared.block()?;
        Ok(Self {
            shared,
            table,
            item,
            last: None,
            is_first: true,
            number,
            block_end: number + BLOCK,
            rows: 0,
            marked_rows: 0,
            bytes: 0,
            unpaced: 0,
            step: shared.pace.step(ROWS),
            is_by_place: is_by_place(&table.plan.order),
            place: None,
            scratch: Vec::new(),
        })
    }

    /// Hands a row to the item's sinks; `false` for what is no row.
    pub(super) fn push(&mut self, mut message: Bytes, outlets: &mut [Outlet]) -> Result<bool> {
        if std::mem::take(&mut self.is_first) {
            let rest = row::without_header(&message).map_err(|e| self.strange(e))?.len();
            message = message.slice(message.len() - rest..);
            if message.is_empty() {
                return Ok(false);
            }
        }
        let at = self.shared.position(self.number);
        let (layout, commit_ts) = (&self.table.layout, self.shared.commit_ts);
        let mut event = Event { at, commit_ts, xid: None, op: Op::Read, layout, cells: Cells::new(), old_key: None };
        if !row::read(&message, &self.table.columns.forms, &mut event.cells).map_err(|e| self.strange(e))? {
            return Ok(false);
        }
        if self.is_by_place {
            let place = match event.cells.pop() {
                Some(Cell::Binary(tid)) => row::place(tid),
                _ => None,
            };
            if place.is_none() || place <= self.place {
                return Err(self.strange(format!("a row at {place:?} after one at {:?}", self.place)));
            }
            self.place = place;
        }
        let extended = self.shared.moment.extend(layout, &mut event.cells, &mut self.scratch);
        extended.map_err(|e| Error::fatal(format_args!("event {at} of table {}", layout.table), e))?;
        for (sink, _) in &self.item.sinks {
            outlets[*sink].sink.push(&event)?;
        }
        drop(event);
        self.bytes += message.len();
        self.last = Some(message);
        self.number += 1;
        self.rows += 1;
        self.unpaced += 1;
        Ok(true)
    }

    pub(super) fn is_due(&self) -> bool {
        self.unpaced >= self.step || self.bytes >= BYTES || self.is_full()
    }

    /// The numbers of the block are used up.
    pub(super) fn is_full(&self) -> bool {
        self.number == self.block_end
    }

    pub(super) fn take_unpaced(&mut self) -> u64 {
        self.bytes = 0;
        std::mem::take(&mut self.unpaced)
    }

    /// Tells the item's sinks how far it is.
    pub(super) async fn mark(&mut self, outlets: &mut [Outlet], until: Until) -> Result<()> {
        let after = self.key()?.or_else(|| self.item.after.clone());
        let Plan { table, backfill, .. } = &self.table.plan;
        for (sink, before) in &self.item.sinks {
            let mark = Mark {
                table: table.clone(),
                backfill: *backfill,
                range: self.item.range,
                snapshot: self.shared.lsn,
                after: after.clone(),
                done: until == Until::End,
                rows: before + self.rows,
            };
            outlets[*sink].mark(mark, until != Until::Due).await?;
        }
        self.count();
        // A batch of the archive is named after its first and last number: none holds numbers of two blocks.
        if self.is_full() {
            self.number = self.shared.block()?;
            self.block_end = self.number + BLOCK;
        }
        Ok(())
    }

    fn count(&mut self) {
        let rows = self.rows - std::mem::replace(&mut self.marked_rows, self.rows);
        self.table.rows.fetch_add(rows, Relaxed);
        self.shared.progress.rows.fetch_add(rows, Relaxed);
    }

    /// What the table is cut by, of the last row.
    fn key(&self) -> Result<Option<Key>> {
        let Some(last) = &self.last else { return Ok(None) };
        if let Some((block, line)) = self.place {
            return Ok(Some(vec![format!("({block},{line})")]));
        }
        let mut cells = Cells::new();
        row::read(last, &self.table.columns.forms, &mut cells).map_err(|e| self.strange(e))?;
        let mut scratch = Vec::new();
        let mut text = |at: &usize| {
            let ty = self.table.layout.columns[*at].ty;
            match value::text(ty, cells[*at], &mut scratch).map_err(|e| self.strange(e.to_string()))? {
                Some(text) => Ok(text.to_owned()),
                None => Err(self.strange("a primary key with a NULL".into())),
            }
        };
        self.table.columns.key.iter().map(&mut text).collect::<Result<_>>().map(Some)
    }

    fn strange(&self, what: String) -> Error {
        Error::fatal(format_args!("copying {}", self.table.plan.table), what)
    }
}
