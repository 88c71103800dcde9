//! Whether the topic is still the one that was joined: asked beside the reading. librdkafka goes on at its old offset in a topic
//! that was deleted and made again, as soon as that has as many records.

use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::group::Group;
use crate::error::Result;

/// How often Kafka is asked.
const EVERY: Duration = Duration::from_secs(5);
/// How long the answer may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is known of the topic's identity.
pub struct Identity {
    known: Option<String>,
    due: Instant,
    asked: Option<JoinHandle<Result<String>>>,
}

impl Identity {
    /// Nothing yet; the first question is due at once.
    pub fn new() -> Self {
        Self { known: None, due: Instant::now(), asked: None }
    }

    /// As [`Identity::has_changed`], asked now: before offsets are relied on. Without an answer it is the same one.
    pub async fn changes_now(&mut self, group: &Group) -> bool {
        match timeout(PATIENCE, group.topic_id()).await {
            Ok(Ok(id)) => self.is_other(id),
            _ => false,
        }
    }

    /// Whether the topic was made anew since the last answer. Asks when it is time, and does not wait.
    pub async fn has_changed(&mut self, group: &Group) -> bool {
        if let Some(asked) = self.asked.take_if(|asked| asked.is_finished()) {
            self.due = Instant::now() + EVERY;
            // Without an answer, or while there is no topic, it is the same one.
            if let Ok(Ok(id)) = asked.await {
                return self.is_other(id);
            }
        }
        if self.asked.is_none() && Instant::now() >= self.due {
            self.asked = Some(tokio::spawn(group.topic_id()));
        }
        false
    }

    fn is_other(&mut self, id: String) -> bool {
        self.known.replace(id.clone()).is_some_and(|known| known != id)
    }
}
