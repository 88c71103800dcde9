//! Values: one cell, in text or binary form, to the forms the sinks need. Both wire forms give the same bytes out.

mod array;
mod json;
mod number;
mod time;

use crate::pgoutput::Cell;
use crate::schema::Type;

pub use json::{text_of_json, write_json, write_json_string};
pub use number::{Decimal, decimal};
pub(crate) use time::write_rfc3339;
pub use time::{EPOCH_DAYS, Instant, days_of_date, micros_of_timestamp};

/// A cell whose bytes are not a value of its column's type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a value of {ty:?}: {found}")]
pub struct BadValue {
    /// The column's type.
    pub ty: Type,
    /// What was found.
    pub found: String,
}

/// `Result` of a conversion.
pub type Converted<T> = Result<T, BadValue>;

pub(crate) fn bad<T>(ty: Type, bytes: &[u8]) -> Converted<T> {
    let shown: String = String::from_utf8_lossy(bytes).chars().take(60).collect();
    Err(BadValue { ty, found: format!("{shown:?} ({} bytes)", bytes.len()) })
}

pub(crate) fn utf8(ty: Type, bytes: &[u8]) -> Converted<&str> {
    std::str::from_utf8(bytes).or_else(|_| bad(ty, bytes))
}

pub(crate) fn fixed<const N: usize>(ty: Type, bytes: &[u8]) -> Converted<[u8; N]> {
    bytes.try_into().or_else(|_| bad(ty, bytes))
}

/// Appends the value as Postgres's `::text` would print it (DateStyle ISO, TimeZone UTC, extra_float_digits ≥ 1).
/// Returns whether there is a value: false for NULL and for an unchanged TOAST column.
///
/// # Errors
/// [`BadValue`] when the bytes are not of this type.
pub fn write_text(ty: Type, cell: Cell<'_>, out: &mut Vec<u8>) -> Converted<bool> {
    match cell {
        Cell::Null | Cell::Unchanged => return Ok(false),
        Cell::Text(text) => out.extend_from_slice(utf8(ty, text)?.as_bytes()),
        Cell::Binary(bytes) => write_binary_as_text(ty, bytes, out)?,
    }
    Ok(true)
}

/// The text that [`write_text`] writes; borrowed where the cell holds it, else made in `scratch`. `None` where it writes none.
///
/// # Errors
/// [`BadValue`] when the bytes are not of this type.
pub fn text<'a>(ty: Type, cell: Cell<'a>, scratch: &'a mut Vec<u8>) -> Converted<Option<&'a str>> {
    match (cell, ty) {
        (Cell::Null | Cell::Unchanged, _) => Ok(None),
        (Cell::Text(text), _) | (Cell::Binary(text), Type::Text | Type::Json) => utf8(ty, text).map(Some),
        (Cell::Binary([1, text @ ..]), Type::Jsonb) => utf8(ty, text).map(Some),
        (Cell::Binary(bytes), _) => {
            scratch.clear();
            write_binary_as_text(ty, bytes, scratch)?;
            utf8(ty, scratch).map(Some)
        }
    }
}

fn write_binary_as_text(ty: Type, bytes: &[u8], out: &mut Vec<u8>) -> Converted<()> {
    match ty {
        Type::Bool => out.push(if fixed::<1>(ty, bytes)?[0] == 0 { b'f' } else { b't' }),
        Type::Int2 | Type::Int4 | Type::Int8 => {
            out.extend_from_slice(itoa::Buffer::new().format(binary_int(ty, bytes)?).as_bytes());
        }
        Type::Float4 => number::write_float4(f32::from_be_bytes(fixed(ty, bytes)?), out),
        Type::Float8 => number::write_float8(f64::from_be_bytes(fixed(ty, bytes)?), out),
        Type::Numeric(_) => number::write_numeric(ty, bytes, out)?,
        Type::Text | Type::Json => out.extend_from_slice(utf8(ty, bytes)?.as_bytes()),
        Type::Jsonb => match bytes {
            [1, text @ ..] => out.extend_from_slice(utf8(ty, text)?.as_bytes()),
            _ => return bad(ty, bytes),
        },
        Type::Uuid => {
            let id = uuid::Uuid::from_bytes(fixed(ty, bytes)?);
            out.extend_from_slice(id.hyphenated().encode_lower(&mut [0; 36]).as_bytes());
        }
        Type::Date => time::write_date(i32::from_be_bytes(fixed(ty, bytes)?), out),
        Type::Timestamp => time::write_timestamp(i64::from_be_bytes(fixed(ty, bytes)?), "", out),
        Type::Timestamptz => time::write_timestamp(i64::from_be_bytes(fixed(ty, bytes)?), "+00", out),
        Type::Bytea => {
            out.extend_from_slice(b"\\x");
            for byte in bytes {
                out.extend_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
            }
        }
        Type::Array(_) | Type::Other => return bad(ty, bytes),
    }
    Ok(())
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// An integer of any width; `None` for NULL.
///
/// # Errors
/// [`BadValue`] when the cell is no integer.
pub fn int(ty: Type, cell: Cell<'_>) -> Converted<Option<i64>> {
    match cell {
        Cell::Null | Cell::Unchanged => Ok(None),
        Cell::Binary(bytes) => binary_int(ty, bytes).map(Some),
        Cell::Text(text) => utf8(ty, text)?.parse().map(Some).or_else(|_| bad(ty, text)),
    }
}

fn binary_int(ty: Type, bytes: &[u8]) -> Converted<i64> {
    match *bytes {
        [a, b] => Ok(i16::from_be_bytes([a, b]).into()),
        [a, b, c, d] => Ok(i32::from_be_bytes([a, b, c, d]).into()),
        _ => fixed(ty, bytes).map(i64::from_be_bytes),
    }
}

/// A float; `None` for NULL.
///
/// # Errors
/// [`BadValue`] when the cell is no float.
pub fn float(ty: Type, cell: Cell<'_>) -> Converted<Option<f64>> {
    match (cell, ty) {
        (Cell::Null | Cell::Unchanged, _) => Ok(None),
        (Cell::Binary(b), Type::Float4) => Ok(Some(f32::from_be_bytes(fixed(ty, b)?).into())),
        (Cell::Binary(b), _) => Ok(Some(f64::from_be_bytes(fixed(ty, b)?))),
        (Cell::Text(text), _) => match utf8(ty, text)? {
            "Infinity" => Ok(Some(f64::INFINITY)),
            "-Infinity" => Ok(Some(f64::NEG_INFINITY)),
            // Read at its own width: twice rounded is not the same.
            number if ty == Type::Float4 => number.parse::<f32>().map(|x| Some(x.into())).or_else(|_| bad(ty, text)),
            number => number.parse().map(Some).or_else(|_| bad(ty, text)),
        },
    }
}

/// A boolean; `None` for NULL.
///
/// # Errors
/// [`BadValue`] when the cell is no boolean.
pub fn boolean(ty: Type, cell: Cell<'_>) -> Converted<Option<bool>> {
    match cell {
        Cell::Null | Cell::Unchanged => Ok(None),
        Cell::Text(b"t") | Cell::Binary([1]) => Ok(Some(true)),
        Cell::Text(b"f") | Cell::Binary([0]) => Ok(Some(false)),
        Cell::Text(other) | Cell::Binary(other) => bad(ty, other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(ty: Type, bytes: &[u8]) -> String {
        let mut out = Vec::new();
        write_text(ty, Cell::Binary(bytes), &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn binary_scalars_print_as_postgres_does() {
        assert_eq!(text_of(Type::Bool, &[1]), "t");
        assert_eq!(text_of(Type::Int2, &(-7_i16).to_be_bytes()), "-7");
        assert_eq!(text_of(Type::Int8, &i64::MIN.to_be_bytes()), "-9223372036854775808");
        assert_eq!(text_of(Type::Bytea, &[0, 0xAB]), "\\x00ab");
        assert_eq!(text_of(Type::Jsonb, b"\x01{\"a\": 1.10}"), "{\"a\": 1.10}");
        assert_eq!(text_of(Type::Uuid, &[0x11; 16]), "11111111-1111-1111-1111-111111111111");
    }

    #[test]
    fn wrong_lengths_are_errors_not_values() {
        for (ty, bytes) in [
            (Type::Bool, &[][..]),
            (Type::Int4, &[1, 2, 3]),
            (Type::Uuid, &[1]),
            (Type::Jsonb, b"\x02{}"),
            (Type::Other, b"x"),
        ] {
            assert!(write_text(ty, Cell::Binary(bytes), &mut Vec::new()).is_err(), "{ty:?}");
        }
        assert!(int(Type::Int4, Cell::Text(b"1x")).is_err());
        assert!(write_text(Type::Text, Cell::Text(b"\xff"), &mut Vec::new()).is_err());
    }
}
