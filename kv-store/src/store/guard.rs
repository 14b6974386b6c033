//! The rights to one block, as values: dropping one gives the right back.

use std::fmt;

use types::{BlockDescriptor, BlockHash, BlockId, Checksum, Generation};

use super::Store;

/// The right to write a block. Dropping it frees the block.
#[must_use = "dropping it frees the block"]
pub struct OwnedBlock {
    /// `None` once somebody else answers for the block.
    store: Option<Store>,
    block: BlockId,
}

/// The right to read a block: it is not evicted, and its bytes do not change. Dropping it ends the right.
#[must_use = "dropping it lets the block be evicted"]
pub struct BlockPin {
    hold: Hold,
    descriptor: BlockDescriptor,
}

enum Hold {
    Cached(Store),
    /// In no index: the slot is freed with the pin.
    Private(#[expect(dead_code, reason = "held for its drop")] OwnedBlock),
}

impl OwnedBlock {
    pub(super) fn new(store: Store, block: BlockId) -> Self {
        Self {
            store: Some(store),
            block,
        }
    }

    /// Its place in the pool.
    pub fn block(&self) -> BlockId {
        self.block
    }

    /// The slot is somebody else's from now on.
    pub(super) fn give_up(mut self) -> BlockId {
        self.store = None;
        self.block
    }
}

impl Drop for OwnedBlock {
    fn drop(&mut self) {
        if let Some(store) = self.store.take() {
            store.with_table(|table| table.free(self.block));
        }
    }
}

impl fmt::Debug for OwnedBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OwnedBlock").field(&self.block).finish()
    }
}

impl BlockPin {
    pub(super) fn cached(store: Store, descriptor: BlockDescriptor) -> Self {
        Self {
            hold: Hold::Cached(store),
            descriptor,
        }
    }

    pub(super) fn private(block: OwnedBlock, descriptor: BlockDescriptor) -> Self {
        Self {
            hold: Hold::Private(block),
            descriptor,
        }
    }

    /// Its place in the pool.
    pub fn block(&self) -> BlockId {
        self.descriptor.block
    }

    /// Identity of the content.
    pub fn hash(&self) -> BlockHash {
        self.descriptor.hash
    }

    /// The slot's use.
    pub fn generation(&self) -> Generation {
        self.descriptor.generation
    }

    /// XXH3-64 of its bytes.
    pub fn checksum(&self) -> Checksum {
        self.descriptor.checksum
    }

    /// Whether only this pin knows the block: no prefix match finds it.
    pub fn is_private(&self) -> bool {
        match self.hold {
            Hold::Cached(_) => false,
            Hold::Private(_) => true,
        }
    }
}

impl Drop for BlockPin {
    fn drop(&mut self) {
        match &self.hold {
            Hold::Cached(store) => store.with_table(|table| table.unpin(self.descriptor.block, super::now())),
            Hold::Private(_) => {}
        }
    }
}

impl fmt::Debug for BlockPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockPin")
            .field("block", &self.descriptor.block)
            .field("hash", &self.descriptor.hash)
            .field("private", &self.is_private())
            .finish()
    }
}
