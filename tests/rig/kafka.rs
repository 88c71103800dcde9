//! Reads topics as a consumer outside would: read_committed, from the beginning to the end.

use std::time::{Duration, Instant};

use falaj::config::{Config, Kafka};
use rdkafka::admin::{AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, Headers};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::{Message, Offset, TopicPartitionList};

use super::{DEADLINE, until};

/// One record of a topic.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<String>,
    pub value: String,
    /// ms since the Unix epoch.
    pub timestamp: Option<i64>,
    /// Name and value.
    pub headers: Vec<(String, String)>,
}

/// Every committed record of a topic, partition by partition.
pub async fn records(config: &Config, topic: &str) -> Vec<Record> {
    settled_ends(config, &[topic.to_owned()]).await;
    let mut client = falaj::kafka::client(&config.kafka);
    client.set("group.id", "unused").set("isolation.level", "read_committed");
    client.set("enable.partition.eof", "true").set("enable.auto.commit", "false");
    let topic = topic.to_owned();
    tokio::task::spawn_blocking(move || read(&client.create().unwrap(), &topic)).await.unwrap()
}

fn read(consumer: &BaseConsumer, topic: &str) -> Vec<Record> {
    let metadata = consumer.fetch_metadata(Some(topic), DEADLINE).unwrap();
    let mut open = metadata.topics()[0].partitions().len();
    assert!(open > 0, "no topic {topic}");
    let mut list = TopicPartitionList::new();
    for partition in 0..open as i32 {
        list.add_partition_offset(topic, partition, Offset::Beginning).unwrap();
    }
    consumer.assign(&list).unwrap();
    let mut records = Vec::new();
    while open > 0 {
        match consumer.poll(DEADLINE).unwrap_or_else(|| panic!("{topic} cannot be read")) {
            Ok(m) => records.push(Record {
                partition: m.partition(),
                offset: m.offset(),
                key: m.key().map(|k| String::from_utf8(k.to_vec()).unwrap()),
                value: String::from_utf8(m.payload().unwrap_or_default().to_vec()).unwrap(),
                timestamp: m.timestamp().to_millis(),
                headers: m.headers().map(|all| all.iter().map(header).collect()).unwrap_or_default(),
            }),
            Err(KafkaError::PartitionEOF(_)) => open -= 1,
            Err(e) => panic!("{topic}: {e}"),
        }
    }
    records.sort();
    records
}

fn header(header: Header<'_, &[u8]>) -> (String, String) {
    (header.key.to_owned(), String::from_utf8(header.value.unwrap_or_default().to_vec()).unwrap())
}

/// Ends of all partitions for a reader of what is committed.
pub async fn ends(config: &Config, topics: &[String]) -> Vec<i64> {
    ends_at(config, topics, "read_committed").await
}

/// Ends of all partitions of a topic, with what is not committed.
pub async fn ends_of_all(config: &Config, topic: &str) -> Vec<i64> {
    ends_at(config, &[topic.to_owned()], "read_uncommitted").await
}

/// Ends of all partitions, once no transaction is open in any: a broker answers a commit before each partition has its mark.
pub async fn settled_ends(config: &Config, topics: &[String]) -> Vec<i64> {
    let mut found = Vec::new();
    until("every transaction has ended", async || {
        found = ends_at(config, topics, "read_uncommitted").await;
        found == ends(config, topics).await
    })
    .await;
    found
}

async fn ends_at(config: &Config, topics: &[String], isolation: &str) -> Vec<i64> {
    let mut client = falaj::kafka::client(&config.kafka);
    client.set("group.id", "unused").set("isolation.level", isolation);
    let topics = topics.to_vec();
    let work = move || {
        let consumer: BaseConsumer = client.create().unwrap();
        let mut ends = Vec::new();
        for topic in &topics {
            let metadata = consumer.fetch_metadata(Some(topic), DEADLINE).unwrap();
            for partition in 0..metadata.topics()[0].partitions().len() as i32 {
                ends.push(end(&consumer, topic, partition));
            }
        }
        ends
    };
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// A broker that has just come back does not lead its partitions at once.
fn end(consumer: &BaseConsumer, topic: &str, partition: i32) -> i64 {
    let began = Instant::now();
    loop {
        match consumer.fetch_watermarks(topic, partition, DEADLINE) {
            Ok((_, end)) => return end,
            Err(e) => assert!(began.elapsed() < DEADLINE, "{topic}, partition {partition}: {e}"),
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// An open transaction with a record in each partition of a topic: nothing behind them is readable until it has ended.
pub async fn open_transaction(config: &Config, topic: &str, partitions: i32) -> BaseProducer {
    let mut client = falaj::kafka::client(&config.kafka);
    client.set("transactional.id", format!("{topic}.open"));
    let topic = topic.to_owned();
    let work = move || {
        let producer: BaseProducer = client.create().unwrap();
        producer.init_transactions(DEADLINE).unwrap();
        producer.begin_transaction().unwrap();
        for partition in 0..partitions {
            let record = BaseRecord::to(&topic).partition(partition).key("open").payload("never committed");
            producer.send(record).map_err(|(e, _)| e).unwrap();
        }
        producer.flush(DEADLINE).unwrap();
        producer
    };
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// Writes one record by hand.
pub async fn write(config: &Config, topic: &str, key: &str, value: &str) {
    let client = falaj::kafka::client(&config.kafka);
    let (topic, key, value) = (topic.to_owned(), key.to_owned(), value.to_owned());
    let work = move || {
        let producer: BaseProducer = client.create().unwrap();
        producer.send(BaseRecord::to(&topic).key(&key).payload(&value)).map_err(|(e, _)| e).unwrap();
        producer.flush(DEADLINE).unwrap();
    };
    tokio::task::spawn_blocking(work).await.unwrap();
}

/// A topic's setting.
pub async fn setting(config: &Kafka, topic: &str, key: &str) -> Option<String> {
    let admin = falaj::kafka::admin(config).unwrap();
    let resource = ResourceSpecifier::Topic(topic);
    let mut described = admin.describe_configs([&resource], &AdminOptions::new()).await.unwrap();
    described.remove(0).unwrap().get(key)?.value.clone()
}

/// Changes one setting of a topic, and waits until the broker goes by it.
pub async fn configure(config: &Config, topic: &str, key: &str, value: &str) {
    let admin = falaj::kafka::admin(&config.kafka).unwrap();
    let (resource, options) = (ResourceSpecifier::Topic(topic), AdminOptions::new());
    let alter = AlterConfig::new(resource).set(key, value);
    admin.alter_configs([&alter], &options).await.unwrap().remove(0).unwrap();
    until("the topic has the setting", async || setting(&config.kafka, topic, key).await.as_deref() == Some(value))
        .await;
}
