//! Configuration: defaults < file < environment < flags. Unknown keys are errors, so that a typing error never goes unseen.

mod layers;
mod sources;
mod units;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};
use crate::kafka;
use layers::{mistyped, overlay, overlay_env, parse_toml};
pub use units::{ByteSize, Span};

/// The defaults, as a file that a user can start from.
pub const DEFAULTS: &str = include_str!("../config/falaj.toml");

/// The whole configuration. Only `main` sees all of it; every role gets the sections it needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Part of transactional.id, topics, Redis keys and job ids.
    pub pipeline: String,
    /// The source.
    pub postgres: Postgres,
    /// The streaming role.
    pub produce: Produce,
    /// Where the lookup state lives.
    pub state: State,
    /// Kafka: topics and any librdkafka key.
    pub kafka: Kafka,
    /// The Parquet archive.
    pub archive: Archive,
    /// The live board.
    pub redis: Redis,
    /// The outside HTTP system.
    pub external: External,
    /// Where `upload` loads to.
    pub bigquery: BigQuery,
    /// The operator's HTTP listener.
    pub http: Http,
    /// Per-table settings.
    #[serde(rename = "table", default)]
    pub tables: Vec<Table>,
}

/// `[postgres]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Postgres {
    /// URI or key=value; PG* variables, .pgpass and service files count as libpq does.
    pub url: String,
    /// Name of the replication slot.
    pub slot: String,
    /// Name of the publication.
    pub publication: String,
}

/// `[produce]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Produce {
    /// The configured sinks; each of them holds the acknowledgement back.
    pub sinks: Vec<SinkName>,
    /// A Kafka transaction is closed at this size.
    pub transaction_bytes: ByteSize,
    /// … or at this age: sooner with nothing more waiting, later in a backlog (an eighth of the time since its newest event's
    /// commit, at most 8 times this age).
    pub transaction_age: Span,
    /// How much decoded data may wait between two stages.
    pub queue_bytes: ByteSize,
    /// Whether messages of `pg_logical_emit_message` become events (op `m`).
    pub messages: bool,
}

/// A sink of `produce`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SinkName {
    /// Kafka topics.
    Kafka,
    /// Parquet batches.
    Archive,
}

impl FromStr for SinkName {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "kafka" => Ok(Self::Kafka),
            "archive" => Ok(Self::Archive),
            _ => Err(format!("`{s}` is no sink of produce; needed: kafka or archive")),
        }
    }
}

/// `[state]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Directory of the lookup cache: base snapshot and position-stamped change log.
    pub dir: PathBuf,
}

/// `[kafka]`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kafka {
    /// Topic name; `{pipeline}` and `{table}` are filled in.
    pub topic: String,
    /// Partitions of a topic that `init` makes.
    pub partitions: i32,
    /// Replication factor of a topic that `init` makes.
    pub replication_factor: i32,
    /// Whether the delete of a row, or of its key, is followed by a record without value, for compacted topics.
    pub tombstones: bool,
    /// What is done with an event that is larger than a record may be.
    pub too_large: TooLarge,
    /// The form of an event's body.
    pub envelope: Envelope,
    /// `"cloudevents"` adds binary-mode headers; absent means none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headers: Option<String>,
    /// Any librdkafka key, verbatim.
    #[serde(flatten, deserialize_with = "scalars")]
    pub client: BTreeMap<String, String>,
}

/// The form of an event's body in Kafka.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Envelope {
    /// One object: columns, then falaj's own fields.
    Flat,
    /// `before`, `after`, `source`, `op`, `ts_ms`.
    Debezium,
}

/// What is done with an event that is too large for Kafka.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TooLarge {
    /// The stream stops, with the limit and the ways out.
    Stop,
    /// It leaves a note on the dead-letter topic; the archive has it whole.
    DeadLetter,
}

/// `[archive]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Archive {
    /// Directory of the batches.
    pub dir: PathBuf,
    /// A batch is sealed at this size.
    pub seal_bytes: ByteSize,
    /// … or at this age.
    pub seal_after: Span,
}

/// `[redis]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redis {
    /// `redis://` or `rediss://` URL.
    pub url: String,
}

/// `[external]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct External {
    /// Every event is POSTed here.
    pub url: String,
    /// Whether rows of a backfill (op `r`) are sent too.
    pub history: bool,
    /// How many requests may be under way at once.
    pub in_flight: usize,
    /// How long one request may take.
    pub timeout: Span,
    /// How long, at least, an event is sent again that is answered by success and a body that says "error". Five times in any case.
    pub error_patience: Span,
}

/// `[bigquery]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BigQuery {
    /// Project id; unset: nothing is uploaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// Data set of all tables.
    pub dataset: String,
    /// Location of the data set and of the jobs.
    pub location: String,
    /// Base URL of the service; BIGQUERY_EMULATOR_HOST counts too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Least time between two loads of one table, of the stream or of history.
    pub load_every: Span,
}

/// `[http]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// Address of /metrics, /livez, /readyz, /api/v1; empty means off.
    pub listen: String,
}

/// One `[[table]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Table name; bare in schema public, else `schema.table`.
    pub name: String,
    /// Column whose text is the Kafka record key; absent: the primary key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Left join with a lookup table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lookup: Option<Lookup>,
    /// Derived columns, in order; a later one may use an earlier one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub derive: Vec<Derive>,
}

/// `[table.lookup]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lookup {
    /// The lookup table; must be in the publication and have a single-column primary key.
    pub table: String,
    /// Column of this table that holds the lookup table's primary key.
    pub on: String,
    /// Columns to join.
    pub columns: Vec<String>,
}

/// `[[table.derive]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Derive {
    /// Name of the derived column.
    pub name: String,
    /// Dividend and divisor.
    pub divide: [Operand; 2],
    /// Digits after the point; rounded half away from zero.
    pub scale: u32,
}

/// A column's name or an integer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Operand {
    /// A constant.
    Number(i64),
    /// A source, lookup or earlier derived column.
    Column(String),
}

/// librdkafka takes every value as text; TOML may say `linger.ms = 5` or `"5"`.
fn scalars<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<String, String>, D::Error> {
    BTreeMap::<String, toml::Value>::deserialize(d)?
        .into_iter()
        .map(|(key, value)| match value {
            toml::Value::String(s) => Ok((key, s)),
            toml::Value::Integer(n) => Ok((key, n.to_string())),
            toml::Value::Float(n) => Ok((key, n.to_string())),
            toml::Value::Boolean(b) => Ok((key, b.to_string())),
            other => Err(serde::de::Error::custom(format!(
                "kafka.\"{key}\" is {}; needed: a quoted librdkafka key with a string, number or boolean",
                other.type_str()
            ))),
        })
        .collect()
}

impl Config {
    /// Reads the file (if any) and the environment over the defaults.
    ///
    /// # Errors
    /// [`Error::Refused`] with the key, what was found and what is needed.
    pub fn load(file: Option<&Path>, env: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let mut tree = parse_toml(DEFAULTS, "built-in defaults")?;
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(|e| {
                refused(format!("{}: {e}", path.display()), "a readable file", "name an existing file with -c")
            })?;
            overlay(&mut tree, parse_toml(&text, &path.display().to_string())?);
        }
        for (name, value) in env {
            overlay_env(&mut tree, &name, &value)?;
        }
        if let Some(found) = mistyped("", &parse_toml(DEFAULTS, "built-in defaults")?, &tree) {
            return Err(refused(found, "the keys and types of config/falaj.toml", "mend the key that is named"));
        }
        let config: Self = toml::Value::Table(tree).try_into().map_err(|e: toml::de::Error| {
            refused(
                e.to_string().trim().replace('\n', " "),
                "the keys and types of config/falaj.toml",
                "mend the key that is named",
            )
        })?;
        config.validate()?;
        Ok(config)
    }

    /// The defaults alone.
    ///
    /// # Errors
    /// None in a build that passed its tests.
    pub fn defaults() -> Result<Self> {
        Self::load(None, [])
    }

    /// Topic of a table.
    pub fn topic(&self, table: &str) -> String {
        self.kafka.topic(&self.pipeline, table)
    }

    /// The compacted topic that holds the Kafka sink's position.
    pub fn checkpoint_topic(&self) -> String {
        format!("{}.checkpoint", self.pipeline)
    }

    /// The topic of what the outside system finally refused.
    pub fn dead_letter_topic(&self) -> String {
        format!("{}.dead_letter", self.pipeline)
    }

    /// Settings of a table; `None` for one without an entry.
    pub fn table(&self, name: &str) -> Option<&Table> {
        self.tables.iter().find(|t| t.name == name)
    }

    fn validate(&self) -> Result<()> {
        let plain = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b));
        if !plain(&self.pipeline) {
            return Err(refused(
                format!("pipeline = {:?}", self.pipeline),
                "letters, digits, `_`, `-`, `.` (it becomes part of topic and key names)",
                "choose another name",
            ));
        }
        if self.produce.sinks.is_empty() {
            return Err(refused("produce.sinks = []", "kafka, archive or both", "name at least one sink"));
        }
        let mut named = std::collections::BTreeSet::new();
        if let Some(sink) = self.produce.sinks.iter().find(|sink| !named.insert(**sink as u8)) {
            return Err(refused(format!("produce.sinks names {sink:?} twice"), "each sink once", "remove one of them"));
        }
        if !self.kafka.topic.contains("{table}") {
            return Err(refused(
                format!("kafka.topic = {:?}", self.kafka.topic),
                "a name that contains {table}: every table has its own topic",
                "use the default \"{pipeline}.{table}\"",
            ));
        }
        let (partitions, copies) = (self.kafka.partitions, self.kafka.replication_factor);
        if partitions < 1 || (copies < 1 && copies != -1) {
            return Err(refused(
                format!("kafka.partitions = {partitions}, kafka.replication_factor = {copies}"),
                "1 or more; replication_factor also -1, the broker's default",
                "mend them",
            ));
        }
        if let Some(h) = self.kafka.headers.as_deref().filter(|h| *h != "cloudevents") {
            return Err(refused(format!("kafka.headers = {h:?}"), "\"cloudevents\", or no such key", "remove the key"));
        }
        // Names and values alone: no broker is asked, and no file opened once plugins are left out.
        let mut client = kafka::consumer(&self.kafka, false);
        client.remove("plugin.library.paths");
        client.create_native_config().map_err(|e| kafka::error(&self.kafka, &e))?;
        if self.external.in_flight == 0 {
            return Err(refused("external.in_flight = 0", "1 or more", "raise it"));
        }
        if self.external.timeout.0.is_zero() {
            return Err(refused("external.timeout = 0", "more than 0: each request would time out", "raise it"));
        }
        let mut seen = std::collections::BTreeSet::new();
        match self.tables.iter().find(|t| !seen.insert(&t.name)) {
            Some(t) => {
                Err(refused(format!("two [[table]] blocks named {:?}", t.name), "one block a table", "merge the two"))
            }
            None => Ok(()),
        }
    }
}

impl Kafka {
    /// Topic of `table` in `pipeline`.
    pub fn topic(&self, pipeline: &str, table: &str) -> String {
        self.topic.replace("{pipeline}", pipeline).replace("{table}", &crate::archive::encode_topic(table))
    }

    /// `bootstrap.servers`, for messages.
    pub fn servers(&self) -> &str {
        self.client.get("bootstrap.servers").map_or("(bootstrap.servers is not set)", String::as_str)
    }
}

fn refused(found: impl Into<String>, needed: &str, fix: &str) -> Error {
    Error::refused("configuration", found, needed, fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
    }

    #[test]
    fn defaults_are_the_contract() {
        let c = Config::defaults().unwrap();
        assert_eq!(c.topic("engagement_events"), "falaj.engagement_events");
        assert_eq!(c.kafka.servers(), "127.0.0.1:9092");
        assert_eq!(c.archive.seal_bytes, ByteSize(64 << 20));
        assert_eq!(c.tables[0].derive[1].divide[1], Operand::Column("length_seconds".into()));
        assert_eq!(c.bigquery.project, None);
        assert_eq!(c.external.error_patience.to_string(), "10s");
    }

    #[test]
    fn environment_wins_over_file_and_keeps_types() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f.toml");
        std::fs::write(&file, "pipeline = \"a\"\n[kafka]\n\"linger.ms\" = 7\npartitions = 5\n").unwrap();
        let e = env(&[
            ("FALAJ_PIPELINE", "b"),
            ("FALAJ_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1"),
            ("FALAJ_KAFKA__REPLICATION_FACTOR", "3"),
            ("FALAJ_PRODUCE__SINKS", "kafka"),
            ("FALAJ_STACK_DIR", "ignored"),
        ]);
        let c = Config::load(Some(&file), e).unwrap();
        assert_eq!((c.pipeline.as_str(), c.kafka.partitions, c.kafka.replication_factor), ("b", 5, 3));
        assert_eq!(c.kafka.client["linger.ms"], "7");
        assert_eq!(c.kafka.client["bootstrap.servers"], "127.0.0.1:1");
        assert_eq!(c.produce.sinks, [SinkName::Kafka]);
    }

    #[test]
    fn unknown_keys_and_bad_values_are_refused_with_78() {
        for e in [
            ("FALAJ_POSTGRES__SLOTT", "x"),
            ("FALAJ_NOWHERE__KEY", "x"),
            ("FALAJ_ARCHIVE__SEAL_BYTES", "many"),
            ("FALAJ_ARCHIVE__SEAL_AFTER", "60"),
            ("FALAJ_KAFKA__PARTITIONS", "0"),
            ("FALAJ_PRODUCE__SINKS", "kafka,nowhere"),
            ("FALAJ_PIPELINE", "a b"),
            ("FALAJ_PRODUCE__SINKS", "kafka,kafka"),
            ("FALAJ_EXTERNAL__TIMEOUT", "0s"),
        ] {
            let got = Config::load(None, env(&[e])).unwrap_err();
            assert_eq!(got.exit_code(), 78, "{e:?}: {got}");
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f.toml");
        for (text, key) in [
            ("pipeline = 7", "pipeline = 7; its type is string"),
            ("[kafka]\npartitions = \"x\"", "kafka.partitions = \"x\"; its type is integer"),
            ("[external]\nhistory = 1", "external.history = 1; its type is boolean"),
            ("redis = 1", "redis = 1; its type is table"),
        ] {
            std::fs::write(&file, text).unwrap();
            let got = Config::load(Some(&file), env(&[])).unwrap_err().to_string();
            assert!(got.contains(key), "{got}");
        }
    }

    #[test]
    fn a_key_or_value_that_kafkas_client_does_not_know_is_refused_without_the_value() {
        let load = |name: &str, value: &str| Config::load(None, env(&[(name, value)]));
        for (name, key) in [("FALAJ_KAFKA__SASL_PASWORD", "sasl.pasword"), ("FALAJ_KAFKA__ACKS", "acks")] {
            let got = load(name, "s3cret").unwrap_err();
            assert_eq!(got.exit_code(), 78, "{got}");
            assert!(got.to_string().contains(key) && !got.to_string().contains("s3cret"), "{got}");
        }
        // Keys of producers, consumers and topics; none of these files is there.
        for (name, value) in [
            ("FALAJ_KAFKA__SESSION_TIMEOUT_MS", "60000"),
            ("FALAJ_KAFKA__TRANSACTION_TIMEOUT_MS", "3000"),
            ("FALAJ_KAFKA__QUEUE_BUFFERING_MAX_MS", "5"),
            ("FALAJ_KAFKA__CLIENT_RACK", "a"),
            ("FALAJ_KAFKA__SSL_CA_LOCATION", "/nowhere/ca.pem"),
        ] {
            load(name, value).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }

    #[test]
    fn a_value_that_does_not_fit_is_told_with_its_key() {
        for (name, value, key) in [
            ("FALAJ_ARCHIVE__SEAL_BYTES", "many", "archive.seal_bytes"),
            ("FALAJ_EXTERNAL__IN_FLIGHT", "-1", "external.in_flight"),
            ("FALAJ_KAFKA__TOO_LARGE", "x", "kafka.too_large"),
        ] {
            let error = Config::load(None, [(name.to_owned(), value.to_owned())]).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
    }

    #[test]
    fn a_line_that_is_no_toml_is_named_and_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f.toml");
        std::fs::write(&file, "pipeline = \"a\"\n\n[kafka]\n\"sasl.password\" = secret\n").unwrap();
        let got = Config::load(Some(&file), env(&[])).unwrap_err().to_string();
        assert!(got.contains("f.toml, line 4: ") && !got.contains("secret"), "{got}");
    }
}
