//! The CopyBoth stream: one thread that only reads, cuts whole messages, and gives feedback on its own timer.
//!
//! While a backlog is there the reader takes large gulps and rests between them ([`Pace`]): a walsender whose messages
//! gather in the kernel sends about twice as much as one whose messages are sent and read one by one.
//! Feedback never depends on the sinks: it goes out while they block and in the middle of a huge transaction.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Buf, BufMut, BytesMut};
use futures_util::FutureExt;
use pgwire_replication::protocol::messages::ErrorFields;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::chunk::Chunk;
pub use super::pace::Pace;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::pgoutput::EPOCH_MICROS;
use crate::sink::Durable;

/// Size of a read buffer; whole messages are cut out of it, and share it.
const GULP: usize = 256 << 10;
/// Free space of the read buffer before each read: as much as a bounded receive window holds.
const ROOM: usize = 128 << 10;
/// How often feedback may be sent when the acknowledgement has moved.
const TICK: Duration = Duration::from_millis(100);
/// Feedback is sent at least this often; the server's patience (`wal_sender_timeout`) is 60 s by default.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long the server may take to confirm the end of the stream.
const FAREWELL: Duration = Duration::from_secs(5);
/// Largest message that is accepted: Postgres's own limit of one field is 1 GiB.
const LARGEST: usize = (1 << 30) + (64 << 20);

/// The running stream.
pub struct Stream {
    chunks: mpsc::UnboundedReceiver<Result<Chunk>>,
    flush: watch::Sender<Lsn>,
    finish: CancellationToken,
}

impl Stream {
    /// Starts the reading thread, connects within it, and hands out what `connect` says beside the connection, which has
    /// to stand right behind CopyBothResponse.
    ///
    /// The thread has a runtime of its own: a wake-up from another thread's event loop would cost more than a read.
    ///
    /// # Errors
    /// Those of `connect`; [`Error::Fatal`] when the thread cannot be started.
    pub async fn open<S, T, E, F>(
        queue_bytes: usize,
        connect: impl FnOnce() -> F + Send + 'static,
    ) -> Result<(Self, T), E>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
        T: Send + 'static,
        E: From<Error> + Send + 'static,
        F: Future<Output = Result<(S, Pace, T), E>>,
    {
        let (sender, chunks) = mpsc::unbounded_channel();
        let (flush, acknowledged) = watch::channel(Lsn(0));
        let (finish, (answer, answered)) = (CancellationToken::new(), oneshot::channel());
        let finished = finish.clone();
        let work = move |runtime: Runtime| {
            runtime.block_on(async move {
                match connect().await {
                    Ok((connection, pace, said)) => {
                        let reader = Reader::new(connection, pace, queue_bytes, acknowledged, sender, finished);
                        if answer.send(Ok(said)).is_ok() {
                            reader.run().await;
                        }
                    }
                    Err(error) => drop(answer.send(Err(error))),
                }
            });
        };
        let started = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .and_then(|runtime| std::thread::Builder::new().name("reader".into()).spawn(move || work(runtime)));
        started.map_err(|e| Error::fatal("starting the reading thread", e))?;
        let said = answered.await.map_err(|_| broken("the reading thread has ended"))??;
        Ok((Self { chunks, flush, finish }, said))
    }

    /// The next chunk.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when the connection has ended; [`Error::Refused`] when the server says why and means it.
    pub async fn next(&mut self) -> Result<Chunk> {
        match self.chunks.recv().await {
            Some(chunk) => chunk,
            None => Err(broken("the reading thread has ended")),
        }
    }

    /// Acknowledges; never moves backwards.
    pub fn acknowledge(&self, durable: Durable) {
        self.flush.send_if_modified(|at| {
            let moved = durable.lsn() > *at;
            *at = (*at).max(durable.lsn());
            moved
        });
    }

    /// What has been acknowledged last.
    pub fn acknowledged(&self) -> Lsn {
        *self.flush.borrow()
    }

    /// Sends the last acknowledgement, ends the stream, and waits until the server has confirmed that.
    pub async fn finish(mut self) {
        self.finish.cancel();
        while let Some(chunk) = self.chunks.recv().await {
            drop(chunk);
        }
    }
}

/// A dropped stream lets its thread end.
impl Drop for Stream {
    fn drop(&mut self) {
        self.finish.cancel();
    }
}

struct Reader<S> {
    connection: S,
    buffer: BytesMut,
    /// Bytes at the buffer's start that are whole messages.
    scanned: usize,
    received: Lsn,
    acknowledged: watch::Receiver<Lsn>,
    /// What was last reported as flushed, and when.
    reported: (Lsn, Instant),
    pace: Pace,
    queue: Arc<Semaphore>,
    limit: usize,
    chunks: mpsc::UnboundedSender<Result<Chunk>>,
    finish: CancellationToken,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Reader<S> {
    fn new(
        connection: S,
        pace: Pace,
        limit: usize,
        acknowledged: watch::Receiver<Lsn>,
        chunks: mpsc::UnboundedSender<Result<Chunk>>,
        finish: CancellationToken,
    ) -> Self {
        Self {
            connection,
            buffer: BytesMut::with_capacity(GULP),
            scanned: 0,
            received: Lsn(0),
            acknowledged,
            reported: (Lsn(0), Instant::now()),
            pace,
            queue: Arc::new(Semaphore::new(limit)),
            limit,
            chunks,
            finish,
        }
    }

    async fn run(mut self) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let finish = self.finish.clone();
        let outcome = tokio::select! {
            biased;
            () = finish.cancelled() => Ok(()),
            Err(error) = self.read(&mut tick) => Err(error),
        };
        match outcome {
            Ok(()) => drop(tokio::time::timeout(FAREWELL, self.farewell()).await),
            Err(error) => drop(self.chunks.send(Err(error))),
        }
    }

    /// Never returns `Ok`: the stream has no end of its own.
    async fn read(&mut self, tick: &mut Interval) -> Result<()> {
        loop {
            self.make_room();
            tokio::select! {
                biased;
                _ = tick.tick() => self.report(false).await?,
                read = self.gulp() => {
                    let n = read.map_err(broken)?;
                    if n == 0 {
                        return Err(broken("the server has closed the connection"));
                    }
                    if self.scan()? {
                        self.report(true).await?;
                    }
                    self.hand_over(tick).await?;
                    self.pace.after(n);
                }
            }
        }
    }

    /// Most reads are far smaller than the buffer: a new one for each would cost more than the read.
    fn make_room(&mut self) {
        if self.buffer.capacity() - self.buffer.len() < ROOM {
            self.buffer.reserve(GULP);
        }
    }

    /// Waits for something to read, then takes what is there as far as buffer and window reach. An end or an error that
    /// comes after something was read comes again at the next call.
    async fn gulp(&mut self) -> std::io::Result<usize> {
        let mut taken = self.connection.read_buf(&mut self.buffer).await?;
        while taken > 0 && !self.pace.is_full(taken) && self.buffer.len() < self.buffer.capacity() {
            match self.connection.read_buf(&mut self.buffer).now_or_never() {
                Some(Ok(more)) if more > 0 => taken += more,
                _ => break,
            }
        }
        Ok(taken)
    }

    /// Looks through the messages that have become whole; says whether the server wants feedback now.
    fn scan(&mut self) -> Result<bool> {
        let mut wanted = false;
        while let Some(header) = self.buffer.get(self.scanned..self.scanned + 5) {
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            if !(4..=LARGEST).contains(&length) {
                return Err(Error::Fatal(format!("a replication message of {length} bytes; the limit is {LARGEST}")));
            }
            let (tag, end) = (header[0], self.scanned + 1 + length);
            let Some(payload) = self.buffer.get(self.scanned + 5..end) else {
                self.buffer.reserve(end - self.buffer.len());
                break;
            };
            match tag {
                b'd' => wanted |= self.note(end - length + 4)?,
                b'E' => return Err(server_error(payload)),
                b'N' if skips_changes(payload) => return Err(refused(ErrorFields::parse(payload).to_error_string())),
                b'c' => return Err(broken("the server has ended the stream")),
                // Other notices and parameter changes stand between data messages and say nothing about them.
                _ => {
                    let mut tail = self.buffer.split_off(self.scanned);
                    tail.advance(end - self.scanned);
                    self.buffer.unsplit(tail);
                    continue;
                }
            }
            self.scanned = end;
        }
        Ok(wanted)
    }

    /// Remembers how far the server has sent, and how old it is. `at` is the payload's start in the buffer.
    fn note(&mut self, at: usize) -> Result<bool> {
        let payload = &self.buffer[at..];
        let long_enough = match payload.first() {
            Some(b'w') => payload.len() >= 25,
            Some(b'k') => payload.len() >= 18,
            _ => false,
        };
        if !long_enough {
            let shown = payload.first().copied().unwrap_or_default();
            return Err(Error::Fatal(format!(
                "a replication message that is neither data nor keepalive (0x{shown:02x})"
            )));
        }
        let mut fields = &payload[1..];
        self.received = self.received.max(Lsn(fields.get_u64()));
        if payload[0] == b'k' {
            self.pace.keepalive();
            return Ok(payload[17] == 1);
        }
        fields.advance(8);
        self.pace.message(fields.get_i64(), fields);
        Ok(false)
    }

    /// Gives whole messages to the loop. While its queue is full only the socket waits; feedback goes on.
    async fn hand_over(&mut self, tick: &mut Interval) -> Result<()> {
        if self.scanned == 0 {
            return Ok(());
        }
        let share = self.scanned.min(self.limit) as u32;
        let share = loop {
            if let Ok(permit) = Arc::clone(&self.queue).try_acquire_many_owned(share) {
                break permit;
            }
            // Waiting for the permit itself would be waiting on the socket too: each message that comes would wake this
            // thread for nothing, and the walsender pays for each of these wakes.
            self.pace.rest();
            tokio::task::yield_now().await;
            if tick.tick().now_or_never().is_some() {
                self.report(false).await?;
            }
        };
        let bytes = self.buffer.split_to(std::mem::take(&mut self.scanned)).freeze();
        self.chunks.send(Ok(Chunk { bytes, _share: share })).map_err(broken)
    }

    /// Standby status update: received as written, durable as flushed and applied.
    async fn report(&mut self, now: bool) -> Result<()> {
        let flush = *self.acknowledged.borrow_and_update();
        let (last, when) = self.reported;
        if !now && flush == last && when.elapsed() < HEARTBEAT {
            return Ok(());
        }
        self.reported = (flush, Instant::now());
        let status = self.status(flush);
        self.send(&status).await
    }

    /// Standby status update ("Streaming Replication Protocol"): written, flushed, applied, clock, no reply wanted.
    fn status(&self, flush: Lsn) -> [u8; 34] {
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_micros() as i64);
        let mut status = [0; 34];
        status[0] = b'r';
        for (at, lsn) in [(1, self.received.max(flush)), (9, flush), (17, flush)] {
            status[at..at + 8].copy_from_slice(&lsn.0.to_be_bytes());
        }
        status[25..33].copy_from_slice(&(unix - EPOCH_MICROS).to_be_bytes());
        status
    }

    async fn send(&mut self, status: &[u8]) -> Result<()> {
        let mut message = BytesMut::with_capacity(status.len() + 5);
        message.put_u8(b'd');
        message.put_u32(status.len() as u32 + 4);
        message.extend_from_slice(status);
        self.connection.write_all(&message).await.map_err(broken)?;
        self.connection.flush().await.map_err(broken)
    }

    /// The server handles messages in order: once it has confirmed CopyDone, it has the last acknowledgement.
    async fn farewell(&mut self) -> Result<()> {
        let status = self.status(*self.acknowledged.borrow());
        self.send(&status).await?;
        self.connection.write_all(b"c\0\0\0\x04").await.map_err(broken)?;
        self.connection.flush().await.map_err(broken)?;
        loop {
            // What had not been read yet is of no use any more, but it stands before the server's answer.
            while let Some(header) = self.buffer.first_chunk::<5>() {
                let (tag, length) =
                    (header[0], u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize);
                if self.buffer.len() <= length {
                    break;
                }
                if matches!(tag, b'C' | b'Z' | b'E') {
                    return Ok(());
                }
                self.buffer.advance(length + 1);
            }
            self.make_room();
            if self.connection.read_buf(&mut self.buffer).await.map_err(broken)? == 0 {
                return Ok(());
            }
        }
    }
}

fn broken(why: impl ToString) -> Error {
    Error::unreachable("the replication stream", why.to_string())
}

/// From Postgres 18 on a publication that is not there (55000, "skipped loading publication") is a warning, and the rows that
/// it would have published are passed over: before, it was an error.
fn skips_changes(notice: &[u8]) -> bool {
    ErrorFields::parse(notice).code.as_deref() == Some("55000")
}

/// 42704: the publication has gone; 42501: a right was taken away; 0A000: the server cannot do what was asked. 54000 and the
/// allocation: a message of more than 1 GiB; 22021 and 22P05: bytes that are no text. These come again with every attempt.
fn server_error(payload: &[u8]) -> Error {
    let fields = ErrorFields::parse(payload);
    let (code, mut text) = (fields.code.clone().unwrap_or_default(), fields.to_error_string());
    // Which change it was.
    if let Some(context) = &fields.where_ {
        text += &format!(": {context}");
    }
    match code.as_str() {
        "42704" | "42501" | "0A000" => refused(text),
        "54000" | "22021" | "22P05" => undecodable(text),
        "XX000" if text.contains("invalid memory alloc request size") => undecodable(text),
        _ => broken(text),
    }
}

fn refused(text: String) -> Error {
    Error::refused(
        "replication",
        text,
        "the publication and the rights that the stream started with",
        "falaj check. Where the publication was dropped and made again, what was written in between cannot be decoded: start \
         anew (another pipeline name, drop the slot, falaj init)",
    )
}

fn undecodable(text: String) -> Error {
    Error::refused(
        "replication_row",
        text,
        "rows that Postgres can send: less than 1 GiB with the old row, a bytea in a stream that is read in text less than 512 MiB, \
         and texts that are of the database's encoding",
        "the row stays in the WAL. Take its column out of the publication (or keep such values away), then start anew (another \
         pipeline name, drop the slot, falaj init, falaj backfill)",
    )
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;
    use crate::sink::Stored;

    #[test]
    fn a_row_that_the_server_cannot_send_is_not_asked_for_again_and_again() {
        let error = |code: &str, text: &str| {
            let payload = format!("SERROR\0C{code}\0M{text}\0Wslot \"s\", associated LSN 0/1A2B3C4\0\0");
            server_error(payload.as_bytes())
        };
        let said = |code: &str, text: &str| error(code, text).exit_code();
        assert!(
            error("54000", "out of memory")
                .to_string()
                .contains("out of memory (SQLSTATE 54000): slot \"s\", associated LSN 0/1A2B3C4")
        );
        assert_eq!(said("54000", "string buffer exceeds maximum allowed length"), 78);
        assert_eq!(said("XX000", "invalid memory alloc request size 1258291205"), 78);
        assert_eq!(said("22021", "invalid byte sequence for encoding \"UTF8\": 0xff"), 78);
        for passes in
            [said("XX000", "could not read block 7"), said("53200", "out of memory"), said("57P01", "terminating")]
        {
            assert_ne!(passes, 78);
        }
    }

    fn message(tag: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend((payload.len() as u32 + 4).to_be_bytes());
        out.extend(payload);
        out
    }

    fn data(lsn: u64, body: &[u8]) -> Vec<u8> {
        let mut payload = vec![b'w'];
        payload.extend(lsn.to_be_bytes());
        payload.extend([0; 16]);
        payload.extend(body);
        message(b'd', &payload)
    }

    fn keepalive(lsn: u64, reply: u8) -> Vec<u8> {
        let mut payload = vec![b'k'];
        payload.extend(lsn.to_be_bytes());
        payload.extend([0; 8]);
        payload.push(reply);
        message(b'd', &payload)
    }

    async fn start(client: tokio::io::DuplexStream, queue: usize) -> Stream {
        Stream::open(queue, move || async move { Ok::<_, Error>((client, Pace::new(None), ())) }).await.unwrap().0
    }

    fn owned(chunk: &Chunk) -> Vec<String> {
        chunk.frames().map(|f| format!("{f:?}")).collect()
    }

    #[tokio::test]
    async fn whole_messages_come_out_however_they_are_cut() {
        let wire = [data(1, b"one"), message(b'N', b"notice\0"), data(2, b"two"), keepalive(9, 0)].concat();
        for cut in 1..wire.len() {
            let (mut server, client) = duplex(1 << 16);
            let mut stream = start(client, 1 << 20).await;
            server.write_all(&wire[..cut]).await.unwrap();
            tokio::task::yield_now().await;
            server.write_all(&wire[cut..]).await.unwrap();
            let mut seen = Vec::new();
            while seen.len() < 3 {
                seen.extend(owned(&stream.next().await.unwrap()));
            }
            assert_eq!(
                seen,
                ["Data([111, 110, 101])", "Data([116, 119, 111])", "Keepalive { wal_end: 0/9, reply: false }"]
            );
        }
    }

    #[tokio::test]
    async fn a_wanted_reply_comes_at_once_and_a_full_queue_does_not_stop_feedback() {
        let (mut server, client) = duplex(1 << 16);
        let mut stream = start(client, 8).await;
        let status = async |server: &mut tokio::io::DuplexStream| {
            let mut update = [0; 39];
            server.read_exact(&mut update).await.unwrap();
            assert_eq!((update[0], update[5]), (b'd', b'r'));
            u64::from_be_bytes(update[14..22].try_into().unwrap())
        };
        server.write_all(&[data(1, b"fills the queue"), keepalive(9, 1)].concat()).await.unwrap();
        assert_eq!(status(&mut server).await, 0);
        let held = stream.next().await.unwrap();
        server.write_all(&data(2, b"waits")).await.unwrap();
        for lsn in [9, 3] {
            stream.acknowledge(Durable::lowest([Stored::for_test(lsn)]).unwrap());
        }
        while status(&mut server).await != 9 {}
        drop(held);
        assert_eq!(owned(&stream.next().await.unwrap()), ["Data([119, 97, 105, 116, 115])"]);
    }

    #[tokio::test]
    async fn the_servers_reason_reaches_the_caller() {
        let (mut server, client) = duplex(1 << 16);
        let mut stream = start(client, 1 << 20).await;
        server.write_all(&message(b'E', b"SERROR\0C57P01\0Mterminating connection\0\0")).await.unwrap();
        let error = stream.next().await.err().unwrap();
        assert!(error.is_transient() && error.to_string().contains("terminating connection"), "{error}");

        let (mut server, client) = duplex(1 << 16);
        let mut stream = start(client, 1 << 20).await;
        server.write_all(&message(b'd', b"?")).await.unwrap();
        assert_eq!(stream.next().await.err().unwrap().exit_code(), 1);
    }
}
