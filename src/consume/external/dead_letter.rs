//! What the outside system finally refuses: one record each on `{pipeline}.dead_letter`, under the event's own key.
//!
//! A record is awaited (all replicas) before the event's offset may move. A crash between the two repeats the record:
//! readers tell repeats by `_id`.

use std::time::Duration;

use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;
use serde::Serialize;
use serde_json::value::RawValue;

use super::envelope::position;
use super::ledger::Record;
use crate::config::Kafka;
use crate::error::{Error, Result};
use crate::kafka;
use crate::lsn::Position;

/// A dead letter as it stands in Kafka.
#[derive(Debug, Serialize)]
pub struct DeadLetter<'a> {
    /// The event's `_id`; null for a record that is no event.
    #[serde(rename = "_id")]
    pub id: Option<&'a str>,
    /// The event's place in the WAL, `{"commit_lsn","ordinal"}`; null where `_id` does not say it.
    pub position: Option<Position>,
    /// Why: status and first bytes of the answer.
    pub reason: &'a str,
    /// Where it was to go, without credentials.
    pub url: &'a str,
    /// Topic, partition and offset of the event.
    pub topic: &'a str,
    /// See `topic`.
    pub partition: i32,
    /// See `topic`.
    pub offset: i64,
    /// The event byte for byte; null where it is not JSON.
    pub body: Option<&'a RawValue>,
    /// The record's bytes in hexadecimal; present only where they are not JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_hex: Option<String>,
    /// How many bytes the event has; present only where event and letter together are too large for the topic, and the
    /// body is left out. It stands in `topic` at `partition` and `offset`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_omitted: Option<usize>,
}

impl<'a> DeadLetter<'a> {
    /// From the record and the reason.
    pub fn new(record: &'a Record, reason: &'a str, url: &'a str, topic: &'a str) -> Self {
        let bytes = record.body.as_deref();
        let body = bytes.and_then(verbatim);
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect();
        let body_hex = if body.is_some() { None } else { bytes.map(hex) };
        let id = record.content.id();
        let position = id.and_then(position);
        let Record { partition, offset, .. } = *record;
        Self { id, position, reason, url, topic, partition, offset, body, body_hex, body_omitted: None }
    }
}

impl DeadLetter<'_> {
    /// For a letter that is too large.
    fn without_body(&self) -> Self {
        let bytes = self.body.map(|b| b.get().len()).or(self.body_hex.as_ref().map(|hex| hex.len() / 2));
        Self { body: None, body_hex: None, body_omitted: bytes, ..*self }
    }
}

/// JSON that would come out as the same bytes: serde leaves blanks around a value away.
fn verbatim(bytes: &[u8]) -> Option<&RawValue> {
    serde_json::from_slice::<&RawValue>(bytes).ok().filter(|raw| raw.get().len() == bytes.len())
}

/// The way to the topic.
pub struct DeadLetters {
    producer: FutureProducer,
    config: Kafka,
    topic: String,
}

impl DeadLetters {
    /// An idempotent producer, all replicas.
    ///
    /// # Errors
    /// [`Error::Refused`] for a librdkafka key or value that does not exist.
    pub fn new(config: &Kafka, topic: String) -> Result<Self> {
        let mut client = kafka::client(config);
        client
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("message.timeout.ms", "30000")
            .set("linger.ms", "5");
        let producer = client.create().map_err(|e| kafka::error(config, &e))?;
        Ok(Self { producer, config: config.clone(), topic })
    }

    /// Stores one letter and waits until all replicas have it.
    ///
    /// # Errors
    /// [`Error::Unreachable`]: again later, it may then stand there twice. [`Error::Refused`] for missing rights, and for a topic
    /// that would never take it.
    pub async fn put(&self, key: Option<&[u8]>, letter: &DeadLetter<'_>) -> Result<()> {
        let sent = match self.send(key, letter).await? {
            Err(KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge)) => {
                self.send(key, &letter.without_body()).await?
            }
            sent => sent,
        };
        sent.map_err(|e| match self.producer.client().fatal_error() {
            Some((_, why)) => Error::fatal("the dead-letter producer", why),
            None => match e {
                KafkaError::MessageProduction(code) if kafka::is_for_good(code) => self.refused(letter, code),
                e => kafka::error(&self.config, &e),
            },
        })
    }

    fn refused(&self, letter: &DeadLetter<'_>, code: RDKafkaErrorCode) -> Error {
        let (topic, servers) = (&self.topic, self.config.servers());
        let DeadLetter { topic: of, partition, offset, .. } = letter;
        Error::refused(
            "kafka_dead_letter",
            format!("the broker refuses the dead letter of {of}, partition {partition}, offset {offset}: {code}"),
            format!(
                "{topic} takes it: cleanup.policy=delete (a letter may have no key), and room in max.message.bytes"
            ),
            format!(
                "kafka-configs.sh --bootstrap-server {servers} --alter --topic {topic} --add-config cleanup.policy=delete (and \
                 max.message.bytes); then start falaj consume again: it goes on with this event"
            ),
        )
    }

    async fn send(&self, key: Option<&[u8]>, letter: &DeadLetter<'_>) -> Result<KafkaResult<()>> {
        let value = serde_json::to_vec(letter).map_err(|e| Error::fatal("writing a dead letter", e))?;
        let mut record = FutureRecord::<[u8], [u8]>::to(&self.topic).payload(&value);
        if let Some(key) = key {
            record = record.key(key);
        }
        let sent = self.producer.send(record, Duration::from_secs(5)).await;
        Ok(sent.map(drop).map_err(|(e, _)| e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consume::external::envelope::Content;

    fn record(body: &[u8]) -> Record {
        let content = Content::read(Some(body));
        Record { partition: 2, offset: 7, timestamp: None, key: None, body: Some(body.to_vec().into()), content }
    }

    #[test]
    fn a_letter_holds_position_reason_and_the_bytes_of_the_event() {
        let record = record(br#"{"a": 1.10,"_id":"0000000100000000:0000000003","_op":"c"}"#);
        let letter = DeadLetter::new(&record, "HTTP 400: \"no\"", "http://x/events", "p.t");
        let expected = concat!(
            r#"{"_id":"0000000100000000:0000000003","position":{"commit_lsn":"1/0","ordinal":3},"#,
            r#""reason":"HTTP 400: \"no\"","url":"http://x/events","topic":"p.t","partition":2,"offset":7,"#,
            r#""body":{"a": 1.10,"_id":"0000000100000000:0000000003","_op":"c"}}"#,
        );
        assert_eq!(serde_json::to_string(&letter).unwrap(), expected);
    }

    #[test]
    fn bytes_that_are_no_json_survive_too() {
        for bytes in [&b"\xff{"[..], b" {\"_id\":\"x\",\"_op\":\"c\"}\n"] {
            let record = record(bytes);
            let text = serde_json::to_string(&DeadLetter::new(&record, "", "", "")).unwrap();
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            assert!(text.ends_with(&format!(r#""body":null,"body_hex":"{hex}"}}"#)), "{text}");
        }
    }
}
