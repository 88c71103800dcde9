//! One lookup table in memory, and what a change of it means.

use std::collections::HashMap;

use super::state::{BaseHeader, ColumnType, LookupChange, LookupTable};
use crate::change::RowChange;
use crate::error::{Error, Result};
use crate::pgoutput::{Cell, Tuple};
use crate::schema::Relation;
use crate::value;

/// Texts of the joined columns.
pub(super) type Row = Box<[Option<Box<str>>]>;

/// The rows of a lookup table by their key's text.
pub(super) struct Cache {
    pub(super) table: LookupTable,
    pub(super) rows: HashMap<Box<str>, Row>,
}

impl Cache {
    /// One empty cache for each table of a state.
    pub(super) fn all(header: &BaseHeader) -> Vec<Self> {
        header.tables.iter().map(|table| Self { table: table.clone(), rows: HashMap::new() }).collect()
    }

    pub(super) fn apply(&mut self, change: LookupChange) {
        match change {
            LookupChange::Put((key, values)) => {
                let values = values.into_iter().map(|v| v.map(String::into_boxed_str)).collect();
                self.rows.insert(key.into(), values);
            }
            LookupChange::Delete(key) => drop(self.rows.remove(key.as_str())),
            LookupChange::Truncate(_) => self.rows.clear(),
            LookupChange::Relation(table) => self.table = table,
        }
    }

    /// The table under another schema; `None` when nothing has changed.
    ///
    /// # Errors
    /// [`Error::Refused`] when the key or a joined column is gone.
    pub(super) fn under(&self, relation: &Relation) -> Result<Option<LookupTable>> {
        let find = |wanted: &ColumnType| {
            let column = relation.columns.iter().find(|c| c.name == wanted.name).ok_or_else(|| {
                Error::refused(
                    "lookup_columns",
                    format!("lookup table {} has no column \"{}\" any more", self.table.table, wanted.name),
                    "the key and the joined columns, published",
                    "add the column again, or change [table.lookup] and run falaj init --adopt-slot",
                )
            })?;
            Ok(ColumnType { name: column.name.clone(), type_oid: column.type_oid, type_mod: column.type_mod })
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
            key: find(&self.table.key)?,
            columns: self.table.columns.iter().map(find).collect::<Result<_>>()?,
        };
        Ok((fresh != self.table).then_some(fresh))
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
                let values = self.values(relation, new, Some(&old_key))?;
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
        let cached = old_key.and_then(|key| self.rows.get(key));
        let column = |(i, wanted): (usize, &ColumnType)| match text_of(relation, &wanted.name, new)? {
            Some(value) => Ok(value),
            None => Ok(cached.and_then(|row| row[i].as_deref()).map(str::to_owned)),
        };
        self.table.columns.iter().enumerate().map(column).collect()
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
