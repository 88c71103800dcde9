//! Whether the server has the history that the sinks' positions are of.
//!
//! A server that was set back to an older state of its files has the same identity and timeline, and soon a WAL that is as long as
//! before. By LSNs alone its new transactions would be taken for those that the sinks have. But it also has the slot as it was,
//! and so sends what came after that again: then the last transaction that each sink has must be among it.

use crate::error::{Error, Result};
use crate::lsn::{Commit, Lsn};
use crate::source::slot::ANEW;

/// What has to come again, and the last transaction with rows that has been walked.
#[derive(Debug, Default)]
pub(super) struct History {
    to_come: Vec<Commit>,
    /// The last transaction with rows, also an open one.
    pub(super) last: Option<Commit>,
}

impl History {
    /// `commits` are the last ones of the sinks; the slot sends what commits at or above `confirmed`.
    pub(super) fn new(commits: Vec<Commit>, confirmed: Lsn) -> Self {
        let (to_come, past): (Vec<_>, Vec<_>) = commits.into_iter().partition(|commit| commit.lsn >= confirmed);
        Self { to_come, last: past.into_iter().max_by_key(|commit| commit.lsn) }
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
        self.passes(Lsn(commit.lsn.0 + 1))
    }

    /// Everything that commits below `at` has come.
    ///
    /// # Errors
    /// As [`History::begins`].
    pub(super) fn passes(&self, at: Lsn) -> Result<()> {
        match self.to_come.iter().find(|known| known.lsn < at) {
            None => Ok(()),
            Some(known) => Err(Error::refused(
                "sink_position",
                format!(
                    "a sink has the transaction that committed at {} ({} µs since 1970), and this server has none there, or \
                     another one: it was restored from an older state of its files, or postgres.publication was changed",
                    known.lsn, known.ts
                ),
                "the server, and the publication, that the sinks' positions are of",
                format!(
                    "connect to the right server, or name the publication of before once more; after a restore {ANEW}"
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(lsn: u64, ts: i64) -> Commit {
        Commit { lsn: Lsn(lsn), ts }
    }

    #[test]
    fn what_the_sinks_have_must_come_again() {
        let history = || History::new(vec![commit(200, 7), commit(90, 5), commit(300, 8)], Lsn(100));
        assert_eq!(history().last, Some(commit(90, 5)));
        let mut same = history();
        assert!(same.allows(Lsn(200)) && !same.allows(Lsn(201)));
        for known in [commit(150, 6), commit(200, 7), commit(300, 8), commit(400, 9)] {
            same.begins(known).unwrap();
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
        History::new(vec![commit(200, 7)], Lsn(208)).passes(Lsn(500)).unwrap();
    }
}
