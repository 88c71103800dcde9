//! What was found: as text, or as the JSON of `verify --json`.

use std::fmt::Write;

use serde::{Serialize, Serializer};

use crate::consume::board::plain;
use crate::lsn::Lsn;

/// Rows that are named of one table in one sink.
pub(super) const MOST_NAMED: usize = 20;
/// Ranges of keys that are counted by themselves: by the first digits of the key's hash.
const RANGES: usize = 256;
/// Longest key that is shown, in characters.
const KEY_CHARS: usize = 120;

/// The whole.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// No sink differs.
    pub(super) equal: bool,
    /// The LSN that was asked for.
    pub(super) until_lsn: Option<Lsn>,
    /// The source's snapshot, as `pg_current_snapshot()` writes it.
    pub(super) snapshot: String,
    /// End of the WAL when it was taken.
    pub(super) snapshot_lsn: Lsn,
    pub(super) sinks: Vec<SinkReport>,
    pub(super) board: Option<BoardReport>,
    /// What was not compared, and why.
    pub(super) not_compared: Vec<String>,
}

/// One sink.
#[derive(Debug, Serialize)]
pub(super) struct SinkReport {
    /// `kafka`, `archive` or `bigquery`.
    pub(super) sink: &'static str,
    pub(super) tables: Vec<TableReport>,
    /// Tables that were not, and why.
    #[serde(skip)]
    pub(super) not_compared: Vec<String>,
}

/// One table in one sink.
#[derive(Debug, Default, Serialize)]
pub(super) struct TableReport {
    pub(super) table: String,
    pub(super) equal: bool,
    /// Everything committed below it was compared.
    pub(super) up_to: Lsn,
    /// Rows that were compared.
    pub(super) source: Sum,
    pub(super) sink: Sum,
    /// Rows of the source that the sink lacks.
    pub(super) missing: u64,
    /// Rows of the sink that the source lacks.
    pub(super) extra: u64,
    /// Rows that are another in the sink.
    pub(super) different: u64,
    /// Events that are in the sink twice.
    pub(super) doubled: u64,
    /// Rows that the source has changed since `up_to`: not compared.
    pub(super) changed_since: u64,
    /// Rows that are older than the slot, so that no event brought them: not compared.
    pub(super) older_than_slot: u64,
    /// Rows of which no event brought some column; the others were compared.
    pub(super) in_part: u64,
    /// Times that source and sink were read, each for a range of keys: more than one where memory did not hold them all.
    pub(super) passes: u64,
    /// Ranges of keys that differ.
    pub(super) ranges: Vec<RangeReport>,
    /// Rows that differ, at most 20.
    pub(super) rows: Vec<Named>,
    /// Updates that do not say which row they changed.
    #[serde(skip)]
    pub(super) unclear: u64,
    #[serde(skip)]
    sums: Vec<(Sum, Sum)>,
}

/// A range of keys.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct RangeReport {
    /// The first two hexadecimal digits of the hash of its keys.
    range: String,
    source: Sum,
    sink: Sum,
}

/// Rows, with a checksum that does not depend on their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Sum {
    pub(super) rows: u64,
    #[serde(serialize_with = "hex")]
    pub(super) checksum: u64,
}

fn hex<S: Serializer>(n: &u64, s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(&format_args!("{n:016x}"))
}

/// A row that differs.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Named {
    /// `missing`, `extra`, `different` or `doubled`.
    pub(super) what: &'static str,
    /// Its key, as in an event: one value, or an array.
    pub(super) key: String,
    /// The newest event of the row; of a doubled event its own.
    #[serde(rename = "_id")]
    pub(super) id: Option<String>,
    /// The columns that differ.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) columns: Vec<String>,
}

/// The board of the last 10 minutes against what Kafka's events make of it.
#[derive(Debug, Serialize)]
pub(super) struct BoardReport {
    pub(super) equal: bool,
    /// Events counted, by the board and from Kafka.
    pub(super) board_events: u64,
    pub(super) kafka_events: u64,
    /// What differs, at most 20 lines.
    pub(super) differences: Vec<String>,
}

impl Sum {
    fn add(&mut self, hash: u64, rows: u64) {
        self.rows += rows;
        self.checksum = self.checksum.wrapping_add(hash.wrapping_mul(rows));
    }
}

impl TableReport {
    pub(super) fn new(table: &str, up_to: Lsn) -> Self {
        Self { table: table.to_owned(), up_to, sums: vec![Default::default(); RANGES], ..Self::default() }
    }

    pub(super) fn add_source(&mut self, key_hash: u64, row: u64) {
        self.source.add(row, 1);
        self.sums[range(key_hash)].0.add(row, 1);
    }

    pub(super) fn add_sink(&mut self, key_hash: u64, row: u64, rows: u64) {
        self.sink.add(row, rows);
        self.sums[range(key_hash)].1.add(row, rows);
    }

    pub(super) fn name(&mut self, what: &'static str, key: &str, id: Option<String>, columns: Vec<String>) {
        if self.rows.len() < MOST_NAMED {
            let cut = key.chars().nth(KEY_CHARS).is_some();
            let shown: String = key.chars().take(KEY_CHARS).chain(cut.then_some('…')).collect();
            self.rows.push(Named { what, key: shown, id, columns });
        }
    }

    /// The verdict, once all rows have been seen.
    pub(super) fn close(&mut self) {
        let differ = |(i, (source, sink)): (usize, (Sum, Sum))| {
            (source != sink).then(|| RangeReport { range: format!("{i:02x}"), source, sink })
        };
        self.ranges = self.sums.drain(..).enumerate().filter_map(differ).collect();
        self.equal = self.differences() == 0 && self.ranges.is_empty();
    }

    fn differences(&self) -> u64 {
        self.missing + self.extra + self.different + self.doubled
    }
}

fn range(key_hash: u64) -> usize {
    (key_hash >> 56) as usize
}

impl Report {
    /// A table for people.
    pub(super) fn text(&self) -> String {
        let mut text = format!("source     snapshot {} at {}\n", self.snapshot, self.snapshot_lsn);
        for sink in &self.sinks {
            sink.tables.iter().for_each(|table| table.write(sink.sink, &mut text));
        }
        if let Some(board) = &self.board {
            let verdict = if board.equal { "equal" } else { "DIFFERENT" };
            let _ = writeln!(
                text,
                "{:<10} {verdict}: {} events, {} by Kafka",
                "board", board.board_events, board.kafka_events
            );
            board.differences.iter().for_each(|line| text += &format!("           {}\n", plain(line)));
        }
        self.not_compared.iter().for_each(|line| text += &format!("not compared: {line}\n"));
        text + if self.equal { "no difference\n" } else { "source and sinks differ\n" }
    }
}

impl TableReport {
    fn write(&self, sink: &str, text: &mut String) {
        let verdict = if self.equal { "equal" } else { "DIFFERENT" };
        let Self { table, source, sink: found, up_to, .. } = self;
        let _ = writeln!(
            text,
            "{sink:<10} {table}: {verdict} up to {up_to}: {} rows, {} in the source (checksums {:016x}, {:016x})",
            found.rows, source.rows, found.checksum, source.checksum
        );
        if !self.equal {
            let Self { missing, extra, different, doubled, ranges, .. } = self;
            let ranges = ranges.len();
            let _ = writeln!(
                text,
                "           {missing} missing, {extra} extra, {different} different, {doubled} doubled; {ranges} of {RANGES} ranges of keys"
            );
        }
        self.rows.iter().for_each(|row| row.write(text));
        let named = self.rows.len() as u64;
        if self.differences() > named {
            let _ = writeln!(text, "           … and {} more", self.differences() - named);
        }
        self.write_left_out(text);
    }

    fn write_left_out(&self, text: &mut String) {
        let Self { table, changed_since, older_than_slot, in_part, .. } = self;
        if *changed_since > 0 {
            *text += &format!(
                "           {changed_since} rows were changed or backfilled after that LSN, and were not compared\n"
            );
        }
        if *older_than_slot > 0 {
            *text += &format!(
                "           {older_than_slot} rows of {table} are older than the slot and not in this sink; falaj backfill {table}\n"
            );
        }
        if *in_part > 0 {
            *text +=
                &format!("           {in_part} rows have columns that no event brought; the others were compared\n");
        }
    }
}

impl Named {
    fn write(&self, text: &mut String) {
        let Self { what, key, id, columns } = self;
        let id = id.as_ref().map(|id| format!("  _id {id}")).unwrap_or_default();
        let columns = if columns.is_empty() { String::new() } else { format!("  columns {}", columns.join(", ")) };
        *text += &format!("           {what:<9}  key {key}{id}{columns}\n");
    }
}
