//! Rows as text: a line of COPY, or the values of an INSERT. Pure.

use std::fmt::Write as _;

use jiff::Timestamp;

use super::catalog::Content;
use super::event::Engagement;
use super::model::ContentChange;
use crate::error::{Error, Result};

/// The columns of `engagement_events` that are written; Postgres gives the id.
const COLUMNS: &str = "content_id, user_id, event_type, event_ts, duration_ms, device, raw_payload";

/// The COPY statement for [`copy_line`].
pub fn copy_statement() -> String {
    format!("COPY public.engagement_events ({COLUMNS}) FROM STDIN")
}

/// Appends one line in COPY's text format. `start` is the load's start in microseconds since 1970.
///
/// # Errors
/// [`Error::Fatal`] for a time that is out of the calendar's range.
pub fn copy_line(out: &mut String, row: &Engagement, start: i64) -> Result<()> {
    let time = timestamp(start, row.at)?;
    display(out, row.content_id);
    out.push('\t');
    display(out, row.user_id);
    out.push('\t');
    copied(out, row.event_type);
    out.push('\t');
    display(out, Some(time));
    out.push('\t');
    display(out, row.duration_ms);
    out.push('\t');
    copied(out, row.device);
    out.push('\t');
    copied(out, row.raw_payload.as_deref());
    out.push('\n');
    Ok(())
}

/// Appends one INSERT statement with all the rows.
///
/// # Errors
/// As [`copy_line`].
pub fn insert(out: &mut String, rows: &[Engagement], start: i64) -> Result<()> {
    for (index, row) in rows.iter().enumerate() {
        if index == 0 {
            push(out, format_args!("INSERT INTO public.engagement_events ({COLUMNS}) VALUES "));
        } else {
            out.push_str(", ");
        }
        let time = timestamp(start, row.at)?;
        let (content, user) = (row.content_id.map(|id| id.to_string()), row.user_id.map(|id| id.to_string()));
        push(out, format_args!("({}, {}, ", literal(content.as_deref()), literal(user.as_deref())));
        push(out, format_args!("{}, '{time}', {}, ", literal(row.event_type), number(row.duration_ms)));
        push(out, format_args!("{}, {})", literal(row.device), literal(row.raw_payload.as_deref())));
    }
    out.push_str("; ");
    Ok(())
}

/// Appends the INSERT of a content; one that exists stays as it is.
///
/// # Errors
/// As [`copy_line`].
pub fn insert_content(out: &mut String, content: &Content, start: i64) -> Result<()> {
    let time = timestamp(start, content.published)?;
    push(
        out,
        format_args!(
            "INSERT INTO public.content (id, slug, title, content_type, length_seconds, publish_ts) \
             VALUES ('{}', {}, {}, {}, {}, '{time}') ON CONFLICT DO NOTHING; ",
            content.id,
            literal(Some(&content.slug)),
            literal(Some(&content.title)),
            literal(content.kind.map(|kind| kind.as_str())),
            number(content.length_seconds),
        ),
    );
    Ok(())
}

/// Appends the UPDATE of a content.
pub fn update_content(out: &mut String, change: &ContentChange) {
    push(out, format_args!("UPDATE public.content SET title = {}", literal(Some(&change.title))));
    if change.length_seconds.is_some() {
        push(out, format_args!(", length_seconds = {}", number(change.length_seconds)));
    }
    push(out, format_args!(" WHERE id = '{}'; ", change.id));
}

fn timestamp(start: i64, at: i64) -> Result<Timestamp> {
    let micros = start.saturating_add(at);
    Timestamp::from_microsecond(micros).map_err(|e| Error::fatal(format_args!("event_ts at {micros} µs"), e))
}

/// Writing to a string does not fail.
fn push(out: &mut String, text: std::fmt::Arguments<'_>) {
    let written = out.write_fmt(text);
    debug_assert!(written.is_ok());
}

fn display(out: &mut String, value: Option<impl std::fmt::Display>) {
    match value {
        Some(value) => push(out, format_args!("{value}")),
        None => out.push_str("\\N"),
    }
}

/// COPY's text format: backslash, tab, line feed and carriage return are escaped.
fn copied(out: &mut String, value: Option<&str>) {
    let Some(mut rest) = value else { return out.push_str("\\N") };
    while let Some(at) = rest.find(['\\', '\t', '\n', '\r']) {
        out.push_str(&rest[..at]);
        out.push_str(match rest.as_bytes()[at] {
            b'\\' => "\\\\",
            b'\t' => "\\t",
            b'\n' => "\\n",
            _ => "\\r",
        });
        rest = &rest[at + 1..];
    }
    out.push_str(rest);
}

/// A string literal under `standard_conforming_strings = on`.
fn literal(value: Option<&str>) -> String {
    value.map_or_else(|| "NULL".to_owned(), |text| format!("'{}'", text.replace('\'', "''")))
}

fn number(value: Option<i32>) -> String {
    value.map_or_else(|| "NULL".to_owned(), |n| n.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Engagement {
        Engagement {
            content_id: None,
            user_id: Some(uuid::Uuid::from_u128(1)),
            event_type: Some("play"),
            at: -500_000,
            duration_ms: Some(-7),
            device: Some("web\u{2011}safari"),
            raw_payload: Some(r#"{"a":"it's \n"}"#.into()),
        }
    }

    #[test]
    fn a_copy_line_escapes_what_copy_reads_specially() {
        let mut line = String::new();
        copy_line(&mut line, &row(), 1_700_000_000_000_000).unwrap();
        assert_eq!(
            line,
            "\\N\t00000000-0000-0000-0000-000000000001\tplay\t2023-11-14T22:13:19.5Z\t-7\tweb\u{2011}safari\t\
             {\"a\":\"it's \\\\n\"}\n"
        );
        let mut odd = String::new();
        copied(&mut odd, Some("a\tb\\c\nd\re\\"));
        assert_eq!(odd, "a\\tb\\\\c\\nd\\re\\\\");
    }

    #[test]
    fn an_insert_doubles_quotes_and_leaves_backslashes() {
        let mut sql = String::new();
        insert(&mut sql, &[row(), Engagement { raw_payload: None, ..row() }], 1_700_000_000_000_000).unwrap();
        let values = sql.split_once("VALUES ").unwrap().1;
        assert_eq!(
            values,
            "(NULL, '00000000-0000-0000-0000-000000000001', 'play', '2023-11-14T22:13:19.5Z', -7, 'web\u{2011}safari', \
             '{\"a\":\"it''s \\n\"}'), (NULL, '00000000-0000-0000-0000-000000000001', 'play', '2023-11-14T22:13:19.5Z', \
             -7, 'web\u{2011}safari', NULL); "
        );
    }

    #[test]
    fn a_time_out_of_range_is_an_error_and_not_another_time() {
        assert_eq!(copy_line(&mut String::new(), &row(), i64::MAX).unwrap_err().exit_code(), 1);
    }
}
