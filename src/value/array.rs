//! Postgres's array literals → nested JSON arrays.

use super::json::write_element;
use super::{Converted, bad};
use crate::schema::{Element, Type};

/// Writes `{1,NULL,{…}}` (with or without `[2:3]=` bounds, which JSON cannot express) as JSON.
pub(super) fn write(ty: Type, element: Element, text: &str, out: &mut Vec<u8>) -> Converted<()> {
    let body = match text.split_once("={") {
        Some((bounds, _)) if bounds.starts_with('[') => &text[bounds.len() + 1..],
        _ => text,
    };
    let (start, delimiter) = (out.len(), element.delimiter());
    let mut chars = body.char_indices().peekable();
    let mut fresh = true;
    let mut depth = 0_u32;
    while let Some((at, c)) = chars.next() {
        match c {
            '{' => {
                depth += 1;
                out.push(b'[');
                fresh = true;
            }
            '}' if depth > 0 => {
                depth -= 1;
                out.push(b']');
                fresh = false;
                if depth == 0 {
                    break;
                }
            }
            c if c == delimiter && depth > 0 && !fresh => out.push(b','),
            '"' if depth > 0 => {
                let mut value = String::new();
                loop {
                    match chars.next() {
                        Some((_, '\\')) => value.extend(chars.next().map(|(_, c)| c)),
                        Some((_, '"')) => break,
                        Some((_, c)) => value.push(c),
                        None => return bad(ty, text.as_bytes()),
                    }
                }
                write_element(ty, element, &value, out)?;
                fresh = false;
            }
            _ if depth > 0 => {
                let rest = &body[at..];
                let end = rest.find([delimiter, '}']).unwrap_or(rest.len());
                match &rest[..end] {
                    "NULL" => out.extend_from_slice(b"null"),
                    value => write_element(ty, element, value, out)?,
                }
                while chars.next_if(|(i, _)| *i < at + end).is_some() {}
                fresh = false;
            }
            _ => return bad(ty, text.as_bytes()),
        }
    }
    if depth == 0 && out.len() > start && chars.next().is_none() { Ok(()) } else { bad(ty, text.as_bytes()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(element: Element, text: &str) -> Converted<String> {
        let mut out = Vec::new();
        write(Type::Array(element), element, text, &mut out).map(|()| String::from_utf8(out).unwrap())
    }

    #[test]
    fn literals_become_nested_arrays() {
        assert_eq!(json(Element::Number, "{1,NULL,3}").unwrap(), "[1,null,3]");
        assert_eq!(json(Element::Number, "{}").unwrap(), "[]");
        assert_eq!(json(Element::Number, "[2:3][1:2]={{1,2},{3,4}}").unwrap(), "[[1,2],[3,4]]");
        assert_eq!(
            json(Element::Text, r#"{a,"b,c","d\"e","NULL",NULL,"","{x}={y"}"#).unwrap(),
            r#"["a","b,c","d\"e","NULL",null,"","{x}={y"]"#
        );
        assert_eq!(json(Element::Json, r#"{"{\"a\": 1.10}"}"#).unwrap(), r#"[{"a": 1.10}]"#);
        assert_eq!(json(Element::Box, "{(1,1),(0,0);NULL}").unwrap(), r#"["(1,1),(0,0)",null]"#);
        assert_eq!(json(Element::Text, r#"{"(1,\"a b\")","[1,2)"}"#).unwrap(), r#"["(1,\"a b\")","[1,2)"]"#);
        assert_eq!(json(Element::Bool, "{t,f}").unwrap(), "[true,false]");
        assert_eq!(
            json(Element::Timestamptz, r#"{"2026-11-24 00:00:00+00"}"#).unwrap(),
            r#"["2026-11-24T00:00:00.000000Z"]"#
        );
    }

    #[test]
    fn what_is_no_literal_is_an_error() {
        for text in ["", "1", "{1", "{1}}", "{\"a", "x{1}"] {
            assert!(json(Element::Number, text).is_err(), "{text}");
        }
    }
}
