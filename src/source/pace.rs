//! How the reading thread paces itself.

use std::time::Duration;

/// Lets the server's messages gather while a backlog is sent, and reads at once while the stream is live.
///
/// The walsender hands each message to the kernel by itself, and each that is sent at once costs it as much as decoding
/// it did. They gather in large segments only while the receive window is full. So it is kept small
/// ([`super::conn::Stream::bound_window`]), a gulp takes one window and leaves what the server is ahead by, and the thread
/// rests for as long as the window takes to fill. A large transaction on an idle stream is a small backlog: there it only rests
/// for a moment.
///
/// What tells a backlog from live changes is how long ago the transaction that is being sent was committed, both times by
/// the server's clock. A rate would not do: one that falls because the reader wakes for every message keeps it awake.
pub struct Pace {
    /// Bytes that the receive window holds at least, where it is bounded.
    window: Option<usize>,
    pause: Duration,
    /// The gulp before found the window closed.
    was_full: bool,
    /// Gulps until a long rest is tried again.
    patience: u32,
    /// Commit time of the transaction that is being sent, µs.
    committed: i64,
    /// How much later its last message was sent, µs.
    lag: i64,
}

impl Pace {
    /// A brief rest is little beside this lag, in µs, and a large transaction is sent sooner with such rests.
    const BEHIND: i64 = 4000;
    /// … and the longest rest is little beside this one.
    const BACKLOG: i64 = 100_000;
    const BRIEF: Duration = Duration::from_millis(1);
    const SHORTEST: Duration = Duration::from_micros(200);
    /// Where it begins with a bounded window: too long rather than too short, so that the window closes.
    const FIRST: Duration = Duration::from_millis(2);
    /// Where the window is not bounded, a longer pause only makes the walsender wait.
    const USUAL: Duration = Duration::from_micros(500);
    const LONGEST: Duration = Duration::from_millis(20);
    /// Messages sent one by one fill the window within half of it, and gather in the other half.
    const LONG: Duration = Duration::from_millis(8);
    /// Gulps after a long rest in vain, half a second of them: what such rests cost is then a twentieth at most.
    const PATIENCE: u32 = 1000;

    /// For a stream whose receive window holds `window` bytes or more; `None` where it is not known.
    pub fn new(window: Option<usize>) -> Self {
        let pause = if window.is_some() { Self::FIRST } else { Self::USUAL };
        Self { window, pause, was_full: false, patience: 0, committed: 0, lag: 0 }
    }

    /// A gulp of `read` bytes found the window closed. What would come after it without a rest is what the server is ahead
    /// by; once that is used up, all that the server sends next goes one by one.
    pub(super) fn is_full(&self, read: usize) -> bool {
        self.window.is_some_and(|window| read >= window)
    }

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

    /// After a gulp of `read` bytes that has emptied the socket.
    pub(super) fn after(&mut self, read: usize) {
        if let Some(rest) = self.rest_after(read) {
            std::thread::sleep(rest);
        }
    }

    fn rest_after(&mut self, read: usize) -> Option<Duration> {
        let is_full = self.is_full(read);
        let was_full = std::mem::replace(&mut self.was_full, is_full);
        match self.window {
            _ if self.lag <= Self::BEHIND => None,
            _ if self.lag <= Self::BACKLOG => Some(Self::BRIEF),
            // More was waiting than the window took: a little shorter, until that is used up.
            Some(_) if is_full => {
                self.pause = (self.pause * 63 / 64).max(Self::SHORTEST);
                self.patience = 0;
                Some(self.pause)
            }
            // What that gulp had left. With large segments the window stays closed until all is read, however much is
            // waiting behind it.
            Some(_) if was_full => Some(self.pause),
            // The window had not closed: what came was sent one by one. A long rest lets the server get far enough ahead
            // that what it sends next is waiting behind the window already.
            Some(_) if self.patience == 0 => {
                self.pause = (self.pause * 9 / 8).min(Self::LONGEST);
                self.patience = Self::PATIENCE;
                Some(Self::LONG)
            }
            // That did not help: the server is slow, or its window is not what we think.
            Some(_) => {
                self.patience -= 1;
                Some(Self::USUAL)
            }
            None => Some(self.pause),
        }
    }

    /// The thread is the reader's own. tokio's timer has a grain of a millisecond, which is too coarse here.
    pub(super) fn rest(&self) {
        std::thread::sleep(self.pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_of_the_commit_tells_a_backlog_from_live_changes() {
        let begin = |commit: i64| [b"B".as_slice(), &[0; 8], &commit.to_be_bytes(), &[0; 4]].concat();
        let mut pace = Pace::new(None);
        pace.message(1_000_900, &begin(1_000_000));
        assert!(pace.lag <= Pace::BACKLOG);
        pace.message(1_150_000, b"I");
        assert!(pace.lag > Pace::BACKLOG, "a large transaction is sent long after its commit");
        pace.keepalive();
        assert!(pace.lag <= Pace::BACKLOG);
        pace.message(i64::MAX, &begin(i64::MIN));
        assert!(pace.lag > Pace::BACKLOG);
        pace.message(5, b"B short");
    }

    #[test]
    fn live_changes_are_read_at_once_and_bursts_after_brief_rests() {
        let mut pace = Pace::new(Some(1000));
        for (lag, rest) in [
            (0, None),
            (Pace::BEHIND, None),
            (Pace::BEHIND + 1, Some(Pace::BRIEF)),
            (Pace::BACKLOG, Some(Pace::BRIEF)),
            (Pace::BACKLOG + 1, Some(Pace::LONG)),
        ] {
            pace.lag = lag;
            assert_eq!(pace.rest_after(100), rest, "{lag}");
        }
        let mut pace = Pace { lag: Pace::BACKLOG + 1, ..Pace::new(None) };
        assert_eq!(pace.rest_after(100), Some(Pace::USUAL), "no window to fill");
    }

    #[test]
    fn the_pause_finds_the_time_that_the_window_takes_to_fill() {
        let mut pace = Pace::new(Some(1000));
        pace.lag = Pace::BACKLOG + 1;
        assert_eq!(pace.rest_after(100), Some(Pace::LONG));
        assert_eq!((pace.pause, pace.patience), (Pace::FIRST * 9 / 8, Pace::PATIENCE));
        assert_eq!(pace.rest_after(100), Some(Pace::USUAL), "in vain: not again at once");
        assert_eq!((pace.pause, pace.patience), (Pace::FIRST * 9 / 8, Pace::PATIENCE - 1));
        // Each time the window's contents are more than a gulp and less than two.
        for _ in 0..200 {
            pace.rest_after(1000);
            assert_eq!(pace.rest_after(100), Some(pace.pause), "what a gulp has left is no empty window");
        }
        assert_eq!((pace.pause, pace.patience), (Pace::SHORTEST, 0));
        pace.keepalive();
        assert_eq!(pace.rest_after(100), None);
        assert_eq!((pace.pause, pace.patience), (Pace::SHORTEST, 0), "live changes say nothing about it");
    }
}
