//! One Arrow column, read back as the cells that Postgres sent.
//!
//! Numbers and times become the bytes of Postgres's binary form again, decimals and all else its text: both forms give the
//! same event.

use std::ops::Range;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowPrimitiveType, Date32Type, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type,
    TimestampMicrosecondType,
};
use arrow_array::{Array, ArrayRef, StringArray};
use arrow_schema::{DataType, TimeUnit};

use crate::pgoutput::{Cell, EPOCH_MICROS};
use crate::value::{Decimal, EPOCH_DAYS};

/// The cells of one column of a record batch.
pub(super) struct Column {
    array: ArrayRef,
    form: Form,
}

enum Form {
    /// Big-endian, as Postgres's send functions write.
    Fixed { width: usize, bytes: Vec<u8> },
    /// Texts one behind the other, with their ends.
    Printed { text: Vec<u8>, ends: Vec<usize> },
    /// The array's own.
    Text(StringArray),
}

impl Column {
    /// Prepares a column; the error is what its type is.
    pub(super) fn new(array: &ArrayRef) -> Result<Self, DataType> {
        let form = match array.data_type() {
            DataType::Boolean => {
                let values = array.as_boolean().values().iter().map(u8::from).collect();
                Form::Fixed { width: 1, bytes: values }
            }
            DataType::Int32 => fixed::<Int32Type, 4>(array, i32::to_be_bytes),
            DataType::Int64 => fixed::<Int64Type, 8>(array, i64::to_be_bytes),
            DataType::Float32 => fixed::<Float32Type, 4>(array, f32::to_be_bytes),
            DataType::Float64 => fixed::<Float64Type, 8>(array, f64::to_be_bytes),
            DataType::Date32 => fixed::<Date32Type, 4>(array, |days| days.wrapping_sub(EPOCH_DAYS).to_be_bytes()),
            DataType::Timestamp(TimeUnit::Microsecond, _) => {
                fixed::<TimestampMicrosecondType, 8>(array, |at| at.wrapping_sub(EPOCH_MICROS).to_be_bytes())
            }
            DataType::Decimal128(_, scale @ 0..) => printed(array, u32::from(scale.unsigned_abs())),
            DataType::Utf8 => Form::Text(array.as_string::<i32>().clone()),
            other => return Err(other.clone()),
        };
        Ok(Self { array: array.clone(), form })
    }

    /// The cell of a row.
    pub(super) fn cell(&self, row: usize) -> Cell<'_> {
        if self.array.is_null(row) {
            return Cell::Null;
        }
        match &self.form {
            Form::Fixed { width, bytes } => Cell::Binary(&bytes[row * width..(row + 1) * width]),
            Form::Printed { text, ends } => Cell::Text(&text[span(ends, row)]),
            Form::Text(texts) => Cell::Text(texts.value(row).as_bytes()),
        }
    }
}

fn span(ends: &[usize], row: usize) -> Range<usize> {
    row.checked_sub(1).map_or(0, |before| ends[before])..ends[row]
}

fn fixed<T: ArrowPrimitiveType, const N: usize>(array: &ArrayRef, bytes: impl Fn(T::Native) -> [u8; N]) -> Form {
    let values = array.as_primitive::<T>().values();
    Form::Fixed { width: N, bytes: values.iter().flat_map(|value| bytes(*value)).collect() }
}

fn printed(array: &ArrayRef, scale: u32) -> Form {
    let (mut text, mut ends) = (Vec::new(), Vec::with_capacity(array.len()));
    for unscaled in array.as_primitive::<Decimal128Type>().values() {
        Decimal { unscaled: *unscaled, scale }.write(&mut text);
        ends.push(text.len());
    }
    Form::Printed { text, ends }
}
