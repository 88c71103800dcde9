//! The sinks of a lane, and what each of them keeps of how far it has got.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use super::plan::Mark;
use crate::archive::{self, Batch};
use crate::config::{Config, SinkName};
use crate::error::{Error, Result};
use crate::event::Layout;
use crate::lsn::{Checkpoint, Lsn, SlotIdentity};
use crate::sink::{Sink, kafka, parquet};

/// A sink and the marks that it has not stored yet.
///
/// A sink's checkpoint is a place in the WAL for the stream; for a lane it only counts the lane's marks, and says by that
/// which of them is stored together with the rows before it.
pub(super) struct Outlet {
    pub sink: Box<dyn Sink>,
    marks: Marks,
    count: u64,
}

impl Outlet {
    /// Everything up to `mark` has been pushed; with `now` it is to be stored at once.
    pub async fn mark(&mut self, mark: Mark, now: bool) -> Result<()> {
        self.count += 1;
        self.marks.add(self.count, mark);
        let checkpoint = Checkpoint::whole(Lsn(self.count));
        if now { self.sink.flush(checkpoint).await } else { self.sink.mark(checkpoint, true).await }
    }

    /// Waits until everything that was marked is stored. The last mark was to be stored at once.
    pub async fn settle(&mut self) -> Result<()> {
        while !self.sink.stored().checkpoint().covers(Checkpoint::whole(Lsn(self.count))) {
            self.sink.moved().await?;
        }
        Ok(())
    }
}

/// Marks on their way through a sink.
#[derive(Clone, Default)]
struct Marks(Arc<Mutex<VecDeque<(u64, Mark)>>>);

impl Marks {
    fn add(&self, count: u64, mark: Mark) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back((count, mark));
    }

    /// The mark of a checkpoint; those before it are forgotten.
    fn take(&self, checkpoint: Checkpoint) -> Result<Mark> {
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = marks.partition_point(|(count, _)| *count <= checkpoint.resume.0);
        let last = marks.drain(..passed).next_back();
        last.map(|(_, mark)| mark).ok_or_else(|| Error::Fatal("a sink has stored what was not marked".into()))
    }
}

/// The marks that the sinks hold, in the order of the configuration; `settled` as in [`kafka::read_history`].
pub(super) async fn marks(config: &Arc<Config>, settled: Option<&CancellationToken>) -> Result<Vec<Vec<Mark>>> {
    let mut all = Vec::new();
    for name in &config.produce.sinks {
        let (place, found) = match name {
            SinkName::Kafka => {
                let prefix = Mark::prefix(&config.postgres.slot);
                let records = kafka::read_history(config, prefix, settled).await?;
                (config.checkpoint_topic(), records.into_values().collect())
            }
            SinkName::Archive => {
                (config.archive.dir.display().to_string(), parquet::read_history(&config.archive.dir)?)
            }
        };
        let parse = |text: &Vec<u8>| serde_json::from_slice(text).map_err(|e| unreadable(&place, e));
        all.push(found.iter().map(parse).collect::<Result<_>>()?);
    }
    Ok(all)
}

/// Whether a sink holds rows that any backfill for the slot's name has copied.
pub(crate) async fn has_history(sink: SinkName, config: &Arc<Config>) -> Result<bool> {
    Ok(match sink {
        SinkName::Kafka => !kafka::read_history(config, Mark::prefix(&config.postgres.slot), None).await?.is_empty(),
        SinkName::Archive => archive::list(&config.archive.dir)?.iter().any(Batch::is_history),
    })
}

/// The configured sinks, taken over from whoever wrote history there before.
pub(super) struct Fenced {
    kafka: Vec<kafka::Fenced>,
    work: Option<PathBuf>,
}

impl Fenced {
    /// Fences the sinks for `lanes` lanes. `tables` are those that will be copied.
    pub async fn take(config: &Arc<Config>, identity: &SlotIdentity, lanes: usize, tables: &[String]) -> Result<Self> {
        let has = |name| config.produce.sinks.contains(&name);
        let kafka =
            if has(SinkName::Kafka) { kafka::fence(config, identity, lanes, tables).await? } else { Vec::new() };
        let work = if has(SinkName::Archive) { Some(parquet::fence(config, identity)?) } else { None };
        Ok(Self { kafka, work })
    }

    /// Opens the sinks of each of `lanes` lanes, in the order of the configuration.
    pub async fn open(
        &mut self,
        config: &Arc<Config>,
        identity: &SlotIdentity,
        layouts: &[Arc<Layout>],
        lanes: usize,
    ) -> Result<Vec<Vec<Outlet>>> {
        let mut all = Vec::new();
        let mut producers = std::mem::take(&mut self.kafka).into_iter();
        for lane in 0..lanes {
            let mut outlets = Vec::new();
            for name in &config.produce.sinks {
                let marks = Marks::default();
                let taken = marks.clone();
                let mut sink = match (name, &self.work) {
                    (SinkName::Archive, Some(work)) => {
                        let progress = move |at| json(&taken.take(at)?);
                        parquet::open_history(config, identity, work, lane, progress)?
                    }
                    _ => {
                        let slot = identity.slot.clone();
                        let progress = move |at| taken.take(at).and_then(|m| Ok((m.key(&slot), json(&m)?)));
                        let producer = producers.next();
                        let producer = producer.ok_or_else(|| Error::Fatal("a lane without a producer".into()))?;
                        kafka::open_history(config, producer, progress)?
                    }
                };
                for layout in layouts {
                    sink.prepare(layout).await?;
                }
                outlets.push(Outlet { sink, marks, count: 0 });
            }
            all.push(outlets);
        }
        Ok(all)
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        if let Some(work) = &self.work {
            let _ = std::fs::remove_dir_all(work);
        }
    }
}

fn json(mark: &Mark) -> Result<Vec<u8>> {
    serde_json::to_vec(mark).map_err(|e| Error::fatal("writing a mark", e))
}

fn unreadable(place: &str, e: serde_json::Error) -> Error {
    Error::refused(
        "backfill_mark",
        format!("{place}: what an earlier backfill has noted cannot be read: {e}"),
        "notes of this version of falaj",
        "put back what was changed by hand, or use the version that wrote it",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_checkpoint_takes_its_mark_and_forgets_those_before() {
        let mark = |rows| Mark {
            table: "t".into(),
            backfill: Lsn(8),
            range: 0,
            snapshot: Lsn(8),
            after: None,
            done: false,
            rows,
        };
        let marks = Marks::default();
        for n in 1..=3 {
            marks.add(n, mark(10 * n));
        }
        let take = |n| marks.take(Checkpoint::whole(Lsn(n))).map(|m| m.rows).ok();
        assert_eq!([take(2), take(2), take(3), take(4)], [Some(20), None, Some(30), None]);
    }
}
