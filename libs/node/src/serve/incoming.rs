//! Connections as a listener accepts them: plain, or over TLS once the handshake is done.
//!
//! Handshakes run beside each other, since each waits for its client; how many and for how long is bounded, so that clients that
//! never finish theirs delay others and do no more.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected as HttpConnected;
use axum::serve::IncomingStream;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt, stream};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

/// A client that needs longer for its part is none.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes that are under way at a time. Further connections wait in the system's queue.
const HANDSHAKES_MAX: usize = 256;
/// How long nothing is accepted after the system refused to: it is out of file descriptors, most of all.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What connections are made with: `None` is plain.
pub(super) type Secure = Option<Box<dyn Fn() -> Arc<ServerConfig> + Send + Sync>>;

/// What is known of who is at the other end. With every request of gRPC among its extensions; with those of HTTP as
/// `axum::extract::ConnectInfo`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Whether it has shown a certificate that the cluster's authority signed.
    pub member: bool,
}

/// A listener's connections.
pub(super) struct Incoming {
    listener: TcpListener,
    secure: Secure,
    handshakes: FuturesUnordered<BoxFuture<'static, Option<(Connection, SocketAddr)>>>,
}

/// One of them.
#[derive(Debug)]
pub(super) enum Connection {
    Plain(TcpStream),
    Secure(Box<TlsStream<TcpStream>>),
}

impl Incoming {
    pub(super) fn new(listener: TcpListener, secure: Secure) -> Self {
        Self {
            listener,
            secure,
            handshakes: FuturesUnordered::new(),
        }
    }

    /// The form in which tonic takes them.
    pub(super) fn into_stream(self) -> impl Stream<Item = io::Result<Connection>> {
        stream::unfold(self, |mut incoming| async move {
            let (connection, _) = incoming.next().await;
            Some((Ok(connection), incoming))
        })
    }

    /// The next connection. Cancel safe.
    async fn next(&mut self) -> (Connection, SocketAddr) {
        loop {
            let room = self.handshakes.len() < HANDSHAKES_MAX;
            tokio::select! {
                Some(done) = self.handshakes.next() => {
                    if let Some(connection) = done {
                        return connection;
                    }
                }
                accepted = accept(&self.listener), if room => {
                    let (stream, address) = accepted;
                    match &self.secure {
                        None => return (Connection::Plain(stream), address),
                        Some(config) => self.handshakes.push(Box::pin(handshake(config(), stream, address))),
                    }
                }
            }
        }
    }
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                // A token must not wait for the acknowledgement of the one before. A failure costs latency only.
                let _ = stream.set_nodelay(true);
                return (stream, address);
            }
            // A client that left before it was accepted.
            Err(error) if is_of_client(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_of_client(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
    )
}

async fn handshake(
    config: Arc<ServerConfig>,
    stream: TcpStream,
    address: SocketAddr,
) -> Option<(Connection, SocketAddr)> {
    match timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(stream)).await {
        Ok(Ok(stream)) => Some((Connection::Secure(Box::new(stream)), address)),
        // Anybody can cause this at any rate, and it is told to whoever caused it.
        Ok(Err(error)) => {
            tracing::debug!(%address, %error, "refused a connection");
            None
        }
        Err(_) => {
            tracing::debug!(%address, "a TLS handshake did not end within {HANDSHAKE_TIMEOUT:?}");
            None
        }
    }
}

impl Connection {
    fn peer(&self) -> Peer {
        // Certificates that were shown were verified in the handshake.
        let member = match self {
            Self::Plain(_) => false,
            Self::Secure(stream) => stream.get_ref().1.peer_certificates().is_some(),
        };
        Peer { member }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer()
    }
}

impl axum::serve::Listener for Incoming {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        self.next().await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl HttpConnected<IncomingStream<'_, Incoming>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Incoming>) -> Self {
        stream.io().peer()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Secure(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Secure(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Secure(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Secure(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Secure(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Secure(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
