//! The archive sink: one batch = one directory of Parquet files, renamed into place as a whole.
//!
//! Listing the archive is the position. A directory does not fence a zombie as Kafka does, so each owner writes in a
//! work directory of its own and removes everybody else's before it reads the position: a zombie's next rename fails.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use arrow_array::RecordBatch;
use async_trait::async_trait;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::metadata::{KeyValue, ParquetMetaDataReader};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;

use super::columns::Rows;
use super::worker::{Next, Orders, Worker};
use super::{Opened, Sink, Stored};
use crate::archive::{self, Batch, IdlePosition};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::event::{Event, Layout};
use crate::lsn::{Checkpoint, Lsn, Position, SlotIdentity};

/// Rows handed to the encoder at once; a fixed number, so that the same range gives the same pages.
const ROWS: usize = 8192;
/// … or as soon as their cells hold this many bytes.
const BYTES: usize = 2 << 20;
/// Rows of a row group: bounds what the encoder holds in memory.
const ROW_GROUP: usize = 128 << 10;

enum Todo {
    Rows(Arc<Layout>, RecordBatch),
    Seal(Checkpoint, Position, Position),
    Idle(Checkpoint),
}

/// The loop's side of the sink.
pub struct ParquetSink {
    worker: Worker<Todo>,
    start: Checkpoint,
    seal_bytes: usize,
    seal_after: std::time::Duration,
    encoded: Encoded,
    /// Number of the batch that is being filled.
    batch: u64,
    tables: Vec<Option<(Arc<Layout>, Rows)>>,
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
    let work = take_over(&dir).map_err(|e| not_writable(&dir, &e))?;
    let position = position(config, identity)?;
    let encoded = Encoded::default();
    let writer = Writer {
        dir,
        work,
        identity: identity.clone(),
        pipeline: config.pipeline.clone(),
        encoded: encoded.clone(),
        files: Vec::new(),
        batches: 0,
    };
    // Below every LSN: a sink without a position has nothing, and nothing of it may be acknowledged.
    let start = position.unwrap_or(Checkpoint::whole(Lsn(0)));
    let worker = Worker::spawn("archive", config.produce.queue_bytes.0, start, move |orders| writer.run(&orders))?;
    let (seal_bytes, seal_after) = (config.archive.seal_bytes.0, config.archive.seal_after.0);
    let (batch, tables, full, open) = Default::default();
    let sink = Box::new(ParquetSink { worker, start, seal_bytes, seal_after, encoded, batch, tables, full, open });
    Ok(Opened { sink, position: position.map(Stored) })
}

/// Reads the archive's position without taking it over.
///
/// # Errors
/// [`Error::Refused`] for an archive of another stream or with an unreadable last batch.
pub fn peek(config: &Config, identity: &SlotIdentity) -> Result<Option<Stored>> {
    Ok(position(config, identity)?.map(Stored))
}

fn position(config: &Config, identity: &SlotIdentity) -> Result<Option<Checkpoint>> {
    let dir = &config.archive.dir;
    let last = archive::list(dir)?.pop().map(|batch| batch_position(&batch, identity)).transpose()?;
    let idle = idle_position(dir, identity)?;
    // An idle position is stored only at a transaction boundary, so the later of the two has everything of the other.
    Ok(match (last, idle) {
        (Some(batch), Some(idle))
            if idle.resume >= batch.resume && batch.partial.is_none_or(|p| p.commit_lsn < idle.resume) =>
        {
            Some(idle)
        }
        (batch, idle) => batch.or(idle),
    })
}

#[async_trait]
impl Sink for ParquetSink {
    fn name(&self) -> &'static str {
        "archive"
    }

    async fn prepare(&mut self, layout: &Arc<Layout>) -> Result<()> {
        // Rows of an older schema of the same table come first, in a file of their own.
        for slot in &mut self.tables {
            if let Some((old, mut rows)) = slot.take_if(|(old, _)| old.table == layout.table)
                && !rows.is_empty()
            {
                self.full.push((old, rows.take()?));
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
        let Some((layout, rows)) = self.tables.get_mut(event.layout.generation as usize).and_then(Option::as_mut)
        else {
            return Err(Error::Fatal(format!("event {} before its table was prepared", event.at)));
        };
        rows.push(event)?;
        if rows.len() >= ROWS || rows.bytes >= BYTES {
            self.full.push((Arc::clone(layout), rows.take()?));
        }
        match &mut self.open {
            Some(open) => open.last = event.at,
            None => self.open = Some(Open { first: event.at, last: event.at, since: Instant::now() }),
        }
        Ok(())
    }

    async fn mark(&mut self, checkpoint: Checkpoint) -> Result<()> {
        let checkpoint = checkpoint.max(self.start);
        self.hand_over().await?;
        let Some(open) = &self.open else { return Ok(()) };
        let old = checkpoint.partial.is_none() && open.since.elapsed() >= self.seal_after;
        if old || self.encoded.of(self.batch) >= self.seal_bytes {
            return self.flush(checkpoint).await;
        }
        Ok(())
    }

    async fn flush(&mut self, checkpoint: Checkpoint) -> Result<()> {
        let checkpoint = checkpoint.max(self.start);
        for (layout, rows) in self.tables.iter_mut().flatten() {
            if !rows.is_empty() {
                self.full.push((Arc::clone(layout), rows.take()?));
            }
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
    async fn hand_over(&mut self) -> Result<()> {
        for (layout, batch) in std::mem::take(&mut self.full) {
            let bytes = batch.get_array_memory_size();
            self.worker.send(Todo::Rows(layout, batch), bytes).await?;
        }
        Ok(())
    }
}

/// How many bytes the encoder has, of which batch: the loop decides when to seal, the thread knows the size.
#[derive(Clone, Default)]
struct Encoded(Arc<Mutex<(u64, usize)>>);

impl Encoded {
    fn set(&self, batch: u64, bytes: usize) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (batch, bytes);
    }

    fn of(&self, batch: u64) -> usize {
        let (at, bytes) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if at == batch { bytes } else { 0 }
    }
}

/// The thread's side: encodes, seals, renames.
struct Writer {
    dir: PathBuf,
    work: PathBuf,
    identity: SlotIdentity,
    pipeline: String,
    encoded: Encoded,
    files: Vec<OpenFile>,
    batches: u64,
}

struct OpenFile {
    layout: Arc<Layout>,
    writer: ArrowWriter<File>,
}

impl Writer {
    fn run(mut self, orders: &Orders<Todo>) -> Result<()> {
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
        self.files[at].writer.write(batch).map_err(|e| self.encoding(&e))?;
        let bytes = self.files.iter().map(|f| f.writer.bytes_written() + f.writer.in_progress_size()).sum();
        self.encoded.set(self.batches, bytes);
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
        Ok(OpenFile { layout: Arc::clone(layout), writer })
    }

    fn seal(&mut self, checkpoint: Checkpoint, first: Position, last: Position) -> Result<()> {
        let started = Instant::now();
        let making = self.making();
        for file in std::mem::take(&mut self.files) {
            self.close(file, checkpoint, first, last)?;
        }
        let name = Batch::name(first, last);
        let sealed = sync_dir(&making)
            .and_then(|()| fs::rename(&making, self.dir.join(&name)))
            .and_then(|()| sync_dir(&self.dir));
        sealed.map_err(|e| self.io(&e, &making))?;
        self.batches += 1;
        metrics::counter!("falaj_produce_archive_batches_total").increment(1);
        tracing::info!(batch = name, seconds = started.elapsed().as_secs_f64(), "sealed");
        Ok(())
    }

    fn close(&self, file: OpenFile, checkpoint: Checkpoint, first: Position, last: Position) -> Result<()> {
        let OpenFile { layout, mut writer } = file;
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
            (archive::META_RESUME, checkpoint.resume.to_string()),
        ];
        if checkpoint.partial.is_none() {
            pairs.push((archive::META_END_LSN, checkpoint.resume.to_string()));
        }
        let name = |at: &usize| layout.columns[*at].name.clone();
        if !layout.primary_key.is_empty() {
            pairs.push((archive::META_PRIMARY_KEY, json(&layout.primary_key.iter().map(name).collect::<Vec<_>>())?));
        }
        pairs.extend(layout.key.as_ref().map(|at| (archive::META_RECORD_KEY, name(at))));
        Ok(pairs)
    }

    fn idle(&self, checkpoint: Checkpoint) -> Result<()> {
        let position = IdlePosition { identity: self.identity.clone(), lsn: checkpoint.resume };
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

fn json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::fatal("writing a footer", e))
}

/// zstd-1; a dictionary only where values repeat; delta encoding for what grows.
fn properties(layout: &Layout) -> WriterProperties {
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(Some(ROW_GROUP))
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
    properties.build()
}

/// Creates the archive and this owner's work directory, and removes those of earlier owners.
fn take_over(dir: &Path) -> std::io::Result<PathBuf> {
    fs::create_dir_all(dir)?;
    let epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let work = dir.join(format!("{}{epoch}-{}", archive::WORK_PREFIX, std::process::id()));
    fs::create_dir(&work)?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let foreign = entry.file_name().to_string_lossy().starts_with(archive::WORK_PREFIX) && entry.path() != work;
        if foreign {
            remove_work(&entry.path(), &work)?;
        }
    }
    sync_dir(dir)?;
    Ok(work)
}

/// Moves the directory away first: a rename takes it from a zombie in one step, removing it file by file does not.
fn remove_work(theirs: &Path, ours: &Path) -> std::io::Result<()> {
    let grave = ours.join("fenced");
    match fs::rename(theirs, &grave) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(()) => fs::remove_dir_all(&grave),
    }
}

fn not_writable(dir: &Path, e: &std::io::Error) -> Error {
    Error::refused(
        "archive_dir",
        format!("{}: {e}", dir.display()),
        "a directory that this user may write",
        "mend its rights, or choose another archive.dir",
    )
}

fn sync_dir(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Position after a batch, from the footer of its first file.
fn batch_position(batch: &Batch, identity: &SlotIdentity) -> Result<Checkpoint> {
    let refuse = |found: String| {
        Error::refused(
            "archive_position",
            format!("{}: {found}", batch.path.display()),
            format!("a sealed batch of {identity}"),
            "give archive.dir another directory, or put back the batch or the slot that is meant",
        )
    };
    let file = batch.files()?.into_iter().next().ok_or_else(|| refuse("no Parquet file".into()))?;
    let open = File::open(&file.path).map_err(|e| refuse(e.to_string()))?;
    let metadata =
        ParquetMetaDataReader::new().parse_and_finish(&open).map_err(|e| refuse(format!("its footer: {e}")))?;
    let pairs = metadata.file_metadata().key_value_metadata().map_or(&[][..], Vec::as_slice);
    let value = |key: &str| pairs.iter().find(|p| p.key == key).and_then(|p| p.value.as_deref());
    let slot: Option<SlotIdentity> = value(archive::META_SLOT).and_then(|s| serde_json::from_str(s).ok());
    match slot {
        Some(slot) if slot == *identity => {}
        Some(slot) => return Err(refuse(format!("a batch of {slot}"))),
        None => return Err(refuse("no slot identity in its footer".into())),
    }
    let lsn = |key| value(key).and_then(|v| v.parse::<Lsn>().ok());
    match (lsn(archive::META_END_LSN), lsn(archive::META_RESUME)) {
        (Some(end), _) => Ok(Checkpoint::whole(end)),
        (None, Some(resume)) => Ok(Checkpoint { resume, partial: Some(batch.last) }),
        (None, None) => Err(refuse("no position in its footer".into())),
    }
}

fn idle_position(dir: &Path, identity: &SlotIdentity) -> Result<Option<Checkpoint>> {
    let path = dir.join(archive::POSITION_FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::fatal(format_args!("reading {}", path.display()), e)),
    };
    let refuse = |found: String| {
        Error::refused(
            "archive_position",
            format!("{}: {found}", path.display()),
            format!("a position of {identity}"),
            "give archive.dir another directory, or put back the slot that is meant",
        )
    };
    let idle: IdlePosition = serde_json::from_slice(&text).map_err(|e| refuse(e.to_string()))?;
    if idle.identity != *identity {
        return Err(refuse(format!("the position of {}", idle.identity)));
    }
    Ok(Some(Checkpoint::whole(idle.lsn)))
}
