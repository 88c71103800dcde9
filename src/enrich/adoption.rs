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
        commit_lsn < self.lsn && (xid < self.xmin || (xid < self.xmax && !self.running.contains(&xid)))
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
        for bad in ["", "1:2", "a:2:", "1:2:x"] {
            assert_eq!(at(bad), None, "{bad}");
        }
    }
}
