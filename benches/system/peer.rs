//! Peers: other programs that read the same slot. They stop at no LSN, so what they have written is looked at until all of it
//! is there; and they log no times of ours, so the broker's clock (`LogAppendTime`), or the files' times, give their rate.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use falaj::config::Kafka;
use falaj::kafka;
use rdkafka::Message;
use rdkafka::consumer::{BaseConsumer, Consumer};

use crate::load::Backlog;
use crate::plan::Reader;
use crate::process::{self, Servers};
use crate::reader::{Run, Streaming, pipeline_dir};
use crate::sinks::{self, Content};
use crate::stack::Stack;

/// Nothing new for so long, and all rows seem to be there: it is through.
const QUIET: Duration = Duration::from_secs(3);
/// Nothing new for so long, and rows seem to be missing: no more will come. A JVM takes its time for the first ones.
const PATIENCE: Duration = Duration::from_secs(60);
/// End of the topics' name, as Debezium forms it.
const TABLE: &str = "public.engagement_events";

/// Installs what is missing of a peer.
pub fn install(servers: Servers, peer: &str) -> Result<()> {
    let mut command = script();
    command.args(["install", peer]);
    process::run(command, servers).map(drop)
}

/// The script that runs them.
pub fn script() -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("dev/bench/peers/peer"))
}

/// Lets a peer read the backlog once; what it has made is removed, also after a failure.
pub async fn run(stack: &Stack, backlog: &Backlog, reader: Reader, peer: &str, name: &str) -> Result<Run> {
    let slot = stack.copy_slot(&backlog.slot, name).await?;
    let sink = Sink::make(stack, reader, name).await?;
    let run = tokio::task::block_in_place(|| read(stack, backlog, reader, peer, name, sink));
    stack.drop_slot(&slot).await?;
    sinks::remove(stack, name).await?;
    run
}

fn read(stack: &Stack, backlog: &Backlog, reader: Reader, peer: &str, name: &str, sink: Sink) -> Result<Run> {
    let rows = backlog.workload.rows;
    let dir = pipeline_dir(stack, name);
    let mut command = script();
    command.args(["run", peer]).arg(&dir).args([name, &sink.target()]);
    let mut progress = Progress { began: Instant::now(), size: 0, grew: Duration::ZERO };
    let finished = process::run_until(command, stack.servers, &dir.join("log"), || progress.look(&sink, rows))?;
    let mut records = sink.records(&stack.config.kafka)?;
    ensure!(records.len() > 1, "it has written {} record(s)", records.len());
    records.sort_by_key(|record| record.millis);
    let distinct: HashSet<u64> = records.iter().map(|record| record.id).collect();
    let (content, times) = (records.len() as u64, Times::of(&records)?);
    let content = Content { events: content, distinct: distinct.len() as u64, of_kind: content };
    Ok(Run {
        workload: backlog.workload.name,
        reader,
        rows,
        whole_seconds: finished.seconds,
        streaming: Some(times.streaming),
        rows_per_second: times.rate,
        warm_half: times.warm_half,
        cpu: finished.cpu,
        peak_rss: finished.peak_rss,
        sinks: HashMap::from([(if matches!(sink, Sink::Topic { .. }) { "kafka" } else { "files" }, content)]),
    })
}

/// One row in a sink.
struct Record {
    id: u64,
    /// When it was there, in milliseconds since 1970.
    millis: i64,
}

/// How fast a sink was filled.
struct Times {
    streaming: Streaming,
    rate: f64,
    warm_half: Option<f64>,
}

impl Times {
    /// Of records in the order of their times. Those of the first moment were read before it: they do not count.
    fn of(records: &[Record]) -> Result<Self> {
        let count = records.len();
        let (first, last) = (records[0].millis, records[count - 1].millis);
        // Rows that came after a moment, a second.
        let since = |moment: i64| {
            let rows = count - records.partition_point(|record| record.millis <= moment);
            (last > moment).then(|| rows as f64 * 1000.0 / (last - moment) as f64)
        };
        let seconds = (last - first) as f64 / 1000.0;
        let ahead = records.partition_point(|record| record.millis <= first) as f64 / count as f64;
        let rate = since(first).context("all rows came in the same moment")?;
        Ok(Self { streaming: Streaming { seconds, ahead }, rate, warm_half: since(records[count / 2].millis) })
    }
}

/// Where a peer writes to.
enum Sink {
    Topic { consumer: BaseConsumer, topic: String, partitions: i32 },
    Files(PathBuf),
}

impl Sink {
    /// Makes it. A topic has as many partitions as falaj's, and the broker's times.
    async fn make(stack: &Stack, reader: Reader, name: &str) -> Result<Self> {
        let dir = pipeline_dir(stack, name);
        fs::create_dir_all(&dir)?;
        if !reader.feeds_kafka() {
            let files = dir.join("files");
            fs::create_dir(&files)?;
            return Ok(Self::Files(files));
        }
        let (config, topic) = (&stack.config.kafka, format!("{name}.{TABLE}"));
        let settings = [("message.timestamp.type", "LogAppendTime")];
        kafka::create_topic(config, &topic, config.partitions, &settings).await?;
        Ok(Self::Topic { consumer: kafka::client_over(config, &[]).create()?, topic, partitions: config.partitions })
    }

    /// As the script wants it.
    fn target(&self) -> String {
        match self {
            Self::Topic { topic, .. } => topic.clone(),
            Self::Files(dir) => dir.display().to_string(),
        }
    }

    /// Something that grows with what is in it: offsets, which in transactions are more than the records; or bytes.
    fn size(&self) -> Result<u64> {
        match self {
            Self::Topic { consumer, topic, partitions } => (0..*partitions)
                .map(|partition| Ok(u64::try_from(consumer.fetch_watermarks(topic, partition, kafka::TIMEOUT)?.1)?))
                .sum(),
            Self::Files(dir) => parquet_files(dir)?.iter().map(|file| Ok(fs::metadata(file)?.len())).sum(),
        }
    }

    /// Whether a sink of that size may hold so many rows.
    fn may_hold(&self, rows: u64, size: u64) -> bool {
        if matches!(self, Self::Files(_)) { size > 0 } else { size >= rows }
    }

    /// All that is in it.
    fn records(&self, config: &Kafka) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        match self {
            Self::Topic { topic, .. } => sinks::read_topic(config, topic, |message| {
                let body = message.payload().context("a record without a body")?;
                let id = number(body, "id").with_context(|| String::from_utf8_lossy(body).into_owned())?;
                let millis = message.timestamp().to_millis().context("a record without a time")?;
                records.push(Record { id, millis });
                Ok(())
            })?,
            Self::Files(dir) => {
                for file in parquet_files(dir)? {
                    let written = fs::metadata(&file)?.modified()?.duration_since(UNIX_EPOCH)?;
                    let millis = i64::try_from(written.as_millis())?;
                    records.extend(ids(&file)?.into_iter().map(|id| Record { id, millis }));
                }
            }
        }
        Ok(records)
    }
}

/// What is known of a peer's way through the backlog.
struct Progress {
    began: Instant,
    size: u64,
    /// When the sink grew for the last time, from the start on.
    grew: Duration,
}

impl Progress {
    /// Seconds until the sink grew for the last time, once nothing more is to be expected.
    fn look(&mut self, sink: &Sink, rows: u64) -> Result<Option<f64>> {
        let (size, now) = (sink.size()?, self.began.elapsed());
        if size != self.size {
            (self.size, self.grew) = (size, now);
        }
        let quiet = now - self.grew;
        let through = quiet > if sink.may_hold(rows, size) { QUIET } else { PATIENCE };
        ensure!(!through || size > 0, "nothing has come within {PATIENCE:?}");
        Ok(through.then_some(self.grew.as_secs_f64()))
    }
}

fn parquet_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(parquet_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "parquet") {
            files.push(path);
        }
    }
    Ok(files)
}

fn ids(file: &Path) -> Result<Vec<u64>> {
    let mut ids = Vec::new();
    for rows in sinks::parquet(file, &["id"])? {
        let rows = rows?;
        let column = rows.column_by_name("id").with_context(|| format!("{}: there is no id", file.display()))?;
        let Some(column) = column.as_primitive_opt::<Int64Type>() else {
            bail!("{}: id is of type {}, not Int64", file.display(), column.data_type());
        };
        ids.extend(column.values().iter().map(|id| *id as u64));
    }
    Ok(ids)
}

/// A whole number that stands bare in the body; the payload, in which the same name might be, is a text with escaped quotes.
pub fn number(body: &[u8], name: &str) -> Option<u64> {
    let text = std::str::from_utf8(body).ok()?;
    let label = format!("\"{name}\":");
    let digits = text[text.find(&label)? + label.len()..].split([',', '}']).next()?;
    digits.trim().parse().ok()
}
