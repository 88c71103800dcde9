//! A sink's own thread: blocking clients and encoders stay off the loop that reads. Its queue is bounded in bytes.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use super::Stored;
use crate::error::{Error, Result};
use crate::lsn::Checkpoint;

/// The loop's end of a sink's thread.
pub(super) struct Worker<T> {
    orders: Option<Sender<Order<T>>>,
    bytes: Arc<Semaphore>,
    limit: usize,
    durable: watch::Receiver<Checkpoint>,
    /// How the thread has ended; `None` once that was told.
    outcome: Option<oneshot::Receiver<Result<()>>>,
}

/// The thread's end.
pub(super) struct Orders<T> {
    orders: Receiver<Order<T>>,
    durable: watch::Sender<Checkpoint>,
}

/// Something to do, with its share of the queue's bytes; they are free again when it is dropped.
pub(super) struct Order<T> {
    pub(super) what: T,
    _bytes: OwnedSemaphorePermit,
}

/// What [`Orders::next`] found.
pub(super) enum Next<T> {
    Order(Order<T>),
    /// Nothing came in time.
    Quiet,
    /// The loop has let go: roll back and end.
    Gone,
}

impl<T: Send + 'static> Worker<T> {
    pub(super) fn spawn(
        name: &str,
        queue_bytes: usize,
        start: Checkpoint,
        run: impl FnOnce(Orders<T>) -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let (sender, orders) = channel();
        let (progress, durable) = watch::channel(start);
        let ours = Orders { orders, durable: progress };
        let (tell, outcome) = oneshot::channel();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || tell.send(run(ours)))
            .map_err(|e| Error::fatal(format_args!("starting thread {name}"), e))?;
        let bytes = Arc::new(Semaphore::new(queue_bytes));
        Ok(Self { orders: Some(sender), bytes, limit: queue_bytes, durable, outcome: Some(outcome) })
    }

    /// Hands an order over; waits while the queue is full. One larger than the queue takes the whole of it.
    pub(super) async fn send(&mut self, what: T, bytes: usize) -> Result<()> {
        let share = u32::try_from(bytes.clamp(1, self.limit)).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.bytes).acquire_many_owned(share);
        let mut ended = self.durable.clone();
        let permit = tokio::select! {
            permit = permit => permit.ok(),
            () = async { while ended.changed().await.is_ok() {} } => None,
        };
        let sent = match (permit, &self.orders) {
            (Some(permit), Some(orders)) => orders.send(Order { what, _bytes: permit }).is_ok(),
            _ => false,
        };
        if sent { Ok(()) } else { Err(self.failure().await) }
    }

    pub(super) fn stored(&self) -> Stored {
        Stored(*self.durable.borrow())
    }

    pub(super) async fn moved(&mut self) -> Result<()> {
        match self.durable.changed().await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.failure().await),
        }
    }

    /// Lets the thread end and waits for it. Who does not wait to the end takes nothing from who asks next.
    pub(super) async fn stop(&mut self) -> Result<()> {
        self.orders = None;
        let Some(outcome) = &mut self.outcome else { return Ok(()) };
        let outcome = outcome.await;
        self.outcome = None;
        outcome.unwrap_or_else(|_| Err(Error::Fatal("a sink's thread has panicked".into())))
    }

    async fn failure(&mut self) -> Error {
        match self.stop().await {
            Err(error) => error,
            Ok(()) => Error::Fatal("a sink's thread has ended too early".into()),
        }
    }
}

impl<T> Orders<T> {
    /// The next order; with `patience` only that long.
    pub(super) fn next(&self, patience: Option<Duration>) -> Next<T> {
        let got = match patience {
            None => self.orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(limit) => self.orders.recv_timeout(limit),
        };
        match got {
            Ok(order) => Next::Order(order),
            Err(RecvTimeoutError::Timeout) => Next::Quiet,
            Err(RecvTimeoutError::Disconnected) => Next::Gone,
        }
    }

    /// Says that everything up to `checkpoint` is durable.
    pub(super) fn durable(&self, checkpoint: Checkpoint) {
        self.durable.send_replace(checkpoint);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn why_a_thread_has_ended_is_told_to_who_waits_for_it() {
        let (end, ended) = channel::<()>();
        let run = move |orders: Orders<()>| {
            drop(orders);
            let _ = ended.recv();
            Err(Error::unreachable("Kafka", "away"))
        };
        let mut worker = Worker::spawn("test", 1, Checkpoint::whole(crate::lsn::Lsn(0)), run).unwrap();
        // A loop that has something else to do meanwhile lets go of the question.
        while worker.durable.has_changed().is_ok() {
            tokio::task::yield_now().await;
        }
        assert!(worker.moved().now_or_never().is_none());
        drop(end);
        assert!(worker.moved().await.unwrap_err().is_transient());
    }
}
