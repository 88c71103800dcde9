//! A lane: one session within the snapshot and sinks of its own, copying one range after the other.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use futures_util::StreamExt;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::outlet::Outlet;
use super::pace::{Pace, Progress};
use super::plan::{Item, Plan};
use super::reader::{Reader, Until};
use super::source::failed;
use super::statement::{self, Columns};
use crate::enrich::Moment;
use crate::error::{Error, Result};
use crate::event::Layout;
use crate::lsn::{Lsn, Position};

/// Numbers are taken in blocks of so many, a block at a time for one lane: so no two rows of a snapshot share one.
pub(super) const BLOCK: u64 = 1_000_000;
/// A number has ten digits in an event's id.
const BLOCKS: u64 = 10_000_000_000 / BLOCK;

/// A table that is copied.
pub(super) struct Copied {
    pub plan: Plan,
    pub layout: Arc<Layout>,
    pub columns: Columns,
    /// What the publication and `--where` ask of a row.
    pub conditions: String,
    /// Rows of this run.
    pub rows: AtomicU64,
}

/// What all lanes of a session share.
pub(super) struct Shared {
    pub tables: Vec<Copied>,
    pub moment: Moment,
    /// The snapshot's.
    pub lsn: Lsn,
    /// µs since the Unix epoch.
    pub commit_ts: i64,
    pub items: Mutex<VecDeque<Item>>,
    pub blocks: AtomicU64,
    pub pace: Pace,
    pub progress: Progress,
    /// A shutdown, or the failure of a lane.
    pub halt: CancellationToken,
}

impl Shared {
    fn next(&self) -> Option<Item> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// The first number of a block that nobody else has.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when there is none left: what is stored is kept, and a new snapshot has new ones.
    pub(super) fn block(&self) -> Result<u64> {
        match self.blocks.fetch_add(1, Relaxed) {
            block if block < BLOCKS => Ok(block * BLOCK),
            _ => Err(Error::unreachable(
                "backfill",
                format!("{BLOCKS} ranges were copied from one snapshot; the next one goes on"),
            )),
        }
    }

    /// Position of the row with a number. Every commit record lies at a multiple of 8, so no transaction has this LSN; it is
    /// above those that the snapshot sees, and below all others.
    pub(super) fn position(&self, ordinal: u64) -> Position {
        Position { commit_lsn: Lsn(self.lsn.0 - 1), ordinal }
    }
}

/// One lane.
pub(super) struct Lane {
    pub client: Client,
    pub outlets: Vec<Outlet>,
    pub shared: Arc<Shared>,
}

/// How the copy of an item ended.
enum End {
    Whole,
    Halted,
}

impl Lane {
    /// Copies what is left until nothing is, or until all are to halt. What was copied is stored when this returns.
    ///
    /// Gives the client back: its transaction, and with it the snapshot, has ended.
    pub async fn run(mut self) -> Result<Client> {
        let outcome = self.work().await;
        if outcome.is_err() {
            self.shared.halt.cancel();
        }
        for outlet in &mut self.outlets {
            outlet.sink.stop().await;
        }
        outcome.map(|()| self.client)
    }

    async fn work(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        while !shared.halt.is_cancelled()
            && let Some(item) = shared.next()
        {
            if let End::Halted = self.copy(&shared, &item).await? {
                // The rest of the copy is still on its way to this session, which its owner ends.
                return self.settle().await;
            }
        }
        self.settle().await?;
        self.client.batch_execute("COMMIT").await.map_err(|e| failed(&e))
    }

    async fn settle(&mut self) -> Result<()> {
        for outlet in &mut self.outlets {
            outlet.settle().await?;
        }
        Ok(())
    }

    async fn copy(&mut self, shared: &Shared, item: &Item) -> Result<End> {
        let table = &shared.tables[item.table];
        let range = &table.plan.ranges[item.range];
        let sql = statement::copy(&table.columns, &table.plan, range, item.after.as_ref(), &table.conditions);
        self.client.batch_execute(statement::settings(&table.plan)).await.map_err(|e| failed(&e))?;
        let mut stream = pin!(self.client.copy_out(&sql).await.map_err(|e| failed(&e))?);
        let mut halted = pin!(shared.halt.cancelled());
        let mut reader = Reader::new(shared, table, item)?;
        loop {
            let message = tokio::select! {
                biased;
                message = stream.next() => message,
                () = &mut halted => {
                    reader.mark(&mut self.outlets, Until::Now).await?;
                    return Ok(End::Halted);
                }
            };
            let Some(message) = message else { break };
            if !reader.push(message.map_err(|e| failed(&e))?, &mut self.outlets)? {
                continue;
            }
            if reader.is_due() {
                let until = if reader.is_full() { Until::Now } else { Until::Due };
                reader.mark(&mut self.outlets, until).await?;
                let rest = shared.pace.rest(reader.take_unpaced(), Instant::now());
                if !rest.is_zero() {
                    tokio::select! { () = tokio::time::sleep(rest) => {}, () = &mut halted => {} }
                }
                if shared.halt.is_cancelled() {
                    reader.mark(&mut self.outlets, Until::Now).await?;
                    return Ok(End::Halted);
                }
            }
        }
        reader.mark(&mut self.outlets, Until::End).await?;
        Ok(End::Whole)
    }
}
