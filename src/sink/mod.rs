//! Outlets of `produce`. Each keeps its own position, atomically with its data.

pub mod columns;
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

    /// What a configured sink that is left out of this run has: it holds the acknowledgement back all the same.
    pub(crate) fn of_stored(checkpoint: Checkpoint) -> Self {
        Self(checkpoint.resume)
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

    /// Everything up to `checkpoint` has been pushed. The sink hands over, commits or seals what is due, and waits
    /// while its queue is full.
    async fn mark(&mut self, checkpoint: Checkpoint) -> Result<()>;

    /// Like [`Sink::mark`], and makes all of it durable now, even if it is nothing but the position.
    async fn flush(&mut self, checkpoint: Checkpoint) -> Result<()>;

    /// What is durable now.
    fn durable(&self) -> Durable;

    /// Waits until [`Sink::durable`] has moved.
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
    pub position: Option<Checkpoint>,
}
