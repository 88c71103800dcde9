//! How the events of one relation look: source columns, then joined and derived ones.

use super::cache::Cache;
use super::derive::{self, Derivation};
use super::state::LookupTable;
use crate::config;
use crate::error::{Error, Result};
use crate::event::{self, Cells, Layout, OutColumn};
use crate::pgoutput::{Cell, Tuple};
use crate::schema::{Relation, Type};
use crate::value::{self, Converted};

/// What the enricher adds to the events of one layout.
#[derive(Debug, Default)]
pub struct Plan {
    join: Option<Join>,
    derive: Vec<Derivation>,
}

#[derive(Debug)]
struct Join {
    /// Source column with the lookup key.
    on: usize,
    /// Index of the lookup table.
    table: usize,
    /// Joined columns, as indexes into the cached rows.
    columns: Vec<usize>,
}

/// Plans the layout of a relation's events over these lookup tables, without their rows.
///
/// # Errors
/// [`Error::Refused`] for a configured column that the relation or its lookup has not, or a name that would stand twice.
pub fn layout<'a>(
    lookups: impl IntoIterator<Item = &'a LookupTable>,
    generation: u32,
    relation: Relation,
    primary_key: Vec<usize>,
    config: Option<&config::Table>,
) -> Result<Layout> {
    let (table, lookups) = (relation.table(), lookups.into_iter().collect::<Vec<_>>());
    let mut columns: Vec<_> = relation.columns.iter().map(|c| OutColumn::new(&c.name, c.ty())).collect();
    let column = |name: &String, role: &str| {
        relation.index_of(name).ok_or_else(|| {
            Error::refused(
                "table_columns",
                format!("table {table} has no column \"{name}\", the configured {role}"),
                "a published column of that name",
                "add the column (or publish it), or change [[table]] in the configuration",
            )
        })
    };
    let key = config.and_then(|c| c.key.as_ref()).map(|k| column(k, "record key")).transpose()?;
    let join = match config.and_then(|c| c.lookup.as_ref()) {
        Some(lookup) => Some(join(&lookups, lookup, column(&lookup.on, "lookup key")?, &mut columns)?),
        None => None,
    };
    let derive = derive::plan(&table, config.map_or(&[], |c| &c.derive), &mut columns)?;
    refuse_double_names(&table, &columns)?;
    let (plan, identity) = (Plan { join, derive }, event::identity(&table));
    Ok(Layout { generation, table, primary_key, key, columns, plan, identity, relation })
}

fn join(lookups: &[&LookupTable], lookup: &config::Lookup, on: usize, columns: &mut Vec<OutColumn>) -> Result<Join> {
    let missing = |what: &str| {
        Error::refused(
            "lookup_state",
            format!("the lookup state has no {what}"),
            "the lookup tables and columns of [table.lookup]",
            "falaj init --adopt-slot (older events are then enriched with the lookup rows of now)",
        )
    };
    let table = lookups.iter().position(|t| t.table == lookup.table);
    let table = table.ok_or_else(|| missing(&format!("table \"{}\"", lookup.table)))?;
    let known = &lookups[table].columns;
    let mut indexes = Vec::new();
    for name in &lookup.columns {
        let at = known.iter().position(|c| c.name == *name).ok_or_else(|| missing(&format!("column \"{name}\"")))?;
        indexes.push(at);
        columns.push(OutColumn::new(name, Type::from_oid(known[at].type_oid, known[at].type_mod)));
    }
    Ok(Join { on, table, columns: indexes })
}

fn refuse_double_names(table: &str, columns: &[OutColumn]) -> Result<()> {
    const OURS: [&str; 10] =
        ["_id", "_op", "_table", "_lsn", "_commit_ts", "_old_key", "_unchanged", "_raw", "_commit_lsn", "_ordinal"];
    let mut seen: std::collections::HashSet<&str> = OURS.into();
    match columns.iter().find(|c| !seen.insert(&c.name)) {
        None => Ok(()),
        Some(double) => Err(Error::refused(
            "column_names",
            format!("table {table}: the name \"{}\" would stand twice in an event", double.name),
            "source, lookup and derived columns with names of their own, none of falaj's own names (_id, _op, …)",
            "rename the derived column, leave the lookup column out, or rename the source column",
        )),
    }
}

/// Has the lookup row of a row fetched from memory. A key that is no value of its type is told by [`extend`].
pub(super) fn fetch_ahead(caches: &[Cache], layout: &Layout, row: Tuple<'_>, scratch: &mut Vec<u8>) {
    let Some(join) = &layout.plan.join else { return };
    let cell = row.cells().nth(join.on).unwrap_or(Cell::Null);
    if let Ok(Some(key)) = value::text(layout.columns[join.on].ty, cell, scratch) {
        caches[join.table].fetch_ahead(key);
    }
}

/// Appends lookup and derived columns to the source columns of a row. Says whether a lookup row was found, where one is
/// looked for: that whose key has the same text, since what a type calls equal beyond that is known to Postgres alone.
pub(super) fn extend<'a>(
    caches: &'a [Cache],
    layout: &Layout,
    cells: &mut Cells<'a>,
    scratch: &'a mut Vec<u8>,
) -> Converted<Option<bool>> {
    let mut hit = None;
    if let Some(join) = &layout.plan.join {
        let key = value::text(layout.columns[join.on].ty, cells[join.on], scratch)?;
        let found = key.and_then(|key| caches[join.table].rows.get(key.as_bytes()));
        hit = Some(found.is_some());
        let text = |at: &usize| found.and_then(|row| row.get(*at));
        cells.extend(join.columns.iter().map(|at| text(at).map_or(Cell::Null, Cell::Text)));
    }
    if !layout.plan.derive.is_empty() {
        let quotients = derive::quotients(&layout.plan.derive, &layout.columns, cells)?;
        scratch.clear();
        let ends: smallvec::SmallVec<[Option<usize>; 4]> =
            quotients.into_iter().map(|q| q.map(|q| q.write(scratch)).map(|()| scratch.len())).collect();
        let mut start = 0;
        for end in ends {
            cells.push(end.map_or(Cell::Null, |end| Cell::Text(&scratch[start..end])));
            start = end.unwrap_or(start);
        }
    }
    Ok(hit)
}
