//! JSON by hand, straight into the batch's buffer.

use std::borrow::Cow;

use super::time::{self, Instant};
use super::{BadValue, Converted, bad, utf8};
use crate::pgoutput::Cell;
use crate::schema::{Element, Type};

/// Appends the value as JSON: numbers with every digit, NaN and infinities as strings, json(b) verbatim,
/// timestamps in RFC 3339, arrays as arrays, everything else its text as a string.
///
/// # Errors
/// [`BadValue`] when the bytes are not of this type.
pub fn write_json(ty: Type, cell: Cell<'_>, out: &mut Vec<u8>) -> Converted<()> {
    match cell {
        Cell::Null | Cell::Unchanged => out.extend_from_slice(b"null"),
        Cell::Text(text) => write_text_as_json(ty, text, out)?,
        Cell::Binary(bytes) => write_binary_as_json(ty, bytes, cell, out)?,
    }
    Ok(())
}

fn write_text_as_json(ty: Type, text: &[u8], out: &mut Vec<u8>) -> Converted<()> {
    match ty {
        Type::Bool => write_bool(ty, Cell::Text(text), out),
        Type::Int2 | Type::Int4 | Type::Int8 | Type::Float4 | Type::Float8 | Type::Numeric(_) => {
            write_number(ty, text, out)
        }
        Type::Json | Type::Jsonb => Ok(out.extend_from_slice(utf8(ty, text)?.as_bytes())),
        Type::Timestamp => write_time(ty, Cell::Text(text), "", out),
        Type::Timestamptz => write_time(ty, Cell::Text(text), "Z", out),
        Type::Array(element) => super::array::write(ty, element, utf8(ty, text)?, out),
        _ => Ok(write_json_string(utf8(ty, text)?, out)),
    }
}

fn write_binary_as_json(ty: Type, bytes: &[u8], cell: Cell<'_>, out: &mut Vec<u8>) -> Converted<()> {
    match ty {
        Type::Bool => write_bool(ty, cell, out),
        Type::Timestamp => write_time(ty, cell, "", out),
        Type::Timestamptz => write_time(ty, cell, "Z", out),
        Type::Text => Ok(write_json_string(utf8(ty, bytes)?, out)),
        Type::Int2 | Type::Int4 | Type::Int8 | Type::Json | Type::Jsonb => super::write_text(ty, cell, out).map(drop),
        Type::Uuid | Type::Date | Type::Bytea => {
            // Hexadecimal digits, dashes and a backslash: only bytea needs an escape, for its leading backslash.
            out.extend_from_slice(if ty == Type::Bytea { b"\"\\" } else { b"\"" });
            super::write_text(ty, cell, out)?;
            Ok(out.push(b'"'))
        }
        _ => {
            let mut text = Vec::new();
            super::write_text(ty, cell, &mut text)?;
            write_text_as_json(ty, &text, out)
        }
    }
}

fn write_bool(ty: Type, cell: Cell<'_>, out: &mut Vec<u8>) -> Converted<()> {
    Ok(out.extend_from_slice(if super::boolean(ty, cell)? == Some(true) { b"true" } else { b"false" }))
}

fn write_time(ty: Type, cell: Cell<'_>, zone: &str, out: &mut Vec<u8>) -> Converted<()> {
    out.push(b'"');
    match time::micros_of_timestamp(ty, cell)? {
        Some(Instant::At(micros)) => time::write_rfc3339(micros, zone, out),
        _ => super::write_text(ty, cell, out).map(drop)?,
    }
    Ok(out.push(b'"'))
}

/// Postgres's digits are JSON numbers already, but for the three values that JSON has no number for.
pub(super) fn write_number(ty: Type, text: &[u8], out: &mut Vec<u8>) -> Converted<()> {
    match text {
        b"NaN" | b"Infinity" | b"-Infinity" => Ok(write_json_string(utf8(ty, text)?, out)),
        _ if is_number(text) => Ok(out.extend_from_slice(text)),
        _ => bad(ty, text),
    }
}

fn is_number(text: &[u8]) -> bool {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    digits.first().is_some_and(u8::is_ascii_digit)
        && digits.last().is_some_and(u8::is_ascii_digit)
        && digits.iter().all(|b| b.is_ascii_digit() || b".e+-".contains(b))
}

/// Appends a JSON string. Only what JSON demands is escaped; everything else stays the bytes that it was.
pub fn write_json_string(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    let mut rest = text.as_bytes();
    while let Some(at) = first_special(rest) {
        out.extend_from_slice(&rest[..at]);
        write_escape(rest[at], out);
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
    out.push(b'"');
}

/// Index of the first byte that JSON wants escaped. Without a branch inside, the compiler compares sixteen at once.
fn first_special(bytes: &[u8]) -> Option<usize> {
    let special = |b: &u8| (*b < 0x20) | (*b == b'"') | (*b == b'\\');
    let (blocks, _) = bytes.as_chunks::<16>();
    let plain = blocks.iter().take_while(|block| !block.iter().fold(false, |any, b| any | special(b))).count();
    let at = bytes[16 * plain..].iter().position(special)?;
    Some(16 * plain + at)
}

fn write_escape(byte: u8, out: &mut Vec<u8>) {
    match byte {
        b'"' => out.extend_from_slice(b"\\\""),
        b'\\' => out.extend_from_slice(b"\\\\"),
        b'\n' => out.extend_from_slice(b"\\n"),
        b'\r' => out.extend_from_slice(b"\\r"),
        b'\t' => out.extend_from_slice(b"\\t"),
        0x08 => out.extend_from_slice(b"\\b"),
        0x0C => out.extend_from_slice(b"\\f"),
        _ => {
            let hex = |n: u8| super::HEX[usize::from(n)];
            out.extend_from_slice(&[b'\\', b'u', b'0', b'0', hex(byte >> 4), hex(byte & 15)]);
        }
    }
}

/// The way back: the text that [`super::write_text`] writes of a value whose JSON [`write_json`] has written; `None` for null.
///
/// # Errors
/// [`BadValue`] for what is no such JSON, and for arrays, whose bounds JSON does not have.
pub fn text_of_json(ty: Type, json: &str) -> Converted<Option<Cow<'_, str>>> {
    let quoted = json.starts_with('"');
    Ok(Some(match (ty, json) {
        (Type::Json | Type::Jsonb, _) => json.into(),
        (_, "null") => return Ok(None),
        (Type::Bool, "true") => "t".into(),
        (Type::Bool, "false") => "f".into(),
        (Type::Array(_), _) => {
            let found = format!("{json}, an array of a changed key, without its bounds; fix: kafka.tombstones = false");
            return Err(BadValue { ty, found });
        }
        _ if quoted => {
            let text: String = serde_json::from_str(json).or_else(|_| bad(ty, json.as_bytes()))?;
            match ty {
                Type::Timestamp => time::text_of_rfc3339(&text, "").into(),
                Type::Timestamptz => time::text_of_rfc3339(&text, "+00").into(),
                _ => text.into(),
            }
        }
        (Type::Int2 | Type::Int4 | Type::Int8 | Type::Float4 | Type::Float8 | Type::Numeric(_), _)
            if is_number(json.as_bytes()) =>
        {
            json.into()
        }
        _ => return bad(ty, json.as_bytes()),
    }))
}

/// One element of an array, as its own type's JSON.
pub(super) fn write_element(ty: Type, element: Element, text: &str, out: &mut Vec<u8>) -> Result<(), BadValue> {
    match element {
        Element::Bool => write_bool(ty, Cell::Text(text.as_bytes()), out),
        Element::Number => write_number(ty, text.as_bytes(), out),
        Element::Json => Ok(out.extend_from_slice(text.as_bytes())),
        Element::Timestamp => write_time(ty, Cell::Text(text.as_bytes()), "", out),
        Element::Timestamptz => write_time(ty, Cell::Text(text.as_bytes()), "Z", out),
        Element::Text | Element::Box => Ok(write_json_string(text, out)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn json(ty: Type, text: &str) -> String {
        let mut out = Vec::new();
        write_json(ty, Cell::Text(text.as_bytes()), &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn values_look_as_the_documentation_says() {
        assert_eq!(json(Type::Numeric(None), "1.10"), "1.10");
        assert_eq!(json(Type::Numeric(None), "NaN"), "\"NaN\"");
        assert_eq!(json(Type::Float8, "1e+20"), "1e+20");
        assert_eq!(json(Type::Bool, "t"), "true");
        assert_eq!(json(Type::Jsonb, "{\"a\": 9223372036854775808}"), "{\"a\": 9223372036854775808}");
        assert_eq!(json(Type::Timestamptz, "2026-11-24 19:29:00.5+00"), "\"2026-11-24T19:29:00.500000Z\"");
        assert_eq!(json(Type::Timestamp, "2026-11-24 19:29:00"), "\"2026-11-24T19:29:00.000000\"");
        assert_eq!(json(Type::Timestamptz, "0044-03-15 00:00:00+00 BC"), "\"0044-03-15 00:00:00+00 BC\"");
        assert_eq!(json(Type::Other, "01:02:03"), "\"01:02:03\"");
        assert_eq!(json(Type::Bytea, "\\x00"), "\"\\\\x00\"");
        assert_eq!(json(Type::Text, "web\u{2011}safari \"\n\u{1}"), "\"web\u{2011}safari \\\"\\n\\u0001\"");
    }

    #[test]
    fn both_wire_forms_give_the_same_bytes() {
        let cases: [(Type, &str, Vec<u8>); 6] = [
            (Type::Int4, "-5", (-5_i32).to_be_bytes().to_vec()),
            (Type::Float8, "0.1", 0.1_f64.to_be_bytes().to_vec()),
            (Type::Bytea, "\\xff", vec![0xff]),
            (Type::Date, "2000-01-02", 1_i32.to_be_bytes().to_vec()),
            (Type::Timestamptz, "2000-01-01 00:00:00.25+00", 250_000_i64.to_be_bytes().to_vec()),
            (Type::Jsonb, "[1]", b"\x01[1]".to_vec()),
        ];
        for (ty, text, binary) in cases {
            let mut out = Vec::new();
            write_json(ty, Cell::Binary(&binary), &mut out).unwrap();
            assert_eq!(String::from_utf8(out).unwrap(), json(ty, text));
        }
    }

    #[test]
    fn the_text_is_known_from_the_json() {
        let same = [
            (Type::Bool, "t"),
            (Type::Bool, "f"),
            (Type::Int8, "-9223372036854775808"),
            (Type::Numeric(None), "1.500"),
            (Type::Numeric(None), "NaN"),
            (Type::Float8, "-Infinity"),
            (Type::Float8, "1e+300"),
            (Type::Text, "a\"\\\n\u{1}é"),
            (Type::Text, "null"),
            (Type::Jsonb, "{\"a\": 1.10}"),
            (Type::Jsonb, "null"),
            (Type::Uuid, "11111111-1111-1111-1111-111111111111"),
            (Type::Date, "0044-03-15 BC"),
            (Type::Timestamp, "2026-11-27 10:00:00"),
            (Type::Timestamp, "infinity"),
            (Type::Timestamptz, "2026-11-27 10:20:30.04+00"),
            (Type::Timestamptz, "0044-03-15 00:00:00+00 BC"),
            (Type::Bytea, "\\x00ab"),
            (Type::Other, "(1,2)"),
        ];
        for (ty, text) in same {
            assert_eq!(text_of_json(ty, &json(ty, text)).unwrap().as_deref(), Some(text), "{ty:?}");
        }
        assert_eq!(text_of_json(Type::Int4, "null").unwrap(), None);
        let array = Type::Array(Element::Number);
        assert!(text_of_json(array, &json(array, "[2:3]={1,2}")).is_err());
        for (ty, other) in [(Type::Int4, "1x"), (Type::Bool, "1"), (Type::Text, "\"")] {
            assert!(text_of_json(ty, other).is_err(), "{other}");
        }
    }

    proptest! {
        #[test]
        fn strings_read_back_by_another_parser(text in ".*") {
            let mut out = Vec::new();
            write_json_string(&text, &mut out);
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        }
    }
}
