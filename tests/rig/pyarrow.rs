//! Reads Parquet with pyarrow: a reader that shares no code with the writer.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize;

/// What pyarrow finds in the files of one table.
#[derive(Deserialize)]
pub struct Found {
    /// Columns with their types, as pyarrow names them.
    pub types: BTreeMap<String, String>,
    /// Rows in order. Floats are their bytes in hexadecimal digits, dates days and times µs since 1970, as numbers.
    pub rows: Vec<BTreeMap<String, Option<String>>>,
}

/// Reads files of one schema.
pub fn read(files: &[PathBuf]) -> Found {
    let root = env!("CARGO_MANIFEST_DIR");
    let mut command = Command::new(format!("{root}/dev/stack"));
    command.args(["call", "bigquery_python", &format!("{root}/tests/rig/read_parquet.py")]).args(files);
    let out = command.output().expect("dev/stack runs");
    assert!(out.status.success(), "pyarrow: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}
