//! Carries out the writes of one handoff: slices of our pool straight into the memory that the decode node offered.
//!
//! Invariant: a write only names bytes that [`crate::handoff`] dealt out, and the futures of this value are the only
//! ones that read our blocks for the handoff: once it is dropped, none does.
//!
//! There is no flush: an acknowledged write is in the peer's memory ([`transfer::transport`]), so when all are
//! acknowledged everything is there, and waiting for other handoffs' writes to the same peer would only cost time.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;
use transfer::{Keep, RegionId, RemoteRegion, Slice, TransferBatch, TransferError, TransferStats, Transport};
use types::{BlockId, KvLayout};

use crate::handoff::{Piece, Write, WriteId};
use crate::overlap::Overlap;

/// Where the decode node wants the blocks.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) remote: RemoteRegion,
    /// Region offset of each pushed block, in order.
    pub(crate) block_offsets: Vec<u64>,
}

/// How a write ended.
pub(crate) struct Ended {
    pub(crate) id: WriteId,
    pub(crate) result: Result<TransferStats, TransferError>,
}

/// The writes of one handoff.
pub(crate) struct Pusher {
    transport: Arc<dyn Transport>,
    region: RegionId,
    layout: KvLayout,
    /// Our blocks of the prompt, in order.
    blocks: Arc<[BlockId]>,
    held_blocks: usize,
    target: Option<Target>,
    writes: FuturesUnordered<BoxFuture<'static, Ended>>,
    pub(crate) overlap: Overlap,
    pub(crate) pushed_bytes: u64,
    /// What moved the last write that succeeded.
    pub(crate) mover: &'static str,
}

impl Pusher {
    pub(crate) fn new(store: &kv_store::Store, blocks: Arc<[BlockId]>, held_blocks: usize) -> Self {
        Self {
            transport: store.transport(),
            region: store.region(),
            layout: store.layout(),
            blocks,
            held_blocks,
            target: None,
            writes: FuturesUnordered::new(),
            overlap: Overlap::default(),
            pushed_bytes: 0,
            mover: "none",
        }
    }

    /// The peer's memory. The handoff has checked that it holds all blocks.
    pub(crate) fn aim(&mut self, target: Target) {
        self.target = Some(target);
    }

    /// Begins a write that ends within `timeout` and before `deadline`.
    pub(crate) fn begin(&mut self, write: &Write, timeout: Duration, deadline: Instant) {
        let now = Instant::now();
        let target = self
            .target
            .as_ref()
            .expect("a handoff writes nothing before the offer");
        let batch = TransferBatch {
            region: self.region,
            remote: target.remote.clone(),
            slices: self.slices(&write.pieces, target),
            keep: Keep::default(),
        };
        let id = write.id;
        let writing = self.transport.write(batch, deadline.min(now + timeout));
        self.overlap.begin(now);
        self.writes.push(Box::pin(async move {
            Ended {
                id,
                result: writing.await,
            }
        }));
    }

    /// The next write that ends; pending while none is in flight. Cancel safe.
    pub(crate) async fn ended(&mut self) -> Ended {
        let Some(ended) = self.writes.next().await else {
            return std::future::pending().await;
        };
        self.overlap.end(Instant::now());
        if let Ok(stats) = &ended.result {
            self.pushed_bytes += stats.bytes;
            self.mover = stats.mover;
        }
        ended
    }

    fn slices(&self, pieces: &[Piece], target: &Target) -> Vec<Slice> {
        slices(
            &self.layout,
            &self.blocks,
            self.held_blocks,
            &target.block_offsets,
            pieces,
        )
    }
}

/// One slice per block and run of layers.
fn slices(
    layout: &KvLayout,
    blocks: &[BlockId],
    held_blocks: usize,
    block_offsets: &[u64],
    pieces: &[Piece],
) -> Vec<Slice> {
    let block_bytes = layout.block_bytes() as u64;
    let of_piece = |piece: &Piece| {
        let start = layout.layer_range(piece.layers.start).start as u64;
        let len = layout.layer_range(piece.layers.end).start as u64 - start;
        let block_slice = move |block: usize| Slice {
            local_offset: u64::from(blocks[block].0) * block_bytes + start,
            // Wraps only for an offset that the peer's grant cannot hold, and is refused there as any other one.
            remote_offset: block_offsets[block - held_blocks].wrapping_add(start),
            len,
        };
        piece.blocks.clone().map(block_slice)
    };
    pieces.iter().flat_map(of_piece).collect()
}

/// Whether bytes of a failed write may still reach the memory of the grant.
///
/// They cannot where the grant is closed at the peer, or the peer's incarnation that gave it is gone. After any
/// other failure a part of the batch may be under way, and only the peer's fence makes the memory safe.
pub(crate) fn may_still_land(error: &TransferError) -> bool {
    match error {
        TransferError::UnknownKey { .. } | TransferError::Fenced { .. } => false,
        TransferError::Memory(_)
        | TransferError::UnknownRegion { .. }
        | TransferError::OutOfBounds { .. }
        | TransferError::UnsupportedMemory { .. }
        | TransferError::UnsupportedEndpoint { .. }
        | TransferError::Full { .. }
        | TransferError::Bind { .. }
        | TransferError::Denied { .. }
        | TransferError::OutOfRange { .. }
        | TransferError::Unreachable { .. }
        | TransferError::ConnectionLost { .. }
        | TransferError::Timeout { .. }
        | TransferError::Ucx { .. }
        | TransferError::NoUcx { .. }
        | TransferError::Unserved { .. }
        | TransferError::TooLarge { .. }
        | TransferError::Protocol { .. }
        | TransferError::Closed => true,
    }
}

#[cfg(test)]
mod tests;
