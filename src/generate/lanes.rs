//! The connections that write side by side, and the order that has to be kept among them.

use tokio::task::JoinSet;

use super::catalog::{Content, Subject};
use super::model::Transaction;
use super::writer::Writer;
use crate::error::{Error, Result};
use crate::world::World;

/// Writers, each with a connection of its own.
pub struct Lanes {
    world: World,
    idle: Vec<Writer>,
    /// A transaction that is given up, because Postgres is away at a shutdown, ends as `None`.
    busy: JoinSet<Result<(Writer, Option<Transaction>)>>,
}

impl Lanes {
    /// Opens that many connections.
    ///
    /// # Errors
    /// As [`Writer::open`].
    pub async fn open(world: &World, lanes: usize) -> Result<Self> {
        let mut idle = Vec::new();
        for _ in 0..lanes {
            idle.push(Writer::open(world).await?);
        }
        Ok(Self { world: world.clone(), idle, busy: JoinSet::new() })
    }

    /// Inserts the contents that are absent and returns all that are there, oldest first.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub async fn stock(&mut self, contents: &[Content], start: i64) -> Result<Vec<Subject>> {
        let Some(writer) = self.idle.first_mut() else { return Ok(Vec::new()) };
        writer.stock(contents, start).await?;
        writer.contents().await
    }

    /// Hands a transaction to a free writer, and returns those that have ended meanwhile.
    ///
    /// A transaction that writes `content` runs alone: later rows refer to its contents, and the last change must be
    /// the last one
    /// in every run.
    ///
    /// # Errors
    /// The first error of any writer.
    pub async fn write(&mut self, transaction: Transaction, start: i64) -> Result<Vec<Transaction>> {
        let alone = transaction.touches_content();
        let mut ended = if alone { self.drain().await? } else { Vec::new() };
        while self.idle.is_empty() {
            ended.extend(self.one().await?);
        }
        if let Some(mut writer) = self.idle.pop() {
            let world = self.world.clone();
            self.busy.spawn(async move {
                match writer.write(&transaction, start).await {
                    Ok(()) => Ok((writer, Some(transaction))),
                    Err(e) => world.ended(Err(e)).map(|()| (writer, None)),
                }
            });
        }
        if alone {
            ended.extend(self.drain().await?);
        }
        Ok(ended)
    }

    /// Waits for all that is under way.
    ///
    /// # Errors
    /// The first error of any writer.
    pub async fn drain(&mut self) -> Result<Vec<Transaction>> {
        let mut ended = Vec::new();
        while !self.busy.is_empty() {
            ended.extend(self.one().await?);
        }
        Ok(ended)
    }

    async fn one(&mut self) -> Result<Option<Transaction>> {
        let Some(joined) = self.busy.join_next().await else { return Ok(None) };
        let (writer, transaction) = joined.map_err(|e| Error::fatal("writing the load", e))??;
        self.idle.push(writer);
        Ok(transaction)
    }
}
