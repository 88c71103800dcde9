//! One lookup table in memory, and what a change of it means.

use std::collections::BTreeMap;

use hashbrown::HashSet;

use super::row::{Coming, Row};
use super::state::{ColumnType, LookupChange, LookupTable};
use crate::change::RowChange;
use crate::error::{Error, Result};
use crate::pgoutput::{Cell, Tuple};
use crate::schema::{Relation, Type};
use crate::value;

/// The rows of a lookup table, found by their key's text.
pub(super) struct Cache {
    pub(super) table: LookupTable,
    pub(super) rows: HashSet<Row>,
    /// Whether the rows that the stream brings now count; see [`super::Enricher::relation`].
    pub(super) follows: bool,
}

impl Cache {
    /// One empty cache for each table of a state.
    pub(super) fn all(tables: &[LookupTable]) -> Vec<Self> {
        tables.iter().map(|table| Self { table: table.clone(), rows: HashSet::new(), follows: true }).collect()
    }

    pub(super) fn apply(&mut self, change: LookupChange) {
        match change {
            LookupChange::Put((key, values)) => {
                self.put(&key, values.iter().map(Option::as_deref));
            }
            LookupChange::Delete(key) => drop(self.rows.take(key.as_bytes())),
            LookupChange::Truncate(_) => self.rows.clear(),
            LookupChange::Relation(table) => self.table = table,
        }
    }

    /// Has the row of a key fetched from memory, for whoever will look for it soon.
    pub(super) fn fetch_ahead(&self, key: &str) {
        let _ = self.rows.get(&Coming(key.as_bytes()));
    }

    /// Whether a change leaves everything as it is.
    pub(super) fn has(&self, change: &LookupChange) -> bool {
        let LookupChange::Put((key, values)) = change else { return false };
        let cached = self.rows.get(key.as_bytes()).map(Row::texts);
        cached.is_some_and(|texts| texts.is_ok_and(|t| t.iter().copied().eq(values.iter().map(Option::as_deref))))
    }

    pub(super) fn put<'a>(&mut self, key: &'a str, values: impl ExactSizeIterator<Item = Option<&'a str>> + Clone) {
        self.rows.replace(Row::new(key, values));
    }

    /// The table under another schema; `None` when nothing has changed. `numbers` are those of its columns now, as far as known.
    ///
    /// # Errors
    /// [`Error::Refused`] when the key or a joined column is gone, when the name is another table's or column's now, and when the
    /// cached texts are not those of the new types: Postgres rewrites the rows, and the stream does not show that.
    pub(super) fn under(&self, relation: &Relation, numbers: &BTreeMap<String, i16>) -> Result<Option<LookupTable>> {
        if let Some(oid) = self.table.oid
            && oid != relation.oid
        {
            let found = format!(
                "is another table now (oid {}, it was {oid}), whose rows may be older than its name",
                relation.oid
            );
            return Err(self.refused(&found));
        }
        let find = |wanted: &ColumnType| {
            let column = relation.columns.iter().find(|c| c.name == wanted.name);
            let column = column.ok_or_else(|| self.refused(&format!("has no column \"{}\" any more", wanted.name)))?;
            if let (Some(was), Some(is)) = (self.table.numbers.get(&wanted.name), numbers.get(&wanted.name))
                && was != is
                && fits(relation, numbers)
            {
                let name = &wanted.name;
                return Err(self.refused(&format!("has another column as \"{name}\" now (attnum {is}, it was {was})")));
            }
            let is = ColumnType { name: column.name.clone(), type_oid: column.type_oid, type_mod: column.type_mod };
            if is != *wanted && !keeps_text(wanted, &is) {
                let (name, was, is) = (&is.name, wanted.ty(), is.ty());
                return Err(
                    self.refused(&format!("has \"{name}\" as {is:?} now, it was {was:?}: its rows were rewritten"))
                );
            }
            Ok(is)
        };
        if relation.columns.iter().any(|c| c.name == self.table.key.name && !c.identity) {
            return Err(Error::refused(
                "lookup_identity",
                format!(
                    "the replica identity of lookup table {} does not hold its key \"{}\"",
                    self.table.table, self.table.key.name
                ),
                "a replica identity with the primary key, so that updates and deletes can be followed",
                format!("ALTER TABLE {} REPLICA IDENTITY DEFAULT;, then falaj init --adopt-slot", self.table.table),
            ));
        }
        let fresh = LookupTable {
            table: self.table.table.clone(),
            oid: Some(relation.oid),
            key: find(&self.table.key)?,
            columns: self.table.columns.iter().map(find).collect::<Result<_>>()?,
            numbers: match self.table.numbers.is_empty() && fits(relation, numbers) {
                // A state of before there were numbers.
                true => numbers.clone(),
                false => self.table.numbers.clone(),
            },
        };
        Ok((fresh != self.table).then_some(fresh))
    }

    /// Whether a schema from before the rows were read is of the same columns.
    pub(super) fn fits(&self, relation: &Relation) -> bool {
        self.table.numbers.is_empty() || fits(relation, &self.table.numbers)
    }

    /// The table has another name now.
    pub(super) fn renamed(&self, relation: &Relation) -> Error {
        self.refused(&format!("is called {} now", relation.table()))
    }

    fn refused(&self, found: &str) -> Error {
        Error::refused(
            "lookup_columns",
            format!("lookup table {} {found}", self.table.table),
            "the key and the joined columns as the lookup state has them",
            "mend [table.lookup] where a name has changed, then falaj init --adopt-slot: it reads the lookup rows of now (older \
             events are then enriched with these), and falaj produce goes on from there",
        )
    }

    /// What a change of a row does here, in order.
    ///
    /// # Errors
    /// [`Error::Fatal`] for a value that is not of its type, and for a row without a key.
    pub(super) fn fold(&self, relation: &Relation, row: RowChange<'_>) -> Result<Vec<LookupChange>> {
        Ok(match row {
            RowChange::Insert(new) => {
                vec![LookupChange::Put((self.key(relation, new)?, self.values(relation, new, None)?))]
            }
            RowChange::Update(old, new) => {
                let old_key = old.map(|o| self.key(relation, o.tuple())).transpose()?;
                // A TOASTed key that did not change stands in the old row alone.
                let new_key = match (self.key(relation, new), &old_key) {
                    (Err(_), Some(old)) if self.is_key_unchanged(relation, new) => old.clone(),
                    (key, _) => key?,
                };
                let old_key = old_key.unwrap_or_else(|| new_key.clone());
                // A base that was adopted may know the row by its new key alone.
                let known = [&old_key, &new_key].into_iter().find(|key| self.rows.contains(key.as_bytes()));
                let values = self.values(relation, new, known.map(String::as_str))?;
                let moved = (old_key != new_key).then_some(LookupChange::Delete(old_key));
                moved.into_iter().chain([LookupChange::Put((new_key, values))]).collect()
            }
            RowChange::Delete(old) => vec![LookupChange::Delete(self.key(relation, old.tuple())?)],
            RowChange::Truncate => vec![LookupChange::Truncate(true)],
        })
    }

    fn key(&self, relation: &Relation, tuple: Tuple<'_>) -> Result<String> {
        let name = &self.table.key.name;
        text_of(relation, name, tuple)?.flatten().ok_or_else(|| {
            Error::fatal(
                format_args!("lookup table {}", relation.table()),
                format_args!("a row without its key \"{name}\""),
            )
        })
    }

    fn is_key_unchanged(&self, relation: &Relation, new: Tuple<'_>) -> bool {
        matches!(text_of(relation, &self.table.key.name, new), Ok(None))
    }

    /// The joined columns of a new row. An unchanged TOAST value is not in the WAL: the cached row has it.
    fn values(&self, relation: &Relation, new: Tuple<'_>, old_key: Option<&str>) -> Result<Vec<Option<String>>> {
        let cached = old_key.and_then(|key| self.rows.get(key.as_bytes())).map(Row::texts).transpose();
        let cached = cached.map_err(|e| Error::fatal(format_args!("lookup table {}", relation.table()), e))?;
        let column = |(i, wanted): (usize, &ColumnType)| match text_of(relation, &wanted.name, new)? {
            Some(value) => Ok(value),
            None => Ok(cached.as_ref().and_then(|texts| texts[i]).map(str::to_owned)),
        };
        self.table.columns.iter().enumerate().map(column).collect()
    }
}

/// Whether these are the numbers of a schema's columns: the same names in the same order. They are of one moment, and a schema of the
/// stream may be of long before. Where the publication leaves columns out, none is.
fn fits(relation: &Relation, numbers: &BTreeMap<String, i16>) -> bool {
    let mut named: Vec<_> = numbers.iter().map(|(name, number)| (number, name)).collect();
    named.sort_unstable();
    named.into_iter().map(|(_, name)| name).eq(relation.columns.iter().map(|c| &c.name))
}

/// Whether each value of a column has the same text after a change of its type, as far as Postgres's own casts go.
fn keeps_text(was: &ColumnType, is: &ColumnType) -> bool {
    use Type::{Int2, Int4, Int8, Json, Jsonb, Numeric, Text, Uuid};
    const TEXT: u32 = 25;
    const VARCHAR: u32 = 1043;
    let string = |column: &ColumnType| [TEXT, VARCHAR].contains(&column.type_oid);
    let unlimited =
        |column: &ColumnType| column.type_oid == TEXT || (column.type_oid == VARCHAR && column.type_mod < 0);
    let integer = |ty| matches!(ty, Int2 | Int4 | Int8);
    match (was.ty(), is.ty()) {
        (Numeric(old), Numeric(Some((_, scale)))) => old.is_some_and(|(_, s)| s == scale),
        (old, Numeric(None)) => integer(old) || matches!(old, Numeric(_)),
        (old, Numeric(Some((_, scale)))) => integer(old) && scale == 0,
        (old, Text) if unlimited(is) => integer(old) || string(was) || matches!(old, Numeric(_) | Uuid | Json | Jsonb),
        (Text, Text) => string(was) && string(is) && !unlimited(was) && was.type_mod <= is.type_mod,
        (old, new) => integer(old) && integer(new),
    }
}

/// Text of a column of a tuple; outer `None` for an unchanged TOAST value.
fn text_of(relation: &Relation, name: &str, tuple: Tuple<'_>) -> Result<Option<Option<String>>> {
    let failed = |why: &dyn std::fmt::Display| Error::fatal(format_args!("lookup table {}", relation.table()), why);
    let at = relation.index_of(name).ok_or_else(|| failed(&format_args!("no column \"{name}\"")))?;
    let cell = tuple.cells().nth(at).ok_or_else(|| failed(&format_args!("a row of {} columns", tuple.len)))?;
    if cell == Cell::Unchanged {
        return Ok(None);
    }
    let mut scratch = Vec::new();
    let text = value::text(relation.columns[at].ty(), cell, &mut scratch).map_err(|e| failed(&e))?;
    Ok(Some(text.map(str::to_owned)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_type_keeps_the_texts_or_not() {
        let column = |(type_oid, type_mod)| ColumnType { name: "c".into(), type_oid, type_mod };
        let keeps = |was, is| keeps_text(&column(was), &column(is));
        let numeric = |p: i32, s: i32| (1700, ((p << 16) | s) + 4);
        let [bool, int2, int4, int8, text, uuid, timestamp, timestamptz, interval] =
            [16, 21, 23, 20, 25, 2950, 1114, 1184, 1186].map(|oid| (oid, -1));
        let (char, varchar) = (|n: i32| (1042, n + 4), |n: i32| (1043, n + 4));
        for (was, is) in [
            (int4, int8),
            (int8, int2),
            (int4, (1700, -1)),
            (int4, numeric(10, 0)),
            (numeric(6, 2), numeric(10, 2)),
            (numeric(6, 2), (1700, -1)),
            (int4, text),
            (uuid, text),
            (varchar(5), varchar(9)),
            (varchar(5), text),
            (text, (1043, -1)),
        ] {
            assert!(keeps(was, is), "{was:?} {is:?}");
        }
        for (was, is) in [
            (int4, numeric(10, 2)),
            (numeric(6, 2), numeric(6, 3)),
            (numeric(6, 2), int4),
            ((1700, -1), numeric(6, 2)),
            (text, int4),
            (bool, text),
            (char(5), text),
            (text, char(5)),
            (varchar(5), varchar(3)),
            (timestamp, timestamptz),
            (timestamp, (1114, 0)),
            (interval, (1186, 0)),
        ] {
            assert!(!keeps(was, is), "{was:?} {is:?}");
        }
    }
}
