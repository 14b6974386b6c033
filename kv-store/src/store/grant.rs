//! Blocks that a peer may write.
//!
//! Invariant: a block leaves this state only after [`transfer::Transport::revoke`] returned. Whatever happens to the code
//! that holds a [`Grant`] (an error, a cancelled request, a runtime that stops), no block is freed
//! before: at worst it is never used again.

use std::fmt;
use std::mem;

use futures::future::BoxFuture;
use tokio::runtime::Handle;
use transfer::{RemoteRegion, TransferError};
use types::{BlockHash, BlockId, Checksum};

use super::{Corrupt, OwnedBlock, Store};

/// A peer's right to write to some blocks. Nobody here may touch them until [`Grant::fence`] gives them back.
///
/// Dropping it fences the peer in the background and then frees the blocks. That needs the runtime: dropped on a
/// thread without one, its blocks are lost until the process ends.
#[must_use = "dropping it fences the peer and frees the blocks"]
pub struct Grant {
    store: Store,
    region: RemoteRegion,
    /// Plain ids on purpose: dropping them unfenced loses the slots instead of freeing them.
    blocks: Vec<BlockId>,
    fence: Fence,
}

enum Fence {
    Open,
    /// The one revocation of the grant, which whoever takes over goes on with: a second one may return before the first
    /// one has done its work.
    Closing(BoxFuture<'static, Vec<Option<Checksum>>>),
    Closed,
}

/// A block that a peer could write, which it cannot any more.
#[derive(Debug)]
pub struct Landed {
    block: OwnedBlock,
    /// The checksum of the bytes, if they were hashed as they landed.
    seen: Option<Checksum>,
}

impl Landed {
    /// A block with the checksum that was `seen` when it was written, if it was.
    pub fn new(block: OwnedBlock, seen: Option<Checksum>) -> Self {
        Self { block, seen }
    }

    /// Checks the bytes, which are in `store`; counts it if they are wrong.
    ///
    /// # Errors
    ///
    /// The bytes are not those with the `promised` checksum. `hash` says whose they should be.
    pub fn verify(&self, store: &Store, hash: BlockHash, promised: Checksum) -> Result<(), Corrupt> {
        store.verify_seen(&self.block, self.seen, hash, promised)
    }

    /// The block.
    pub fn into_block(self) -> OwnedBlock {
        self.block
    }
}

impl Grant {
    pub(super) fn new(store: Store, blocks: Vec<OwnedBlock>) -> Result<Self, TransferError> {
        let ranges = blocks
            .iter()
            .map(|owned| store.byte_range(owned.block()))
            .collect();
        let transport = &store.inner.transport;
        let region = transport.grant_write_hashed(store.inner.region, ranges)?;
        Ok(Self {
            blocks: blocks.into_iter().map(OwnedBlock::give_up).collect(),
            store,
            region,
            fence: Fence::Open,
        })
    }

    /// What the peer needs to write.
    pub fn region(&self) -> &RemoteRegion {
        &self.region
    }

    /// The blocks, in the order they were given.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Region offset of each block, in bytes, in the order they were given.
    pub fn block_offsets(&self) -> Vec<u64> {
        let blocks = self.blocks.iter();
        blocks.map(|block| self.store.byte_range(*block).start).collect()
    }

    /// Ends the peer's right and gives the blocks back: when this returns, no remote write can touch them any
    /// more. Where the future is dropped before, the fence goes on in the background and the blocks are
    /// freed after it.
    pub async fn fence(mut self) -> Vec<Landed> {
        let seen = self.revocation().await;
        self.fence = Fence::Closed;
        let blocks = mem::take(&mut self.blocks).into_iter().enumerate();
        let landed = |(place, block)| {
            let block = OwnedBlock::new(self.store.clone(), block);
            Landed::new(block, seen.get(place).copied().flatten())
        };
        blocks.map(landed).collect()
    }

    /// Begins the revocation, or goes on with it. Cancel safe.
    async fn revocation(&mut self) -> Vec<Option<Checksum>> {
        if matches!(self.fence, Fence::Open) {
            self.fence = Fence::Closing(self.store.inner.transport.revoke_hashed(&self.region));
        }
        match &mut self.fence {
            Fence::Closing(revoked) => revoked.await,
            Fence::Open | Fence::Closed => Vec::new(),
        }
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let revoked = match mem::replace(&mut self.fence, Fence::Closed) {
            Fence::Open => self.store.inner.transport.revoke_hashed(&self.region),
            Fence::Closing(revoked) => revoked,
            Fence::Closed => return,
        };
        let blocks = mem::take(&mut self.blocks);
        let Ok(runtime) = Handle::try_current() else {
            tracing::error!(
                blocks = blocks.len(),
                "write grant dropped outside of the runtime: its blocks are lost"
            );
            return;
        };
        let store = self.store.clone();
        runtime.spawn(async move {
            revoked.await;
            for block in blocks {
                drop(OwnedBlock::new(store.clone(), block));
            }
        });
    }
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grant")
            .field("region", &self.region)
            .field("blocks", &self.blocks)
            .finish()
    }
}
