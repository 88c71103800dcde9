//! Outlets of `produce`. Each keeps its own position, atomically with its data.

pub mod columns;
pub mod discard;
pub mod kafka;
pub mod parquet;
mod worker;

use std::sync::Arc;

use async_trait::async_trait;

use crate::error::Result;
use crate::event::{Event, Layout};
use crate::lsn::{Checkpoint, Lsn};

/// Everything committed below this LSN is durable in a sink. Only a sink can make one, and only it may be acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Durable(Lsn);

impl Durable {
    /// The LSN for the slot's feedback.
    pub fn lsn(self) -> Lsn {
        self.0
    }

    /// The lowest of what several sinks have stored. `None` without a sink.
    pub fn lowest(stored: impl IntoIterator<Item = Stored>) -> Option<Self> {
        stored.into_iter().map(|s| Self(s.0.resume)).min()
    }
}

/// A position that a sink has durably, together with everything before it. Only a sink can make one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored(Checkpoint);

impl Stored {
    /// The position of a sink that has never stored anything: nothing may be acknowledged.
    pub const NOTHING: Self = Self(Checkpoint { resume: Lsn(0), partial: None, lookups: None, commit: None });

    /// The position.
    pub fn checkpoint(self) -> Checkpoint {
        self.0
    }

    #[cfg(test)]
    pub(crate) fn for_test(lsn: u64) -> Self {
        Self(Checkpoint::whole(Lsn(lsn)))
    }
}

/// An outlet: takes events in order, makes them durable together with their position.
#[async_trait]
pub trait Sink: Send {
    /// Its name in messages and metrics.
    fn name(&self) -> &'static str;

    /// Makes ready for the events of a layout (a topic must exist, say).
    async fn prepare(&mut self, layout: &Arc<Layout>) -> Result<()>;

    /// Takes one event, unless it is in already.
    ///
    /// # Errors
    /// [`crate::error::Error::Fatal`] for a value that cannot be written.
    fn push(&mut self, event: &Event<'_>) -> Result<()>;

    /// Takes messages and the row that they stand before: a position has all of them or none.
    ///
    /// # Errors
    /// As [`Sink::push`].
    fn push_together(&mut self, messages: &[Event<'_>], row: Option<&Event<'_>>) -> Result<()> {
        messages.iter().try_for_each(|event| self.push(event))?;
        row.map_or(Ok(()), |event| self.push(event))
    }

    /// Whether it may refuse an event ([`crate::error::Error::Refused`]); it is then as it was before. Such a sink is asked before
    /// the others: of what one has taken and another has refused no position could tell.
    fn may_refuse(&self) -> bool {
        false
    }

    /// Everything up to `checkpoint` has been pushed. The sink hands over, commits or seals what is due, and waits
    /// while its queue is full. What is not `proven` (it may be of another history) is due by its size alone, where the sink can
    /// hold it.
    async fn mark(&mut self, checkpoint: Checkpoint, proven: bool) -> Result<()>;

    /// Like [`Sink::mark`], and makes all of it durable now, even if it is nothing but the position.
    async fn flush(&mut self, checkpoint: Checkpoint) -> Result<()>;

    /// Whether nothing has been pushed since the last commit or seal was ordered.
    fn is_empty(&self) -> bool;

    /// What is durable now.
    fn stored(&self) -> Stored;

    /// Waits until [`Sink::stored`] has moved.
    ///
    /// # Errors
    /// Why the sink has failed.
    async fn moved(&mut self) -> Result<()>;

    /// Stops the sink's thread. What was not durable is rolled back.
    async fn stop(&mut self);
}

/// A sink that has been opened: where it stands, `None` when it has never stored a position.
pub struct Opened {
    /// The sink.
    pub sink: Box<dyn Sink>,
    /// Its own position.
    pub position: Option<Stored>,
}
