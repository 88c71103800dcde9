//! What falaj needs of Kafka: a broker that answers, transactions, and the topics that `init` makes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::admin::{AdminOptions, ResourceSpecifier};
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseProducer, DeliveryResult, Producer, ProducerContext};
use rdkafka::types::RDKafkaErrorCode as Code;

use super::{Finding, Found, PATIENCE};
use crate::config::Config;
use crate::error::{Error, Refusal, Result};
use crate::kafka;

/// What one look at Kafka gave.
pub(super) struct Probe {
    topics: Result<Topics>,
    transactions: Result<String>,
    /// `cleanup.policy` of the checkpoint topic; empty when it cannot be told.
    cleanup: Result<String>,
}

/// Every topic that can be used.
#[derive(Default)]
struct Topics {
    /// Partition count by name.
    partitions: BTreeMap<String, usize>,
    /// Those with a partition that one broker alone has, where there are more brokers.
    single: BTreeSet<String>,
}

/// Remembers why a connection fails: librdkafka tells that to a callback only, the request itself just times out.
#[derive(Default)]
struct Listener(Mutex<Option<(KafkaError, String)>>);

impl ClientContext for Listener {
    fn error(&self, error: KafkaError, reason: &str) {
        let telling = matches!(error.rdkafka_error_code(), Some(Code::Authentication | Code::SSL));
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if telling || heard.is_none() {
            *heard = Some((error, reason.to_owned()));
        }
    }
}

impl ProducerContext for Listener {
    type DeliveryOpaque = ();
    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

/// Asks for all topics, then for a transaction producer of its own.
pub(super) async fn probe(config: &Arc<Config>) -> Probe {
    let for_thread = config.clone();
    let ask = tokio::task::spawn_blocking(move || ask(&for_thread));
    let (topics, transactions) = match ask.await {
        Ok(answers) => answers,
        Err(e) => (Err(Error::fatal("asking Kafka", e)), Ok(String::new())),
    };
    let cleanup = if topics.is_ok() { cleanup_policy(config).await } else { Ok(String::new()) };
    Probe { topics, transactions, cleanup }
}

/// Blocking.
fn ask(config: &Config) -> (Result<Topics>, Result<String>) {
    // No slot has a dot in its name, so that no stream has this id.
    let id = format!("{}.check.preflight", config.pipeline);
    let mut settings = kafka::client(&config.kafka);
    settings.set("transactional.id", &id).set("transaction.timeout.ms", "10000").set("message.timeout.ms", "5000");
    let producer: BaseProducer<Listener> = match settings.create_with_context(Listener::default()) {
        Ok(producer) => producer,
        Err(e) => return (Err(kafka::error(&config.kafka, &e)), Ok(String::new())),
    };
    let metadata = match producer.client().fetch_metadata(None, PATIENCE) {
        Ok(metadata) => metadata,
        Err(e) => return (Err(reason(config, &producer, &e)), Ok(String::new())),
    };
    let mut topics = Topics::default();
    for topic in metadata.topics().iter().filter(|t| t.error().is_none()) {
        topics.partitions.insert(topic.name().to_owned(), topic.partitions().len());
        if metadata.brokers().len() > 1 && topic.partitions().iter().any(|p| p.replicas().len() < 2) {
            topics.single.insert(topic.name().to_owned());
        }
    }
    let transactions = match producer.init_transactions(PATIENCE) {
        Ok(()) => Ok(format!("transactional.id \"{id}\" accepted")),
        Err(e) => Err(kafka::error(&config.kafka, &e)),
    };
    (Ok(topics), transactions)
}

/// The callback's reason where it says more than the request's time-out.
fn reason(config: &Config, producer: &BaseProducer<Listener>, e: &KafkaError) -> Error {
    producer.poll(Duration::from_millis(100));
    let heard = producer.context().0.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some((error, why)) = heard else { return kafka::error(&config.kafka, e) };
    let servers = config.kafka.servers();
    match error.rdkafka_error_code() {
        Some(Code::Authentication) => match kafka::error(&config.kafka, &error) {
            Error::Refused(refusal) => Error::Refused(Refusal { found: format!("{servers}: {why}"), ..refusal }),
            other => other,
        },
        // A listener that speaks no TLS just hangs up, which librdkafka counts as an outage; the text tells.
        code if code == Some(Code::SSL) || why.contains("SSL handshake failed") => Error::refused(
            "kafka_tls",
            format!("{servers}: {why}"),
            "a listener that speaks TLS, with a certificate that ssl.ca.location has signed",
            "mend bootstrap.servers, security.protocol and ssl.* under [kafka]",
        ),
        _ => Error::unreachable(format!("Kafka at {servers}"), why),
    }
}

async fn cleanup_policy(config: &Config) -> Result<String> {
    let topic = config.checkpoint_topic();
    let options = AdminOptions::new().request_timeout(Some(PATIENCE));
    let admin = kafka::admin(&config.kafka)?;
    let answer = admin.describe_configs([&ResourceSpecifier::Topic(&topic)], &options).await;
    let mut answers = answer.map_err(|e| kafka::error(&config.kafka, &e))?;
    let policy = match answers.pop() {
        Some(Ok(resource)) => resource.get("cleanup.policy").and_then(|e| e.value.clone()),
        // Without the right to describe it, or without the topic, which has a finding of its own.
        _ => None,
    };
    Ok(policy.unwrap_or_default())
}

impl Probe {
    /// Judges what was found, now that the published tables are known.
    pub(super) fn into_findings(self, config: &Config, tables: &[String]) -> Vec<Finding> {
        let topics = match self.topics {
            Ok(topics) => topics,
            Err(error) => return vec![Finding::of::<&str>("kafka", "a broker that answers", Err(error))],
        };
        vec![
            Finding::of(
                "kafka",
                "a broker that answers",
                Ok(format!("{}: {} topics", config.kafka.servers(), topics.partitions.len())),
            ),
            Finding::of("kafka_transactions", "transactions", self.transactions),
            Finding::of(
                "kafka_topics",
                "one topic a table, and two of falaj's own",
                topics_found(config, tables, &topics),
            ),
            Finding::of(
                "kafka_checkpoint",
                "one partition, compacted",
                self.cleanup.and_then(|c| checkpoint(config, &topics.partitions, &c)),
            ),
        ]
    }
}

fn topics_found(config: &Config, tables: &[String], Topics { partitions, single }: &Topics) -> Result<Found> {
    let rows: Vec<String> = tables.iter().map(|t| config.topic(t)).collect();
    let all = rows.iter().cloned().chain([config.dead_letter_topic()]);
    let missing: Vec<_> = all.filter(|t| !partitions.contains_key(t)).collect();
    if !missing.is_empty() {
        return Err(Error::refused(
            "kafka_topics",
            format!("missing: {}", missing.join(", ")),
            "a topic for every published table, and the dead-letter topic",
            "falaj init --yes, or create them by hand",
        ));
    }
    let wanted = usize::try_from(config.kafka.partitions).unwrap_or(1);
    let counted = |t: &String| format!("{t} ({})", partitions[t]);
    let text = rows.iter().map(counted).collect::<Vec<_>>().join(", ");
    let mut advice = Vec::new();
    let own = [config.checkpoint_topic(), config.dead_letter_topic()];
    let single: Vec<&str> = rows.iter().chain(&own).filter(|t| single.contains(*t)).map(String::as_str).collect();
    if !single.is_empty() {
        advice.push(format!(
            "one broker alone has {}: with its disk rows are lost, and nobody is told. Give them 3 replicas \
             (kafka-reassign-partitions.sh) and min.insync.replicas=2; kafka.replication_factor counts when init makes a topic",
            single.join(", ")
        ));
    }
    if rows.iter().any(|t| partitions[t] != wanted) {
        advice.push(format!(
            "kafka.partitions is {wanted} and counts only when init makes a topic; more partitions break the order per key"
        ));
    }
    Ok(Found::with_advice(text, advice.join("; ")))
}

/// Refuses a checkpoint topic that would not keep the position.
///
/// # Errors
/// [`Error::Refused`]; [`Error::Unreachable`] without a broker.
pub async fn require_checkpoint(config: &Arc<Config>, topics: &BTreeMap<String, usize>) -> Result<()> {
    checkpoint(config, topics, &cleanup_policy(config).await?).map(drop)
}

fn checkpoint(config: &Config, topics: &BTreeMap<String, usize>, cleanup: &str) -> Result<String> {
    let topic = config.checkpoint_topic();
    let refuse = |found: String, fix: String| {
        Error::refused("kafka_checkpoint", found, "one partition, cleanup.policy=compact", fix)
    };
    match topics.get(&topic) {
        None => Err(refuse(format!("missing: {topic}"), "falaj init --yes".to_owned())),
        Some(1) if cleanup.is_empty() || cleanup == "compact" => {
            Ok(format!("{topic}, {}", if cleanup.is_empty() { "policy not told" } else { cleanup }))
        }
        Some(1) => Err(refuse(
            format!("{topic} has cleanup.policy={cleanup}: the position would be deleted with age"),
            format!(
                "kafka-configs.sh --bootstrap-server {} --alter --topic {topic} --add-config cleanup.policy=compact",
                config.kafka.servers()
            ),
        )),
        Some(n) => Err(refuse(
            format!("{topic} has {n} partitions"),
            "stop falaj; another pipeline, archive.dir and bigquery.dataset (docs/operations.md)".to_owned(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_that_one_broker_of_several_has_are_noted() {
        let config = Config::load(None, []).unwrap();
        let names = ["falaj.a", "falaj.b", "falaj.checkpoint", "falaj.dead_letter"];
        let advice = |single: &[&str]| {
            let topics = Topics {
                partitions: names.iter().map(|name| ((*name).to_owned(), 3)).collect(),
                single: single.iter().map(|name| (*name).to_owned()).collect(),
            };
            let found = topics_found(&config, &["a".to_owned(), "b".to_owned()], &topics).unwrap();
            assert_eq!(found.text, "falaj.a (3), falaj.b (3)");
            found.advice
        };
        assert_eq!(advice(&["of.others"]), "");
        let told = advice(&["falaj.b", "falaj.checkpoint", "of.others"]);
        assert!(told.starts_with("one broker alone has falaj.b, falaj.checkpoint: "), "{told}");
    }
}
