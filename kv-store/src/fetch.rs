//! Fetching the cached prefix of a prompt: from this node's own disk, from peers, and from the bucket that all share.
//!
//! Invariant: what comes back is pinned, verified and continues the prefix that the caller holds. Everything that
//! can go wrong (a peer that dropped the blocks, lies, stalls or dies, a full pool) only makes it shorter:
//! the rest is computed instead. It ends within its deadline.
//!
//! Requests of one node that want the same blocks at the same time fetch them once.
//!
//! Elsewhere: which peers to ask (`router`), the other side (`service.rs`), the disk and the bucket (`tiers.rs`).

use std::sync::Arc;
use std::time::Duration;

use node::{Channel, Channels};
use proto::v1::kv_store_client::KvStoreClient;
use proto::{convert, status, v1};
use tokio::time::{Instant, timeout, timeout_at};
use transfer::{Keep, RemoteRegion, Slice, TransferBatch, TransferError};
use types::{BlockHash, Checksum, Epoch, Error};

use crate::store::{BlockPin, Corrupt, OwnedBlock, Store};
use crate::table::Purpose;
use crate::tiers::{self, objects::Wanted};

mod flights;

use flights::Claim;
pub(crate) use flights::Flights;

/// How often a fetch looks again after others' fetches ended. Each time there is either progress, or somebody
/// else failed; more than this is a cluster in trouble, where computing is the better way.
const ROUNDS_MAX: usize = 8;

/// Ending a lease is a courtesy: it also ends by itself.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// How much longer than the fetch its lease lives, for clocks that do not run alike.
const LEASE_MARGIN: Duration = Duration::from_secs(1);

/// A peer that is said to hold leading blocks of the prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Its name, for those who are told where a prefix came from.
    pub node_id: String,
    /// `host:port` of its gRPC services.
    pub grpc_endpoint: String,
    /// Leading full blocks of the prompt that it held when last heard of.
    pub blocks: usize,
}

impl From<&v1::PrefixSource> for Source {
    fn from(wire: &v1::PrefixSource) -> Self {
        Self {
            node_id: wire.node_id.clone(),
            grpc_endpoint: wire.grpc_endpoint.clone(),
            blocks: usize::try_from(wire.blocks).unwrap_or(usize::MAX),
        }
    }
}

/// What to fetch.
#[derive(Debug, Clone, Copy)]
pub struct Fetch<'a> {
    /// Root of the space: the parent of the chain's first block.
    pub root: BlockHash,
    /// Hashes of the prompt's full blocks.
    pub chain: &'a [BlockHash],
    /// Leading blocks that the caller has pinned. Fetching starts after them.
    pub from: usize,
    /// Peers to ask, best first.
    pub sources: &'a [Source],
    /// Whether a request needs the blocks, or the peers give them away.
    pub purpose: Purpose,
    /// When to stop, whatever has come.
    pub deadline: Instant,
}

impl Fetch<'_> {
    /// Whether the bucket comes into question: only a request's chain is known to begin at a root, as segments do.
    fn asks_bucket(&self) -> bool {
        self.purpose == Purpose::Request
    }
}

/// What a fetch brought.
#[derive(Debug, Default)]
pub struct FetchOutcome {
    /// The blocks of the chain from [`Fetch::from`] on, as many as could be had.
    pub blocks: Vec<BlockPin>,
    /// Those of them that came from this node's own disk.
    pub promoted: usize,
    /// Those of them that came from the bucket.
    pub from_objects: usize,
    /// Bytes that peers moved for this fetch and that were found good.
    pub bytes: u64,
    /// What moved them, such as `tcp`; `none` if nothing moved.
    pub transport: &'static str,
    /// Peers that gave blocks, in the order in which they did, and how many.
    pub peers: Vec<(String, usize)>,
}

impl FetchOutcome {
    /// Where the blocks came from, for people: `12 blocks of decode-1, 3 of the own disk`.
    pub fn origin(&self) -> String {
        let peers = self.peers.iter().map(|(peer, blocks)| (peer.as_str(), *blocks));
        let tiers = [("the own disk", self.promoted), ("the bucket", self.from_objects)];
        let given = peers.chain(tiers).filter(|(_, blocks)| *blocks > 0);
        let mut text = String::new();
        for (from, blocks) in given {
            text += &match text.is_empty() {
                true => format!("{blocks} blocks of {from}"),
                false => format!(", {blocks} of {from}"),
            };
        }
        text
    }
}

#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("{0}")]
    Peer(Error),
    #[error("{0}")]
    Transfer(#[from] TransferError),
    #[error("{0}")]
    Corrupt(#[from] Corrupt),
    #[error("peer answered {0}")]
    Answer(&'static str),
    #[error("the transport still holds the memory after the transfer ended")]
    StillMoving,
    #[error("no memory is left for fetched blocks")]
    OutOfBlocks,
}

/// Fetches as much of the chain as the sources give. Dropping the future stops it; what is complete by then
/// stays cached.
pub async fn fetch_prefix(store: &Store, channels: &Channels, fetch: Fetch<'_>) -> FetchOutcome {
    let mut outcome = FetchOutcome {
        transport: "none",
        ..FetchOutcome::default()
    };
    for _ in 0..ROUNDS_MAX {
        let rest = fetch
            .chain
            .get(fetch.from + outcome.blocks.len()..)
            .unwrap_or_default();
        outcome.blocks.extend(store.pin_held(rest));
        let next = fetch.from + outcome.blocks.len();
        let rest = fetch.chain.get(next..).unwrap_or_default();
        let Some(first) = rest.first() else {
            break;
        };
        let has_source = !fetch.sources.is_empty()
            || tiers::is_promotable(store, first)
            || (fetch.asks_bucket() && tiers::objects::may_hold(store, fetch.chain, next));
        if !has_source || fetch.deadline <= Instant::now() {
            break;
        }
        match store.inner().flights.claim(rest) {
            Claim::Follow(flight) => {
                if timeout_at(fetch.deadline, flight.ended()).await.is_err() {
                    break;
                }
            }
            Claim::Lead(flight) => {
                let end = next + flight.len();
                lead(store, channels, fetch, end, &mut outcome).await;
                if fetch.from + outcome.blocks.len() < end {
                    break;
                }
            }
        }
    }
    outcome
}

/// Brings what this node's own disk has of the chain into memory, without asking any peer. The blocks come back pinned: those that
/// were in memory, and those that came in time.
pub async fn promote_prefix(store: &Store, chain: &[BlockHash], deadline: Instant) -> Vec<BlockPin> {
    let fetch = Fetch {
        // No peer is asked, and the chain may begin anywhere.
        purpose: Purpose::Move,
        root: store.common_root(),
        chain,
        from: 0,
        sources: &[],
        deadline,
    };
    fetch_prefix(store, &Channels::new(), fetch).await.blocks
}

/// Fetches the chain's blocks up to `end`, which nobody else is fetching, from one source after the other. The node's own disk
/// comes first: it costs no peer anything. The bucket comes last: nobody knows what it has before asking, and it is the farthest.
async fn lead(store: &Store, channels: &Channels, fetch: Fetch<'_>, end: usize, outcome: &mut FetchOutcome) {
    let permit = timeout_at(fetch.deadline, store.inner().fetch_permits.acquire()).await;
    let Ok(Ok(_permit)) = permit else {
        return;
    };
    let next = fetch.from + outcome.blocks.len();
    let asks_bucket = fetch.asks_bucket() && store.objects().is_some();
    let share = share_of(fetch.deadline, fetch.sources.is_empty() && !asks_bucket);
    let promoted = tiers::promote(store, &fetch.chain[next..end], share).await;
    outcome.promoted += promoted.len();
    outcome.blocks.extend(promoted);
    ask_peers(store, channels, fetch, end, !asks_bucket, outcome).await;
    let from = fetch.from + outcome.blocks.len();
    if asks_bucket && from < end {
        let wanted = Wanted {
            root: fetch.root,
            chain: fetch.chain,
            from,
            end,
        };
        // What is left of the request's time is for computing, too.
        let share = share_of(fetch.deadline, false);
        let promoted = tiers::objects::promote(store, wanted, share).await;
        outcome.from_objects += promoted.len();
        outcome.blocks.extend(promoted);
    }
}

/// Fetches the chain's blocks up to `end` from one peer after the other.
async fn ask_peers(
    store: &Store,
    channels: &Channels,
    fetch: Fetch<'_>,
    end: usize,
    are_last: bool,
    outcome: &mut FetchOutcome,
) {
    for (i, source) in fetch.sources.iter().enumerate() {
        let next = fetch.from + outcome.blocks.len();
        let remaining = fetch.deadline.saturating_duration_since(Instant::now());
        if next >= end || remaining.is_zero() {
            return;
        }
        if source.blocks <= next {
            continue;
        }
        let attempt = Attempt {
            store,
            fetch,
            end: end.min(source.blocks),
            deadline: share_of(fetch.deadline, are_last && i + 1 == fetch.sources.len()),
        };
        let ran = attempt.run(channels, &source.grpc_endpoint, outcome).await;
        let given = fetch.from + outcome.blocks.len() - next;
        if given > 0 {
            outcome.peers.push((source.node_id.clone(), given));
        }
        match ran {
            Ok(()) => {}
            Err(FetchError::OutOfBlocks) => return,
            Err(error) => {
                store.inner().metrics.fetch_failures.inc();
                tracing::debug!(peer = source.grpc_endpoint, %error, "prefix not fetched from peer");
            }
        }
    }
}

/// When a source's turn ends: one that stalls leaves time for those after it.
fn share_of(deadline: Instant, is_last: bool) -> Instant {
    let now = Instant::now();
    let remaining = deadline.saturating_duration_since(now);
    now + if is_last { remaining } else { remaining / 2 }
}

/// One source's turn.
#[derive(Clone, Copy)]
struct Attempt<'a> {
    store: &'a Store,
    fetch: Fetch<'a>,
    end: usize,
    deadline: Instant,
}

/// A block that a peer promised.
struct Promised {
    hash: BlockHash,
    remote_offset: u64,
    checksum: Checksum,
}

impl Attempt<'_> {
    async fn run(
        &self,
        channels: &Channels,
        endpoint: &str,
        outcome: &mut FetchOutcome,
    ) -> Result<(), FetchError> {
        let next = self.fetch.from + outcome.blocks.len();
        let wanted_max = self.store.config().hashes_max;
        let wanted = &self.fetch.chain[next..self.end.min(next + wanted_max)];
        let channel = channels.get(endpoint).map_err(FetchError::Peer)?;
        let (lease, remote, promised) = self.acquire(channel, wanted).await?;
        let block_bytes = self.store.layout().block_bytes() as u64;
        let batch = (self.store.config().fetch_batch_bytes / block_bytes).max(1);
        let batch = usize::try_from(batch).unwrap_or(usize::MAX);
        for promised in promised.chunks(batch) {
            self.pull(&remote, promised, outcome).await?;
        }
        drop(lease);
        Ok(())
    }

    /// Pins blocks at the peer. None are a miss: the peer dropped them since it was last heard of.
    async fn acquire(
        &self,
        channel: Channel,
        wanted: &[BlockHash],
    ) -> Result<(Lease, RemoteRegion, Vec<Promised>), FetchError> {
        let now = Instant::now();
        let ttl = self.deadline.saturating_duration_since(now) + LEASE_MARGIN;
        let mut client = KvStoreClient::new(channel);
        let request = v1::AcquireRequest {
            kv_root: self.store.common_root().0.to_vec(),
            hashes: convert::hashes_to_wire(wanted),
            moved: self.fetch.purpose == Purpose::Move,
            lease_ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
        };
        let until = self.deadline.min(now + self.store.config().acquire_timeout);
        let answer = timeout_at(until, client.acquire(request))
            .await
            .map_err(|_| FetchError::Answer("not in time"))?
            .map_err(|status| FetchError::Peer(status::from_status(&status)))?
            .into_inner();
        let lease = Lease {
            client,
            id: answer.lease_id,
            open: !answer.blocks.is_empty(),
        };
        let promised = read_promises(wanted, &answer.blocks)?;
        let region = answer.region.ok_or(FetchError::Answer("without a region"))?;
        let remote = RemoteRegion {
            endpoint: region.endpoint,
            epoch: Epoch(region.epoch),
            key: region.key,
        };
        Ok((lease, remote, promised))
    }

    /// Reads blocks from the peer's memory, verifies them and makes them ours.
    async fn pull(
        &self,
        remote: &RemoteRegion,
        promised: &[Promised],
        outcome: &mut FetchOutcome,
    ) -> Result<(), FetchError> {
        // Shared with the transfer, so that nobody gets these blocks while a late byte can still arrive in them.
        let blocks = Arc::new(self.store.allocate_up_to(promised.len()));
        let block_bytes = self.store.layout().block_bytes() as u64;
        let slice = |block: &OwnedBlock, promised: &Promised| Slice {
            local_offset: self.store.byte_range(block.block()).start,
            remote_offset: promised.remote_offset,
            len: block_bytes,
        };
        let batch = TransferBatch {
            region: self.store.region(),
            remote: remote.clone(),
            slices: blocks
                .iter()
                .zip(promised)
                .map(|(block, from)| slice(block, from))
                .collect(),
            keep: Keep::new(blocks.clone()),
        };
        let complete = blocks.len() == promised.len();
        let transport = self.store.transport();
        let mut seen = Vec::new();
        if let (false, Some(unit_bytes)) = (blocks.is_empty(), self.store.unit_bytes()) {
            let read = transport.read_hashed(batch, unit_bytes, self.deadline);
            let (stats, checksums) = read.await?;
            (outcome.transport, seen) = (stats.mover, checksums);
        }
        let blocks = Arc::into_inner(blocks).ok_or(FetchError::StillMoving)?;
        for (index, (block, promised)) in blocks.into_iter().zip(promised).enumerate() {
            let next = self.fetch.from + outcome.blocks.len();
            let parent = match next.checked_sub(1) {
                None => self.fetch.root,
                Some(before) => self.fetch.chain[before],
            };
            let seen = seen.get(index).copied();
            self.store
                .verify_seen(&block, seen, promised.hash, promised.checksum)?;
            let pin = self
                .store
                .commit_verified(block, parent, promised.hash, promised.checksum);
            outcome.blocks.push(pin);
            outcome.bytes += block_bytes;
            self.store.inner().metrics.fetched_blocks.inc();
            self.store.inner().metrics.fetched_bytes.inc_by(block_bytes);
            // Hashing one block is short, hashing all of them is not.
            tokio::task::yield_now().await;
        }
        if complete {
            Ok(())
        } else {
            Err(FetchError::OutOfBlocks)
        }
    }
}

/// Checks that the peer promises a leading run of what was asked for.
fn read_promises(wanted: &[BlockHash], blocks: &[v1::BlockDescriptor]) -> Result<Vec<Promised>, FetchError> {
    if blocks.len() > wanted.len() {
        return Err(FetchError::Answer("more blocks than were asked for"));
    }
    let mut promised = Vec::with_capacity(blocks.len());
    for (block, hash) in blocks.iter().zip(wanted) {
        if block.hash != hash.0 {
            return Err(FetchError::Answer("other blocks than were asked for"));
        }
        promised.push(Promised {
            hash: *hash,
            remote_offset: block.offset,
            checksum: Checksum(block.checksum),
        });
    }
    Ok(promised)
}

/// Blocks pinned at a peer. Dropping it tells the peer, without waiting.
struct Lease {
    client: KvStoreClient<Channel>,
    id: u64,
    open: bool,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        if !self.open {
            return;
        }
        let mut client = self.client.clone();
        let request = v1::ReleaseRequest { lease_id: self.id };
        // Bounded by its timeout and by the fetches in flight. Its failure costs the peer some memory until the
        // lease expires; checksums have vouched for the bytes.
        runtime.spawn(async move {
            let _ = timeout(RELEASE_TIMEOUT, client.release(request)).await;
        });
    }
}

#[cfg(test)]
mod tests;
