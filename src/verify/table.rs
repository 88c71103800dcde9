//! A table as it is compared: its columns, what its rows are known by, and the hashes of its values.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};

use serde_json::value::RawValue;

use super::warehouse;
use crate::error::{Error, Result};
use crate::pgoutput::Cell;
use crate::schema::Type;
use crate::source::catalog;
use crate::source::wire::ident;
use crate::value::write_json;

/// In which form values are compared: one that both sides can produce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// The value as it stands in an event's JSON.
    Json,
    /// The value as a BigQuery column holds it.
    Warehouse,
}

/// A published table.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// Its name outside.
    pub(super) name: String,
    /// Published source columns.
    pub(super) columns: Vec<(String, Type)>,
    /// Indexes of the columns that a row is known by: its key, or all of them.
    pub(super) key: Vec<usize>,
    /// Whether there is a key; without one, equal rows are counted.
    pub(super) keyed: bool,
    /// `pg_class.oid`
    pub(super) oid: u32,
    /// Oids of the columns' types, as a Relation message has them.
    pub(super) type_oids: Vec<u32>,
    /// What reads `xmin` and the columns, as the types' output functions write them.
    pub(super) select: String,
}

impl Table {
    pub(super) fn of(table: &catalog::Table) -> Self {
        let relation = &table.relation;
        let columns: Vec<_> = relation.columns.iter().map(|c| (c.name.clone(), c.ty())).collect();
        let key = key(table);
        let names = columns.iter().map(|(name, _)| ident(name));
        let list: Vec<_> = ["xmin".to_owned()].into_iter().chain(names).collect();
        let filter = table.row_filter.as_ref().map(|filter| format!(" WHERE {filter}")).unwrap_or_default();
        let select = format!("SELECT {} FROM {}{filter}", list.join(", "), table.sql_source());
        let keyed = !key.is_empty();
        let key = if keyed { key } else { (0..columns.len()).collect() };
        let type_oids = table.type_oids.clone();
        Self { name: relation.table(), columns, key, keyed, oid: relation.oid, type_oids, select }
    }

    /// The key's text of values in canonical form: one of them as it is, several as a JSON array. `None` when one is absent.
    pub(super) fn key_text(&self, mut value: impl FnMut(usize) -> Option<String>) -> Option<String> {
        let parts = self.key.iter().map(|column| value(*column)).collect::<Option<Vec<_>>>()?;
        match &parts[..] {
            [one] if self.keyed => Some(one.clone()),
            several => Some(format!("[{}]", several.join(","))),
        }
    }
}

/// The key that every change of a row brings: the primary key, else the columns of the identity index.
fn key(table: &catalog::Table) -> Vec<usize> {
    let columns = &table.relation.columns;
    let at = |name: &String| columns.iter().position(|c| c.name == *name);
    let primary: Option<Vec<_>> = table.primary_key.iter().map(at).collect();
    let brought =
        |key: &Vec<usize>| table.relation.replica_identity != b'i' || key.iter().all(|i| columns[*i].identity);
    match primary.filter(|key| !key.is_empty() && brought(key)) {
        Some(key) => key,
        None if table.relation.replica_identity == b'i' => {
            (0..columns.len()).filter(|i| columns[*i].identity).collect()
        }
        None => Vec::new(),
    }
}

/// What a value looks like where it is compared.
///
/// # Errors
/// [`Error::Fatal`] when the bytes are not of this type.
pub(super) fn canonical(form: Form, ty: Type, cell: Cell<'_>) -> Result<String> {
    let mut out = Vec::new();
    let written = match (form, cell) {
        (_, Cell::Null | Cell::Unchanged) => Ok(out.extend_from_slice(b"null")),
        (Form::Json, _) => write_json(ty, cell, &mut out),
        (Form::Warehouse, _) => warehouse::write(ty, cell, &mut out),
    };
    let text = written.map_err(|e| e.to_string()).and_then(|()| String::from_utf8(out).map_err(|e| e.to_string()));
    text.map(|text| trimmed(&text).to_owned()).map_err(|e| Error::fatal("comparing a value", e))
}

/// A `json` value may have blanks around it, which are not of an event's value.
pub(super) fn trimmed(text: &str) -> &str {
    text.trim_matches([' ', '\t', '\n', '\r'])
}

/// The key before, of an `_old_key`; a column that it does not have is that of the row now, as `now` gives it.
///
/// # Errors
/// [`Error::Fatal`] for text that is no such object.
pub(super) fn old_key(
    table: &Table,
    form: Form,
    json: &str,
    now: impl Fn(usize) -> Option<String>,
) -> Result<Option<String>> {
    let failed = |e: serde_json::Error| Error::fatal(format_args!("reading _old_key {json}"), e);
    let old: HashMap<String, &RawValue> = serde_json::from_str(json).map_err(failed)?;
    let mut parts = Vec::with_capacity(table.key.len());
    for column in &table.key {
        let (name, ty) = &table.columns[*column];
        parts.push(old.get(name).map(|raw| of_json(form, *ty, raw.get())).transpose()?.or_else(|| now(*column)));
    }
    let mut parts = parts.into_iter();
    Ok(table.key_text(|_| parts.next().flatten()))
}

/// The canonical form of a value that stands in JSON.
fn of_json(form: Form, ty: Type, raw: &str) -> Result<String> {
    let raw = trimmed(raw);
    let is_embedded = matches!(ty, Type::Json | Type::Jsonb | Type::Array(_)) || raw == "null";
    if form == Form::Json || is_embedded {
        return Ok(raw.to_owned());
    }
    let text = serde_json::from_str::<String>(raw).unwrap_or_else(|_| raw.to_owned());
    let text = match ty {
        Type::Bool => raw.chars().take(1).collect(),
        Type::Timestamp => text.replacen('T', " ", 1),
        Type::Timestamptz => text.replacen('T', " ", 1).replace('Z', "+00"),
        _ => text,
    };
    canonical(form, ty, Cell::Text(text.as_bytes()))
}

/// Of a value, or of a key.
pub(super) fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(text.as_bytes());
    hasher.finish()
}

/// Of a row: its key, and the columns that are compared. Sums of these do not depend on the order of rows.
pub(super) fn row_hash(key: &str, values: &[Option<u64>]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(key.as_bytes());
    for value in values {
        hasher.write_u64(value.unwrap_or_default());
    }
    hasher.finish()
}

#[cfg(test)]
pub(super) fn for_test(columns: &[(&str, Type)], key: &[usize]) -> Table {
    let columns: Vec<_> = columns.iter().map(|(name, ty)| ((*name).to_owned(), *ty)).collect();
    let keyed = !key.is_empty();
    let key = if keyed { key.to_vec() } else { (0..columns.len()).collect() };
    Table { name: "t".into(), columns, key, keyed, oid: 1, type_oids: Vec::new(), select: String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_key_has_the_form_of_the_keys_that_it_is_compared_with() {
        let table = for_test(&[("a", Type::Int4), ("at", Type::Timestamptz), ("c", Type::Text)], &[0, 1]);
        let json = r#"{"a":1,"at":"1970-01-01T00:00:01.500000Z"}"#;
        let key = |form, json| old_key(&table, form, json, |_| Some("now".into())).unwrap();
        assert_eq!(key(Form::Json, json).unwrap(), r#"[1,"1970-01-01T00:00:01.500000Z"]"#);
        assert_eq!(key(Form::Warehouse, json).unwrap(), "[1,1500000]");
        assert_eq!(key(Form::Warehouse, r#"{"a":1,"at":"infinity"}"#).unwrap(), "[1,raw infinity]");
        assert_eq!(key(Form::Json, r#"{"a":1}"#).unwrap(), "[1,now]");
        assert!(old_key(&table, Form::Json, "1", |_| None).is_err());
    }
}
