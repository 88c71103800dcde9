//! Reads the archive as pyarrow would: by the columns' own types, knowing nothing of how they were written.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use arrow_array::cast::AsArray;
use arrow_array::types::{Date32Type, Decimal128Type, Float64Type, Int32Type, Int64Type, TimestampMicrosecondType};
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

/// Text columns that hold JSON or a number and stand bare in an event.
const BARE: [&str; 3] = ["raw_payload", "amount", "_old_key"];

/// Every file of the sealed batches, by its path in the archive.
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for batch in batches(dir) {
        for file in fs::read_dir(dir.join(&batch)).unwrap() {
            let name = file.unwrap().file_name().into_string().unwrap();
            let bytes = fs::read(dir.join(&batch).join(&name)).unwrap();
            files.insert(format!("{batch}/{name}"), bytes);
        }
    }
    files
}

/// Names of the sealed batches, oldest first.
pub fn batches(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| !name.starts_with('.') && name != "position.json").collect();
    names.sort();
    names
}

/// The rows of a table, each as the JSON event that it stands for.
pub fn events(dir: &Path, name: &str) -> Vec<String> {
    table(dir, name)
        .iter()
        .flat_map(|rows| (0..rows.num_rows()).map(|row| event(rows, row)).collect::<Vec<_>>())
        .collect()
}

/// The rows of a table as they are stored.
pub fn table(dir: &Path, table: &str) -> Vec<RecordBatch> {
    let mut all = Vec::new();
    for path in files_of(dir, table) {
        let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(path).unwrap()).unwrap().build().unwrap();
        all.extend(reader.map(Result::unwrap));
    }
    all
}

/// The files of a table, in the order of their batches and parts.
pub fn files_of(dir: &Path, table: &str) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for batch in batches(dir) {
        let part = |part: usize| match part {
            0 => dir.join(&batch).join(format!("{table}.parquet")),
            n => dir.join(&batch).join(format!("{table}.{n}.parquet")),
        };
        all.extend((0..).map(part).take_while(|path| path.exists()));
    }
    all
}

fn event(rows: &RecordBatch, row: usize) -> String {
    let text = |name: &str| {
        let column = rows.column_by_name(name).unwrap();
        (!column.is_null(row)).then(|| column.as_string::<i32>().value(row).to_owned())
    };
    let unchanged: Vec<String> = text("_unchanged").map(|t| serde_json::from_str(&t).unwrap()).unwrap_or_default();
    let truncate = text("_op").as_deref() == Some("t");
    let mut fields = Vec::new();
    for (field, column) in rows.schema().fields().iter().zip(rows.columns()) {
        let name = field.name().as_str();
        let own = name.starts_with('_');
        let extra = matches!(name, "_commit_lsn" | "_ordinal" | "_raw" | "_unchanged");
        if extra || (own && column.is_null(row)) || (!own && truncate) || unchanged.iter().any(|n| n == name) {
            continue;
        }
        fields.push(format!("{}:{}", json(name), cell(name, column, row)));
    }
    if let Some(names) = text("_unchanged") {
        fields.push(format!("\"_unchanged\":{names}"));
    }
    format!("{{{}}}", fields.join(","))
}

fn cell(name: &str, column: &dyn Array, row: usize) -> String {
    if column.is_null(row) {
        return "null".into();
    }
    match column.data_type() {
        DataType::Boolean => column.as_boolean().value(row).to_string(),
        DataType::Int32 => column.as_primitive::<Int32Type>().value(row).to_string(),
        DataType::Int64 => column.as_primitive::<Int64Type>().value(row).to_string(),
        DataType::Float64 => column.as_primitive::<Float64Type>().value(row).to_string(),
        DataType::Decimal128(..) => column.as_primitive::<Decimal128Type>().value_as_string(row),
        DataType::Date32 => column.as_primitive::<Date32Type>().value(row).to_string(),
        DataType::Timestamp(_, zone) => {
            let micros = column.as_primitive::<TimestampMicrosecondType>().value(row);
            let text = jiff::Timestamp::from_microsecond(micros).unwrap().strftime("%Y-%m-%dT%H:%M:%S.%6f").to_string();
            format!("\"{text}{}\"", if zone.is_some() { "Z" } else { "" })
        }
        DataType::Utf8 if BARE.contains(&name) => column.as_string::<i32>().value(row).to_owned(),
        DataType::Utf8 => json(column.as_string::<i32>().value(row)),
        other => panic!("{name} is {other}"),
    }
}

fn json(text: &str) -> String {
    serde_json::to_string(text).unwrap()
}
