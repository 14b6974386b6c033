//! Whole heads and payloads over a socket, on top of calls that do not wait.

use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::copy::Stores;
use crate::cursor::Cursor;
use crate::digest::Digest;
use crate::region::Grant;

/// A host that vanished is noticed within 10 s + 3 × 5 s, also on a connection without requests.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;

/// How a payload ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moved {
    All,
    /// The grant was closed before the last byte; memory is not touched any more.
    Revoked,
}

/// Sets what every connection of the transport has.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    // Heads and acknowledgements are small and waited for.
    stream.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// Makes the drop of the stream a reset, so that what the kernel still has to send is thrown away.
pub(crate) fn reset_on_drop(stream: &TcpStream) {
    // If it cannot be set the connection is gone already.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Whether the peer closed an idle connection, or sent what nobody asked for.
pub(crate) fn is_stale(stream: &TcpStream) -> bool {
    let mut byte = [0];
    match stream.try_read(&mut byte) {
        Ok(_) => true,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}

/// Receives at least one byte, and not more than `bytes` holds. 0 is the end of the stream.
pub(crate) async fn receive_some(stream: &TcpStream, bytes: &mut [u8]) -> io::Result<usize> {
    // What is there already needs no event, which another thread may have to be woken for.
    match (&*SockRef::from(stream)).read(bytes) {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) => {}
        result => return result,
    }
    loop {
        stream.readable().await?;
        match stream.try_read(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}

/// Waits for something to receive without sleeping, for at most `spin`: other tasks run meanwhile, but a processor that
/// has nothing else to do does not halt, which on virtual machines takes longer than a transfer of mapped memory.
pub(crate) async fn spin_for_readable(stream: &TcpStream, spin: Duration) {
    let begun = Instant::now();
    let mut byte = [MaybeUninit::uninit()];
    while begun.elapsed() < spin {
        // Looks without taking. Anything but "not yet" is for the reader to find out.
        match SockRef::from(stream).peek(&mut byte) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::task::yield_now().await,
            _ => return,
        }
    }
}

/// Receives until `bytes` is full.
pub(crate) async fn receive_exact(stream: &TcpStream, mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let received = receive_some(stream, bytes).await?;
        if received == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[received..];
    }
    Ok(())
}

/// Receives `count` bytes and forgets them.
pub(crate) async fn discard(stream: &TcpStream, mut count: u64, scratch: &mut [u8]) -> io::Result<()> {
    while count > 0 {
        let take = scratch.len().min(usize::try_from(count).unwrap_or(usize::MAX));
        receive_exact(stream, &mut scratch[..take]).await?;
        count -= take as u64;
    }
    Ok(())
}

/// Whose memory a payload goes to.
pub(crate) enum Destination<'a> {
    /// That of a peer's grant, which must be open, and whose landings see what comes.
    Granted(&'a Grant),
    /// This node's own. The digest sees what comes, if there is one.
    Own(Option<&'a mut Digest>),
}

impl Destination<'_> {
    fn receive(&mut self, stream: &TcpStream, cursor: &mut Cursor) -> io::Result<Option<usize>> {
        match self {
            Self::Granted(grant) => {
                let received = || cursor.receive(stream.as_fd(), |offset, bytes| grant.landed(offset, bytes));
                grant.touch(received).transpose()
            }
            Self::Own(None) => cursor.receive(stream.as_fd(), |_, _| {}).map(Some),
            Self::Own(Some(digest)) => {
                let memory = cursor.memory().clone();
                let landed = |offset: u64, bytes: u64| {
                    let at = memory.base().as_ptr().wrapping_add(offset as usize);
                    // SAFETY: the cursor's spans are inside of the memory, and nothing is stored.
                    unsafe { digest.take(at, at, bytes as usize, Stores::None) };
                };
                cursor.receive(stream.as_fd(), landed).map(Some)
            }
        }
    }
}

/// Receives into the cursor's memory to its end, as far as its owner allows it. What comes is shown to whoever hashes it while it
/// is in the nearest cache.
pub(crate) async fn receive_payload(
    stream: &TcpStream,
    cursor: &mut Cursor,
    mut into: Destination<'_>,
) -> io::Result<Moved> {
    while cursor.remaining() > 0 {
        let received = stream.async_io(Interest::READABLE, || into.receive(stream, cursor));
        match received.await? {
            Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Some(_) => {}
            None => return Ok(Moved::Revoked),
        }
    }
    Ok(Moved::All)
}

/// Sends a head and then the cursor's bytes to its end, as far as `grant` allows it.
pub(crate) async fn send(
    stream: &TcpStream,
    mut head: &[u8],
    cursor: &mut Cursor,
    grant: Option<&Grant>,
) -> io::Result<Moved> {
    while !head.is_empty() || cursor.remaining() > 0 {
        let sent = stream.async_io(Interest::WRITABLE, || {
            within(grant, || cursor.send(stream.as_fd(), &mut head))
        });
        if sent.await?.is_none() {
            return Ok(Moved::Revoked);
        }
    }
    Ok(Moved::All)
}

/// Sends a head alone.
pub(crate) async fn send_head(stream: &TcpStream, mut head: &[u8]) -> io::Result<()> {
    while !head.is_empty() {
        stream.writable().await?;
        match stream.try_write(head) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => head = &head[result?..],
        }
    }
    Ok(())
}

/// The call's result, or `None` when the grant is closed.
fn within(grant: Option<&Grant>, call: impl FnOnce() -> io::Result<usize>) -> io::Result<Option<usize>> {
    match grant {
        Some(grant) => grant.touch(call).transpose(),
        None => call().map(Some),
    }
}
