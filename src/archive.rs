//! The archive's words: how a batch directory and its files are named, and what listing them says.
//!
//! A batch is one directory named after its inclusive position range, renamed into place as a whole.
//! So the listing *is* the sink's position: there is no manifest that could disagree.

pub mod pieces;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::lsn::{Commit, Lsn, Position, SlotIdentity};

/// Version of the layout and of the file's footer.
pub const VERSION: &str = "1";
/// Name of the file that holds the idle position.
pub const POSITION_FILE: &str = "position.json";
/// Prefix of an owner's work directory.
pub const WORK_PREFIX: &str = ".work-";
/// Prefix of the work directory of a backfill, which does not hold the slot.
pub const HISTORY_WORK_PREFIX: &str = ".backfill-";
/// In a batch of a backfill: how far its rows reach. Readers of data sets leave out what begins with `_`.
pub const HISTORY_FILE: &str = "_backfill.json";

/// Footer key: pipeline name.
pub const META_PIPELINE: &str = "falaj.pipeline";
/// Footer key: [`SlotIdentity`] as JSON.
pub const META_SLOT: &str = "falaj.slot";
/// Footer key: first position of the batch, as in the directory's name.
pub const META_FIRST: &str = "falaj.first";
/// Footer key: last position of the batch.
pub const META_LAST: &str = "falaj.last";
/// Footer key: `end_lsn` of the last transaction; absent while that is not whole.
pub const META_END_LSN: &str = "falaj.end_lsn";
/// Footer key: where replication resumes after this batch; below `end_lsn` only while a transaction is half in.
pub const META_RESUME: &str = "falaj.resume";
/// Footer key: bound of the last change of the lookup rows that the rows below [`META_RESUME`] were enriched with.
pub const META_LOOKUPS: &str = "falaj.lookups";
/// Footer key: the last transaction with rows up to the end of the batch, as JSON.
pub const META_COMMIT: &str = "falaj.commit";
/// Footer key: primary key columns as a JSON array; absent when the table has none.
pub const META_PRIMARY_KEY: &str = "falaj.primary_key";
/// Footer key: column whose value is the Kafka record key, where configured.
pub const META_RECORD_KEY: &str = "falaj.record_key";
/// Footer key: the columns' types as Postgres has them, a JSON array of [`crate::schema::Type`]. Several of them look alike
/// in Parquet and differently in an event: a replay needs them to give the same bytes.
pub const META_TYPES: &str = "falaj.types";
/// Footer key: bound of the last row before this batch; absent in the first batch of an archive. A batch that was taken away
/// shows by it.
pub const META_PREVIOUS: &str = "falaj.previous";
/// Footer key: LSN from which on the archive holds every commit, in its first batch.
pub const META_ORIGIN: &str = "falaj.origin";
/// Footer key: [`VERSION`].
pub const META_VERSION: &str = "falaj.version";

/// What may stand bare in a file name; everything else is percent-encoded.
const NAME: &AsciiSet = &NON_ALPHANUMERIC.remove(b'_').remove(b'-').remove(b'.');

/// A table name as a file-name stem: bytes outside `A–Z a–z 0–9 _ - .` as `%XX`.
///
/// A leading dot is encoded too, so that no table can hide a file or name a parent directory.
pub fn encode_name(table: &str) -> String {
    let encoded = utf8_percent_encode(table, NAME).to_string();
    match encoded.strip_prefix('.') {
        Some(rest) => format!("%2E{rest}"),
        None => encoded,
    }
}

/// Undoes [`encode_name`].
pub fn decode_name(stem: &str) -> Option<String> {
    percent_decode_str(stem).decode_utf8().ok().map(Into::into)
}

/// A bound as in directory names: `{commit_lsn:016X}.{ordinal:010}`.
pub fn bound(at: Position) -> String {
    format!("{:016X}.{:010}", at.commit_lsn.0, at.ordinal)
}

/// Parses what [`bound`] writes; anything else is `None`.
pub fn parse_bound(text: &str) -> Option<Position> {
    let (lsn, ordinal) = text.split_once('.')?;
    let plain = lsn.len() == 16 && ordinal.len() >= 10 && ordinal.bytes().all(|b| b.is_ascii_digit());
    let commit_lsn = Lsn(u64::from_str_radix(lsn, 16).ok()?);
    let at = Position { commit_lsn, ordinal: ordinal.parse().ok()? };
    (plain && bound(at) == text).then_some(at)
}

/// One sealed batch directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Batch {
    /// First position, inclusive.
    pub first: Position,
    /// Last position, inclusive.
    pub last: Position,
    /// The directory.
    pub path: PathBuf,
}

/// One Parquet file of a batch.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DataFile {
    /// Table name: bare in schema public, else `schema.table`.
    pub table: String,
    /// 0, or 1… after the table's schema has changed within the batch.
    pub part: u32,
    /// The file.
    pub path: PathBuf,
}

impl Batch {
    /// Directory name of a position range.
    pub fn name(first: Position, last: Position) -> String {
        format!("{}-{}", bound(first), bound(last))
    }

    /// Whether its rows came by the stream: all but history.
    pub fn is_streamed(&self) -> bool {
        !self.is_history()
    }

    /// Whether its rows are history that a backfill has copied: they are no part of the stream, and its position does not
    /// follow from them. Their LSN is one below that of their snapshot, and records lie at multiples of 8.
    pub fn is_history(&self) -> bool {
        self.first.commit_lsn.0 % 8 == 7 && self.path.join(HISTORY_FILE).exists()
    }

    /// The batch's Parquet files, by table and part. Marks and other files beside them are left out.
    ///
    /// # Errors
    /// [`Error::Fatal`] when the directory cannot be read.
    pub fn files(&self) -> Result<Vec<DataFile>> {
        let mut files = Vec::new();
        for entry in read_dir(&self.path)? {
            let name = entry.file_name();
            if let Some((table, part)) = name.to_str().and_then(parse_file_name) {
                files.push(DataFile { table, part, path: entry.path() });
            }
        }
        files.sort();
        Ok(files)
    }
}

/// A table name as part of a topic: Kafka allows `A–Z a–z 0–9 . _ -` alone, so every other byte is `-XX`. So is a `-` that two
/// such digits follow, and no other: two tables never share a topic.
pub fn encode_topic(table: &str) -> String {
    let mut topic = String::with_capacity(table.len());
    let mut rest = table.as_bytes();
    while let [byte, after @ ..] = rest {
        match byte {
            b'-' if !begins_with_hex(after) => topic.push('-'),
            b'_' | b'.' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => topic.push(char::from(*byte)),
            _ => topic.push_str(&format!("-{byte:02X}")),
        }
        rest = after;
    }
    topic
}

/// Whether two digits stand there as [`encode_topic`] writes them.
fn begins_with_hex(text: &[u8]) -> bool {
    let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'A'..=b'F');
    matches!(text, [high, low, ..] if is_digit(high) && is_digit(low))
}

/// File name of a table's rows: `<table>.parquet`, then `<table>.1.parquet`, …
///
/// In a table name that itself ends in `.1` that dot is encoded, so that it cannot be taken for a part.
pub fn file_name(table: &str, part: u32) -> String {
    let mut stem = encode_name(table);
    if let Some((head, tail)) = stem.rsplit_once('.')
        && tail.bytes().all(|b| b.is_ascii_digit())
    {
        stem = format!("{head}%2E{tail}");
    }
    match part {
        0 => format!("{stem}.parquet"),
        n => format!("{stem}.{n}.parquet"),
    }
}

/// Reads what [`file_name`] writes.
fn parse_file_name(name: &str) -> Option<(String, u32)> {
    let stem = name.strip_suffix(".parquet")?;
    if let Some((table, part)) = stem.rsplit_once('.')
        && let Ok(n) = part.parse::<u32>()
        && n > 0
        && part == n.to_string()
    {
        return Some((decode_name(table)?, n));
    }
    Some((decode_name(stem)?, 0))
}

/// All sealed batches, oldest first. Work directories and foreign names are left out.
///
/// # Errors
/// [`Error::Fatal`] when the directory exists and cannot be read; an absent one is an empty archive.
pub fn list(dir: &Path) -> Result<Vec<Batch>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut batches: Vec<Batch> = read_dir(dir)?
        .into_iter()
        .filter_map(|entry| {
            let name = entry.file_name();
            let (first, last) = name.to_str()?.split_once('-')?;
            Some(Batch { first: parse_bound(first)?, last: parse_bound(last)?, path: entry.path() })
        })
        .collect();
    batches.sort();
    Ok(batches)
}

/// The idle position: everything committed below `lsn` is in the archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdlePosition {
    /// The stream that `lsn` belongs to.
    pub identity: SlotIdentity,
    /// Nothing committed below it is missing.
    pub lsn: Lsn,
    /// Last change of the lookup rows that the rows below `lsn` were enriched with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lookups: Option<Position>,
    /// The last transaction with rows below `lsn`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<Commit>,
}

fn read_dir(dir: &Path) -> Result<Vec<std::fs::DirEntry>> {
    std::fs::read_dir(dir).and_then(|entries| entries.collect()).map_err(|e| match e.kind() {
        ErrorKind::PermissionDenied => Error::refused(
            "archive_dir",
            format!("{}: {e}", dir.display()),
            "a directory that this user may read",
            "mend its rights, or choose another archive.dir",
        ),
        _ => Error::fatal(format_args!("reading {}", dir.display()), e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(lsn: u64, ordinal: u64) -> Position {
        Position { commit_lsn: Lsn(lsn), ordinal }
    }

    #[test]
    fn bounds_read_back_and_nothing_else_does() {
        assert_eq!(bound(at(0x16_B374_D848, 3)), "00000016B374D848.0000000003");
        assert_eq!(parse_bound("00000016B374D848.0000000003"), Some(at(0x16_B374_D848, 3)));
        for bad in ["", "16.3", "00000016b374d848.0000000003", "00000016B374D848.3", "00000016B374D848.+000000003"] {
            assert_eq!(parse_bound(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_batch_of_a_backfill_says_so_and_lies_between_two_records() {
        let dir = tempfile::tempdir().unwrap();
        let make = |lsn, file| {
            let batch = dir.path().join(Batch::name(at(lsn, 0), at(lsn, 9)));
            std::fs::create_dir(&batch).unwrap();
            std::fs::write(batch.join(file), "{}").unwrap();
        };
        make(0x107, HISTORY_FILE);
        make(0x207, "t.parquet");
        make(0x300, HISTORY_FILE);
        let history: Vec<_> = list(dir.path()).unwrap().iter().map(Batch::is_history).collect();
        assert_eq!(history, [true, false, false]);
    }

    #[test]
    fn hostile_table_names_stay_inside_the_directory() {
        for name in ["../../etc/passwd", ".hidden", "a/b", "line\nbreak", "emoji 🎧", "quote\"'", "%41", "app.1"] {
            let file = file_name(name, 0);
            assert!(!file.contains('/') && !file.starts_with('.'), "{file}");
            assert_eq!(parse_file_name(&file), Some((name.to_owned(), 0)));
        }
        assert_eq!(parse_file_name("content.12.parquet"), Some(("content".into(), 12)));
        assert_eq!(parse_file_name("content.loaded"), None);
    }

    /// Undoes [`encode_topic`].
    fn decode_topic(topic: &str) -> String {
        let (mut table, mut rest) = (Vec::new(), topic.as_bytes());
        while let [byte, after @ ..] = rest {
            rest = after;
            if *byte == b'-' && begins_with_hex(after) {
                let (digits, behind) = after.split_at(2);
                table.push(u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap());
                rest = behind;
            } else {
                table.push(*byte);
            }
        }
        String::from_utf8(table).unwrap()
    }

    #[test]
    fn a_topic_says_which_table_it_is_of() {
        let parts = ["-", "--", "-2D", "-2d", "2D", "D", "F", "f", "4", "/", "é", "🎧", ".", "_", " ", "%41", "a"];
        for first in parts {
            for second in parts {
                for third in parts {
                    let table = format!("{first}{second}{third}");
                    let topic = encode_topic(&table);
                    assert!(topic.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)), "{topic}");
                    assert_eq!(decode_topic(&topic), table, "{topic}");
                }
            }
        }
        let pairs = [
            ("my-table", "my-table"),
            ("a/b-c", "a-2Fb-c"),
            ("-2D", "-2D2D"),
            ("-2d", "-2d"),
            ("--2D", "--2D2D"),
            ("2024-10", "2024-2D10"),
            ("-", "-"),
            ("-A", "-A"),
            ("-é", "--C3-A9"),
        ];
        assert_eq!(pairs.map(|(table, _)| encode_topic(table)), pairs.map(|(_, topic)| topic.to_owned()));
    }

    #[test]
    fn listing_sorts_by_position_and_skips_work_directories() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            [Batch::name(at(200, 0), at(300, 1)), Batch::name(at(100, 0), at(199, 5)), ".work-1".into(), "lost".into()]
        {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let firsts: Vec<_> = list(dir.path()).unwrap().into_iter().map(|b| b.first).collect();
        assert_eq!(firsts, [at(100, 0), at(200, 0)]);
        assert_eq!(list(&dir.path().join("none")).unwrap(), []);
    }
}
