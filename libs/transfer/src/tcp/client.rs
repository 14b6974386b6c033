//! The side that asks: splits batches, keeps connections, and ends every batch within its deadline.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::BoxFuture;
use futures::{FutureExt, TryStreamExt, stream as streams};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use types::{Epoch, Memory};

use super::stream;
use super::wire::{self, ANSWER_HEAD_BYTES, AnswerHead, Operation, PAYLOAD_BYTES_MAX, RequestHead, Status};
use super::{SCHEME, Shared};
use crate::TransferError;
use crate::barrier::Barrier;
use crate::cursor::Cursor;
use crate::split::{Limits, Part, split};
use crate::transport::{RemoteRegion, Slice, TransferBatch, TransferStats, check_batch};

/// Peers by endpoint.
#[derive(Default)]
pub(super) struct Peers {
    by_endpoint: Mutex<HashMap<String, Arc<Peer>>>,
}

/// The connections to one peer.
struct Peer {
    endpoint: String,
    /// `host:port`.
    address: String,
    /// One per connection, idle or not.
    permits: Arc<Semaphore>,
    /// Connections on which an answer was received and nothing asked since.
    idle: Mutex<Vec<TcpStream>>,
    /// Writes in progress, for `flush`.
    writes: Arc<Barrier>,
    /// Cancelled by `tear_down`, which puts a new one in its place, and when the transport closes.
    torn_down: Mutex<CancellationToken>,
    requests: AtomicU64,
}

/// A connection in use. Unless given back it is reset, because a request may be half way through it.
struct Connection {
    peer: Arc<Peer>,
    stream: Option<TcpStream>,
    /// It served before, so the peer may have closed it meanwhile.
    reused: bool,
    /// The peer's token when this was taken.
    torn_down: CancellationToken,
    _permit: OwnedSemaphorePermit,
}

/// What all requests of a batch have in common.
struct Job {
    peer: Arc<Peer>,
    memory: Arc<dyn Memory>,
    operation: Operation,
    remote: RemoteRegion,
}

/// One try of a request that came to nothing.
enum Failure {
    /// The connection broke.
    Connection(io::Error),
    /// Another connection would not help.
    Final(TransferError),
}

/// Begins a batch; see [`crate::Transport::write`] and [`crate::Transport::read`].
pub(super) fn transfer(
    shared: Arc<Shared>,
    operation: Operation,
    batch: TransferBatch,
    deadline: Instant,
) -> BoxFuture<'static, Result<TransferStats, TransferError>> {
    let prepared = prepare(&shared, operation, &batch);
    // Taken now and not at the first poll: `flush` waits for what was called before it.
    let ticket = match (&prepared, operation) {
        (Ok(job), Operation::Write) => Some(job.peer.writes.begin()),
        (Ok(_), Operation::Read) | (Err(_), _) => None,
    };
    async move {
        let _ticket = ticket;
        let _in_flight = shared.stats.batches_in_flight.enter();
        let result = match prepared {
            Ok(job) => run(&shared, job, &batch.slices, deadline).await,
            Err(error) => Err(error),
        };
        match &result {
            Ok(done) => {
                shared.stats.batches.add(1);
                match operation {
                    Operation::Write => shared.stats.written_bytes.add(done.bytes),
                    Operation::Read => shared.stats.read_bytes.add(done.bytes),
                }
            }
            Err(error) => shared.stats.batch_failed(error.code()),
        }
        result
    }
    .boxed()
}

/// Waits for writes to the endpoint; see [`crate::Transport::flush`].
pub(super) fn flush(
    shared: &Shared,
    endpoint: &str,
    deadline: Instant,
) -> BoxFuture<'static, Result<(), TransferError>> {
    let writes = shared.peers.map().get(endpoint).map(|peer| peer.writes.clone());
    let Some(writes) = writes else {
        return std::future::ready(Ok(())).boxed();
    };
    let mark = writes.mark();
    let endpoint = endpoint.to_owned();
    async move {
        timeout_at(deadline, writes.passed(mark))
            .await
            .map_err(|_| TransferError::Timeout { endpoint })
    }
    .boxed()
}

/// Everything that can be refused without asking the peer.
fn prepare(shared: &Shared, operation: Operation, batch: &TransferBatch) -> Result<Job, TransferError> {
    let memory = shared.regions.memory(batch.region)?;
    check_batch(batch, memory.len() as u64)?;
    Ok(Job {
        peer: shared.peers.get(shared, &batch.remote.endpoint)?,
        memory,
        operation,
        remote: batch.remote.clone(),
    })
}

async fn run(
    shared: &Arc<Shared>,
    job: Job,
    slices: &[Slice],
    deadline: Instant,
) -> Result<TransferStats, TransferError> {
    let begun = Instant::now();
    let limits = Limits {
        bytes: (shared.config.part_bytes.get() as u64).min(PAYLOAD_BYTES_MAX),
        slices: wire::SLICES_MAX,
    };
    let parts = split(slices, limits);
    let requests = parts.len() as u64;
    let bytes = parts.iter().map(|part| part.bytes).sum();
    let endpoint = job.peer.endpoint.clone();
    let torn_down = job.peer.torn_down().clone();
    let job = Arc::new(job);
    // All in this task, so that dropping the future stops all of them at once.
    let requesting = streams::iter(parts.into_iter().map(Ok)).try_for_each_concurrent(
        shared.config.connections_per_peer.get(),
        |part| {
            let (shared, job) = (shared.clone(), job.clone());
            async move { request(&shared, &job, &part).await }
        },
    );
    match timeout_at(deadline, torn_down.run_until_cancelled(requesting)).await {
        Err(_) => Err(TransferError::Timeout { endpoint }),
        Ok(None) if shared.closed.is_cancelled() => Err(TransferError::Closed),
        Ok(None) => Err(TransferError::ConnectionLost {
            endpoint,
            reason: "torn down".into(),
        }),
        Ok(Some(result)) => result.map(|()| TransferStats {
            bytes,
            requests,
            elapsed: begun.elapsed(),
            mover: SCHEME,
        }),
    }
}

/// Carries out one request. It is tried once more if it failed on a connection that had served before:
/// most likely the peer closed that one, and a request that is repeated puts the same bytes at the same place.
async fn request(shared: &Shared, job: &Job, part: &Part) -> Result<(), TransferError> {
    let local = part.slices.iter().map(|slice| (slice.local_offset, slice.len));
    let mut cursor =
        Cursor::new(job.memory.clone(), local).map_err(|(offset, len)| TransferError::OutOfBounds {
            offset,
            len,
            region_bytes: job.memory.len() as u64,
        })?;
    let remote = &job.remote;
    let mut tries_left = 2;
    loop {
        tries_left -= 1;
        let connection = job.peer.connection(shared).await?;
        let head = RequestHead {
            operation: job.operation,
            id: job.peer.requests.fetch_add(1, Relaxed),
            epoch: remote.epoch.0,
            key: remote.key,
            payload_bytes: part.bytes,
            slices: u32::try_from(part.slices.len()).expect("`split` keeps to SLICES_MAX"),
        };
        let tried = match &connection.stream {
            Some(stream) => exchange(stream, &head, &part.slices, &mut cursor, remote).await,
            None => Err(Failure::Connection(io::ErrorKind::NotConnected.into())),
        };
        match tried {
            Ok(status) => {
                connection.give_back();
                return done_or_refused(status, remote, &part.slices);
            }
            Err(Failure::Connection(_)) if connection.reused && tries_left > 0 => {
                job.peer.forget_idle();
                cursor.rewind();
            }
            Err(Failure::Connection(error)) => {
                return Err(TransferError::ConnectionLost {
                    endpoint: remote.endpoint.clone(),
                    reason: error.to_string(),
                });
            }
            Err(Failure::Final(error)) => return Err(error),
        }
    }
}

/// Sends a request and takes its answer, to the last byte of both.
async fn exchange(
    stream: &TcpStream,
    head: &RequestHead,
    slices: &[Slice],
    cursor: &mut Cursor,
    remote: &RemoteRegion,
) -> Result<Status, Failure> {
    let table = slices.iter().map(|slice| (slice.remote_offset, slice.len));
    let request = head.encode(table);
    match head.operation {
        Operation::Write => {
            stream::send(stream, &request, cursor, None).await?;
        }
        Operation::Read => stream::send_head(stream, &request).await?,
    }
    let mut answer = [0; ANSWER_HEAD_BYTES];
    stream::receive_exact(stream, &mut answer).await?;
    let violation = |reason: String| {
        Failure::Final(TransferError::Protocol {
            endpoint: remote.endpoint.clone(),
            reason,
        })
    };
    let answer = AnswerHead::decode(&answer).map_err(|error| violation(error.to_string()))?;
    if answer.id != head.id {
        return Err(violation(format!(
            "an answer to request {} instead of {}",
            answer.id, head.id
        )));
    }
    let follows = match (head.operation, answer.status) {
        (Operation::Read, Status::Done) => head.payload_bytes,
        _ => 0,
    };
    if answer.payload_bytes != follows {
        return Err(violation(format!(
            "{} payload bytes instead of {follows}",
            answer.payload_bytes
        )));
    }
    if follows > 0 {
        stream::receive_payload(stream, cursor, None).await?;
    }
    Ok(answer.status)
}

fn done_or_refused(status: Status, remote: &RemoteRegion, slices: &[Slice]) -> Result<(), TransferError> {
    let (endpoint, key) = (remote.endpoint.clone(), remote.key);
    Err(match status {
        Status::Done => return Ok(()),
        Status::UnknownKey => TransferError::UnknownKey { endpoint, key },
        Status::Denied => TransferError::Denied { endpoint, key },
        Status::StaleEpoch { current } => TransferError::Fenced {
            endpoint,
            epoch: remote.epoch,
            current: Epoch(current),
        },
        Status::OutOfRange { slice } => {
            let slice = usize::try_from(slice).ok().and_then(|slice| slices.get(slice));
            match slice {
                Some(slice) => TransferError::OutOfRange {
                    endpoint,
                    offset: slice.remote_offset,
                    len: slice.len,
                },
                None => TransferError::Protocol {
                    endpoint,
                    reason: "refused a slice that was not asked for".into(),
                },
            }
        }
    })
}

impl Peers {
    fn get(&self, shared: &Shared, endpoint: &str) -> Result<Arc<Peer>, TransferError> {
        let mut peers = self.map();
        if let Some(peer) = peers.get(endpoint) {
            return Ok(peer.clone());
        }
        let address = endpoint
            .strip_prefix(SCHEME)
            .and_then(|rest| rest.strip_prefix("://"))
            .filter(|address| address.contains(':'))
            .ok_or_else(|| TransferError::UnsupportedEndpoint {
                endpoint: endpoint.to_owned(),
            })?;
        let limit = shared.config.peers_max.get();
        if peers.len() >= limit {
            peers.retain(|_, peer| Arc::strong_count(peer) > 1);
        }
        if peers.len() >= limit {
            return Err(TransferError::Full { what: "peers", limit });
        }
        let peer = Arc::new(Peer {
            endpoint: endpoint.to_owned(),
            address: address.to_owned(),
            permits: Arc::new(Semaphore::new(shared.config.connections_per_peer.get())),
            idle: Mutex::default(),
            writes: Arc::default(),
            torn_down: Mutex::new(shared.closed.child_token()),
            requests: AtomicU64::new(1),
        });
        peers.insert(endpoint.to_owned(), peer.clone());
        Ok(peer)
    }

    pub(super) fn tear_down(&self, shared: &Shared, endpoint: &str) {
        if let Some(peer) = self.map().get(endpoint) {
            let renewed = shared.closed.child_token();
            std::mem::replace(&mut *peer.torn_down(), renewed).cancel();
            peer.forget_idle();
        }
    }

    pub(super) fn clear(&self) {
        self.map().clear();
    }

    fn map(&self) -> MutexGuard<'_, HashMap<String, Arc<Peer>>> {
        self.by_endpoint.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peer {
    /// An idle connection, or a new one; waits while all that may be are in use.
    async fn connection(self: &Arc<Self>, shared: &Shared) -> Result<Connection, TransferError> {
        let permit = self.permits.clone().acquire_owned().await;
        let _permit = permit.expect("the semaphore is never closed");
        let idle = self.take_idle();
        let reused = idle.is_some();
        let stream = match idle {
            Some(stream) => stream,
            None => self.connect(shared).await?,
        };
        Ok(Connection {
            peer: self.clone(),
            torn_down: self.torn_down().clone(),
            stream: Some(stream),
            reused,
            _permit,
        })
    }

    async fn connect(&self, shared: &Shared) -> Result<TcpStream, TransferError> {
        let unreachable = |reason: String| TransferError::Unreachable {
            endpoint: self.endpoint.clone(),
            reason,
        };
        let connecting = timeout(shared.config.connect_timeout, TcpStream::connect(&self.address));
        let connected = connecting.await.map_err(|_| {
            unreachable(format!(
                "no connection within {:?}",
                shared.config.connect_timeout
            ))
        })?;
        let stream = connected.map_err(|error| unreachable(error.to_string()))?;
        stream::prepare(&stream).map_err(|error| unreachable(error.to_string()))?;
        shared.stats.connections_opened.add(1);
        Ok(stream)
    }

    /// The connection used last that still lives.
    fn take_idle(&self) -> Option<TcpStream> {
        let mut idle = self.idle();
        while let Some(stream) = idle.pop() {
            if !stream::is_stale(&stream) {
                return Some(stream);
            }
        }
        None
    }

    fn forget_idle(&self) {
        self.idle().clear();
    }

    fn torn_down(&self) -> MutexGuard<'_, CancellationToken> {
        self.torn_down.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    fn give_back(mut self) {
        let mut idle = self.peer.idle();
        if !self.torn_down.is_cancelled()
            && let Some(stream) = self.stream.take()
        {
            idle.push(stream);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(stream) = &self.stream {
            stream::reset_on_drop(stream);
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Connection(error)
    }
}
