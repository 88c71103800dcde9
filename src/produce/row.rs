//! A change and its rows → an event.

use std::sync::Arc;

use crate::change::{Change, Op, RowChange};
use crate::enrich::Enricher;
use crate::error::{Error, Result};
use crate::event::{Cells, Event, Layout, OldKey};
use crate::lsn::Position;
use crate::pgoutput::{Cell, Old, Tuple};

/// Enriches a change as of its own position. `keep_old`: the old row of every update that brings it is wanted.
pub(super) fn event<'a>(
    enricher: &'a mut Enricher,
    scratch: &'a mut Vec<u8>,
    layout: &'a Arc<Layout>,
    change: &Change<'a>,
    keep_old: bool,
) -> Result<Event<'a>> {
    let Change { at, commit_ts, xid, row, .. } = *change;
    let mut event =
        Event { at, commit_ts, xid: Some(xid), op: Op::Truncate, layout, cells: Cells::new(), old_key: None };
    match row {
        RowChange::Insert(new) => {
            event.op = Op::Create;
            read(new, at, layout, &mut event.cells)?;
        }
        RowChange::Update(old, new) => {
            event.op = Op::Update;
            read(new, at, layout, &mut event.cells)?;
            if let Some(old) = old {
                compare(old, at, &mut event, keep_old)?;
            }
        }
        RowChange::Delete(Old::Full(old)) => {
            event.op = Op::Delete;
            read(old, at, layout, &mut event.cells)?;
        }
        RowChange::Delete(Old::Key(key)) => {
            event.op = Op::Delete;
            read(key, at, layout, &mut event.cells)?;
            Enricher::extend_with_nulls(layout, &mut event.cells);
            return Ok(event);
        }
        RowChange::Truncate => return Ok(event),
    }
    let extended = enricher.extend(layout, &mut event.cells, scratch);
    extended.map_err(|e| Error::fatal(format_args!("event {at} of table {}", layout.table), e))?;
    Ok(event)
}

/// Reads a row into `cells`, in place: they are large, and moving them costs more than reading.
fn read<'a>(tuple: Tuple<'a>, at: Position, layout: &Layout, cells: &mut Cells<'a>) -> Result<()> {
    let (found, needed) = (usize::from(tuple.len), layout.relation.columns.len());
    if found != needed {
        return Err(Error::Fatal(format!(
            "event {at} of table {}: a row of {found} columns; its schema has {needed}",
            layout.table
        )));
    }
    cells.extend(tuple.cells());
    Ok(())
}

/// Takes from the old row what the new one lacks, and the old key where it has changed, or in any case to `keep` it.
fn compare<'a>(old: Old<'a>, at: Position, event: &mut Event<'a>, keep: bool) -> Result<()> {
    let mut before = Cells::new();
    read(old.tuple(), at, event.layout, &mut before)?;
    fill_unchanged(&mut event.cells, &before);
    // In an old key NULL is unknown: the column is not part of it.
    let differs = |i: &usize| before[*i] != Cell::Null && before[*i] != event.cells[*i];
    if keep || event.layout.primary_key.iter().any(differs) {
        event.old_key = Some(OldKey::Row(before.into_vec()));
    }
    Ok(())
}

/// The old row has what the update did not touch: all of it under REPLICA IDENTITY FULL, else a TOASTed key. A NULL is none of
/// that: a partition with another identity than its root has its key alone in what is sent as a whole row.
fn fill_unchanged<'a>(new: &mut Cells<'a>, old: &Cells<'a>) {
    for (new, old) in new.iter_mut().zip(old).filter(|(new, _)| **new == Cell::Unchanged) {
        if *old != Cell::Null {
            *new = *old;
        }
    }
}
