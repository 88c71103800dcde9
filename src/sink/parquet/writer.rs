//! The encoding thread: writes, seals and renames batches.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use arrow_array::RecordBatch;
use arrow_schema::DataType;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;

use super::position::sync_dir;
use crate::archive::{self, Batch, IdlePosition};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::event::Layout;
use crate::lsn::{Checkpoint, Lsn, Position, SlotIdentity};
use crate::sink::columns::data_type;
use crate::sink::worker::{Next, Orders};

/// Rows of a row group.
const ROW_GROUP: usize = 128 << 10;
/// Bytes that the encoders of all open files may hold; beyond, the largest ends its row group.
const HELD: usize = 3 << 20;
/// Bytes of decoded rows in a row group, unless one record batch has more by itself. Who reads it may take a column of it in one
/// piece, and neither that nor a page or a dictionary may have more than 2 GiB.
const GROUP: usize = 256 << 20;
/// Bytes of a page, and of a dictionary: each column of each open file holds one of both.
const PAGE: usize = 64 << 10;

/// What the loop asks of the thread.
pub(super) enum Todo {
    Rows(Arc<Layout>, RecordBatch),
    Seal(Checkpoint, Position, Position),
    Idle(Checkpoint),
}

/// How many bytes the encoder has, of which batch: the loop decides when to seal, the thread knows the size.
#[derive(Clone, Default)]
pub(super) struct Encoded(Arc<Mutex<(u64, usize)>>);

impl Encoded {
    fn set(&self, batch: u64, bytes: usize) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (batch, bytes);
    }

    pub(super) fn of(&self, batch: u64) -> usize {
        let (at, bytes) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if at == batch { bytes } else { 0 }
    }
}

/// What lies before the next batch, for its footer.
#[derive(Clone, Copy)]
pub(super) enum Began {
    /// Nothing: the archive begins at this LSN.
    At(Lsn),
    /// A batch that ends with this row.
    After(Position),
}

/// What a batch says of how far its rows reach.
pub(super) enum Progress {
    /// Its footers have the stream's position, and what lies before; an idle position has a file of its own.
    Stream(Began),
    /// A copy of history: the batch holds a file with what this gives for a checkpoint.
    History(Box<dyn Fn(Checkpoint) -> Result<Vec<u8>> + Send>),
}

/// The thread's side: encodes, seals, renames.
pub(super) struct Writer {
    dir: PathBuf,
    work: PathBuf,
    identity: SlotIdentity,
    pipeline: String,
    progress: Progress,
    encoded: Encoded,
    files: Vec<OpenFile>,
    batches: u64,
}

struct OpenFile {
    layout: Arc<Layout>,
    writer: ArrowWriter<File>,
    /// Decoded bytes in the open row group.
    group: usize,
}

impl OpenFile {
    /// Writes rows; those that would make the row group larger than `most` bytes begin another one.
    fn write(&mut self, batch: &RecordBatch, most: usize) -> parquet::errors::Result<()> {
        let bytes = batch.get_array_memory_size();
        if self.group > 0 && self.group + bytes > most {
            self.end_group()?;
        }
        self.group += bytes;
        self.writer.write(batch)
    }

    fn end_group(&mut self) -> parquet::errors::Result<()> {
        self.group = 0;
        self.writer.flush()
    }
}

impl Writer {
    /// Writes to `config`'s archive by way of `work`.
    pub(super) fn new(
        config: &Config,
        work: PathBuf,
        identity: SlotIdentity,
        progress: Progress,
        encoded: Encoded,
    ) -> Self {
        let (dir, pipeline) = (config.archive.dir.clone(), config.pipeline.clone());
        Self { dir, work, identity, pipeline, progress, encoded, files: Vec::new(), batches: 0 }
    }

    pub(super) fn run(mut self, orders: &Orders<Todo>) -> Result<()> {
        let outcome = loop {
            match orders.next(None) {
                Next::Order(order) => {
                    if let Err(error) = self.carry_out(order.what, orders) {
                        break Err(error);
                    }
                }
                Next::Quiet | Next::Gone => break Ok(()),
            }
        };
        // What was not sealed is not in the archive; the stream will bring it again.
        drop(std::mem::take(&mut self.files));
        let _ = fs::remove_dir_all(&self.work);
        outcome
    }

    fn carry_out(&mut self, todo: Todo, orders: &Orders<Todo>) -> Result<()> {
        match todo {
            Todo::Rows(layout, batch) => self.write(&layout, &batch),
            Todo::Seal(checkpoint, first, last) => {
                self.seal(checkpoint, first, last)?;
                orders.durable(checkpoint);
                Ok(())
            }
            Todo::Idle(checkpoint) => {
                self.idle(checkpoint)?;
                orders.durable(checkpoint);
                Ok(())
            }
        }
    }

    /// The batch's directory while it is in the making.
    fn making(&self) -> PathBuf {
        self.work.join(format!("batch-{}", self.batches))
    }

    fn write(&mut self, layout: &Arc<Layout>, batch: &RecordBatch) -> Result<()> {
        let at = match self.files.iter().position(|f| f.layout.generation == layout.generation) {
            Some(at) => at,
            None => {
                let file = self.start_file(layout, batch)?;
                self.files.push(file);
                self.files.len() - 1
            }
        };
        let written = self.files[at].write(batch, GROUP);
        written.map_err(|e| self.encoding(&e))?;
        self.bound_memory()?;
        let bytes = self.files.iter().map(|f| f.writer.bytes_written() + f.writer.in_progress_size()).sum();
        self.encoded.set(self.batches, bytes);
        Ok(())
    }

    fn bound_memory(&mut self) -> Result<()> {
        if self.files.iter().map(|f| f.writer.memory_size()).sum::<usize>() > HELD
            && let Some(largest) = self.files.iter_mut().max_by_key(|f| f.writer.memory_size())
        {
            let ended = largest.end_group();
            ended.map_err(|e| self.encoding(&e))?;
        }
        Ok(())
    }

    fn start_file(&self, layout: &Arc<Layout>, batch: &RecordBatch) -> Result<OpenFile> {
        let part = self.files.iter().filter(|f| f.layout.table == layout.table).count();
        let making = self.making();
        let path = making.join(archive::file_name(&layout.table, part as u32));
        let file = match fs::create_dir(&making) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(e),
            _ => File::create(&path),
        };
        let file = file.map_err(|e| self.io(&e, &path))?;
        let writer =
            ArrowWriter::try_new(file, batch.schema(), Some(properties(layout))).map_err(|e| self.encoding(&e))?;
        Ok(OpenFile { layout: Arc::clone(layout), writer, group: 0 })
    }

    fn seal(&mut self, checkpoint: Checkpoint, first: Position, last: Position) -> Result<()> {
        let started = Instant::now();
        let making = self.making();
        for file in std::mem::take(&mut self.files) {
            self.close(file, checkpoint, first, last)?;
        }
        if let Progress::History(progress) = &self.progress {
            let path = making.join(archive::HISTORY_FILE);
            write_synced(&path, &progress(checkpoint)?).map_err(|e| self.io(&e, &path))?;
        }
        let name = Batch::name(first, last);
        let sealed = sync_dir(&making)
            .and_then(|()| fs::rename(&making, self.dir.join(&name)))
            .and_then(|()| sync_dir(&self.dir));
        sealed.map_err(|e| self.io(&e, &making))?;
        if let Progress::Stream(began) = &mut self.progress {
            *began = Began::After(last);
        }
        self.batches += 1;
        metrics::counter!("falaj_produce_archive_batches_total").increment(1);
        tracing::info!(batch = name, seconds = started.elapsed().as_secs_f64(), "sealed");
        Ok(())
    }

    fn close(&self, file: OpenFile, checkpoint: Checkpoint, first: Position, last: Position) -> Result<()> {
        let OpenFile { layout, mut writer, .. } = file;
        for (key, value) in self.footer(&layout, checkpoint, first, last)? {
            writer.append_key_value_metadata(KeyValue::new(key.to_owned(), value));
        }
        let file = writer.into_inner().map_err(|e| self.encoding(&e))?;
        let size = file.metadata().map(|m| m.len()).unwrap_or_default();
        metrics::counter!("falaj_produce_archive_bytes_total").increment(size);
        file.sync_all().map_err(|e| self.io(&e, &self.work))
    }

    fn footer(
        &self,
        layout: &Layout,
        checkpoint: Checkpoint,
        first: Position,
        last: Position,
    ) -> Result<Vec<(&'static str, String)>> {
        let mut pairs = vec![
            (archive::META_VERSION, archive::VERSION.to_owned()),
            (archive::META_PIPELINE, self.pipeline.clone()),
            (archive::META_SLOT, json(&self.identity)?),
            (archive::META_FIRST, archive::bound(first)),
            (archive::META_LAST, archive::bound(last)),
        ];
        pairs.push((archive::META_TYPES, json(&layout.columns.iter().map(|c| c.ty).collect::<Vec<_>>())?));
        if let Progress::Stream(began) = &self.progress {
            pairs.push((archive::META_RESUME, checkpoint.resume.to_string()));
            pairs.extend(checkpoint.lookups.map(|at| (archive::META_LOOKUPS, archive::bound(at))));
            if let Some(commit) = &checkpoint.commit {
                pairs.push((archive::META_COMMIT, json(commit)?));
            }
            pairs.push(match began {
                Began::At(origin) => (archive::META_ORIGIN, origin.to_string()),
                Began::After(last) => (archive::META_PREVIOUS, archive::bound(*last)),
            });
            if checkpoint.partial.is_none() {
                pairs.push((archive::META_END_LSN, checkpoint.resume.to_string()));
            }
        }
        let name = |at: &usize| layout.columns[*at].name.clone();
        if !layout.primary_key.is_empty() {
            pairs.push((archive::META_PRIMARY_KEY, json(&layout.primary_key.iter().map(name).collect::<Vec<_>>())?));
        }
        pairs.extend(layout.key.as_ref().map(|at| (archive::META_RECORD_KEY, name(at))));
        Ok(pairs)
    }

    fn idle(&self, checkpoint: Checkpoint) -> Result<()> {
        if let Progress::History(_) = self.progress {
            return Ok(());
        }
        let Checkpoint { resume: lsn, lookups, commit, .. } = checkpoint;
        let position = IdlePosition { identity: self.identity.clone(), lsn, lookups, commit };
        let tmp = self.work.join(archive::POSITION_FILE);
        let stored = (|| {
            let file = File::create(&tmp)?;
            serde_json::to_writer(&file, &position)?;
            file.sync_all()?;
            fs::rename(&tmp, self.dir.join(archive::POSITION_FILE))?;
            sync_dir(&self.dir)
        })();
        stored.map_err(|e| self.io(&e, &tmp))
    }

    /// A work directory that has gone was removed by the next owner.
    fn io(&self, e: &std::io::Error, path: &Path) -> Error {
        if e.kind() == ErrorKind::NotFound && !self.work.exists() {
            return Error::Fenced(format!(
                "another owner has taken over the archive: {} has gone",
                self.work.display()
            ));
        }
        Error::fatal(format_args!("archive, {}", path.display()), e)
    }

    fn encoding(&self, e: &parquet::errors::ParquetError) -> Error {
        if !self.work.exists() {
            return Error::Fenced(format!(
                "another owner has taken over the archive: {} has gone",
                self.work.display()
            ));
        }
        Error::fatal("archive, encoding Parquet", e)
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::fatal("writing a footer", e))
}

/// zstd-1; a dictionary only where values repeat; delta encoding for what grows.
fn properties(layout: &Layout) -> WriterProperties {
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(Some(ROW_GROUP))
        .set_data_page_size_limit(PAGE)
        .set_dictionary_page_size_limit(PAGE)
        .set_statistics_enabled(EnabledStatistics::Chunk)
        .set_created_by(format!("falaj {}", env!("CARGO_PKG_VERSION")));
    let growing = ["_commit_ts", "_commit_lsn", "_ordinal"];
    let unique = ["_id"];
    for name in growing {
        properties = properties
            .set_column_dictionary_enabled(ColumnPath::from(name), false)
            .set_column_encoding(ColumnPath::from(name), Encoding::DELTA_BINARY_PACKED);
    }
    for name in unique {
        properties = properties
            .set_column_dictionary_enabled(ColumnPath::from(name), false)
            .set_column_encoding(ColumnPath::from(name), Encoding::DELTA_BYTE_ARRAY);
    }
    for at in &layout.primary_key {
        properties =
            properties.set_column_dictionary_enabled(ColumnPath::from(layout.columns[*at].name.as_str()), false);
    }
    // The encoder cuts decimals of more than 18 digits from one piece of memory a batch. Whatever keeps one of them keeps
    // the piece: a dictionary its values, each row group of the file its least and greatest.
    for wide in layout.columns.iter().filter(|c| matches!(data_type(c.ty), DataType::Decimal128(19.., _))) {
        properties = properties
            .set_column_dictionary_enabled(ColumnPath::from(wide.name.as_str()), false)
            .set_column_statistics_enabled(ColumnPath::from(wide.name.as_str()), EnabledStatistics::None);
    }
    properties.build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::pieces::Pieces;
    use crate::event::{OutColumn, tests::bare};
    use crate::schema::Type;
    use parquet::arrow::ProjectionMask;
    use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};

    #[test]
    fn large_rows_are_alone_in_their_row_group_and_in_what_is_decoded_at_once() {
        let text = |lengths: &[usize]| {
            let texts: arrow_array::StringArray = lengths.iter().map(|n| Some("a".repeat(*n))).collect();
            RecordBatch::try_from_iter([("text", Arc::new(texts) as arrow_array::ArrayRef)]).unwrap()
        };
        let (small, large) = (text(&[1; 300]), text(&[1 << 20]));
        let open = tempfile::tempfile().unwrap();
        let layout = Arc::new(bare());
        let writer =
            ArrowWriter::try_new(open.try_clone().unwrap(), small.schema(), Some(properties(&layout))).unwrap();
        let mut file = OpenFile { layout, writer, group: 0 };
        for batch in [&small, &small, &large, &large, &small] {
            file.write(batch, 1 << 20).unwrap();
        }
        file.writer.close().unwrap();
        let footer = ArrowReaderMetadata::load(&open, ArrowReaderOptions::new()).unwrap();
        let groups: Vec<_> = footer.metadata().row_groups().iter().map(|group| group.num_rows()).collect();
        assert_eq!(groups, [600, 1, 1, 300]);
        let pieces = |rows, bytes| {
            let pieces = Pieces::new(open.try_clone().unwrap(), footer.clone(), ProjectionMask::all(), rows, bytes);
            pieces.map(|piece| piece.unwrap().num_rows()).collect::<Vec<_>>()
        };
        assert_eq!(pieces(512, 1 << 20), [512, 88, 1, 1, 300]);
        assert_eq!(pieces(512, 1), [1; 902]);
    }

    #[test]
    fn what_is_kept_for_a_footer_holds_no_piece_of_a_batch() {
        let numeric = |digits| Type::Numeric(Some((digits, 2)));
        let columns = [("short", numeric(18)), ("wide", numeric(19)), ("note", Type::Text)]
            .map(|(name, ty)| OutColumn::new(name, ty));
        let properties = properties(&Layout { columns: columns.into(), primary_key: vec![], ..bare() });
        let kept = ["short", "wide", "note"].map(|name| {
            let path = ColumnPath::from(name);
            (properties.dictionary_enabled(&path), properties.statistics_enabled(&path))
        });
        let all = (true, EnabledStatistics::Chunk);
        assert_eq!(kept, [all, (false, EnabledStatistics::None), all]);
    }
}
