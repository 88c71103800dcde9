//! The archive sink: one batch = one directory of Parquet files, renamed into place as a whole.
//!
//! Listing the archive is the position. A directory does not fence a zombie as Kafka does, so each owner writes in a
//! work directory of its own and removes everybody else's before it reads the position: a zombie's next rename fails.

mod history;
mod position;
mod writer;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use async_trait::async_trait;

use super::columns::Rows;
use super::worker::Worker;
use super::{Opened, Sink, Stored};
use crate::archive::{self, Batch};
use crate::config::Config;
use crate::enrich::state::require_header;
use crate::error::{Error, Result};
use crate::event::{Event, Layout};
use crate::lsn::{Checkpoint, Lsn, Position, SlotIdentity};
pub use history::{fence, open_history, read_history};
use position::{not_writable, position, sync_dir, take_over};
use writer::{Began, Encoded, Progress, Todo, Writer};

/// Rows handed to the encoder at once; a fixed number, so that the same range gives the same pages.
const ROWS: usize = 1024;
/// … or as soon as their cells hold this many bytes …
const BYTES: usize = 1 << 20;
/// … or those of all tables so many: then the table that holds the most goes first.
const HELD: usize = 2 << 20;

/// The loop's side of the sink.
pub struct ParquetSink {
    worker: Worker<Todo>,
    start: Checkpoint,
    seal_bytes: usize,
    seal_after: Duration,
    encoded: Encoded,
    /// Number of the batch that is being filled.
    batch: u64,
    tables: Vec<Option<(Arc<Layout>, Rows)>>,
    /// Bytes in the rows of all tables.
    held: usize,
    full: Vec<(Arc<Layout>, RecordBatch)>,
    open: Option<Open>,
}

/// The batch that is being filled.
struct Open {
    first: Position,
    last: Position,
    since: Instant,
}

/// Removes the work directories of earlier owners and reads the position. Call it only while the slot is held.
///
/// # Errors
/// [`Error::Refused`] for a directory that is not writable or holds another stream; [`Error::Fatal`] from the disk.
pub fn open(config: &Config, identity: &SlotIdentity) -> Result<Opened> {
    let dir = config.archive.dir.clone();
    // Whose archive it is comes first: the owner of another one is not put out of it.
    position(config, identity)?;
    let work = take_over(&dir, archive::WORK_PREFIX).map_err(|e| not_writable(&dir, &e))?;
    let position = position(config, identity)?;
    let began = match archive::list(&dir)?.into_iter().rfind(Batch::is_streamed) {
        Some(batch) => Began::After(batch.last),
        None => Began::At(require_header(&config.state.dir, &identity.slot)?.origin),
    };
    // Below every LSN: a sink without a position has nothing, and nothing of it may be acknowledged.
    let start = position.unwrap_or(Checkpoint::whole(Lsn(0)));
    let sink = Box::new(ParquetSink::start(config, work, identity, Progress::Stream(began), start)?);
    Ok(Opened { sink, position: position.map(Stored) })
}

/// Reads the archive's position without taking it over.
///
/// # Errors
/// [`Error::Refused`] for an archive of another stream or with an unreadable last batch.
pub fn peek(config: &Config, identity: &SlotIdentity) -> Result<Option<Stored>> {
    let (dir, position) = (&config.archive.dir, position(config, identity)?);
    // What a killed owner has renamed into place may not be on the disk yet, and is believed to be.
    if position.is_some() {
        sync_dir(dir).map_err(|e| Error::fatal(format_args!("syncing {}", dir.display()), e))?;
    }
    Ok(position.map(Stored))
}

#[async_trait]
impl Sink for ParquetSink {
    fn name(&self) -> &'static str {
        "archive"
    }

    async fn prepare(&mut self, layout: &Arc<Layout>) -> Result<()> {
        // Rows of an older schema of the same table come first, in a file of their own.
        for old in 0..self.tables.len() {
            if self.tables[old].as_ref().is_some_and(|(old, _)| old.table == layout.table) {
                self.cut(old)?;
                self.tables[old] = None;
            }
        }
        let index = layout.generation as usize;
        self.tables.resize_with(self.tables.len().max(index + 1), || None);
        self.tables[index] = Some((Arc::clone(layout), Rows::new(layout)));
        Ok(())
    }

    fn push(&mut self, event: &Event<'_>) -> Result<()> {
        if self.start.has(event.at) {
            return Ok(());
        }
        let index = event.layout.generation as usize;
        let bytes = event.bytes();
        if bytes >= BYTES {
            // It stands alone: the longest value that Postgres can send (1 GiB of bytea, twice that as text) takes nearly all
            // that the 32-bit offsets of an Arrow column reach.
            self.cut(index)?;
        }
        let Some((_, rows)) = self.tables.get_mut(index).and_then(Option::as_mut) else {
            return Err(Error::Fatal(format!("event {} before its table was prepared", event.at)));
        };
        let before = rows.bytes;
        rows.push(event, bytes)?;
        self.held += rows.bytes - before;
        if rows.len() >= ROWS || rows.bytes >= BYTES {
            self.cut(index)?;
        } else if self.held >= HELD {
            let bytes = |index: &usize| self.tables[*index].as_ref().map(|(_, rows)| rows.bytes);
            if let Some(largest) = (0..self.tables.len()).max_by_key(bytes) {
                self.cut(largest)?;
            }
        }
        match &mut self.open {
            Some(open) => open.last = event.at,
            None => self.open = Some(Open { first: event.at, last: event.at, since: Instant::now() }),
        }
        Ok(())
    }

    async fn mark(&mut self, checkpoint: Checkpoint, proven: bool) -> Result<()> {
        let checkpoint = checkpoint.max(self.start);
        self.hand_over().await?;
        let Some(open) = &self.open else { return Ok(()) };
        let old = proven && checkpoint.partial.is_none() && open.since.elapsed() >= self.seal_after;
        if old || self.encoded.of(self.batch) >= self.seal_bytes {
            return self.flush(checkpoint).await;
        }
        Ok(())
    }

    async fn flush(&mut self, checkpoint: Checkpoint) -> Result<()> {
        let checkpoint = checkpoint.max(self.start);
        for index in 0..self.tables.len() {
            self.cut(index)?;
        }
        self.hand_over().await?;
        let todo = match self.open.take() {
            Some(Open { first, last, .. }) => {
                self.batch += 1;
                Todo::Seal(checkpoint, first, last)
            }
            None => Todo::Idle(checkpoint),
        };
        self.worker.send(todo, 1).await
    }

    fn is_empty(&self) -> bool {
        self.open.is_none()
    }

    fn stored(&self) -> Stored {
        self.worker.stored()
    }

    async fn moved(&mut self) -> Result<()> {
        self.worker.moved().await
    }

    async fn stop(&mut self) {
        let _ = self.worker.stop().await;
    }
}

impl ParquetSink {
    /// Starts the encoding thread.
    fn start(
        config: &Config,
        work: PathBuf,
        identity: &SlotIdentity,
        progress: Progress,
        start: Checkpoint,
    ) -> Result<Self> {
        let encoded = Encoded::default();
        let writer = Writer::new(config, work, identity.clone(), progress, encoded.clone());
        let worker = Worker::spawn("archive", config.produce.queue_bytes.0, start, move |orders| writer.run(&orders))?;
        let (seal_bytes, seal_after) = (config.archive.seal_bytes.0, config.archive.seal_after.0);
        let (batch, tables, held, full, open) = Default::default();
        Ok(Self { worker, start, seal_bytes, seal_after, encoded, batch, tables, held, full, open })
    }

    /// Makes a record batch of a table's rows.
    fn cut(&mut self, index: usize) -> Result<()> {
        if let Some(Some((layout, rows))) = self.tables.get_mut(index)
            && !rows.is_empty()
        {
            self.held -= rows.bytes;
            self.full.push((Arc::clone(layout), rows.take()?));
        }
        Ok(())
    }

    async fn hand_over(&mut self) -> Result<()> {
        for (layout, batch) in std::mem::take(&mut self.full) {
            let bytes = batch.get_array_memory_size();
            self.worker.send(Todo::Rows(layout, batch), bytes).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Op;
    use crate::event::tests::{bare, event};
    use crate::pgoutput::Cell;

    #[tokio::test]
    async fn a_row_that_fills_a_record_batch_stands_alone_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::load(None, []).unwrap();
        config.archive.dir = dir.path().to_owned();
        let identity = SlotIdentity { system_id: "7".into(), timeline: 1, slot: "falaj".into() };
        let progress = Progress::Stream(Began::At(Lsn(0)));
        let start = Checkpoint::whole(Lsn(0));
        let mut sink = ParquetSink::start(&config, dir.path().join("work"), &identity, progress, start).unwrap();
        let layout = Arc::new(bare());
        sink.prepare(&layout).await.unwrap();
        let (short, long) = (vec![b'a'; 1], vec![b'a'; BYTES]);
        for note in [&short, &short, &long, &short] {
            sink.push(&event(&layout, Op::Create, &[Cell::Text(b"1"), Cell::Null, Cell::Text(note)])).unwrap();
        }
        let rows = |sink: &ParquetSink| sink.full.iter().map(|(_, batch)| batch.num_rows()).collect::<Vec<_>>();
        assert_eq!(rows(&sink), [2, 1]);
        sink.cut(0).unwrap();
        assert_eq!((rows(&sink), sink.held), (vec![2, 1, 1], 0));
        sink.stop().await;
    }
}
