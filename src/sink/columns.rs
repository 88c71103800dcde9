//! Events → Arrow columns: one typed builder a column, then falaj's own columns.
//!
//! A value that its column cannot hold exactly (infinity, years before 1 or after 9999, NaN or too many digits in a
//! decimal) is NULL there, and its text stands in `_raw`. So does the text of a decimal that the column holds with another
//! number of digits: every value can be read back as Postgres wrote it.

use std::sync::Arc;

use arrow_array::builder::{
    ArrayBuilder, BooleanBuilder, Date32Builder, Decimal128Builder, Float32Builder, Float64Builder, Int32Builder,
    Int64Builder, StringBuilder, TimestampMicrosecondBuilder,
};
use arrow_array::{ArrayRef, RecordBatch, TimestampMicrosecondArray};
use arrow_schema::{DataType, Field, Schema, SchemaRef, TimeUnit};

use crate::error::{Error, Result};
use crate::event::{Event, Layout};
use crate::message;
use crate::pgoutput::Cell;
use crate::schema::Type;
use crate::value::{self, Converted, Instant, write_json_string};

/// Columns of falaj's own, after those of the event: name, type, nullable.
pub fn own_columns() -> [(&'static str, DataType, bool); 10] {
    [
        ("_id", DataType::Utf8, false),
        ("_op", DataType::Utf8, false),
        ("_table", DataType::Utf8, false),
        ("_lsn", DataType::Utf8, false),
        ("_commit_ts", timestamp(true), false),
        ("_commit_lsn", DataType::Int64, false),
        ("_ordinal", DataType::Int64, false),
        ("_old_key", DataType::Utf8, true),
        ("_unchanged", DataType::Utf8, true),
        ("_raw", DataType::Utf8, true),
    ]
}

fn timestamp(utc: bool) -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, utc.then(|| "UTC".into()))
}

/// The Arrow type of a column type.
pub fn data_type(ty: Type) -> DataType {
    match ty {
        Type::Bool => DataType::Boolean,
        Type::Int2 | Type::Int4 => DataType::Int32,
        Type::Int8 => DataType::Int64,
        Type::Float4 => DataType::Float32,
        Type::Float8 => DataType::Float64,
        Type::Numeric(Some((p @ 1..=38, s))) if s >= 0 && s as u8 <= p => DataType::Decimal128(p, s),
        Type::Date => DataType::Date32,
        Type::Timestamp => timestamp(false),
        Type::Timestamptz => timestamp(true),
        _ => DataType::Utf8,
    }
}

/// Arrow schema of a layout's events.
pub fn schema(layout: &Layout) -> SchemaRef {
    let event = layout.columns.iter().map(|c| Field::new(&c.name, data_type(c.ty), true));
    // A message without a transaction has no commit time.
    let is_message = layout.relation.oid == message::OID;
    let own = own_columns()
        .into_iter()
        .map(|(name, ty, nullable)| Field::new(name, ty, nullable || (is_message && name == "_commit_ts")));
    Arc::new(Schema::new(event.chain(own).collect::<Vec<_>>()))
}

enum Column {
    Bool(BooleanBuilder),
    Int32(Int32Builder),
    Int64(Int64Builder),
    Float32(Float32Builder),
    Float64(Float64Builder),
    Decimal(Decimal128Builder, u8, u32),
    Date(Date32Builder),
    Micros(TimestampMicrosecondBuilder),
    Text(StringBuilder),
}

/// Whether a column could hold a value exactly.
#[derive(PartialEq)]
enum Fit {
    Held,
    Raw,
}

impl Column {
    fn new(ty: &DataType) -> Self {
        match ty {
            DataType::Boolean => Self::Bool(BooleanBuilder::new()),
            DataType::Int32 => Self::Int32(Int32Builder::new()),
            DataType::Int64 => Self::Int64(Int64Builder::new()),
            DataType::Float32 => Self::Float32(Float32Builder::new()),
            DataType::Float64 => Self::Float64(Float64Builder::new()),
            DataType::Decimal128(p, s) => {
                Self::Decimal(Decimal128Builder::new().with_data_type(ty.clone()), *p, s.unsigned_abs().into())
            }
            DataType::Date32 => Self::Date(Date32Builder::new()),
            DataType::Timestamp(..) => Self::Micros(TimestampMicrosecondBuilder::new().with_data_type(ty.clone())),
            _ => Self::Text(StringBuilder::new()),
        }
    }

    fn push(&mut self, ty: Type, cell: Cell<'_>, scratch: &mut Vec<u8>) -> Converted<Fit> {
        match self {
            Self::Bool(b) => b.append_option(value::boolean(ty, cell)?),
            Self::Int32(b) => b.append_option(value::int(ty, cell)?.map(|n| n as i32)),
            Self::Int64(b) => b.append_option(value::int(ty, cell)?),
            Self::Float32(b) => b.append_option(value::float(ty, cell)?.map(|x| x as f32)),
            Self::Float64(b) => b.append_option(value::float(ty, cell)?),
            Self::Decimal(b, precision, scale) => {
                let limit = 10_i128.pow((*precision).into());
                let found = value::decimal(ty, cell)?;
                let fits = found.and_then(|d| d.at_scale(*scale)).filter(|n| n.abs() < limit);
                b.append_option(fits);
                let same = fits.is_some() && found.is_some_and(|d| d.scale == *scale);
                return Ok(held_or_null(same, cell));
            }
            Self::Date(b) => {
                return Ok(push_time(value::days_of_date(ty, cell)?, |at| b.append_option(at.map(|d| d as i32))));
            }
            Self::Micros(b) => return Ok(push_time(value::micros_of_timestamp(ty, cell)?, |at| b.append_option(at))),
            Self::Text(b) => b.append_option(value::text(ty, cell, scratch)?),
        }
        Ok(Fit::Held)
    }

    fn finish(&mut self) -> ArrayRef {
        match self {
            Self::Bool(b) => Arc::new(b.finish()),
            Self::Int32(b) => Arc::new(b.finish()),
            Self::Int64(b) => Arc::new(b.finish()),
            Self::Float32(b) => Arc::new(b.finish()),
            Self::Float64(b) => Arc::new(b.finish()),
            Self::Decimal(b, ..) => Arc::new(b.finish()),
            Self::Date(b) => Arc::new(b.finish()),
            Self::Micros(b) => Arc::new(b.finish()),
            Self::Text(b) => Arc::new(b.finish()),
        }
    }
}

fn held_or_null(held: bool, cell: Cell<'_>) -> Fit {
    if held || matches!(cell, Cell::Null | Cell::Unchanged) { Fit::Held } else { Fit::Raw }
}

fn push_time(instant: Option<Instant>, append: impl FnOnce(Option<i64>)) -> Fit {
    match instant {
        Some(Instant::At(at)) => append(Some(at)),
        other => {
            append(None);
            return if other.is_some() { Fit::Raw } else { Fit::Held };
        }
    }
    Fit::Held
}

/// falaj's own columns.
#[derive(Default)]
struct Own {
    id: StringBuilder,
    op: StringBuilder,
    table: StringBuilder,
    lsn: StringBuilder,
    commit_ts: Vec<i64>,
    /// Rows without a commit time.
    no_commit_ts: Vec<usize>,
    commit_lsn: Int64Builder,
    ordinal: Int64Builder,
    old_key: StringBuilder,
    unchanged: StringBuilder,
    raw: StringBuilder,
}

impl Own {
    fn take_commit_ts(&mut self) -> TimestampMicrosecondArray {
        let (times, none) = (std::mem::take(&mut self.commit_ts), std::mem::take(&mut self.no_commit_ts));
        let array = if none.is_empty() {
            TimestampMicrosecondArray::from(times)
        } else {
            let time = |(row, at): (usize, &i64)| none.binary_search(&row).is_err().then_some(*at);
            times.iter().enumerate().map(time).collect()
        };
        array.with_timezone("UTC")
    }
}

/// Room for a value's text that is kept for the next one; what a huge value took is given back.
const KEPT: usize = 64 << 10;

/// Rows of one layout on their way to a file.
pub struct Rows {
    schema: SchemaRef,
    columns: Vec<Column>,
    own: Own,
    scratch: Vec<u8>,
    raw: Vec<u8>,
    /// Bytes of the cells so far, roughly.
    pub bytes: usize,
}

impl Rows {
    /// Empty rows of a layout.
    pub fn new(layout: &Layout) -> Self {
        let columns = layout.columns.iter().map(|c| Column::new(&data_type(c.ty))).collect();
        Self { schema: schema(layout), columns, own: Own::default(), scratch: Vec::new(), raw: Vec::new(), bytes: 0 }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.own.ordinal.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends an event. `bytes` are those of its cells ([`Event::bytes`]), which the caller has looked at.
    ///
    /// # Errors
    /// [`Error::Fatal`] when a cell is not of its column's type.
    pub fn push(&mut self, event: &Event<'_>, bytes: usize) -> Result<()> {
        self.bytes += bytes + 8 * self.columns.len();
        self.push_cells(event)
            .and_then(|()| self.push_own(event))
            .map_err(|e| Error::fatal(format_args!("event {} of table {}", event.at, event.layout.table), e))
    }

    fn push_cells(&mut self, event: &Event<'_>) -> Converted<()> {
        self.raw.clear();
        for (i, column) in self.columns.iter_mut().enumerate() {
            let out = &event.layout.columns[i];
            let cell = event.cells.get(i).copied().unwrap_or(Cell::Null);
            if column.push(out.ty, cell, &mut self.scratch)? == Fit::Raw {
                self.raw.push(if self.raw.is_empty() { b'{' } else { b',' });
                write_json_string(&out.name, &mut self.raw);
                self.raw.push(b':');
                write_json_string(value::text(out.ty, cell, &mut self.scratch)?.unwrap_or_default(), &mut self.raw);
            }
        }
        Ok(())
    }

    fn push_own(&mut self, event: &Event<'_>) -> Converted<()> {
        let own = &mut self.own;
        self.scratch.clear();
        event.write_id(&mut self.scratch);
        own.id.append_value(value::utf8(Type::Text, &self.scratch)?);
        own.op.append_value(event.op.letter());
        own.table.append_value(&event.layout.table);
        self.scratch.clear();
        event.lsn().write(&mut self.scratch);
        own.lsn.append_value(value::utf8(Type::Text, &self.scratch)?);
        own.commit_ts.push(event.commit_ts);
        if event.commit_time().is_none() {
            own.no_commit_ts.push(own.commit_ts.len() - 1);
        }
        own.commit_lsn.append_value(event.at.commit_lsn.0 as i64);
        own.ordinal.append_value(event.at.ordinal as i64);
        self.scratch.clear();
        match event.write_old_key(&mut self.scratch)? {
            true => own.old_key.append_value(value::utf8(Type::Text, &self.scratch)?),
            false => own.old_key.append_null(),
        }
        if event.has_unchanged() {
            self.scratch.clear();
            event.write_unchanged(&mut self.scratch);
            own.unchanged.append_value(value::utf8(Type::Text, &self.scratch)?);
        } else {
            own.unchanged.append_null();
        }
        if self.raw.is_empty() {
            own.raw.append_null();
        } else {
            self.raw.push(b'}');
            own.raw.append_value(value::utf8(Type::Text, &self.raw)?);
        }
        self.bytes += 120;
        Ok(())
    }

    /// Takes the rows as one record batch; the builders are empty afterwards.
    ///
    /// # Errors
    /// [`Error::Fatal`] if the columns were of different lengths.
    pub fn take(&mut self) -> Result<RecordBatch> {
        let own = &mut self.own;
        let commit_ts = own.take_commit_ts();
        let mut arrays: Vec<ArrayRef> = self.columns.iter_mut().map(Column::finish).collect();
        arrays.extend::<[ArrayRef; 10]>([
            Arc::new(own.id.finish()),
            Arc::new(own.op.finish()),
            Arc::new(own.table.finish()),
            Arc::new(own.lsn.finish()),
            Arc::new(commit_ts),
            Arc::new(own.commit_lsn.finish()),
            Arc::new(own.ordinal.finish()),
            Arc::new(own.old_key.finish()),
            Arc::new(own.unchanged.finish()),
            Arc::new(own.raw.finish()),
        ]);
        self.bytes = 0;
        self.scratch.shrink_to(KEPT);
        RecordBatch::try_new(Arc::clone(&self.schema), arrays).map_err(|e| Error::fatal("building Arrow columns", e))
    }
}
