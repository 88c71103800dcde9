//! The board against real Kafka and Redis: what `board --json` prints equals a count made here from the events.

mod model;
mod operator;
mod pitfalls;
mod promises;
mod servers;

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use falaj::config::{Config, Kafka};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use redis::Commands;
use serde_json::Value;

use model::{Ev, expected};

const DEADLINE: Duration = Duration::from_secs(90);
const TABLE: &str = "engagement_events";
/// More contents than any test has.
const ALL: &str = "100000";

/// One test's own pipeline, topic and Redis keys on the shared servers.
struct Rig {
    config: Config,
    env: Vec<(String, String)>,
    producer: Option<BaseProducer>,
    written: Vec<Ev>,
}

impl Rig {
    fn new(name: &str) -> Self {
        let redis =
            std::env::var("FALAJ_REDIS__URL").expect("FALAJ_REDIS__URL is unset: eval \"$(dev/stack env)\" first");
        Self::with_redis(name, &redis)
    }

    fn with_redis(name: &str, redis: &str) -> Self {
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let kafka = std::env::var("FALAJ_KAFKA__BOOTSTRAP_SERVERS")
            .expect("FALAJ_KAFKA__BOOTSTRAP_SERVERS is unset: eval \"$(dev/stack env)\" first");
        let env: Vec<(String, String)> = [
            ("FALAJ_PIPELINE", format!("board_{name}_{nanos}")),
            ("FALAJ_KAFKA__BOOTSTRAP_SERVERS", kafka),
            ("FALAJ_REDIS__URL", redis.to_owned()),
            ("FALAJ_HTTP__LISTEN", String::new()),
        ]
        .map(|(k, v)| (k.to_owned(), v))
        .into();
        let config = Config::load(None, env.clone()).unwrap();
        let rig = Self { config, env, producer: None, written: Vec::new() };
        rig.make_topic(3);
        rig
    }

    fn topic(&self) -> String {
        self.config.topic(TABLE)
    }

    fn make_topic(&self, partitions: i32) {
        let (kafka, topic, count) = (&self.config.kafka, self.topic(), partitions as usize);
        block_on(falaj::kafka::create_topic(kafka, &topic, partitions, &[])).unwrap();
        eventually("the topic is there", || falaj::kafka::partitions(kafka, &topic).is_ok_and(|n| n == Some(count)));
    }

    fn make_topic_anew(&mut self, partitions: i32) {
        let (kafka, topic) = (&self.config.kafka, self.topic());
        let admin = falaj::kafka::admin(kafka).unwrap();
        block_on(admin.delete_topics(&[&topic], &rdkafka::admin::AdminOptions::new())).unwrap();
        eventually("the topic is gone", || falaj::kafka::partitions(kafka, &topic).is_ok_and(|n| n.is_none()));
        self.make_topic(partitions);
        self.producer = None;
        self.written.clear();
    }

    /// How many instances the board's group has; `None` while it shares the partitions out, or is not known yet.
    fn members(&self) -> Option<usize> {
        let consumer: BaseConsumer = falaj::kafka::client(&self.config.kafka).create().unwrap();
        let name = format!("{}.redis", self.config.pipeline);
        let groups = consumer.fetch_group_list(Some(&name), DEADLINE).ok()?;
        groups.groups().iter().find(|group| group.state() == "Stable").map(|group| group.members().len())
    }

    /// One committed Kafka transaction.
    fn write(&mut self, events: &[Ev]) {
        self.transaction(events);
        self.producer().commit_transaction(DEADLINE).unwrap();
        self.written.extend_from_slice(events);
    }

    /// One committed Kafka transaction of values as they stand, which are nobody's events.
    fn write_values(&mut self, values: &[&str]) {
        self.producer().begin_transaction().unwrap();
        for value in values {
            self.send("k", value, model::now() / 1000);
        }
        self.producer().commit_transaction(DEADLINE).unwrap();
    }

    /// One Kafka transaction that nobody may see.
    fn abort(&mut self, events: &[Ev]) {
        self.transaction(events);
        self.producer().abort_transaction(DEADLINE).unwrap();
    }

    fn transaction(&mut self, events: &[Ev]) {
        self.producer().begin_transaction().unwrap();
        for event in events {
            self.send(&event.key(), &event.json(), event.commit_ts / 1000);
        }
        // The client's own flush waits in steps of 100 ms.
        while self.producer().in_flight_count() > 0 {
            self.producer().poll(Duration::from_millis(1));
        }
    }

    fn send(&mut self, key: &str, value: &str, millis: i64) {
        let topic = self.topic();
        let record = BaseRecord::to(&topic).key(key).payload(value).timestamp(millis);
        self.producer().send(record).map_err(|(e, _)| e).unwrap();
    }

    fn producer(&mut self) -> &BaseProducer {
        let transactional_id = format!("{}.test", self.config.pipeline);
        self.producer.get_or_insert_with(|| transactional(&self.config.kafka, &transactional_id))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_falaj"));
        command.args(args).envs(self.env.iter().map(|(k, v)| (k, v))).stdin(Stdio::null());
        command
    }

    fn consume(&self) -> Running {
        let mut command = self.command(&["consume", "--sinks", "redis"]);
        Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn consume_until_end(&self) {
        let out = self.command(&["consume", "--sinks", "redis", "--until-end"]).output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
    }

    fn board(&self) -> Value {
        let out = self.command(&["board", "--json", "--top", ALL]).output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// The board equals the count over everything written, at the board's own moment.
    fn assert_board(&self) {
        let board = self.board();
        assert_eq!(board, expected(&self.written, &board));
    }

    fn board_is_right(&self) -> bool {
        let board = self.board();
        board == expected(&self.written, &board)
    }

    /// What `falaj status --json` prints.
    fn status(&self) -> Value {
        let out = self.command(&["status", "--json"]).output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// How many records of all partitions Redis stands behind.
    fn stored(&self) -> i64 {
        let mut redis = redis::Client::open(self.config.redis.url.as_str()).unwrap().get_connection().unwrap();
        let fields: std::collections::HashMap<String, String> = redis.hgetall(self.key()).unwrap();
        fields.iter().filter(|(k, _)| k.starts_with("offset:")).map(|(_, v)| v.parse::<i64>().unwrap()).sum()
    }

    fn key(&self) -> String {
        format!("{{falaj:{}}}", self.config.pipeline)
    }
}

fn transactional(kafka: &Kafka, id: &str) -> BaseProducer {
    let producer: BaseProducer =
        falaj::kafka::client(kafka).set("transactional.id", id).set("linger.ms", "2").create().unwrap();
    producer.init_transactions(DEADLINE).unwrap();
    producer
}

/// A process that dies with the test.
struct Running(Child);

impl Running {
    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([&format!("-{signal}"), &self.0.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Ends it as an operator does, and gives its exit code.
    fn terminate(mut self) -> Option<i32> {
        self.signal("TERM");
        self.0.wait().unwrap().code()
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(future)
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}
