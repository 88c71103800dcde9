//! A client for questions that also hears why a connection fails: librdkafka tells that to a callback only, and the request
//! itself just times out.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::error::KafkaError;
use rdkafka::metadata::Metadata;
use rdkafka::producer::{BaseProducer, DeliveryResult, Producer, ProducerContext};
use rdkafka::types::RDKafkaErrorCode as Code;

use super::{client, error, no_rights};
use crate::config::Kafka;
use crate::error::{Error, Result};

/// After so long without an answer a refusal that was heard counts: by then another broker would have answered.
const STEP: Duration = Duration::from_secs(3);
/// How long what was heard is waited for.
const HEARING: Duration = Duration::from_millis(100);

/// See the module.
pub struct Probe {
    producer: BaseProducer<Heard>,
    config: Kafka,
}

/// What says most of why a connection fails.
#[derive(Default)]
struct Heard(Mutex<Option<(KafkaError, String)>>);

impl ClientContext for Heard {
    fn error(&self, error: KafkaError, reason: &str) {
        let telling = matches!(error.rdkafka_error_code(), Some(Code::Authentication | Code::SSL));
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if telling || heard.is_none() {
            *heard = Some((error, reason.to_owned()));
        }
    }
}

impl ProducerContext for Heard {
    type DeliveryOpaque = ();
    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

impl Probe {
    /// `settings` are librdkafka's, over the user's.
    ///
    /// # Errors
    /// [`Error::Refused`] for a librdkafka key or value that does not exist.
    pub fn new(config: &Kafka, settings: &[(&str, &str)]) -> Result<Self> {
        let mut client = client(config);
        for (key, value) in settings {
            client.set(*key, *value);
        }
        let producer = client.create_with_context(Heard::default()).map_err(|e| error(config, &e))?;
        Ok(Self { producer, config: config.clone() })
    }

    /// Every topic and broker. Blocking.
    ///
    /// # Errors
    /// [`Error::Refused`] for a password or TLS that is not taken; [`Error::Unreachable`] when no broker answers within
    /// `patience`.
    pub fn metadata(&self, patience: Duration) -> Result<Metadata> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // What is left behind another step goes with this one: a slow broker is asked for as long as may be.
            let step = if left < 2 * STEP { left } else { STEP };
            let e = match self.producer.client().fetch_metadata(None, step) {
                Ok(metadata) => return Ok(metadata),
                Err(e) => e,
            };
            let reason = self.reason(&e);
            if step == left || !reason.is_transient() {
                return Err(reason);
            }
        }
    }

    /// Begins as a producer of transactions does, where `settings` have a `transactional.id`. Blocking.
    ///
    /// # Errors
    /// As [`error`].
    pub fn init_transactions(&self, patience: Duration) -> Result<()> {
        self.producer.init_transactions(patience).map_err(|e| error(&self.config, &e))
    }

    /// What was heard, where that says more than the request's time-out.
    fn reason(&self, e: &KafkaError) -> Error {
        self.producer.poll(HEARING);
        let heard = self.producer.context().0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((heard, why)) = heard else { return error(&self.config, e) };
        let servers = self.config.servers();
        match heard.rdkafka_error_code() {
            // A handshake that librdkafka itself saw fail was cut off.
            Some(Code::Authentication) if !why.contains("handshake failed: Local:") => {
                no_rights(format!("{servers}: {why}"))
            }
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
}

/// Why another client of this configuration had no answer, where a [`Probe`] hears that. Blocking.
pub fn explained(config: &Kafka, unanswered: Error) -> Error {
    if !unanswered.is_transient() {
        return unanswered;
    }
    match Probe::new(config, &[]).and_then(|probe| probe.metadata(STEP)) {
        Err(refused @ Error::Refused(_)) => refused,
        _ => unanswered,
    }
}
