//! The Parquet files of one table: what their footers say, and how several become the one file of a load job.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Array, ArrayRef, RecordBatch, new_null_array};
use arrow_schema::{Field, Schema, SchemaRef};
use gcp_bigquery_client::model::table_field_schema::TableFieldSchema;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::arrow::{ArrowWriter, ProjectionMask};
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use super::columns;
use crate::archive::pieces::Pieces;
use crate::archive::{META_PIPELINE, META_PRIMARY_KEY, META_RECORD_KEY, META_SLOT, META_VERSION, VERSION};
use crate::error::{Error, Result};
use crate::lsn::{Lsn, Position, SlotIdentity};
use crate::message;

/// Most rows of a decoded piece while files are put together …
const PIECE_ROWS: usize = 8192;
/// … and about so many bytes of them.
const PIECE_BYTES: usize = 8 << 20;
/// Rows of a row group of the merged file: bounds what the writer holds in memory.
const GROUP_ROWS: usize = 64 * 1024;

/// The stream that a file's rows come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    /// Pipeline name.
    pub pipeline: String,
    /// Slot identity: positions of another one mean nothing here.
    pub slot: SlotIdentity,
}

/// One Parquet file, open: retention may remove its name meanwhile.
pub struct Source {
    /// For messages.
    pub path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// Where the rows come from.
    pub origin: Origin,
    /// Primary key columns, empty when the table has none.
    pub primary_key: Vec<String>,
    /// The record key column where it is not the primary key.
    pub record_key: Option<String>,
    file: File,
    footer: ArrowReaderMetadata,
}

/// The file of one load job.
pub struct Load {
    /// Its bytes.
    pub file: File,
    /// Size in bytes.
    pub bytes: u64,
    /// Number of rows.
    pub rows: u64,
    /// Position of the first row.
    pub first: Position,
    /// Position of the last row.
    pub last: Position,
}

impl Source {
    /// Opens a file and reads its footer. Blocking.
    ///
    /// # Errors
    /// [`Error::Fatal`] naming the file when it is absent, torn, or lacks what the archive writes into each footer.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |e: &dyn std::fmt::Display| Error::fatal(format_args!("reading {}", path.display()), e);
        let file = File::open(path).map_err(|e| failed(&e))?;
        let bytes = file.metadata().map_err(|e| failed(&e))?.len();
        let footer = ArrowReaderMetadata::load(&file, ArrowReaderOptions::new()).map_err(|e| failed(&e))?;
        let value = |key: &str| {
            let pairs = footer.metadata().file_metadata().key_value_metadata()?;
            pairs.iter().find(|pair| pair.key == key)?.value.clone()
        };
        let needed = |key: &str| value(key).ok_or_else(|| failed(&format_args!("its footer has no {key}")));
        if let Some(version) = value(META_VERSION).filter(|v| v != VERSION) {
            return Err(failed(&format_args!("its footer is of version {version}, this program reads {VERSION}")));
        }
        let json = |key: &str, e: serde_json::Error| failed(&format_args!("{key} in its footer: {e}"));
        let slot = serde_json::from_str(&needed(META_SLOT)?).map_err(|e| json(META_SLOT, e))?;
        let primary_key = match value(META_PRIMARY_KEY) {
            Some(text) => serde_json::from_str(&text).map_err(|e| json(META_PRIMARY_KEY, e))?,
            None => Vec::new(),
        };
        Ok(Self {
            path: path.to_owned(),
            bytes,
            origin: Origin { pipeline: needed(META_PIPELINE)?, slot },
            primary_key,
            record_key: value(META_RECORD_KEY),
            file,
            footer,
        })
    }

    /// Its columns.
    pub fn schema(&self) -> &SchemaRef {
        self.footer.schema()
    }

    /// Whether one load job can take both files.
    pub fn fits(&self, other: &Self) -> bool {
        self.origin == other.origin
            && self.schema().fields() == other.schema().fields()
            && self.primary_key == other.primary_key
    }

    /// Number of rows.
    fn rows(&self) -> u64 {
        self.footer.metadata().row_groups().iter().map(|g| u64::try_from(g.num_rows()).unwrap_or(0)).sum()
    }

    /// First and last position of the commits up to `upto`; `None` when it has no row there.
    ///
    /// Reads the two position columns whole, because the recovery rests on their order.
    fn range(&self, upto: Lsn) -> Result<Option<(Position, Position)>> {
        let mut range: Option<(Position, Position)> = None;
        for piece in self.pieces(Some(["_commit_lsn", "_ordinal"]))? {
            for at in positions(&piece.map_err(|e| self.failed(e))?).map_err(|e| self.failed(e))? {
                let at = at.map_err(|e| self.failed(e))?;
                if at.commit_lsn > upto {
                    return Ok(range);
                }
                range = match range {
                    None => Some((at, at)),
                    Some((first, last)) if at > last || (at == last && self.is_of_messages()) => Some((first, at)),
                    Some((_, last)) => return Err(self.failed(format_args!("row {at} stands after row {last}"))),
                };
            }
        }
        Ok(range)
    }

    /// Messages between two rows stand at one position, and never in two batches.
    fn is_of_messages(&self) -> bool {
        let stem = self.path.file_stem().map(|stem| stem.to_string_lossy());
        stem.is_some_and(|stem| stem.split('.').next() == Some(message::TABLE))
    }

    fn pieces(&self, only: Option<[&str; 2]>) -> Result<Pieces> {
        let file = self.file.try_clone().map_err(|e| self.failed(e))?;
        let mask = only.map(|names| ProjectionMask::columns(self.footer.parquet_schema(), names));
        let mask = mask.unwrap_or_else(ProjectionMask::all);
        Ok(Pieces::new(file, self.footer.clone(), mask, PIECE_ROWS, PIECE_BYTES))
    }

    fn failed(&self, why: impl std::fmt::Display) -> Error {
        Error::fatal(format_args!("reading {}", self.path.display()), why)
    }
}

/// Puts the rows after `after`, of commits up to `upto`, into one file; `None` when there are none. Blocking.
///
/// `fields` are the columns of the job: those of the files under BigQuery's names, then those that only the table has.
/// A single file that needs no change is taken as it is.
///
/// # Errors
/// [`Error::Fatal`] naming the file that cannot be read, or the scratch file that cannot be written.
pub fn prepare(
    sources: &[Source],
    after: Option<Position>,
    upto: Lsn,
    fields: &[TableFieldSchema],
    scratch: &Path,
) -> Result<Option<Load>> {
    let mut parts = Vec::new();
    let mut end = after;
    for source in sources {
        let Some((first, last)) = source.range(upto)?.filter(|&(_, last)| Some(last) > end) else { continue };
        parts.push(Part { source, after: end, upto, first, last });
        end = Some(last);
    }
    match parts.as_slice() {
        [] => Ok(None),
        [part] if part.is_whole() && same_names(part.source.schema(), fields) => part.as_it_is().map(Some),
        parts => merge(parts, fields, scratch).map(Some),
    }
}

/// What a job takes of one file: the rows after a position.
struct Part<'a> {
    source: &'a Source,
    after: Option<Position>,
    upto: Lsn,
    first: Position,
    last: Position,
}

impl Part<'_> {
    fn is_whole(&self) -> bool {
        // Without an upper limit the end need not be looked for.
        Some(self.first) > self.after && self.upto == Lsn(u64::MAX)
    }

    fn as_it_is(&self) -> Result<Load> {
        let file = self.source.file.try_clone().map_err(|e| self.source.failed(e))?;
        let (bytes, rows) = (self.source.bytes, self.source.rows());
        Ok(Load { file, bytes, rows, first: self.first, last: self.last })
    }
}

fn same_names(schema: &Schema, fields: &[TableFieldSchema]) -> bool {
    schema.fields().len() == fields.len() && schema.fields().iter().zip(fields).all(|(a, b)| *a.name() == b.name)
}

fn merge(parts: &[Part<'_>], fields: &[TableFieldSchema], scratch: &Path) -> Result<Load> {
    let failed = |e: &dyn std::fmt::Display| Error::fatal(format_args!("writing {}", scratch.display()), e);
    let file =
        File::options().create(true).truncate(true).read(true).write(true).open(scratch).map_err(|e| failed(&e))?;
    let schema = target_schema(parts[0].source.schema(), fields).map_err(|e| failed(&e))?;
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(Some(GROUP_ROWS))
        .build();
    let handle = file.try_clone().map_err(|e| failed(&e))?;
    let mut writer = ArrowWriter::try_new(handle, schema.clone(), Some(properties)).map_err(|e| failed(&e))?;
    let (mut first, mut last, mut rows) = (None, parts[0].last, 0);
    for part in parts {
        for piece in part.source.pieces(None)? {
            let piece = piece.map_err(|e| part.source.failed(e))?;
            let within = within(&piece, part.after, part.upto).map_err(|e| part.source.failed(e))?;
            let Some((kept, at)) = within else { continue };
            first = first.or(Some(at));
            rows += kept.num_rows() as u64;
            writer.write(&widen(&kept, &schema).map_err(|e| part.source.failed(e))?).map_err(|e| failed(&e))?;
        }
        last = part.last;
    }
    writer.close().map_err(|e| failed(&e))?;
    let bytes = file.metadata().map_err(|e| failed(&e))?.len();
    let first = first.ok_or_else(|| failed(&"no row is left"))?;
    Ok(Load { file, bytes, rows, first, last })
}

/// The rows of a piece after a position and up to an LSN, with the first one's position. Rows stand in order.
fn within(piece: &RecordBatch, after: Option<Position>, upto: Lsn) -> Result<Option<(RecordBatch, Position)>, String> {
    let (mut first, mut rows) = (None, 0);
    for (row, at) in positions(piece)?.enumerate() {
        let at = at?;
        if at.commit_lsn > upto {
            break;
        }
        if Some(at) > after {
            first = first.or(Some((row, at)));
            rows += 1;
        }
    }
    Ok(first.map(|(row, at)| (piece.slice(row, rows), at)))
}

fn positions(piece: &RecordBatch) -> Result<impl Iterator<Item = Result<Position, String>>, String> {
    let column = |name: &str| {
        let column = piece.column_by_name(name).ok_or_else(|| format!("it has no column {name}"))?;
        let column = column.as_primitive_opt::<Int64Type>().ok_or_else(|| format!("its column {name} is not int64"))?;
        if column.null_count() > 0 { Err(format!("its column {name} has NULLs")) } else { Ok(column.clone()) }
    };
    let (lsns, ordinals) = (column("_commit_lsn")?, column("_ordinal")?);
    Ok((0..piece.num_rows()).map(move |row| {
        let part = |n: i64| u64::try_from(n).map_err(|_| format!("row {row} has a negative position, {n}"));
        Ok(Position { commit_lsn: Lsn(part(lsns.value(row))?), ordinal: part(ordinals.value(row))? })
    }))
}

/// The files' columns under the job's names, then NULL columns for what only the table has.
fn target_schema(from: &Schema, fields: &[TableFieldSchema]) -> Result<SchemaRef, String> {
    let named = from.fields().iter().zip(fields).map(|(f, to)| Ok(f.as_ref().clone().with_name(&to.name)));
    let extra = fields.iter().skip(from.fields().len()).map(|f| {
        let data_type =
            columns::null_type(&f.r#type).ok_or_else(|| format!("no NULL column of type {:?}", f.r#type))?;
        Ok(Field::new(&f.name, data_type, true))
    });
    Ok(Arc::new(Schema::new(named.chain(extra).collect::<Result<Vec<_>, String>>()?)))
}

fn widen(piece: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, arrow_schema::ArrowError> {
    let extra = schema.fields().iter().skip(piece.num_columns());
    let extra = extra.map(|f| -> ArrayRef { new_null_array(f.data_type(), piece.num_rows()) });
    RecordBatch::try_new(schema.clone(), piece.columns().iter().cloned().chain(extra).collect())
}
