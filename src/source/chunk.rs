//! What the reading thread hands over: whole messages in one buffer.

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use crate::lsn::Lsn;

/// Whole messages as they came off the wire, in one buffer.
pub struct Chunk {
    pub(super) bytes: Bytes,
    pub(super) _share: OwnedSemaphorePermit,
}

/// One CopyData message.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// XLogData: a pgoutput message.
    Data(&'a [u8]),
    /// Primary keepalive: everything committed below `wal_end` has been sent.
    Keepalive {
        /// End of what the server has decoded and handed over.
        wal_end: Lsn,
        /// The server wants feedback now; on a shutdown it waits for `wal_end` to be acknowledged.
        reply: bool,
    },
}

impl Chunk {
    /// Its frames in order. The reader has checked their lengths.
    pub fn frames(&self) -> impl Iterator<Item = Frame<'_>> {
        let mut rest = &self.bytes[..];
        std::iter::from_fn(move || {
            let (payload, after) = split_message(rest)?;
            rest = after;
            frame(payload)
        })
    }
}

/// Payload of the first message and what follows it; the tag has been checked to be `d`.
fn split_message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = u32::from_be_bytes(*bytes.get(1..)?.first_chunk()?) as usize;
    Some((bytes.get(5..=length)?, bytes.get(length + 1..)?))
}

fn frame(payload: &[u8]) -> Option<Frame<'_>> {
    match payload {
        [b'w', rest @ ..] => Some(Frame::Data(rest.get(24..)?)),
        [b'k', rest @ ..] => Some(Frame::Keepalive {
            wal_end: Lsn(u64::from_be_bytes(*rest.first_chunk()?)),
            reply: *rest.get(16)? == 1,
        }),
        _ => None,
    }
}
