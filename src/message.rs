//! What `pg_logical_emit_message` sends, as events of a table of its own.
//!
//! A message takes no ordinal, so rows have the same ids with and without messages. Its own `_id` is that of the row before
//! it in its transaction, `+`, and the end of its WAL record, which is what `pg_logical_emit_message` returns:
//! `0000000001DF6578:0000000002+0000000001DF6500`. Before the first row it is `0000000001DF6578+…`, the commit LSN alone; a
//! message without a transaction has the last byte of its own record there, since the next record may be a commit. So ids sort as
//! the stream does.

use std::sync::Arc;

use smallvec::smallvec;

use crate::change::Op;
use crate::enrich::Plan;
use crate::error::Error;
use crate::event::{Event, Layout, OutColumn, identity};
use crate::lsn::{Lsn, Position};
use crate::pgoutput::Cell;
use crate::schema::{Relation, Type};

/// Name outside: of the topic, the archive's files and BigQuery's table.
pub const TABLE: &str = "_message";
/// No table has it.
pub const OID: u32 = 0;

/// One message, borrowed from the chunk it came in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sent<'a> {
    /// Where it stands: at the position of the row that follows it in its transaction, whether one does or not; without a
    /// transaction at the last byte of its own record, so that whoever has everything below the record's end has it too.
    pub at: Position,
    /// Commit time, µs since the Unix epoch; `None` without a transaction.
    pub commit_ts: Option<i64>,
    /// Its transaction; `None` without one.
    pub xid: Option<u32>,
    /// End of its WAL record: its identity.
    pub lsn: Lsn,
    /// What the sender filters by.
    pub prefix: &'a str,
    /// What was sent: text or bytes, which the stream does not tell apart.
    pub content: &'a [u8],
}

impl<'a> Sent<'a> {
    /// Its event. The content stands in `content` where it is UTF-8, else in `content_bytes`.
    pub fn event(self, layout: &'a Arc<Layout>) -> Event<'a> {
        let transactional = self.commit_ts.is_some();
        let (text, bytes) = match std::str::from_utf8(self.content) {
            Ok(text) => (Cell::Text(text.as_bytes()), Cell::Null),
            Err(_) => (Cell::Null, Cell::Binary(self.content)),
        };
        let flag = Cell::Text(if transactional { b"t" } else { b"f" });
        Event {
            at: self.at,
            commit_ts: self.commit_ts.unwrap_or_default(),
            xid: self.xid,
            op: Op::Message { lsn: self.lsn, transactional },
            layout,
            cells: smallvec![Cell::Text(self.prefix.as_bytes()), text, bytes, flag],
            old_key: None,
        }
    }
}

/// How the events of messages look. The prefix is the record key: order is kept per prefix.
pub fn layout(generation: u32) -> Layout {
    let columns = [
        ("prefix", Type::Text),
        ("content", Type::Text),
        ("content_bytes", Type::Bytea),
        ("transactional", Type::Bool),
    ];
    let relation = Relation {
        oid: OID,
        namespace: "pg_catalog".into(),
        name: "pg_logical_emit_message".into(),
        replica_identity: b'n',
        columns: Vec::new(),
    };
    Layout {
        generation,
        relation,
        table: TABLE.into(),
        primary_key: Vec::new(),
        key: Some(0),
        columns: columns.into_iter().map(|(name, ty)| OutColumn::new(name, ty)).collect(),
        plan: Plan::default(),
        identity: identity(TABLE),
    }
}

/// The refusal of a table of the messages' name: it would share their topic.
pub fn name_taken() -> Error {
    Error::refused(
        "table_names",
        format!("a published table is called {TABLE}, as the messages of pg_logical_emit_message are"),
        "one name a source of events",
        "rename the table, take it out of the publication, or set produce.messages = false",
    )
}

/// Appends the `_id` of the message at `at` whose record ends at `lsn`.
pub fn write_id(at: Position, lsn: Lsn, out: &mut Vec<u8>) {
    match at.ordinal.checked_sub(1) {
        Some(ordinal) => Position { ordinal, ..at }.write_id(out),
        None => at.commit_lsn.write_hex(out),
    }
    out.push(b'+');
    lsn.write_hex(out);
}

/// The record's end in an `_id` that [`write_id`] has written.
pub fn lsn_of_id(id: &str) -> Option<Lsn> {
    let (_, lsn) = id.split_once('+')?;
    u64::from_str_radix(lsn, 16).ok().map(Lsn)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(ordinal: u64, lsn: u64, content: &[u8]) -> Sent<'_> {
        let at = Position { commit_lsn: Lsn(0xFF), ordinal };
        Sent { at, commit_ts: Some(946_684_800_000_000), xid: Some(7), lsn: Lsn(lsn), prefix: "p", content }
    }

    fn json(sent: Sent<'_>) -> String {
        let (layout, mut out) = (Arc::new(layout(0)), Vec::new());
        sent.event(&layout).write_json(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_event_says_what_was_sent_and_nothing_else() {
        assert_eq!(
            json(sent(0, 0xF0, b"a \"b\"")),
            r#"{"prefix":"p","content":"a \"b\"","content_bytes":null,"transactional":true,"_id":"00000000000000FF+00000000000000F0","_op":"m","_table":"_message","_lsn":"0/FF","_commit_ts":"2000-01-01T00:00:00.000000Z"}"#
        );
        let free = Sent {
            at: Position { commit_lsn: Lsn(0xEF), ordinal: 0 },
            commit_ts: None,
            xid: None,
            ..sent(0, 0xF0, b"\xff")
        };
        assert_eq!(
            json(free),
            r#"{"prefix":"p","content":null,"content_bytes":"\\xff","transactional":false,"_id":"00000000000000EF+00000000000000F0","_op":"m","_table":"_message","_lsn":"0/F0","_commit_ts":null}"#
        );
    }

    #[test]
    fn ids_sort_among_those_of_the_rows() {
        let message = |ordinal, lsn| {
            let mut id = Vec::new();
            write_id(sent(ordinal, lsn, b"").at, Lsn(lsn), &mut id);
            String::from_utf8(id).unwrap()
        };
        let row = |commit, ordinal| Position { commit_lsn: Lsn(commit), ordinal }.event_id();
        let stream =
            [row(0xFE, 9), message(0, 1), message(0, 2), row(0xFF, 0), message(1, 3), row(0xFF, 1), row(0x100, 0)];
        assert!(stream.is_sorted(), "{stream:?}");
    }
}
