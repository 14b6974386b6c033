//! The pool and the disk below it, as one node: what is where, and what the log says of it.
//!
//! Invariants:
//! - Each tier by itself is ancestor-closed, so what the node holds of a chain is the longer of the two tiers' runs.
//! - The log says `Stored` when the first tier gets a block, `Moved` when the fastest tier that holds it changes, and `Removed`
//!   when the last tier drops it. A block is stored after its parent and removed before it, over all tiers: whichever tier
//!   got the child had the parent, and keeps it for as long.
//!
//! Elsewhere: each tier's own slots (`table.rs`, `disk/table.rs`), the movement of bytes (`tiers.rs` of the crate).

use types::{BlockDescriptor, BlockEvent, BlockHash, Tier};

use super::{BlockTable, SlotState, TIER};
use crate::disk::format::Record;
use crate::disk::table::{DiskTable, Located, NewBlock, Reserved, SlotId};
use crate::log::SnapshotBlock;

/// What to do with a block that may be written to disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// Write it: it is pinned, which is no use of it, and has a slot.
    Write(BlockDescriptor, Reserved),
    /// Its parent is not on disk: that one first.
    ParentFirst(BlockHash),
    /// It is on disk or on its way there, or no longer in memory, or has no room.
    Nothing,
}

impl BlockTable {
    /// Puts a disk below the pool, with what its records say. Returns how many records were dropped.
    ///
    /// # Panics
    ///
    /// If there is one already.
    pub fn mount_disk(&mut self, capacity: u32, records: Vec<(SlotId, Record)>) -> usize {
        assert_eq!(self.disk.counts().capacity, 0, "a disk is mounted once");
        let mut disk = DiskTable::new(capacity);
        let (log, by_hash) = (&mut self.log, &self.by_hash);
        assert!(by_hash.is_empty(), "a disk is mounted before the pool is used");
        let dropped = disk.restore(records, |record| {
            log.append(BlockEvent::Stored {
                hash: record.hash,
                parent: record.parent,
                tier: Tier::Disk,
            })
        });
        self.disk = disk;
        dropped
    }

    /// The tier below.
    pub fn disk(&self) -> &DiskTable {
        &self.disk
    }

    /// The fastest tier that holds the block.
    pub fn tier_of(&self, hash: &BlockHash) -> Option<Tier> {
        if self.holds(*hash) {
            return Some(TIER);
        }
        self.disk.contains(hash).then_some(Tier::Disk)
    }

    /// Begins to write a block of the pool to disk, or says why not.
    pub fn begin_offload(&mut self, hash: &BlockHash) -> Offload {
        let Some(block) = self.by_hash.get(hash).copied() else {
            return Offload::Nothing;
        };
        if self.disk.contains_or_awaits(hash) {
            return Offload::Nothing;
        }
        let cached = self.cached(block);
        let follows_root = cached.parent.is_none();
        if !follows_root && !self.disk.contains(&cached.parent_hash) {
            return Offload::ParentFirst(cached.parent_hash);
        }
        let new = NewBlock {
            hash: *hash,
            parent: cached.parent_hash,
            follows_root,
            checksum: cached.checksum,
        };
        let by_hash = &self.by_hash;
        let Some(reserved) = self.disk.reserve(new, |hash| by_hash.contains_key(hash)) else {
            return Offload::Nothing;
        };
        if let Some(evicted) = reserved.evicted {
            self.announce_left_disk(evicted);
        }
        self.pin(block);
        Offload::Write(self.describe(block), reserved)
    }

    /// The block is on disk. `false` where its parent left the disk meanwhile, and the block with it.
    pub fn commit_offload(&mut self, slot: SlotId) -> bool {
        let Self {
            disk,
            log,
            by_hash,
            slots,
            ..
        } = self;
        disk.commit(slot, |record| {
            let in_pool = by_hash
                .get(&record.hash)
                .map(|block| &slots[block.0 as usize].state);
            match in_pool {
                Some(SlotState::Cached(cached)) => cached.stored_at,
                Some(SlotState::Free | SlotState::Owned | SlotState::Detached { .. }) | None => {
                    log.append(BlockEvent::Stored {
                        hash: record.hash,
                        parent: record.parent,
                        tier: Tier::Disk,
                    })
                }
            }
        })
    }

    /// The block was not written.
    pub fn abort_offload(&mut self, slot: SlotId) {
        self.disk.abort(slot);
    }

    /// Pins the blocks of the chain that are on disk, from its first one on.
    pub fn pin_on_disk(&mut self, chain: &[BlockHash]) -> Vec<Located> {
        self.disk.pin_run(chain)
    }

    /// Ends one pin of a block on disk.
    pub fn unpin_on_disk(&mut self, slot: SlotId) {
        self.disk.unpin(slot);
    }

    /// Drops a block and all that continues it from the disk. Returns how many they were.
    pub fn remove_from_disk(&mut self, hash: &BlockHash) -> usize {
        let removed = self.disk.remove(hash);
        for hash in &removed {
            self.announce_left_disk(*hash);
        }
        removed.len()
    }

    /// Slots of the disk whose records are to be cleared: see [`DiskTable::take_unclear`].
    pub fn take_unclear(&mut self, count: usize) -> Vec<SlotId> {
        self.disk.take_unclear(count)
    }

    /// A slot's record was cleared, or could not be.
    pub fn end_clearing(&mut self, slot: SlotId, cleared: bool) {
        if cleared {
            self.disk.cleared(slot);
        } else {
            self.disk.still_unclear(slot);
        }
    }

    /// The pool gets a block: gives the number of the log entry that first told of it.
    pub(super) fn announce_stored(&mut self, hash: BlockHash, parent: BlockHash) -> u64 {
        match self.disk.stored_at(&hash) {
            None => self.log.append(BlockEvent::Stored {
                hash,
                parent,
                tier: TIER,
            }),
            Some(stored_at) => {
                self.log.append(BlockEvent::Moved { hash, tier: TIER });
                stored_at
            }
        }
    }

    /// The pool has dropped a block.
    pub(super) fn announce_dropped(&mut self, hash: BlockHash) {
        let event = if self.disk.contains(&hash) {
            BlockEvent::Moved {
                hash,
                tier: Tier::Disk,
            }
        } else {
            BlockEvent::Removed { hash }
        };
        self.log.append(event);
    }

    /// The disk has dropped a block.
    fn announce_left_disk(&mut self, hash: BlockHash) {
        if !self.holds(hash) {
            self.log.append(BlockEvent::Removed { hash });
        }
    }

    /// The blocks that a snapshot lists beside those of the pool.
    pub(super) fn on_disk_only(&self) -> impl Iterator<Item = (u64, SnapshotBlock)> {
        let blocks = self.disk.blocks();
        let only = blocks.filter(|(_, record)| !self.holds(record.hash));
        only.map(|(stored_at, record)| {
            let listed = SnapshotBlock {
                hash: record.hash,
                parent: record.parent,
                tier: Tier::Disk,
            };
            (stored_at, listed)
        })
    }
}
