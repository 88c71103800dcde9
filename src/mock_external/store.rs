//! What the simulator has received.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use sha2::{Digest, Sha256};

/// The idempotency store, and counters.
#[derive(Default)]
pub struct Received(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    hashes: HashMap<String, [u8; 32]>,
    order: Vec<String>,
    requests: u64,
    duplicates: u64,
    conflicts: u64,
}

/// Answer of `GET /received`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Different keys that are stored.
    pub unique: u64,
    /// Every POST, also those answered with a fault.
    pub requests: u64,
    /// Stored keys that came again with the same bytes.
    pub duplicates: u64,
    /// Stored keys that came again with other bytes.
    pub conflicts: u64,
}

/// What storing has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    First,
    Again,
    Conflict,
}

impl Received {
    /// The figures at this moment.
    pub fn counts(&self) -> Counts {
        let inner = self.lock();
        let Inner { requests, duplicates, conflicts, .. } = *inner;
        Counts { unique: inner.order.len() as u64, requests, duplicates, conflicts }
    }

    /// The keys in the order of their first storing.
    pub fn ids(&self) -> Vec<String> {
        self.lock().order.clone()
    }

    pub(super) fn count_request(&self) {
        self.lock().requests += 1;
    }

    pub(super) fn store(&self, key: &str, body: &[u8]) -> Stored {
        let hash: [u8; 32] = Sha256::digest(body).into();
        let mut inner = self.lock();
        match inner.hashes.get(key) {
            Some(first) if *first == hash => {
                inner.duplicates += 1;
                Stored::Again
            }
            Some(_) => {
                inner.conflicts += 1;
                Stored::Conflict
            }
            None => {
                inner.hashes.insert(key.to_owned(), hash);
                inner.order.push(key.to_owned());
                Stored::First
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_bytes_are_a_repeat_and_other_bytes_a_conflict() {
        let received = Received::default();
        let stored = [("a", "1"), ("b", "1"), ("a", "1"), ("a", "2"), ("a", "1")];
        let stored = stored.map(|(key, body)| received.store(key, body.as_bytes()));
        assert_eq!(stored, [Stored::First, Stored::First, Stored::Again, Stored::Conflict, Stored::Again]);
        assert_eq!(received.counts(), Counts { unique: 2, requests: 0, duplicates: 2, conflicts: 1 });
        assert_eq!(received.ids(), ["a", "b"]);
    }
}
