//! The side that asks: splits batches, keeps connections, and ends every batch within its deadline.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use futures::FutureExt;
use futures::future::{BoxFuture, try_join_all};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use types::Checksum;

use super::link::Link;
use super::linking::{self, Linking};
use super::request::{Job, request};
use super::stream;
use super::wire::{self, Operation, PAYLOAD_BYTES_MAX};
use super::{SCHEME, Shared, UCX};
use crate::TransferError;
use crate::barrier::Barrier;
use crate::split::{Limits, Part, split};
use crate::stats::Stats;
use crate::transport::{Slice, TransferBatch, TransferStats, check_batch};

/// A request over UCX is cheap beside its bytes, and a large one can be shared by the peer's threads.
const UCX_PART_BYTES: u64 = 8 << 20;

/// Peers by endpoint.
#[derive(Default)]
pub(super) struct Peers {
    by_endpoint: Mutex<HashMap<String, Arc<Peer>>>,
}

/// The connections to one peer.
pub(super) struct Peer {
    pub(super) endpoint: String,
    /// Whether UCX moves payloads.
    pub(super) linking: Linking,
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
    written_bytes: AtomicU64,
    read_bytes: AtomicU64,
    failures: AtomicU64,
}

/// A connection in use. Unless given back it is reset, because a request may be half way through it.
pub(super) struct Connection {
    peer: Arc<Peer>,
    stream: Option<TcpStream>,
    /// It served before, so the peer may have closed it meanwhile.
    reused: bool,
    /// The peer's token when this was taken.
    torn_down: CancellationToken,
    _permit: OwnedSemaphorePermit,
}

/// Begins a batch; see [`crate::Transport::write`] and [`crate::Transport::read_hashed`].
pub(super) fn transfer(
    shared: Arc<Shared>,
    operation: Operation,
    batch: TransferBatch,
    unit_bytes: Option<NonZeroU64>,
    deadline: Instant,
) -> BoxFuture<'static, Result<(TransferStats, Vec<Checksum>), TransferError>> {
    let prepared = prepare(&shared, operation, &batch, unit_bytes);
    // Taken now and not at the first poll: `flush` waits for what was called before it.
    let written_to = prepared.as_ref().ok().filter(|_| operation == Operation::Write);
    let ticket = written_to.map(|job| job.peer.writes.begin());
    async move {
        let _ticket = ticket;
        let _in_flight = shared.stats.batches_in_flight.enter();
        let (peer, result) = match prepared {
            Ok(job) => (
                Some(job.peer.clone()),
                run(&shared, job, &batch.slices, deadline).await,
            ),
            Err(error) => (None, Err(error)),
        };
        count(&shared.stats, peer.as_deref(), operation, &result);
        result
    }
    .boxed()
}

fn count(
    stats: &Stats,
    peer: Option<&Peer>,
    operation: Operation,
    result: &Result<(TransferStats, Vec<Checksum>), TransferError>,
) {
    let done = match result {
        Ok((done, _)) => done,
        Err(error) => {
            stats.batch_failed(error.code());
            if let Some(peer) = peer {
                peer.failures.fetch_add(1, Relaxed);
            }
            return;
        }
    };
    stats.batches.add(1);
    let by_ucx = done.mover == UCX;
    if by_ucx {
        stats.ucx_batches.add(1);
    }
    let (all, ucx, of_peer) = if operation == Operation::Write {
        (
            &stats.written_bytes,
            &stats.ucx_written_bytes,
            peer.map(|peer| &peer.written_bytes),
        )
    } else {
        (
            &stats.read_bytes,
            &stats.ucx_read_bytes,
            peer.map(|peer| &peer.read_bytes),
        )
    };
    all.add(done.bytes);
    if by_ucx {
        ucx.add(done.bytes);
    }
    if let Some(of_peer) = of_peer {
        of_peer.fetch_add(done.bytes, Relaxed);
    }
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
fn prepare(
    shared: &Shared,
    operation: Operation,
    batch: &TransferBatch,
    unit_bytes: Option<NonZeroU64>,
) -> Result<Job, TransferError> {
    let memory = shared.regions.memory(batch.region)?;
    check_batch(batch, memory.len() as u64)?;
    Ok(Job {
        peer: shared.peers.get(shared, &batch.remote.endpoint)?,
        memory,
        operation,
        remote: batch.remote.clone(),
        keep: batch.keep.clone(),
        unit_bytes,
        some_inline: AtomicBool::new(false),
    })
}

async fn run(
    shared: &Arc<Shared>,
    job: Job,
    slices: &[Slice],
    deadline: Instant,
) -> Result<(TransferStats, Vec<Checksum>), TransferError> {
    let begun = Instant::now();
    let job = Arc::new(job);
    let moving = requests(shared, &job, slices);
    let (requests, bytes, checksums) = within(shared, &job.peer, deadline, moving).await?;
    let stats = TransferStats {
        bytes,
        requests,
        elapsed: begun.elapsed(),
        mover: if job.some_inline.load(Relaxed) {
            SCHEME
        } else {
            UCX
        },
    };
    Ok((stats, checksums))
}

/// Ends what is asked of a peer at its deadline, and when the connections to the peer are torn down.
pub(super) async fn within<T>(
    shared: &Shared,
    peer: &Peer,
    deadline: Instant,
    asking: impl Future<Output = Result<T, TransferError>>,
) -> Result<T, TransferError> {
    let endpoint = peer.endpoint.clone();
    let torn_down = peer.torn_down().clone();
    match timeout_at(deadline, torn_down.run_until_cancelled(asking)).await {
        Err(_) => Err(TransferError::Timeout { endpoint }),
        Ok(None) if shared.closed.is_cancelled() => Err(TransferError::Closed),
        Ok(None) => Err(TransferError::ConnectionLost {
            endpoint,
            reason: "torn down".into(),
        }),
        Ok(Some(result)) => result,
    }
}

/// Carries the batch out and says in how many requests, how many bytes it had, and what checksums they have if all were
/// copied here.
async fn requests(
    shared: &Arc<Shared>,
    job: &Arc<Job>,
    slices: &[Slice],
) -> Result<(u64, u64, Vec<Checksum>), TransferError> {
    let link = linking::link(shared, &job.peer, &job.memory).await;
    let link = link.map_err(|error| TransferError::Ucx {
        endpoint: job.peer.endpoint.clone(),
        reason: error.to_string(),
    })?;
    let part_bytes = match &link {
        None => shared.config.part_bytes.get() as u64,
        Some(_) => (shared.config.part_bytes.get() as u64).max(UCX_PART_BYTES),
    };
    let part_bytes = part_bytes.min(PAYLOAD_BYTES_MAX);
    // A unit that two requests share would have no checksum.
    let shared_bytes = job.unit_bytes.map_or(0, |unit| part_bytes % unit);
    let limits = Limits {
        bytes: if shared_bytes < part_bytes {
            part_bytes - shared_bytes
        } else {
            part_bytes
        },
        slices: wire::SLICES_MAX,
    };
    let parts = split(slices, limits);
    let requests = parts.len() as u64;
    let bytes = parts.iter().map(|part| part.bytes).sum();
    let count = shared.config.connections_per_peer.get().min(parts.len());
    let lanes = Arc::new(Lanes {
        shared: shared.clone(),
        job: job.clone(),
        link,
        checksums: parts.iter().map(|_| OnceLock::new()).collect(),
        parts,
        next: AtomicUsize::new(0),
    });
    lanes.run(count).await?;
    let seen = lanes.checksums.iter().filter_map(OnceLock::get);
    let mut checksums: Vec<_> = seen.flatten().copied().collect();
    if job
        .unit_bytes
        .is_none_or(|unit| checksums.len() as u64 * unit.get() != bytes)
    {
        checksums.clear();
    }
    Ok((requests, bytes, checksums))
}

/// The requests of a batch, which some lanes take in order.
struct Lanes {
    shared: Arc<Shared>,
    job: Arc<Job>,
    link: Option<Arc<Link>>,
    parts: Vec<Part>,
    /// Of each part.
    checksums: Vec<OnceLock<Vec<Checksum>>>,
    next: AtomicUsize,
}

impl Lanes {
    /// Carries all of them out, in `count` lanes.
    async fn run(self: &Arc<Self>, count: usize) -> Result<(), TransferError> {
        let works_here = self.link.is_some() || self.job.unit_bytes.is_some();
        if !works_here || self.job.operation == Operation::Write {
            // Joined as a list: `FuturesUnordered` wakes its task, and with it another worker, after every poll in which
            // all of its futures wait.
            return try_join_all((0..count).map(|_| self.lane())).await.map(drop);
        }
        // Mapped memory is copied by whoever reads it, and so are bytes hashed: each lane may have a processor of its own. A
        // batch that is dropped leaves its `Keep` to the tasks until they stop.
        let task = |_| {
            let lanes = self.clone();
            async move { lanes.lane().await }
        };
        let mut others: JoinSet<_> = (1..count).map(task).collect();
        let mut result = self.lane().await;
        loop {
            if result.is_err() {
                others.abort_all();
            }
            match others.join_next().await {
                None => return result,
                Some(joined) => result = result.and(joined.unwrap_or(Err(TransferError::Closed))),
            }
        }
    }

    async fn lane(&self) -> Result<(), TransferError> {
        loop {
            let index = self.next.fetch_add(1, Relaxed);
            let Some((part, checksums)) = self.parts.get(index).zip(self.checksums.get(index)) else {
                return Ok(());
            };
            let done = request(&self.shared, &self.job, self.link.as_ref(), part).await?;
            let _only_time = checksums.set(done);
        }
    }
}

impl Peers {
    pub(super) fn get(&self, shared: &Shared, endpoint: &str) -> Result<Arc<Peer>, TransferError> {
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
            written_bytes: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            linking: Linking::default(),
        });
        peers.insert(endpoint.to_owned(), peer.clone());
        Ok(peer)
    }

    pub(super) fn tear_down(&self, shared: &Shared, endpoint: &str) {
        if let Some(peer) = self.map().get(endpoint) {
            let renewed = shared.closed.child_token();
            std::mem::replace(&mut *peer.torn_down(), renewed).cancel();
            peer.forget_idle();
            peer.linking.reset();
        }
    }

    pub(super) fn clear(&self) {
        self.map().clear();
    }

    /// How each peer is reached.
    pub(super) fn links(&self, shared: &Shared) -> Vec<crate::Link> {
        let peers: Vec<_> = self.map().values().cloned().collect();
        let mut links: Vec<_> = peers.iter().map(|peer| peer.describe(shared)).collect();
        links.sort_by(|a, b| a.endpoint.cmp(&b.endpoint));
        links
    }

    fn map(&self) -> MutexGuard<'_, HashMap<String, Arc<Peer>>> {
        self.by_endpoint.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peer {
    fn describe(&self, shared: &Shared) -> crate::Link {
        let (link, obstacle) = match &shared.ucx {
            Ok(_) => self.linking.describe(),
            Err(reason) => (None, reason.clone()),
        };
        let in_use = shared.config.connections_per_peer.get() - self.permits.available_permits();
        crate::Link {
            endpoint: self.endpoint.clone(),
            mover: if link.is_some() { UCX } else { SCHEME }.to_owned(),
            lanes: link.map(|link| link.lanes.clone()).unwrap_or_default(),
            obstacle,
            connections: (in_use + self.idle().len()) as u64,
            written_bytes: self.written_bytes.load(Relaxed),
            read_bytes: self.read_bytes.load(Relaxed),
            failures: self.failures.load(Relaxed),
        }
    }

    /// Counts bytes that were moved.
    pub(super) fn count(&self, written_bytes: u64, read_bytes: u64) {
        self.written_bytes.fetch_add(written_bytes, Relaxed);
        self.read_bytes.fetch_add(read_bytes, Relaxed);
    }

    /// Numbers requests, so that answers can be told apart.
    pub(super) fn next_request(&self) -> u64 {
        self.requests.fetch_add(1, Relaxed)
    }

    /// An idle connection, or a new one; waits while all that may be are in use.
    pub(super) async fn connection(self: &Arc<Self>, shared: &Shared) -> Result<Connection, TransferError> {
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

    pub(super) async fn connect(&self, shared: &Shared) -> Result<TcpStream, TransferError> {
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

    pub(super) fn forget_idle(&self) {
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
    /// Whether it served before, so that the peer may have closed it meanwhile.
    pub(super) fn is_reused(&self) -> bool {
        self.reused
    }

    pub(super) fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    pub(super) fn stream(&self) -> Result<&TcpStream, TransferError> {
        self.stream.as_ref().ok_or(TransferError::Closed)
    }

    /// For the next request. Only after the answer's last byte.
    pub(super) fn give_back(mut self) {
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
