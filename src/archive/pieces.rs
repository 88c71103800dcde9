//! A Parquet file → its rows, decoded in pieces of bounded size.

use std::fs::File;

use arrow_array::RecordBatch;
use arrow_schema::ArrowError;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

/// Reads row group by row group: each says how wide its rows are, and holds no more than the archive lets into one. So neither
/// memory nor the 32-bit offsets of an Arrow column run out where a few large rows follow many small ones.
pub struct Pieces {
    file: File,
    footer: ArrowReaderMetadata,
    mask: ProjectionMask,
    rows: usize,
    bytes: usize,
    group: usize,
    reader: Option<ParquetRecordBatchReader>,
}

impl Pieces {
    /// The columns of `mask`, in pieces of about `bytes` of all columns and at most `rows` rows.
    pub fn new(file: File, footer: ArrowReaderMetadata, mask: ProjectionMask, rows: usize, bytes: usize) -> Self {
        Self { file, footer, mask, rows, bytes, group: 0, reader: None }
    }

    /// Opens the next row group; `None` behind the last.
    fn open(&mut self) -> Result<Option<ParquetRecordBatchReader>, ArrowError> {
        let Some(group) = self.footer.metadata().row_groups().get(self.group) else { return Ok(None) };
        let wide = usize::try_from(group.total_byte_size() / group.num_rows().max(1)).unwrap_or(0).max(1);
        let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(self.file.try_clone()?, self.footer.clone())
            .with_row_groups(vec![self.group])
            .with_projection(self.mask.clone())
            .with_batch_size((self.bytes / wide).clamp(1, self.rows));
        self.group += 1;
        Ok(Some(builder.build()?))
    }
}

impl Iterator for Pieces {
    type Item = Result<RecordBatch, ArrowError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(piece) = self.reader.as_mut().and_then(Iterator::next) {
                return Some(piece);
            }
            match self.open() {
                Ok(None) => return None,
                Ok(reader) => self.reader = reader,
                Err(error) => {
                    // The end, for whoever goes on after an error.
                    self.group = usize::MAX;
                    return Some(Err(error));
                }
            }
        }
    }
}
