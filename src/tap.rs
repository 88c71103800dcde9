//! `falaj tap`: the events as they become readable in Kafka, one a line, with the bytes of their values. (A value of type `json` may
//! hold line breaks of its own.)
//!
//! It reads beside everybody: no group is joined, no offset kept, and what is not committed is not shown.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::{Message, Offset, TopicPartitionList};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::cli::Tap;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kafka;
use crate::message;
use crate::source::catalog;
use crate::source::conn::Conninfo;
use crate::world::{World, print_on};

const APPLICATION: &str = "falaj tap";
/// How long nothing may come before the shutdown is looked at.
const STEP: Duration = Duration::from_millis(100);
/// What is waiting is written at once, up to about this many bytes.
const CHUNK: usize = 1 << 20;
/// How often it is looked whether the topics are still the same, with as many partitions.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How long that may take; nothing is shown meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// Prints what becomes readable from now on, until the shutdown or until nobody reads it any more.
///
/// # Errors
/// [`Error::Unreachable`] for a server that does not answer at the start; [`Error::Refused`] for a topic that is not there, and
/// for one that is made anew or gets partitions meanwhile; stdout that cannot be written.
pub async fn run(world: &World, args: &Tap) -> Result<()> {
    let outcome = async {
        let tables = match args.tables.is_empty() {
            true => published(world).await?,
            false => args.tables.clone(),
        };
        let topics: BTreeSet<String> = tables.iter().map(|table| world.config.topic(table)).collect();
        let open = || {
            let (config, topics) = (world.config.clone(), topics.clone());
            kafka::blocking(move || Reader::open(&config, topics))
        };
        let reader = world.at_start("kafka", open).await?;
        info!(topics = ?topics, "what is committed from now on");
        let (config, stop) = (world.config.clone(), world.stop.clone());
        world.show(move || reader.follow(&config, &stop)).await.map(drop)
    };
    world.ended(outcome.await)
}

/// The tables that have a topic.
async fn published(world: &World) -> Result<Vec<String>> {
    let postgres = &world.config.postgres;
    let conninfo = Conninfo::parse(&postgres.url)?;
    let ask = async || {
        let client = conninfo.sql(APPLICATION).await?;
        catalog::published_names(&client, &postgres.publication).await
    };
    let mut tables = world.at_start("postgres", ask).await?;
    if tables.is_empty() {
        return Err(Error::refused(
            "publication",
            format!("publication \"{}\" has no tables, or is not there", postgres.publication),
            "tables whose topics can be read",
            "falaj init, or name the tables: falaj tap TABLE …",
        ));
    }
    if world.config.produce.messages {
        tables.push(message::TABLE.to_owned());
    }
    Ok(tables)
}

struct Reader {
    consumer: BaseConsumer,
    /// Each topic's id and number of partitions.
    topics: BTreeMap<String, (String, usize)>,
}

impl Reader {
    /// At the end of each partition: what a transaction that is open now brings is still to come. Blocking.
    fn open(config: &Config, topics: BTreeSet<String>) -> Result<Self> {
        let failed = |e: KafkaError| kafka::error(&config.kafka, &e);
        let counts = kafka::topics(&config.kafka, kafka::TIMEOUT)?;
        let missing: Vec<&str> = topics.iter().filter(|t| !counts.contains_key(*t)).map(String::as_str).collect();
        if !missing.is_empty() {
            return Err(kafka::no_topics(&missing));
        }
        let mut settings = kafka::consumer(&config.kafka, false);
        settings.set("group.id", format!("{}.tap", config.pipeline)).set("isolation.level", "read_committed");
        settings.set("enable.auto.commit", "false").set("auto.offset.reset", "error");
        // Who is slow to take it must not have 64 MB of it wait here.
        settings.set("enable.partition.eof", "false").set("queued.max.messages.kbytes", "16384");
        let consumer: BaseConsumer = settings.create().map_err(failed)?;
        let mut list = TopicPartitionList::new();
        let mut known = BTreeMap::new();
        for topic in topics {
            let count = counts[&topic];
            for partition in 0..count as i32 {
                let (_, end) = consumer.fetch_watermarks(&topic, partition, kafka::TIMEOUT).map_err(failed)?;
                list.add_partition_offset(&topic, partition, Offset::Offset(end)).map_err(failed)?;
            }
            let id = kafka::topic_id(consumer.client(), &topic, kafka::TIMEOUT).map_err(failed)?;
            known.insert(topic, (id, count));
        }
        consumer.assign(&list).map_err(failed)?;
        Ok(Self { consumer, topics: known })
    }

    /// Prints until the shutdown; says whether somebody still reads. Blocking.
    fn follow(&self, config: &Config, stop: &CancellationToken) -> Result<bool> {
        let terminal = std::io::stdout().is_terminal();
        let (mut lines, mut looked) = (Vec::new(), Instant::now());
        while !stop.is_cancelled() {
            let mut outcome = Ok(());
            let mut polled = self.consumer.poll(STEP);
            while let Some(found) = polled {
                match found {
                    Ok(message) => message.payload().into_iter().for_each(|value| line(value, terminal, &mut lines)),
                    Err(e) => outcome = trouble(config, &e),
                }
                if outcome.is_err() || lines.len() > CHUNK || stop.is_cancelled() {
                    break;
                }
                polled = self.consumer.poll(Duration::ZERO);
            }
            if !lines.is_empty() && !print_on(&lines)? {
                return Ok(false);
            }
            outcome?;
            lines.clear();
            if looked.elapsed() > LOOK_EVERY {
                self.look(config)?;
                looked = Instant::now();
            }
        }
        Ok(true)
    }

    /// A partition more would not be read, and a topic that was made anew from its middle.
    fn look(&self, config: &Config) -> Result<()> {
        let Ok(counts) = kafka::topics_of(&config.kafka, self.consumer.client(), PATIENCE) else { return Ok(()) };
        for (topic, (id, count)) in &self.topics {
            // One that is gone is told by the client; a broker that comes back may not know it yet.
            if let Some(is) = counts.get(topic).filter(|is| *is != count) {
                return Err(other_topics(format!("{topic} has {is} partitions, it had {count}")));
            }
            if kafka::topic_id(self.consumer.client(), topic, PATIENCE).is_ok_and(|now| now != *id) {
                return Err(other_topics(format!("{topic} was made anew")));
            }
        }
        Ok(())
    }
}

/// An outage is waited for by the client; places that are gone are not found again by waiting.
fn trouble(config: &Config, e: &KafkaError) -> Result<()> {
    if kafka::is_place_lost(e) {
        return Err(other_topics(e.to_string()));
    }
    match kafka::error(&config.kafka, e) {
        e if e.is_transient() => Ok(warn!(error = %e, "Kafka goes on by itself")),
        e => Err(e),
    }
}

fn other_topics(found: String) -> Error {
    Error::refused(
        "kafka_topics",
        found,
        "topics that stay the same, and keep what was not read yet",
        "falaj tap again: it shows what is committed from then on",
    )
}

/// Adds an event's line. A terminal gets no character that could command it: JSON has another way to write each of them.
fn line(value: &[u8], terminal: bool, out: &mut Vec<u8>) {
    match terminal {
        false => out.extend(value),
        true => String::from_utf8_lossy(value).chars().for_each(|c| match c {
            // Within a JSON text they can only stand between its parts.
            '\n' | '\r' | '\t' => out.push(b' '),
            '\0'..='\u{1F}' | '\u{7F}'..='\u{9F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' => {
                out.extend(format!("\\u{:04x}", u32::from(c)).bytes());
            }
            c => out.extend(c.encode_utf8(&mut [0; 4]).bytes()),
        }),
    }
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_no_commands_and_the_same_json() {
        let value = "{\"title\":\"a\u{9b}2J\u{202e}b 🎧\",\r\n\"n\":1}";
        let shown = |terminal| {
            let mut out = Vec::new();
            line(value.as_bytes(), terminal, &mut out);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(shown(false), format!("{value}\n"));
        assert_eq!(shown(true), "{\"title\":\"a\\u009b2J\\u202eb 🎧\",  \"n\":1}\n");
        let parsed = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(parsed(&shown(true)), parsed(value));
    }
}
