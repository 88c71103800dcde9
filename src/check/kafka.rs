//! What falaj needs of Kafka: a broker that answers, transactions, and the topics that `init` makes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rdkafka::admin::{AdminOptions, ResourceSpecifier};

use super::{Finding, Found, PATIENCE};
use crate::config::Config;
use crate::error::{Error, Result};
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
    let settings =
        [("transactional.id", id.as_str()), ("transaction.timeout.ms", "10000"), ("message.timeout.ms", "5000")];
    let asked = kafka::Probe::strict(&config.kafka, &settings).and_then(|probe| Ok((probe.metadata(PATIENCE)?, probe)));
    let (metadata, probe) = match asked {
        Ok(asked) => asked,
        Err(e) => return (Err(e), Ok(String::new())),
    };
    let mut topics = Topics::default();
    for topic in metadata.topics().iter().filter(|t| t.error().is_none()) {
        topics.partitions.insert(topic.name().to_owned(), topic.partitions().len());
        if metadata.brokers().len() > 1 && topic.partitions().iter().any(|p| p.replicas().len() < 2) {
            topics.single.insert(topic.name().to_owned());
        }
    }
    let transactions = probe.init_transactions(PATIENCE).map(|()| format!("transactional.id \"{id}\" accepted"));
    (Ok(topics), transactions)
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
    let all: Vec<_> = all.collect();
    let missing: Vec<_> = all.iter().filter(|t| !partitions.contains_key(*t)).map(String::as_str).collect();
    if !missing.is_empty() {
        return Err(kafka::no_topics(&missing));
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
        None => Err(kafka::no_checkpoint(&topic)),
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
