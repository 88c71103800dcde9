//! What a test of the outside path needs: topics of its own, a producer, the simulated peer, the binary under test.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime};

use falaj::config::Config;
use falaj::kafka;
use falaj::mock_external::{Faults, Mock, serve};
use rdkafka::admin::AdminOptions;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::rig::stack::Stack;

/// No condition of these tests may take longer.
pub const DEADLINE: Duration = Duration::from_secs(90);
const KAFKA: &str = "FALAJ_KAFKA__BOOTSTRAP_SERVERS";
const LISTEN: &str = "FALAJ_HTTP__LISTEN";

/// A pipeline of its own: topics, consumer group, peer.
pub struct Stage {
    pub config: Config,
    pub peer: Peer,
    env: BTreeMap<String, String>,
}

/// The simulated peer at a fixed address; it can go away and come back.
pub struct Peer {
    pub mock: Mock,
    pub address: SocketAddr,
    stop: CancellationToken,
}

/// Where one process serves HTTP.
pub struct Http(SocketAddr);

impl Http {
    /// The checks that fail in `/readyz`; `None` while nothing answers.
    pub async fn failing(&self) -> Option<Vec<String>> {
        let text = reqwest::get(format!("http://{}/readyz", self.0)).await.ok()?.text().await.ok()?;
        let answer: Value = serde_json::from_str(&text).unwrap();
        Some(answer["failing"].as_object().unwrap().keys().cloned().collect())
    }

    pub async fn is_ready(&self) -> bool {
        self.failing().await.is_some_and(|failing| failing.is_empty())
    }

    /// Whether this check is the only one that fails.
    pub async fn lacks(&self, check: &str) -> bool {
        self.failing().await.is_some_and(|failing| failing == [check])
    }
}

impl Peer {
    async fn start(faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut peer = Self { mock: Mock::new(faults), address, stop: CancellationToken::new() };
        peer.serve(listener);
        peer
    }

    fn serve(&mut self, listener: TcpListener) {
        self.stop = CancellationToken::new();
        tokio::spawn(serve(listener, self.mock.clone(), self.stop.clone()));
    }

    /// Nobody listens any more, every connection is dead.
    pub async fn go_away(&self) {
        self.stop.cancel();
        until("the port is closed", async || tokio::net::TcpStream::connect(self.address).await.is_err()).await;
    }

    pub async fn come_back(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.serve(listener);
    }

    pub async fn has(&self, unique: u64) {
        until(&format!("{unique} events have arrived"), async || self.mock.received().counts().unique >= unique).await;
    }
}

impl Stage {
    pub async fn new(name: &str, partitions: i32, faults: Faults) -> Self {
        Self::bare(name, faults).await.with_topics(partitions).await
    }

    async fn with_topics(self, partitions: i32) -> Self {
        for topic in [self.topic(), self.config.dead_letter_topic()] {
            kafka::create_topic(&self.config.kafka, &topic, partitions, &[]).await.unwrap();
        }
        self
    }

    /// Removes the topic of events and makes it again.
    pub async fn make_topic_anew(&self, partitions: i32) {
        let (kafka, topic) = (&self.config.kafka, self.topic());
        kafka::admin(kafka).unwrap().delete_topics(&[&topic], &AdminOptions::new()).await.unwrap();
        until("the topic is gone", async || kafka::partitions(kafka, &topic).is_ok_and(|n| n.is_none())).await;
        kafka::create_topic(kafka, &topic, partitions, &[]).await.unwrap();
    }

    /// Without any topic.
    pub async fn bare(name: &str, faults: Faults) -> Self {
        let servers = std::env::var(KAFKA)
            .unwrap_or_else(|_| panic!("{KAFKA} is not set: dev/stack up kafka; eval \"$(dev/stack env)\""));
        Self::bare_on(servers, name, faults).await
    }

    /// On a Kafka of the test's own.
    pub async fn on(stack: &Stack, name: &str, partitions: i32, faults: Faults) -> Self {
        Self::bare_on(stack.addresses()[KAFKA].clone(), name, faults).await.with_topics(partitions).await
    }

    async fn bare_on(servers: String, name: &str, faults: Faults) -> Self {
        let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
        let peer = Peer::start(faults).await;
        let env = BTreeMap::from([
            ("FALAJ_PIPELINE".to_owned(), format!("ext-{name}-{nanos}")),
            (KAFKA.to_owned(), servers),
            ("FALAJ_EXTERNAL__URL".to_owned(), format!("http://{}/events", peer.address)),
            (LISTEN.to_owned(), String::new()),
        ]);
        Self { config: Config::load(None, env.clone()).unwrap(), peer, env }
    }

    pub fn set(&mut self, key: &str, value: &str) {
        self.env.insert(key.to_owned(), value.to_owned());
    }

    /// The next process serves HTTP, on a port that is free now, which is returned.
    pub fn serve_http(&mut self) -> Http {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        self.set(LISTEN, &free.to_string());
        Http(free)
    }

    /// A metric without labels; `None` while it is not served.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let text = reqwest::get(format!("http://{}/metrics", self.env[LISTEN])).await.ok()?.text().await.ok()?;
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    pub fn topic(&self) -> String {
        self.config.topic("engagement_events")
    }

    /// Starts `falaj consume --sinks external` with more flags.
    pub fn consume(&self, flags: &[&str]) -> Process {
        let args = [&["consume", "--sinks", "external"], flags].concat();
        Process::start(&args, &self.env)
    }

    /// One Kafka transaction of records `(partition, key, value)`, committed or aborted.
    pub async fn send(&self, records: Vec<(i32, Option<String>, Vec<u8>)>, commit: bool) {
        let (mut client, topic) = (self.client(), self.topic());
        client.set("transactional.id", format!("{topic}.test")).set("linger.ms", "5");
        let work = move || {
            let producer: ThreadedProducer<DefaultProducerContext> = client.create().unwrap();
            producer.init_transactions(DEADLINE).unwrap();
            producer.begin_transaction().unwrap();
            for (partition, key, value) in &records {
                let mut record = BaseRecord::<String, [u8]>::to(&topic).partition(*partition).payload(value);
                record.key = key.as_ref();
                while let Err((_, again)) = producer.send(record) {
                    producer.flush(DEADLINE).unwrap();
                    record = again;
                }
            }
            match commit {
                true => producer.commit_transaction(DEADLINE).unwrap(),
                false => producer.abort_transaction(DEADLINE).unwrap(),
            }
        };
        tokio::task::spawn_blocking(work).await.unwrap();
    }

    /// Sends numbered events `range`; event n has key n modulo `keys` and partition key modulo `partitions`.
    pub async fn send_events(&self, range: std::ops::Range<u64>, keys: u64, partitions: u64) {
        let record = |n: u64| ((n % keys % partitions) as i32, Some(format!("k{}", n % keys)), event(n, "c"));
        self.send(range.map(record).collect(), true).await;
    }

    /// What retention does, at once, to partition 0.
    pub async fn delete_records_below(&self, offset: i64) {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.topic(), 0, Offset::Offset(offset)).unwrap();
        let admin = kafka::admin(&self.config.kafka).unwrap();
        admin.delete_records(&list, &AdminOptions::new()).await.unwrap();
    }

    /// What the group has committed, a partition each; `None` where nothing is.
    pub async fn committed(&self, partitions: i32) -> Vec<Option<i64>> {
        let (mut client, topic) = (self.client(), self.topic());
        client.set("group.id", format!("{}.external", self.config.pipeline));
        let work = move || {
            let consumer: BaseConsumer = client.create().unwrap();
            let mut list = TopicPartitionList::new();
            list.add_partition_range(&topic, 0, partitions - 1);
            let found = match consumer.committed_offsets(list, DEADLINE) {
                // A broker that has just started.
                Err(e) if e.rdkafka_error_code() == Some(RDKafkaErrorCode::NotCoordinator) => {
                    return vec![None; partitions as usize];
                }
                found => found.unwrap(),
            };
            let offset = |offset| if let Offset::Offset(n) = offset { Some(n) } else { None };
            found.elements().into_iter().map(|e| offset(e.offset())).collect()
        };
        tokio::task::spawn_blocking(work).await.unwrap()
    }

    /// The last stable offset of each partition.
    pub async fn ends(&self, partitions: i32) -> Vec<Option<i64>> {
        let (mut client, topic) = (self.client(), self.topic());
        client.set("isolation.level", "read_committed").set("group.id", "unused");
        let work = move || {
            let consumer: BaseConsumer = client.create().unwrap();
            (0..partitions).map(|p| Some(consumer.fetch_watermarks(&topic, p, DEADLINE).unwrap().1)).collect()
        };
        tokio::task::spawn_blocking(work).await.unwrap()
    }

    /// Every dead letter there is: key and value.
    pub async fn dead_letters(&self) -> Vec<(Option<String>, Value)> {
        let (mut client, topic) = (self.client(), self.config.dead_letter_topic());
        client.set("group.id", "unused").set("enable.partition.eof", "true").set("enable.auto.commit", "false");
        let work = move || {
            let consumer: BaseConsumer = client.create().unwrap();
            let metadata = consumer.fetch_metadata(Some(&topic), DEADLINE).unwrap();
            let mut list = TopicPartitionList::new();
            let mut open = metadata.topics()[0].partitions().len();
            for partition in 0..open as i32 {
                list.add_partition_offset(&topic, partition, Offset::Beginning).unwrap();
            }
            consumer.assign(&list).unwrap();
            let mut letters = Vec::new();
            while open > 0 {
                match consumer.poll(DEADLINE).expect("the dead-letter topic can be read") {
                    Ok(m) => letters.push((
                        m.key().map(|k| String::from_utf8(k.to_vec()).unwrap()),
                        serde_json::from_slice(m.payload().unwrap()).unwrap(),
                    )),
                    Err(rdkafka::error::KafkaError::PartitionEOF(_)) => open -= 1,
                    Err(e) => panic!("{e}"),
                }
            }
            letters
        };
        tokio::task::spawn_blocking(work).await.unwrap()
    }

    fn client(&self) -> ClientConfig {
        kafka::client(&self.config.kafka)
    }
}

/// `_id` of test event n.
pub fn id(n: u64) -> String {
    format!("{:016X}:{:010}", 0x0001_0000_0000 + n, 0)
}

/// Body of test event n.
pub fn event(n: u64, op: &str) -> Vec<u8> {
    format!(r#"{{"id":{n},"amount":1.10,"device":"web‑safari","_id":"{}","_op":"{op}"}}"#, id(n)).into_bytes()
}

/// The binary under test; killed when dropped.
pub struct Process(Child);

impl Process {
    pub fn start(args: &[&str], env: &BTreeMap<String, String>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_falaj"));
        command.args(args).envs(env).stdin(Stdio::null()).stderr(Stdio::piped());
        Self(command.spawn().unwrap())
    }

    pub fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    pub fn terminate(&self) {
        self.signal("-TERM");
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.0.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits for the end: exit code and standard error.
    pub async fn end(mut self) -> (Option<i32>, String) {
        let mut pipe = self.0.stderr.take().unwrap();
        let reading = tokio::task::spawn_blocking(move || {
            let mut text = Vec::new();
            std::io::Read::read_to_end(&mut pipe, &mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        });
        let mut status: Option<ExitStatus> = None;
        until("the process ends", async || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        })
        .await;
        (status.unwrap().code(), reading.await.unwrap())
    }

    /// Waits for a clean end.
    pub async fn ends_well(self) {
        let (code, log) = self.end().await;
        assert_eq!(code, Some(0), "{log}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for a condition, up to [`DEADLINE`].
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
