//! How the reading thread paces itself.

use std::time::Duration;

/// Lets the socket fill while a backlog is sent, and reads at once while the stream is live.
///
/// What tells them apart is how long ago the transaction that is being sent was committed, both times by the server's
/// clock. A rate would not do: one that falls because the reader wakes for every message would keep it from pausing.
#[derive(Default)]
pub(super) struct Pace {
    /// Commit time of the transaction that is being sent, µs.
    committed: i64,
    /// How much later its last message was sent, µs.
    lag: i64,
}

impl Pace {
    /// A pause is nothing beside this lag, in µs, and it lets a reader that falls behind catch up.
    const BACKLOG: i64 = 20_000;
    /// A read of this size has emptied a full socket: no need to wait for more.
    const LARGE: usize = 128 << 10;
    /// Beyond about this the walsender waits for us.
    const PAUSE: Duration = Duration::from_micros(500);

    /// A pgoutput message, and when the server sent it (µs since 2000-01-01).
    pub(super) fn message(&mut self, sent: i64, message: &[u8]) {
        // Begin: final LSN, commit time, xid.
        if let Some((b'B', fields)) = message.split_first()
            && let Some(time) = fields.get(8..).and_then(|f| f.first_chunk())
        {
            self.committed = i64::from_be_bytes(*time);
        }
        self.lag = sent.saturating_sub(self.committed);
    }

    /// A keepalive: nothing more was waiting.
    pub(super) fn keepalive(&mut self) {
        self.lag = 0;
    }

    pub(super) fn after(&self, read: usize) {
        if self.lag > Self::BACKLOG && read < Self::LARGE {
            Self::rest();
        }
    }

    /// The thread is the reader's own. tokio's timer has a grain of a millisecond, which is too coarse here.
    pub(super) fn rest() {
        std::thread::sleep(Self::PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_of_the_commit_tells_a_backlog_from_live_changes() {
        let begin = |commit: i64| [b"B".as_slice(), &[0; 8], &commit.to_be_bytes(), &[0; 4]].concat();
        let mut pace = Pace::default();
        pace.message(1_000_900, &begin(1_000_000));
        assert!(pace.lag <= Pace::BACKLOG);
        pace.message(1_050_000, b"I");
        assert!(pace.lag > Pace::BACKLOG, "a large transaction is sent long after its commit");
        pace.keepalive();
        assert!(pace.lag <= Pace::BACKLOG);
        pace.message(i64::MAX, &begin(i64::MIN));
        assert!(pace.lag > Pace::BACKLOG);
        pace.message(5, b"B short");
    }
}
