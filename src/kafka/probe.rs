//! A client for questions that also hears why a connection fails: librdkafka tells that to a callback only, and the request
//! itself just times out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
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
/// What may also be an outage is a refusal only so long after a process has asked for the first time.
const DOUBT: Duration = Duration::from_secs(10);
/// How long what was heard is waited for.
const HEARING: Duration = Duration::from_millis(100);

/// When this process first asked Kafka.
static FIRST: OnceLock<Instant> = OnceLock::new();
/// Whether Kafka has answered it. From then on nothing is refused that may pass.
static ANSWERED: AtomicBool = AtomicBool::new(false);

/// See the module.
pub struct Probe {
    producer: BaseProducer<Heard>,
    config: Kafka,
    /// What was heard is told as it is, whatever was before.
    strict: bool,
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
    /// For a role, which waits for an outage to pass.
    ///
    /// # Errors
    /// [`Error::Refused`] for a librdkafka key or value that does not exist.
    pub fn patient(config: &Kafka) -> Result<Self> {
        FIRST.get_or_init(Instant::now);
        Ok(Self { strict: false, ..Self::strict(config, &[])? })
    }

    /// For a look at how things stand. `settings` are librdkafka's, over the user's.
    ///
    /// # Errors
    /// [`Error::Refused`] for a librdkafka key or value that does not exist.
    pub fn strict(config: &Kafka, settings: &[(&str, &str)]) -> Result<Self> {
        let mut client = client(config);
        for (key, value) in settings {
            client.set(*key, *value);
        }
        let producer = client.create_with_context(Heard::default()).map_err(|e| error(config, &e))?;
        Ok(Self { producer, config: config.clone(), strict: true })
    }

    /// Every topic and broker. Blocking.
    ///
    /// # Errors
    /// [`Error::Refused`] for a password or TLS that is not taken; [`Error::Unreachable`] when no broker answers within
    /// `patience`.
    pub fn metadata(&self, patience: Duration) -> Result<Metadata> {
        let step = STEP.min(patience);
        let ask = |step| self.producer.client().fetch_metadata(None, step).map_err(|e| self.reason(&e));
        let answer = match ask(step) {
            Err(e) if e.is_transient() && step < patience => ask(patience - step),
            answer => answer,
        };
        answer.inspect(|_| has_answered())
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
        // A listener that speaks no TLS just hangs up, and so does a proxy whose brokers are away; a token may not be had for now; a
        // handshake that librdkafka itself saw fail was cut off.
        let certain = ["SASL authentication error", "handshake failed: Broker:"].iter().any(|text| why.contains(text));
        let certain = certain || heard.rdkafka_error_code() == Some(Code::SSL);
        let asked_for = FIRST.get().map_or(Duration::ZERO, Instant::elapsed);
        let refuses = self.strict || (!ANSWERED.load(Ordering::Relaxed) && (certain || asked_for > DOUBT));
        match heard.rdkafka_error_code() {
            Some(Code::Authentication) if refuses && !why.contains("handshake failed: Local:") => {
                no_rights(format!("{servers}: {why}"))
            }
            code if refuses && (code == Some(Code::SSL) || why.contains("SSL handshake failed")) => Error::refused(
                "kafka_tls",
                format!("{servers}: {why}"),
                "a listener that speaks TLS, with a certificate that ssl.ca.location has signed",
                "mend bootstrap.servers, security.protocol and ssl.* under [kafka]",
            ),
            _ => Error::unreachable(format!("Kafka at {servers}"), why),
        }
    }
}

/// Kafka has answered this process: what fails from now on is an outage.
pub(super) fn has_answered() {
    ANSWERED.store(true, Ordering::Relaxed);
}

/// Why another client of this configuration had no answer, where a [`Probe`] hears that. Blocking.
pub fn explained(config: &Kafka, unanswered: Error) -> Error {
    if !unanswered.is_transient() {
        return unanswered;
    }
    match Probe::patient(config).and_then(|probe| probe.metadata(STEP)) {
        Err(refused @ Error::Refused(_)) => refused,
        _ => unanswered,
    }
}
