//! How the reading thread paces itself.

use std::time::{Duration, Instant};

/// Lets the socket fill while much is coming, and reads at once while little is.
#[derive(Default)]
pub(super) struct Pace {
    window: Option<Instant>,
    bytes: usize,
    busy: bool,
}

impl Pace {
    /// Length of the window in which the rate is taken.
    const WINDOW: Duration = Duration::from_millis(5);
    /// A backlog comes faster than this many bytes a window (8 MB/s); live traffic hardly ever does.
    const BUSY: usize = 40_000;
    /// A read of this size has emptied a full socket: no need to wait for more.
    const LARGE: usize = 128 << 10;
    const PAUSE: Duration = Duration::from_micros(500);

    pub(super) fn after(&mut self, read: usize) {
        self.bytes += read;
        let since = *self.window.get_or_insert_with(Instant::now);
        if since.elapsed() >= Self::WINDOW {
            let share = since.elapsed().as_micros() / Self::WINDOW.as_micros();
            self.busy = self.bytes as u128 >= Self::BUSY as u128 * share.max(1);
            (self.window, self.bytes) = (None, 0);
        }
        if self.busy && read < Self::LARGE {
            // The thread is the reader's own. tokio's timer has a grain of a millisecond, which is too coarse here.
            std::thread::sleep(Self::PAUSE);
        }
    }
}
