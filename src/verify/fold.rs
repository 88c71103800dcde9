//! A sink's events folded into the latest row of each key. Pure: no IO.
//!
//! Each column keeps the value of the newest event that brought it, so events may come in any order (a row whose record key
//! changes moves to another partition), and an unchanged TOAST value is that of the event before. Memory is bounded: a fold
//! holds the keys of a range of hashes, and gives the upper half of it up when it has grown too large.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

use super::table::{Table, hash};
use crate::change::Op;
use crate::lsn::Position;

/// What a row costs beside its columns and key; what an id costs.
const ROW: usize = 160;
const ID: usize = 48;
const CELL: usize = 32;

/// Hashes of keys, both inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) first: u64,
    pub(super) last: u64,
}

impl Range {
    pub(super) const ALL: Self = Self { first: 0, last: u64::MAX };

    pub(super) fn has(self, hash: u64) -> bool {
        (self.first..=self.last).contains(&hash)
    }
}

/// What an event says of a table.
pub(super) struct Fact<'a> {
    pub(super) at: Position,
    pub(super) op: Op,
    /// The row's key; empty for a truncate.
    pub(super) key: &'a str,
    /// The key before, where the event changed it.
    pub(super) old_key: Option<&'a str>,
    /// Hash of each column's value; `None` where the event does not bring it.
    pub(super) values: &'a [Option<u64>],
}

/// A row as the events have it.
#[derive(Debug, Default)]
pub(super) struct Row {
    newest: Option<Position>,
    gone: bool,
    /// When a row last came to be under this key: values from before are not its own.
    born: Option<Position>,
    cells: Vec<Option<(Position, u64)>>,
    /// Without a key: each row that came (true) or went.
    copies: Vec<(Position, bool)>,
    /// How many of them are left, once one was taken.
    left: Option<i64>,
}

/// Rows by key, as of a place in the stream.
#[derive(Debug)]
pub(super) struct Fold {
    pub(super) range: Range,
    /// Events from here on do not count: their rows are left out.
    bound: Position,
    /// The same for copied rows.
    copies_bound: Position,
    columns: usize,
    keyed: bool,
    held: usize,
    most: usize,
    rows: HashMap<Box<str>, Row>,
    /// Of each event, with the hash of its key.
    ids: HashMap<Position, u64>,
    truncated: Option<Position>,
    /// Hashes of keys that have been changed since.
    changed: HashSet<u64>,
    /// The table was emptied since.
    emptied: bool,
    /// Events that were there before, with their keys.
    pub(super) doubled: Vec<(Position, String)>,
    /// Updates that do not say which row they changed.
    pub(super) unclear: u64,
    /// Hashes of keys that the sink has been given once, and that no event of it tells of now.
    given: HashSet<u64>,
}

impl Fold {
    /// Of the keys in `range`, up to `bound` exclusive, in about `most` bytes. `changed` are those that the source has changed
    /// since.
    pub(super) fn new(table: &Table, range: Range, bound: Position, changed: &Changed, most: usize) -> Self {
        Self {
            range,
            bound,
            copies_bound: bound,
            columns: table.columns.len(),
            keyed: table.keyed,
            held: 0,
            most,
            rows: HashMap::new(),
            ids: HashMap::new(),
            truncated: None,
            changed: changed.since(bound),
            emptied: changed.emptied.is_some_and(|at| at >= bound.commit_lsn.0),
            doubled: Vec::new(),
            unclear: 0,
            given: HashSet::new(),
        }
    }

    /// Copied rows count up to `bound` exclusive, however far the stream is: for a sink that gets them beside it.
    pub(super) fn with_copies(self, bound: Position) -> Self {
        Self { copies_bound: bound, ..self }
    }

    /// Takes an event that the source's snapshot sees.
    pub(super) fn push(&mut self, fact: &Fact<'_>) {
        if fact.at >= if fact.op == Op::Read { self.copies_bound } else { self.bound } {
            return self.leave_out(fact);
        }
        if fact.op == Op::Truncate {
            if self.range.first == 0 && self.ids.insert(fact.at, 0).is_some() {
                self.doubled.push((fact.at, String::new()));
            }
            self.truncated = self.truncated.max(Some(fact.at));
            return;
        }
        if self.is_doubled(fact) {
            return;
        }
        if let Some(old) = fact.old_key.filter(|old| *old != fact.key) {
            self.apply(old, fact, true);
        }
        self.apply(fact.key, fact, fact.op == Op::Delete);
        if self.held + self.ids.len() * ID > self.most {
            self.give_up_half();
        }
    }

    /// Takes the keys of a change that does not count.
    pub(super) fn leave_out(&mut self, fact: &Fact<'_>) {
        let keys = || [Some(fact.key), fact.old_key].into_iter().flatten().map(hash);
        match fact.op {
            Op::Truncate => self.emptied = true,
            _ => self.changed.extend(keys().filter(|hash| self.range.has(*hash))),
        }
    }

    /// Leaves the rows of an event out, if it lies behind the bound.
    pub(super) fn note_later(&mut self, fact: &Fact<'_>) {
        if fact.at >= self.bound {
            self.leave_out(fact);
        }
    }

    /// Notes a copied row that the sink has been given, once its own events have been pushed.
    pub(super) fn note_copy(&mut self, fact: &Fact<'_>) {
        if fact.at >= self.copies_bound {
            return self.leave_out(fact);
        }
        let (hash, is_there) = (hash(fact.key), self.keyed && self.rows.contains_key(fact.key));
        if self.range.has(hash) && !is_there {
            self.given.insert(hash);
        }
    }

    /// Whether the sink has been given a copy of the row: then it is lost where no event tells of it.
    pub(super) fn is_given(&self, key: &str) -> bool {
        self.given.contains(&hash(key))
    }

    fn is_doubled(&mut self, fact: &Fact<'_>) -> bool {
        let hash = hash(fact.key);
        let doubled = self.range.has(hash) && self.ids.insert(fact.at, hash).is_some();
        if doubled {
            self.doubled.push((fact.at, fact.key.to_owned()));
        }
        doubled
    }

    /// Notes an event that the sink itself says is there twice.
    pub(super) fn note_doubled(&mut self, at: Position) {
        let known = self.doubled.iter().any(|(known, _)| *known == at);
        let is_ours = self.ids.get(&at).is_some_and(|hash| self.range.has(*hash));
        if is_ours && !known {
            self.doubled.push((at, String::new()));
        }
    }

    fn apply(&mut self, key: &str, fact: &Fact<'_>, gone: bool) {
        if !self.range.has(hash(key)) {
            return;
        }
        let columns = if self.keyed { self.columns } else { 0 };
        if !self.rows.contains_key(key) {
            self.held += ROW + key.len() + columns * CELL;
            self.rows.insert(key.into(), Row { cells: vec![None; columns], ..Row::default() });
        }
        let Some(row) = self.rows.get_mut(key) else { return };
        if row.newest.is_none_or(|newest| fact.at > newest) {
            (row.newest, row.gone) = (Some(fact.at), gone);
        }
        if !self.keyed {
            self.held += CELL;
            self.unclear += u64::from(fact.op == Op::Update);
            return row.copies.push((fact.at, !gone));
        }
        if gone {
            return;
        }
        if fact.op != Op::Update || fact.old_key.is_some() {
            row.born = row.born.max(Some(fact.at));
        }
        for (cell, value) in row.cells.iter_mut().zip(fact.values) {
            if let Some(value) = value
                && cell.is_none_or(|(at, _)| fact.at > at)
            {
                *cell = Some((fact.at, *value));
            }
        }
    }

    /// One row is kept, whatever it takes: else nothing would ever be compared.
    fn give_up_half(&mut self) {
        if self.range.first == self.range.last || self.rows.len() < 2 {
            return;
        }
        self.range.last = self.range.first + (self.range.last - self.range.first) / 2;
        let range = self.range;
        self.rows.retain(|key, _| range.has(hash(key)));
        self.ids.retain(|_, hash| range.has(*hash));
        self.doubled.retain(|(_, key)| key.is_empty() || range.has(hash(key)));
        let cells = self.columns * CELL;
        self.held = self.rows.iter().map(|(key, row)| ROW + key.len() + cells + row.copies.len() * CELL).sum();
    }

    /// Whether the source has changed the row since, so that it cannot be compared.
    pub(super) fn is_changed(&self, key: &str) -> bool {
        self.emptied || self.changed.contains(&hash(key))
    }

    /// Takes a row out, to compare it.
    pub(super) fn take(&mut self, key: &str) -> Option<Row> {
        self.rows.remove(key)
    }

    /// Without a key: takes one of the equal rows.
    pub(super) fn take_copy(&mut self, key: &str) -> Option<Position> {
        let truncated = self.truncated;
        let row = self.rows.get_mut(key)?;
        let left = row.count(truncated);
        row.left = Some(left - 1);
        row.newest.filter(|_| left > 0)
    }

    /// What is left.
    pub(super) fn rest(&mut self) -> impl Iterator<Item = (Box<str>, Row)> + use<> {
        std::mem::take(&mut self.rows).into_iter()
    }

    /// A row's columns, where there is one.
    pub(super) fn values(&self, row: &Row) -> Option<(Position, Vec<Option<u64>>)> {
        let newest = row.newest.filter(|at| !row.gone && Some(*at) > self.truncated)?;
        let own = |at: Position| row.born.is_none_or(|born| at >= born) && Some(at) > self.truncated;
        Some((newest, row.cells.iter().map(|cell| cell.filter(|(at, _)| own(*at)).map(|(_, hash)| hash)).collect()))
    }

    /// Without a key: how many equal rows there are.
    pub(super) fn count(&self, row: &Row) -> i64 {
        row.count(self.truncated)
    }
}

impl Row {
    fn count(&self, truncated: Option<Position>) -> i64 {
        if let Some(left) = self.left {
            return left;
        }
        let live = self.copies.iter().filter(|(at, _)| Some(*at) > truncated);
        live.map(|(_, came)| if *came { 1 } else { -1 }).sum()
    }

    /// Its newest event.
    pub(super) fn newest(&self) -> Option<Position> {
        self.newest
    }
}

/// Rows of one table that the source has changed, and that may be in no sink yet: hash of key → last commit LSN.
#[derive(Debug, Default)]
pub(super) struct Changed {
    pub(super) keys: HashMap<u64, u64>,
    /// Commit LSN of the last TRUNCATE.
    pub(super) emptied: Option<u64>,
}

impl Changed {
    /// Notes a change.
    pub(super) fn note(&mut self, key: &str, commit_lsn: u64) {
        let last = self.keys.entry(hash(key)).or_default();
        *last = commit_lsn.max(*last);
    }

    fn since(&self, bound: Position) -> HashSet<u64> {
        self.keys.iter().filter(|(_, at)| **at >= bound.commit_lsn.0).map(|(key, _)| *key).collect()
    }
}
