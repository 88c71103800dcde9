//! What every Kafka client of falaj shares: configuration, error classes, metadata, topics.

mod committed;
mod probe;
mod topic_id;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::{Client, DefaultClientContext};
use rdkafka::error::KafkaError;
use rdkafka::metadata::Metadata;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{ClientConfig, ClientContext};

use crate::config::Kafka;
use crate::error::{Error, Result};

pub use committed::{read_committed, settle};
pub use probe::{Probe, explained};
pub use topic_id::topic_id;

/// `transaction.timeout.ms` where nothing else is set.
pub const TRANSACTION_TIMEOUT: &str = "60000";

/// How long the broker leaves a transaction open. A setting that is no number is refused by librdkafka.
pub fn transaction_timeout(config: &Kafka) -> Duration {
    let timeout = config.client.get("transaction.timeout.ms").map_or(TRANSACTION_TIMEOUT, String::as_str);
    Duration::from_millis(timeout.parse().unwrap_or_default())
}

/// How long a metadata or admin request may take.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// Between two looks at whether a broker names a new topic.
const STEP: Duration = Duration::from_millis(10);

/// Settings that falaj has a value for, and librdkafka's other names for them.
const ALIASES: [(&str, &str); 3] = [
    ("compression.type", "compression.codec"),
    ("linger.ms", "queue.buffering.max.ms"),
    ("message.timeout.ms", "delivery.timeout.ms"),
];

/// The key by which a broker lets a consumer read from a follower nearby.
const RACK: &str = "client.rack";

/// A client configuration with the user's librdkafka keys, but for `client.rack`: the end that a follower tells may lie
/// before the leader's, and who reads to the end would take an old position for the newest. Roles set their own keys *after* this: a promise is not configurable.
pub fn client(config: &Kafka) -> ClientConfig {
    client_over(config, &[])
}

/// Like [`client`], over a role's own defaults: these the user's keys may change.
pub fn client_over(config: &Kafka, defaults: &[(&str, &str)]) -> ClientConfig {
    let mut client = ClientConfig::new();
    client.set("client.id", "falaj");
    for (key, value) in defaults {
        // Of two names for one thing librdkafka would take either.
        let alias = ALIASES.iter().find(|(name, _)| name == key).map(|(_, alias)| *alias);
        if alias.is_none_or(|alias| !config.client.contains_key(alias)) {
            client.set(*key, *value);
        }
    }
    for (key, value) in config.client.iter().filter(|(key, _)| *key != RACK) {
        client.set(key, value);
    }
    client
}

/// Like [`client`], for a consumer that may read from a follower, unless it reads to an end.
pub fn consumer(config: &Kafka, until_end: bool) -> ClientConfig {
    let mut client = client(config);
    if let Some(rack) = config.client.get(RACK).filter(|_| !until_end) {
        client.set(RACK, rack);
    }
    client
}

/// An admin client.
///
/// # Errors
/// [`Error::Refused`] for a librdkafka key or value that does not exist.
pub fn admin(config: &Kafka) -> Result<AdminClient<DefaultClientContext>> {
    client(config).create().map_err(|e| error(config, &e))
}

/// Sorts a librdkafka error: refused (rights, configuration), or unreachable for now. `_AUTHENTICATION` is of the latter: it is also
/// what a connection that is cut off within its handshake gives, and a password that was right is not wrong for that. At a start
/// a [`Probe`] tells the two apart.
pub fn error(config: &Kafka, e: &KafkaError) -> Error {
    use RDKafkaErrorCode as Code;
    // Without the value, which may be a secret also under a key that does not exist.
    if let KafkaError::ClientConfig(_, why, key, value) = e {
        return Error::refused(
            "kafka_config",
            format!("kafka.\"{key}\": {}", why.replace(&format!("\"{value}\""), "…")),
            "a key and value that librdkafka knows",
            "mend [kafka] in the configuration",
        );
    }
    // No broker has been asked yet.
    if let KafkaError::ClientCreation(why) = e {
        return Error::refused(
            "kafka_config",
            why,
            "keys that fit together, files that are there",
            "mend [kafka] in the configuration",
        );
    }
    match e.rdkafka_error_code() {
        Some(
            Code::TopicAuthorizationFailed
            | Code::GroupAuthorizationFailed
            | Code::ClusterAuthorizationFailed
            | Code::TransactionalIdAuthorizationFailed
            | Code::SaslAuthenticationFailed,
        ) => no_rights(e.to_string()),
        Some(Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch) => Error::Fenced(e.to_string()),
        _ => Error::unreachable(format!("Kafka at {}", config.servers()), e),
    }
}

/// Whether a reader's place is not in the log (any more), and is not found by waiting.
pub(crate) fn is_place_lost(e: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        e.rdkafka_error_code(),
        Some(
            Code::AutoOffsetReset
                | Code::OffsetOutOfRange
                | Code::UnknownTopicOrPartition
                | Code::UnknownTopic
                | Code::UnknownPartition
                | Code::UnknownTopicId
                | Code::LogTruncation,
        )
    )
}

fn no_rights(found: String) -> Error {
    Error::refused(
        "kafka_rights",
        found,
        "an account that may read, write and use transactions",
        "mend sasl.* under [kafka], or grant the rights (docs/operations.md)",
    )
}

/// Whether the broker would refuse a record again for the same reason.
pub(crate) fn is_for_good(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        code,
        Code::MessageSizeTooLarge | Code::MessageBatchTooLarge | Code::InvalidRecord | Code::InvalidTimestamp
    )
}

/// Creates a topic that is absent, and waits until the broker names it: it answers as soon as the controller knows the topic,
/// and a busy one says for some time yet that there is none. `configs` are topic settings such as
/// `("cleanup.policy", "compact")`.
///
/// # Errors
/// [`Error::Unreachable`] or [`Error::Refused`]; a topic that exists is no error.
pub async fn create_topic(config: &Kafka, name: &str, partitions: i32, configs: &[(&str, &str)]) -> Result<()> {
    let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(config.replication_factor));
    for (key, value) in configs {
        topic = topic.set(key, value);
    }
    let options = AdminOptions::new().operation_timeout(Some(TIMEOUT)).request_timeout(Some(TIMEOUT));
    let admin = admin(config)?;
    let answers = admin.create_topics([&topic], &options).await.map_err(|e| error(config, &e))?;
    for answer in answers {
        match answer {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((topic, code)) => {
                return Err(Error::refused(
                    "kafka_topics",
                    format!("creating {topic}: {code}"),
                    "the right to create topics, and a replication factor that the cluster can hold",
                    "mend kafka.replication_factor, or create the topic by hand",
                ));
            }
        }
    }
    let (config, name) = (config.clone(), name.to_owned());
    blocking(move || until_named(&config, &admin, &name)).await
}

/// Blocking: call it from a blocking thread.
fn until_named(config: &Kafka, admin: &AdminClient<DefaultClientContext>, topic: &str) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !topics_of(config, admin.inner(), TIMEOUT)?.contains_key(topic) {
        if Instant::now() > deadline {
            let at = format!("Kafka at {}", config.servers());
            return Err(Error::unreachable(at, format!("topic {topic} was created and is still not named")));
        }
        std::thread::sleep(STEP);
    }
    Ok(())
}

/// Runs what blocks where it may.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::fatal("asking Kafka", e))?
}

/// Partition count of a topic; `None` when it does not exist. Blocking: call it from a blocking thread.
///
/// # Errors
/// As [`topics`].
pub fn partitions(config: &Kafka, topic: &str) -> Result<Option<usize>> {
    Ok(topics(config, TIMEOUT)?.get(topic).copied())
}

/// Every topic with its partition count. All of them are asked for: a broker that creates topics on demand would make one
/// because it was asked for by name.
/// Blocking: call it from a blocking thread.
///
/// # Errors
/// As [`Probe::metadata`].
pub fn topics(config: &Kafka, patience: Duration) -> Result<BTreeMap<String, usize>> {
    Ok(usable(&Probe::patient(config)?.metadata(patience)?))
}

/// The same through a client that is there: to connect and to end one of its own takes a tenth of a second.
/// Blocking: call it from a blocking thread.
///
/// # Errors
/// [`Error::Unreachable`] when no broker answers within `patience`, whatever the reason.
pub fn topics_of<C: ClientContext>(
    config: &Kafka,
    client: &Client<C>,
    patience: Duration,
) -> Result<BTreeMap<String, usize>> {
    let metadata = client.fetch_metadata(None, patience).map_err(|e| error(config, &e))?;
    probe::has_answered();
    Ok(usable(&metadata))
}

fn usable(metadata: &Metadata) -> BTreeMap<String, usize> {
    let usable = metadata.topics().iter().filter(|t| t.error().is_none() && !t.partitions().is_empty());
    usable.map(|t| (t.name().to_owned(), t.partitions().len())).collect()
}

/// Topics of events and dead letters that are not there: `init` makes them, nothing else does by accident.
pub fn no_topics(missing: &[&str]) -> Error {
    Error::refused(
        "kafka_topics",
        format!("missing: {}", missing.join(", ")),
        "a topic for every published table, and the dead-letter topic",
        "falaj init --yes, or create them by hand",
    )
}

/// The same for the checkpoint topic.
pub fn no_checkpoint(topic: &str) -> Error {
    Error::refused(
        "kafka_checkpoint",
        format!("missing: {topic}"),
        "one partition, cleanup.policy=compact",
        "falaj init --yes",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn the_users_keys_replace_defaults_under_either_name() {
        let mut config = Config::load(None, []).unwrap().kafka;
        let defaults = [("compression.type", "lz4"), ("linger.ms", "20"), ("partitioner", "murmur2_random")];
        let all = |config: &Kafka| {
            let client = client_over(config, &defaults);
            ["compression.type", "compression.codec", "linger.ms"].map(|key| client.get(key).map(str::to_owned))
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(all(&config), [some("lz4"), None, some("20")]);
        config.client.insert("compression.codec".into(), "none".into());
        config.client.insert("linger.ms".into(), "5".into());
        assert_eq!(all(&config), [None, some("none"), some("5")]);
        config.client = [("compression.type".to_owned(), "zstd".to_owned())].into();
        assert_eq!(all(&config), [some("zstd"), None, some("20")]);
    }

    #[test]
    fn a_key_that_librdkafka_does_not_take_is_told_without_its_value() {
        let mut config = Config::load(None, []).unwrap().kafka;
        for key in ["sasl.pasword", "acks"] {
            config.client = [(key.to_owned(), "s3cret".to_owned())].into();
            let Some(Error::Refused(refusal)) = admin(&config).err() else { panic!("{key} is taken") };
            let text = refusal.to_string();
            assert!(text.contains(key) && !text.contains("s3cret"), "{text}");
        }
    }

    #[test]
    fn only_who_needs_no_end_reads_from_a_follower() {
        let mut config = Config::load(None, []).unwrap().kafka;
        config.client.insert(RACK.into(), "a".into());
        assert_eq!((client(&config).get(RACK), consumer(&config, true).get(RACK)), (None, None));
        assert_eq!(consumer(&config, false).get(RACK), Some("a"));
    }
}
