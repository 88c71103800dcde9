//! Asks the BigQuery server what is in a data set.

use serde_json::Value;

use super::{BIGQUERY, Pipeline};

/// The project of the local server.
pub const PROJECT: &str = "local";
/// Rows of one answer.
const PAGE: usize = 10_000;

/// One row of an answer: each cell as text.
pub type Row = Vec<Option<String>>;

/// All rows of `SELECT {columns} FROM {table} ORDER BY {order}`, page by page.
pub async fn rows(pipeline: &Pipeline, columns: &str, table: &str, order: &str) -> Vec<Row> {
    let mut all = Vec::new();
    loop {
        let at = all.len();
        let dataset = &pipeline.name;
        let sql = format!("SELECT {columns} FROM `{dataset}.{table}` ORDER BY {order} LIMIT {PAGE} OFFSET {at}");
        all.extend(query(pipeline, &sql).await);
        if all.len() < at + PAGE {
            return all;
        }
    }
}

/// The rows of a query.
pub async fn query(pipeline: &Pipeline, sql: &str) -> Vec<Row> {
    let url = format!("{}/bigquery/v2/projects/{PROJECT}/queries", pipeline.env[BIGQUERY]);
    let body = serde_json::json!({ "query": sql, "useLegacySql": false, "maxResults": PAGE });
    let answer: Value = reqwest::Client::new().post(url).json(&body).send().await.unwrap().json().await.unwrap();
    assert_eq!(answer["jobComplete"], true, "{sql}: {answer}");
    let cells = |row: &Value| row["f"].as_array().unwrap().iter().map(|c| c["v"].as_str().map(str::to_owned)).collect();
    answer["rows"].as_array().map(|rows| rows.iter().map(cells).collect()).unwrap_or_default()
}
