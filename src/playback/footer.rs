//! What a file's footer says of its rows.

use std::fs::File;
use std::path::Path;

use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use serde::de::DeserializeOwned;

use crate::archive::{self, Batch};
use crate::error::{Error, Result};
use crate::lsn::{Lsn, Position, SlotIdentity};
use crate::schema::Type;

/// The footer's own part: see the `META_` keys of [`crate::archive`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Pipeline name.
    pub pipeline: String,
    /// The stream that the positions belong to.
    pub slot: SlotIdentity,
    /// Where replication resumes after the batch.
    pub resume: Lsn,
    /// Whether the last transaction is only half in.
    pub partial: bool,
    /// Where the archive begins, in its first batch.
    pub origin: Option<Lsn>,
    /// The last row before this batch, in every other one.
    pub previous: Option<Position>,
    /// Primary key columns.
    pub primary_key: Vec<String>,
    /// The configured record key.
    pub record_key: Option<String>,
    /// Types of the columns before falaj's own.
    pub types: Vec<Type>,
}

impl Footer {
    /// The footer of a batch's first file. Blocking.
    ///
    /// # Errors
    /// As [`Footer::read`]; [`Error::Fatal`] for a batch without a file.
    pub fn of_batch(batch: &Batch) -> Result<Self> {
        let file = batch.files()?.into_iter().next();
        let file =
            file.ok_or_else(|| Error::fatal(format_args!("reading {}", batch.path.display()), "no Parquet file"))?;
        let open = File::open(&file.path).map_err(|e| failed(&file.path, e))?;
        let metadata = ParquetMetaDataReader::new().parse_and_finish(&open).map_err(|e| failed(&file.path, e))?;
        Self::read(&metadata, &file.path)
    }

    /// Reads the footer; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Fatal`] for a value that is none; [`Error::Refused`] for a key that an older falaj did not write.
    pub fn read(metadata: &ParquetMetaData, path: &Path) -> Result<Self> {
        let pairs = metadata.file_metadata().key_value_metadata().map_or(&[][..], Vec::as_slice);
        let find = |key: &str| pairs.iter().find(|pair| pair.key == key).and_then(|pair| pair.value.as_deref());
        let need = |key: &str| find(key).ok_or_else(|| missing(path, key));
        let bad = |key: &str, value: &str| failed(path, format_args!("{key} in its footer is {value:?}"));
        let lsn = |key: &str| find(key).map(|v| v.parse::<Lsn>().map_err(|_| bad(key, v))).transpose();
        if need(archive::META_VERSION)? != archive::VERSION {
            return Err(bad(archive::META_VERSION, need(archive::META_VERSION)?));
        }
        let previous = find(archive::META_PREVIOUS);
        Ok(Self {
            pipeline: need(archive::META_PIPELINE)?.to_owned(),
            slot: json(path, archive::META_SLOT, need(archive::META_SLOT)?)?,
            resume: lsn(archive::META_RESUME)?.unwrap_or_default(),
            partial: lsn(archive::META_END_LSN)?.is_none(),
            origin: lsn(archive::META_ORIGIN)?,
            previous: previous
                .map(|v| archive::parse_bound(v).ok_or_else(|| bad(archive::META_PREVIOUS, v)))
                .transpose()?,
            primary_key: json(path, archive::META_PRIMARY_KEY, find(archive::META_PRIMARY_KEY).unwrap_or("[]"))?,
            record_key: find(archive::META_RECORD_KEY).map(str::to_owned),
            types: json(path, archive::META_TYPES, need(archive::META_TYPES)?)?,
        })
    }
}

fn json<T: DeserializeOwned>(path: &Path, key: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| failed(path, format_args!("{key} in its footer: {e}")))
}

pub(super) fn failed(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::fatal(format_args!("reading {}", path.display()), why)
}

pub(super) fn missing(path: &Path, key: &str) -> Error {
    Error::refused(
        "archive_footer",
        format!("{}: no {key} in its footer", path.display()),
        "files of this version of falaj, whose rows can be read back with the bytes that they had",
        "take foreign files out of archive.dir; replay what an older version wrote from Kafka, or from a bookmark",
    )
}
