//! What a replay would send, counted by reading it.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::walk::{Tally, Walk};
use crate::error::Result;
use crate::playback::Range;
use crate::world::print;

/// Prints range, rows and bytes.
///
/// # Errors
/// As a replay's reading.
pub(super) fn run(mut walk: Walk<'_>) -> Result<()> {
    while walk.next()?.is_some() {}
    if walk.tally.stopped {
        return Ok(walk.tally.summary(walk.range, "nowhere"));
    }
    print(&table(&walk.tally, walk.range, walk.batches()))
}

fn table(tally: &Tally, range: Range, batches: u64) -> String {
    // A table has several layouts when its schema has changed.
    let mut tables: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for (table, rows, bytes) in tally.tables.iter().filter(|(_, rows, _)| *rows > 0) {
        let sum = tables.entry(table).or_default();
        *sum = (sum.0 + rows, sum.1 + bytes);
    }
    let (rows, bytes) = tally.total();
    let mut text = format!("range {} – {}: {rows} rows, {bytes} bytes, in {batches} batches\n", range.from, range.to);
    for (table, (rows, bytes)) in tables {
        let _ = writeln!(text, "{rows:>12} rows {bytes:>14} bytes  {table}");
    }
    text + "nothing was sent\n"
}
