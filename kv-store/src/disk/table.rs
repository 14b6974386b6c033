//! Which slot of the disk holds what: the pure half of the disk tier.
//!
//! Invariants:
//! - A slot is `Free`, `Writing`, `Stored` or `Dying`. Only stored blocks are found.
//! - A stored block's parent is stored too, or is the root of a space: blocks leave the disk leaves first, and become stored
//!   only under a parent that is.
//! - A slot gets a writer only when nobody reads from it. The slot of a block that was dropped is `Dying` until its record
//!   on the disk is cleared, so that no restart brings the block back.
//!
//! The least recently used leaf leaves first. A block that is in memory too is passed over for a while: its uses are served
//! from memory, and are not seen here.
//!
//! Elsewhere: bytes and records (`file.rs`), what the node's log says of all this (`table/tiers.rs`).

use std::collections::{BTreeSet, HashMap};

use types::{BlockHash, Checksum};

use super::format::Record;

mod integrity;
mod restore;

/// How many blocks that are in memory too are passed over for one eviction. Bounds the time that one takes.
const SPARED_MAX: usize = 16;

/// A slot of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

/// The slots of one disk.
#[derive(Debug, Default)]
pub struct DiskTable {
    slots: Vec<Slot>,
    free: Vec<SlotId>,
    /// Blocks that are being written or stored.
    by_hash: HashMap<BlockHash, SlotId>,
    /// Stored blocks without readers and children, least recently used first.
    evictable: BTreeSet<(u64, SlotId)>,
    /// Dying slots without readers: their records are to be cleared.
    unclear: Vec<SlotId>,
    /// Counts uses; a block's `last_use` is a moment on this clock.
    clock: u64,
    /// Sequence of the newest record.
    sequence: u64,
    stored: usize,
    evictions: u64,
}

/// Where a block is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved {
    /// The slot, which is the caller's until [`DiskTable::commit`] or [`DiskTable::abort`].
    pub slot: SlotId,
    /// What the slot's record has to say.
    pub record: Record,
    /// The block that left for it.
    pub evicted: Option<BlockHash>,
}

/// A stored block, pinned for a reader until [`DiskTable::unpin`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Located {
    /// Where it lies.
    pub slot: SlotId,
    /// What it is.
    pub record: Record,
}

/// What is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewBlock {
    /// Identity of the block.
    pub hash: BlockHash,
    /// Identity of the block before it, or the root of its space.
    pub parent: BlockHash,
    /// Whether `parent` is a root.
    pub follows_root: bool,
    /// XXH3-64 of its bytes.
    pub checksum: Checksum,
}

/// Slots by use.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct DiskCounts {
    /// All slots.
    pub capacity: usize,
    /// Hold nothing.
    pub free: usize,
    /// Hold a complete block.
    pub stored: usize,
}

#[derive(Debug)]
enum Slot {
    Free,
    Writing(Writing),
    Stored(Stored),
    Dying { readers: usize },
}

#[derive(Debug)]
struct Writing {
    record: Record,
    /// Pinned, so that it does not leave before its child is there.
    parent: Option<SlotId>,
}

#[derive(Debug)]
struct Stored {
    record: Record,
    parent: Option<SlotId>,
    first_child: Option<SlotId>,
    siblings: Siblings,
    readers: usize,
    last_use: u64,
    /// Number of the log entry that told of the block.
    stored_at: u64,
}

/// A child's place in its parent's list, which makes dropping a block cost what depends on it, and no more.
#[derive(Debug, Clone, Copy, Default)]
struct Siblings {
    before: Option<SlotId>,
    after: Option<SlotId>,
}

impl Stored {
    fn is_evictable(&self) -> bool {
        self.readers == 0 && self.first_child.is_none()
    }
}

impl DiskTable {
    /// A table of free slots.
    pub fn new(capacity: u32) -> Self {
        Self {
            slots: (0..capacity).map(|_| Slot::Free).collect(),
            // Taken from the end: the file grows from its beginning.
            free: (0..capacity).rev().map(SlotId).collect(),
            ..Self::default()
        }
    }

    /// Slots by use.
    pub fn counts(&self) -> DiskCounts {
        DiskCounts {
            capacity: self.slots.len(),
            free: self.free.len(),
            stored: self.stored,
        }
    }

    /// Blocks that left to make room, so far.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Whether the block is stored.
    pub fn contains(&self, hash: &BlockHash) -> bool {
        self.find(hash).is_some()
    }

    /// Whether the block is stored, or about to be.
    pub fn contains_or_awaits(&self, hash: &BlockHash) -> bool {
        self.by_hash.contains_key(hash)
    }

    /// Leading blocks of the chain that are stored. Neither pins nor touches them.
    pub fn match_len(&self, chain: &[BlockHash]) -> usize {
        chain.partition_point(|hash| self.contains(hash))
    }

    /// The ancestors of a stored block, first block first, from the one after the nearest of them on that `is_above` holds.
    pub fn ancestors_after(&self, hash: &BlockHash, is_above: impl Fn(&BlockHash) -> bool) -> Vec<BlockHash> {
        let mut ancestors = Vec::new();
        let mut at = self.find(hash).and_then(|slot| self.stored(slot).parent);
        while let Some(slot) = at {
            let stored = self.stored(slot);
            if is_above(&stored.record.hash) {
                break;
            }
            ancestors.push(stored.record.hash);
            at = stored.parent;
        }
        ancestors.reverse();
        ancestors
    }

    /// What a stored block is.
    pub fn record(&self, hash: &BlockHash) -> Option<&Record> {
        self.find(hash).map(|slot| &self.stored(slot).record)
    }

    /// Number of the log entry that told of the block.
    pub fn stored_at(&self, hash: &BlockHash) -> Option<u64> {
        self.find(hash).map(|slot| self.stored(slot).stored_at)
    }

    /// Every stored block with the number of the log entry that told of it, in no order.
    pub fn blocks(&self) -> impl Iterator<Item = (u64, &Record)> {
        self.slots.iter().filter_map(|slot| match slot {
            Slot::Stored(stored) => Some((stored.stored_at, &stored.record)),
            Slot::Free | Slot::Writing(_) | Slot::Dying { .. } => None,
        })
    }

    /// Takes a slot for a block that is neither stored nor being written, and whose parent is stored. `None` where it
    /// is or its parent is not, or where every block is being read.
    ///
    /// `in_memory` says which blocks the node holds in memory too.
    pub fn reserve(&mut self, block: NewBlock, in_memory: impl Fn(&BlockHash) -> bool) -> Option<Reserved> {
        if self.contains_or_awaits(&block.hash) {
            return None;
        }
        let parent = match block.follows_root {
            true => None,
            false => Some(self.find(&block.parent)?),
        };
        // Before room is made, so that the parent is not what makes it.
        if let Some(parent) = parent {
            self.pin_slot(parent);
        }
        let mut evicted = None;
        if self.free.is_empty() {
            evicted = self.evict_one(in_memory);
        }
        let Some(slot) = self.free.pop() else {
            if let Some(parent) = parent {
                self.unpin(parent);
            }
            return None;
        };
        self.sequence += 1;
        let record = Record {
            hash: block.hash,
            parent: block.parent,
            follows_root: block.follows_root,
            checksum: block.checksum,
            sequence: self.sequence,
        };
        *self.slot_mut(slot) = Slot::Writing(Writing { record, parent });
        self.by_hash.insert(block.hash, slot);
        Some(Reserved {
            slot,
            record,
            evicted,
        })
    }

    /// Makes a block that was written, with its record, a stored one. `false` where its parent was dropped
    /// meanwhile: the block is dropped too.
    ///
    /// `announce` is told of a block that is stored, and gives the number of the log entry that tells of it.
    pub fn commit(&mut self, slot: SlotId, announce: impl FnOnce(&Record) -> u64) -> bool {
        let Writing { record, parent } = self.take_writing(slot);
        let orphaned = parent.is_some_and(|parent| matches!(self.slot(parent), Slot::Dying { .. }));
        if orphaned {
            self.by_hash.remove(&record.hash);
            *self.slot_mut(slot) = Slot::Dying { readers: 0 };
            self.unclear.push(slot);
        } else {
            self.store(slot, record, parent, announce(&record));
        }
        if let Some(parent) = parent {
            self.unpin(parent);
        }
        !orphaned
    }

    /// Gives up a block whose record was not written.
    pub fn abort(&mut self, slot: SlotId) {
        let Writing { record, parent } = self.take_writing(slot);
        self.by_hash.remove(&record.hash);
        // The record of the block that was here before may or may not be cleared.
        *self.slot_mut(slot) = Slot::Dying { readers: 0 };
        self.unclear.push(slot);
        if let Some(parent) = parent {
            self.unpin(parent);
        }
    }

    /// Pins the longest leading run of stored blocks for reading, and marks it as used.
    pub fn pin_run(&mut self, chain: &[BlockHash]) -> Vec<Located> {
        let found: Vec<SlotId> = chain.iter().map_while(|hash| self.find(hash)).collect();
        found
            .into_iter()
            .map(|slot| {
                self.pin_slot(slot);
                Located {
                    slot,
                    record: self.stored(slot).record,
                }
            })
            .collect()
    }

    /// Ends one pin.
    pub fn unpin(&mut self, slot: SlotId) {
        match self.slot_mut(slot) {
            Slot::Stored(stored) => {
                assert!(stored.readers > 0, "disk slot {} is not pinned", slot.0);
                stored.readers -= 1;
                if stored.is_evictable() {
                    let key = (stored.last_use, slot);
                    self.evictable.insert(key);
                }
            }
            Slot::Dying { readers } => {
                assert!(*readers > 0, "disk slot {} is not pinned", slot.0);
                *readers -= 1;
                if *readers == 0 {
                    self.unclear.push(slot);
                }
            }
            Slot::Free | Slot::Writing(_) => panic!("disk slot {} has no readers", slot.0),
        }
    }

    /// Drops a block and all that continues it. Returns what was dropped, children before their parents.
    pub fn remove(&mut self, hash: &BlockHash) -> Vec<BlockHash> {
        let Some(top) = self.find(hash) else {
            return Vec::new();
        };
        let mut removed = Vec::new();
        // Down to a leaf, which goes, and on with what it leaves, until the top has gone.
        let mut at = top;
        loop {
            let stored = self.stored(at);
            if let Some(child) = stored.first_child {
                at = child;
                continue;
            }
            let (parent, readers) = (stored.parent, stored.readers);
            removed.push(stored.record.hash);
            self.detach(at);
            *self.slot_mut(at) = Slot::Dying { readers };
            if readers == 0 {
                self.unclear.push(at);
            }
            if at == top {
                return removed;
            }
            at = parent.expect("whatever is below the top has a parent");
        }
    }

    /// Takes up to `count` slots whose records are to be cleared; give each back with [`DiskTable::cleared`].
    pub fn take_unclear(&mut self, count: usize) -> Vec<SlotId> {
        self.unclear.split_off(self.unclear.len().saturating_sub(count))
    }

    /// The slot's record is cleared: it is free.
    pub fn cleared(&mut self, slot: SlotId) {
        let dying = matches!(self.slot(slot), Slot::Dying { readers: 0 });
        assert!(dying, "disk slot {} is in use", slot.0);
        *self.slot_mut(slot) = Slot::Free;
        self.free.push(slot);
    }

    /// The slot's record could not be cleared: it is tried again.
    pub fn still_unclear(&mut self, slot: SlotId) {
        self.unclear.push(slot);
    }

    fn store(&mut self, slot: SlotId, record: Record, parent: Option<SlotId>, stored_at: u64) {
        self.clock += 1;
        let mut siblings = Siblings::default();
        if let Some(parent) = parent {
            let above = self.stored_mut(parent);
            siblings.after = above.first_child.replace(slot);
            let key = (above.last_use, parent);
            self.evictable.remove(&key);
        }
        if let Some(after) = siblings.after {
            self.stored_mut(after).siblings.before = Some(slot);
        }
        let last_use = self.clock;
        *self.slot_mut(slot) = Slot::Stored(Stored {
            record,
            parent,
            first_child: None,
            siblings,
            readers: 0,
            last_use,
            stored_at,
        });
        self.by_hash.insert(record.hash, slot);
        self.evictable.insert((last_use, slot));
        self.stored += 1;
    }

    /// Makes one slot free, if there is a leaf that nobody reads.
    fn evict_one(&mut self, in_memory: impl Fn(&BlockHash) -> bool) -> Option<BlockHash> {
        for _ in 0..SPARED_MAX {
            let (_, slot) = *self.evictable.first()?;
            if !in_memory(&self.stored(slot).record.hash) {
                break;
            }
            self.touch(slot);
        }
        let (_, slot) = *self.evictable.first()?;
        let hash = self.stored(slot).record.hash;
        self.detach(slot);
        // Its writer clears the record before it writes anything else there.
        *self.slot_mut(slot) = Slot::Free;
        self.free.push(slot);
        self.evictions += 1;
        Some(hash)
    }

    /// Takes a leaf out of the indexes and out of its parent's children. The caller says what its slot is next.
    fn detach(&mut self, slot: SlotId) {
        let stored = self.stored(slot);
        assert!(stored.first_child.is_none(), "blocks leave leaves first");
        let (hash, key) = (stored.record.hash, (stored.last_use, slot));
        let (parent, siblings) = (stored.parent, stored.siblings);
        self.by_hash.remove(&hash);
        self.evictable.remove(&key);
        self.stored -= 1;
        if let Some(after) = siblings.after {
            self.stored_mut(after).siblings.before = siblings.before;
        }
        if let Some(before) = siblings.before {
            self.stored_mut(before).siblings.after = siblings.after;
        } else if let Some(parent) = parent {
            let above = self.stored_mut(parent);
            above.first_child = siblings.after;
            if above.is_evictable() {
                let key = (above.last_use, parent);
                self.evictable.insert(key);
            }
        }
    }

    fn pin_slot(&mut self, slot: SlotId) {
        self.touch(slot);
        let stored = self.stored_mut(slot);
        stored.readers += 1;
        let key = (stored.last_use, slot);
        self.evictable.remove(&key);
    }

    /// Marks a block as used now.
    fn touch(&mut self, slot: SlotId) {
        self.clock += 1;
        let now = self.clock;
        let stored = self.stored_mut(slot);
        let before = (stored.last_use, slot);
        stored.last_use = now;
        if self.evictable.remove(&before) {
            self.evictable.insert((now, slot));
        }
    }

    fn find(&self, hash: &BlockHash) -> Option<SlotId> {
        let slot = *self.by_hash.get(hash)?;
        matches!(self.slot(slot), Slot::Stored(_)).then_some(slot)
    }

    fn take_writing(&mut self, slot: SlotId) -> Writing {
        match std::mem::replace(self.slot_mut(slot), Slot::Free) {
            Slot::Writing(writing) => writing,
            Slot::Free | Slot::Stored(_) | Slot::Dying { .. } => {
                panic!("disk slot {} has no writer", slot.0)
            }
        }
    }

    fn slot(&self, slot: SlotId) -> &Slot {
        &self.slots[slot.0 as usize]
    }

    fn slot_mut(&mut self, slot: SlotId) -> &mut Slot {
        &mut self.slots[slot.0 as usize]
    }

    fn stored(&self, slot: SlotId) -> &Stored {
        match self.slot(slot) {
            Slot::Stored(stored) => stored,
            Slot::Free | Slot::Writing(_) | Slot::Dying { .. } => {
                panic!("disk slot {} holds no block", slot.0)
            }
        }
    }

    fn stored_mut(&mut self, slot: SlotId) -> &mut Stored {
        match self.slot_mut(slot) {
            Slot::Stored(stored) => stored,
            Slot::Free | Slot::Writing(_) | Slot::Dying { .. } => {
                panic!("disk slot {} holds no block", slot.0)
            }
        }
    }
}

#[cfg(test)]
mod tests;
