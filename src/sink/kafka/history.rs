//! The Kafka sink of a backfill: the same events and transactions as the stream's, under transactional ids of its own,
//! with a record of its own progress in each transaction.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rdkafka::consumer::Consumer;
use rdkafka::producer::{BaseProducer, Producer};
use tokio_util::sync::CancellationToken;

use super::commit::{Progress, producer};
use super::position::{consumer, read_position, require, scan};
use super::reports::Reports;
use super::{KafkaSink, require_room};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kafka::{self, settle};
use crate::lsn::{Checkpoint, Lsn, SlotIdentity};
use crate::sink::Sink;

/// The producer of one lane. Whoever had it before can write no more, and what he left open is rolled back.
pub struct Fenced {
    producer: BaseProducer<Reports>,
    /// Topics that are there.
    known: BTreeSet<String>,
}

/// Takes the producers of all lanes over. `tables` are those that will be copied: each needs its topic.
///
/// # Errors
/// As the sink's own: [`Error::Refused`] for rights, an absent topic or a foreign checkpoint; [`Error::Unreachable`] without a broker.
pub async fn fence(
    config: &Arc<Config>,
    identity: &SlotIdentity,
    lanes: usize,
    tables: &[String],
) -> Result<Vec<Fenced>> {
    let known: BTreeSet<String> = tables.iter().map(|table| config.topic(table)).collect();
    let (c, id, needed) = (Arc::clone(config), identity.clone(), known.clone());
    let check = move || {
        let topics = kafka::topics(&c.kafka, kafka::TIMEOUT)?;
        require(&topics, &c.checkpoint_topic(), &needed)?;
        // Whose topics they are comes first: the owner of others is not put out of them.
        read_position(&c, &id, None).map(drop)
    };
    blocking(check).await?;
    require_room(config, &known.iter().cloned().collect::<Vec<_>>()).await?;
    let open = |lane: usize| {
        let (config, known) = (Arc::clone(config), known.clone());
        blocking(move || {
            let producer = producer(&config, &format!("{}.backfill.{lane}", config.postgres.slot))?;
            producer.init_transactions(kafka::TIMEOUT).map_err(|e| kafka::error(&config.kafka, &e))?;
            Ok(Fenced { producer, known })
        })
    };
    futures_util::future::try_join_all((0..lanes).map(open)).await
}

/// Starts a lane's sink. `progress` gives the record of a checkpoint.
///
/// # Errors
/// [`Error::Fatal`] when no thread can be started.
pub fn open_history(
    config: &Arc<Config>,
    lane: Fenced,
    progress: impl Fn(Checkpoint) -> Result<(String, Vec<u8>)> + Send + 'static,
) -> Result<Box<dyn Sink>> {
    let (progress, start): (Progress, _) = (Box::new(progress), Checkpoint::whole(Lsn(0)));
    Ok(Box::new(KafkaSink::start(Arc::clone(config), lane.producer, progress, start, lane.known)?))
}

/// The newest record of every key that begins with `prefix`. Who goes on from there reads it when all lanes are fenced, and
/// says by `settled` that it is waited for transactions that others have left open, and what breaks the wait off.
///
/// # Errors
/// As [`fence`].
pub async fn read_history(
    config: &Arc<Config>,
    prefix: String,
    settled: Option<&CancellationToken>,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let (config, settled) = (Arc::clone(config), settled.cloned());
    blocking(move || {
        let (consumer, topic) = (consumer(&config)?, config.checkpoint_topic());
        if let Some(stop) = &settled {
            settle(&config, &consumer, &topic, 1, stop)?;
        }
        let (low, _) =
            consumer.fetch_watermarks(&topic, 0, kafka::TIMEOUT).map_err(|e| kafka::error(&config.kafka, &e))?;
        let mut found = BTreeMap::new();
        scan(&config, &consumer, &topic, low, |key, _, value| {
            if let Ok(key) = std::str::from_utf8(key)
                && key.starts_with(&prefix)
            {
                found.insert(key.to_owned(), value.to_vec());
            }
        })?;
        std::thread::spawn(|| drop(consumer));
        Ok(found)
    })
    .await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::fatal("opening the Kafka sink", e))?
}
