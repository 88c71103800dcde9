//! `--until-lsn L`: exactly the transactions with end_lsn ≤ L, none beyond.
//!
//! A transaction's end is known only at its Commit. A Begin whose commit record starts at or beyond L is certainly
//! beyond it; one whose record starts below L and ends above it (L points into the record) is found at its Commit. Then
//! nothing of it may stay: the session is given up before it is stored, and the next one stops at its Begin.

use crate::error::{Error, Result};
use crate::lsn::Lsn;

/// Shortest commit record: header (24), main data header (2) and commit time (8) (xlogrecord.h, xact.h).
const SHORTEST_COMMIT: u64 = 34;

/// The wanted end, and what earlier sessions have learnt about it.
#[derive(Debug)]
pub(super) struct Until {
    lsn: Lsn,
    /// Commit LSN of a transaction that straddles `lsn`.
    beyond: Option<Lsn>,
}

/// What the walk does about it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reached {
    /// Everything up to this LSN, and nothing else, has been walked.
    End(Lsn),
    /// The transaction that was just walked lies beyond: give the session up and read again.
    ReadAgain,
    /// A column came whose binary form is not known: read again in text.
    ReadInText,
}

impl Until {
    pub(super) fn new(lsn: Lsn) -> Self {
        Self { lsn, beyond: None }
    }

    /// A transaction opens; `resume` is the end of the one before.
    pub(super) fn begin(&self, commit_lsn: Lsn, resume: Lsn) -> Option<Reached> {
        if commit_lsn.0.saturating_add(SHORTEST_COMMIT) > self.lsn.0 {
            return Some(Reached::End(self.lsn.min(commit_lsn).max(resume)));
        }
        (self.beyond == Some(commit_lsn)).then_some(Reached::End(resume))
    }

    /// A message without a transaction, whose record ends at `end_lsn`; `resume` as in [`Until::begin`].
    pub(super) fn message(&self, end_lsn: Lsn, resume: Lsn) -> Option<Reached> {
        (end_lsn > self.lsn).then_some(Reached::End(self.lsn.max(resume)))
    }

    /// A transaction ends. `stored` says whether some of it is durable already.
    pub(super) fn commit(&mut self, commit_lsn: Lsn, end_lsn: Lsn, stored: bool) -> Result<Option<Reached>> {
        if end_lsn <= self.lsn {
            return Ok(None);
        }
        if stored {
            return Err(Error::refused(
                "until_lsn",
                format!(
                    "{} lies within the commit record of {commit_lsn} (end {end_lsn}), of which a part is stored",
                    self.lsn
                ),
                "an LSN at the end of a record, as pg_current_wal_flush_lsn() gives",
                format!("--until-lsn {end_lsn}"),
            ));
        }
        self.beyond = Some(commit_lsn);
        Ok(Some(Reached::ReadAgain))
    }

    /// The server has handed over everything below `wal_end`, and no transaction is open.
    pub(super) fn idle(&self, wal_end: Lsn) -> Option<Reached> {
        (wal_end >= self.lsn).then_some(Reached::End(self.lsn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_that_begins_beyond_is_never_walked() {
        let until = Until::new(Lsn(1000));
        assert_eq!(until.begin(Lsn(900), Lsn(800)), None);
        assert_eq!(until.begin(Lsn(1000), Lsn(800)), Some(Reached::End(Lsn(1000))));
        assert_eq!(until.begin(Lsn(2000), Lsn(800)), Some(Reached::End(Lsn(1000))));
        assert_eq!((until.idle(Lsn(999)), until.idle(Lsn(1000))), (None, Some(Reached::End(Lsn(1000)))));
    }

    #[test]
    fn a_straddling_transaction_is_read_again_and_left_out() {
        let mut until = Until::new(Lsn(1000));
        assert_eq!(until.commit(Lsn(900), Lsn(1000), false).unwrap(), None);
        assert_eq!(until.commit(Lsn(960), Lsn(1008), false).unwrap(), Some(Reached::ReadAgain));
        assert_eq!(until.begin(Lsn(960), Lsn(940)), Some(Reached::End(Lsn(940))));
        assert_eq!(until.commit(Lsn(960), Lsn(1008), true).unwrap_err().exit_code(), 78);
    }
}
