//! Sinks broken by hand.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type};
use arrow_array::{Int32Array, RecordBatch};
use falaj::config::Config;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::properties::WriterProperties;

use crate::rig::archive::files_of;

/// Removes row 5, doubles row 7 and changes row 9 of the only file of a table.
pub fn break_archive(dir: &Path, table: &str) {
    let files = files_of(dir, table);
    assert_eq!(files.len(), 1);
    let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(&files[0]).unwrap()).unwrap();
    let mut footer = builder.metadata().file_metadata().key_value_metadata().unwrap().clone();
    footer.retain(|pair| pair.key != "ARROW:schema");
    let batches: Vec<RecordBatch> = builder.build().unwrap().map(Result::unwrap).collect();
    let properties = WriterProperties::builder().set_key_value_metadata(Some(footer)).build();
    let file = File::create(&files[0]).unwrap();
    let mut writer = ArrowWriter::try_new(file, batches[0].schema(), Some(properties)).unwrap();
    for batch in &batches {
        for row in 0..batch.num_rows() {
            let id = batch.column_by_name("id").unwrap().as_primitive::<Int64Type>().value(row);
            let mut one = batch.slice(row, 1);
            if id == 9 {
                one = changed(&one);
            }
            for _ in 0..if id == 5 { 0 } else { 1 + usize::from(id == 7) } {
                writer.write(&one).unwrap();
            }
        }
    }
    writer.close().unwrap();
}

fn changed(row: &RecordBatch) -> RecordBatch {
    let at = row.schema().index_of("duration_ms").unwrap();
    let mut columns = row.columns().to_vec();
    let was = columns[at].as_primitive::<Int32Type>().value(0);
    columns[at] = Arc::new(Int32Array::from(vec![was * 10]));
    RecordBatch::try_new(row.schema(), columns).unwrap()
}

/// Runs `command KEY [score] member` on the board's set of a kind (`events`, `millis`, `devices`, …) of its one bucket; the member is
/// the only one in it.
pub async fn edit_board(config: &Config, kind: &str, command: &str, score: Option<i64>) {
    let client = redis::Client::open(config.redis.url.as_str()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let pattern = format!("{{falaj:{}}}:*:{kind}", config.pipeline);
    let keys: Vec<String> = redis::cmd("KEYS").arg(pattern).query_async(&mut connection).await.unwrap();
    let members: Vec<String> =
        redis::cmd("ZRANGE").arg(&keys[0]).arg(0).arg(-1).query_async(&mut connection).await.unwrap();
    assert_eq!((keys.len(), members.len()), (1, 1), "{keys:?} {members:?}");
    let mut edit = redis::cmd(command);
    edit.arg(&keys[0]);
    score.iter().for_each(|score| {
        edit.arg(*score);
    });
    let _: redis::Value = edit.arg(&members[0]).query_async(&mut connection).await.unwrap();
}
