//! TCP connections that the handler of a request can reset.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::extract::connect_info::Connected;
use axum::response::{IntoResponse, Response};
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// What a handler knows of the connection that its request came on.
#[derive(Clone, Debug)]
pub(super) struct Connection(CancellationToken);

impl Connection {
    /// Resets the connection: the answer that is returned here meets a closed socket.
    pub(super) fn cut(&self) -> Response {
        self.0.cancel();
        ().into_response()
    }
}

/// Accepts connections that can be cut; `stop` cuts them all.
pub(super) struct Cuttable {
    pub(super) listener: TcpListener,
    pub(super) stop: CancellationToken,
}

impl Listener for Cuttable {
    type Io = Stream;
    type Addr = Connection;

    async fn accept(&mut self) -> (Stream, Connection) {
        let (tcp, _) = Listener::accept(&mut self.listener).await;
        // Without it small answers wait for the acknowledgement of the one before; the simulator works all the same.
        let _ = tcp.set_nodelay(true);
        let cut = self.stop.child_token();
        (Stream { tcp, cut: cut.clone() }, Connection(cut))
    }

    fn local_addr(&self) -> io::Result<Connection> {
        Ok(Connection(self.stop.clone()))
    }
}

impl Connected<IncomingStream<'_, Cuttable>> for Connection {
    fn connect_info(stream: IncomingStream<'_, Cuttable>) -> Self {
        stream.remote_addr().clone()
    }
}

/// A TCP stream that fails, with a reset to the other side, once it is cut.
pub(super) struct Stream {
    tcp: TcpStream,
    cut: CancellationToken,
}

impl Stream {
    fn check(&self) -> io::Result<()> {
        if !self.cut.is_cancelled() {
            return Ok(());
        }
        self.tcp.set_zero_linger()?;
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
