//! How far behind each sink is, in bytes of WAL and in seconds since the commit.

use std::collections::VecDeque;
use std::time::SystemTime;

use crate::lsn::Lsn;
use crate::sink::Sink;

/// Commits that are on their way through the sinks, thinned out to one a chunk.
#[derive(Default)]
pub(super) struct Lag {
    commits: VecDeque<(Lsn, i64)>,
}

fn now_micros() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_micros() as i64)
}

impl Lag {
    /// More commits than this are thinned out to every second one.
    const MOST: usize = 4096;

    pub(super) fn committed(&mut self, end_lsn: Lsn, commit_ts: i64) {
        self.commits.push_back((end_lsn, commit_ts));
        if self.commits.len() > Self::MOST {
            let mut keep = false;
            self.commits.retain(|_| {
                keep = !keep;
                keep
            });
        }
    }

    /// Sets the gauges; `seen` is the end of what the stream has brought.
    pub(super) fn measure(&mut self, seen: Lsn, sinks: &[Box<dyn Sink>]) {
        let now = now_micros();
        let mut slowest = seen;
        for sink in sinks {
            let at = sink.stored().checkpoint().resume;
            slowest = slowest.min(at);
            let waiting = self.commits.iter().find(|(end, _)| *end > at);
            let seconds = waiting.map_or(0.0, |(_, ts)| (now - ts).max(0) as f64 / 1e6);
            metrics::gauge!("falaj_produce_lag_bytes", "sink" => sink.name()).set(seen.0.saturating_sub(at.0) as f64);
            metrics::gauge!("falaj_produce_lag_seconds", "sink" => sink.name()).set(seconds);
        }
        while self.commits.front().is_some_and(|(end, _)| *end <= slowest) {
            self.commits.pop_front();
        }
    }
}
