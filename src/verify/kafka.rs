//! A table's topic → facts. Blocking.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::value::RawValue;

use super::fold::{Fact, Fold};
use super::table::{Form, Table, hash, old_key, trimmed};
use crate::change::Op;
use crate::error::{Error, Result};
use crate::kafka;
use crate::lsn::{Lsn, Position};
use crate::world::World;

/// Folds a table's events. `sees` says whether the snapshot sees a commit.
///
/// # Errors
/// As [`kafka::read_committed`]; [`Error::Fatal`] for a record that is no event.
pub(super) fn fold(world: &World, table: &Table, mut fold: Fold, sees: impl Fn(Lsn) -> bool) -> Result<Fold> {
    let topic = world.config.topic(&table.name);
    let mut values = Vec::new();
    kafka::read_committed(&world.config, &topic, &world.stop, |partition, offset, value| {
        let strange = |why: &dyn std::fmt::Display| {
            Error::fatal(format_args!("reading {topic}, partition {partition}, offset {offset}"), why)
        };
        let fields: HashMap<Cow<'_, str>, &RawValue> = serde_json::from_slice(value).map_err(|e| strange(&e))?;
        let raw = |name: &str| fields.get(name).map(|value| value.get());
        let own = |name: &str| raw(name).and_then(|text| serde_json::from_str::<String>(text).ok());
        // One topic may hold several tables, and messages, which are no rows.
        if own("_table").ok_or_else(|| strange(&"no _table"))? != table.name {
            return Ok(());
        }
        let id = own("_id").ok_or_else(|| strange(&"no _id"))?;
        let at = Position::from_event_id(&id).ok_or_else(|| strange(&format_args!("_id is {id:?}")))?;
        let op = own("_op").and_then(|op| Op::from_letter(&op)).ok_or_else(|| strange(&"no known _op"))?;
        if !sees(at.commit_lsn) {
            return Ok(());
        }
        if op == Op::Truncate {
            fold.push(&Fact { at, op, key: "", old_key: None, values: &[] });
            return Ok(());
        }
        let column = |i: usize| raw(&table.columns[i].0).map(|text| trimmed(text).to_owned());
        let Some(key) = table.key_text(column) else {
            fold.unclear += u64::from(fields.contains_key("_unchanged"));
            return Ok(());
        };
        let old = raw("_old_key").map(|json| old_key(table, Form::Json, json, column)).transpose()?.flatten();
        values.clear();
        values.extend(table.columns.iter().map(|(name, _)| raw(name).map(|text| hash(trimmed(text)))));
        fold.push(&Fact { at, op, key: &key, old_key: old.as_deref(), values: &values });
        Ok(())
    })?;
    Ok(fold)
}
