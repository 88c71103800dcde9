//! A change as the stream brings it: numbered, not yet enriched.

use crate::lsn::{Commit, Lsn, Position};
use crate::message::Sent;
use crate::pgoutput::{Message, Old, Tuple};

/// What happened to a row; the event's `_op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// `c`: inserted.
    Create,
    /// `u`: updated.
    Update,
    /// `d`: deleted.
    Delete,
    /// `r`: read by a snapshot or backfill.
    Read,
    /// `t`: its table was truncated.
    Truncate,
    /// `m`: no row, but a message of `pg_logical_emit_message`.
    Message {
        /// End of its WAL record.
        lsn: Lsn,
        /// Sent within a transaction, and so at its commit.
        transactional: bool,
    },
}

impl Op {
    /// The letter in `_op`.
    pub fn letter(self) -> &'static str {
        match self {
            Self::Create => "c",
            Self::Update => "u",
            Self::Delete => "d",
            Self::Read => "r",
            Self::Truncate => "t",
            Self::Message { .. } => "m",
        }
    }

    /// Reads what [`Op::letter`] gives.
    pub fn from_letter(letter: &str) -> Option<Self> {
        [Self::Create, Self::Update, Self::Delete, Self::Read, Self::Truncate]
            .into_iter()
            .find(|op| op.letter() == letter)
    }
}

/// One numbered change of one relation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change<'a> {
    /// Its identity.
    pub at: Position,
    /// Commit time, µs since the Unix epoch.
    pub commit_ts: i64,
    /// Its transaction, as [`Assembler::xid`].
    pub xid: u32,
    /// Relation oid.
    pub relation: u32,
    /// The rows.
    pub row: RowChange<'a>,
}

/// The rows of a change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowChange<'a> {
    /// Inserted row.
    Insert(Tuple<'a>),
    /// Old key or row, new row.
    Update(Option<Old<'a>>, Tuple<'a>),
    /// Old key or row.
    Delete(Old<'a>),
    /// No row.
    Truncate,
}

/// What the walk does with a message.
#[derive(Clone, Debug, PartialEq)]
pub enum Step<'a> {
    /// A transaction opens; nothing to do yet.
    Begin,
    /// A numbered change.
    Change(Change<'a>),
    /// Several relations truncated by one statement, one change each.
    Truncate(Vec<Change<'a>>),
    /// The schema of the following rows.
    Relation(crate::schema::Relation),
    /// A user-defined type of the next Relation; of a domain, its base type. Takes no number.
    Type {
        /// `pg_type.oid`, of the domain itself.
        oid: u32,
        /// Schema; empty for `pg_catalog`.
        namespace: &'a str,
        /// Name.
        name: &'a str,
    },
    /// The transaction is whole up to this LSN.
    Commit {
        /// End of the commit record.
        end_lsn: Lsn,
        /// Commit time, µs since the Unix epoch.
        commit_ts: i64,
    },
    /// A message of `pg_logical_emit_message`: it takes no number.
    Message(Sent<'a>),
    /// Something that changes no row and takes no number.
    Other,
}

/// The order of messages is not that of the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("replication stream out of order: {0}")]
pub struct OutOfOrder(String);

/// Numbers the row messages of a transaction, before any filter: each Insert, Update, Delete, and each relation of a
/// Truncate takes one number; nothing else does. So a change keeps its number over restarts and replays.
#[derive(Debug, Default)]
pub struct Assembler {
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    xid: u32,
    commit_lsn: Lsn,
    commit_ts: i64,
    next: u64,
}

impl Assembler {
    /// The commit LSN of the open transaction.
    pub fn open(&self) -> Option<Lsn> {
        self.open.as_ref().map(|o| o.commit_lsn)
    }

    /// The open transaction, by its commit.
    pub fn transaction(&self) -> Option<Commit> {
        self.open.as_ref().map(|o| Commit { lsn: o.commit_lsn, ts: o.commit_ts })
    }

    /// The open transaction's id, as the WAL has it: without its epoch.
    pub fn xid(&self) -> Option<u32> {
        self.open.as_ref().map(|o| o.xid)
    }

    /// Position that the next change of the open transaction will have.
    pub fn next(&self) -> Option<Position> {
        self.open.as_ref().map(|o| Position { commit_lsn: o.commit_lsn, ordinal: o.next })
    }

    /// Takes the next message of the stream.
    ///
    /// # Errors
    /// [`OutOfOrder`] for a row outside a transaction, a Begin within one, or a foreign Commit.
    pub fn push<'a>(&mut self, message: Message<'a>) -> Result<Step<'a>, OutOfOrder> {
        match message {
            Message::Begin { final_lsn, commit_ts, xid } => self.begin(xid, final_lsn, commit_ts),
            Message::Insert { relation, new } => self.change(relation, RowChange::Insert(new)).map(Step::Change),
            Message::Update { relation, old, new } => {
                self.change(relation, RowChange::Update(old, new)).map(Step::Change)
            }
            Message::Delete { relation, old } => self.change(relation, RowChange::Delete(old)).map(Step::Change),
            Message::Truncate { relations, .. } => {
                let changes = relations.into_iter().map(|oid| self.change(oid, RowChange::Truncate));
                changes.collect::<Result<_, _>>().map(Step::Truncate)
            }
            Message::Relation(relation) => Ok(Step::Relation(relation)),
            Message::Commit { commit_lsn, end_lsn, commit_ts } => self.commit(commit_lsn, end_lsn, commit_ts),
            Message::Logical { transactional, lsn, prefix, content } => {
                let (at, commit_ts) = self.place_of(transactional, lsn)?;
                Ok(Step::Message(Sent { at, commit_ts, xid: self.xid(), lsn, prefix, content }))
            }
            Message::Type { oid, namespace, name } => Ok(Step::Type { oid, namespace, name }),
            Message::Origin { .. } => Ok(Step::Other),
            Message::StreamStart { .. }
            | Message::StreamStop
            | Message::StreamCommit { .. }
            | Message::StreamAbort { .. } => {
                Err(OutOfOrder("a message of streaming mode, which was not asked for".into()))
            }
        }
    }

    fn begin<'a>(&mut self, xid: u32, commit_lsn: Lsn, commit_ts: i64) -> Result<Step<'a>, OutOfOrder> {
        match self.open.replace(Open { xid, commit_lsn, commit_ts, next: 0 }) {
            None => Ok(Step::Begin),
            Some(open) => {
                Err(OutOfOrder(format!("Begin of {commit_lsn} within the transaction of {}", open.commit_lsn)))
            }
        }
    }

    fn change<'a>(&mut self, relation: u32, row: RowChange<'a>) -> Result<Change<'a>, OutOfOrder> {
        let open = self.open.as_mut().ok_or_else(|| OutOfOrder("a row outside a transaction".into()))?;
        let at = Position { commit_lsn: open.commit_lsn, ordinal: open.next };
        open.next += 1;
        Ok(Change { at, commit_ts: open.commit_ts, xid: open.xid, relation, row })
    }

    /// Position and commit time of a message. Without a transaction it comes when it is decoded: between two of them.
    fn place_of(&self, transactional: bool, lsn: Lsn) -> Result<(Position, Option<i64>), OutOfOrder> {
        match (&self.open, transactional) {
            (Some(o), true) => Ok((Position { commit_lsn: o.commit_lsn, ordinal: o.next }, Some(o.commit_ts))),
            // No commit record begins within the message's own one.
            (None, false) => Ok((Position { commit_lsn: Lsn(lsn.0.saturating_sub(1)), ordinal: 0 }, None)),
            (Some(o), false) => {
                Err(OutOfOrder(format!("message {lsn} of no transaction within that of {}", o.commit_lsn)))
            }
            (None, true) => Err(OutOfOrder(format!("message {lsn} outside its transaction"))),
        }
    }

    fn commit<'a>(&mut self, commit_lsn: Lsn, end_lsn: Lsn, commit_ts: i64) -> Result<Step<'a>, OutOfOrder> {
        match self.open.take() {
            Some(open) if open.commit_lsn == commit_lsn && end_lsn > commit_lsn => {
                Ok(Step::Commit { end_lsn, commit_ts })
            }
            open => Err(OutOfOrder(format!(
                "Commit of {commit_lsn} (end {end_lsn}) while {:?} is open",
                open.map(|o| o.commit_lsn)
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pgoutput::{Cell, parse};

    fn begin(lsn: u64) -> Message<'static> {
        Message::Begin { final_lsn: Lsn(lsn), commit_ts: 5, xid: 1 }
    }

    fn commit(lsn: u64) -> Message<'static> {
        Message::Commit { commit_lsn: Lsn(lsn), end_lsn: Lsn(lsn + 8), commit_ts: 5 }
    }

    #[test]
    fn rows_and_truncated_relations_take_numbers_and_nothing_else_does() {
        let mut a = Assembler::default();
        let mut steps = Vec::new();
        for message in [
            begin(100),
            Message::Type { oid: 1, namespace: "", name: "" },
            Message::Truncate { relations: vec![7, 8], options: 0 },
            Message::Logical { transactional: true, lsn: Lsn(1), prefix: "", content: b"" },
            Message::Truncate { relations: vec![9], options: 0 },
            commit(100),
        ] {
            steps.push(a.push(message).unwrap());
        }
        let at = |ordinal| Position { commit_lsn: Lsn(100), ordinal };
        let Step::Truncate(two) = &steps[2] else { panic!() };
        let Step::Truncate(one) = &steps[4] else { panic!() };
        assert_eq!([two[0].at, two[1].at, one[0].at], [at(0), at(1), at(2)]);
        assert_eq!([two[0].relation, two[1].relation, one[0].relation], [7, 8, 9]);
        assert_eq!(steps[5], Step::Commit { end_lsn: Lsn(108), commit_ts: 5 });
        assert_eq!(a.open(), None);
    }

    #[test]
    fn what_is_out_of_order_is_an_error() {
        let truncate = || Message::Truncate { relations: vec![7], options: 0 };
        assert!(Assembler::default().push(truncate()).is_err());
        assert!(Assembler::default().push(commit(100)).is_err());
        let mut a = Assembler::default();
        a.push(begin(100)).unwrap();
        assert!(a.push(commit(101)).is_err());
        a.push(begin(100)).unwrap();
        assert!(a.push(begin(200)).is_err());
        assert!(a.push(Message::StreamStop).is_err());
        let message = |transactional| Message::Logical { transactional, lsn: Lsn(7), prefix: "", content: b"" };
        assert!(a.push(message(false)).is_err());
        assert!(Assembler::default().push(message(true)).is_err());
    }

    fn row(tuple: Tuple<'_>) -> String {
        let cell = |cell| match cell {
            Cell::Null => "NULL".into(),
            Cell::Unchanged => "unchanged".into(),
            Cell::Text(text) | Cell::Binary(text) => String::from_utf8_lossy(text).into_owned(),
        };
        format!("({})", tuple.cells().map(cell).collect::<Vec<String>>().join(", "))
    }

    fn shown(step: &Step<'_>) -> String {
        let change = |c: &Change<'_>| {
            let rows = match c.row {
                RowChange::Insert(new) => format!("insert {}", row(new)),
                RowChange::Update(None, new) => format!("update to {}", row(new)),
                RowChange::Update(Some(Old::Key(key)), new) => format!("update key {} to {}", row(key), row(new)),
                RowChange::Update(Some(Old::Full(old)), new) => format!("update {} to {}", row(old), row(new)),
                RowChange::Delete(Old::Key(key)) => format!("delete key {}", row(key)),
                RowChange::Delete(Old::Full(old)) => format!("delete {}", row(old)),
                RowChange::Truncate => "truncate".into(),
            };
            format!("{} of {}: {rows}", c.at, c.relation)
        };
        match step {
            Step::Begin => "begin".into(),
            Step::Change(c) => change(c),
            Step::Truncate(changes) => changes.iter().map(change).collect::<Vec<_>>().join("; "),
            Step::Relation(r) => {
                let columns: Vec<_> = r.columns.iter().map(|c| format!("{} {:?}", c.name, c.ty())).collect();
                format!("relation {} {} ({})", r.oid, r.table(), columns.join(", "))
            }
            Step::Commit { end_lsn, .. } => format!("commit, acknowledge {end_lsn}"),
            Step::Message(m) => {
                format!("{} at {}: {:?} {:?}", m.lsn, m.at, m.prefix, String::from_utf8_lossy(m.content))
            }
            Step::Type { oid, name, .. } => format!("type {oid} {name}"),
            Step::Other => "nothing".into(),
        }
    }

    /// Messages that a Postgres 15 sent, and what each of them means. Lines of the script: hex, then `= meaning`.
    #[test]
    fn a_recorded_stream_means_what_the_golden_script_says() {
        let script = include_str!("../tests/golden/stream.txt");
        let mut assembler = Assembler::default();
        let mut lines = script.lines().filter(|l| !l.starts_with('#'));
        while let (Some(hex), Some(meaning)) = (lines.next(), lines.next()) {
            let byte = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
            let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
            let step = assembler.push(parse(&bytes, false).unwrap()).unwrap();
            assert_eq!(format!("= {}", shown(&step)), meaning, "{hex}");
        }
        assert_eq!(assembler.open(), None);
    }
}
