//! How far behind the board's reader is, and whether its topic is still the same one: asked beside the reading.
//!
//! A broker answers one connection in order, so that an answer waits behind the fetch before it: half a second each
//! where nothing is written. Records must not wait with it.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::input::Input;
use crate::error::{Error, Result};
use crate::kafka::blocking;

/// How often Kafka is asked.
pub const EVERY: Duration = Duration::from_secs(5);

/// What Kafka said.
pub struct Answer {
    /// The topic's id.
    pub topic_id: String,
    /// The last stable offset of each partition that was asked for.
    pub ends: BTreeMap<i32, i64>,
}

/// Asks about these partitions now.
///
/// # Errors
/// [`Error::Unreachable`].
pub async fn answer(input: &Arc<Input>, partitions: Vec<i32>) -> Result<Answer> {
    let input = Arc::downgrade(input);
    blocking(move || ask(&input, &partitions)).await
}

/// Asks from time to time, while the loop goes on; at most one question at a time.
pub struct Inquiry {
    input: Arc<Input>,
    due: Instant,
    under_way: Option<JoinHandle<Result<Answer>>>,
}

impl Inquiry {
    /// The first question is due at once.
    pub fn new(input: Arc<Input>) -> Self {
        Self { input, due: Instant::now(), under_way: None }
    }

    /// Asks as soon as may be, not only when it is time.
    pub fn hurry(&mut self) {
        self.due = Instant::now();
    }

    /// Asks about these partitions when it is time, and gives the answer when there is one. Does not wait.
    pub fn poll(&mut self, runtime: &Handle, partitions: impl Iterator<Item = i32>) -> Option<Result<Answer>> {
        if let Some(answer) = self.under_way.take_if(|asked| asked.is_finished()) {
            self.due = Instant::now() + EVERY;
            let answer = runtime.block_on(answer);
            return Some(answer.unwrap_or_else(|e| Err(Error::fatal("asking Kafka", e))));
        }
        if self.under_way.is_none() && Instant::now() >= self.due {
            let (input, partitions): (_, Vec<i32>) = (Arc::downgrade(&self.input), partitions.collect());
            self.under_way = Some(runtime.spawn_blocking(move || ask(&input, &partitions)));
        }
        None
    }
}

/// Where the reader has ended meanwhile, its client is not held back from leaving the group longer than one answer takes.
fn ask(input: &Weak<Input>, partitions: &[i32]) -> Result<Answer> {
    let input = || input.upgrade().ok_or_else(|| Error::fatal("asking Kafka", "the board's reader has ended"));
    let topic_id = input()?.topic_id()?;
    let ends = partitions.iter().map(|p| Ok((*p, input()?.watermarks(*p)?.1))).collect::<Result<_>>()?;
    Ok(Answer { topic_id, ends })
}
