//! An open byte stream to Postgres: TCP, TLS over TCP, or a unix socket.

use std::io;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use pgwire_replication::protocol::framing::write_ssl_request;
use pgwire_replication::tls::rustls::MaybeTlsStream;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream, lookup_host};

use super::tls::{self, Mode};
use super::{Conninfo, Target};
use crate::error::{Error, Result};

/// An open connection. Dropping it closes it.
pub enum Stream {
    /// TCP, with or without TLS.
    Tcp(MaybeTlsStream),
    /// A unix socket.
    Unix(UnixStream),
}

impl Conninfo {
    /// Opens a connection to one host, with TLS when `tls` and the server agree.
    pub(super) async fn open(&self, target: &Target, tls: bool) -> Result<Stream> {
        if target.is_socket() {
            let path = target.address();
            return UnixStream::connect(&path).await.map(Stream::Unix).map_err(|e| socket_error(&path, &e));
        }
        let what = self.name(target);
        let mut tcp = self.connect(target).await.map_err(|e| Error::unreachable(&what, e))?;
        if !tls {
            return Ok(Stream::Tcp(MaybeTlsStream::Plain(tcp)));
        }
        if agrees_to_tls(&mut tcp).await.map_err(|e| Error::unreachable(&what, e))? {
            let session = tls::handshake(&self.ssl, &target.host, tcp).await?;
            return Ok(Stream::Tcp(MaybeTlsStream::Tls(Box::new(session))));
        }
        match self.ssl.mode {
            Mode::Disable | Mode::Prefer => Ok(Stream::Tcp(MaybeTlsStream::Plain(tcp))),
            Mode::Require | Mode::VerifyCa | Mode::VerifyFull => Err(tls::not_offered(&what)),
        }
    }

    /// Tries every address of the host's name.
    async fn connect(&self, target: &Target) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in lookup_host((target.addr.as_deref().unwrap_or(&target.host), target.port)).await? {
            match TcpStream::connect(address).await {
                Ok(tcp) => return self.tune(tcp),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    /// No waiting for more to send; a dead peer is noticed.
    fn tune(&self, tcp: TcpStream) -> io::Result<TcpStream> {
        tcp.set_nodelay(true)?;
        let socket = SockRef::from(&tcp);
        if self.tcp.keepalive {
            let keepalive = TcpKeepalive::new()
                .with_time(self.tcp.idle)
                .with_interval(self.tcp.interval)
                .with_retries(self.tcp.count);
            socket.set_tcp_keepalive(&keepalive)?;
        }
        if let Some(limit) = self.tcp.user_timeout {
            socket.set_tcp_user_timeout(Some(limit))?;
        }
        Ok(tcp)
    }
}

impl Stream {
    /// Receive buffer of a stream of changes, in bytes. Linux offers between one and two times as much as window.
    const BUFFER: usize = 64 << 10;
    /// Round trips up to this, in µs: with the buffer above, still 32 MB/s.
    const NEAR: u32 = 2_000;

    /// Bounds the receive window of a server that is near, so that its messages gather instead of being sent one by one
    /// ([`crate::source::stream::Pace`]). Gives the bytes that it holds at least; `None` where the way is long, and for a
    /// unix socket.
    pub fn bound_window(&self) -> Option<usize> {
        let tcp = match self {
            Self::Tcp(MaybeTlsStream::Plain(tcp)) => tcp,
            Self::Tcp(MaybeTlsStream::Tls(session)) => session.get_ref().0,
            Self::Unix(_) => return None,
        };
        if round_trip(tcp).ok()? > Self::NEAR {
            return None;
        }
        // With a size of its own the buffer no longer grows, and the kernel confirms what has come only when it is read: the
        // server's congestion window, in segments of any size, stays closed too. A clamp of the window would not do that.
        SockRef::from(tcp).set_recv_buffer_size(Self::BUFFER).ok().map(|()| Self::BUFFER)
    }
}

/// Smoothed round-trip time in µs, as the kernel measures it (tcp(7), TCP_INFO).
fn round_trip(tcp: &TcpStream) -> io::Result<u32> {
    // SAFETY: tcp_info is made of integers, for which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the descriptor is open while `tcp` is borrowed; the kernel writes at most `length` bytes into `info`.
    let done = unsafe {
        let to = (&raw mut info).cast();
        libc::getsockopt(tcp.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, to, &raw mut length)
    };
    if done == 0 { Ok(info.tcpi_rtt) } else { Err(io::Error::last_os_error()) }
}

/// SSLRequest; the answer is a single byte, and nothing may follow it before the handshake.
async fn agrees_to_tls(tcp: &mut TcpStream) -> io::Result<bool> {
    write_ssl_request(tcp).await.map_err(io::Error::other)?;
    match tcp.read_u8().await? {
        b'S' => Ok(true),
        b'N' => Ok(false),
        other => Err(io::Error::other(format!("byte {other:#04x} instead of an answer to SSLRequest"))),
    }
}

fn socket_error(path: &str, e: &io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::PermissionDenied => Error::refused(
            "postgres_socket",
            format!("{path}: {e}"),
            "a socket that this user may open",
            "mend unix_socket_permissions of the server, or connect by TCP",
        ),
        _ => Error::unreachable(format!("Postgres at {path}"), e),
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Self::Unix(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_write(cx, buf),
            Self::Unix(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_flush(cx),
            Self::Unix(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Self::Unix(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}
