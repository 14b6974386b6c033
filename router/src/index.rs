//! Which node holds which block, as the nodes' own logs tell it.
//!
//! Invariant: what [`PrefixIndex::match_prefix`] says is never more than what the events said. A node keeps no block whose ancestor
//! it has dropped, so a node that holds block `i` of a chain holds every block before it; the index leans on this twice: a
//! match is a search and not a scan, and an entry that the index has forgotten can only make it answer less.
//!
//! A block is known by 64 of the 128 bits of its hash. Two of 10 million blocks share them in one of 370,000 indexes, and a
//! new block of a prompt is taken for one of them in one of 600 million prompts of 3,000 blocks; that hint is then wrong.
//!
//! The index is a hint. A block may be gone, or never have been there, when a reader asks for it, which is then a miss and no
//! error: a reader names the whole hash, and what it reads is verified.
//! Pure: no clock, no I/O. Elsewhere: following the logs (`members.rs`), the use of matches (`placement.rs`).

mod eviction;
mod holders;
mod nodes;
mod search;
mod table;

use types::{BlockEvent, BlockHash, NodeId, Tier};

use eviction::Eviction;
use holders::{Holders, Sets, members};
use nodes::Nodes;
use search::Search;
use table::{Entry, Place, Table};

/// Most (node, block) pairs that are remembered by default. With at most 55 bytes each, up to some 400 nodes, this bounds the index
/// to some 105 MiB, and at 32 tokens per block it stands for 64 million cached tokens.
pub const ENTRIES_MAX_DEFAULT: usize = 2_000_000;

/// Events whose blocks are looked for together.
const FETCH_EVENTS: usize = 16;
/// Entries that every update looks at while blocks name nodes that are forgotten.
const SWEEP_STEP: usize = 4;
/// Forgotten nodes that blocks may name. One more, and all entries are looked at at once.
const STALE_MAX: usize = 64;

/// Blocks by holder, for every node that was heard of.
#[derive(Debug)]
pub struct PrefixIndex {
    table: Table,
    sets: Sets,
    nodes: Nodes,
    /// Pairs of nodes that are known.
    entries: usize,
    /// Pairs of nodes that are forgotten, which are still to be removed.
    stale: usize,
    entries_max: usize,
    refused: u64,
    eviction: Eviction,
    /// The next entry to look at for forgotten nodes.
    sweep: u64,
}

/// A node and how many leading blocks of the chain asked for it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match {
    /// Who holds them.
    pub node: NodeId,
    /// How many; at least 1.
    pub blocks: usize,
    /// How many of them are in memory. The rest, which follow them, are on its disk.
    pub in_memory: usize,
}

impl PrefixIndex {
    /// An empty index that remembers at most `entries_max` (node, block) pairs.
    pub fn new(entries_max: usize) -> Self {
        Self {
            table: Table::new(),
            sets: Sets::new(),
            nodes: Nodes::default(),
            entries: 0,
            stale: 0,
            entries_max,
            refused: 0,
            eviction: Eviction::new(entries_max),
            sweep: 0,
        }
    }

    /// Takes in one event of `node`'s log, like [`PrefixIndex::apply_all`].
    pub fn apply(&mut self, node: &NodeId, event: &BlockEvent) {
        self.apply_all(node, std::slice::from_ref(event));
    }

    /// Takes in events of `node`'s log. Near the bound, ends of chains that were stored long ago are forgotten for new blocks; a
    /// block for which none can be is left out. Both are counted in [`PrefixIndex::refused`].
    pub fn apply_all(&mut self, node: &NodeId, events: &[BlockEvent]) {
        let mut slot = self.nodes.slot(node);
        for events in events.chunks(FETCH_EVENTS) {
            self.table
                .fetch(events.iter().map(|event| key_of(hash_of(event))));
            for event in events {
                match *event {
                    BlockEvent::Stored { hash, parent, tier } => {
                        slot = slot.or_else(|| self.slot_of(node));
                        match slot {
                            Some(slot) => self.insert(slot, key_of(&hash), key_of(&parent), tier),
                            None => self.refused += 1,
                        }
                    }
                    BlockEvent::Moved { hash, tier } => {
                        if let Some(slot) = slot {
                            self.update(slot, key_of(&hash), tier);
                        }
                    }
                    BlockEvent::Removed { hash } => {
                        if let Some(slot) = slot {
                            self.remove(slot, key_of(&hash));
                        }
                    }
                }
                self.sweep(SWEEP_STEP);
            }
        }
    }

    /// Forgets every block of `node`: its epoch changed, or a snapshot is about to replace what was known. What it holds is removed
    /// bit by bit by the updates that follow, and named in no match from now on.
    pub fn reset(&mut self, node: &NodeId) {
        let blocks = self.nodes.forget(node);
        self.entries -= blocks;
        self.stale += blocks;
        if self.nodes.stale_count() > STALE_MAX {
            self.sweep = 0;
            self.sweep(usize::MAX);
        }
    }

    /// How many leading blocks of the chain `hashes` each node holds, longest first, then by name. Nodes that hold none are
    /// left out.
    ///
    /// The cost is the logarithm of the chain's length in look-ups, for every length at which nodes' runs end, and one step
    /// for every node that holds something.
    pub fn match_prefix(&self, hashes: &[BlockHash]) -> Vec<Match> {
        let mut found = Search::run(&self.table, &self.sets, hashes, self.nodes.live());
        for equal in found.runs.chunk_by_mut(|a, b| a.0 == b.0) {
            equal.sort_unstable_by_key(|(_, slot)| self.nodes.rank_of(*slot));
        }
        let matches = found.runs.iter().filter_map(|(blocks, slot)| {
            Some(Match {
                node: self.nodes.id(*slot)?.clone(),
                blocks: *blocks,
                in_memory: found.in_memory[*slot],
            })
        });
        matches.collect()
    }

    /// Blocks of `node` that are known.
    pub fn blocks(&self, node: &NodeId) -> usize {
        self.nodes.slot(node).map_or(0, |slot| self.nodes.blocks(slot))
    }

    /// (node, block) pairs that are known.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// (node, block) pairs that were forgotten or left out for lack of room, ever.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Property tests call this after every step.
    pub fn check_integrity(&self) {
        self.table.check_integrity();
        let mut blocks = vec![0; self.nodes.len()];
        let mut bits = vec![0; 2 * self.sets.words()];
        for entry in self.table.iter() {
            self.sets.load(entry.holders, &mut bits);
            let (held, in_memory) = bits.split_at(self.sets.words());
            assert!(in_memory.iter().zip(held).all(|(fast, held)| fast & !held == 0));
            members(held).for_each(|slot| blocks[slot] += 1);
        }
        let (mut live, mut stale) = (0, 0);
        for (slot, blocks) in blocks.into_iter().enumerate() {
            assert_eq!(blocks, self.nodes.blocks(slot));
            let of = if self.nodes.id(slot).is_some() {
                &mut live
            } else {
                &mut stale
            };
            *of += blocks;
        }
        assert_eq!((live, stale), (self.entries, self.stale));
        assert!(self.entries + self.stale <= self.entries_max);
    }

    fn slot_of(&mut self, node: &NodeId) -> Option<usize> {
        let slot = self.nodes.slot_or_new(node)?;
        self.sets.widen(self.nodes.len());
        Some(slot)
    }

    fn insert(&mut self, slot: usize, key: u64, parent: u64, tier: Tier) {
        let in_memory = tier < Tier::Disk;
        let now = self.eviction.now();
        if let Some(entry) = self.table.get_mut(key) {
            entry.used = now;
            if self.sets.get(entry.holders, slot).is_some() {
                self.sets.insert(&mut entry.holders, slot, in_memory);
                return;
            }
        }
        if self.is_full_for(key, parent) || !self.add_holder(slot, key, parent, in_memory) {
            self.refused += 1;
            return;
        }
        self.nodes.add(slot);
        self.entries += 1;
        self.eviction.tick();
    }

    /// Adds a holder, and the block with its first one. Whether there was room.
    fn add_holder(&mut self, slot: usize, key: u64, parent: u64, in_memory: bool) -> bool {
        let place = match self.table.find(key) {
            Ok(place) => {
                let holders = &mut self.table.at_mut(place).holders;
                self.sets.insert(holders, slot, in_memory);
                return true;
            }
            Err(place) => place,
        };
        let used = self.eviction.now();
        let entry = Entry {
            key,
            parent,
            holders: Holders::one(slot, in_memory),
            children: 0,
            used,
        };
        let has_room = self.table.insert(place, entry);
        if has_room && let Some(parent) = self.table.get_mut(parent) {
            parent.children = parent.children.saturating_add(1);
            parent.used = used;
        }
        has_room
    }

    fn update(&mut self, slot: usize, key: u64, tier: Tier) {
        if let Some(entry) = self.table.get_mut(key)
            && self.sets.get(entry.holders, slot).is_some()
        {
            self.sets.insert(&mut entry.holders, slot, tier < Tier::Disk);
        }
    }

    fn remove(&mut self, slot: usize, key: u64) {
        if let Ok(place) = self.table.find(key)
            && self.sets.get(self.table.at(place).holders, slot).is_some()
        {
            self.remove_holder(place, slot);
        }
    }

    /// Removes one holder, and the block with its last one.
    fn remove_holder(&mut self, place: Place, slot: usize) {
        let entry = self.table.at_mut(place);
        self.sets.remove(&mut entry.holders, slot);
        let (holders, parent) = (entry.holders, entry.parent);
        if self.nodes.subtract(slot) {
            self.stale -= 1;
        } else {
            self.entries -= 1;
        }
        if holders.is_empty() {
            self.remove_block(place, parent);
        }
    }

    /// Removes a block that nobody holds.
    fn remove_block(&mut self, place: Place, parent: u64) {
        self.table.remove(place);
        if let Some(parent) = self.table.get_mut(parent) {
            // A count that is full has lost its meaning; one that is zero never counted this child.
            if parent.children < u16::MAX {
                parent.children = parent.children.saturating_sub(1);
            }
        }
    }

    /// Looks at up to `steps` entries for nodes that are forgotten, and removes these.
    fn sweep(&mut self, steps: usize) {
        for _ in 0..steps {
            if self.stale == 0 {
                return;
            }
            let Some(place) = self.table.next(self.sweep) else {
                self.sweep = 0;
                continue;
            };
            let Entry { key, holders, .. } = *self.table.at(place);
            self.sweep = key.wrapping_add(1);
            if self.sets.count_among(holders, self.nodes.stale()) > 0 {
                self.drop_holders(place, |nodes, slot| nodes.id(slot).is_none());
            }
        }
    }

    /// Removes those holders of a block that `goes` names.
    fn drop_holders(&mut self, place: Place, goes: impl Fn(&Nodes, usize) -> bool) {
        let mut bits = vec![0; 2 * self.sets.words()];
        self.sets.load(self.table.at(place).holders, &mut bits);
        for slot in members(&bits[..self.sets.words()]) {
            if goes(&self.nodes, slot) {
                self.remove_holder(place, slot);
            }
        }
    }
}

/// What a block is known by.
fn key_of(hash: &BlockHash) -> u64 {
    let BlockHash([a, b, c, d, e, f, g, h, ..]) = *hash;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

fn hash_of(event: &BlockEvent) -> &BlockHash {
    match event {
        BlockEvent::Stored { hash, .. } | BlockEvent::Moved { hash, .. } | BlockEvent::Removed { hash } => {
            hash
        }
    }
}

#[cfg(test)]
mod tests;
