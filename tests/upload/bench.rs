//! What each test has: an archive directory, a data set of its own, and the `falaj upload` binary.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use arrow_array::builder::{
    BooleanBuilder, Date32Builder, Decimal128Builder, Float64Builder, Int32Builder, Int64Builder, StringBuilder,
    TimestampMicrosecondBuilder,
};
use arrow_array::{ArrayRef, RecordBatch};
use falaj::archive::{self, Batch};
use falaj::lsn::{Lsn, Position, SlotIdentity};
use parquet::arrow::ArrowWriter;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use serde_json::Value;

/// The local server's project.
pub const PROJECT: &str = "local";

/// One test's world.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub dataset: String,
    pub endpoint: String,
    pub system_id: String,
}

/// One row of the table that the tests use.
#[derive(Clone, Debug)]
pub struct Row {
    pub at: Position,
    pub op: &'static str,
    pub id: i64,
    pub title: Option<String>,
    pub unchanged: Option<&'static str>,
    pub old_key: Option<&'static str>,
}

/// Rows `from..to` of one transaction each: commit LSN 1000 + n, ordinal 0, id n.
pub fn rows(from: u64, to: u64) -> Vec<Row> {
    (from..to).map(|n| row(1000 + n, 0, "c", n as i64)).collect()
}

pub fn row(lsn: u64, ordinal: u64, op: &'static str, id: i64) -> Row {
    let at = Position { commit_lsn: Lsn(lsn), ordinal };
    Row { at, op, id, title: (id % 3 != 0).then(|| format!("عنوان {id}")), unchanged: None, old_key: None }
}

/// The event ids of rows, as they should stand in the table.
pub fn ids(rows: &[Row]) -> Vec<String> {
    rows.iter().map(|r| r.at.event_id()).collect()
}

impl Bench {
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let endpoint = std::env::var("FALAJ_BIGQUERY__ENDPOINT")
            .expect("FALAJ_BIGQUERY__ENDPOINT is not set: run `dev/stack up bigquery` and `eval \"$(dev/stack env)\"`");
        let unique = format!("{}_{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
        Self {
            dir: tempfile::tempdir().unwrap(),
            dataset: format!("upload_{name}_{unique}_{nanos}"),
            endpoint,
            system_id: format!("{nanos}{unique}"),
        }
    }

    pub fn archive(&self) -> PathBuf {
        self.dir.path().join("archive")
    }

    /// `falaj upload` with this test's configuration and further arguments.
    pub fn upload(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_falaj"));
        command.arg("upload").args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("FALAJ_")) {
            command.env_remove(name);
        }
        command
            .env("FALAJ_BIGQUERY__PROJECT", PROJECT)
            .env("FALAJ_BIGQUERY__DATASET", &self.dataset)
            .env("FALAJ_BIGQUERY__ENDPOINT", &self.endpoint)
            .env("FALAJ_ARCHIVE__DIR", self.archive());
        command
    }

    /// Runs `upload --once` to its end.
    pub fn once(&self) -> Output {
        self.upload(&["--once"]).output().unwrap()
    }

    /// Runs `upload --once`, which must succeed, and gives its last line.
    pub fn loads(&self) -> String {
        let output = self.once();
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap().lines().last().unwrap().to_owned()
    }

    /// Runs `upload --once`, which must refuse a table, and gives what it says.
    pub fn refused(&self) -> String {
        let output = self.once();
        let said = text(&output);
        assert!(output.status.code() == Some(78) && said.contains("bigquery_table"), "{said}");
        said
    }

    /// What the last line of `upload --once` says.
    pub fn line(&self, jobs: usize, rows: usize) -> String {
        format!("{}/{PROJECT}.{}: {jobs} load jobs, {rows} rows", self.endpoint, self.dataset)
    }

    /// Writes one batch directory, renamed into place as a whole.
    pub fn seal(&self, tables: &[(&str, &[Row])]) -> PathBuf {
        self.seal_as(tables, false)
    }

    /// The same, with a further column `note`.
    pub fn seal_as(&self, tables: &[(&str, &[Row])], note: bool) -> PathBuf {
        let all: Vec<Position> = tables.iter().flat_map(|(_, rows)| rows.iter().map(|r| r.at)).collect();
        let name = Batch::name(*all.iter().min().unwrap(), *all.iter().max().unwrap());
        let work = self.archive().join(".work-1").join(&name);
        std::fs::create_dir_all(&work).unwrap();
        for (table, rows) in tables {
            self.write(&work.join(archive::file_name(table, 0)), table, rows, note);
        }
        let sealed = self.archive().join(name);
        std::fs::rename(work, &sealed).unwrap();
        sealed
    }

    /// Writes one batch of a backfill.
    pub fn seal_history(&self, table: &str, rows: &[Row]) -> PathBuf {
        let sealed = self.seal(&[(table, rows)]);
        std::fs::write(sealed.join(archive::HISTORY_FILE), "{}").unwrap();
        sealed
    }

    /// How many files of the only table's history are loaded, by its record.
    pub fn loaded_history(&self) -> usize {
        let record = |path: &PathBuf| path.extension().is_some_and(|e| e == "history");
        let Some(path) = files(&self.archive().join(".upload")).into_iter().find(record) else { return 0 };
        let record: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        record["loaded"].as_array().unwrap().len()
    }

    pub fn write(&self, path: &Path, table: &str, rows: &[Row], note: bool) {
        let slot = SlotIdentity { system_id: self.system_id.clone(), timeline: 1, slot: "falaj".into() };
        let meta = [
            (archive::META_PIPELINE, "test".to_owned()),
            (archive::META_SLOT, serde_json::to_string(&slot).unwrap()),
            (archive::META_VERSION, archive::VERSION.to_owned()),
            (archive::META_PRIMARY_KEY, "[\"id\"]".to_owned()),
            (archive::META_RECORD_KEY, "title".to_owned()),
        ];
        let meta = meta.map(|(key, value)| KeyValue::new(key.to_owned(), value)).to_vec();
        let properties = WriterProperties::builder().set_key_value_metadata(Some(meta)).build();
        let batch = columns(table, rows, note);
        let file = std::fs::File::create(path).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    /// Rows of a query, each cell as text; NULL is `None`.
    pub fn query(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        let body = serde_json::json!({ "query": sql.replace("DATASET", &self.dataset), "useLegacySql": false });
        let answer = self.call("POST", &format!("/bigquery/v2/projects/{PROJECT}/queries"), Some(body));
        assert_eq!(answer["jobComplete"], true, "{answer}");
        let rows = answer["rows"].as_array().cloned().unwrap_or_default();
        let cells =
            |row: &Value| row["f"].as_array().unwrap().iter().map(|c| c["v"].as_str().map(str::to_owned)).collect();
        rows.iter().map(cells).collect()
    }

    /// All event ids of a table, in order, with every repetition.
    pub fn ids(&self, table: &str) -> Vec<String> {
        let rows = self.query(&format!("SELECT _id FROM `DATASET.{table}` ORDER BY _id"));
        rows.into_iter().map(|mut row| row.remove(0).unwrap()).collect()
    }

    /// `id state` of each load job of this test's data set, oldest first; state is `ok`, `failed` or `running`.
    pub fn jobs(&self) -> Vec<(String, &'static str)> {
        let list = self.call("GET", &format!("/bigquery/v2/projects/{PROJECT}/jobs?maxResults=100000"), None);
        let ours =
            |job: &&Value| job["configuration"]["load"]["destinationTable"]["datasetId"] == self.dataset.as_str();
        let told = |job: &Value| {
            let state = match (job["status"]["state"].as_str(), job["status"]["errorResult"].is_null()) {
                (Some("DONE"), true) => "ok",
                (Some("DONE"), false) => "failed",
                _ => "running",
            };
            (job["jobReference"]["jobId"].as_str().unwrap().to_owned(), state)
        };
        let mut jobs: Vec<_> = list["jobs"].as_array().unwrap().iter().filter(ours).map(told).collect();
        jobs.reverse();
        jobs
    }

    /// How many jobs have loaded something.
    pub fn loaded(&self) -> usize {
        self.jobs().iter().filter(|(_, state)| *state == "ok").count()
    }

    pub fn table(&self, id: &str) -> Value {
        self.call("GET", &format!("/bigquery/v2/projects/{PROJECT}/datasets/{}/tables/{id}", self.dataset), None)
    }

    fn call(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let url = format!("{}{path}", std::env::var("FALAJ_BIGQUERY__ENDPOINT").unwrap());
        let work = async move {
            let mut request = reqwest::Client::new().request(method.parse().unwrap(), url);
            if let Some(body) = body {
                request = request.json(&body);
            }
            request.send().await.unwrap().json().await.unwrap()
        };
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }
}

/// A process that is killed when the test is through with it, also when it fails.
pub struct Guard(pub Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The text at an address; empty while nobody answers.
pub fn get(url: &str) -> String {
    let work = async { reqwest::get(url).await?.text().await };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(work).unwrap_or_default()
}

/// The files below a directory; none where it is absent.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// Waits for a condition with a deadline.
pub fn until(what: &str, mut met: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !met() {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        std::thread::yield_now();
    }
}

pub fn text(output: &Output) -> String {
    format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn columns(table: &str, rows: &[Row], note: bool) -> RecordBatch {
    let (mut id, mut count) = (Int64Builder::new(), Int32Builder::new());
    let (mut title, mut share) = (StringBuilder::new(), Float64Builder::new());
    let mut price = Decimal128Builder::new().with_precision_and_scale(10, 2).unwrap();
    let mut at = TimestampMicrosecondBuilder::new().with_timezone("UTC");
    let (mut local, mut day, mut good) =
        (TimestampMicrosecondBuilder::new(), Date32Builder::new(), BooleanBuilder::new());
    let (mut event, mut op, mut name, mut lsn) =
        (StringBuilder::new(), StringBuilder::new(), StringBuilder::new(), StringBuilder::new());
    let mut commit_ts = TimestampMicrosecondBuilder::new().with_timezone("UTC");
    let (mut commit_lsn, mut ordinal) = (Int64Builder::new(), Int64Builder::new());
    let mut old_key = StringBuilder::new();
    let (mut unchanged, mut raw, mut notes) = (StringBuilder::new(), StringBuilder::new(), StringBuilder::new());
    for row in rows {
        let micros = 1_700_000_000_000_000 + row.id;
        id.append_value(row.id);
        count.append_value(row.id as i32 * 2);
        title.append_option(row.title.as_deref());
        share.append_value(0.5);
        price.append_value(i128::from(row.id) * 100 + 7);
        at.append_value(micros);
        local.append_value(micros);
        day.append_value(19_000);
        good.append_value(row.id % 2 == 0);
        event.append_value(row.at.event_id());
        op.append_value(row.op);
        name.append_value(table);
        lsn.append_value(row.at.commit_lsn.to_string());
        commit_ts.append_value(micros);
        commit_lsn.append_value(row.at.commit_lsn.0 as i64);
        ordinal.append_value(row.at.ordinal as i64);
        unchanged.append_option(row.unchanged);
        old_key.append_option(row.old_key);
        raw.append_null();
        notes.append_option(row.unchanged.is_none_or(|u| !u.contains("note")).then_some("noted"));
    }
    let mut all: Vec<(&str, ArrayRef, bool)> = vec![
        ("id", Arc::new(id.finish()), true),
        ("count", Arc::new(count.finish()), true),
        ("title", Arc::new(title.finish()), true),
        ("share", Arc::new(share.finish()), true),
        ("price", Arc::new(price.finish()), true),
        ("at", Arc::new(at.finish()), true),
        ("local", Arc::new(local.finish()), true),
        ("day", Arc::new(day.finish()), true),
        ("good", Arc::new(good.finish()), true),
        ("_id", Arc::new(event.finish()), false),
        ("_op", Arc::new(op.finish()), false),
        ("_table", Arc::new(name.finish()), false),
        ("_lsn", Arc::new(lsn.finish()), false),
        ("_commit_ts", Arc::new(commit_ts.finish()), false),
        ("_commit_lsn", Arc::new(commit_lsn.finish()), false),
        ("_ordinal", Arc::new(ordinal.finish()), false),
        ("_old_key", Arc::new(old_key.finish()), true),
        ("_unchanged", Arc::new(unchanged.finish()), true),
        ("_raw", Arc::new(raw.finish()), true),
    ];
    if note {
        all.insert(9, ("note", Arc::new(notes.finish()), true));
    }
    RecordBatch::try_from_iter_with_nullable(all).unwrap()
}
