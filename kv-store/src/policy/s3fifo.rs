//! S3-FIFO (Yang et al., SOSP'23): new blocks wait in a small queue; those used there, or remembered from before, go
//! on to the main queue, which gives a second chance per use.
//!
//! Blocks that are not evictable keep their place in their queue and are passed over.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use types::{BlockHash, BlockId};

use super::{Policy, Stored, fingerprint};
use crate::digest::DigestBuild;

/// The share of the pool that the small queue may take, as in the paper.
const SMALL_SHARE: usize = 10;
/// Uses that count, as in the paper.
const USES_MAX: u8 = 3;

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Queue {
    #[default]
    Small,
    Main,
}

#[derive(Debug, Default, Clone, Copy)]
struct Entry {
    queue: Queue,
    uses: u8,
    place: u64,
}

#[derive(Debug)]
pub(super) struct S3Fifo {
    capacity: usize,
    /// Number of the next place in a queue.
    next_place: u64,
    entries: Vec<Entry>,
    small_len: usize,
    /// The evictable blocks of each queue, oldest first.
    small: BTreeSet<(u64, BlockId)>,
    main: BTreeSet<(u64, BlockId)>,
    /// What left the small queue, with the place of its last leaving: as many as the pool has slots.
    ghosts: HashMap<u64, u64, DigestBuild>,
    ghost_order: VecDeque<(u64, u64)>,
}

impl S3Fifo {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            next_place: 0,
            entries: vec![Entry::default(); capacity],
            small_len: 0,
            small: BTreeSet::new(),
            main: BTreeSet::new(),
            ghosts: HashMap::default(),
            ghost_order: VecDeque::new(),
        }
    }

    fn place(&mut self) -> u64 {
        self.next_place += 1;
        self.next_place
    }

    fn entry(&self, block: BlockId) -> Entry {
        self.entries[block.0 as usize]
    }

    fn queue(&mut self, queue: Queue) -> &mut BTreeSet<(u64, BlockId)> {
        match queue {
            Queue::Small => &mut self.small,
            Queue::Main => &mut self.main,
        }
    }

    /// Puts an evictable block at the end of the main queue.
    fn requeue(&mut self, block: BlockId, uses: u8) {
        let place = self.place();
        let before = self.entry(block);
        self.queue(before.queue).remove(&(before.place, block));
        if before.queue == Queue::Small {
            self.small_len -= 1;
        }
        self.entries[block.0 as usize] = Entry {
            queue: Queue::Main,
            uses,
            place,
        };
        self.main.insert((place, block));
    }

    fn remember(&mut self, hash: BlockHash) {
        let (place, ghost) = (self.place(), fingerprint(hash));
        self.ghosts.insert(ghost, place);
        self.ghost_order.push_back((place, ghost));
        while self.ghost_order.len() > self.capacity {
            if let Some((place, ghost)) = self.ghost_order.pop_front()
                && self.ghosts.get(&ghost) == Some(&place)
            {
                self.ghosts.remove(&ghost);
            }
        }
    }
}

impl Policy for S3Fifo {
    fn stored(&mut self, stored: Stored, _now: Instant) {
        let queue = match self.ghosts.remove(&fingerprint(stored.hash)) {
            Some(_) => Queue::Main,
            None => Queue::Small,
        };
        if queue == Queue::Small {
            self.small_len += 1;
        }
        let place = self.place();
        self.entries[stored.block.0 as usize] = Entry {
            queue,
            uses: 0,
            place,
        };
    }

    fn used(&mut self, run: &[BlockId], _now: Instant) {
        for block in run {
            let uses = &mut self.entries[block.0 as usize].uses;
            *uses = (*uses + 1).min(USES_MAX);
        }
    }

    fn unpinned(&mut self, _block: BlockId, _now: Instant) {}

    fn evictable(&mut self, block: BlockId, _now: Instant) {
        let entry = self.entry(block);
        self.queue(entry.queue).insert((entry.place, block));
    }

    fn unevictable(&mut self, block: BlockId) {
        let entry = self.entry(block);
        self.queue(entry.queue).remove(&(entry.place, block));
    }

    fn evicted(&mut self, block: BlockId, hash: BlockHash, _now: Instant) {
        self.unevictable(block);
        if self.entry(block).queue == Queue::Small {
            self.small_len -= 1;
            self.remember(hash);
        }
    }

    /// Ends: every round either answers, empties the small queue by one, or takes one of a block's few uses.
    fn victim(&mut self, _now: Instant) -> Option<BlockId> {
        loop {
            let small_is_full = self.small_len > self.capacity / SMALL_SHARE;
            let small = self.small.first().map(|(_, block)| *block);
            let main = self.main.first().map(|(_, block)| *block);
            match (small, main) {
                (Some(block), main) if small_is_full || main.is_none() => {
                    if self.entry(block).uses <= 1 {
                        return Some(block);
                    }
                    self.requeue(block, 0);
                }
                (_, Some(block)) => match self.entry(block).uses {
                    0 => return Some(block),
                    uses => self.requeue(block, uses - 1),
                },
                (_, None) => return None,
            }
        }
    }

    fn worth(&self, block: BlockId, _now: Instant) -> f32 {
        let entry = self.entry(block);
        match entry.queue {
            Queue::Small => f32::from(entry.uses),
            Queue::Main => f32::from(entry.uses) + 1.0,
        }
    }

    fn coldest(&self, count: usize) -> Vec<BlockId> {
        let mut blocks: Vec<BlockId> = self
            .small
            .iter()
            .chain(&self.main)
            .map(|(_, block)| *block)
            .collect();
        // Stable, so that of equals the older ones come first.
        blocks.sort_by_key(|block| {
            let entry = self.entry(*block);
            (
                entry.uses + u8::from(entry.queue == Queue::Main),
                entry.queue == Queue::Main,
            )
        });
        blocks.truncate(count);
        blocks
    }

    fn is_evictable(&self, block: BlockId) -> bool {
        let entry = self.entry(block);
        match entry.queue {
            Queue::Small => self.small.contains(&(entry.place, block)),
            Queue::Main => self.main.contains(&(entry.place, block)),
        }
    }
}
