//! Places in the write-ahead log: [`Lsn`], [`Position`], [`Checkpoint`], [`SlotIdentity`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A byte address in the write-ahead log, written by Postgres as `16/B374D848`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 as u32)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Lsn {
    type Err = String;

    /// Parses `X/Y` with one to eight hexadecimal digits on each side, as `pg_lsn` does.
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is not an LSN; needed: two hexadecimal numbers as in 16/B374D848");
        let (high, low) = text.split_once('/').ok_or_else(bad)?;
        let half = |s: &str| {
            let plain = (1..=8).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_hexdigit());
            if plain { u32::from_str_radix(s, 16).ok() } else { None }
        };
        match (half(high), half(low)) {
            (Some(h), Some(l)) => Ok(Self((u64::from(h) << 32) | u64::from(l))),
            _ => Err(bad()),
        }
    }
}

impl Serialize for Lsn {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Lsn {
    /// Appends what [`fmt::Display`] shows.
    pub fn write(self, out: &mut Vec<u8>) {
        let digits = hex(self.0);
        let zeros = |half: u32| (half.leading_zeros() / 4).min(7) as usize;
        out.extend_from_slice(&digits[zeros((self.0 >> 32) as u32)..8]);
        out.push(b'/');
        out.extend_from_slice(&digits[8 + zeros(self.0 as u32)..]);
    }

    /// Appends all sixteen hexadecimal digits, as ids have them.
    pub fn write_hex(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&hex(self.0));
    }
}

/// All sixteen digits.
fn hex(n: u64) -> [u8; 16] {
    /// Spreads eight digits over the bytes of a number, the first in the highest.
    fn spread(half: u32) -> u64 {
        let n = u64::from(half);
        let n = (n << 16 | n) & 0x0000_FFFF_0000_FFFF;
        let n = (n << 8 | n) & 0x00FF_00FF_00FF_00FF;
        (n << 4 | n) & 0x0F0F_0F0F_0F0F_0F0F
    }
    let digits = u128::from(spread((n >> 32) as u32)) << 64 | u128::from(spread(n as u32));
    // A digit of ten or more carries into the upper half of its byte.
    const EACH: u128 = u128::MAX / 0xFF;
    let letters = (digits + 6 * EACH) >> 4 & EACH;
    (digits + u128::from(b'0') * EACH + letters * u128::from(b'A' - b'0' - 10)).to_be_bytes()
}

/// The identity of one row change: its transaction's commit LSN, and its number within that transaction.
///
/// Commits are decoded in commit order, so positions grow along the stream; a row's own change LSN does not.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// LSN of the commit record (`final_lsn` of Begin).
    pub commit_lsn: Lsn,
    /// 0 for the first row message of the transaction, counted before any filter.
    pub ordinal: u64,
}

impl Position {
    /// The event's `_id`: fixed width, so that it sorts as text.
    pub fn event_id(self) -> String {
        let mut id = Vec::new();
        self.write_id(&mut id);
        id.into_iter().map(char::from).collect()
    }

    /// Reads what [`Position::event_id`] writes; `None` for anything else.
    pub fn from_event_id(id: &str) -> Option<Self> {
        let (lsn, ordinal) = id.split_once(':')?;
        let at = Self { commit_lsn: Lsn(u64::from_str_radix(lsn, 16).ok()?), ordinal: ordinal.parse().ok()? };
        (at.event_id() == id).then_some(at)
    }

    /// Appends [`Position::event_id`].
    pub fn write_id(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&hex(self.commit_lsn.0));
        out.push(b':');
        let mut buffer = itoa::Buffer::new();
        let digits = buffer.format(self.ordinal).as_bytes();
        out.extend_from_slice(&b"0000000000"[digits.len().min(10)..]);
        out.extend_from_slice(digits);
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.commit_lsn, self.ordinal)
    }
}

impl fmt::Debug for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A transaction, as the stream says of its commit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Commit {
    /// Start of the commit record.
    pub lsn: Lsn,
    /// Commit time, µs since the Unix epoch.
    pub ts: i64,
}

impl Commit {
    /// Stands where there has been no transaction with rows yet.
    pub const NONE: Self = Self { lsn: Lsn(0), ts: 0 };
}

/// How far something (a sink, the lookup state) has got.
///
/// Everything committed below `resume` is in; of the transaction at `partial`, the rows up to that ordinal are in as well.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Checkpoint {
    /// `end_lsn` of the last whole transaction, or an idle position: where replication resumes.
    pub resume: Lsn,
    /// Set only while a transaction larger than one batch is half in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial: Option<Position>,
    /// Last change of the lookup rows that the events below `resume` were enriched with: an older lookup state than that must
    /// not go on from here. `None` where nobody has said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lookups: Option<Position>,
    /// The last transaction of which rows are in: a server that has another one there has another history. `None` where nobody
    /// has said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<Commit>,
}

impl Checkpoint {
    /// At a transaction boundary.
    pub fn whole(resume: Lsn) -> Self {
        Self { resume, partial: None, lookups: None, commit: None }
    }

    /// The one that has got further.
    pub fn max(self, other: Self) -> Self {
        if other.reach() > self.reach() { other } else { self }
    }

    /// The one that has got less far.
    pub fn min(self, other: Self) -> Self {
        if other.reach() < self.reach() { other } else { self }
    }

    /// Whether everything in `other` is in this one too.
    pub fn covers(self, other: Self) -> bool {
        self.reach() >= other.reach()
    }

    /// First position that is not in: a total order, since the next commit lies at or behind `resume`.
    fn reach(self) -> (Lsn, u64) {
        self.partial.map_or((self.resume, 0), |p| (p.commit_lsn, p.ordinal + 1))
    }

    /// Whether the change at `at` is already in.
    pub fn has(&self, at: Position) -> bool {
        at.commit_lsn < self.resume || self.partial.is_some_and(|p| at <= p)
    }
}

/// Which stream an LSN belongs to: numbers of another cluster, timeline or slot mean nothing here.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SlotIdentity {
    /// `systemid` of IDENTIFY_SYSTEM.
    pub system_id: String,
    /// `timeline` of IDENTIFY_SYSTEM.
    pub timeline: u32,
    /// Name of the replication slot.
    pub slot: String,
}

impl fmt::Display for SlotIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "system {}, timeline {}, slot \"{}\"", self.system_id, self.timeline, self.slot)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn digits_are_those_of_the_standard_library(high: u32, low: u32, shift in 0..64_u32) {
            let lsn = Lsn((u64::from(high) << 32 | u64::from(low)) >> shift);
            let mut written = Vec::new();
            lsn.write(&mut written);
            prop_assert_eq!(written, lsn.to_string().into_bytes());
            let mut written = Vec::new();
            lsn.write_hex(&mut written);
            prop_assert_eq!(written, format!("{:016X}", lsn.0).into_bytes());
        }
    }

    #[test]
    fn lsn_reads_what_postgres_writes() {
        let lsn: Lsn = "16/B374D848".parse().unwrap();
        assert_eq!((lsn.0, lsn.to_string()), (0x16_B374_D848, "16/B374D848".to_owned()));
        for lsn in [0, 9, 0x10, 0x16_B374_D848, 0xFF_0000_0000, u64::MAX].map(Lsn) {
            let mut written = Vec::new();
            lsn.write(&mut written);
            assert_eq!(written, lsn.to_string().into_bytes());
        }
        for bad in ["", "16", "/1", "1/", "1/+2", "1/123456789", "x/1", "1/2/3"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_event_id_reads_back_and_nothing_else_does() {
        let at = Position { commit_lsn: Lsn(0x16_B374_D848), ordinal: 3 };
        assert_eq!(Position::from_event_id(&at.event_id()), Some(at));
        assert_eq!(Position::from_event_id("16:3"), None);
    }

    #[test]
    fn event_ids_sort_as_their_positions() {
        let at = |l, o| Position { commit_lsn: Lsn(l), ordinal: o };
        let mut ids = [at(0x1_0000_0000, 0), at(0xFF, 10), at(0xFF, 9)].map(Position::event_id);
        ids.sort();
        assert_eq!(ids[0], "00000000000000FF:0000000009");
        assert_eq!(ids[2], "0000000100000000:0000000000");
        assert_eq!(at(0, 12_345_678_901).event_id(), "0000000000000000:12345678901");
    }

    #[test]
    fn a_partial_checkpoint_has_the_first_rows_of_its_transaction_only() {
        let at = |l, o| Position { commit_lsn: Lsn(l), ordinal: o };
        let c = Checkpoint { partial: Some(at(150, 3)), ..Checkpoint::whole(Lsn(100)) };
        assert!(c.has(at(99, 7)) && c.has(at(150, 3)));
        assert!(!c.has(at(150, 4)) && !c.has(at(151, 0)));
        assert!(!Checkpoint::whole(Lsn(100)).has(at(100, 0)));
        assert!(c.covers(Checkpoint::whole(Lsn(100))) && Checkpoint::whole(Lsn(158)).covers(c));
        let less = Checkpoint { partial: Some(at(150, 2)), ..c };
        assert_eq!((c.max(less), c.min(less)), (c, less));
    }
}
