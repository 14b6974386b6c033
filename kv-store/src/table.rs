//! A node's table of KV blocks: which slot of the pool holds what, who uses it, and what may be evicted.
//!
//! Invariants:
//! - A slot is `Free`, `Owned` by one writer, or `Cached`: complete, named by its hash and never written again.
//! - A cached block's parent is cached too, or is the root of a space. So blocks are evicted leaves first, and how
//!   much of a prefix is held is always a leading run.
//! - No tenant has more blocks cached than its quota allows.
//! - A block is evicted only while nobody pins it. Leases are pins that end by themselves; they bound
//!   memory, and no reader's safety rests on their clock.
//! - Every change of what is held is in the log before the call returns.
//!
//! A pure state machine: callers pass `now`, and nothing here awaits, logs or touches the bytes.
//! Misuse by a caller (unpinning what is not pinned, freeing what it does not own) is a defect that would lead
//! to shared memory being overwritten, so it panics.
//!
//! Elsewhere: whose block is evicted (`eviction.rs`) and which (`policy.rs` of the crate), guards that make misuse impossible
//! (`store.rs`), remote writers (`put.rs`), bytes (`transfer`).

use std::collections::HashMap;
use std::time::Instant;

use types::{BlockDescriptor, BlockHash, BlockId, Checksum, ErrorCode, Generation, Tier};

use crate::digest::DigestBuild;
use crate::disk::table::DiskTable;
use crate::expiring::Expiring;
use crate::log::Log;
use crate::policy::{Eviction, Policy, Stored};

mod eviction;
mod integrity;
mod leases;
mod moves;
mod snapshot;
mod tenants;
mod tiers;

pub use eviction::Victim;
pub use moves::{Path, Ranked};
pub use snapshot::SnapshotDraft;
pub use tenants::{ACCOUNTS_MAX, LIMITED_MAX, TenantEvents, TenantLimit, TenantLimits, TenantUsage};
pub use tiers::Offload;

use tenants::{TenantId, Tenants};

/// Where every block of this table's slots lies. The pool is host memory; the disk below it has its own slots.
const TIER: Tier = Tier::Host;

/// All that a node knows about the blocks in its pool.
#[derive(Debug)]
pub struct BlockTable {
    slots: Vec<Slot>,
    /// Taken from the end, so that memory which is warm is used again first.
    free: Vec<BlockId>,
    by_hash: HashMap<BlockHash, BlockId, DigestBuild>,
    /// Chooses among cached blocks without pins and without children.
    policy: Box<dyn Policy>,
    tenants: Tenants,
    owned: usize,
    pinned: usize,
    /// Cached blocks that neither are pinned nor have a pinned descendant: all of them could be evicted.
    reclaimable: usize,
    leases: Expiring<Vec<BlockId>>,
    /// The tier below. Without slots where the node has no disk.
    disk: DiskTable,
    log: Log,
    evictions: u64,
}

/// The bounds of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableLimits {
    /// Slots of the pool.
    pub capacity: usize,
    /// Entries of the log that are kept.
    pub log_entries_max: usize,
    /// Leases open at a time.
    pub leases_max: usize,
    /// Where lease ids start: see [`Expiring::new`].
    pub first_lease: u64,
    /// Which block goes when memory is short.
    pub eviction: Eviction,
}

/// Slots by what they are used for.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// All slots.
    pub capacity: usize,
    /// Hold nothing.
    pub free: usize,
    /// Being written.
    pub owned: usize,
    /// Hold a complete block.
    pub cached: usize,
    /// Cached blocks with at least one pin.
    pub pinned: usize,
    /// Cached blocks that can be evicted on demand.
    pub reclaimable: usize,
    /// Leases that are open.
    pub leases: usize,
}

/// What blocks are leased for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A request needs them, which is a use.
    Request,
    /// They go to another node, which says nothing about who will need them.
    Move,
}

/// What became of a block that was committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Committed {
    /// The slot now holds the block, with one pin for the caller.
    Stored(BlockDescriptor),
    /// The hash was held already. That block has one pin more for the caller; the caller still owns its slot.
    Duplicate(BlockDescriptor),
    /// The parent is not held, so the block cannot be found by its prefix. The caller still owns its slot.
    Orphan,
    /// Its tenant is at its quota and uses all of it. The caller still owns its slot.
    OverQuota,
}

/// What comes before a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// Nothing: this is the root of a space.
    Root(BlockHash),
    /// The block with this hash.
    Block(BlockHash),
}
/// The pool cannot give so many blocks, whatever is evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{needed} blocks are needed, but {available} of {capacity} are free or evictable")]
pub struct OutOfBlocks {
    /// Blocks asked for.
    pub needed: usize,
    /// Blocks that could be had.
    pub available: usize,
    /// Blocks of the pool.
    pub capacity: usize,
}

impl OutOfBlocks {
    /// What the caller can do: wait for others to end, unless the pool is too small for ever.
    pub fn code(&self) -> ErrorCode {
        if self.needed > self.capacity {
            ErrorCode::Invalid
        } else {
            ErrorCode::Overloaded
        }
    }
}

impl From<OutOfBlocks> for types::Error {
    fn from(error: OutOfBlocks) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

#[derive(Debug)]
struct Slot {
    generation: Generation,
    state: SlotState,
}

#[derive(Debug)]
enum SlotState {
    Free,
    Owned,
    Cached(Cached),
    /// No longer found by its hash, but still read by those who had found it. Freed with its last pin.
    Detached {
        pins: u32,
    },
}

#[derive(Debug)]
struct Cached {
    hash: BlockHash,
    checksum: Checksum,
    parent_hash: BlockHash,
    /// `None` where the parent is a root.
    parent: Option<BlockId>,
    /// Cached blocks whose parent this is.
    children: u32,
    pins: u32,
    /// Children that are held. A block is held if it is pinned or has a held child.
    held_children: u32,
    /// Blocks before it.
    depth: u32,
    /// Number of the log entry that announced it. Parents have lower ones than their children.
    stored_at: u64,
    /// Whose it is.
    tenant: TenantId,
}

impl Cached {
    fn is_held(&self) -> bool {
        self.pins > 0 || self.held_children > 0
    }

    fn is_evictable(&self) -> bool {
        self.pins == 0 && self.children == 0
    }
}

impl BlockTable {
    /// A table of free slots.
    pub fn new(limits: TableLimits) -> Self {
        let TableLimits {
            capacity,
            log_entries_max,
            leases_max,
            first_lease,
            eviction,
        } = limits;
        let ids = (0..u32::try_from(capacity).expect("a pool has at most 2^32 blocks")).map(BlockId);
        Self {
            slots: ids
                .clone()
                .map(|_| Slot {
                    generation: Generation::default(),
                    state: SlotState::Free,
                })
                .collect(),
            free: ids.rev().collect(),
            by_hash: HashMap::default(),
            policy: eviction.policy(capacity),
            tenants: Tenants::new(),
            owned: 0,
            pinned: 0,
            reclaimable: 0,
            leases: Expiring::new(leases_max, first_lease),
            disk: DiskTable::default(),
            log: Log::new(log_entries_max),
            evictions: 0,
        }
    }

    /// Slots by use.
    pub fn counts(&self) -> Counts {
        Counts {
            capacity: self.slots.len(),
            free: self.free.len(),
            owned: self.owned,
            cached: self.by_hash.len(),
            pinned: self.pinned,
            reclaimable: self.reclaimable,
            leases: self.leases.len(),
        }
    }

    /// Blocks that [`BlockTable::allocate`] can give now.
    pub fn available(&self) -> usize {
        self.free.len() + self.reclaimable
    }

    /// Whether each block is held. Neither pins nor touches them.
    pub fn exists(&self, hashes: &[BlockHash]) -> Vec<bool> {
        hashes
            .iter()
            .map(|hash| self.by_hash.contains_key(hash))
            .collect()
    }

    /// Blocks evicted so far.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// What changed.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Leading blocks of the chain that are held. Neither pins nor touches them.
    pub fn match_len(&self, chain: &[BlockHash]) -> usize {
        chain.partition_point(|hash| self.by_hash.contains_key(hash))
    }

    /// Pins the longest leading run of held blocks, and marks it as used.
    pub fn match_prefix(&mut self, hashes: &[BlockHash], now: Instant) -> Vec<BlockDescriptor> {
        let held = self.pin_run(hashes);
        let run: Vec<BlockId> = held.iter().map(|held| held.block).collect();
        self.policy.used(&run, now);
        held
    }

    /// Pins the longest leading run of held blocks to look at them or to move them, which is no use of them.
    pub fn pin_run(&mut self, hashes: &[BlockHash]) -> Vec<BlockDescriptor> {
        let held: Vec<BlockId> = hashes
            .iter()
            .map_while(|hash| self.by_hash.get(hash).copied())
            .collect();
        for block in &held {
            self.pin(*block);
        }
        held.into_iter().map(|block| self.describe(block)).collect()
    }

    /// Hands out `count` slots for writing, or none. Where too few are free, evicts the leaves that the
    /// policy chooses. Every slot's generation is a new one.
    pub fn allocate(&mut self, count: usize, now: Instant) -> Result<Vec<BlockId>, OutOfBlocks> {
        if count > self.available() {
            return Err(OutOfBlocks {
                needed: count,
                available: self.available(),
                capacity: self.slots.len(),
            });
        }
        while self.free.len() < count {
            self.evict_one(now);
        }
        let blocks = self.free.split_off(self.free.len() - count);
        for block in &blocks {
            let slot = self.slot_mut(*block);
            slot.generation = slot.generation.next();
            slot.state = SlotState::Owned;
        }
        self.owned += count;
        Ok(blocks)
    }

    /// Takes a slot back from its writer.
    pub fn free(&mut self, block: BlockId) {
        self.assert_owned(block);
        self.slot_mut(block).state = SlotState::Free;
        self.owned -= 1;
        self.free.push(block);
    }

    /// Makes an owned slot a cached block with one pin, if its hash is new and its parent is held.
    pub fn commit(
        &mut self,
        block: BlockId,
        parent: Parent,
        hash: BlockHash,
        checksum: Checksum,
        now: Instant,
    ) -> Committed {
        self.assert_owned(block);
        if let Some(existing) = self.by_hash.get(&hash).copied() {
            self.pin(existing);
            self.policy.used(&[existing], now);
            return Committed::Duplicate(self.describe(existing));
        }
        let (parent_hash, parent) = match parent {
            Parent::Root(root) => (root, None),
            Parent::Block(parent) => match self.by_hash.get(&parent).copied() {
                Some(held) => (parent, Some(held)),
                None => return Committed::Orphan,
            },
        };
        let Some((tenant, depth)) = self.make_place(parent_hash, parent, now) else {
            return Committed::OverQuota;
        };
        let stored_at = self.announce_stored(hash, parent_hash);
        self.slot_mut(block).state = SlotState::Cached(Cached {
            hash,
            checksum,
            parent_hash,
            parent,
            children: 0,
            pins: 1,
            held_children: 0,
            depth,
            stored_at,
            tenant,
        });
        self.by_hash.insert(hash, block);
        self.owned -= 1;
        self.pinned += 1;
        self.tenants.stored(tenant);
        if let Some(parent) = parent {
            self.hold_from(parent);
        }
        self.policy.stored(
            Stored {
                block,
                hash,
                parent,
                depth,
            },
            now,
        );
        Committed::Stored(self.describe(block))
    }

    /// Gives a block a place after its parent and within its tenant's quota: says whose it is, and its depth.
    fn make_place(
        &mut self,
        root: BlockHash,
        parent: Option<BlockId>,
        now: Instant,
    ) -> Option<(TenantId, u32)> {
        let (tenant, depth) = match parent {
            None => (self.tenants.of_root(root), 0),
            Some(parent) => {
                let cached = self.cached_mut(parent);
                let was_evictable = cached.is_evictable();
                cached.children += 1;
                let place = (cached.tenant, cached.depth + 1);
                // Before anything is evicted: the parent must stay.
                if was_evictable {
                    self.keep_from_eviction(parent);
                }
                place
            }
        };
        if !self.tenants.is_full(tenant) {
            return Some((tenant, depth));
        }
        if self.evict_own(tenant, now) {
            if self.tenants.is_full(tenant) {
                // Its quota became smaller: two go for each that comes.
                self.evict_own(tenant, now);
            }
            // The account was closed if that was its last block.
            let tenant = if parent.is_none() {
                self.tenants.of_root(root)
            } else {
                tenant
            };
            return Some((tenant, depth));
        }
        self.tenants.events.refused += 1;
        self.tenants.close_if_empty(tenant);
        if let Some(parent) = parent {
            let cached = self.cached_mut(parent);
            cached.children -= 1;
            if cached.is_evictable() {
                self.let_be_evicted(parent, now);
            }
        }
        None
    }

    /// Ends one pin of a block that a request used. The end of a use is a use.
    pub fn unpin(&mut self, block: BlockId, now: Instant) {
        self.end_pin(block, Purpose::Request, now);
    }

    /// Ends one pin of a block that was only looked at or moved.
    pub fn unpin_unused(&mut self, block: BlockId, now: Instant) {
        self.end_pin(block, Purpose::Move, now);
    }

    fn end_pin(&mut self, block: BlockId, purpose: Purpose, now: Instant) {
        if self.unpin_detached(block) {
            return;
        }
        let cached = self.cached_mut(block);
        assert!(cached.pins > 0, "block {block} is not pinned");
        cached.pins -= 1;
        if cached.pins > 0 {
            return;
        }
        let (evictable, held) = (cached.is_evictable(), cached.is_held());
        self.pinned -= 1;
        if purpose == Purpose::Request {
            self.policy.unpinned(block, now);
        }
        if evictable {
            self.let_be_evicted(block, now);
        }
        if !held {
            self.let_go(block);
        }
    }

    /// The current use of a slot.
    pub fn generation(&self, block: BlockId) -> Generation {
        self.slot(block).generation
    }

    fn pin(&mut self, block: BlockId) {
        let cached = self.cached_mut(block);
        let (was_evictable, was_held) = (cached.is_evictable(), cached.is_held());
        cached.pins += 1;
        if cached.pins == 1 {
            self.pinned += 1;
        }
        if was_evictable {
            self.keep_from_eviction(block);
        }
        if !was_held {
            self.reclaimable -= 1;
            if let Some(parent) = self.cached(block).parent {
                self.hold_from(parent);
            }
        }
    }

    /// A child of `parent` has become held: so have the ancestors that were not. Amortised constant, since a chain is
    /// pinned from its root on.
    fn hold_from(&mut self, parent: BlockId) {
        let mut next = Some(parent);
        while let Some(block) = next {
            let cached = self.cached_mut(block);
            let was_held = cached.is_held();
            cached.held_children += 1;
            next = cached.parent;
            if was_held {
                return;
            }
            self.reclaimable -= 1;
        }
    }

    /// `block` is no longer held: neither are the ancestors that were held through it alone.
    fn let_go(&mut self, block: BlockId) {
        let mut block = block;
        loop {
            self.reclaimable += 1;
            let Some(parent) = self.cached(block).parent else {
                return;
            };
            let cached = self.cached_mut(parent);
            cached.held_children -= 1;
            if cached.is_held() {
                return;
            }
            block = parent;
        }
    }

    fn describe(&self, block: BlockId) -> BlockDescriptor {
        let cached = self.cached(block);
        BlockDescriptor {
            hash: cached.hash,
            block,
            generation: self.slot(block).generation,
            checksum: cached.checksum,
        }
    }

    fn assert_owned(&self, block: BlockId) {
        let owned = matches!(self.slot(block).state, SlotState::Owned);
        assert!(owned, "block {block} has no writer");
    }

    fn slot(&self, block: BlockId) -> &Slot {
        &self.slots[block.0 as usize]
    }

    fn slot_mut(&mut self, block: BlockId) -> &mut Slot {
        &mut self.slots[block.0 as usize]
    }

    fn cached(&self, block: BlockId) -> &Cached {
        match &self.slot(block).state {
            SlotState::Cached(cached) => cached,
            SlotState::Free | SlotState::Owned | SlotState::Detached { .. } => {
                panic!("block {block} is not cached")
            }
        }
    }

    fn cached_mut(&mut self, block: BlockId) -> &mut Cached {
        match &mut self.slot_mut(block).state {
            SlotState::Cached(cached) => cached,
            SlotState::Free | SlotState::Owned | SlotState::Detached { .. } => {
                panic!("block {block} is not cached")
            }
        }
    }
}

#[cfg(test)]
mod tests;
