//! Whether the server has the history that the sinks' positions are of.
//!
//! A server that was set back to an older state of its files has the same identity and timeline, and soon a WAL that is as long as
//! before. By LSNs alone its new transactions would be taken for those that the sinks have. But it also has the slot as it was,
//! and so sends what came after that again: then the last transaction that each sink has must be among it, and no other one with
//! rows may come between that and where the sink stands.

use crate::error::{Error, Result};
use crate::lsn::{Checkpoint, Commit, Lsn};
use crate::source::slot::ANEW;

/// What has to come again and what may not, and the last transaction with rows that has been walked.
#[derive(Debug, Default)]
pub(super) struct History {
    to_come: Vec<Commit>,
    /// Where the sinks have no row: from behind the first LSN to below the second.
    empty: Vec<(Lsn, Lsn)>,
    /// A transaction that lies there; it may have no row.
    strange: Option<Lsn>,
    /// The last transaction with rows, also an open one.
    pub(super) last: Option<Commit>,
}

impl History {
    /// `positions` are those of all configured sinks; the slot sends what commits at or above `confirmed`.
    pub(super) fn new(positions: &[Option<Checkpoint>], confirmed: Lsn) -> Self {
        let known = || positions.iter().flatten().filter_map(|at| Some((at.commit?, at.resume)));
        let (to_come, past): (Vec<_>, Vec<_>) =
            known().map(|(commit, _)| commit).partition(|commit| commit.lsn >= confirmed);
        let empty = known().map(|(commit, resume)| (commit.lsn, resume)).collect();
        // While a sink has no position, nothing but the slot's beginning was ever acknowledged.
        let first = positions.iter().any(Option::is_none).then_some(Commit::NONE);
        let last = past.into_iter().max_by_key(|commit| commit.lsn).or(first);
        Self { to_come, empty, strange: None, last }
    }

    /// Whether all that the sinks have, as far as it is sent again, has come.
    pub(super) fn is_proven(&self) -> bool {
        self.to_come.is_empty() && self.strange.is_none()
    }

    /// Whether everything up to `at` may be acknowledged: what has to come would come again all the same.
    pub(super) fn allows(&self, at: Lsn) -> bool {
        self.to_come.iter().all(|known| known.lsn >= at)
    }

    /// A transaction begins.
    ///
    /// # Errors
    /// [`Error::Refused`] when what a sink has is not among what the server sends.
    pub(super) fn begins(&mut self, commit: Commit) -> Result<()> {
        self.to_come.retain(|known| *known != commit);
        let at = commit.lsn;
        self.strange = self.empty.iter().any(|&(behind, below)| behind < at && at < below).then_some(at);
        self.passes(Lsn(at.0.saturating_add(1)))
    }

    /// The transaction has a row.
    ///
    /// # Errors
    /// [`Error::Refused`] when a sink stands behind it and has none there.
    pub(super) fn has_row(&self) -> Result<()> {
        match self.strange {
            None => Ok(()),
            Some(at) => Err(refused(format!("a sink has no transaction at {at}, and this server has one there"))),
        }
    }

    /// It has ended, and nothing was wrong with it.
    pub(super) fn ends(&mut self) {
        self.strange = None;
    }

    /// Everything that commits below `at` has come.
    ///
    /// # Errors
    /// As [`History::begins`].
    pub(super) fn passes(&self, at: Lsn) -> Result<()> {
        match self.to_come.iter().find(|known| known.lsn < at) {
            None => Ok(()),
            Some(Commit { lsn, ts }) => Err(refused(format!(
                "a sink has the transaction that committed at {lsn} ({ts} µs since 1970), and this server has none there, or \
                 another one"
            ))),
        }
    }
}

fn refused(found: String) -> Error {
    Error::refused(
        "sink_position",
        format!("{found}: it was restored from an older state of its files, or postgres.publication was changed"),
        "the server, and the publication, that the sinks' positions are of",
        format!("connect to the right server, or name the publication of before once more; after a restore {ANEW}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(lsn: u64, ts: i64) -> Commit {
        Commit { lsn: Lsn(lsn), ts }
    }

    fn at(resume: u64, commit: Option<Commit>) -> Option<Checkpoint> {
        Some(Checkpoint { commit, ..Checkpoint::whole(Lsn(resume)) })
    }

    #[test]
    fn what_the_sinks_have_must_come_again() {
        let positions = [(200, 7), (90, 5), (300, 8)].map(|(lsn, ts)| at(lsn + 8, Some(commit(lsn, ts))));
        let history = || History::new(&positions, Lsn(100));
        assert_eq!(history().last, Some(commit(90, 5)));
        let mut same = history();
        assert!(same.allows(Lsn(200)) && !same.allows(Lsn(201)));
        for known in [commit(150, 6), commit(200, 7), commit(300, 8), commit(400, 9)] {
            assert_eq!(same.is_proven(), known.lsn > Lsn(300));
            same.begins(known).unwrap();
            same.has_row().unwrap();
        }
        same.passes(Lsn(500)).unwrap();
        assert!(same.allows(Lsn(500)));
        // Another time, none there, none at all.
        assert_eq!(history().begins(commit(200, 8)).unwrap_err().exit_code(), 78);
        assert_eq!(history().begins(commit(208, 7)).unwrap_err().exit_code(), 78);
        assert_eq!(history().passes(Lsn(201)).unwrap_err().exit_code(), 78);
        history().passes(Lsn(200)).unwrap();
        history().begins(commit(199, 1)).unwrap();
        // What has been acknowledged does not come again.
        History::new(&[at(208, Some(commit(200, 7)))], Lsn(208)).passes(Lsn(500)).unwrap();
    }

    #[test]
    fn between_a_sinks_last_transaction_and_its_position_no_row_comes() {
        let mut history = History::new(&[at(300, Some(commit(200, 7)))], Lsn(208));
        assert!(history.is_proven());
        // Without a row (Postgres 14 sends such) it is none.
        history.begins(commit(250, 8)).unwrap();
        history.ends();
        assert!(history.is_proven());
        history.begins(commit(300, 9)).unwrap();
        history.has_row().unwrap();
        history.begins(commit(299, 9)).unwrap();
        assert!(!history.is_proven());
        assert_eq!(history.has_row().unwrap_err().exit_code(), 78);
        // A new pipeline says that there was none; an older falaj said nothing.
        assert_eq!(History::new(&[None, None], Lsn(100)).last, Some(Commit::NONE));
        assert_eq!(History::new(&[None, at(300, Some(commit(200, 7)))], Lsn(100)).last, Some(Commit::NONE));
        let mut idle = History::new(&[at(300, Some(Commit::NONE)), None], Lsn(100));
        idle.begins(commit(250, 8)).unwrap();
        assert_eq!(idle.has_row().unwrap_err().exit_code(), 78);
        let mut older = History::new(&[at(300, None)], Lsn(100));
        assert_eq!(older.last, None);
        older.begins(commit(250, 8)).unwrap();
        older.has_row().unwrap();
    }
}
