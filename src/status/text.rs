//! The status for people: one line a part.

use std::fmt::Write;

use super::{Loaded, Part, Reader, Sink, SinkAt, Slot, Status, Told};
use crate::consume::board::harmless;

/// Several lines, each ended.
pub(crate) fn text(status: &Status) -> String {
    let mut text = String::new();
    let mut line = |name: &str, what: String| {
        let _ = writeln!(text, "{name:<10} {}", harmless(&what));
    };
    line("pipeline", format!("{}, as of {}", status.pipeline, status.as_of));
    line("slot", part(&status.slot, slot));
    for Sink { name, at } in &status.sinks {
        line(name, part(at, sink));
    }
    line(
        "batches",
        part(&status.archive, |a| match (a.batches, &a.last) {
            (0, _) => format!("none in {}", a.dir),
            (batches, None) => format!("{batches} in {}, all of them history", a.dir),
            (batches, Some(last)) => format!("{batches} in {}, the last {last}", a.dir),
        }),
    );
    match &status.backfill {
        Part::Is(tables) => tables.iter().for_each(|table| line("backfill", copied(table))),
        Part::Unknown { error } => line("backfill", unknown(error)),
    }
    for (name, fed) in [("board", &status.board), ("external", &status.external)] {
        line(name, fed.as_ref().map_or("left out: it has no address, or no Kafka".into(), |fed| part(fed, reader)));
    }
    match &status.upload {
        None => line("bigquery", "no project: nothing is uploaded".into()),
        Some(Part::Is(tables)) if tables.is_empty() => line("bigquery", "nothing is sealed yet".into()),
        Some(Part::Is(tables)) => tables.iter().for_each(|table| line("bigquery", loaded(table))),
        Some(Part::Unknown { error }) => line("bigquery", unknown(error)),
    }
    text
}

fn part<T>(part: &Part<T>, told: impl Fn(&T) -> String) -> String {
    match part {
        Part::Is(value) => told(value),
        Part::Unknown { error } => unknown(error),
    }
}

fn unknown(error: &str) -> String {
    format!("not known: {}", one_line(error))
}

/// A text of several lines, in one.
pub(crate) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn slot(slot: &Slot) -> String {
    let reader = slot.active_pid.map_or("nobody reads it".into(), |pid| format!("read through pid {pid}"));
    let status = slot.wal_status.as_deref().unwrap_or("no WAL reserved");
    let retained = slot.retained_wal_bytes.map_or("no".into(), bytes);
    format!(
        "{} acknowledged to {}, {} behind the server ({}); {retained} of WAL kept, {status}; {reader}",
        slot.name,
        slot.confirmed_flush_lsn,
        bytes(slot.lag_bytes),
        slot.server_lsn
    )
}

fn sink(at: &SinkAt) -> String {
    let Some(position) = at.position else { return "has never stored a position".into() };
    let partial = at.partial.as_ref().map(|p| format!(", within a transaction at {p}")).unwrap_or_default();
    let lag = at.lag_bytes.map(|lag| format!(", {} behind the server", bytes(lag))).unwrap_or_default();
    format!("durable to {position}{partial}{lag}")
}

fn copied(told: &Told) -> String {
    let Told { table, finished, rows, estimated_rows, ranges_done, ranges } = told;
    match finished {
        true => format!("{table} whole: {rows} rows"),
        false => format!("{table} not whole: {rows} of about {estimated_rows} rows, {ranges_done} of {ranges} ranges"),
    }
}

fn reader(reader: &Reader) -> String {
    let at = |p: &super::ReaderAt| {
        format!("{}: {} of {}", p.partition, p.offset.map_or("-".into(), |offset| offset.to_string()), p.end)
    };
    let partitions: Vec<_> = reader.partitions.iter().map(at).collect();
    format!("{} records behind in {} ({})", reader.lag_records, reader.topic, partitions.join(", "))
}

fn loaded(table: &Loaded) -> String {
    let to = table.loaded.as_deref().unwrap_or("nothing");
    format!("{} loaded to {to}, {} files to come", table.table, table.pending_files)
}

/// A size with three digits at most before its unit.
pub(crate) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 999.5 {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lsn::Lsn;

    #[test]
    fn a_part_that_is_not_known_is_one_line_among_the_others() {
        let status = Status {
            as_of: "now".into(),
            pipeline: "p".into(),
            slot: Part::Is(Slot {
                name: "s".into(),
                server_lsn: Lsn(0x3000),
                confirmed_flush_lsn: Lsn(0x2000),
                active_pid: None,
                wal_status: Some("reserved".into()),
                lag_bytes: 4096,
                retained_wal_bytes: Some(16_000_000),
            }),
            sinks: vec![Sink { name: "kafka", at: Part::Unknown { error: "kafka\n  found: none".into() } }],
            archive: Part::Is(super::super::Archive { dir: "archive".into(), batches: 0, last: None }),
            backfill: Part::Is(vec![Told {
                table: "t".into(),
                finished: false,
                rows: 7,
                estimated_rows: 30,
                ranges_done: 0,
                ranges: 3,
            }]),
            board: Some(Part::Unknown { error: "away".into() }),
            external: None,
            upload: None,
        };
        assert_eq!(
            text(&status),
            "pipeline   p, as of now\n\
             slot       s acknowledged to 0/2000, 4.1 kB behind the server (0/3000); 16.0 MB of WAL kept, reserved; nobody reads it\n\
             kafka      not known: kafka found: none\n\
             batches    none in archive\n\
             backfill   t not whole: 7 of about 30 rows, 0 of 3 ranges\n\
             board      not known: away\n\
             external   left out: it has no address, or no Kafka\n\
             bigquery   no project: nothing is uploaded\n"
        );
        assert_eq!(
            serde_json::to_value(&status).unwrap()["sinks"][0],
            serde_json::json!({"name": "kafka", "error": "kafka\n  found: none"})
        );
    }

    #[test]
    fn sizes_have_few_digits() {
        assert_eq!([0, 999, 1000, 999_600, 16_777_216].map(bytes), ["0 B", "999 B", "1.0 kB", "1.0 MB", "16.8 MB"]);
    }
}
