//! The body of an event in Debezium's envelope: `before`, `after`, `source`, `op`, `ts_ms`, as its PostgreSQL connector's
//! documentation has it ("Data change events"), without Kafka Connect's schema.
//!
//! What differs, so that the same change gives the same bytes: `ts_ms`, `ts_us` and `ts_ns` beside `op` are the commit's time,
//! not the clock's; `source.version` names this form and no release; `source.lsn` is the commit's LSN.
//! Values are in falaj's own forms. `_id` stands at the end.

use crate::change::Op;
use crate::event::{Event, OldKey};
use crate::message;
use crate::pgoutput::Cell;
use crate::value::{Converted, write_json, write_json_string};

/// Debezium's word for an unchanged TOAST column.
const UNAVAILABLE: &[u8] = b"\"__debezium_unavailable_value\"";

/// What all events of a stream say of where they come from.
#[derive(Debug, Clone)]
pub struct Envelope {
    /// `"source":{"version":…,"connector":…,"name":…,`
    head: Vec<u8>,
    /// `"db":…,`
    database: Vec<u8>,
}

/// A change of a row's key is told as the delete of the old key and the creation of the new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// Of an update that changes the key: the row under its old key goes.
    Gone,
    /// … and comes under its new one.
    Come,
}

impl Envelope {
    /// For the events of a pipeline and database.
    pub fn new(pipeline: &str, database: &str) -> Self {
        let mut head = br#""source":{"version":"falaj-1","connector":"postgresql","name":"#.to_vec();
        write_json_string(pipeline, &mut head);
        let mut text = br#","db":"#.to_vec();
        write_json_string(database, &mut text);
        Self { head, database: text }
    }

    /// Appends the body of an event.
    ///
    /// # Errors
    /// [`crate::value::BadValue`] when a cell is not of its column's type.
    pub fn write(&self, event: &Event<'_>, part: Part, out: &mut Vec<u8>) -> Converted<()> {
        out.push(b'{');
        if !matches!(event.op, Op::Truncate | Op::Message { .. }) {
            out.extend_from_slice(b"\"before\":");
            write_before(event, part, out)?;
            out.extend_from_slice(b",\"after\":");
            write_after(event, part, out)?;
            out.push(b',');
        }
        self.write_source(event, out);
        out.extend_from_slice(b",\"op\":\"");
        out.extend_from_slice(letter(event.op, part).as_bytes());
        out.push(b'"');
        write_times(event, out);
        if let Op::Message { .. } = event.op {
            write_message(event, out);
        }
        out.extend_from_slice(b",\"_id\":\"");
        event.write_id(out);
        Ok(out.extend_from_slice(b"\"}"))
    }

    fn write_source(&self, event: &Event<'_>, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head);
        write_times(event, out);
        out.extend_from_slice(if event.op == Op::Read { b",\"snapshot\":true" } else { b",\"snapshot\":false" });
        out.extend_from_slice(&self.database);
        let relation = &event.layout.relation;
        let (schema, table) = match relation.oid {
            message::OID => ("", ""),
            _ => (relation.namespace.as_str(), relation.name.as_str()),
        };
        let lsn = event.lsn().0.to_string();
        // The last committed LSN, which one event does not know, and the present one.
        out.extend_from_slice(b",\"sequence\":\"[null,\\\"");
        out.extend_from_slice(lsn.as_bytes());
        out.extend_from_slice(b"\\\"]\",\"schema\":");
        write_json_string(schema, out);
        out.extend_from_slice(b",\"table\":");
        write_json_string(table, out);
        out.extend_from_slice(b",\"txId\":");
        match event.xid {
            Some(xid) => out.extend_from_slice(itoa::Buffer::new().format(xid).as_bytes()),
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b",\"lsn\":");
        out.extend_from_slice(lsn.as_bytes());
        out.extend_from_slice(b",\"xmin\":null}");
    }
}

fn letter(op: Op, part: Part) -> &'static str {
    match part {
        Part::Whole => op.letter(),
        Part::Gone => Op::Delete.letter(),
        Part::Come => Op::Create.letter(),
    }
}

/// The old row as far as the replica identity has it: of anything but FULL that is the key.
fn write_before(event: &Event<'_>, part: Part, out: &mut Vec<u8>) -> Converted<()> {
    let cells: &[Cell<'_>] = match (event.op, part, &event.old_key) {
        (Op::Delete, ..) => &event.cells,
        (Op::Update, Part::Whole | Part::Gone, Some(OldKey::Row(old))) => old,
        _ => return Ok(out.extend_from_slice(b"null")),
    };
    let relation = &event.layout.relation;
    let is_known =
        |column: usize| relation.replica_identity == b'f' || relation.columns.get(column).is_some_and(|c| c.identity);
    write_row(event, cells, is_known, out)
}

fn write_after(event: &Event<'_>, part: Part, out: &mut Vec<u8>) -> Converted<()> {
    if event.op == Op::Delete || part == Part::Gone {
        return Ok(out.extend_from_slice(b"null"));
    }
    write_row(event, &event.cells, |_| true, out)
}

fn write_row(
    event: &Event<'_>,
    cells: &[Cell<'_>],
    is_known: impl Fn(usize) -> bool,
    out: &mut Vec<u8>,
) -> Converted<()> {
    let start = out.len();
    let columns = event.layout.columns.iter().zip(cells).enumerate();
    for (_, (column, cell)) in columns.filter(|(at, _)| is_known(*at)) {
        out.extend_from_slice(column.label());
        match cell {
            Cell::Unchanged => out.extend_from_slice(UNAVAILABLE),
            cell => write_json(column.ty, *cell, out)?,
        }
    }
    // Every label begins with a comma; the first of them is where the object begins.
    match out.get_mut(start) {
        Some(comma) => *comma = b'{',
        None => out.push(b'{'),
    }
    Ok(out.push(b'}'))
}

fn write_times(event: &Event<'_>, out: &mut Vec<u8>) {
    let micros = event.commit_time();
    let times = [
        (",\"ts_ms\":", micros.map(|at| at.div_euclid(1000))),
        (",\"ts_us\":", micros),
        (",\"ts_ns\":", micros.map(|at| at.saturating_mul(1000))),
    ];
    for (label, time) in times {
        out.extend_from_slice(label.as_bytes());
        match time {
            Some(time) => out.extend_from_slice(itoa::Buffer::new().format(time).as_bytes()),
            None => out.extend_from_slice(b"null"),
        }
    }
}

/// `"message":{"prefix":…,"content":…}`, the content in base64.
fn write_message(event: &Event<'_>, out: &mut Vec<u8>) {
    let bytes = |cell: Option<&Cell<'_>>| match cell {
        Some(Cell::Text(bytes) | Cell::Binary(bytes)) => bytes.to_vec(),
        _ => Vec::new(),
    };
    let text = event.cells.get(1).filter(|cell| **cell != Cell::Null).or(event.cells.get(2));
    out.extend_from_slice(b",\"message\":{\"prefix\":");
    write_json_string(&String::from_utf8_lossy(&bytes(event.cells.first())), out);
    out.extend_from_slice(b",\"content\":\"");
    write_base64(&bytes(text), out);
    out.extend_from_slice(b"\"}");
}

/// RFC 4648, with padding.
fn write_base64(bytes: &[u8], out: &mut Vec<u8>) {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for three in bytes.chunks(3) {
        let byte = |at: usize| u32::from(three.get(at).copied().unwrap_or_default());
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let value = bits >> (18 - 6 * digit) & 63;
            out.push(if digit > three.len() { b'=' } else { DIGITS[value as usize] });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::lsn::{Lsn, Position};
    use crate::message::Sent;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")] {
            let mut out = Vec::new();
            write_base64(bytes.as_bytes(), &mut out);
            assert_eq!(out, text.as_bytes());
        }
    }

    #[test]
    fn a_message_is_as_the_documentation_has_it() {
        let layout = Arc::new(message::layout(0));
        let sent = Sent {
            at: Position { commit_lsn: Lsn(46_523_128), ordinal: 0 },
            commit_ts: Some(1_559_033_904_863_879),
            xid: Some(556),
            lsn: Lsn(46_523_000),
            prefix: "foo",
            content: b"bar",
        };
        let mut out = Vec::new();
        Envelope::new("PostgreSQL_server", "postgres").write(&sent.event(&layout), Part::Whole, &mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            r#"{"source":{"version":"falaj-1","connector":"postgresql","name":"PostgreSQL_server","ts_ms":1559033904863,"ts_us":1559033904863879,"ts_ns":1559033904863879000,"snapshot":false,"db":"postgres","sequence":"[null,\"46523128\"]","schema":"","table":"","txId":556,"lsn":46523128,"xmin":null},"op":"m","ts_ms":1559033904863,"ts_us":1559033904863879,"ts_ns":1559033904863879000,"message":{"prefix":"foo","content":"YmFy"},"_id":"0000000002C5E2F8+0000000002C5E278"}"#
        );
    }
}
