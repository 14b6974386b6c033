//! The built-in transport: requests over pooled TCP connections, payload straight between sockets and
//! registered memory.
//!
//! A connection carries one request at a time, so a request that stalls holds up nothing else, and cutting its
//! connection ends it; concurrency comes from a few connections per peer. Batches beyond
//! [`Config::part_bytes`] are split, so that several connections share them.
//!
//! The fence does not depend on the peer: the server receives into granted memory by system calls that do not
//! wait, each inside the grant's gate. When a grant is revoked in the middle of a payload, the rest is read into a
//! scratch buffer, and the request is refused.
//!
//! # Wire format, version 1
//!
//! All integers are little-endian. The client sends a request, the server answers it, then the next one may
//! follow on the same connection.
//!
//! Request head, 48 bytes:
//!
//! | offset | type | field |
//! |---|---|---|
//! | 0 | 4 bytes | magic `PGXF` |
//! | 4 | u8 | version, 1 |
//! | 5 | u8 | operation: 1 write, 2 read, 3 introduce, 4 fetch, 5 admit, 6 call |
//! | 6 | u16 | 0 |
//! | 8 | u64 | request id, chosen by the client |
//! | 16 | u64 | epoch of the server that the grant is of |
//! | 24 | u64 | key of the grant |
//! | 32 | u64 | payload bytes, 1 to 2²⁶; of a call 0 to 2²⁶; of an introduction 0 |
//! | 40 | u32 | slices, 1 to 4096; of an introduction or a call 0 |
//! | 44 | u32 | bytes of the message, 0 for a write or a read, at most 2¹⁶ |
//!
//! Then the slice table, per slice: offset in the server's memory (u64), length (u64, not 0). The lengths add up
//! to the payload bytes. Then the message, of `messages.rs`. Then, for a write, the payload: the slices' bytes in the order
//! of the table; for a call, what comes with it in line.
//!
//! Answer head, 32 bytes:
//!
//! | offset | type | field |
//! |---|---|---|
//! | 0 | 4 bytes | magic `PGXF` |
//! | 4 | u8 | version, 1 |
//! | 5 | u8 | status: 0 done, 1 unknown key, 2 direction denied, 3 stale epoch, 4 out of range, 5 no such link, 6 not moved by UCX, 7 no calls answered here |
//! | 6 | u16 | 0 |
//! | 8 | u64 | request id |
//! | 16 | u64 | bytes that follow: the payload of a read, or the message of an introduction, an admission or a call and what comes with it in line |
//! | 24 | u64 | status 3: the server's epoch; status 4: position of the first slice outside; a call that is done: bytes of its message; otherwise 0 |
//!
//! A refused write is answered after its payload was received. Anything that is not this protocol, and any
//! request that takes longer than the server's bound, closes the connection without an answer.
//!
//! There is neither encryption nor authentication beyond the keys, which cannot be guessed but travel in
//! clear: the port belongs on a network that only the cluster's nodes reach.
//!
//! Elsewhere: grants and the fence (`region.rs`), the system calls (`cursor.rs`), splitting (`split.rs`).

mod call;
mod called;
mod client;
mod link;
mod linking;
mod messages;
mod request;
mod served;
mod server;
mod stream;
mod wire;

pub(crate) use call::check as check_runs;

use std::net::SocketAddr;
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::Range;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, TryFutureExt};
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use types::{Checksum, Epoch, Memory};

use crate::calls::{Answered, Call, Calls};
use crate::memory::{self, HugePages, Placement};
use crate::region::{Keys, RegionTable};
use crate::stats::Stats;
use crate::transport::{Link, Mover, RegionId, RemoteRegion, TransferBatch, TransferStats, Transport};
use crate::ucx::{Choice, Ucx};
use crate::{HostMemory, StatsSnapshot, TransferError, ucx};

/// The scheme of the endpoints, and the name of what moves payload inline.
const SCHEME: &str = "tcp";
/// The name of what moves it otherwise.
const UCX: &str = "ucx";

/// Bounds of a [`TcpTransport`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The host that peers connect to. `None`: the address that is listened on, which then must not be `0.0.0.0`
    /// unless all peers are on this machine.
    pub advertise_host: Option<String>,
    /// Connections to one peer, and so requests in flight to it. Further requests wait, in order.
    pub connections_per_peer: NonZeroUsize,
    /// Peers that connections are kept for; peers without a transfer in progress give way to new ones.
    pub peers_max: NonZeroUsize,
    /// Connections from peers. Further ones are closed at once.
    pub served_connections_max: NonZeroUsize,
    /// Largest payload of one request over TCP; at most 64 MiB. Requests whose payload UCX moves may be larger.
    pub part_bytes: NonZeroUsize,
    /// How long the set-up of a connection may take.
    pub connect_timeout: Duration,
    /// How long the server waits for a request to come in and be answered, from its first byte on.
    pub request_timeout: Duration,
    /// How long the server keeps a connection without requests.
    pub idle_timeout: Duration,
    /// On which pages memory for blocks lies.
    pub huge_pages: HugePages,
    /// Whether UCX moves payloads.
    pub ucx: ucx::Config,
}

impl Default for Config {
    fn default() -> Self {
        const fn count(value: usize) -> NonZeroUsize {
            NonZeroUsize::new(value).expect("not zero")
        }
        Self {
            advertise_host: None,
            // Enough to hide a round trip behind the other transfers, and few enough for a cluster of
            // hundreds of nodes.
            connections_per_peer: count(4),
            peers_max: count(4096),
            // Four from each of 256 peers; each holds a buffer of 64 KiB.
            served_connections_max: count(1024),
            // Large against the cost of a request, and small enough that what is between the two sockets stays in the
            // processor's caches where both ends are on one machine. Four of them fill 100 Gbit/s over 150 µs.
            part_bytes: count(512 << 10),
            // One lost SYN is sent again after a second.
            connect_timeout: Duration::from_secs(3),
            // 8 MiB in 10 s is slower than any network worth a transfer.
            request_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            // Fewer misses of the address cache while blocks are hashed and moved, and no risk.
            huge_pages: HugePages::Auto,
            ucx: ucx::Config::default(),
        }
    }
}

/// The TCP transport of a node: client and server. Dropping it, like [`TcpTransport::close`], revokes all grants.
pub struct TcpTransport {
    shared: Arc<Shared>,
}

/// What client and server tasks share.
struct Shared {
    config: Config,
    endpoint: String,
    epoch: Epoch,
    regions: RegionTable,
    peers: client::Peers,
    stats: Stats,
    /// The library, or why it is not used.
    ucx: Result<Arc<Ucx>, String>,
    /// Links over which peers have UCX move bytes here.
    served_links: served::Links,
    /// Who answers calls.
    calls: OnceLock<Weak<dyn Calls>>,
    /// Cancelled when the transport closes.
    closed: CancellationToken,
    /// The server's tasks.
    tasks: TaskTracker,
}

impl TcpTransport {
    /// Listens on `address`, where port 0 takes any free one, and serves peers from now on, by tasks of the
    /// current Tokio runtime.
    pub async fn bind(address: SocketAddr, epoch: Epoch, config: Config) -> Result<Arc<Self>, TransferError> {
        let fail = |error: std::io::Error| TransferError::Bind {
            address: address.to_string(),
            reason: error.to_string(),
        };
        let ucx = open_ucx(&config.ucx)?;
        let listener = TcpListener::bind(address).await.map_err(fail)?;
        let bound = listener.local_addr().map_err(fail)?;
        let endpoint = match &config.advertise_host {
            Some(host) => format!("{SCHEME}://{host}:{}", bound.port()),
            None => format!("{SCHEME}://{bound}"),
        };
        let shared = Arc::new(Shared {
            config,
            endpoint,
            epoch,
            regions: RegionTable::new(Keys::Secret(std::hash::RandomState::new())),
            peers: client::Peers::default(),
            stats: Stats::default(),
            ucx,
            served_links: served::Links::default(),
            calls: OnceLock::new(),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        shared.tasks.spawn(server::accept(shared.clone(), listener));
        Ok(Arc::new(Self { shared }))
    }

    /// Stops: revokes all grants, closes all connections, ends transfers in progress with
    /// [`TransferError::Closed`], and waits for the server's tasks.
    pub async fn close(&self) {
        self.shared.shut();
        self.shared.tasks.wait().await;
    }

    /// Memory that peers on this host can map where UCX is used, or else this process's own.
    fn allocate_on(&self, bytes: usize, huge_pages: HugePages) -> Result<Arc<dyn Memory>, TransferError> {
        if let Ok(ucx) = &self.shared.ucx {
            match ucx.allocate(bytes) {
                Ok(memory) => return Ok(memory),
                Err(error) => {
                    tracing::warn!(%error, bytes, "ucx has no memory of this size, so peers on this host cannot map it");
                }
            }
        }
        Ok(HostMemory::allocate_on(bytes, huge_pages)?)
    }
}

impl Drop for TcpTransport {
    fn drop(&mut self) {
        self.shared.shut();
    }
}

impl Shared {
    fn shut(&self) {
        self.regions.close();
        self.closed.cancel();
        self.peers.clear();
        self.served_links.clear();
        if let Ok(ucx) = &self.ucx {
            ucx.stop();
        }
        self.tasks.close();
    }

    fn remote(&self, key: u64) -> RemoteRegion {
        RemoteRegion {
            endpoint: self.endpoint.clone(),
            epoch: self.epoch,
            key,
        }
    }
}

/// Opens the library where it may be used.
fn open_ucx(config: &ucx::Config) -> Result<Result<Arc<Ucx>, String>, TransferError> {
    if config.choice == Choice::Tcp {
        return Ok(Err("transfers are set to use TCP only".to_owned()));
    }
    match Ucx::open(config) {
        Ok(ucx) => {
            tracing::info!(version = ucx.version(), "ucx can move bytes");
            Ok(Ok(Arc::new(ucx)))
        }
        Err(error) if config.choice == Choice::Ucx => Err(TransferError::NoUcx {
            reason: error.to_string(),
        }),
        Err(error) => {
            tracing::info!(reason = %error, "ucx is not used, tcp moves all bytes");
            Ok(Err(error.to_string()))
        }
    }
}

impl Transport for TcpTransport {
    fn name(&self) -> &'static str {
        SCHEME
    }

    fn endpoint(&self) -> String {
        self.shared.endpoint.clone()
    }

    fn epoch(&self) -> Epoch {
        self.shared.epoch
    }

    fn register(&self, memory: Arc<dyn Memory>) -> Result<RegionId, TransferError> {
        if let Ok(ucx) = &self.shared.ucx {
            // What UCX cannot reach goes over TCP, so this is no error unless nothing else may.
            match ucx.expose(&memory) {
                Ok(_) => {}
                Err(error) if self.shared.config.ucx.choice == Choice::Ucx => {
                    return Err(TransferError::NoUcx {
                        reason: error.to_string(),
                    });
                }
                Err(error) => tracing::warn!(%error, bytes = memory.len(), "memory is out of reach of ucx"),
            }
        }
        self.shared.regions.register(memory)
    }

    fn unregister(&self, region: RegionId) -> BoxFuture<'static, ()> {
        let (memory, settled) = self.shared.regions.unregister(region);
        let shared = self.shared.clone();
        async move {
            settled.await;
            if let (Ok(ucx), Some(memory)) = (&shared.ucx, memory) {
                ucx.conceal(&memory);
            }
        }
        .boxed()
    }

    fn expose_read(&self, region: RegionId) -> Result<RemoteRegion, TransferError> {
        let key = self.shared.regions.expose_read(region)?;
        Ok(self.shared.remote(key))
    }

    fn grant_write(&self, region: RegionId, ranges: Vec<Range<u64>>) -> Result<RemoteRegion, TransferError> {
        let key = self.shared.regions.grant_write(region, ranges, false)?;
        Ok(self.shared.remote(key))
    }

    fn grant_write_hashed(
        &self,
        region: RegionId,
        ranges: Vec<Range<u64>>,
    ) -> Result<RemoteRegion, TransferError> {
        let key = self.shared.regions.grant_write(region, ranges, true)?;
        Ok(self.shared.remote(key))
    }

    fn revoke(&self, grant: &RemoteRegion) -> BoxFuture<'static, ()> {
        self.revoke_hashed(grant).map(drop).boxed()
    }

    fn revoke_hashed(&self, grant: &RemoteRegion) -> BoxFuture<'static, Vec<Option<Checksum>>> {
        if grant.epoch == self.shared.epoch && grant.endpoint == self.shared.endpoint {
            return self.shared.regions.revoke(grant.key);
        }
        std::future::ready(Vec::new()).boxed()
    }

    fn write(
        &self,
        batch: TransferBatch,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>> {
        let written = client::transfer(self.shared.clone(), wire::Operation::Write, batch, None, deadline);
        written.map_ok(|(stats, _)| stats).boxed()
    }

    fn read(
        &self,
        batch: TransferBatch,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>> {
        let read = client::transfer(self.shared.clone(), wire::Operation::Read, batch, None, deadline);
        read.map_ok(|(stats, _)| stats).boxed()
    }

    fn read_hashed(
        &self,
        batch: TransferBatch,
        unit_bytes: NonZeroU64,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<(TransferStats, Vec<Checksum>), TransferError>> {
        let unit_bytes = Some(unit_bytes);
        client::transfer(
            self.shared.clone(),
            wire::Operation::Read,
            batch,
            unit_bytes,
            deadline,
        )
    }

    fn flush(
        &self,
        remote_endpoint: &str,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<(), TransferError>> {
        client::flush(&self.shared, remote_endpoint, deadline)
    }

    fn call(&self, call: Call, deadline: Instant) -> BoxFuture<'static, Result<Answered, TransferError>> {
        call::call(self.shared.clone(), call, deadline)
    }

    fn serve_calls(&self, calls: Weak<dyn Calls>) {
        let _first = self.shared.calls.set(calls);
    }

    fn tear_down(&self, remote_endpoint: &str) {
        self.shared.peers.tear_down(&self.shared, remote_endpoint);
    }

    fn stats(&self) -> StatsSnapshot {
        self.shared.stats.snapshot()
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Memory>, TransferError> {
        let huge_pages = self.shared.config.huge_pages;
        let memory = self.allocate_on(bytes, huge_pages)?;
        let Placement { is_huge, numa_nodes } = memory::place(memory.as_ref(), huge_pages);
        tracing::info!(bytes, is_huge, numa_nodes, "memory for blocks allocated");
        Ok(memory)
    }

    fn links(&self) -> Vec<Link> {
        self.shared.peers.links(&self.shared)
    }

    fn movers(&self) -> Vec<Mover> {
        let tcp = Mover {
            name: SCHEME.to_owned(),
            usable: true,
            detail: "built in".to_owned(),
        };
        if self.shared.config.ucx.choice == Choice::Tcp {
            // UCX was not looked for.
            return vec![tcp];
        }
        let (usable, detail) = match &self.shared.ucx {
            Ok(ucx) => (true, ucx.version().to_owned()),
            Err(reason) => (false, reason.clone()),
        };
        let ucx = Mover {
            name: UCX.to_owned(),
            usable,
            detail,
        };
        vec![ucx, tcp]
    }
}

#[cfg(test)]
mod tests;
