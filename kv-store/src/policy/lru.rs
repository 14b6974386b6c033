//! Least recently used. The end of a use is a use: what a long request held is as recent as its end.

use std::collections::BTreeSet;
use std::time::Instant;

use types::{BlockHash, BlockId};

use super::clock::Clock;
use super::{Policy, Stored};

#[derive(Debug)]
pub(super) struct Lru {
    clock: Clock,
    /// Counts uses, since many of them share one moment.
    uses: u64,
    /// Moment and number of the last use.
    last_use: Vec<(u64, u64)>,
    evictable: BTreeSet<((u64, u64), BlockId)>,
}

impl Lru {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            clock: Clock::default(),
            uses: 0,
            last_use: vec![(0, 0); capacity],
            evictable: BTreeSet::new(),
        }
    }

    fn touch(&mut self, block: BlockId, now: Instant) {
        self.uses += 1;
        self.last_use[block.0 as usize] = (self.clock.advance(now), self.uses);
    }

    fn key(&self, block: BlockId) -> ((u64, u64), BlockId) {
        (self.last_use[block.0 as usize], block)
    }
}

impl Policy for Lru {
    fn stored(&mut self, stored: Stored, now: Instant) {
        self.touch(stored.block, now);
    }

    fn used(&mut self, run: &[BlockId], now: Instant) {
        for block in run {
            self.touch(*block, now);
        }
    }

    fn unpinned(&mut self, block: BlockId, now: Instant) {
        self.touch(block, now);
    }

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
        self.evictable.first().map(|(_, block)| *block)
    }

    /// Uses per second, if the time since the last one is the time to the next.
    fn worth(&self, block: BlockId, now: Instant) -> f32 {
        let (used_ms, _) = self.last_use[block.0 as usize];
        1000.0 / (1 + self.clock.at(now) - used_ms) as f32
    }

    fn lower(&mut self, block: BlockId, worth: f32, now: Instant) {
        let age_ms = if worth > 0.0 {
            (1000.0 / worth) as u64
        } else {
            u64::MAX
        };
        let used_ms = self.clock.advance(now).saturating_sub(age_ms.saturating_sub(1));
        if used_ms >= self.last_use[block.0 as usize].0 {
            return;
        }
        let evictable = self.evictable.remove(&self.key(block));
        self.uses += 1;
        self.last_use[block.0 as usize] = (used_ms, self.uses);
        if evictable {
            self.evictable.insert(self.key(block));
        }
    }

    fn coldest(&self, count: usize) -> Vec<BlockId> {
        self.evictable
            .iter()
            .take(count)
            .map(|(_, block)| *block)
            .collect()
    }

    fn is_evictable(&self, block: BlockId) -> bool {
        self.evictable.contains(&self.key(block))
    }
}
