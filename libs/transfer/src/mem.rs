//! A network inside one process, with faults drawn from a seed, for tests and simulations.
//!
//! Invariant: on a current-thread Tokio runtime with paused time, the same seed and the same calls give the same
//! [`Event`] log. All that is drawn for a transfer depends only on the seed and the transfer's number.
//!
//! The fence, the checks and the errors are those of the real transports. What differs is that bytes travel
//! in chunks, each after a delay, and that the network can be told to misbehave: [`Faults`] per transfer, and
//! [`MemNetwork::partition`] and [`MemNetwork::kill`] by hand.

mod calls;
mod plan;
mod transfer;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use types::{Epoch, ErrorCode, Memory};

use self::transfer::Transfer;
use crate::barrier::Barrier;
use crate::calls::{Answered, Call, Calls};
use crate::region::{Direction, Keys, RegionTable};
use crate::stats::Stats;
use crate::transport::{RegionId, RemoteRegion, TransferBatch, TransferStats, Transport};
use crate::{StatsSnapshot, TransferError};

/// The scheme of the endpoints.
const SCHEME: &str = "mem";
/// Older events are forgotten.
const EVENTS_MAX: usize = 1 << 18;

/// How the network treats transfers. The default is a perfect network without delay.
#[derive(Debug, Clone, PartialEq)]
pub struct Faults {
    /// How long each chunk, and each acknowledgement, takes.
    pub delay: Range<Duration>,
    /// Bytes that arrive in one piece.
    pub chunk_bytes: NonZeroUsize,
    /// Whether the chunks of a transfer arrive in any order.
    pub reorder: bool,
    /// How probable it is that the connection breaks in the middle of a transfer, or before its acknowledgement.
    pub break_probability: f64,
    /// How probable it is that what a failed write had not delivered arrives later all the same.
    pub straggle_probability: f64,
    /// How much later.
    pub straggle_delay: Range<Duration>,
    /// How probable it is that one bit of a chunk is another one when it arrives.
    pub flip_probability: f64,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO..Duration::ZERO,
            chunk_bytes: NonZeroUsize::new(4096).expect("not zero"),
            reorder: false,
            break_probability: 0.0,
            straggle_probability: 0.0,
            straggle_delay: Duration::ZERO..Duration::ZERO,
            flip_probability: 0.0,
        }
    }
}

/// Something that happened, and when, since the network was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Time since the network was made.
    pub at: Duration,
    /// What happened.
    pub what: What,
}

/// The kinds of [`Event`]. Transfers are numbered from 1 as they begin.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // The variants' documentation says what their fields are.
pub enum What {
    /// A transfer of `bytes` began, between the caller `from` and its peer `to`.
    Begun {
        transfer: u64,
        from: String,
        to: String,
        bytes: u64,
    },
    /// `len` bytes at `remote_offset` of the peer's memory were moved.
    Moved {
        transfer: u64,
        remote_offset: u64,
        len: u64,
    },
    /// This bit of the chunk that was just moved to `remote_offset`, or from there, changed on its way.
    Flipped {
        transfer: u64,
        remote_offset: u64,
        bit: u64,
    },
    /// The connection broke while `chunks` had not arrived.
    Broken { transfer: u64, chunks: usize },
    /// A chunk of a transfer that had failed arrived, and was written (`landed`) or met a closed grant.
    Straggled {
        transfer: u64,
        remote_offset: u64,
        len: u64,
        landed: bool,
    },
    /// The transfer's caller got its result: nothing, or the code of the error.
    Ended { transfer: u64, error: Option<ErrorCode> },
    /// `endpoint` revoked the grant with this key.
    Revoked { endpoint: String, key: u64 },
    /// Nothing passes between the endpoints `a` and `b` from now on.
    Partitioned { a: String, b: String },
    /// The partition is over.
    Healed { a: String, b: String },
    /// The transport at `endpoint` is gone.
    Killed { endpoint: String },
}

/// The network: makes transports, and misbehaves on demand. Cheap to clone.
#[derive(Clone)]
pub struct MemNetwork {
    shared: Arc<Network>,
}

struct Network {
    seed: u64,
    faults: Faults,
    begun: Instant,
    inner: Mutex<Inner>,
    healed: Notify,
}

#[derive(Default)]
struct Inner {
    /// Incarnations that live, by endpoint.
    nodes: HashMap<String, Arc<Node>>,
    partitions: BTreeSet<(String, String)>,
    events: VecDeque<Event>,
    transfers: u64,
}

/// One incarnation of a transport.
struct Node {
    endpoint: String,
    epoch: Epoch,
    regions: RegionTable,
    /// Bounded by the endpoints that the test names.
    links: Mutex<HashMap<String, Link>>,
    stats: Stats,
    calls: OnceLock<Weak<dyn Calls>>,
    killed: CancellationToken,
}

/// What a transport keeps of one peer.
#[derive(Clone)]
struct Link {
    writes: Arc<Barrier>,
    torn_down: CancellationToken,
}

/// A transport of a [`MemNetwork`].
#[derive(Clone)]
pub struct MemTransport {
    network: Arc<Network>,
    node: Arc<Node>,
}

impl MemNetwork {
    /// An empty network. The seed decides all that is drawn.
    pub fn new(seed: u64, faults: Faults) -> Self {
        Self {
            shared: Arc::new(Network {
                seed,
                faults,
                begun: Instant::now(),
                inner: Mutex::default(),
                healed: Notify::new(),
            }),
        }
    }

    /// Starts a transport at `mem://name`. One that was there is killed, as by a restart of its process.
    pub fn join(&self, name: &str, epoch: Epoch) -> Arc<MemTransport> {
        let endpoint = format!("{SCHEME}://{name}");
        self.kill(&endpoint);
        let node = Arc::new(Node {
            endpoint: endpoint.clone(),
            epoch,
            regions: RegionTable::new(Keys::Counted),
            links: Mutex::default(),
            stats: Stats::default(),
            calls: OnceLock::new(),
            killed: CancellationToken::new(),
        });
        self.shared.inner().nodes.insert(endpoint, node.clone());
        let network = self.shared.clone();
        Arc::new(MemTransport { network, node })
    }

    /// Ends the transport at `endpoint`, as by the death of its process: its grants are closed, its transfers end
    /// with [`TransferError::Closed`], and those of its peers with [`TransferError::ConnectionLost`].
    pub fn kill(&self, endpoint: &str) {
        let node = self.shared.inner().nodes.remove(endpoint);
        if let Some(node) = node {
            node.regions.close();
            node.killed.cancel();
            self.shared.log(What::Killed {
                endpoint: endpoint.to_owned(),
            });
        }
    }

    /// Lets nothing pass between two endpoints, so that what is under way waits for its deadline.
    pub fn partition(&self, a: &str, b: &str) {
        let (a, b) = (a.to_owned(), b.to_owned());
        self.shared.inner().partitions.insert(pair(&a, &b));
        self.shared.log(What::Partitioned { a, b });
    }

    /// Ends a partition; what waited goes on.
    pub fn heal(&self, a: &str, b: &str) {
        let (a, b) = (a.to_owned(), b.to_owned());
        self.shared.inner().partitions.remove(&pair(&a, &b));
        self.shared.healed.notify_waiters();
        self.shared.log(What::Healed { a, b });
    }

    /// What happened so far; of very long runs, the last 2¹⁸ events.
    pub fn events(&self) -> Vec<Event> {
        self.shared.inner().events.iter().cloned().collect()
    }
}

impl Network {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self, what: What) {
        let at = self.begun.elapsed();
        let mut inner = self.inner();
        if inner.events.len() == EVENTS_MAX {
            inner.events.pop_front();
        }
        inner.events.push_back(Event { at, what });
    }

    /// Returns when no partition is between the endpoints.
    async fn passage(&self, a: &str, b: &str) {
        let pair = pair(a, b);
        loop {
            let healed = self.healed.notified();
            if !self.inner().partitions.contains(&pair) {
                return;
            }
            healed.await;
        }
    }
}

impl Node {
    fn link(&self, endpoint: &str) -> Link {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let link = links.entry(endpoint.to_owned()).or_insert_with(|| Link {
            writes: Arc::default(),
            torn_down: CancellationToken::new(),
        });
        link.clone()
    }
}

impl MemTransport {
    fn remote(&self, key: u64) -> RemoteRegion {
        RemoteRegion {
            endpoint: self.node.endpoint.clone(),
            epoch: self.node.epoch,
            key,
        }
    }

    /// Begins a batch, in either direction.
    fn transfer(
        &self,
        direction: Direction,
        batch: TransferBatch,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>> {
        let node = self.node.clone();
        let begun = Transfer::begin(&self.network, &node, direction, batch);
        let begun = begun.map(|transfer| {
            let link = node.link(transfer.remote_endpoint());
            // Taken now and not at the first poll: `flush` waits for what was called before it.
            let ticket = (direction == Direction::Write).then(|| link.writes.begin());
            (transfer, link, ticket)
        });
        async move {
            let _in_flight = node.stats.batches_in_flight.enter();
            let result = match begun {
                Ok((transfer, link, ticket)) => transfer.run(&link, ticket, deadline).await,
                Err(error) => Err(error),
            };
            match (&result, direction) {
                (Ok(done), Direction::Write) => node.stats.written_bytes.add(done.bytes),
                (Ok(done), Direction::Read) => node.stats.read_bytes.add(done.bytes),
                (Err(error), _) => node.stats.batch_failed(error.code()),
            }
            if result.is_ok() {
                node.stats.batches.add(1);
            }
            result
        }
        .boxed()
    }
}

impl Transport for MemTransport {
    fn name(&self) -> &'static str {
        SCHEME
    }

    fn endpoint(&self) -> String {
        self.node.endpoint.clone()
    }

    fn epoch(&self) -> Epoch {
        self.node.epoch
    }

    fn register(&self, memory: Arc<dyn Memory>) -> Result<RegionId, TransferError> {
        self.node.regions.register(memory)
    }

    fn unregister(&self, region: RegionId) -> BoxFuture<'static, ()> {
        self.node.regions.unregister(region).1
    }

    fn expose_read(&self, region: RegionId) -> Result<RemoteRegion, TransferError> {
        let key = self.node.regions.expose_read(region)?;
        Ok(self.remote(key))
    }

    fn grant_write(&self, region: RegionId, ranges: Vec<Range<u64>>) -> Result<RemoteRegion, TransferError> {
        let key = self.node.regions.grant_write(region, ranges, false)?;
        Ok(self.remote(key))
    }

    fn revoke(&self, grant: &RemoteRegion) -> BoxFuture<'static, ()> {
        if grant.epoch == self.node.epoch && grant.endpoint == self.node.endpoint {
            let settled = self.node.regions.revoke(grant.key);
            self.network.log(What::Revoked {
                endpoint: grant.endpoint.clone(),
                key: grant.key,
            });
            return settled.map(drop).boxed();
        }
        std::future::ready(()).boxed()
    }

    fn write(
        &self,
        batch: TransferBatch,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>> {
        self.transfer(Direction::Write, batch, deadline)
    }

    fn read(
        &self,
        batch: TransferBatch,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>> {
        self.transfer(Direction::Read, batch, deadline)
    }

    fn flush(
        &self,
        remote_endpoint: &str,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<(), TransferError>> {
        let writes = self.node.link(remote_endpoint).writes;
        let mark = writes.mark();
        let endpoint = remote_endpoint.to_owned();
        async move {
            timeout_at(deadline, writes.passed(mark))
                .await
                .map_err(|_| TransferError::Timeout { endpoint })
        }
        .boxed()
    }

    fn call(&self, call: Call, deadline: Instant) -> BoxFuture<'static, Result<Answered, TransferError>> {
        let (transport, endpoint) = (self.clone(), call.endpoint.clone());
        async move {
            let link = transport.node.link(&endpoint);
            let killed = transport.node.killed.clone();
            let asking = link.torn_down.run_until_cancelled(transport.ask(call));
            match timeout_at(deadline, killed.run_until_cancelled(asking)).await {
                Err(_) => Err(TransferError::Timeout { endpoint }),
                Ok(None) => Err(TransferError::Closed),
                Ok(Some(None)) => Err(TransferError::ConnectionLost {
                    endpoint,
                    reason: "torn down".into(),
                }),
                Ok(Some(Some(result))) => result,
            }
        }
        .boxed()
    }

    fn serve_calls(&self, calls: Weak<dyn Calls>) {
        let _first = self.node.calls.set(calls);
    }

    fn tear_down(&self, remote_endpoint: &str) {
        let mut links = self.node.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = links.get_mut(remote_endpoint) {
            std::mem::take(&mut link.torn_down).cancel();
        }
    }

    fn stats(&self) -> StatsSnapshot {
        self.node.stats.snapshot()
    }
}

fn pair(a: &str, b: &str) -> (String, String) {
    (a.min(b).to_owned(), a.max(b).to_owned())
}

#[cfg(test)]
mod tests;
