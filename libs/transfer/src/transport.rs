//! The transport trait and the vocabulary of a transfer.
//!
//! A pool is registered once ([`Transport::register`]). Its owner lets peers read all of it
//! ([`Transport::expose_read`]) or write to some ranges of it ([`Transport::grant_write`]); both give a
//! [`RemoteRegion`], which travels to the peer inside an offer and is all that the peer needs.
//!
//! # Ordering
//!
//! - A batch is a set: its slices may land in any order, over several connections, and where two slices of a
//!   batch overlap it is not specified which bytes win.
//! - Batches in flight at the same time are independent: each is acknowledged by itself, in any order.
//! - `Ok` from [`Transport::write`] means that every byte is in the remote memory. Hence a batch that is begun
//!   after another one ended is ordered after it, and a message sent to the peer by any other way after `Ok`
//!   (such as "landed") finds the bytes there.
//! - An error means that any subset of the bytes of the batch's slices may have landed, and no byte outside
//!   them. Bytes that are still under way may land until the receiver revokes the grant.
//! - Futures do nothing unless polled. One that is dropped, or times out, stops the transfer; hardware and copies may go on
//!   for a moment, and until they stopped, the transport holds the batch's [`Keep`].
//!
//! # Another transport
//!
//! A transport is an implementation of [`Transport`] under its own endpoint scheme; its name is the scheme.
//! A node holds one list of transports, announces the endpoint of the first one, and finds the one that
//! reaches a peer with [`choose`]. UCX plugs in here: as `ucx://…`, ahead of TCP in the list where it loads and
//! offers more than TCP. Its keys are packed remote keys in a table of its own, and its `revoke` has to
//! tear down the endpoints of the grant's holder, which is why `revoke` is asynchronous.

use std::any::Any;
use std::fmt;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, TryFutureExt};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use types::{Checksum, Epoch, Memory};

use crate::calls::{Answered, Call, Calls};
use crate::{HostMemory, StatsSnapshot, TransferError};

/// A registered memory, named within its transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(pub u64);

/// The right to read or write memory of a peer, as it travels in an offer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RemoteRegion {
    /// Where the peer's transport listens, such as `tcp://127.0.0.1:41234`.
    pub endpoint: String,
    /// The peer's incarnation that gave the right. Another one refuses it.
    pub epoch: Epoch,
    /// Names the grant at the peer. Not guessable over the network transports, and never given twice.
    pub key: u64,
}

/// A run of bytes of a batch. Offsets are in bytes from the start of the local and the remote memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// Where the bytes lie in the local memory.
    pub local_offset: u64,
    /// Where they lie in the remote memory.
    pub remote_offset: u64,
    /// How many they are.
    pub len: u64,
}

/// Whatever must outlive a transfer: the transport lets it go when nothing of the batch touches local memory any more,
/// and before the call's future is ready.
#[derive(Clone, Default)]
pub struct Keep(Option<Arc<dyn Any + Send + Sync>>);

impl Keep {
    /// Keeps `kept` until the transfer has ended.
    pub fn new(kept: Arc<dyn Any + Send + Sync>) -> Self {
        Self(Some(kept))
    }
}

impl fmt::Debug for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Keep(..)" } else { "Keep" })
    }
}

/// What is to be moved between one local and one remote memory, in the direction of the call it is given to.
#[derive(Debug, Clone)]
pub struct TransferBatch {
    /// The local memory.
    pub region: RegionId,
    /// The remote memory.
    pub remote: RemoteRegion,
    /// The runs of bytes. Slices without bytes are skipped; a batch without bytes succeeds without asking the peer.
    pub slices: Vec<Slice>,
    /// For reads: what keeps the destination from being used otherwise. Where the caller holds it all the same, as
    /// with memory that nobody else uses, the default does.
    pub keep: Keep,
}

/// What a batch that succeeded did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferStats {
    /// Bytes moved.
    pub bytes: u64,
    /// Requests it was split into.
    pub requests: u64,
    /// From the call's first poll to the last acknowledgement.
    pub elapsed: Duration,
    /// What moved the bytes: `tcp`, `ucx` or `mem`.
    pub mover: &'static str,
}

/// How this node and one peer reach each other's memory, as [`Transport::links`] reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The peer.
    pub endpoint: String,
    /// What moves the bytes: `tcp` or `ucx`.
    pub mover: String,
    /// What UCX uses for this pair, such as `sysv` or `rc_mlx5`; empty where it is not used.
    pub lanes: Vec<String>,
    /// Why nothing better is used: one actionable line. Empty where there is nothing better.
    pub obstacle: String,
    /// Connections to the peer that are open now.
    pub connections: u64,
    /// Bytes written to the peer and acknowledged.
    pub written_bytes: u64,
    /// Bytes read from the peer.
    pub read_bytes: u64,
    /// Batches that failed.
    pub failures: u64,
}

/// A way of moving bytes, and whether this process has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mover {
    /// `tcp` or `ucx`.
    pub name: String,
    /// Whether it can be used here.
    pub usable: bool,
    /// What was found, such as the library's version and its devices; or why it cannot be used.
    pub detail: String,
}

/// One-sided access to the memory of peers, and theirs to ours.
///
/// The module documentation states the ordering. Every method may be called from any thread, and the
/// asynchronous ones from any task of a Tokio runtime with time and I/O enabled.
pub trait Transport: Send + Sync + 'static {
    /// The scheme of its endpoints: `tcp`, `mem`.
    fn name(&self) -> &'static str;

    /// Where peers reach it: `name://address`.
    fn endpoint(&self) -> String;

    /// Its incarnation.
    fn epoch(&self) -> Epoch;

    /// Makes memory known, for local use by [`write`](Self::write) and [`read`](Self::read). Peers get no access yet.
    fn register(&self, memory: Arc<dyn Memory>) -> Result<RegionId, TransferError>;

    /// Forgets a region, revoking all that was granted on it.
    fn unregister(&self, region: RegionId) -> BoxFuture<'static, ()>;

    /// Lets peers read the whole region. Repeated calls give the same right until it is revoked.
    ///
    /// The transport does not keep the bytes still while they are read: a reader verifies generation and
    /// checksum before it believes them.
    fn expose_read(&self, region: RegionId) -> Result<RemoteRegion, TransferError>;

    /// Lets the holder of the result write to these ranges of the region, given in byte offsets of the
    /// region. A request with any byte outside them is refused as a whole.
    ///
    /// The caller promises that nobody else uses those bytes until it revoked the grant.
    fn grant_write(&self, region: RegionId, ranges: Vec<Range<u64>>) -> Result<RemoteRegion, TransferError>;

    /// The fence: when it returns, nothing that a peer does or did under this grant touches memory any more,
    /// and all that was written happened before. Does nothing for grants that are closed or not ours.
    fn revoke(&self, grant: &RemoteRegion) -> BoxFuture<'static, ()>;

    /// As [`grant_write`](Self::grant_write), for whoever wants checksums of the ranges: what lands in order is hashed as it
    /// lands, for much less than it costs to hash it later. [`revoke_hashed`](Self::revoke_hashed) gives the result.
    fn grant_write_hashed(
        &self,
        region: RegionId,
        ranges: Vec<Range<u64>>,
    ) -> Result<RemoteRegion, TransferError> {
        self.grant_write(region, ranges)
    }

    /// As [`revoke`](Self::revoke). Gives the checksum of each range of a grant, in the order in which they were given: `None` where
    /// bytes did not come in order, came twice, or not through this processor. Or it gives none at all. The caller then makes
    /// them.
    fn revoke_hashed(&self, grant: &RemoteRegion) -> BoxFuture<'static, Vec<Option<Checksum>>> {
        self.revoke(grant).map(|()| Vec::new()).boxed()
    }

    /// Writes local bytes to the peer. `Ok` means that all of them are in its memory.
    ///
    /// The local bytes must not change before the future ended or was dropped. Ends within `deadline`.
    fn write(
        &self,
        batch: TransferBatch,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>>;

    /// Reads the peer's bytes into local memory. After an error the local bytes are unspecified.
    ///
    /// Nobody else may use the local bytes before the future ended or was dropped. Ends within `deadline`.
    fn read(
        &self,
        batch: TransferBatch,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>>;

    /// As [`read`](Self::read). If the bytes passed through this processor, the result has the checksum of every
    /// `unit_bytes` of them, in the order of the slices: of what has arrived in the local memory, and for much less than it
    /// costs to hash it later. Or it has no checksum at all, and the caller makes them.
    fn read_hashed(
        &self,
        batch: TransferBatch,
        _unit_bytes: NonZeroU64,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<(TransferStats, Vec<Checksum>), TransferError>> {
        self.read(batch, deadline)
            .map_ok(|stats| (stats, Vec::new()))
            .boxed()
    }

    /// Waits until every write to this endpoint for which [`write`](Self::write) was called before has ended,
    /// so that what they wrote is visible to the peer. Their errors are reported by themselves.
    ///
    /// Those writes must be polled meanwhile, by another task or beside this one, or it ends in a timeout.
    fn flush(
        &self,
        remote_endpoint: &str,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<(), TransferError>>;

    /// Calls a peer; see [`crate::calls`]. Ends within `deadline`. After an error it is not known whether the peer answered
    /// it.
    fn call(&self, call: Call, deadline: Instant) -> BoxFuture<'static, Result<Answered, TransferError>>;

    /// Has the calls of peers answered by `calls` for as long as that lives. Only the first one given is ever asked.
    fn serve_calls(&self, calls: Weak<dyn Calls>);

    /// Cuts all connections to a peer; transfers that use them fail with [`TransferError::ConnectionLost`].
    /// The next transfer connects again.
    fn tear_down(&self, remote_endpoint: &str);

    /// What it has done so far.
    fn stats(&self) -> StatsSnapshot;

    /// Memory that this transport moves best: peers on this host may map it, and devices have it registered.
    /// All bytes are zero.
    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Memory>, TransferError> {
        let memory = HostMemory::allocate(bytes)?;
        Ok(memory)
    }

    /// The peers that transfers went to, and how. For people, not for decisions.
    fn links(&self) -> Vec<Link> {
        Vec::new()
    }

    /// The ways of moving bytes that were looked for at the start.
    fn movers(&self) -> Vec<Mover> {
        Vec::new()
    }
}

/// The transport that reaches `endpoint`: the first whose name is the endpoint's scheme.
pub fn choose<'a>(
    transports: &'a [Arc<dyn Transport>],
    endpoint: &str,
) -> Result<&'a Arc<dyn Transport>, TransferError> {
    let scheme = endpoint.split_once("://").map(|(scheme, _)| scheme);
    transports
        .iter()
        .find(|transport| scheme == Some(transport.name()))
        .ok_or_else(|| TransferError::UnsupportedEndpoint {
            endpoint: endpoint.to_owned(),
        })
}

/// Refuses what can be refused without asking the peer: local ranges that do not exist, and overflows.
pub(crate) fn check_batch(batch: &TransferBatch, region_bytes: u64) -> Result<(), TransferError> {
    for slice in &batch.slices {
        let (offset, len) = (slice.local_offset, slice.len);
        if offset.checked_add(len).is_none_or(|end| end > region_bytes) {
            return Err(TransferError::OutOfBounds {
                offset,
                len,
                region_bytes,
            });
        }
        if slice.remote_offset.checked_add(len).is_none() {
            return Err(TransferError::OutOfRange {
                endpoint: batch.remote.endpoint.clone(),
                offset: slice.remote_offset,
                len,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
