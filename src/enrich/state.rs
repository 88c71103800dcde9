//! The lookup state on disk: a base at a position, and a log of lookup changes stamped with theirs.
//!
//! Together they give the lookup rows *as of* any position from the base on, so that a restart at the sinks'
//! position enriches exactly as the first time. Both files are JSON lines, to be read by a person in an emergency.
//!
//! `base.jsonl`: a [`BaseHeader`], then one array `[table, key, value…]` a row, then `{"rows":N}`.
//! `changes.jsonl`: one [`Entry`] a line. A torn last line was never acknowledged and is dropped.

mod base;
mod log;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::lsn::{Lsn, Position, SlotIdentity};
use crate::schema::Type;

use base::read_base;
pub use base::{BaseWriter, base_bytes, clear, header, put_back, require_header, set_aside, unknown};
pub use log::ChangeLog;

const CHANGES: &str = "changes.jsonl";

/// First line of the base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseHeader {
    /// Layout version: 1.
    pub version: u32,
    /// The stream that the LSNs belong to.
    pub identity: SlotIdentity,
    /// The rows are as of this LSN: every transaction committed below it is in, none from it on.
    pub lsn: Lsn,
    /// Where the slot stood when `init` made it, or first adopted it. A sink without a position may start only from here.
    pub origin: Lsn,
    /// Made by `--adopt-slot`: rows are those of that moment, although `lsn` may lie before it.
    pub adopted: bool,
    /// Which transactions the rows of an adoption are already as of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopted_snapshot: Option<Snapshot>,
    /// Last change that the rows have; absent while they are those that were read from the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<Position>,
    /// The lookup tables.
    pub tables: Vec<LookupTable>,
}

impl BaseHeader {
    /// Last change that the rows have; where they were read from the source, a place directly before `lsn`.
    fn last_change(&self) -> Position {
        self.changed.unwrap_or(Position { commit_lsn: Lsn(self.lsn.0.saturating_sub(1)), ordinal: 0 })
    }

    /// Whether the rows are as of a later moment than a change.
    pub(super) fn holds(&self, change: Position) -> bool {
        let moment = self.adopted_snapshot.as_ref().map_or(self.lsn, |adopted| adopted.lsn.max(self.lsn));
        change.commit_lsn < moment
    }
}

/// A snapshot of the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// `pg_current_snapshot()`.
    pub xids: String,
    /// End of the WAL right after it was taken: whatever it sees has committed before.
    pub lsn: Lsn,
}

/// A lookup table: its key and the columns that are joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LookupTable {
    /// Table name as in the configuration.
    pub table: String,
    /// `pg_class.oid`: a table that is made anew under the name is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oid: Option<u32>,
    /// The primary key column.
    pub key: ColumnType,
    /// Joined columns, in the order of the rows' values.
    pub columns: Vec<ColumnType>,
    /// `pg_attribute.attnum` of the table's columns, as far as known: another column under the name has another one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub numbers: BTreeMap<String, i16>,
}

/// A column's name and `pg_attribute` type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnType {
    /// Column name.
    pub name: String,
    /// `atttypid`
    pub type_oid: u32,
    /// `atttypmod`
    pub type_mod: i32,
}

impl ColumnType {
    /// The type that falaj knows it by.
    pub fn ty(&self) -> Type {
        Type::from_oid(self.type_oid, self.type_mod)
    }
}

/// A lookup row: the key's text and the joined columns' texts, NULL as `None`.
pub type Row = (String, Vec<Option<String>>);

/// One line of the change log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Position of the change that caused it; for `Relation` that of the next change.
    pub at: Position,
    /// Index into the tables of the header.
    pub table: usize,
    /// What happened.
    #[serde(flatten)]
    pub change: LookupChange,
}

/// A change of a lookup table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LookupChange {
    /// Insert or overwrite.
    Put(Row),
    /// Remove by key.
    Delete(String),
    /// Remove all.
    Truncate(bool),
    /// The columns' types have changed.
    Relation(LookupTable),
}

pub(super) const RESTORE: &str = "restore state.dir as it was when produce last ended, or run falaj init --adopt-slot (older events are then \
                                  enriched with the lookup rows of now)";

/// The lookup tables as the newest entries of the log have them, read beside whoever writes it; `None` when there is no base.
///
/// # Errors
/// [`Error::Refused`] when the base is there and is not one.
pub fn tables(dir: &Path) -> Result<Option<Vec<LookupTable>>> {
    let Some(BaseHeader { lsn, mut tables, .. }) = header(dir)? else { return Ok(None) };
    let Ok(log) = File::open(dir.join(CHANGES)) else { return Ok(Some(tables)) };
    for text in BufReader::new(log).lines().map_while(std::io::Result::ok).filter(|l| l.contains("\"relation\":")) {
        if let Ok(Entry { at, table, change: LookupChange::Relation(fresh) }) = serde_json::from_str(&text)
            && at.commit_lsn >= lsn
            && let Some(known) = tables.get_mut(table)
        {
            *known = fresh;
        }
    }
    Ok(Some(tables))
}

/// Reads the state as of `upto`: hands every base row and every logged change below it to `apply`, in order, and returns the
/// header, the last of these changes, and the open log. The later ones stay in it: the stream will bring them again, but
/// perhaps not today.
///
/// # Errors
/// [`Error::Refused`] for a missing, torn or foreign file, and for a base that lies beyond `upto`.
pub fn load(
    dir: &Path,
    upto: Lsn,
    mut apply: impl FnMut(&BaseHeader, usize, LookupChange) -> Result<()>,
) -> Result<(BaseHeader, Position, ChangeLog)> {
    let header = read_base(dir, upto, &mut apply)?;
    let mut last = header.last_change();
    let log = ChangeLog::open(dir, |entry| {
        let at = entry.at;
        if at.commit_lsn >= header.lsn && at.commit_lsn < upto {
            last = last.max(at);
            apply(&header, entry.table, entry.change)?;
        }
        Ok(at.commit_lsn < upto)
    })?;
    Ok((header, last, log))
}

/// Reads the state as of `upto` as [`load`] does, and changes no file: another process may be writing them.
///
/// # Errors
/// As [`load`].
pub fn read(
    dir: &Path,
    upto: Lsn,
    mut apply: impl FnMut(&BaseHeader, usize, LookupChange) -> Result<()>,
) -> Result<BaseHeader> {
    let header = read_base(dir, upto, &mut apply)?;
    let Ok(file) = File::open(dir.join(CHANGES)) else { return Ok(header) };
    read_entries(dir, BufReader::new(file), |entry| {
        let (past, at) = (entry.at.commit_lsn < upto, entry.at.commit_lsn);
        if past && at >= header.lsn {
            apply(&header, entry.table, entry.change)?;
        }
        Ok(past)
    })?;
    Ok(header)
}

/// Reads entries of the change log while `keep` says so; gives the bytes of those that it kept.
fn read_entries(dir: &Path, mut lines: impl BufRead, mut keep: impl FnMut(Entry) -> Result<bool>) -> Result<u64> {
    let (mut kept, mut text) = (0_u64, String::new());
    loop {
        text.clear();
        let read = at(dir, lines.read_line(&mut text))?;
        if read == 0 || !text.ends_with('\n') {
            return Ok(kept);
        }
        let entry: Entry =
            serde_json::from_str(&text).map_err(|e| missing(dir, &format!("{CHANGES} at byte {kept}: {e}")))?;
        if !keep(entry)? {
            return Ok(kept);
        }
        kept += read as u64;
    }
}

fn missing(dir: &Path, found: &str) -> Error {
    Error::refused(
        "lookup_state",
        format!("{}: {found}", dir.display()),
        "the lookup state that `falaj init` wrote when it made the slot",
        RESTORE,
    )
}

/// The refusal of a state whose last change is not that of the sinks' position.
pub(super) fn older(dir: &Path, last: Position, named: Position) -> Error {
    Error::refused(
        "lookup_state",
        format!(
            "{}: an older copy, with the lookup changes up to {}, row {}; the sinks have events that were enriched with that of \
             {}, row {}",
            dir.display(),
            last.commit_lsn,
            last.ordinal,
            named.commit_lsn,
            named.ordinal
        ),
        "a state with every lookup change up to the sinks' position",
        RESTORE,
    )
}

fn line(out: &mut impl Write, value: &impl Serialize) -> std::io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
}

fn at<T>(dir: &Path, outcome: std::io::Result<T>) -> Result<T> {
    outcome.map_err(|e| Error::fatal(format_args!("lookup state in {}", dir.display()), e))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};

    use super::base::BASE;
    use super::*;

    fn sample() -> BaseHeader {
        let column = |name: &str, type_oid| ColumnType { name: name.into(), type_oid, type_mod: -1 };
        BaseHeader {
            version: 1,
            identity: SlotIdentity { system_id: "7".into(), timeline: 1, slot: "falaj".into() },
            lsn: Lsn(100),
            origin: Lsn(100),
            adopted: false,
            adopted_snapshot: None,
            changed: None,
            tables: vec![LookupTable {
                table: "content".into(),
                oid: None,
                key: column("id", 2950),
                columns: vec![column("title", 25)],
                numbers: BTreeMap::new(),
            }],
        }
    }

    fn put(at: u64, title: &str) -> Entry {
        let change = LookupChange::Put(("k".into(), vec![Some(title.into())]));
        Entry { at: Position { commit_lsn: Lsn(at), ordinal: 0 }, table: 0, change }
    }

    fn titles(dir: &Path, resume: u64) -> Vec<Option<String>> {
        let mut seen = Vec::new();
        load(dir, Lsn(resume), |_, _, change| {
            if let LookupChange::Put((_, mut values)) = change {
                seen.push(values.remove(0));
            }
            Ok(())
        })
        .unwrap();
        seen
    }

    #[test]
    fn state_is_rebuilt_as_of_the_sinks_position_and_later_entries_stay_until_the_stream_brings_others() {
        let dir = tempfile::tempdir().unwrap();
        let mut base = BaseWriter::create(dir.path(), &sample()).unwrap();
        base.row(0, "k", &[Some("α")]).unwrap();
        base.finish().unwrap();
        let (_, _, mut log) = load(dir.path(), Lsn(100), |_, _, _| Ok(())).unwrap();
        for (at, title) in [(100, "β"), (200, "γ"), (300, "δ")] {
            log.append(&put(at, title)).unwrap();
        }
        log.sync().unwrap();
        // A torn last line, as a crash leaves it.
        OpenOptions::new().append(true).open(dir.path().join(CHANGES)).unwrap().write_all(b"{\"at\":").unwrap();
        let some = |s: &str| Some(s.to_owned());
        assert_eq!(titles(dir.path(), 1000), [some("α"), some("β"), some("γ"), some("δ")]);
        assert_eq!(titles(dir.path(), 300), [some("α"), some("β"), some("γ")]);
        let append = |resume: u64, entries: &[(u64, &str)]| {
            let (_, _, mut log) = load(dir.path(), Lsn(resume), |_, _, _| Ok(())).unwrap();
            entries.iter().for_each(|(at, title)| log.append(&put(*at, title)).unwrap());
            log.sync().unwrap();
            log.has_tail().unwrap()
        };
        // A sink that has got less far than another one, and does not get there today either.
        assert!(append(200, &[(200, "γ")]));
        assert_eq!(titles(dir.path(), 1000), [some("α"), some("β"), some("γ"), some("δ")]);
        assert!(!append(200, &[(200, "γ"), (300, "δ"), (400, "ε")]));
        assert_eq!(titles(dir.path(), 1000), [some("α"), some("β"), some("γ"), some("δ"), some("ε")]);
        assert!(!append(300, &[(300, "other")]));
        assert_eq!(titles(dir.path(), 1000), [some("α"), some("β"), some("γ"), some("other")]);
    }

    #[test]
    fn a_torn_or_lost_base_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let upto = Lsn(100);
        assert_eq!(load(dir.path(), upto, |_, _, _| Ok(())).err().unwrap().exit_code(), 78);
        let mut base = BaseWriter::create(dir.path(), &sample()).unwrap();
        base.row(0, "k", &[None]).unwrap();
        base.finish().unwrap();
        assert_eq!(load(dir.path(), Lsn(99), |_, _, _| Ok(())).err().unwrap().exit_code(), 78);
        let text = fs::read_to_string(dir.path().join(BASE)).unwrap();
        let cut = text.trim_end().rsplit_once('\n').unwrap().0;
        fs::write(dir.path().join(BASE), cut).unwrap();
        assert_eq!(load(dir.path(), upto, |_, _, _| Ok(())).err().unwrap().exit_code(), 78);
        assert_eq!(header(dir.path()).unwrap(), Some(sample()));
    }
}
