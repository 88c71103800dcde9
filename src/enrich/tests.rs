//! Lookup rows as of a position, over restarts, copies and adoptions.

use std::collections::BTreeMap;

use super::state::{ColumnType, LookupTable};
use super::*;
use crate::change::RowChange;
use crate::pgoutput::{Message, Tuple, parse};
use crate::schema::Column;

fn row(cells: &[Option<&str>]) -> Vec<u8> {
    let mut out = b"I\0\0\0\x01N".to_vec();
    out.extend((cells.len() as u16).to_be_bytes());
    for cell in cells {
        match cell {
            None => out.push(b'n'),
            Some("<unchanged>") => out.push(b'u'),
            Some(text) => {
                out.push(b't');
                out.extend((text.len() as u32).to_be_bytes());
                out.extend(text.as_bytes());
            }
        }
    }
    out
}

fn tuple(bytes: &[u8]) -> Tuple<'_> {
    let Message::Insert { new, .. } = parse(bytes, false).unwrap() else { panic!() };
    new
}

fn relation(name: &str, columns: &[(&str, u32)]) -> Relation {
    let columns =
        columns.iter().map(|(n, t)| Column { name: (*n).into(), type_oid: *t, type_mod: -1, identity: *n == "id" });
    Relation {
        oid: 1,
        namespace: "public".into(),
        name: name.into(),
        replica_identity: b'd',
        columns: columns.collect(),
    }
}

fn content() -> Relation {
    relation("content", &[("id", 25), ("slug", 25), ("title", 25), ("content_type", 25), ("length_seconds", 23)])
}

fn enricher(dir: &Path, upto: u64) -> Result<Enricher> {
    let identity = SlotIdentity { system_id: "7".into(), timeline: 1, slot: "falaj".into() };
    if state::header(dir)?.is_none() {
        let column = |name: &str, type_oid| ColumnType { name: name.into(), type_oid, type_mod: -1 };
        let columns = vec![column("title", 25), column("content_type", 25), column("length_seconds", 23)];
        let tables = vec![LookupTable {
            table: "content".into(),
            oid: None,
            key: column("id", 25),
            columns,
            numbers: BTreeMap::new(),
        }];
        let header = BaseHeader {
            version: 1,
            identity: identity.clone(),
            lsn: Lsn(100),
            origin: Lsn(100),
            adopted: false,
            adopted_snapshot: None,
            changed: None,
            tables,
        };
        let mut base = BaseWriter::create(dir, &header)?;
        base.row(0, "a", &[Some("Alif"), Some("podcast"), Some("60")])?;
        base.finish()?;
    }
    let tables = config::Config::defaults()?.tables;
    Enricher::load(dir, Checkpoint::whole(Lsn(upto)), &identity, &tables)
}

fn change(at: u64, row: RowChange<'_>) -> Change<'_> {
    Change { at: Position { commit_lsn: Lsn(at), ordinal: 0 }, commit_ts: 0, xid: 7, relation: 1, row }
}

fn joined(e: &mut Enricher, key: Option<&str>) -> Vec<Option<String>> {
    let events = relation("engagement_events", &[("id", 20), ("content_id", 25), ("duration_ms", 23)]);
    let tables = config::Config::defaults().unwrap().tables;
    let layout = e.layout(0, events, vec![0], Some(&tables[0])).unwrap();
    let bytes = row(&[Some("1"), key, Some("900")]);
    let mut scratch = Vec::new();
    let mut cells: Cells<'_> = tuple(&bytes).cells().collect();
    e.extend(&layout, &mut cells, &mut scratch).unwrap();
    let text = |c: &Cell<'_>| match c {
        Cell::Text(t) => Some(String::from_utf8(t.to_vec()).unwrap()),
        _ => None,
    };
    cells[3..].iter().map(text).collect()
}

fn texts(values: [Option<&str>; 5]) -> Vec<Option<String>> {
    values.map(|v| v.map(str::to_owned)).to_vec()
}

#[test]
fn events_see_lookup_rows_as_of_their_own_position() {
    let dir = tempfile::tempdir().unwrap();
    let mut e = enricher(dir.path(), 100).unwrap();
    assert_eq!(
        joined(&mut e, Some("a")),
        texts([Some("Alif"), Some("podcast"), Some("60"), Some("0.900"), Some("0.02")])
    );
    assert_eq!(joined(&mut e, None), texts([None, None, None, Some("0.900"), None]));
    assert_eq!((e.hits, e.misses), (1, 1));

    let bytes = row(&[Some("a"), Some("s"), Some("<unchanged>"), None, Some("30")]);
    e.fold(0, &content(), &change(200, RowChange::Update(None, tuple(&bytes)))).unwrap();
    assert_eq!(joined(&mut e, Some("a"))[..3], texts([Some("Alif"), None, Some("30"), None, None])[..3]);

    let (old, new) = (row(&[Some("a"), None, None, None, None]), row(&[Some("b"), Some("s"), Some("Ba"), None, None]));
    let moved = RowChange::Update(Some(crate::pgoutput::Old::Key(tuple(&old))), tuple(&new));
    e.fold(0, &content(), &change(300, moved)).unwrap();
    assert_eq!(joined(&mut e, Some("a"))[0], None);
    assert_eq!(joined(&mut e, Some("b"))[0].as_deref(), Some("Ba"));

    // A TOASTed key that did not change stands in the old row alone.
    let (old, new) =
        (row(&[Some("b"), None, None, None, None]), row(&[Some("<unchanged>"), None, Some("Ta"), None, None]));
    let kept = RowChange::Update(Some(crate::pgoutput::Old::Key(tuple(&old))), tuple(&new));
    e.fold(0, &content(), &change(350, kept)).unwrap();
    assert_eq!(joined(&mut e, Some("b"))[0].as_deref(), Some("Ta"));

    e.fold(0, &content(), &change(400, RowChange::Truncate)).unwrap();
    assert_eq!(joined(&mut e, Some("b"))[0], None);
    e.sync().unwrap();

    // A restart at any kept position sees what that position saw; later changes come again from the stream.
    assert_eq!(joined(&mut enricher(dir.path(), 400).unwrap(), Some("b"))[0].as_deref(), Some("Ta"));
    assert_eq!(
        joined(&mut enricher(dir.path(), 300).unwrap(), Some("a"))[..1],
        texts([Some("Alif"), None, None, None, None])[..1]
    );
}

#[test]
fn an_older_copy_is_refused_wherever_its_log_ends() {
    let dir = tempfile::tempdir().unwrap();
    let last = |at: u64, ordinal| Some(Position { commit_lsn: Lsn(at), ordinal });
    let loaded = |resume: u64, lookups| {
        let identity = SlotIdentity { system_id: "7".into(), timeline: 1, slot: "falaj".into() };
        let upto = Checkpoint { lookups, ..Checkpoint::whole(Lsn(resume)) };
        Enricher::load(dir.path(), upto, &identity, &config::Config::defaults().unwrap().tables)
    };
    let mut e = enricher(dir.path(), 100).unwrap();
    assert_eq!(Some(e.changed), last(99, 0));
    for (at, ordinal) in [(200, 0), (300, 0), (300, 1)] {
        let length = (at + ordinal).to_string();
        let bytes = row(&[Some("b"), Some("s"), Some("Ba"), None, Some(&length)]);
        let at = Position { commit_lsn: Lsn(at), ordinal };
        e.fold(0, &content(), &Change { at, ..change(0, RowChange::Insert(tuple(&bytes))) }).unwrap();
    }
    e.sync().unwrap();
    for named in [None, last(99, 0), last(200, 0), last(300, 0), last(300, 1)] {
        assert_eq!(Some(loaded(1000, named).unwrap().changed), last(300, 1));
    }
    // As far as the sinks have got: half a transaction is none.
    assert_eq!(Some(loaded(300, last(200, 0)).unwrap().changed), last(200, 0));
    for (resume, named) in [(300, last(300, 0)), (1000, last(300, 2)), (1000, last(400, 0))] {
        let Err(Error::Refused(refusal)) = loaded(resume, named) else { panic!() };
        assert!(refusal.check == "lookup_state" && refusal.found.contains("an older copy"), "{refusal:?}");
    }
    // Rows that were read again later than their place in the stream have every change until then, and what the sinks
    // name is named on.
    let header = state::header(dir.path()).unwrap().unwrap();
    let snapshot = Some(state::Snapshot { xids: "7:7:".into(), lsn: Lsn(500) });
    BaseWriter::create(dir.path(), &BaseHeader { adopted_snapshot: snapshot, ..header }).unwrap().finish().unwrap();
    assert_eq!(Some(loaded(450, last(400, 0)).unwrap().changed), last(400, 0));
    assert!(loaded(1000, last(500, 0)).is_err());
}

#[test]
fn rows_under_a_schema_that_an_adoption_has_left_behind_are_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    drop(enricher(dir.path(), 100).unwrap());
    let header = state::header(dir.path()).unwrap().unwrap();
    let snapshot = Some(state::Snapshot { xids: "50:50:".into(), lsn: Lsn(1000) });
    BaseWriter::create(dir.path(), &BaseHeader { adopted_snapshot: snapshot, ..header }).unwrap().finish().unwrap();
    let old = relation("content", &[("id", 25), ("slug", 25)]);
    let at = |lsn| Position { commit_lsn: Lsn(lsn), ordinal: 0 };
    for described in [200, 300] {
        let mut e = enricher(dir.path(), 300).unwrap();
        assert!(!e.relation(0, &old, &BTreeMap::new(), at(described), Some(7)).unwrap());
        let bytes = row(&[Some("b"), Some("s")]);
        e.fold(0, &old, &change(350, RowChange::Insert(tuple(&bytes)))).unwrap();
        assert_eq!(e.rows(), 0);
        // From its own moment on the rows that it read are followed.
        e.relation(0, &content(), &BTreeMap::new(), at(1100), Some(60)).unwrap();
        let bytes = row(&[Some("b"), Some("s"), Some("Ba"), None, Some("30")]);
        e.fold(0, &content(), &change(1100, RowChange::Insert(tuple(&bytes)))).unwrap();
        assert_eq!(e.rows(), 1);
    }
}

#[test]
fn a_lookup_table_whose_changes_do_not_bring_its_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut e = enricher(dir.path(), 100).unwrap();
    let mut by_slug = content();
    by_slug.columns.iter_mut().for_each(|column| column.identity = column.name == "slug");
    let next = Position { commit_lsn: Lsn(200), ordinal: 0 };
    let Err(Error::Refused(refusal)) = e.relation(0, &by_slug, &BTreeMap::new(), next, None) else { panic!() };
    assert_eq!(refusal.check, "lookup_identity");
}

/// A counter beside the joined columns moves with every view. Where an earlier falaj has logged that, it stays.
#[test]
fn an_update_of_other_columns_alone_is_not_logged() {
    let dir = tempfile::tempdir().unwrap();
    let size = || std::fs::metadata(dir.path().join("changes.jsonl")).unwrap().len();
    let insert = |e: &mut Enricher, at: u64, title: &str, slug: &str| {
        let bytes = row(&[Some("b"), Some(slug), Some(title), None, Some("30")]);
        e.fold(0, &content(), &change(at, RowChange::Insert(tuple(&bytes)))).unwrap();
        e.sync().unwrap();
    };
    let mut e = enricher(dir.path(), 100).unwrap();
    insert(&mut e, 200, "Ba", "s");
    let (logged, changed) = (size(), e.changed);
    for at in 201..300 {
        insert(&mut e, at, "Ba", &at.to_string());
    }
    assert_eq!((size(), e.changed), (logged, changed));
    // As an earlier falaj did.
    let idle = Entry {
        at: Position { commit_lsn: Lsn(300), ordinal: 0 },
        table: 0,
        change: LookupChange::Put(("b".into(), vec![Some("Ba".into()), None, Some("30".into())])),
    };
    e.log.append(&idle).unwrap();
    insert(&mut e, 400, "Ta", "s");
    let whole = std::fs::read(dir.path().join("changes.jsonl")).unwrap();
    let mut e = enricher(dir.path(), 150).unwrap();
    insert(&mut e, 200, "Ba", "s");
    insert(&mut e, 250, "Ba", "250");
    insert(&mut e, 300, "Ba", "300");
    assert_eq!(e.changed, idle.at);
    insert(&mut e, 400, "Ta", "s");
    assert!(!e.log.has_tail().unwrap());
    assert_eq!(std::fs::read(dir.path().join("changes.jsonl")).unwrap(), whole);
}

#[test]
fn another_column_under_a_joined_name_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut e = enricher(dir.path(), 100).unwrap();
    let numbers = |title: i16| {
        let all = [("id", 1), ("slug", 2), ("title", title), ("content_type", 9), ("length_seconds", 10)];
        all.map(|(name, number)| (name.to_owned(), number)).into()
    };
    let at = |lsn| Position { commit_lsn: Lsn(lsn), ordinal: 0 };
    // A state of before there were numbers learns them, for good; what is not known says nothing.
    assert!(!e.relation(0, &content(), &numbers(3), at(200), None).unwrap());
    e.sync().unwrap();
    let mut e = enricher(dir.path(), 300).unwrap();
    e.relation(0, &content(), &BTreeMap::new(), at(300), None).unwrap();
    // A catalogue that is ahead of the stream says nothing either.
    e.relation(0, &content(), &numbers(11), at(350), None).unwrap();
    let Err(Error::Refused(refusal)) = e.relation(0, &content(), &numbers(7), at(400), None) else { panic!() };
    assert_eq!(refusal.check, "lookup_columns");
    assert!(refusal.found.contains("another column as \"title\""), "{refusal:?}");
    // Of the past only the same columns are followed.
    let of = |names: &[&str]| relation("content", &names.iter().map(|name| (*name, 25)).collect::<Vec<_>>());
    let fits = |names: &[&str]| e.caches[0].fits(&of(names));
    assert!(fits(&["id", "slug", "title", "content_type", "length_seconds"]));
    assert!(!fits(&["id", "slug", "content_type", "length_seconds", "title"]) && !fits(&["id", "slug", "title"]));
}

#[test]
fn a_long_log_becomes_a_new_base_without_a_row_changed() {
    let dir = tempfile::tempdir().unwrap();
    let mut e = enricher(dir.path(), 100).unwrap();
    let long = "x".repeat(1 << 20);
    for (at, key) in [(200, "b"), (300, "c"), (400, "d"), (500, "e"), (600, "f")] {
        let bytes = row(&[Some(key), Some("s"), Some(&long), None, Some("30")]);
        e.fold(0, &content(), &change(at, RowChange::Insert(tuple(&bytes)))).unwrap();
    }
    e.sync().unwrap();
    let size = |file: &str| std::fs::metadata(dir.path().join(file)).unwrap().len();
    assert!(size("changes.jsonl") > COMPACT_AT);
    assert_eq!(enricher(dir.path(), 1000).unwrap().rows(), 6);
    assert_eq!(size("changes.jsonl"), 0);
    let mut again = enricher(dir.path(), 1000).unwrap();
    assert_eq!(again.rows(), 6);
    assert_eq!(joined(&mut again, Some("a"))[0].as_deref(), Some("Alif"));
    let header = state::header(dir.path()).unwrap().unwrap();
    let last = Position { commit_lsn: Lsn(600), ordinal: 0 };
    assert_eq!((header.lsn, header.origin, header.changed), (Lsn(1000), Lsn(100), Some(last)));
    assert_eq!(again.changed, last);
}

#[test]
fn a_column_that_would_stand_twice_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let e = enricher(dir.path(), 100).unwrap();
    let tables = config::Config::defaults().unwrap().tables;
    for (extra, check) in [("title", "column_names"), ("_id", "column_names")] {
        let events = relation("engagement_events", &[("id", 20), ("content_id", 25), ("duration_ms", 23), (extra, 25)]);
        let Err(Error::Refused(r)) = e.layout(0, events, vec![0], Some(&tables[0])) else { panic!() };
        assert_eq!(r.check, check);
    }
    let events = relation("engagement_events", &[("id", 20)]);
    assert_eq!(e.layout(0, events, vec![0], Some(&tables[0])).unwrap_err().exit_code(), 78);
}
