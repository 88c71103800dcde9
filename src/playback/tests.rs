//! Files as the sink writes them, read back and merged.

use std::path::Path;

use parquet::arrow::ArrowWriter;
use parquet::file::metadata::KeyValue;

use super::*;
use crate::archive::file_name;
use crate::change::Op;
use crate::enrich::Plan;
use crate::event::{Event, Layout, OldKey, OutColumn, identity};
use crate::lsn::Position;
use crate::pgoutput::Cell;
use crate::schema::{Relation, Type};
use crate::sink::columns;

const TYPES: [Type; 6] =
    [Type::Int8, Type::Text, Type::Numeric(Some((6, 2))), Type::Timestamptz, Type::Jsonb, Type::Float4];

fn at(commit_lsn: u64, ordinal: u64) -> Position {
    Position { commit_lsn: Lsn(commit_lsn), ordinal }
}

fn layout(table: &str) -> std::sync::Arc<Layout> {
    let names = ["id", "note", "amount", "at", "js", "f"];
    std::sync::Arc::new(Layout {
        generation: 0,
        relation: Relation {
            oid: 1,
            namespace: "public".into(),
            name: table.into(),
            replica_identity: b'd',
            columns: Vec::new(),
        },
        table: table.into(),
        identity: identity(table),
        primary_key: vec![0, 3],
        key: Some(1),
        columns: names.iter().zip(TYPES).map(|(name, ty)| OutColumn::new(name, ty)).collect(),
        plan: Plan::default(),
    })
}

/// A plain row; its cells are told by its position.
fn plain(layout: &std::sync::Arc<Layout>, at: Position) -> Event<'_> {
    let cells = [Cell::Text(b"7"), Cell::Text(b"x"), Cell::Null, Cell::Null, Cell::Null, Cell::Null];
    Event { at, commit_ts: 5, xid: None, op: Op::Create, layout, cells: cells.as_slice().into(), old_key: None }
}

/// A sealed batch with one file, which ends with its last transaction; gives the JSON and the key of each event.
fn seal(dir: &Path, table: &str, previous: Option<Position>, events: &[Event<'_>]) -> Vec<(String, String)> {
    seal_to(true, dir, table, previous, events)
}

/// The same; unless `whole`, rows of the last transaction follow in the next batch.
fn seal_to(
    whole: bool,
    dir: &Path,
    table: &str,
    previous: Option<Position>,
    events: &[Event<'_>],
) -> Vec<(String, String)> {
    let layout = events[0].layout;
    let mut rows = columns::Rows::new(layout);
    events.iter().for_each(|event| rows.push(event, event.bytes()).unwrap());
    let (first, last) = (events[0].at, events[events.len() - 1].at);
    let path = dir.join(Batch::name(first, last));
    std::fs::create_dir_all(&path).unwrap();
    if first.commit_lsn.0 % 8 == 7 {
        std::fs::write(path.join(archive::HISTORY_FILE), "{}").unwrap();
    }
    let file = std::fs::File::create(path.join(file_name(table, 0))).unwrap();
    let batch = rows.take().unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    let mut meta = |key: &str, value: String| writer.append_key_value_metadata(KeyValue::new(key.to_owned(), value));
    meta(archive::META_VERSION, archive::VERSION.into());
    meta(archive::META_PIPELINE, "p".into());
    meta(archive::META_SLOT, r#"{"system_id":"7","timeline":1,"slot":"s"}"#.into());
    meta(archive::META_RESUME, Lsn(last.commit_lsn.0 + 8).to_string());
    if whole {
        meta(archive::META_END_LSN, Lsn(last.commit_lsn.0 + 8).to_string());
    }
    match previous {
        Some(previous) => meta(archive::META_PREVIOUS, archive::bound(previous)),
        None => meta(archive::META_ORIGIN, Lsn(8).to_string()),
    }
    meta(archive::META_TYPES, serde_json::to_string(&TYPES).unwrap());
    meta(archive::META_PRIMARY_KEY, r#"["id","at"]"#.into());
    meta(archive::META_RECORD_KEY, "note".into());
    writer.close().unwrap();
    events.iter().map(texts).collect()
}

fn texts(event: &Event<'_>) -> (String, String) {
    let (mut json, mut key) = (Vec::new(), Vec::new());
    event.write_json(&mut json).unwrap();
    event.write_key(&mut key).unwrap();
    (String::from_utf8(json).unwrap(), String::from_utf8(key).unwrap())
}

fn read(dir: &Path, from: u64, to: u64, table: Option<&str>) -> Result<Vec<(String, String)>> {
    let mut events = Events::open(dir, Range { from: Lsn(from), to: Lsn(to) }, table)?;
    let mut all = Vec::new();
    while let Some(rows) = events.advance()? {
        all.push(texts(&rows.event().unwrap()));
    }
    Ok(all)
}

#[test]
fn every_kind_of_value_and_event_reads_back_with_its_bytes_and_key() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout("a.b");
    let event = |n: u64, op, cells: &[Cell<'static>]| Event {
        at: at(16, n),
        commit_ts: 946_684_800_000_001,
        xid: None,
        op,
        layout: &layout,
        cells: cells.into(),
        old_key: None,
    };
    let text = |t: &'static str| Cell::Text(t.as_bytes());
    let time = Cell::Binary(&[0, 0, 0, 0, 0, 0, 0, 1]);
    let events = [
        event(0, Op::Create, &[text("-9"), text("é\"\n"), text("1.10"), time, text("{\"a\": 1.10}"), text("1.5")]),
        event(1, Op::Create, &[text("1"), Cell::Null, text("NaN"), text("infinity"), text("null"), text("NaN")]),
        event(
            2,
            Op::Read,
            &[text("1"), text(""), text("1.1"), text("0044-03-15 10:00:00+00 BC"), Cell::Null, text("-0")],
        ),
        event(3, Op::Update, &[text("2"), Cell::Unchanged, Cell::Null, time, Cell::Unchanged, Cell::Null]),
        Event {
            old_key: Some(OldKey::Row(vec![text("1"), Cell::Null, Cell::Null, text("2000-01-01 00:00:00+00")])),
            ..event(4, Op::Update, &[text("2"), text("n"), Cell::Null, time, Cell::Null, Cell::Null])
        },
        event(5, Op::Delete, &[text("2"), Cell::Null, Cell::Null, time, Cell::Null, Cell::Null]),
        event(6, Op::Truncate, &[]),
    ];
    let written = seal(dir.path(), "a.b", None, &events);
    assert!(written[4].0.contains(r#""_old_key":{"id":1,"at":"2000-01-01T00:00:00.000000Z"}"#), "{}", written[4].0);
    assert_eq!(written[5].1, r#"["2","2000-01-01 00:00:00.000001+00"]"#);
    assert_eq!(read(dir.path(), 8, 100, None).unwrap(), written);
}

#[test]
fn tables_and_batches_that_overlap_are_merged_by_position() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (layout("a"), layout("b"));
    let of = |layout, places: &[(u64, u64)]| -> Vec<_> { places.iter().map(|p| plain(layout, at(p.0, p.1))).collect() };
    let mut all = seal(dir.path(), "a", None, &of(&a, &[(16, 0), (16, 2), (24, 0), (40, 1)]));
    // The other file of the same batch.
    let other = tempfile::tempdir().unwrap();
    all.extend(seal(other.path(), "b", None, &of(&b, &[(16, 1), (40, 0)])));
    let name = |from, to| Batch::name(at(from, 0), at(to, 1));
    let file = other.path().join(Batch::name(at(16, 1), at(40, 0))).join("b.parquet");
    std::fs::rename(file, dir.path().join(name(16, 40)).join("b.parquet")).unwrap();
    // Rows of a copy, whose LSN lies within the range of the first batch.
    all.extend(seal(dir.path(), "a", None, &of(&a, &[(31, 0), (31, 1)])));
    all.extend(seal(dir.path(), "b", None, &of(&b, &[(31, 2), (31, 9)])));
    all.extend(seal(dir.path(), "a", Some(at(40, 1)), &of(&a, &[(48, 0)])));
    all.sort_by_key(|(json, _)| json[json.find("_id").unwrap()..].to_owned());
    assert_eq!(read(dir.path(), 8, 100, None).unwrap(), all);
    assert_eq!(read(dir.path(), 24, 40, None).unwrap(), all[3..10]);
    let of_b: Vec<_> = all.iter().filter(|(json, _)| json.contains("\"_table\":\"b\"")).cloned().collect();
    assert_eq!(read(dir.path(), 8, 100, Some("b")).unwrap(), of_b);
    let kept = kept(dir.path()).unwrap().unwrap();
    assert_eq!((kept.from, kept.to, kept.slot.slot.as_str()), (Lsn(8), Lsn(56), "s"));
    // The batch that is followed must be there.
    std::fs::rename(dir.path().join(name(16, 40)), dir.path().join("away")).unwrap();
    seal(dir.path(), "a", None, &of(&a, &[(16, 0)]));
    assert_eq!(read(dir.path(), 8, 100, None).unwrap_err().exit_code(), 78);
}

#[test]
fn a_part_of_the_ranges_last_transaction_that_was_taken_away_is_not_passed_over() {
    let a = layout("a");
    // One transaction in three batches, behind one that is whole.
    let sealed = |without: Option<u64>| {
        let dir = tempfile::tempdir().unwrap();
        seal(dir.path(), "a", None, &[plain(&a, at(40, 0))]);
        for part in (0..3).filter(|part| Some(*part) != without) {
            let previous = if part == 0 { at(40, 0) } else { at(48, 2 * part - 1) };
            let rows = [plain(&a, at(48, 2 * part)), plain(&a, at(48, 2 * part + 1))];
            seal_to(part == 2, dir.path(), "a", Some(previous), &rows);
        }
        dir
    };
    let whole = sealed(None);
    assert_eq!(read(whole.path(), 8, 48, None).unwrap().len(), 7);
    for part in [0, 1] {
        let Err(Error::Refused(refusal)) = read(sealed(Some(part)).path(), 8, 48, None) else { panic!("{part}") };
        assert_eq!((refusal.check, refusal.fix.contains("--from")), ("archive_gap", false), "{refusal}");
    }
    // At the archive's end a transaction whose rest has not come looks the same, and is not counted as kept.
    let cut = sealed(Some(2));
    assert_eq!(kept(cut.path()).unwrap().unwrap().to, Lsn(47));
    seal(cut.path(), "a", Some(at(48, 5)), &[plain(&a, at(56, 0))]);
    assert_eq!(read(cut.path(), 8, 48, None).unwrap_err().exit_code(), 78);
    // What lies behind the range is of no concern.
    seal(whole.path(), "a", Some(at(56, 0)), &[plain(&a, at(64, 0))]);
    assert_eq!(read(whole.path(), 8, 48, None).unwrap().len(), 7);
}

#[test]
fn an_archive_of_copies_alone_is_kept_too() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(kept(dir.path()).unwrap(), None);
    let a = layout("a");
    let written = seal(dir.path(), "a", None, &[plain(&a, at(31, 0)), plain(&a, at(31, 5))]);
    let found = kept(dir.path()).unwrap().unwrap();
    assert_eq!((found.from, found.to), (Lsn(31), Lsn(31)));
    assert_eq!(read(dir.path(), 31, 31, None).unwrap(), written);
}
