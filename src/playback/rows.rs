//! One file of the archive → its events.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int64Type, TimestampMicrosecondType};
use arrow_array::{Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow_schema::Schema;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};

use super::column::Column;
use super::footer::{Footer, failed};
use crate::archive::DataFile;
use crate::archive::pieces::Pieces;
use crate::change::Op;
use crate::enrich::Plan;
use crate::error::Result;
use crate::event::{self, Cells, Event, Layout, OldKey, OutColumn};
use crate::lsn::{Lsn, Position};
use crate::message;
use crate::pgoutput::Cell;
use crate::schema::Relation;
use crate::sink::columns::own_columns;

/// Most rows that are decoded at once.
const ROWS: usize = 1024;

/// The rows of a file, in the order of their positions.
pub struct Rows {
    path: PathBuf,
    footer: Footer,
    layout: Arc<Layout>,
    pieces: Pieces,
    piece: Option<Piece>,
    row: usize,
    at: Option<Position>,
    op: Op,
    /// Columns whose value the Parquet column could not hold, with its text.
    raw: Vec<(usize, String)>,
    unchanged: Vec<usize>,
    /// Whether rows may stand in any order.
    unordered: bool,
}

/// Some decoded rows.
struct Piece {
    rows: usize,
    columns: Vec<Column>,
    id: StringArray,
    commit_lsn: Int64Array,
    ordinal: Int64Array,
    commit_ts: TimestampMicrosecondArray,
    op: StringArray,
    old_key: StringArray,
    unchanged: StringArray,
    raw: StringArray,
}

impl Rows {
    /// Opens a file, to be decoded in pieces of about `bytes`; its layout gets the number `generation`. Blocking, as every
    /// call here.
    ///
    /// # Errors
    /// [`crate::error::Error`] naming a file that is torn, not of the archive's form, or one that an older
    /// falaj wrote.
    pub fn open(file: &DataFile, generation: u32, bytes: usize) -> Result<Self> {
        let path = file.path.as_path();
        let open = File::open(path).map_err(|e| failed(path, e))?;
        let metadata = ArrowReaderMetadata::load(&open, ArrowReaderOptions::new()).map_err(|e| failed(path, e))?;
        let footer = Footer::read(metadata.metadata(), path)?;
        let layout = Arc::new(layout(file, generation, &footer, metadata.schema())?);
        let pieces = Pieces::new(open, metadata, ProjectionMask::all(), ROWS, bytes);
        let (piece, row, at, op, raw, unchanged) = (None, 0, None, Op::Create, Vec::new(), Vec::new());
        let unordered = false;
        Ok(Self { path: path.to_owned(), footer, layout, pieces, piece, row, at, op, raw, unchanged, unordered })
    }

    /// Takes the rows as they stand, also where one stands twice or out of order: to find out what is wrong with a file.
    pub fn unordered(self) -> Self {
        Self { unordered: true, ..self }
    }

    /// What the file's footer says.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// How its events look.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Gives the events another, equal layout: one that the sinks know already.
    pub(super) fn share(&mut self, layout: Arc<Layout>) {
        self.layout = layout;
    }

    /// Moves to the next row; `None` at the end.
    ///
    /// # Errors
    /// [`crate::error::Error`] naming the file when a row cannot be read, or stands out of order.
    pub fn advance(&mut self) -> Result<Option<Position>> {
        self.row += 1;
        while self.piece.as_ref().is_none_or(|piece| self.row >= piece.rows) {
            let Some(batch) = self.pieces.next() else { return Ok(None) };
            let batch = batch.map_err(|e| failed(&self.path, e))?;
            self.piece = Some(Piece::new(&batch, self.layout.columns.len(), &self.path)?);
            self.row = 0;
        }
        let at = self.read_row()?;
        // A message stands at the position of the row behind it, and so do the messages before that row.
        let follows = |before: Position| if self.is_message() { at >= before } else { at > before };
        if !self.unordered && self.at.is_some_and(|before| !follows(before)) {
            return Err(failed(&self.path, format_args!("row {at} does not stand behind the row before it")));
        }
        self.at = Some(at);
        Ok(Some(at))
    }

    /// Whether the row is no row, but a message of `pg_logical_emit_message`.
    pub(super) fn is_message(&self) -> bool {
        matches!(self.op, Op::Message { .. })
    }

    /// Everything of the row that needs more than a look.
    fn read_row(&mut self) -> Result<Position> {
        let Some(piece) = &self.piece else { return Err(failed(&self.path, "no row")) };
        let row = self.row;
        let bad = |name: &str, found: &dyn std::fmt::Display| failed(&self.path, format_args!("{name} is {found}"));
        let part = |name, n: i64| u64::try_from(n).map_err(|_| bad(name, &n));
        let commit_lsn = Lsn(part("_commit_lsn", piece.commit_lsn.value(row))?);
        let at = Position { commit_lsn, ordinal: part("_ordinal", piece.ordinal.value(row))? };
        let letter = piece.op.value(row);
        self.op = match letter {
            "m" => {
                let (id, transactional) = (piece.id.value(row), piece.commit_ts.is_valid(row));
                Op::Message { lsn: message::lsn_of_id(id).ok_or_else(|| bad("_id", &id))?, transactional }
            }
            _ => Op::from_letter(letter).ok_or_else(|| bad("_op", &letter))?,
        };
        let column = |name: &String| self.layout.columns.iter().position(|c| c.name == *name);
        self.raw.clear();
        if piece.raw.is_valid(row) {
            let text = piece.raw.value(row);
            let values: BTreeMap<String, String> = serde_json::from_str(text).map_err(|e| bad("_raw", &e))?;
            for (name, value) in values {
                self.raw.push((column(&name).ok_or_else(|| bad("_raw", &text))?, value));
            }
        }
        self.unchanged.clear();
        if piece.unchanged.is_valid(row) {
            let text = piece.unchanged.value(row);
            let names: Vec<String> = serde_json::from_str(text).map_err(|e| bad("_unchanged", &e))?;
            for name in names {
                self.unchanged.push(column(&name).ok_or_else(|| bad("_unchanged", &text))?);
            }
        }
        Ok(at)
    }

    /// The event of the row that [`Rows::advance`] has moved to; `None` before the first.
    pub fn event(&self) -> Option<Event<'_>> {
        let (piece, row, at) = (self.piece.as_ref()?, self.row, self.at?);
        let mut cells = Cells::new();
        if self.op != Op::Truncate {
            cells.extend(piece.columns.iter().map(|column| column.cell(row)));
            self.raw.iter().for_each(|(column, text)| cells[*column] = Cell::Text(text.as_bytes()));
            self.unchanged.iter().for_each(|column| cells[*column] = Cell::Unchanged);
        }
        let old_key = piece.old_key.is_valid(row).then(|| OldKey::Json(piece.old_key.value(row)));
        Some(Event {
            at,
            commit_ts: piece.commit_ts.value(row),
            xid: None,
            op: self.op,
            layout: &self.layout,
            cells,
            old_key,
        })
    }
}

impl Piece {
    fn new(batch: &RecordBatch, columns: usize, path: &Path) -> Result<Self> {
        let cell_columns = batch.columns()[..columns].iter().map(|array| {
            Column::new(array)
                .map_err(|ty| failed(path, format_args!("a column of type {ty}, which falaj does not write")))
        });
        let own = |name: &str| {
            let at = own_columns().iter().position(|(own, ..)| *own == name).unwrap_or_default();
            batch.column(columns + at)
        };
        Ok(Self {
            rows: batch.num_rows(),
            columns: cell_columns.collect::<Result<_>>()?,
            id: own("_id").as_string().clone(),
            commit_lsn: own("_commit_lsn").as_primitive::<Int64Type>().clone(),
            ordinal: own("_ordinal").as_primitive::<Int64Type>().clone(),
            commit_ts: own("_commit_ts").as_primitive::<TimestampMicrosecondType>().clone(),
            op: own("_op").as_string().clone(),
            old_key: own("_old_key").as_string().clone(),
            unchanged: own("_unchanged").as_string().clone(),
            raw: own("_raw").as_string().clone(),
        })
    }
}

/// The layout that the rows were written under, as far as the file tells: events need no more of it.
fn layout(file: &DataFile, generation: u32, footer: &Footer, schema: &Schema) -> Result<Layout> {
    let bad = |why: &dyn std::fmt::Display| failed(&file.path, why);
    let own = own_columns();
    let Some(count) = schema.fields().len().checked_sub(own.len()) else { return Err(bad(&"too few columns")) };
    let (fields, ours) = schema.fields().split_at(count);
    if !ours.iter().zip(&own).all(|(field, (name, ty, _))| field.name() == name && field.data_type() == ty) {
        return Err(bad(&"its last columns are not those that falaj adds to each row"));
    }
    if footer.types.len() != count {
        return Err(bad(&format_args!("{count} columns, and types of {}", footer.types.len())));
    }
    let columns: Vec<_> = fields.iter().zip(&footer.types).map(|(f, ty)| OutColumn::new(f.name(), *ty)).collect();
    let column = |name: &String| {
        let at = columns.iter().position(|c| c.name == *name);
        at.ok_or_else(|| bad(&format_args!("no key column {name:?}")))
    };
    let primary_key = footer.primary_key.iter().map(column).collect::<Result<_>>()?;
    let key = footer.record_key.as_ref().map(column).transpose()?;
    let (namespace, name) = file.table.split_once('.').unwrap_or(("public", &file.table));
    let relation = Relation {
        oid: 0,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        replica_identity: b'd',
        columns: Vec::new(),
    };
    let (table, identity) = (file.table.clone(), event::identity(&file.table));
    Ok(Layout { generation, relation, table, primary_key, key, columns, plan: Plan::default(), identity })
}
