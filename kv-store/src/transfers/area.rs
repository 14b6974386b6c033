//! Blocks of the pool that a test borrows: filled with a pattern, and checked against one.
//!
//! Invariant: an area has at most a share of the pool, and costs at most a few cached blocks.

use std::hash::Hasher;
use std::sync::Arc;

use node::task;
use twox_hash::XxHash3_64;
use types::Error;

use crate::probe::{Blocks, Pattern};
use crate::store::{OwnedBlock, Store};

/// At most one of so many blocks of the pool is borrowed: a test must not keep requests waiting for memory.
const POOL_SHARE: usize = 8;
/// Bounds an answer's size. 4096 blocks of real models are far more than a test moves.
const BLOCKS_MAX: usize = 4096;
/// Cached blocks that a test may cost where the pool has no free ones: enough for one block and its neighbours.
const EVICTIONS_MAX: usize = 4;
/// Hashing this much takes some 100 µs, about as long as a thread takes to start.
const HASHED_HERE_BYTES_MAX: u64 = 1 << 20;
/// When a caller that found no memory may try again: requests end in seconds.
const RETRY_MS: u64 = 1000;

/// Blocks that hold one run of bytes.
#[derive(Debug)]
pub(super) struct Area {
    store: Store,
    blocks: Vec<OwnedBlock>,
    /// Length of the run.
    bytes: u64,
}

impl Area {
    /// Borrows blocks for a run of `bytes` bytes, or of fewer where the pool is small or full.
    pub(super) fn borrow(store: &Store, bytes: u64) -> Result<Self, Error> {
        let block_bytes = store.layout().block_bytes() as u64;
        let wanted = usize::try_from(bytes.div_ceil(block_bytes)).unwrap_or(usize::MAX);
        let share = (store.capacity() / POOL_SHARE).max(1);
        let blocks = store.allocate_sparing(wanted.clamp(1, BLOCKS_MAX.min(share)), EVICTIONS_MAX);
        if blocks.is_empty() {
            return Err(Error::overloaded(
                "the pool has no block that could be borrowed for a transfer test",
                RETRY_MS,
            ));
        }
        Ok(Self::of(store, blocks, bytes))
    }

    /// Blocks that were borrowed before.
    pub(super) fn of(store: &Store, blocks: Vec<OwnedBlock>, bytes: u64) -> Self {
        let capacity = store.layout().block_bytes() as u64 * blocks.len() as u64;
        Self {
            store: store.clone(),
            blocks,
            bytes: bytes.min(capacity),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn into_blocks(self) -> Vec<OwnedBlock> {
        self.blocks
    }

    /// Where each block starts in the pool.
    pub(super) fn offsets(&self) -> Vec<u64> {
        let blocks = self.blocks.iter();
        blocks
            .map(|owned| self.store.byte_range(owned.block()).start)
            .collect()
    }

    pub(super) fn blocks<'a>(&self, offsets: &'a [u64]) -> Blocks<'a> {
        Blocks {
            offsets,
            block_bytes: self.store.layout().block_bytes() as u64,
        }
    }

    /// Fills the run with the pattern of `seed` and gives its checksum, on another thread.
    pub(super) async fn fill(self: &Arc<Self>, seed: u64) -> Result<u64, Error> {
        let area = self.clone();
        task::blocking("fill-probe", move || {
            let mut pattern = Pattern::new(seed);
            let mut buffer = vec![0; area.store.layout().block_bytes()];
            let mut hash = XxHash3_64::new();
            for (offset, len) in area.runs() {
                let bytes = &mut buffer[..len];
                pattern.fill(bytes);
                hash.write(bytes);
                let memory = area.store.memory();
                transfer::memory::copy_in(memory.as_ref(), offset, bytes).expect(IN_POOL);
            }
            hash.finish()
        })
        .await
    }

    /// The checksum of the run; that of a long one is made on another thread.
    pub(super) async fn checksum(self: &Arc<Self>) -> Result<u64, Error> {
        if self.bytes <= HASHED_HERE_BYTES_MAX {
            return Ok(self.hash());
        }
        let area = self.clone();
        task::blocking("check-probe", move || area.hash()).await
    }

    fn hash(&self) -> u64 {
        let memory = self.store.memory();
        let mut hash = XxHash3_64::new();
        for (offset, len) in self.runs() {
            transfer::memory::with_bytes(memory.as_ref(), offset, len, |bytes| hash.write(bytes))
                .expect(IN_POOL);
        }
        hash.finish()
    }

    /// Makes the run differ from what it holds, in every block.
    pub(super) fn spoil(&self) {
        for (offset, _) in self.runs() {
            let memory = self.store.memory();
            let byte = transfer::memory::copy_out(memory.as_ref(), offset, 1).expect(IN_POOL);
            transfer::memory::copy_in(memory.as_ref(), offset, &[!byte[0]]).expect(IN_POOL);
        }
    }

    /// The parts of the run: where each one lies in the pool, and its length.
    fn runs(&self) -> impl Iterator<Item = (usize, usize)> {
        let block_bytes = self.store.layout().block_bytes();
        let mut rest = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        self.blocks.iter().map_while(move |owned| {
            let len = rest.min(block_bytes);
            rest -= len;
            (len > 0).then(|| (owned.block().0 as usize * block_bytes, len))
        })
    }
}

const IN_POOL: &str = "blocks are inside the pool, and the pool is host memory";
