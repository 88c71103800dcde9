//! A table's events in the archive → facts. Blocking.

use super::fold::{Fact, Fold};
use super::table::{Form, Table, canonical, hash, old_key};
use crate::archive::{Batch, DataFile};
use crate::change::Op;
use crate::error::Result;
use crate::event::{Event, OldKey};
use crate::lsn::{Lsn, Position};
use crate::pgoutput::Cell;
use crate::playback::{Rows, batches};
use crate::upload::history::History;
use crate::world::{World, go_on};

/// What is decoded at once, in bytes.
const PIECE: usize = 8 << 20;

/// What becomes of an event.
type Take = fn(&mut Fold, &Fact<'_>);

/// Folds a table's events. `sees` says whether the snapshot sees a commit.
///
/// # Errors
/// [`crate::error::Error`] for a batch that is missing, of another stream, or cannot be read, and for a shutdown meanwhile.
pub(super) fn fold(world: &World, table: &Table, fold: Fold, sees: impl Fn(Lsn) -> bool) -> Result<Fold> {
    read(world, table, Form::Json, fold, sees, |_, _| Some(Fold::push))
}

/// Tells the fold of BigQuery's rows what the archive has beyond them: events of the stream from `bound` on, and files of
/// history that are not loaded, are left out; what the other files of history have was there once.
///
/// # Errors
/// As [`fold`].
pub(super) fn beyond(
    world: &World,
    table: &Table,
    bound: Position,
    loaded: &History,
    fold: Fold,
    sees: impl Fn(Lsn) -> bool,
) -> Result<Fold> {
    read(world, table, Form::Warehouse, fold, sees, |batch, file| match batch.is_history() {
        true if loaded.has(batch, file) => Some(Fold::note_copy),
        true => Some(Fold::leave_out),
        false => (batch.last >= bound).then_some(Fold::note_later),
    })
}

/// `take` says what becomes of a file's events; `None`: it is not read.
fn read(
    world: &World,
    table: &Table,
    form: Form,
    mut fold: Fold,
    sees: impl Fn(Lsn) -> bool,
    take: impl Fn(&Batch, &DataFile) -> Option<Take>,
) -> Result<Fold> {
    let mut values = Vec::new();
    for batch in batches(&world.config.archive.dir)? {
        for file in batch.files()?.into_iter().filter(|file| file.table == table.name) {
            let Some(take) = take(&batch, &file) else { continue };
            // File by file, whatever stands in them: a gap or a doubled row is to be named, not to end the reading.
            let mut rows = Rows::open(&file, 0, PIECE)?.unordered();
            while rows.advance()?.is_some() {
                go_on(&world.stop)?;
                let Some(event) = rows.event() else { continue };
                if sees(event.at.commit_lsn) {
                    push(table, form, &event, &mut values, &mut fold, take)?;
                }
            }
        }
    }
    Ok(fold)
}

fn push(
    table: &Table,
    form: Form,
    event: &Event<'_>,
    values: &mut Vec<Option<u64>>,
    fold: &mut Fold,
    take: Take,
) -> Result<()> {
    let (at, op) = (event.at, event.op);
    if op == Op::Truncate {
        take(fold, &Fact { at, op, key: "", old_key: None, values: &[] });
        return Ok(());
    }
    let mut texts = Vec::with_capacity(table.columns.len());
    for (name, _) in &table.columns {
        let found = event.layout.columns.iter().zip(&event.cells).find(|(column, _)| column.name == *name);
        let told = found.filter(|(_, cell)| **cell != Cell::Unchanged);
        texts.push(told.map(|(column, cell)| canonical(form, column.ty, *cell)).transpose()?);
    }
    // A row of a schema that did not have the key column yet is no row of any key.
    let Some(key) = table.key_text(|i| texts[i].clone()) else {
        fold.unclear += u64::from(event.has_unchanged());
        return Ok(());
    };
    let old = match &event.old_key {
        Some(OldKey::Json(json)) => old_key(table, form, json, |i| texts[i].clone())?,
        _ => None,
    };
    values.clear();
    values.extend(texts.iter().map(|text| text.as_deref().map(hash)));
    take(fold, &Fact { at, op, key: &key, old_key: old.as_deref(), values });
    Ok(())
}
