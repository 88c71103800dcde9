//! One event, step by step, on one core: decode, enrich, JSON, Arrow append.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use falaj::change::Op;
use falaj::config::Config;
use falaj::enrich::Enricher;
use falaj::enrich::state::{BaseHeader, BaseWriter, ColumnType, LookupTable};
use falaj::event::{Cells, Event, Layout};
use falaj::lsn::{Checkpoint, Lsn, Position, SlotIdentity};
use falaj::pgoutput::{Message, Tuple, parse};
use falaj::schema::{Column, Relation};
use falaj::sink::columns::Rows;

/// Arrow rows are taken as a batch at this number, as the archive does.
const BATCH: usize = 8192;
const CONTENTS: u32 = 2000;

fn steps(c: &mut Criterion) {
    let (mut enricher, layout) = lookup();
    let mut group = c.benchmark_group("event");
    group.throughput(Throughput::Elements(1)).warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(2));
    for (form, bytes) in [("text", insert(&text_cells())), ("binary", insert(&binary_cells()))] {
        group.bench_function(format!("decode {form}"), |b| b.iter(|| tuple(black_box(&bytes)).cells().count()));
        let mut scratch = Vec::new();
        group.bench_function(format!("enrich {form}"), |b| {
            b.iter(|| enriched(&mut enricher, &layout, black_box(&bytes), &mut scratch).len())
        });
        let cells = enriched(&mut enricher, &layout, &bytes, &mut scratch);
        let event = event(&layout, cells);
        let mut out = Vec::new();
        group.bench_function(format!("JSON {form}"), |b| {
            b.iter(|| {
                out.clear();
                black_box(&event).write_json(&mut out).expect("cells of their types");
                out.len()
            })
        });
        let mut rows = Rows::new(&layout);
        group.bench_function(format!("Arrow append {form}"), |b| {
            b.iter(|| {
                rows.push(black_box(&event), event.bytes()).expect("cells of their types");
                if rows.len() == BATCH {
                    black_box(rows.take().expect("columns of one length"));
                }
            })
        });
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);

fn tuple(bytes: &[u8]) -> Tuple<'_> {
    match parse(bytes, false) {
        Ok(Message::Insert { new, .. }) => new,
        other => panic!("an Insert was built, not {other:?}"),
    }
}

fn enriched<'a>(enricher: &'a mut Enricher, layout: &Layout, bytes: &'a [u8], scratch: &'a mut Vec<u8>) -> Cells<'a> {
    let mut cells: Cells<'_> = tuple(bytes).cells().collect();
    enricher.extend(layout, &mut cells, scratch).expect("cells of their types");
    cells
}

fn event<'a>(layout: &'a Arc<Layout>, cells: Cells<'a>) -> Event<'a> {
    let at = Position { commit_lsn: Lsn(0x16_B374_D848), ordinal: 42 };
    Event { at, commit_ts: 1_767_225_600_123_456, xid: Some(7), op: Op::Create, layout, cells, old_key: None }
}

/// A cache of contents, and the layout of the default table's events.
fn lookup() -> (Enricher, Arc<Layout>) {
    let dir = tempfile::tempdir().expect("a directory for the lookup state");
    let config = Config::defaults().expect("the defaults");
    let column = |name: &str, type_oid| ColumnType { name: name.into(), type_oid, type_mod: -1 };
    let columns = vec![column("title", 25), column("content_type", 25), column("length_seconds", 23)];
    let table =
        LookupTable { table: "content".into(), oid: None, key: column("id", 2950), columns, numbers: BTreeMap::new() };
    let identity = SlotIdentity { system_id: "1".into(), timeline: 1, slot: "bench".into() };
    let header = BaseHeader {
        version: 1,
        identity: identity.clone(),
        lsn: Lsn(1),
        origin: Lsn(1),
        adopted: false,
        adopted_snapshot: None,
        changed: None,
        tables: vec![table],
    };
    let mut base = BaseWriter::create(dir.path(), &header).expect("a writable directory");
    for n in 0..CONTENTS {
        let title = format!("الساقية: لماذا نتعلم العربية؟ {n}");
        let row = [Some(title.as_str()), Some("podcast"), Some("5400")];
        base.row(0, &content_id(n), &row).expect("a writable directory");
    }
    base.finish().expect("a writable directory");
    let enricher = Enricher::load(dir.path(), Checkpoint::whole(Lsn(2)), &identity, &config.tables).expect("the state");
    let layout =
        enricher.layout(0, relation(), vec![0], config.table("engagement_events")).expect("the table's columns");
    (enricher, Arc::new(layout))
}

fn content_id(n: u32) -> String {
    format!("0a5b1f6e-51d0-4c39-9d1f-0f6a{n:08x}")
}

/// Names and type oids of the columns of `engagement_events`.
const COLUMNS: [(&str, u32); 8] = [
    ("id", 20),
    ("content_id", 2950),
    ("user_id", 2950),
    ("event_type", 25),
    ("event_ts", 1184),
    ("duration_ms", 23),
    ("device", 25),
    ("raw_payload", 3802),
];

fn relation() -> Relation {
    let column =
        |(name, type_oid): (&str, u32)| Column { name: name.into(), type_oid, type_mod: -1, identity: name == "id" };
    Relation {
        oid: 1,
        namespace: "public".into(),
        name: "engagement_events".into(),
        replica_identity: b'd',
        columns: COLUMNS.map(column).into(),
    }
}

const PAYLOAD: &str = r#"{"seq": 1234567, "app": {"version": "5.23", "volume": 0.5}, "geo": {"city": "الرياض"}}"#;
const USER: &str = "7d3f0f6e-9a41-4f0c-8f57-2a1b3c4d5e6f";

type WireCell = (u8, Vec<u8>);

fn text_cells() -> Vec<WireCell> {
    let texts = [
        "1234567",
        &content_id(1234),
        USER,
        "play",
        "2026-01-01 00:20:34.567891+00",
        "345678",
        "web\u{2011}safari",
        PAYLOAD,
    ];
    texts.iter().map(|text| (b't', text.as_bytes().to_vec())).collect()
}

fn binary_cells() -> Vec<WireCell> {
    let uuid = |text: &str| text.parse::<uuid::Uuid>().expect("a UUID").as_bytes().to_vec();
    let cells = [
        1_234_567_i64.to_be_bytes().to_vec(),
        uuid(&content_id(1234)),
        uuid(USER),
        b"play".to_vec(),
        820_542_034_567_891_i64.to_be_bytes().to_vec(),
        345_678_i32.to_be_bytes().to_vec(),
        "web\u{2011}safari".into(),
        [b"\x01", PAYLOAD.as_bytes()].concat(),
    ];
    cells.into_iter().map(|bytes| (b'b', bytes)).collect()
}

/// An Insert message of relation 1.
fn insert(cells: &[WireCell]) -> Vec<u8> {
    let mut out = b"I\0\0\0\x01N".to_vec();
    out.extend((cells.len() as u16).to_be_bytes());
    for (kind, bytes) in cells {
        out.push(*kind);
        out.extend((bytes.len() as u32).to_be_bytes());
        out.extend(bytes);
    }
    out
}
