//! An event: a change with its lookup and derived columns, and its bytes as JSON.
//!
//! The body holds nothing of the clock or the process, so the same change gives the same bytes whenever it is sent.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::value::RawValue;
use smallvec::SmallVec;

use crate::change::Op;
use crate::enrich::Plan;
use crate::lsn::{Lsn, Position};
use crate::message;
use crate::pgoutput::Cell;
use crate::schema::{Relation, Type};
use crate::value::{self, Converted, write_json, write_json_string};

/// Cells of one event; up to 32 columns without an allocation.
pub type Cells<'a> = SmallVec<[Cell<'a>; 32]>;

/// How the events of one relation, under one schema, look.
#[derive(Debug)]
pub struct Layout {
    /// Grows with every new layout of this process; tells schemas of one table apart.
    pub generation: u32,
    /// The relation as the stream described it.
    pub relation: Relation,
    /// Its name outside.
    pub table: String,
    /// Indexes of the primary key's columns.
    pub primary_key: Vec<usize>,
    /// Column whose text is the record key, where configured.
    pub key: Option<usize>,
    /// Source, lookup and derived columns, in this order.
    pub columns: Vec<OutColumn>,
    /// What the enricher adds.
    pub plan: Plan,
    /// What every event's JSON says of its table: `","_table":"name","_lsn":"`.
    pub identity: Vec<u8>,
}

impl Layout {
    /// Whether a record key belongs to one row alone: it is the primary key.
    pub fn is_keyed_by_row(&self) -> bool {
        match (self.key, &self.primary_key[..]) {
            (_, []) => false,
            (None, _) => true,
            (Some(key), columns) => columns == [key],
        }
    }
}

/// [`Layout::identity`] of a table's name.
pub fn identity(table: &str) -> Vec<u8> {
    let mut json = b"\",\"_table\":".to_vec();
    write_json_string(table, &mut json);
    json.extend_from_slice(b",\"_lsn\":\"");
    json
}

/// A column of the event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutColumn {
    /// Its name.
    pub name: String,
    /// Its type.
    pub ty: Type,
    /// `,"name":` as JSON, then zeros up to the length of a short label at least.
    label: Vec<u8>,
    /// Bytes of the label alone.
    label_len: usize,
}

/// To copy so many bytes, a number that the compiler knows, and forget the last of them is faster than to copy the fewer that
/// most labels have.
const SHORT_LABEL: usize = 32;

impl OutColumn {
    /// A column with its JSON label.
    pub fn new(name: &str, ty: Type) -> Self {
        let mut label = vec![b','];
        write_json_string(name, &mut label);
        label.push(b':');
        let label_len = label.len();
        label.resize(label_len.max(SHORT_LABEL), 0);
        Self { name: name.to_owned(), ty, label, label_len }
    }

    /// `,"name":` as JSON.
    pub fn label(&self) -> &[u8] {
        &self.label[..self.label_len]
    }

    fn write_label(&self, out: &mut Vec<u8>) {
        match self.label.first_chunk::<SHORT_LABEL>().filter(|_| self.label_len <= SHORT_LABEL) {
            Some(short) => {
                let end = out.len() + self.label_len;
                out.extend_from_slice(short);
                out.truncate(end);
            }
            None => out.extend_from_slice(&self.label),
        }
    }
}

/// One event, borrowed from the chunk it came in.
#[derive(Debug)]
pub struct Event<'a> {
    /// Its identity.
    pub at: Position,
    /// Commit time, µs since the Unix epoch; see [`Event::commit_time`].
    pub commit_ts: i64,
    /// Its transaction, where it is known: the archive does not keep it.
    pub xid: Option<u32>,
    /// What happened.
    pub op: Op,
    /// How it looks.
    pub layout: &'a Arc<Layout>,
    /// Source, lookup and derived columns; empty for a truncate.
    pub cells: Cells<'a>,
    /// The old row or key, where an update changed the primary key, or the sinks want it anyway: see [`Event::is_key_changed`].
    pub old_key: Option<OldKey<'a>>,
}

/// The primary key before an update changed it.
#[derive(Debug)]
pub enum OldKey<'a> {
    /// The old row, or as much of it as the replica identity holds.
    Row(Vec<Cell<'a>>),
    /// The JSON object that was written of it the first time.
    Json(&'a str),
}

impl Event<'_> {
    /// Bytes of the cells as they were sent.
    pub fn bytes(&self) -> usize {
        self.cells.iter().map(Cell::bytes).sum()
    }

    /// Appends the JSON body.
    ///
    /// # Errors
    /// [`value::BadValue`] when a cell is not of its column's type.
    pub fn write_json(&self, out: &mut Vec<u8>) -> Converted<()> {
        let start = out.len();
        for (column, cell) in self.layout.columns.iter().zip(&self.cells) {
            if *cell != Cell::Unchanged {
                column.write_label(out);
                write_json(column.ty, *cell, out)?;
            }
        }
        self.write_identity(out);
        // Every label begins with a comma; the first of them is where the object begins.
        out[start] = b'{';
        if self.is_key_changed() {
            out.extend_from_slice(b",\"_old_key\":");
            self.write_old_key(out)?;
        }
        if self.has_unchanged() {
            out.extend_from_slice(b",\"_unchanged\":");
            self.write_unchanged(out);
        }
        out.push(b'}');
        Ok(())
    }

    /// Appends the `_id`.
    pub fn write_id(&self, out: &mut Vec<u8>) {
        match self.op {
            Op::Message { lsn, .. } => message::write_id(self.at, lsn, out),
            _ => self.at.write_id(out),
        }
    }

    /// The `_id` as text.
    pub fn id(&self) -> String {
        let mut id = Vec::new();
        self.write_id(&mut id);
        id.into_iter().map(char::from).collect()
    }

    /// `_lsn`: the commit LSN, or that of a message without a transaction.
    pub fn lsn(&self) -> Lsn {
        match self.op {
            Op::Message { lsn, transactional: false } => lsn,
            _ => self.at.commit_lsn,
        }
    }

    /// When its transaction committed, µs since the Unix epoch; `None` for a message without one.
    pub fn commit_time(&self) -> Option<i64> {
        match self.op {
            Op::Message { transactional: false, .. } => None,
            _ => Some(self.commit_ts),
        }
    }

    fn write_identity(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b",\"_id\":\"");
        self.write_id(out);
        out.extend_from_slice(b"\",\"_op\":\"");
        out.extend_from_slice(self.op.letter().as_bytes());
        out.extend_from_slice(&self.layout.identity);
        self.lsn().write(out);
        out.extend_from_slice(b"\",\"_commit_ts\":");
        match self.commit_time() {
            Some(at) => {
                out.push(b'"');
                value::write_rfc3339(at, "Z", out);
                out.push(b'"');
            }
            None => out.extend_from_slice(b"null"),
        }
    }

    /// Whether an update has changed the primary key. A NULL in the old one is unknown: no key has one.
    pub fn is_key_changed(&self) -> bool {
        match &self.old_key {
            None => false,
            Some(OldKey::Json(_)) => true,
            Some(OldKey::Row(old)) => {
                self.layout.primary_key.iter().any(|i| old[*i] != Cell::Null && old[*i] != self.cells[*i])
            }
        }
    }

    /// Whether a column is an unchanged TOAST value. An update into what a row filter lets pass is an insert with such ones.
    pub fn has_unchanged(&self) -> bool {
        self.cells.contains(&Cell::Unchanged)
    }

    /// Appends the names of the unchanged columns as a JSON array.
    pub fn write_unchanged(&self, out: &mut Vec<u8>) {
        out.push(b'[');
        let unchanged = self.layout.columns.iter().zip(&self.cells).filter(|(_, cell)| **cell == Cell::Unchanged);
        for (i, (column, _)) in unchanged.enumerate() {
            if i > 0 {
                out.push(b',');
            }
            write_json_string(&column.name, out);
        }
        out.push(b']');
    }

    /// Appends the record key: the configured column's text, else the primary key's (a JSON array of texts when
    /// composite), else the event id: never something random. A truncate has none.
    ///
    /// # Errors
    /// [`value::BadValue`] when a cell is not of its column's type.
    pub fn write_key(&self, out: &mut Vec<u8>) -> Converted<bool> {
        if self.op == Op::Truncate {
            return Ok(false);
        }
        if let Some(column) = self.layout.key
            && value::write_text(self.layout.columns[column].ty, self.cells[column], out)?
        {
            return Ok(true);
        }
        // A delete that brings no key at all (a partition with another replica identity than its root) still has its id.
        if !self.write_row_key(&self.cells, out)? {
            self.write_id(out);
        }
        Ok(true)
    }

    /// Appends the key that the row had before, where an update changed it and the record key is the row's own.
    ///
    /// # Errors
    /// [`value::BadValue`] when a cell is not of its column's type, or the archive's JSON of it does not tell its text.
    pub fn write_previous_key(&self, out: &mut Vec<u8>) -> Converted<bool> {
        if !self.layout.is_keyed_by_row() || !self.is_key_changed() {
            return Ok(false);
        }
        match &self.old_key {
            None => Ok(false),
            Some(OldKey::Row(old)) => self.write_row_key(old, out),
            Some(OldKey::Json(json)) => self.write_archived_key(json, out),
        }
    }

    /// The same from the object that [`Event::write_old_key`] has written.
    fn write_archived_key(&self, json: &str, out: &mut Vec<u8>) -> Converted<bool> {
        let bad = |e: serde_json::Error| value::BadValue { ty: Type::Json, found: format!("_old_key {json}: {e}") };
        let values: BTreeMap<String, &RawValue> = serde_json::from_str(json).map_err(bad)?;
        let mut texts = Vec::new();
        for at in &self.layout.primary_key {
            let OutColumn { name, ty, .. } = &self.layout.columns[*at];
            let value = values.get(name).map(|raw| value::text_of_json(*ty, raw.get())).transpose()?;
            texts.push((*at, value.flatten()));
        }
        let mut cells = vec![Cell::Null; self.layout.columns.len()];
        for (at, text) in &texts {
            cells[*at] = text.as_ref().map_or(Cell::Null, |text| Cell::Text(text.as_bytes()));
        }
        self.write_row_key(&cells, out)
    }

    /// Appends the primary key of these cells as text, an array of texts when composite; nothing when a part of it is absent.
    fn write_row_key(&self, cells: &[Cell<'_>], out: &mut Vec<u8>) -> Converted<bool> {
        match self.layout.primary_key[..] {
            [] => Ok(false),
            [one] => value::write_text(self.layout.columns[one].ty, cells[one], out),
            ref several if several.iter().any(|c| matches!(cells[*c], Cell::Null | Cell::Unchanged)) => Ok(false),
            ref several => self.write_composite(several, cells, out).map(|()| true),
        }
    }

    fn write_composite(&self, columns: &[usize], cells: &[Cell<'_>], out: &mut Vec<u8>) -> Converted<()> {
        out.push(b'[');
        for (i, column) in columns.iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            let (ty, mut scratch) = (self.layout.columns[*column].ty, Vec::new());
            let text = value::text(ty, cells[*column], &mut scratch)?;
            write_json_string(text.unwrap_or_default(), out);
        }
        out.push(b']');
        Ok(())
    }

    /// Appends the old primary key as a JSON object, where an update changed it.
    ///
    /// # Errors
    /// [`value::BadValue`] when a cell is not of its column's type.
    pub fn write_old_key(&self, out: &mut Vec<u8>) -> Converted<bool> {
        let old = match &self.old_key {
            None => return Ok(false),
            Some(OldKey::Json(json)) => {
                out.extend_from_slice(json.as_bytes());
                return Ok(true);
            }
            Some(OldKey::Row(row)) => row,
        };
        if !self.is_key_changed() {
            return Ok(false);
        }
        for (i, at) in self.layout.primary_key.iter().enumerate() {
            let column = &self.layout.columns[*at];
            out.extend_from_slice(if i == 0 { b"{" } else { b"," });
            out.extend_from_slice(&column.label()[1..]);
            write_json(column.ty, old[*at], out)?;
        }
        out.push(b'}');
        Ok(true)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::schema::Column;

    fn layout() -> Arc<Layout> {
        Arc::new(bare())
    }

    /// Table t (id int8 key, content_id uuid, note text).
    pub(crate) fn bare() -> Layout {
        let column = |name: &str, type_oid, identity| Column { name: name.into(), type_oid, type_mod: -1, identity };
        let columns = vec![column("id", 20, true), column("content_id", 2950, false), column("note", 25, false)];
        Layout {
            generation: 0,
            columns: columns.iter().map(|c| OutColumn::new(&c.name, c.ty())).collect(),
            relation: Relation {
                oid: 1,
                namespace: "public".into(),
                name: "t".into(),
                replica_identity: b'd',
                columns,
            },
            table: "t".into(),
            identity: identity("t"),
            primary_key: vec![0],
            key: Some(1),
            plan: Plan::default(),
        }
    }

    pub(crate) fn event<'a>(layout: &'a Arc<Layout>, op: Op, cells: &[Cell<'a>]) -> Event<'a> {
        let at = Position { commit_lsn: Lsn(0x16_B374_D848), ordinal: 3 };
        Event { at, commit_ts: 946_684_800_000_000, xid: None, op, layout, cells: cells.into(), old_key: None }
    }

    fn json(event: &Event<'_>) -> String {
        let mut out = Vec::new();
        event.write_json(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn key(event: &Event<'_>) -> Option<String> {
        let mut out = Vec::new();
        event.write_key(&mut out).unwrap().then(|| String::from_utf8(out).unwrap())
    }

    #[test]
    fn body_and_key_of_each_kind() {
        let l = layout();
        let e = event(&l, Op::Create, &[Cell::Text(b"7"), Cell::Null, Cell::Text("é\"".as_bytes())]);
        let identity = r#""_id":"00000016B374D848:0000000003","_op":"c","_table":"t","_lsn":"16/B374D848","_commit_ts":"2000-01-01T00:00:00.000000Z""#;
        assert_eq!(json(&e), format!(r#"{{"id":7,"content_id":null,"note":"é\"",{identity}}}"#));
        assert_eq!(key(&e).as_deref(), Some("7"));

        let mut e = event(
            &l,
            Op::Update,
            &[Cell::Text(b"8"), Cell::Text(b"11111111-1111-1111-1111-111111111111"), Cell::Unchanged],
        );
        e.old_key = Some(OldKey::Row(vec![Cell::Text(b"7"), Cell::Null, Cell::Null]));
        assert!(json(&e).ends_with(r#","_old_key":{"id":7},"_unchanged":["note"]}"#), "{}", json(&e));
        assert!(!json(&e).contains("\"note\":"));
        assert_eq!(key(&e).as_deref(), Some("11111111-1111-1111-1111-111111111111"));

        let e = event(&l, Op::Truncate, &[]);
        assert!(json(&e).starts_with("{\"_id\":"));
        assert_eq!(key(&e), None);
    }

    #[test]
    fn the_key_before_an_update_is_the_same_from_the_archive() {
        let l = Arc::new(Layout { primary_key: vec![0, 2], key: None, ..bare() });
        fn update<'a>(l: &'a Arc<Layout>, old_key: OldKey<'a>) -> Event<'a> {
            let e = event(l, Op::Update, &[Cell::Text(b"8"), Cell::Null, Cell::Text(b"x")]);
            Event { old_key: Some(old_key), ..e }
        }
        let e = update(&l, OldKey::Row(vec![Cell::Text(b"7"), Cell::Null, Cell::Text(b"a\"\n")]));
        let (mut live, mut json, mut archived) = (Vec::new(), Vec::new(), Vec::new());
        assert!(e.write_previous_key(&mut live).unwrap() && e.write_old_key(&mut json).unwrap());
        let json = String::from_utf8(json).unwrap();
        assert!(update(&l, OldKey::Json(&json)).write_previous_key(&mut archived).unwrap());
        assert_eq!(archived, live);
        assert_eq!(live, br#"["7","a\"\n"]"#);
    }

    #[test]
    fn without_any_key_the_event_id_is_the_record_key() {
        let l = Arc::new(Layout { primary_key: vec![], key: None, ..bare() });
        let e = event(&l, Op::Create, &[Cell::Text(b"7"), Cell::Null, Cell::Null]);
        assert_eq!(key(&e).as_deref(), Some("00000016B374D848:0000000003"));
        let l = Arc::new(Layout { primary_key: vec![0, 2], key: None, ..bare() });
        assert!(l.is_keyed_by_row() && !layout().is_keyed_by_row());
        let e = event(&l, Op::Create, &[Cell::Text(b"7"), Cell::Null, Cell::Text(b"a\"b")]);
        assert_eq!(key(&e).as_deref(), Some(r#"["7","a\"b"]"#));
        // A part that is absent is not the empty text: that may be another row's key.
        for absent in [Cell::Null, Cell::Unchanged] {
            let e = event(&l, Op::Delete, &[Cell::Text(b"7"), Cell::Null, absent]);
            assert_eq!(key(&e).as_deref(), Some("00000016B374D848:0000000003"));
        }
    }
}
