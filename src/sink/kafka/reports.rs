//! What the broker says of records that it did not take. Only failures are reported at all.

use std::sync::{Mutex, PoisonError};

use rdkafka::error::KafkaError;
use rdkafka::producer::{DeliveryResult, ProducerContext};
use rdkafka::types::RDKafkaErrorCode as Code;
use rdkafka::{ClientContext, Message};

use crate::error::Error;
use crate::kafka::is_for_good;

/// The first record that the broker has refused for good.
#[derive(Default)]
pub(super) struct Reports(Mutex<Option<Refused>>);

struct Refused {
    code: Code,
    topic: String,
    bytes: usize,
}

impl ClientContext for Reports {}

impl ProducerContext for Reports {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        let Err((KafkaError::MessageProduction(code), record)) = result else { return };
        if is_for_good(*code) {
            let bytes = record.payload_len() + record.key_len();
            let refused = Refused { code: *code, topic: record.topic().to_owned(), bytes };
            self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(refused);
        }
    }
}

impl Reports {
    /// What no other attempt would change.
    pub(super) fn refusal(&self) -> Option<Error> {
        let refused = self.0.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        let Refused { code, topic, bytes } = refused;
        Some(match code {
            Code::InvalidTimestamp => Error::refused(
                "kafka_timestamp",
                format!("the broker refuses the time of a record for {topic}, that of its commit: {code}"),
                "commit times within message.timestamp.before.max.ms and message.timestamp.after.max.ms of the topic",
                format!(
                    "set the clock of the database right, or raise these two of {topic} \
                     (kafka-configs.sh --bootstrap-server … --alter)"
                ),
            ),
            Code::InvalidRecord => Error::refused(
                "kafka_record",
                format!("the broker refuses a record for {topic}: {code}"),
                "a topic that takes records without a key, which a TRUNCATE is, or a compacted one with kafka.tombstones",
                format!(
                    "set kafka.tombstones = true for compacted topics, or cleanup.policy=delete on {topic} \
                     (kafka-configs.sh --alter)"
                ),
            ),
            _ => Error::refused(
                "kafka_too_large",
                format!("the broker refuses a record of {bytes} bytes for {topic}: {code}"),
                format!(
                    "max.message.bytes of {topic} at or above kafka.\"message.max.bytes\" (1000000 where it is not set)"
                ),
                format!(
                    "raise max.message.bytes of {topic} (kafka-configs.sh --alter), or lower \"message.max.bytes\" under [kafka]: \
                     then kafka.too_large says what is done with such events"
                ),
            ),
        })
    }
}
