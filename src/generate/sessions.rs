//! Who acts next: users in sessions, with log-normal gaps within a session and at least half an hour between two.
//!
//! Row `k` of the load happens at `k / rate`. If a running session is due by then, it is its turn; otherwise a session
//! begins.
//! So rows keep the pace exactly, and the number of running sessions settles by itself where their gaps make up that
//! pace.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use rand::Rng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, LogNormal};

use super::catalog::Catalog;
use super::event;

/// Mean gap between two events of a session, in seconds.
const MEAN_GAP: f64 = 90.0;
/// Spread of the gap's logarithm: most are shorter than a minute, some last many.
const SIGMA: f64 = 1.0;
/// A session ends after an event with this probability: eight events in the mean.
const END: f64 = 1.0 / 8.0;
/// Least time between two sessions of a user, in microseconds.
const REST: i64 = 30 * 60 * 1_000_000;
/// A rested user comes back with this probability where a session begins; otherwise a new one comes.
const RETURN: f64 = 0.6;
/// An event is about another content than the one before it with this probability.
const SWITCH: f64 = 0.15;
/// No more users rest than this: beyond it, which takes more than 18,000 rows a second, those who have rested longest do not come
/// back.
const MOST_RESTING: usize = 4 << 20;
/// Above this pace the gaps shrink instead of ever more sessions being kept in memory.
const MOST_ROWS_PER_SECOND: f64 = 10_000.0;

/// The running sessions and the resting users.
#[derive(Debug)]
pub struct Sessions {
    running: BinaryHeap<Reverse<(i64, u32)>>,
    slots: Vec<Session>,
    free: Vec<u32>,
    resting: VecDeque<(i64, u32)>,
    users: u32,
    gaps: LogNormal<f64>,
    gap_factor: f64,
}

/// A user's state within a session.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    /// Number of the user, from 0.
    pub user: u32,
    /// Events so far.
    pub seq: u16,
    /// Index of the content that it is about; `None` only while the catalogue is empty.
    pub subject: Option<u32>,
    /// Index into [`event::DEVICES`].
    pub device: u8,
}

impl Sessions {
    /// As if the load had been running long before: sessions are under way.
    pub fn new(rows_per_second: f64, catalog: &Catalog, rng: &mut StdRng) -> Self {
        let gap_factor = (MOST_ROWS_PER_SECOND / rows_per_second).min(1.0);
        let mean_log = MEAN_GAP.ln() - SIGMA * SIGMA / 2.0;
        let gaps = log_normal(mean_log);
        let mut sessions = Self {
            running: BinaryHeap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            resting: VecDeque::new(),
            users: 0,
            gaps,
            gap_factor,
        };
        // The gap that is under way at a random moment is length-biased, and a uniform part of it is left.
        let biased = log_normal(mean_log + SIGMA * SIGMA);
        let under_way = (rows_per_second * gap_factor * MEAN_GAP * (1.0 - END)) as usize;
        for _ in 0..under_way {
            let left = biased.sample(rng) * rng.random::<f64>();
            let session = sessions.begin(0, catalog, rng);
            let slot = sessions.keep(session);
            sessions.running.push(Reverse(((left * gap_factor * 1e6) as i64, slot)));
        }
        sessions
    }

    /// The session whose user acts at `now` (microseconds after the start).
    pub fn next(&mut self, now: i64, catalog: &Catalog, rng: &mut StdRng) -> Session {
        let slot = match self.running.peek() {
            Some(Reverse((due, slot))) if *due <= now => {
                let slot = *slot;
                self.running.pop();
                slot
            }
            _ => {
                let session = self.begin(now, catalog, rng);
                self.keep(session)
            }
        };
        let session = &mut self.slots[slot as usize];
        session.seq = session.seq.saturating_add(1);
        if rng.random_bool(SWITCH) {
            session.subject = catalog.choose(rng);
        }
        let acted = *session;
        if rng.random_bool(END) {
            if self.resting.len() == MOST_RESTING {
                self.resting.pop_front();
            }
            self.resting.push_back((now + REST, acted.user));
            self.free.push(slot);
        } else {
            let gap = self.gaps.sample(rng) * self.gap_factor * 1e6;
            self.running.push(Reverse((now + gap as i64, slot)));
        }
        acted
    }

    fn begin(&mut self, now: i64, catalog: &Catalog, rng: &mut StdRng) -> Session {
        let rested = self.resting.front().is_some_and(|(until, _)| *until <= now) && rng.random_bool(RETURN);
        let back = if rested { self.resting.pop_front() } else { None };
        let user = match back {
            Some((_, user)) => user,
            None => {
                self.users += 1;
                self.users - 1
            }
        };
        Session { user, seq: 0, subject: catalog.choose(rng), device: event::device(rng) }
    }

    fn keep(&mut self, session: Session) -> u32 {
        match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = session;
                slot
            }
            None => {
                self.slots.push(session);
                (self.slots.len() - 1) as u32
            }
        }
    }
}

fn log_normal(mean_log: f64) -> LogNormal<f64> {
    // Refused only for a spread that is negative or no number, and this one is a constant.
    LogNormal::new(mean_log, SIGMA).expect("a constant, positive spread")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use std::collections::HashMap;

    #[test]
    fn gaps_within_a_session_are_as_stated_and_users_rest_between_two() {
        let mut rng = StdRng::seed_from_u64(9);
        let rate = 50.0;
        let catalog = Catalog::new(Vec::new(), &mut rng);
        let mut sessions = Sessions::new(rate, &catalog, &mut rng);
        let (mut last, mut gaps, mut returns) = (HashMap::new(), Vec::new(), 0);
        for k in 0..250_000_i64 {
            let now = k * 20_000;
            let session = sessions.next(now, &catalog, &mut rng);
            if let Some(before) = last.insert(session.user, now)
                && k > 100_000
            {
                if session.seq > 1 {
                    gaps.push((now - before) as f64 / 1e6)
                } else {
                    returns += 1
                }
                assert!(session.seq > 1 || now - before >= REST);
            }
        }
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        assert!((80.0..100.0).contains(&mean), "mean gap {mean} s");
        assert!(returns > 1000, "{returns} users came back");
    }

    #[test]
    fn no_more_users_rest_than_memory_is_meant_for() {
        let mut rng = StdRng::seed_from_u64(9);
        let catalog = Catalog::new(Vec::new(), &mut rng);
        let mut sessions = Sessions::new(50.0, &catalog, &mut rng);
        sessions.resting = (0..MOST_RESTING as u32).map(|user| (i64::MAX, user)).collect();
        (0..1000).for_each(|k| {
            sessions.next(k * 20_000, &catalog, &mut rng);
        });
        assert_eq!(sessions.resting.len(), MOST_RESTING);
        assert!(sessions.resting.back().is_some_and(|(until, _)| *until < i64::MAX));
    }
}
