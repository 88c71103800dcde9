//! What an adopted lookup state is as of: the snapshot in which its rows were read.

use super::state::Snapshot;
use crate::lsn::Lsn;

/// `xmin:xmax:xip,…` as `pg_current_snapshot()` writes it, with the ids' epoch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Adoption {
    xmin: u64,
    xmax: u64,
    running: Vec<u64>,
    lsn: Lsn,
}

impl Adoption {
    pub(crate) fn parse(snapshot: &Snapshot) -> Option<Self> {
        let mut parts = snapshot.xids.splitn(3, ':');
        let (xmin, xmax) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let running = parts.next()?.split(',').filter(|xid| !xid.is_empty());
        let running = running.map(|xid| xid.parse().ok()).collect::<Option<_>>()?;
        Some(Self { xmin, xmax, running, lsn: snapshot.lsn })
    }

    /// Whether a committed transaction had ended when the rows were read. The stream gives its id without the epoch; ids
    /// come again after 2^32 of them, places in the WAL never do.
    pub(crate) fn saw(&self, commit_lsn: Lsn, xid: u32) -> bool {
        let ahead = i64::from(xid.wrapping_sub(self.xmax as u32).cast_signed());
        let Some(xid) = self.xmax.checked_add_signed(ahead) else { return false };
        commit_lsn < self.lsn && self.had_ended(xid)
    }

    /// Whether a transaction had ended then; its id with the epoch.
    pub(crate) fn had_ended(&self, xid: u64) -> bool {
        xid < self.xmin || (xid < self.xmax && !self.running.contains(&xid))
    }

    /// The id, with its epoch, of the transaction that wrote a row which this snapshot sees, from the row's `xmin`. A frozen
    /// row keeps its `xmin`: one that is 2^32 transactions old or more looks younger than it is, never older.
    pub(crate) fn writer(&self, xmin: u32) -> u64 {
        // Ids below 3 are none of a transaction: such a row is older than all of them.
        let age = u64::from((self.xmax as u32).wrapping_sub(1).wrapping_sub(xmin));
        if xmin < 3 { 0 } else { (self.xmax - 1).saturating_sub(age) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(xids: &str) -> Option<Adoption> {
        Adoption::parse(&Snapshot { xids: xids.into(), lsn: Lsn(50) })
    }

    #[test]
    fn a_transaction_is_seen_when_it_had_ended_also_over_the_wrap_of_its_id() {
        let seen = |xids: &str, tried: &[u32]| {
            tried.iter().map(|xid| at(xids).unwrap().saw(Lsn(49), *xid)).collect::<Vec<_>>()
        };
        assert_eq!(seen("100:110:100,105", &[99, 100, 101, 105, 109, 110]), [true, false, true, false, true, false]);
        assert_eq!(seen("7:7:", &[6, 7]), [true, false]);
        let wrapped = "4294967290:4294967300:4294967298";
        assert_eq!(seen(wrapped, &[u32::MAX - 10, 1, 2, 3, 4]), [true, true, false, true, false]);
        assert!(!at("7:7:").unwrap().saw(Lsn(50), 6));
        assert!(at("7:7:").unwrap().had_ended(6) && !at("7:7:").unwrap().had_ended((1 << 32) + 6));
        for bad in ["", "1:2", "a:2:", "1:2:x"] {
            assert_eq!(at(bad), None, "{bad}");
        }
    }
    #[test]
    fn the_writer_of_a_row_is_the_newest_with_its_id() {
        let writers = |xmax: u64, tried: &[u32]| {
            let snapshot = at(&format!("{xmax}:{xmax}:")).unwrap();
            tried.iter().map(|xmin| snapshot.writer(*xmin)).collect::<Vec<_>>()
        };
        const EPOCH: u64 = 1 << 32;
        assert_eq!(writers(1000, &[2, 3, 999]), [0, 3, 999]);
        // Three billion transactions later the first ones are still known apart from those of now.
        assert_eq!(writers(3_000_000_000, &[800, 2_999_999_999]), [800, 2_999_999_999]);
        assert_eq!(writers(EPOCH + 1000, &[2, 999, 1000, u32::MAX]), [0, EPOCH + 999, 1000, EPOCH - 1]);
    }
}
