//! What an adopted lookup state is as of: the snapshot in which its rows were read.

/// The text of `pg_current_snapshot()`: `xmin:xmax:xip,…`, transaction ids with their epoch.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Adoption {
    xmin: u64,
    xmax: u64,
    running: Vec<u64>,
}

impl Adoption {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ':');
        let (xmin, xmax) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let running = parts.next()?.split(',').filter(|xid| !xid.is_empty());
        Some(Self { xmin, xmax, running: running.map(|xid| xid.parse().ok()).collect::<Option<_>>()? })
    }

    /// Whether a committed transaction had ended when the rows were read. The stream gives its id without the epoch, and
    /// lies less than half of all ids away from the snapshot.
    pub(super) fn saw(&self, xid: u32) -> bool {
        let ahead = i64::from(xid.wrapping_sub(self.xmax as u32).cast_signed());
        let Some(xid) = self.xmax.checked_add_signed(ahead) else { return false };
        xid < self.xmin || (xid < self.xmax && !self.running.contains(&xid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_is_seen_when_it_had_ended_also_over_the_wrap_of_its_id() {
        let some = Adoption::parse("100:110:100,105").unwrap();
        assert_eq!(
            [99, 100, 101, 105, 109, 110, 111].map(|xid| some.saw(xid)),
            [true, false, true, false, true, false, false]
        );
        let none_running = Adoption::parse("7:7:").unwrap();
        assert_eq!([6, 7].map(|xid| none_running.saw(xid)), [true, false]);
        let wrapped = Adoption::parse("4294967290:4294967300:4294967298").unwrap();
        assert_eq!([u32::MAX - 10, 1, 2, 3, 4].map(|xid| wrapped.saw(xid)), [true, true, false, true, false]);
        for bad in ["", "1:2", "a:2:", "1:2:x"] {
            assert_eq!(Adoption::parse(bad), None, "{bad}");
        }
    }
}
