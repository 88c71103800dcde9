//! What a backfill has to copy, and what of it each sink has.
//!
//! A table is cut into ranges of its primary key (without one: of its blocks), which lanes copy side by side. The cut stands
//! in `state.dir/backfill/`. What is done does not: each sink keeps a [`Mark`] atomically with the rows, so a crash leaves
//! nothing between the two.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::lsn::{Lsn, SlotIdentity};
use crate::upload::record::short_name;

/// Values of the columns that a table is cut by, as Postgres's text.
pub(super) type Key = Vec<String>;

/// How one table is copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plan {
    /// Layout version: 1.
    pub version: u32,
    /// The stream beside which the rows are copied.
    pub identity: SlotIdentity,
    /// Name outside.
    pub table: String,
    /// `--where`
    pub filter: Option<String>,
    /// The LSN of the first snapshot: which backfill of this table a [`Mark`] belongs to.
    pub backfill: Lsn,
    /// What the table is cut and ordered by.
    pub order: Vec<Part>,
    /// The files that the blocks are in, where it is cut by blocks: a rewritten table has others.
    pub storage: Option<String>,
    /// Rows, as the planner estimates them.
    pub rows: u64,
    /// The most lanes that have worked on it.
    pub lanes: usize,
    /// The ranges.
    pub ranges: Vec<Range>,
    /// Every sink has every range.
    pub finished: bool,
}

/// A column that a table is cut by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Part {
    /// Its name; `ctid` for blocks.
    pub column: String,
    /// Its type, as SQL writes it.
    pub ty: String,
    /// The operators `<`, `<=`, `=`, `>=`, `>` of the key's order, as SQL writes them, where it is that of an extension: a bare
    /// one would be searched in `pg_catalog` alone, and may be found there for another type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operators: Option<[String; 5]>,
}

/// The rows of `source` with `after` < key ≤ `upto`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Range {
    /// What is read, as SQL writes it.
    pub source: String,
    /// Exclusive; absent: from the first row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Key>,
    /// Inclusive; absent: to the last row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upto: Option<Key>,
}

/// How much of a range a sink has: every row up to `after`, and with `done` all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    /// Name outside.
    pub table: String,
    /// [`Plan::backfill`]
    pub backfill: Lsn,
    /// Index of the range.
    pub range: usize,
    /// LSN of the snapshot that the newest rows are from.
    pub snapshot: Lsn,
    /// Key of the last row.
    pub after: Option<Key>,
    /// The range is whole.
    pub done: bool,
    /// Rows of the range so far.
    pub rows: u64,
}

/// What is to be copied in one go: a range, or the rest of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    /// Index of the table.
    pub table: usize,
    /// Index of the range.
    pub range: usize,
    /// Where the rows begin, exclusive.
    pub after: Option<Key>,
    /// Indexes of the sinks that lack them, each with the rows of the range that it has.
    pub sinks: Vec<(usize, u64)>,
}

impl Mark {
    /// Key of its record in the checkpoint topic.
    pub fn key(&self, slot: &str) -> String {
        format!("{}{}/{}", Self::prefix(slot), self.table, self.range)
    }

    /// How these keys begin; a slot's own record has its bare name.
    pub fn prefix(slot: &str) -> String {
        format!("backfill/{slot}/")
    }
}

impl Plan {
    /// What is left to do, when the sinks have `marks`: one list a sink.
    ///
    /// Sinks that have got equally far are fed together. After a crash they may not have: then each gets the rest of the
    /// range by itself, from where it stands.
    pub fn left(&self, table: usize, marks: &[Vec<Mark>]) -> Vec<Item> {
        let reached: Vec<BTreeMap<usize, &Mark>> = marks.iter().map(|marks| self.furthest(marks)).collect();
        let mut items: Vec<Item> = Vec::new();
        for (range, start) in self.ranges.iter().enumerate() {
            let first = items.len();
            for (sink, reached) in reached.iter().enumerate() {
                let mark = reached.get(&range);
                if mark.is_some_and(|m| m.done) {
                    continue;
                }
                let after = mark.and_then(|m| m.after.clone()).or_else(|| start.after.clone());
                let rows = mark.map_or(0, |m| m.rows);
                match items[first..].iter_mut().find(|item| item.after == after) {
                    Some(item) => item.sinks.push((sink, rows)),
                    None => items.push(Item { table, range, after, sinks: vec![(sink, rows)] }),
                }
            }
        }
        items
    }

    /// Rows that a sink has; of the one that has the most.
    pub fn stored(&self, marks: &[Vec<Mark>]) -> u64 {
        self.rows_of(marks).max().unwrap_or(0)
    }

    /// Rows that every sink has, and ranges that every sink has whole.
    pub fn stored_in_all(&self, marks: &[Vec<Mark>]) -> (u64, usize) {
        let left: BTreeSet<usize> = self.left(0, marks).iter().map(|item| item.range).collect();
        (self.rows_of(marks).min().unwrap_or(0), self.ranges.len() - left.len())
    }

    /// Rows of each sink.
    fn rows_of(&self, marks: &[Vec<Mark>]) -> impl Iterator<Item = u64> {
        marks.iter().map(|marks| self.furthest(marks).values().map(|m| m.rows).sum())
    }

    /// The furthest of a sink's marks, by range.
    fn furthest<'a>(&self, marks: &'a [Mark]) -> BTreeMap<usize, &'a Mark> {
        let mut furthest: BTreeMap<usize, &Mark> = BTreeMap::new();
        for mark in marks.iter().filter(|m| m.table == self.table && m.backfill == self.backfill) {
            let at = furthest.entry(mark.range).or_insert(mark);
            if (mark.rows, mark.done) > (at.rows, at.done) {
                *at = mark;
            }
        }
        furthest
    }

    /// Where the plans are.
    pub fn dir(state: &Path) -> PathBuf {
        state.join("backfill")
    }

    /// Where the plan of a table is.
    pub fn path(state: &Path, table: &str) -> PathBuf {
        Self::dir(state).join(format!("{}.json", short_name(table)))
    }

    /// The plan of a table; `None` when there has been none. Blocking.
    ///
    /// # Errors
    /// [`Error::Refused`] for a file that is no plan.
    pub fn read(state: &Path, table: &str) -> Result<Option<Self>> {
        let path = Self::path(state, table);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|e| refused(&path, e.to_string())),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::fatal(format_args!("reading {}", path.display()), e)),
        }
    }

    /// The plans of all tables, by name. Blocking.
    ///
    /// # Errors
    /// [`Error::Refused`] for a file that is no plan; [`Error::Fatal`] when the directory cannot be read.
    pub fn all(state: &Path) -> Result<Vec<Self>> {
        let dir = Self::dir(state);
        let failed = |e| Error::fatal(format_args!("reading {}", dir.display()), e);
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed(e)),
        };
        let mut plans = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            // What is not finished being written has another ending.
            if path.extension().is_some_and(|ending| ending == "json") {
                let text = fs::read(&path).map_err(failed)?;
                plans.push(serde_json::from_slice::<Self>(&text).map_err(|e| refused(&path, e.to_string()))?);
            }
        }
        plans.sort_by(|a, b| a.table.cmp(&b.table));
        Ok(plans)
    }

    /// The most lanes that any backfill has had: each may have left an open transaction behind. Blocking.
    ///
    /// # Errors
    /// As [`Plan::all`].
    pub fn lanes(state: &Path) -> Result<usize> {
        Ok(Self::all(state)?.iter().map(|plan| plan.lanes).max().unwrap_or(0))
    }

    /// Stores the plan: whole, and on the disk when this returns. Blocking.
    ///
    /// # Errors
    /// [`Error::Fatal`] when it cannot be written.
    pub fn write(&self, state: &Path) -> Result<()> {
        let path = Self::path(state, &self.table);
        let dir = path.parent().unwrap_or(state);
        let temporary = path.with_extension("tmp");
        let write = || {
            fs::create_dir_all(dir)?;
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(dir)?.sync_all()
        };
        write().map_err(|e: std::io::Error| Error::fatal(format_args!("writing {}", path.display()), e))
    }

    /// Refuses to go on with a plan that does not fit what is asked for, or what is there.
    ///
    /// # Errors
    /// [`Error::Refused`] with the way out.
    pub fn require(&self, state: &Path, identity: &SlotIdentity, filter: Option<&str>) -> Result<()> {
        let path = Self::path(state, &self.table);
        if self.identity != *identity {
            return Err(refused(&path, format!("an unfinished backfill beside {}", self.identity)));
        }
        if self.filter.as_deref() != filter {
            let with = self.filter.as_ref().map_or("without --where".into(), |f| format!("with --where {f:?}"));
            return Err(refused(&path, format!("an unfinished backfill {with}")));
        }
        Ok(())
    }
}

pub(super) fn refused(path: &Path, found: String) -> Error {
    Error::refused(
        "backfill_plan",
        format!("{}: {found}", path.display()),
        "the plan of this backfill, or none",
        format!(
            "go on with the same table and --where as before; or begin anew, which copies again what is there already: rm {}",
            path.display()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let range = |after: Option<&str>, upto: Option<&str>| Range {
            source: "t".into(),
            after: after.map(|k| vec![k.into()]),
            upto: upto.map(|k| vec![k.into()]),
        };
        Plan {
            version: 1,
            identity: SlotIdentity { system_id: "7".into(), timeline: 1, slot: "falaj".into() },
            table: "t".into(),
            filter: None,
            backfill: Lsn(256),
            order: vec![Part { column: "id".into(), ty: "bigint".into(), operators: None }],
            storage: None,
            rows: 30,
            lanes: 2,
            ranges: vec![range(None, Some("10")), range(Some("10"), Some("20")), range(Some("20"), None)],
            finished: false,
        }
    }

    fn mark(range: usize, after: &str, rows: u64, done: bool) -> Mark {
        let after = Some(vec![after.to_owned()]);
        Mark { table: "t".into(), backfill: Lsn(256), range, snapshot: Lsn(256), after, done, rows }
    }

    fn shown(items: &[Item]) -> Vec<String> {
        let one =
            |i: &Item| format!("{} after {:?} for {:?}", i.range, i.after.as_deref().unwrap_or_default(), i.sinks);
        items.iter().map(one).collect()
    }

    #[test]
    fn sinks_that_stand_together_are_fed_together_and_others_alone() {
        let plan = plan();
        assert_eq!(
            shown(&plan.left(0, &[vec![], vec![]])),
            [
                r#"0 after [] for [(0, 0), (1, 0)]"#,
                r#"1 after ["10"] for [(0, 0), (1, 0)]"#,
                r#"2 after ["20"] for [(0, 0), (1, 0)]"#
            ]
        );
        let kafka =
            vec![mark(0, "10", 10, true), mark(1, "14", 4, false), mark(1, "12", 2, false), mark(2, "25", 5, false)];
        let archive = vec![mark(0, "10", 10, false), mark(2, "25", 5, false)];
        assert_eq!(plan.stored_in_all(&[kafka.clone(), archive.clone()]), (15, 0));
        assert_eq!(plan.stored_in_all(&[kafka.clone(), kafka.clone()]), (19, 1));
        assert_eq!(
            shown(&plan.left(0, &[kafka.clone(), archive])),
            [
                r#"0 after ["10"] for [(1, 10)]"#,
                r#"1 after ["14"] for [(0, 4)]"#,
                r#"1 after ["10"] for [(1, 0)]"#,
                r#"2 after ["25"] for [(0, 5), (1, 5)]"#
            ]
        );
        let other = Plan { backfill: Lsn(512), ..plan };
        assert_eq!(other.left(0, &[kafka]).len(), 3);
    }

    #[test]
    fn a_plan_reads_back_and_refuses_another_question() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!((Plan::read(dir.path(), "t").unwrap(), Plan::lanes(dir.path()).unwrap()), (None, 0));
        let plan = plan();
        plan.write(dir.path()).unwrap();
        assert_eq!((Plan::read(dir.path(), "t").unwrap(), Plan::lanes(dir.path()).unwrap()), (Some(plan.clone()), 2));
        plan.require(dir.path(), &plan.identity, None).unwrap();
        assert_eq!(plan.require(dir.path(), &plan.identity, Some("id > 1")).unwrap_err().exit_code(), 78);
        fs::write(Plan::path(dir.path(), "t"), "{").unwrap();
        assert_eq!(Plan::read(dir.path(), "t").unwrap_err().exit_code(), 78);
    }
}
