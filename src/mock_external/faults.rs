//! What goes wrong, by chance or by script.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// One request that goes wrong. Only [`Fault::LostAnswer`] and [`Fault::Slow`] store the event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This answer instead of storing.
    Answer {
        /// HTTP status code.
        status: u16,
        /// Value of `Retry-After`, where there is one.
        retry_after: Option<String>,
        /// The body.
        body: String,
    },
    /// The connection is reset before the event is stored.
    Reset,
    /// The event is stored, then the connection is reset.
    LostAnswer,
    /// The event is stored and answered after this time.
    Slow(Duration),
}

impl Fault {
    /// A bare status.
    pub fn status(status: u16) -> Self {
        Self::Answer { status, retry_after: None, body: String::new() }
    }

    /// A status with `Retry-After`.
    pub fn retry_after(status: u16, value: impl Into<String>) -> Self {
        Self::Answer { status, retry_after: Some(value.into()), body: String::new() }
    }

    /// 200 whose body says "error".
    pub fn error_body() -> Self {
        Self::Answer { status: 200, retry_after: None, body: r#"{"status":"error","message":"simulated"}"#.into() }
    }

    pub(super) fn delay(&self) -> Duration {
        match self {
            Self::Slow(delay) => *delay,
            _ => Duration::ZERO,
        }
    }

    /// One of the mix of `--fail`. One request in a hundred or so is told to wait a whole second.
    fn any(rng: &mut StdRng) -> Self {
        let seconds = if rng.random_ratio(1, 10) { "1" } else { "0" };
        match rng.random_range(0..7) {
            0 => Self::status(500),
            1 => Self::retry_after(503, seconds),
            2 => Self::retry_after(429, "0"),
            3 => Self::status(408),
            4 => Self::error_body(),
            5 => Self::Reset,
            _ => Self::LostAnswer,
        }
    }
}

/// The faults to come: a script for single keys first, then chance.
#[derive(Default)]
pub struct Faults(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    chance: Option<(f64, StdRng)>,
    delay: Duration,
    scripts: HashMap<String, VecDeque<Fault>>,
    everything: Option<Fault>,
}

impl Faults {
    /// A share of all requests, from 0.0 to 1.0, goes wrong; the seed fixes which and how.
    pub fn random(rate: f64, seed: u64) -> Self {
        let chance = Some((rate.clamp(0.0, 1.0), StdRng::seed_from_u64(seed)));
        Self(Mutex::new(Inner { chance, ..Inner::default() }))
    }

    /// The same, with a wait before every answer.
    #[must_use]
    pub fn with_delay(self, delay: Duration) -> Self {
        self.lock().delay = delay;
        self
    }

    /// The next requests with this key meet these faults, one each.
    pub fn script(&self, key: impl Into<String>, faults: impl IntoIterator<Item = Fault>) {
        self.lock().scripts.entry(key.into()).or_default().extend(faults);
    }

    /// The rest of a key's script is dropped.
    pub fn forget(&self, key: &str) {
        self.lock().scripts.remove(key);
    }

    /// Every request meets this fault; `None` ends that.
    pub fn everything(&self, fault: Option<Fault>) {
        self.lock().everything = fault;
    }

    pub(super) fn delay(&self) -> Duration {
        self.lock().delay
    }

    pub(super) fn next(&self, key: &str) -> Option<Fault> {
        let mut inner = self.lock();
        let scripted = inner.scripts.get_mut(key).and_then(VecDeque::pop_front);
        scripted.or_else(|| inner.everything.clone()).or_else(|| {
            let (rate, rng) = inner.chance.as_mut()?;
            let fails = rng.random_bool(*rate);
            fails.then(|| Fault::any(rng))
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_fixes_the_faults_and_a_script_goes_first() {
        let draw = |faults: Faults| (0..200).map(|_| faults.next("k")).collect::<Vec<_>>();
        assert_eq!(draw(Faults::random(0.3, 7)), draw(Faults::random(0.3, 7)));
        assert_eq!(draw(Faults::random(0.0, 7)), vec![None; 200]);
        assert!(draw(Faults::random(1.0, 7)).iter().all(Option::is_some));

        let faults = Faults::random(0.0, 1);
        faults.script("k", [Fault::Reset, Fault::status(400)]);
        assert_eq!((faults.next("other"), faults.next("k")), (None, Some(Fault::Reset)));
        assert_eq!((faults.next("k"), faults.next("k")), (Some(Fault::status(400)), None));
    }
}
