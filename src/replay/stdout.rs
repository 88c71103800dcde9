//! The range on stdout: one event a line, the bytes of the Kafka value. (A value of type json may hold a line break of its
//! own; all other values are written without one.)

use std::io::{BufWriter, ErrorKind, Write};

use super::walk::Walk;
use crate::error::{Error, Result};

/// Bytes that are written at once.
const BUFFER: usize = 256 << 10;

/// Writes the range.
///
/// # Errors
/// [`Error::Fatal`] when stdout cannot be written. A pipe whose reader has seen enough is no error.
pub(super) fn run(mut walk: Walk<'_>) -> Result<()> {
    let mut out = BufWriter::with_capacity(BUFFER, std::io::stdout().lock());
    let mut written = Ok(());
    while let Some(item) = walk.next()? {
        written = out.write_all(item.json).and_then(|()| out.write_all(b"\n"));
        if written.is_err() {
            break;
        }
    }
    match written.and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        Err(e) => Err(Error::fatal("writing to stdout", e)),
        Ok(()) => Ok(walk.tally.summary(walk.range, "stdout")),
    }
}
