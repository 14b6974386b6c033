//! What leaves the table other than to make room: blocks that are handed to a peer, and blocks that are corrupt.
//!
//! Invariant: as for eviction, a block leaves after its descendants. Only a corrupt block leaves while it is pinned: nobody
//! finds it any more, and its slot is free once the last of those who had found it lets go.

use std::collections::HashSet;
use std::time::Instant;

use types::{BlockHash, BlockId, Checksum};

use super::{BlockTable, SlotState};

/// A block by its worth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ranked {
    /// Identity of the block.
    pub hash: BlockHash,
    /// Its place in its chain, from 1.
    pub depth: usize,
    /// Pins, leases and sequences that hold it.
    pub pins: usize,
    /// Cached blocks that continue it.
    pub children: usize,
    /// What keeping it is worth.
    pub worth: f32,
}

/// A cached block with everything before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// The root of its space.
    pub root: BlockHash,
    /// First block first; the block itself is the last one.
    pub hashes: Vec<BlockHash>,
    /// How many of the last blocks nobody uses and no other chain shares: what eviction would take one after the other, if
    /// it began here. 0 where the block itself is in use or has children.
    pub tail: usize,
}

impl BlockTable {
    /// What keeping the block is worth, if it is held: higher is better. Comparable between nodes of the same policy.
    pub fn worth(&self, hash: BlockHash, now: Instant) -> Option<f32> {
        let block = self.by_hash.get(&hash)?;
        Some(self.policy.worth(*block, now))
    }

    /// Gives a block the worth that a peer says it has, if that is less than it has here: to move a block is no use of it.
    pub fn lower_worth(&mut self, hash: BlockHash, worth: f32, now: Instant) {
        if let Some(block) = self.by_hash.get(&hash) {
            self.policy.lower(*block, worth, now);
        }
    }

    /// Whether the block is in the pool.
    pub fn holds(&self, hash: BlockHash) -> bool {
        self.by_hash.contains_key(&hash)
    }

    /// A held block with its ancestors.
    pub fn path(&self, hash: BlockHash) -> Option<Path> {
        let mut block = *self.by_hash.get(&hash)?;
        let (mut hashes, mut tail, mut in_tail) = (Vec::new(), 0, true);
        loop {
            let cached = self.cached(block);
            // The block that the walk came from is the only child that a block of the tail may have.
            let children_max = u32::from(!hashes.is_empty());
            in_tail &= cached.pins == 0 && cached.children <= children_max;
            tail += usize::from(in_tail);
            hashes.push(cached.hash);
            match cached.parent {
                Some(parent) => block = parent,
                None => {
                    hashes.reverse();
                    return Some(Path {
                        root: cached.parent_hash,
                        hashes,
                        tail,
                    });
                }
            }
        }
    }

    /// The chains that go through a block, from their roots to their ends; at most `count`. Looks at every block of the table.
    pub fn paths_through(&self, hash: BlockHash, count: usize) -> Vec<Path> {
        let Some(block) = self.by_hash.get(&hash) else {
            return Vec::new();
        };
        let family = self.with_descendants(*block);
        let ends = family
            .into_iter()
            .map(|block| self.cached(block))
            .filter(|cached| cached.children == 0);
        ends.take(count).filter_map(|end| self.path(end.hash)).collect()
    }

    /// Lets go of a block that nobody uses and that has no children. Whether it was held and could go.
    pub fn evict(&mut self, hash: BlockHash, now: Instant) -> bool {
        let Some(block) = self.by_hash.get(&hash).copied() else {
            return false;
        };
        if !self.cached(block).is_evictable() {
            return false;
        }
        self.remove_leaf(block, now);
        self.evictions += 1;
        true
    }

    /// Lets go of a block and all its descendants, whoever uses them: none of them is found any more. Slots in use are freed
    /// by their last user. Returns what was held, children before parents; nothing if the hash is not held.
    ///
    /// Looks at every block of the table: for what is rare.
    pub fn forget(&mut self, hash: BlockHash, now: Instant) -> Vec<BlockHash> {
        let Some(first) = self.by_hash.get(&hash).copied() else {
            return Vec::new();
        };
        let doomed = self.with_descendants(first);
        let removed = doomed.into_iter().rev().map(|block| self.detach(block, now));
        removed.collect()
    }

    /// Evicts what continues the held part of a chain, and of that part what no other chain shares, as far as nobody uses it.
    /// Returns how many blocks went, and how many of all these stayed. Looks at every block of the table.
    pub fn evict_chain(&mut self, chain: &[BlockHash], now: Instant) -> (usize, usize) {
        let held: Vec<BlockId> = chain
            .iter()
            .map_while(|hash| self.by_hash.get(hash).copied())
            .collect();
        let Some((last, before)) = held.split_last() else {
            return (0, 0);
        };
        let family = self.with_descendants(*last);
        let doomed: Vec<BlockId> = family
            .into_iter()
            .rev()
            .chain(before.iter().rev().copied())
            .collect();
        let mut evicted = 0;
        for block in &doomed {
            if self.cached(*block).is_evictable() {
                self.remove_leaf(*block, now);
                self.evictions += 1;
                evicted += 1;
            }
        }
        (evicted, doomed.len() - evicted)
    }

    /// The `count` blocks that are worth most, or least, in that order. Looks at every block of the table.
    pub fn ranked(&self, count: usize, coldest: bool, now: Instant) -> Vec<Ranked> {
        let blocks = self.by_hash.values();
        let mut blocks: Vec<(f32, BlockId)> = blocks
            .map(|block| (self.policy.worth(*block, now), *block))
            .collect();
        let order = |a: &(f32, BlockId), b: &(f32, BlockId)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
        blocks.sort_unstable_by(|a, b| if coldest { order(a, b) } else { order(b, a) });
        let ranked = blocks.into_iter().take(count).map(|(worth, block)| {
            let cached = self.cached(block);
            Ranked {
                hash: cached.hash,
                depth: cached.depth as usize + 1,
                pins: cached.pins as usize,
                children: cached.children as usize,
                worth,
            }
        });
        ranked.collect()
    }

    /// Leading blocks of the chain that are held, and how many of them are in use.
    pub fn usage(&self, chain: &[BlockHash]) -> (usize, usize) {
        let held = chain.iter().map_while(|hash| self.by_hash.get(hash));
        held.fold((0, 0), |(held, used), block| {
            (held + 1, used + usize::from(self.cached(*block).is_held()))
        })
    }

    /// A block and all its descendants, parents before children.
    fn with_descendants(&self, first: BlockId) -> Vec<BlockId> {
        let mut by_age: Vec<BlockId> = self.by_hash.values().copied().collect();
        by_age.sort_unstable_by_key(|block| self.cached(*block).stored_at);
        let mut family = HashSet::from([first]);
        let mut order = vec![first];
        // Parents were stored before their children, so one pass finds all descendants.
        for block in by_age {
            if self
                .cached(block)
                .parent
                .is_some_and(|parent| family.contains(&parent))
            {
                family.insert(block);
                order.push(block);
            }
        }
        order
    }

    /// The held block that comes next after `after` in the order of slots, round and round: with its checksum.
    pub fn next_cached(&self, after: Option<BlockId>) -> Option<(BlockHash, BlockId, Checksum)> {
        let start = after.map_or(0, |block| block.0 as usize + 1);
        let slots = (start..self.slots.len()).chain(0..start.min(self.slots.len()));
        let mut held = slots.filter_map(|index| match &self.slots[index].state {
            SlotState::Cached(cached) => {
                let block = BlockId(u32::try_from(index).expect("slots are numbered by 32 bits"));
                Some((cached.hash, block, cached.checksum))
            }
            SlotState::Free | SlotState::Owned | SlotState::Detached { .. } => None,
        });
        held.next()
    }

    /// Ends one pin of a block that is detached. False if it is none.
    pub(super) fn unpin_detached(&mut self, block: BlockId) -> bool {
        let SlotState::Detached { pins } = &mut self.slot_mut(block).state else {
            return false;
        };
        *pins -= 1;
        if *pins == 0 {
            self.slot_mut(block).state = SlotState::Free;
            self.owned -= 1;
            self.free.push(block);
        }
        true
    }

    /// Lets go of a block without children, also while it is pinned.
    fn detach(&mut self, block: BlockId, now: Instant) -> BlockHash {
        let cached = self.cached_mut(block);
        let (hash, pins) = (cached.hash, cached.pins);
        cached.pins = 0;
        if pins > 0 {
            self.pinned -= 1;
            self.let_be_evicted(block, now);
            self.let_go(block);
        }
        self.remove_leaf(block, now);
        if pins > 0 {
            let freed = self.free.pop();
            debug_assert_eq!(freed, Some(block));
            self.slot_mut(block).state = SlotState::Detached { pins };
            self.owned += 1;
        }
        hash
    }
}

#[cfg(test)]
mod tests;
