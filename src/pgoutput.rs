//! pgoutput: bytes → [`Message`]. Pure and total: every input gives a message or an error with its offset.
//!
//! Source: PostgreSQL documentation, "Logical Replication Message Formats" (protocol versions 1 and 2).

use crate::lsn::Lsn;
use crate::schema::{Column, Relation};

/// Microseconds between the Unix epoch and Postgres's (2000-01-01).
pub const EPOCH_MICROS: i64 = 946_684_800_000_000;

/// One message of the stream. Tuples borrow from the input.
#[derive(Clone, Debug, PartialEq)]
pub enum Message<'a> {
    /// A transaction starts.
    Begin {
        /// LSN of its commit record.
        final_lsn: Lsn,
        /// Commit time, µs since the Unix epoch.
        commit_ts: i64,
        /// Transaction id.
        xid: u32,
    },
    /// A transaction ends.
    Commit {
        /// LSN of the commit record.
        commit_lsn: Lsn,
        /// End of the commit record: what is to be acknowledged.
        end_lsn: Lsn,
        /// Commit time, µs since the Unix epoch.
        commit_ts: i64,
    },
    /// The transaction came from another node.
    Origin {
        /// Commit LSN on the origin.
        lsn: Lsn,
        /// Name of the origin.
        name: &'a str,
    },
    /// The schema that the following rows of this relation are written under.
    Relation(Relation),
    /// Name of a user-defined type.
    Type {
        /// `pg_type.oid`
        oid: u32,
        /// Schema.
        namespace: &'a str,
        /// Name.
        name: &'a str,
    },
    /// A new row.
    Insert {
        /// Relation oid.
        relation: u32,
        /// The row.
        new: Tuple<'a>,
    },
    /// A changed row.
    Update {
        /// Relation oid.
        relation: u32,
        /// Key or whole old row; absent when the identity is the default and the key has not changed.
        old: Option<Old<'a>>,
        /// The row after the change.
        new: Tuple<'a>,
    },
    /// A removed row.
    Delete {
        /// Relation oid.
        relation: u32,
        /// Key or whole old row.
        old: Old<'a>,
    },
    /// Emptied tables.
    Truncate {
        /// Relation oids.
        relations: Vec<u32>,
        /// 1 = CASCADE, 2 = RESTART IDENTITY.
        options: u8,
    },
    /// `pg_logical_emit_message`
    Logical {
        /// Sent within a transaction.
        transactional: bool,
        /// LSN of the message.
        lsn: Lsn,
        /// Prefix.
        prefix: &'a str,
        /// Content.
        content: &'a [u8],
    },
    /// Protocol 2: a block of a transaction that is still in progress.
    StreamStart {
        /// Transaction id.
        xid: u32,
        /// First block of this transaction.
        first: bool,
    },
    /// Protocol 2: end of the block.
    StreamStop,
    /// Protocol 2: the streamed transaction has committed.
    StreamCommit {
        /// Transaction id.
        xid: u32,
        /// LSN of the commit record.
        commit_lsn: Lsn,
        /// End of the commit record.
        end_lsn: Lsn,
        /// Commit time, µs since the Unix epoch.
        commit_ts: i64,
    },
    /// Protocol 2: the streamed (sub)transaction has aborted.
    StreamAbort {
        /// Transaction id.
        xid: u32,
        /// Subtransaction id.
        subxid: u32,
    },
}

/// The old version of a row, as far as the replica identity has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Old<'a> {
    /// Key columns only; the others are NULL on the wire.
    Key(Tuple<'a>),
    /// The whole row (REPLICA IDENTITY FULL).
    Full(Tuple<'a>),
}

impl<'a> Old<'a> {
    /// The tuple, whichever it is.
    pub fn tuple(self) -> Tuple<'a> {
        match self {
            Self::Key(t) | Self::Full(t) => t,
        }
    }
}

/// One column of a tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell<'a> {
    /// SQL NULL.
    Null,
    /// A TOASTed value that the update did not touch: the WAL does not hold it.
    Unchanged,
    /// Text form.
    Text(&'a [u8]),
    /// Binary send form.
    Binary(&'a [u8]),
}

impl Cell<'_> {
    /// Bytes of the value as it was sent; 0 where there is none.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Text(b) | Self::Binary(b) => b.len(),
            Self::Null | Self::Unchanged => 0,
        }
    }
}

/// A row whose bytes have been checked; iterating cannot fail.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tuple<'a> {
    /// Number of columns.
    pub len: u16,
    bytes: &'a [u8],
}

impl<'a> Tuple<'a> {
    /// Its cells in column order.
    pub fn cells(self) -> impl Iterator<Item = Cell<'a>> {
        let mut rest = self.bytes;
        // The tuple was walked once when it was parsed, so there is a cell each time.
        (0..self.len).map_while(move |_| split_cell(&mut rest))
    }
}

/// Takes the first cell off; `None` where there is no whole one.
#[inline]
fn split_cell<'a>(bytes: &mut &'a [u8]) -> Option<Cell<'a>> {
    let (kind, rest) = bytes.split_first()?;
    let cell = match kind {
        b'n' => Cell::Null,
        b'u' => Cell::Unchanged,
        b't' | b'b' => {
            let (length, rest) = rest.split_first_chunk()?;
            let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
            *bytes = rest;
            return Some(if *kind == b't' { Cell::Text(value) } else { Cell::Binary(value) });
        }
        _ => return None,
    };
    *bytes = rest;
    Some(cell)
}

/// Why a message could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pgoutput message at byte {offset}: {what}")]
pub struct ParseError {
    /// Byte offset within the message.
    pub offset: usize,
    /// What was found there.
    pub what: String,
}

/// Reads one message.
///
/// `in_stream` is true between StreamStart and StreamStop, where protocol 2 puts a transaction id before each message.
///
/// # Errors
/// [`ParseError`] for an unknown tag, a short frame, or bytes after the message's end.
pub fn parse(bytes: &[u8], in_stream: bool) -> Result<Message<'_>, ParseError> {
    let mut r = Reader { bytes, at: 0 };
    let message = r.message(in_stream)?;
    match bytes.len() - r.at {
        0 => Ok(message),
        n => Err(r.error(format!("{n} bytes after the end of the message"))),
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

type Parsed<T> = Result<T, ParseError>;

impl<'a> Reader<'a> {
    fn message(&mut self, in_stream: bool) -> Parsed<Message<'a>> {
        let tag = self.u8()?;
        if in_stream && matches!(tag, b'M' | b'R' | b'Y' | b'I' | b'U' | b'D' | b'T') {
            self.u32()?;
        }
        Ok(match tag {
            b'B' => Message::Begin { final_lsn: self.lsn()?, commit_ts: self.time()?, xid: self.u32()? },
            b'C' => {
                self.zero_flags()?;
                Message::Commit { commit_lsn: self.lsn()?, end_lsn: self.lsn()?, commit_ts: self.time()? }
            }
            b'I' => {
                let relation = self.u32()?;
                self.expect(b'N')?;
                Message::Insert { relation, new: self.tuple()? }
            }
            b'U' => self.update()?,
            b'D' => {
                let relation = self.u32()?;
                let kind = self.u8()?;
                Message::Delete { relation, old: self.old(kind)? }
            }
            b'R' => Message::Relation(self.relation()?),
            b'T' => self.truncate()?,
            b'Y' => Message::Type { oid: self.u32()?, namespace: self.string()?, name: self.string()? },
            b'O' => Message::Origin { lsn: self.lsn()?, name: self.string()? },
            b'M' => self.logical()?,
            b'S' => Message::StreamStart { xid: self.u32()?, first: self.u8()? == 1 },
            b'E' => Message::StreamStop,
            b'c' => {
                let xid = self.u32()?;
                self.zero_flags()?;
                Message::StreamCommit { xid, commit_lsn: self.lsn()?, end_lsn: self.lsn()?, commit_ts: self.time()? }
            }
            b'A' => Message::StreamAbort { xid: self.u32()?, subxid: self.u32()? },
            other => {
                self.at = 0;
                return Err(self.error(format!("unknown message type {:?} (0x{other:02x})", char::from(other))));
            }
        })
    }

    fn update(&mut self) -> Parsed<Message<'a>> {
        let relation = self.u32()?;
        let kind = self.u8()?;
        if kind == b'N' {
            return Ok(Message::Update { relation, old: None, new: self.tuple()? });
        }
        let old = Some(self.old(kind)?);
        self.expect(b'N')?;
        Ok(Message::Update { relation, old, new: self.tuple()? })
    }

    fn old(&mut self, kind: u8) -> Parsed<Old<'a>> {
        match kind {
            b'K' => Ok(Old::Key(self.tuple()?)),
            b'O' => Ok(Old::Full(self.tuple()?)),
            _ => Err(self.error(format!("tuple kind {:?}; K, O or N is needed", char::from(kind)))),
        }
    }

    fn relation(&mut self) -> Parsed<Relation> {
        let oid = self.u32()?;
        let namespace = match self.string()? {
            // The documentation: an empty namespace stands for pg_catalog.
            "" => "pg_catalog",
            name => name,
        };
        let (name, replica_identity, count) = (self.string()?, self.u8()?, self.u16()?);
        let columns = (0..count).map(|_| self.column()).collect::<Parsed<_>>()?;
        Ok(Relation { oid, namespace: namespace.into(), name: name.into(), replica_identity, columns })
    }

    fn column(&mut self) -> Parsed<Column> {
        let identity = self.u8()? & 1 == 1;
        let name = self.string()?.to_owned();
        Ok(Column { name, type_oid: self.u32()?, type_mod: self.u32()? as i32, identity })
    }

    fn truncate(&mut self) -> Parsed<Message<'a>> {
        let (count, options) = (self.u32()?, self.u8()?);
        let relations = (0..count).map(|_| self.u32()).collect::<Parsed<_>>()?;
        Ok(Message::Truncate { relations, options })
    }

    fn logical(&mut self) -> Parsed<Message<'a>> {
        let (flags, lsn, prefix) = (self.u8()?, self.lsn()?, self.string()?);
        let length = self.u32()? as usize;
        Ok(Message::Logical { transactional: flags & 1 == 1, lsn, prefix, content: self.take(length)? })
    }

    fn tuple(&mut self) -> Parsed<Tuple<'a>> {
        let len = self.u16()?;
        let (start, mut rest) = (self.at, &self.bytes[self.at..]);
        for _ in 0..len {
            if split_cell(&mut rest).is_none() {
                self.at = self.bytes.len() - rest.len();
                return Err(self.no_cell());
            }
        }
        self.at = self.bytes.len() - rest.len();
        Ok(Tuple { len, bytes: &self.bytes[start..self.at] })
    }

    /// Why there is no cell here.
    #[cold]
    fn no_cell(&mut self) -> ParseError {
        let sized = |r: &mut Self| {
            let length = r.u32()? as usize;
            r.take(length).map(drop)
        };
        let found = match self.u8() {
            Ok(b't' | b'b') => sized(self),
            Ok(other) => Err(self.error(format!("column kind {:?}; n, u, t or b is needed", char::from(other)))),
            Err(short) => Err(short),
        };
        found.err().unwrap_or_else(|| self.error("no column".into()))
    }

    fn zero_flags(&mut self) -> Parsed<()> {
        match self.u8()? {
            0 => Ok(()),
            n => Err(self.error(format!("commit flags 0x{n:02x}; 0 is needed"))),
        }
    }

    fn expect(&mut self, tag: u8) -> Parsed<()> {
        match self.u8()? {
            found if found == tag => Ok(()),
            found => Err(self.error(format!("{:?}; {:?} is needed", char::from(found), char::from(tag)))),
        }
    }

    fn string(&mut self) -> Parsed<&'a str> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|b| *b == 0).ok_or_else(|| self.error("a string without its end".into()))?;
        let text =
            std::str::from_utf8(&rest[..end]).map_err(|e| self.error(format!("a name that is not UTF-8: {e}")))?;
        self.at += end + 1;
        Ok(text)
    }

    fn lsn(&mut self) -> Parsed<Lsn> {
        Ok(Lsn(u64::from_be_bytes(self.array()?)))
    }

    /// Postgres time → Unix time. The addition wraps for absurd values instead of failing a whole stream.
    fn time(&mut self) -> Parsed<i64> {
        Ok(i64::from_be_bytes(self.array()?).wrapping_add(EPOCH_MICROS))
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u16(&mut self) -> Parsed<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    fn u8(&mut self) -> Parsed<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        match self.bytes[self.at..].first_chunk::<N>() {
            Some(chunk) => {
                self.at += N;
                Ok(*chunk)
            }
            None => Err(self.short(N)),
        }
    }

    fn take(&mut self, n: usize) -> Parsed<&'a [u8]> {
        match self.bytes[self.at..].get(..n) {
            Some(slice) => {
                self.at += n;
                Ok(slice)
            }
            None => Err(self.short(n)),
        }
    }

    fn short(&self, needed: usize) -> ParseError {
        self.error(format!("{} bytes left; {needed} are needed", self.bytes.len() - self.at))
    }

    fn error(&self, what: String) -> ParseError {
        ParseError { offset: self.at, what }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(s: &str) -> Vec<u8> {
        let mut out = vec![b't'];
        out.extend((s.len() as u32).to_be_bytes());
        out.extend(s.as_bytes());
        out
    }

    fn tuple(cells: &[Vec<u8>]) -> Vec<u8> {
        let mut out = (cells.len() as u16).to_be_bytes().to_vec();
        out.extend(cells.concat());
        out
    }

    fn join(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    /// One sample of every message, as the documentation lays it out.
    fn samples() -> Vec<Vec<u8>> {
        let row =
            tuple(&[text("1"), vec![b'n'], vec![b'u'], [&[b'b'][..], &4_u32.to_be_bytes(), &[0, 0, 0, 7]].concat()]);
        let rel = 42_u32.to_be_bytes();
        let l = |n: u64| n.to_be_bytes();
        vec![
            join(&[b"B", &l(100), &l(0), &7_u32.to_be_bytes()]),
            join(&[b"C\0", &l(100), &l(148), &l(5)]),
            join(&[b"O", &l(9), b"node\0"]),
            join(&[
                b"R",
                &rel,
                b"public\0content\0d",
                &[0, 1],
                &[1],
                b"id\0",
                &2950_u32.to_be_bytes(),
                &(-1_i32).to_be_bytes(),
            ]),
            join(&[b"Y", &rel, b"app\0mood\0"]),
            join(&[b"I", &rel, b"N", &row]),
            join(&[b"U", &rel, b"N", &row]),
            join(&[b"U", &rel, b"K", &row, b"N", &row]),
            join(&[b"U", &rel, b"O", &row, b"N", &row]),
            join(&[b"D", &rel, b"K", &row]),
            join(&[b"T", &2_u32.to_be_bytes(), &[1], &rel, &rel]),
            join(&[b"M\x01", &l(77), b"prefix\0", &3_u32.to_be_bytes(), b"abc"]),
            join(&[b"S", &7_u32.to_be_bytes(), &[1]]),
            b"E".to_vec(),
            join(&[b"c", &7_u32.to_be_bytes(), &[0], &l(100), &l(148), &l(5)]),
            join(&[b"A", &7_u32.to_be_bytes(), &8_u32.to_be_bytes()]),
        ]
    }

    #[test]
    fn reads_every_message() {
        let samples = samples();
        let parsed: Vec<_> = samples.iter().map(|s| parse(s, false).unwrap()).collect();
        assert_eq!(parsed[0], Message::Begin { final_lsn: Lsn(100), commit_ts: EPOCH_MICROS, xid: 7 });
        assert_eq!(parsed[1], Message::Commit { commit_lsn: Lsn(100), end_lsn: Lsn(148), commit_ts: EPOCH_MICROS + 5 });
        let Message::Insert { relation: 42, new } = &parsed[5] else { panic!("{:?}", parsed[5]) };
        let cells: Vec<_> = new.cells().collect();
        assert_eq!(cells, [Cell::Text(b"1"), Cell::Null, Cell::Unchanged, Cell::Binary(&[0, 0, 0, 7])]);
        assert!(matches!(parsed[7], Message::Update { old: Some(Old::Key(_)), .. }));
        assert!(matches!(parsed[8], Message::Update { old: Some(Old::Full(_)), .. }));
        assert_eq!(parsed[10], Message::Truncate { relations: vec![42, 42], options: 1 });
        assert_eq!(parsed[12], Message::StreamStart { xid: 7, first: true });
    }

    #[test]
    fn inside_a_stream_block_changes_carry_their_transaction_id() {
        let plain = samples().remove(5);
        let streamed = join(&[b"I", &7_u32.to_be_bytes(), &plain[1..]]);
        assert_eq!(parse(&streamed, true), parse(&plain, false));
    }

    #[test]
    fn every_truncated_prefix_is_an_error() {
        for sample in samples() {
            for cut in 0..sample.len() {
                let error = parse(&sample[..cut], false).unwrap_err();
                assert!(error.offset <= cut, "{error}");
            }
            let longer = join(&[&sample, b"!"]);
            assert!(parse(&longer, false).is_err());
        }
    }

    #[test]
    fn an_unknown_message_names_its_tag() {
        assert_eq!(
            parse(b"Zabc", false).unwrap_err().to_string(),
            "pgoutput message at byte 0: unknown message type 'Z' (0x5a)"
        );
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), tag in 0..16_usize, in_stream: bool) {
            let mut bytes = bytes;
            if let (Some(first), Some(real)) = (bytes.first_mut(), b"BCORYIUDTMSEcA".get(tag)) {
                *first = *real;
            }
            let _ = parse(&bytes, in_stream);
        }

        #[test]
        fn one_flipped_byte_never_panics(which in 0..16_usize, at: prop::sample::Index, to: u8, in_stream: bool) {
            let mut sample = samples().remove(which);
            let at = at.index(sample.len());
            sample[at] = to;
            if let Ok(Message::Insert { new, .. }) = parse(&sample, in_stream) {
                assert_eq!(new.cells().count(), usize::from(new.len));
            }
        }

        #[test]
        fn a_row_reads_back_as_it_was_written(values in proptest::collection::vec(proptest::option::of(".*"), 0..20)) {
            let cells: Vec<_> = values.iter().map(|v| v.as_deref().map_or_else(|| vec![b'n'], text)).collect();
            let message = join(&[b"I", &1_u32.to_be_bytes(), b"N", &tuple(&cells)]);
            let Message::Insert { new, .. } = parse(&message, false).unwrap() else { panic!() };
            let back: Vec<_> = new.cells().map(|c| match c { Cell::Text(t) => Some(String::from_utf8(t.to_vec()).unwrap()), _ => None }).collect();
            prop_assert_eq!(back, values);
        }
    }
}
