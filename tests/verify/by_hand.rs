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

/// Counts one event more of one content.
pub async fn break_board(config: &Config) {
    let client = redis::Client::open(config.redis.url.as_str()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let pattern = format!("{{falaj:{}}}:*:events", config.pipeline);
    let keys: Vec<String> = redis::cmd("KEYS").arg(pattern).query_async(&mut connection).await.unwrap();
    let contents: Vec<String> =
        redis::cmd("ZRANGE").arg(&keys[0]).arg(0).arg(-1).query_async(&mut connection).await.unwrap();
    let add = redis::cmd("ZINCRBY").arg(&keys[0]).arg(1).arg(&contents[0]).to_owned();
    let _: String = add.query_async(&mut connection).await.unwrap();
}
