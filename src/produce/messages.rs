//! Messages of `pg_logical_emit_message` on their way to the sinks.
//!
//! A sink's position can stand between two rows, but not between two messages. So those of a transaction wait, and go to the
//! sinks together with the row that follows, or with the commit.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::event::{Event, Layout};
use crate::lsn::{Lsn, Position};
use crate::message::{self, Sent};
use crate::sink::Sink;

/// What the messages between two rows of one transaction may hold together, in bytes.
const LIMIT: usize = 64 << 20;

/// Those that wait, and how they look.
#[derive(Debug, Default)]
pub(super) struct Messages {
    layout: Option<Arc<Layout>>,
    waiting: Vec<Waiting>,
    bytes: usize,
}

/// A message of its own bytes.
#[derive(Debug)]
struct Waiting {
    at: Position,
    commit_ts: Option<i64>,
    xid: Option<u32>,
    lsn: Lsn,
    prefix: String,
    content: Vec<u8>,
}

impl Waiting {
    fn sent(&self) -> Sent<'_> {
        let Self { at, commit_ts, xid, lsn, ref prefix, ref content } = *self;
        Sent { at, commit_ts, xid, lsn, prefix, content }
    }
}

impl Messages {
    /// Tells the sinks of the messages' layout, before the first of them; says whether it has used the generation.
    pub(super) async fn prepare(&mut self, generation: u32, sinks: &mut [Box<dyn Sink>]) -> Result<bool> {
        if self.layout.is_some() {
            return Ok(false);
        }
        let layout = Arc::new(message::layout(generation));
        for sink in sinks {
            sink.prepare(&layout).await?;
        }
        self.layout = Some(layout);
        Ok(true)
    }

    /// A table of the messages' name would share their topic.
    pub(super) fn refuse_same_name(&self, table: &str) -> Result<()> {
        match self.layout.is_some() && table == message::TABLE {
            false => Ok(()),
            true => Err(message::name_taken()),
        }
    }

    /// Keeps a message until [`Messages::push_waiting`].
    ///
    /// # Errors
    /// [`Error::Refused`] when they are more than memory should hold.
    pub(super) fn wait(&mut self, sent: Sent<'_>) -> Result<()> {
        let Sent { at, commit_ts, xid, lsn, prefix, content } = sent;
        self.bytes += size_of::<Waiting>() + prefix.len() + content.len();
        if self.bytes > LIMIT {
            return Err(Error::refused(
                "logical_messages",
                format!("more than {LIMIT} bytes of messages between two rows of the transaction of {}", at.commit_lsn),
                format!("at most {LIMIT} bytes of them"),
                "send them in several transactions, or with transactional = false; to get past this one, run once with \
                 produce.messages = false: its messages are left out then",
            ));
        }
        self.waiting.push(Waiting { at, commit_ts, xid, lsn, prefix: prefix.to_owned(), content: content.to_vec() });
        Ok(())
    }

    /// Whether none waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Gives all that wait to the sinks, in their order, with the row that they stand before; says how many waited.
    pub(super) fn push_waiting(&mut self, row: Option<&Event<'_>>, sinks: &mut [Box<dyn Sink>]) -> Result<u64> {
        self.push_before(row, sinks)?;
        self.bytes = 0;
        Ok(std::mem::take(&mut self.waiting).len() as u64)
    }

    fn push_before(&self, row: Option<&Event<'_>>, sinks: &mut [Box<dyn Sink>]) -> Result<()> {
        let waiting = self.waiting.iter().map(|message| self.event(message.sent())).collect::<Result<Vec<_>>>()?;
        sinks.iter_mut().try_for_each(|sink| sink.push_together(&waiting, row))
    }

    /// Gives one that belongs to no transaction to the sinks.
    pub(super) fn push(&self, sent: Sent<'_>, sinks: &mut [Box<dyn Sink>]) -> Result<()> {
        let event = self.event(sent)?;
        sinks.iter_mut().try_for_each(|sink| sink.push(&event))
    }

    fn event<'a>(&'a self, sent: Sent<'a>) -> Result<Event<'a>> {
        match &self.layout {
            Some(layout) => Ok(sent.event(layout)),
            None => Err(Error::Fatal(format!("message {} before its layout", sent.lsn))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_between_two_rows_is_refused() {
        let half = vec![b'x'; LIMIT / 2];
        let at = Position { commit_lsn: Lsn(0xFF), ordinal: 0 };
        let sent = Sent { at, commit_ts: Some(0), xid: Some(7), lsn: Lsn(1), prefix: "p", content: &half };
        let mut messages = Messages::default();
        messages.wait(sent).unwrap();
        assert_eq!(messages.wait(sent).unwrap_err().exit_code(), 78);
        assert!(!messages.is_empty());
    }
}
