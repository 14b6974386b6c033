//! Least frequently used while in the pool; of equals, the least recently used.

use std::collections::BTreeSet;
use std::time::Instant;

use types::{BlockHash, BlockId};

use super::{Policy, Stored};

#[derive(Debug)]
pub(super) struct Lfu {
    clock: u64,
    /// Uses, and the moment of the last one.
    uses: Vec<(u32, u64)>,
    evictable: BTreeSet<(u32, u64, BlockId)>,
}

impl Lfu {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            clock: 0,
            uses: vec![(0, 0); capacity],
            evictable: BTreeSet::new(),
        }
    }

    fn key(&self, block: BlockId) -> (u32, u64, BlockId) {
        let (uses, last_use) = self.uses[block.0 as usize];
        (uses, last_use, block)
    }
}

impl Policy for Lfu {
    fn stored(&mut self, stored: Stored, _now: Instant) {
        self.clock += 1;
        self.uses[stored.block.0 as usize] = (1, self.clock);
    }

    fn used(&mut self, run: &[BlockId], _now: Instant) {
        for block in run {
            self.clock += 1;
            let (uses, last_use) = &mut self.uses[block.0 as usize];
            *uses = uses.saturating_add(1);
            *last_use = self.clock;
        }
    }

    fn unpinned(&mut self, _block: BlockId, _now: Instant) {}

    fn evictable(&mut self, block: BlockId, _now: Instant) {
        self.evictable.insert(self.key(block));
    }

    fn unevictable(&mut self, block: BlockId) {
        self.evictable.remove(&self.key(block));
    }

    fn evicted(&mut self, block: BlockId, _hash: BlockHash, _now: Instant) {
        self.unevictable(block);
    }

    fn victim(&mut self, _now: Instant) -> Option<BlockId> {
        self.evictable.first().map(|(_, _, block)| *block)
    }

    fn worth(&self, block: BlockId, _now: Instant) -> f32 {
        self.uses[block.0 as usize].0 as f32
    }

    fn coldest(&self, count: usize) -> Vec<BlockId> {
        self.evictable
            .iter()
            .take(count)
            .map(|(_, _, block)| *block)
            .collect()
    }

    fn is_evictable(&self, block: BlockId) -> bool {
        self.evictable.contains(&self.key(block))
    }
}
