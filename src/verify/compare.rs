//! The source's rows against a sink's fold. Pure: no IO.

use super::fold::{Fold, Row};
use super::report::TableReport;
use super::table::{Table, hash, row_hash};

/// A row of the source.
pub(super) struct SourceRow<'a> {
    pub(super) key: &'a str,
    /// Hash of each column's value.
    pub(super) values: &'a [u64],
    /// It was there before the slot.
    pub(super) is_older: bool,
}

/// A comparison of the keys of one range.
pub(super) struct Comparison<'a> {
    table: &'a Table,
    fold: Fold,
    report: &'a mut TableReport,
}

impl<'a> Comparison<'a> {
    pub(super) fn new(table: &'a Table, fold: Fold, report: &'a mut TableReport) -> Self {
        Self { table, fold, report }
    }

    /// Compares a row of the source; one of another range is passed over.
    pub(super) fn take(&mut self, row: &SourceRow<'_>) {
        let at = hash(row.key);
        if !self.fold.range.has(at) {
            return;
        }
        if self.fold.is_changed(row.key) {
            self.report.changed_since += 1;
            self.fold.take(row.key);
            return;
        }
        match self.table.keyed {
            true => self.take_keyed(at, row),
            false => self.take_copy(at, row),
        }
    }

    fn take_keyed(&mut self, at: u64, row: &SourceRow<'_>) {
        let found = self.fold.take(row.key);
        let known = found.as_ref().and_then(|found| self.fold.values(found));
        let Some((newest, values)) = known else {
            // No event ever told of it: the slot is not to blame for a row that was there before.
            return self.lack(at, row, found.is_none(), found.as_ref().and_then(Row::newest).map(|at| at.event_id()));
        };
        let compared: Vec<_> = row.values.iter().zip(&values).map(|(ours, theirs)| theirs.map(|_| *ours)).collect();
        self.report.add_source(at, row_hash(row.key, &compared));
        self.report.add_sink(at, row_hash(row.key, &values), 1);
        self.report.in_part += u64::from(values.contains(&None));
        if compared != values {
            let names = self.table.columns.iter().zip(compared.iter().zip(&values));
            let columns = names.filter(|(_, (ours, theirs))| ours != theirs).map(|((name, _), _)| name.clone());
            self.report.different += 1;
            self.report.name("different", row.key, Some(newest.event_id()), columns.collect());
        }
    }

    fn take_copy(&mut self, at: u64, row: &SourceRow<'_>) {
        match self.fold.take_copy(row.key) {
            Some(_) => {
                self.report.add_source(at, row_hash(row.key, &[]));
                self.report.add_sink(at, row_hash(row.key, &[]), 1);
            }
            None => self.lack(at, row, true, None),
        }
    }

    /// The sink does not have the row.
    fn lack(&mut self, at: u64, row: &SourceRow<'_>, is_untold: bool, id: Option<String>) {
        if row.is_older && is_untold && !self.fold.is_given(row.key) {
            self.report.older_than_slot += 1;
            return;
        }
        let values: Vec<_> = row.values.iter().copied().map(Some).collect();
        self.report.add_source(at, row_hash(row.key, if self.table.keyed { &values } else { &[] }));
        self.report.missing += 1;
        self.report.name("missing", row.key, id, Vec::new());
    }

    /// What is left in the sink once the source has been read, and what is there twice.
    pub(super) fn finish(mut self) {
        for (position, key) in std::mem::take(&mut self.fold.doubled) {
            self.report.doubled += 1;
            self.report.name("doubled", &key, Some(position.event_id()), Vec::new());
        }
        let mut rest: Vec<_> = self.fold.rest().collect();
        rest.sort_by_key(|(_, row)| row.newest());
        for (key, row) in rest {
            if !self.fold.is_changed(&key) {
                self.leave_over(&key, &row);
            }
        }
    }

    fn leave_over(&mut self, key: &str, row: &Row) {
        let at = hash(key);
        let (rows, values) = match (self.table.keyed, self.fold.values(row)) {
            (false, _) => (u64::try_from(self.fold.count(row)).unwrap_or_default(), Vec::new()),
            (true, Some((_, values))) => (1, values),
            (true, None) => (0, Vec::new()),
        };
        if rows > 0 {
            self.report.add_sink(at, row_hash(key, &values), rows);
            self.report.extra += rows;
            self.report.name("extra", key, row.newest().map(|at| at.event_id()), Vec::new());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fold::{Changed, Fact, Range};
    use super::super::report::Named;
    use super::super::table::for_test;
    use super::*;
    use crate::change::Op;
    use crate::lsn::{Lsn, Position};
    use crate::schema::Type;

    fn at(lsn: u64) -> Position {
        Position { commit_lsn: Lsn(lsn), ordinal: 0 }
    }

    #[test]
    fn each_row_is_equal_or_missing_or_extra_or_different_or_older() {
        let table = for_test(&[("id", Type::Int4), ("a", Type::Text)], &[0]);
        let mut changed = Changed::default();
        changed.note("6", 100);
        let mut fold = Fold::new(&table, Range::ALL, at(100), &changed, usize::MAX);
        for (lsn, key, value) in [(1, "1", Some(1)), (2, "2", Some(1)), (3, "3", Some(1)), (4, "7", None)] {
            fold.push(&Fact { at: at(lsn), op: Op::Create, key, old_key: None, values: &[Some(0), value] });
        }
        fold.push(&Fact { at: at(1), op: Op::Create, key: "1", old_key: None, values: &[Some(0), Some(9)] });
        let mut report = TableReport::new("t", Lsn(100));
        let mut comparison = Comparison::new(&table, fold, &mut report);
        for (key, value, is_older) in
            [("1", 1, false), ("2", 2, true), ("4", 1, false), ("5", 1, true), ("6", 1, false), ("7", 5, false)]
        {
            comparison.take(&SourceRow { key, values: &[0, value], is_older });
        }
        comparison.finish();
        report.close();
        let named = |what, key: &str, id: Option<u64>, columns: &[&str]| Named {
            what,
            key: key.into(),
            id: id.map(|lsn| at(lsn).event_id()),
            columns: columns.iter().map(|c| (*c).to_owned()).collect(),
        };
        assert_eq!(
            report.rows,
            [
                named("different", "2", Some(2), &["a"]),
                named("missing", "4", None, &[]),
                named("doubled", "1", Some(1), &[]),
                named("extra", "3", Some(3), &[]),
            ]
        );
        let TableReport { missing, extra, different, doubled, changed_since, older_than_slot, in_part, .. } = report;
        assert_eq!((missing, extra, different, doubled), (1, 1, 1, 1));
        assert_eq!((changed_since, older_than_slot, in_part), (1, 1, 1));
        assert_eq!((report.source.rows, report.sink.rows, report.equal), (4, 4, false));
    }
}
