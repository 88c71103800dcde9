//! A sink that encodes and throws away, to measure the way up to the sinks. It never has anything durable, so nothing is
//! acknowledged and the slot can be read again.

use std::sync::Arc;

use async_trait::async_trait;

use super::{Sink, Stored};
use crate::error::{Error, Result};
use crate::event::{Event, Layout};
use crate::lsn::Checkpoint;

/// Counts what goes through it.
#[derive(Default)]
pub struct Discard {
    buffer: Vec<u8>,
}

#[async_trait]
impl Sink for Discard {
    fn name(&self) -> &'static str {
        "discard"
    }

    async fn prepare(&mut self, _: &Arc<Layout>) -> Result<()> {
        Ok(())
    }

    fn push(&mut self, event: &Event<'_>) -> Result<()> {
        let failed = |e| Error::fatal(format_args!("event {}", event.at), e);
        self.buffer.clear();
        event.write_key(&mut self.buffer).map_err(failed)?;
        event.write_json(&mut self.buffer).map_err(failed)
    }

    async fn mark(&mut self, _: Checkpoint, _: bool) -> Result<()> {
        Ok(())
    }

    async fn flush(&mut self, _: Checkpoint) -> Result<()> {
        Ok(())
    }

    fn is_empty(&self) -> bool {
        true
    }

    fn stored(&self) -> Stored {
        Stored::NOTHING
    }

    async fn moved(&mut self) -> Result<()> {
        std::future::pending().await
    }

    async fn stop(&mut self) {}
}
