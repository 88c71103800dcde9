//! How large a record may be, what is done with a larger one, and whether the topics take what the producer may send.
//!
//! An event that is too large for Kafka stops the stream with found, needed and fix, or becomes a dead letter in the same
//! Kafka transaction, by `kafka.too_large`. It never waits for a broker that will not take it.

use rdkafka::admin::{AdminOptions, ConfigResource, ResourceSpecifier};
use serde::Serialize;

use crate::config::{self, Config, TooLarge};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::kafka;
use crate::lsn::Position;

/// librdkafka's own default of `message.max.bytes`. Kafka's default of `max.message.bytes` is a little more.
const DEFAULT: usize = 1_000_000;
/// Framing and headers: what a record's batch holds beside key and value.
const FRAMING: usize = 1 << 10;
/// The part of that for headers.
pub(super) const HEADERS: usize = FRAMING / 2;
/// What librdkafka may hold at least, in KiB.
const LEAST_QUEUE: usize = 5 << 10;

/// What key and value of one record may hold together, and what is done with more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    /// In bytes.
    pub(super) bytes: usize,
    pub(super) policy: TooLarge,
}

impl Limit {
    /// # Errors
    /// [`Error::Refused`] for a `message.max.bytes` that is no number.
    pub(super) fn of(config: &config::Kafka) -> Result<Self> {
        Ok(Self { bytes: message_max_bytes(config)?.saturating_sub(FRAMING), policy: config.too_large })
    }

    /// A key up to this length still stands in a note and in a tombstone.
    pub(super) fn longest_key(&self) -> usize {
        self.bytes / 8
    }

    /// The refusal of an event of `found` bytes.
    pub(super) fn refusal(&self, event: &Event<'_>, found: usize, topic: &str) -> Error {
        let (limit, needed) = (self.bytes, found + FRAMING);
        Error::refused(
            "kafka_too_large",
            format!("event {} of table {}: {found} bytes as a record", event.id(), event.layout.table),
            format!("at most {limit} bytes: kafka.\"message.max.bytes\" less {FRAMING} for framing"),
            format!(
                "set \"message.max.bytes\" = {needed} under [kafka] and max.message.bytes={needed} on topic {topic} \
                 (kafka-configs.sh --bootstrap-server … --alter --topic {topic} --add-config max.message.bytes={needed}); or set kafka.too_large = \
                 \"dead_letter\": such events then leave a note on the dead-letter topic, and are whole in the archive alone"
            ),
        )
    }
}

fn message_max_bytes(config: &config::Kafka) -> Result<usize> {
    let Some(text) = config.client.get("message.max.bytes") else { return Ok(DEFAULT) };
    text.parse().map_err(|e| {
        Error::refused(
            "kafka_config",
            format!("kafka.\"message.max.bytes\" = {text:?}: {e}"),
            "a number of bytes",
            "mend [kafka] in the configuration",
        )
    })
}

/// `queue.buffering.max.kbytes`: a record that is larger than the whole queue would wait for room for ever.
///
/// # Errors
/// As [`Limit::of`].
pub(super) fn queue_kbytes(config: &config::Kafka) -> Result<String> {
    let needed = (message_max_bytes(config)? >> 10) + 1024;
    let chosen = config.client.get("queue.buffering.max.kbytes");
    match chosen.map(|text| (text, text.parse::<usize>())) {
        None => Ok(needed.max(LEAST_QUEUE).to_string()),
        Some((_, Ok(chosen))) if chosen >= needed => Ok(chosen.to_string()),
        Some((text, _)) => Err(Error::refused(
            "kafka_config",
            format!("kafka.\"queue.buffering.max.kbytes\" = {text}"),
            format!("at least {needed}: more than one record of message.max.bytes"),
            "raise it, or leave it out",
        )),
    }
}

/// Refuses topics and brokers that do not take what `message.max.bytes` allows. Asked only where that is more than the
/// default, which every topic takes unless somebody has changed it; then the delivery says so. Gives what it has asked for.
///
/// # Errors
/// [`Error::Refused`] with both limits; [`Error::Unreachable`] without a broker.
pub async fn require_room(config: &Config, topics: &[String]) -> Result<Option<usize>> {
    let wanted = message_max_bytes(&config.kafka)?;
    if wanted <= DEFAULT {
        return Ok(None);
    }
    let admin = kafka::admin(&config.kafka)?;
    let metadata = admin.inner().fetch_metadata(None, kafka::TIMEOUT).map_err(|e| kafka::error(&config.kafka, &e))?;
    let topics = topics.iter().map(|topic| ResourceSpecifier::Topic(topic));
    // One broker stands for all: a request can name no more.
    let broker = metadata.brokers().first().map(|broker| ResourceSpecifier::Broker(broker.id()));
    let resources: Vec<_> = topics.chain(broker).collect();
    let options = AdminOptions::new().request_timeout(Some(kafka::TIMEOUT));
    let answers = admin.describe_configs(&resources, &options).await;
    // Without the right to describe one there is nothing to compare: the delivery will tell.
    for resource in answers.map_err(|e| kafka::error(&config.kafka, &e))?.into_iter().flatten() {
        ["max.message.bytes", "socket.request.max.bytes"].iter().try_for_each(|key| fits(&resource, key, wanted))?;
    }
    Ok(Some(wanted))
}

fn fits(resource: &ConfigResource, key: &str, wanted: usize) -> Result<()> {
    let value = resource.get(key).and_then(|entry| entry.value.as_deref()).and_then(|text| text.parse::<usize>().ok());
    match value {
        Some(least) if least < wanted => Err(Error::refused(
            "kafka_too_large",
            format!("{:?} has {key} = {least}, kafka.\"message.max.bytes\" is {wanted}", resource.specifier),
            "topics and brokers that take every record that the producer may send",
            format!(
                "raise {key} there to {wanted} (kafka-configs.sh --alter), or lower \"message.max.bytes\" under [kafka]"
            ),
        )),
        _ => Ok(()),
    }
}

/// The note that an event leaves which is too large for its topic. As everything that is sent, it holds no clock.
#[derive(Serialize)]
struct Note<'a> {
    #[serde(rename = "_id")]
    id: &'a str,
    position: Position,
    reason: String,
    topic: &'a str,
    #[serde(rename = "_op")]
    op: &'a str,
    #[serde(rename = "_table")]
    table: &'a str,
    /// The record key, unless it is what is too large.
    key: Option<&'a str>,
    body: Option<()>,
    /// How many bytes the body has.
    body_omitted: usize,
}

/// Appends the note on an event to `out`. `key` and `value` are lengths in bytes.
///
/// # Errors
/// [`Error::Fatal`] for a key that is not UTF-8, which none is.
pub(super) fn write_note(
    event: &Event<'_>,
    limit: Limit,
    topic: &str,
    key: Option<&[u8]>,
    body: usize,
    out: &mut Vec<u8>,
) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::fatal(format_args!("a dead letter for event {}", event.id()), e);
    let key = key.map(std::str::from_utf8).transpose().map_err(|e| failed(&e))?;
    let note = Note {
        id: &event.id(),
        position: event.at,
        reason: format!(
            "too large for Kafka: {body} bytes and its key; at most {} (kafka.\"message.max.bytes\")",
            limit.bytes
        ),
        topic,
        op: event.op.letter(),
        table: &event.layout.table,
        key,
        body: None,
        body_omitted: body,
    };
    serde_json::to_writer(out, &note).map_err(|e| failed(&e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kafka(pairs: &[(&str, &str)]) -> config::Kafka {
        let mut kafka = Config::defaults().unwrap().kafka;
        kafka.client.extend(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        kafka
    }

    #[test]
    fn the_queue_always_has_room_for_the_largest_record() {
        assert_eq!(queue_kbytes(&kafka(&[])).unwrap(), "5120");
        assert_eq!(queue_kbytes(&kafka(&[("message.max.bytes", "104857600")])).unwrap(), "103424");
        assert_eq!(queue_kbytes(&kafka(&[("queue.buffering.max.kbytes", "65536")])).unwrap(), "65536");
        let small = kafka(&[("message.max.bytes", "104857600"), ("queue.buffering.max.kbytes", "65536")]);
        assert_eq!(queue_kbytes(&small).unwrap_err().exit_code(), 78);
        assert_eq!(Limit::of(&kafka(&[("message.max.bytes", "much")])).unwrap_err().exit_code(), 78);
        assert_eq!(Limit::of(&kafka(&[])).unwrap().bytes, 998_976);
    }
}
