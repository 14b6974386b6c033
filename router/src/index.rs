//! Which node holds which block, as the nodes' own logs tell it.
//!
//! Invariant: what [`PrefixIndex::match_prefix`] says is never more than what the events said. A node keeps no block whose ancestor
//! it has dropped, so a node that holds block `i` of a chain holds every block before it. The index therefore keeps blocks that
//! follow each other as one segment, and of each holder how far along it goes: a match costs a step for each holder,
//! however long the chain is and wherever holders stop. What the index has forgotten can only make it answer less.
//!
//! A block is known by 64 of the 128 bits of its hash. Two of 10 million blocks share them in one of 370,000 indexes, and a
//! new block of a prompt is taken for one of them in one of 600 million prompts of 3,000 blocks; that hint is then wrong.
//!
//! The index is a hint. A block may be gone, or never have been there, when a reader asks for it, which is then a miss and no
//! error: a reader names the whole hash, and what it reads is verified.
//! Pure: no clock, no I/O. Elsewhere: following the logs (`members.rs`), the use of matches (`placement.rs`).

mod eviction;
mod nodes;
mod segments;
mod table;

use types::{BlockEvent, BlockHash, NodeId, Tier};

use eviction::Eviction;
use nodes::Nodes;
use segments::Segments;
use table::{Place, Table, Vacancy};

/// Most (node, block) pairs that are remembered by default. At 32 tokens per block it stands for 64 million cached tokens, and with
/// at most 64 bytes for each block of a long chain bounds the index to some 122 MiB. A chain's beginning, and every branch, takes
/// up to 160 bytes more.
pub const ENTRIES_MAX_DEFAULT: usize = 2_000_000;

/// Events whose blocks are looked for together.
const FETCH_EVENTS: usize = 16;
/// Segments that every update looks at while some name nodes that are forgotten.
const SWEEP_STEP: usize = 1;
/// Blocks of a forgotten node that one look at a segment removes.
const SWEEP_BLOCKS: u32 = 8;
/// Forgotten nodes that segments may name. One more, and all segments are looked at at once.
const STALE_MAX: usize = 64;

/// Blocks by holder, for every node that was heard of.
#[derive(Debug)]
pub struct PrefixIndex {
    table: Table,
    segments: Segments,
    nodes: Nodes,
    /// Pairs of nodes that are known.
    entries: usize,
    /// Pairs of nodes that are forgotten, which are still to be removed.
    stale: usize,
    entries_max: usize,
    refused: u64,
    eviction: Eviction,
    /// The next segment to look at for forgotten nodes.
    sweep: u32,
}

/// A node and how many leading blocks of the chain asked for it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match<'a> {
    /// Who holds them.
    pub node: &'a NodeId,
    /// How many; at least 1.
    pub blocks: usize,
    /// How many of them are in memory. The rest, which follow them, are on its disk.
    pub in_memory: usize,
}

/// A block that a node stored.
#[derive(Debug, Clone, Copy)]
struct Stored {
    key: u64,
    parent: u64,
    in_memory: bool,
}

impl PrefixIndex {
    /// An empty index that remembers at most `entries_max` (node, block) pairs.
    pub fn new(entries_max: usize) -> Self {
        Self {
            table: Table::new(),
            segments: Segments::default(),
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
    /// block for which none can be is left out. Both are counted in [`PrefixIndex::refused`], as is what follows a block that
    /// is not known to be there.
    pub fn apply_all(&mut self, node: &NodeId, events: &[BlockEvent]) {
        let mut slot = self.nodes.slot(node);
        let mut last = None;
        for events in events.chunks(FETCH_EVENTS) {
            self.table.fetch(keys_of(events));
            for event in events {
                self.sweep(SWEEP_STEP);
                match *event {
                    BlockEvent::Stored { hash, parent, tier } => {
                        slot = slot.or_else(|| self.nodes.slot_or_new(node));
                        let block = Stored {
                            key: key_of(&hash),
                            parent: key_of(&parent),
                            in_memory: tier < Tier::Disk,
                        };
                        let stored = slot.and_then(|slot| self.store(slot, block, last));
                        self.refused += u64::from(stored.is_none());
                        last = stored.or(last);
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
            self.sweep(usize::MAX);
        }
    }

    /// How many leading blocks of the chain `hashes` each node holds, in no particular order. Nodes that hold none are left out.
    ///
    /// The cost is a look-up for every branch that the chain takes, and one step for every node that holds its beginning;
    /// where the chain is known only in part, also the logarithm of its length.
    pub fn match_prefix(&self, hashes: &[BlockHash]) -> Vec<Match<'_>> {
        let first = hashes.first().and_then(|hash| self.table.get(key_of(hash)));
        let Some(first) = first.filter(|place| place.at == 0) else {
            return Vec::new();
        };
        let root = self.segments.get(first.segment);
        let mut known = root.common(hashes);
        let reach = |most: usize, blocks: u32| most.min(blocks as usize);
        let mut matches: Vec<(usize, usize)> = root
            .runs
            .iter()
            .map(|run| (reach(known, run.blocks), reach(known, run.in_memory)))
            .collect();
        let mut number = first.segment;
        let mut at = known;
        while let Some(branch) = self.branch(hashes.get(at), number, known) {
            let segment = self.segments.get(branch);
            known = segment.common(&hashes[at..]);
            for run in &segment.runs {
                // Who lacks a block before has no use for those after it.
                if let Ok(place) = root.find(run.slot as usize)
                    && matches[place].0 == at
                {
                    if matches[place].1 == at {
                        matches[place].1 += reach(known, run.in_memory);
                    }
                    matches[place].0 += reach(known, run.blocks);
                }
            }
            (number, at) = (branch, at + known);
        }
        let mut found = Vec::with_capacity(matches.len());
        for (run, (blocks, in_memory)) in root.runs.iter().zip(matches) {
            if let Some(node) = self.nodes.id(run.slot as usize) {
                found.push(Match {
                    node,
                    blocks,
                    in_memory,
                });
            }
        }
        found
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
        let mut blocks = vec![0; self.nodes.len()];
        let mut keys = 0;
        for (number, segment) in self.segments.iter() {
            for (at, key) in (0u32..).zip(&segment.keys) {
                let segment = number;
                assert_eq!(self.table.get(*key), Some(Place { segment, at }));
            }
            keys += segment.keys.len();
            assert!(segment.runs.is_sorted_by(|a, b| a.slot < b.slot));
            for run in &segment.runs {
                assert!(run.in_memory <= run.blocks && run.blocks > 0);
                blocks[run.slot as usize] += run.blocks as usize;
            }
            let longest = segment.runs.iter().map(|run| run.blocks).max();
            assert_eq!(longest, Some(segment.len()));
        }
        assert_eq!(keys, self.table.check_integrity());
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
        assert!(self.occupied() <= self.entries_max);
    }

    /// Pairs that take room: those that are known, and those that are still to be removed.
    fn occupied(&self) -> usize {
        self.entries + self.stale
    }

    /// The segment that goes on with the block `hash` after `blocks` blocks of segment `number`.
    fn branch(&self, hash: Option<&BlockHash>, number: u32, blocks: usize) -> Option<u32> {
        let place = self.table.get(key_of(hash?))?;
        let after = Place {
            segment: number,
            at: blocks as u32 - 1,
        };
        (place.at == 0 && self.segments.link(place.segment) == Some(after)).then_some(place.segment)
    }

    /// Where a block that `slot` stored now is. `last` is where its last one is, which usually comes before. `None` if it is left out.
    fn store(&mut self, slot: usize, block: Stored, last: Option<Place>) -> Option<Place> {
        let Stored { key, parent, .. } = block;
        let before = last
            .filter(|place| self.segments.has(*place, parent))
            .or_else(|| self.table.get(parent));
        let next = before.and_then(|before| self.segments.next(before, key));
        let place = match next {
            Some(place) => place,
            None => match self.table.get_or_vacancy(key)? {
                Ok(place) => place,
                Err(vacancy) => return self.store_new(slot, block, before, vacancy),
            },
        };
        if place.at == 0 {
            self.segments
                .join(place.segment, before.map(|before| (before, parent)));
        }
        let segment = self.segments.get_mut(place.segment);
        segment.used = self.eviction.now();
        let held = segment.held(slot);
        if place.at < held {
            self.set_in_memory(slot, place, block.in_memory);
            return Some(place);
        }
        if place.at > held || self.is_full_for(key, parent, Some(place.segment)) {
            return None;
        }
        self.add(slot, place, block.in_memory);
        Some(place)
    }

    /// Stores a block that nobody holds.
    fn store_new(
        &mut self,
        slot: usize,
        block: Stored,
        before: Option<Place>,
        vacancy: Vacancy,
    ) -> Option<Place> {
        let Stored { key, parent, .. } = block;
        let keep = before.map(|place| place.segment);
        let goes_on = |place: Place| self.segments.get(place.segment).len() == place.at + 1;
        let lacks_parent =
            |place: Place| goes_on(place) && self.segments.get(place.segment).held(slot) <= place.at;
        if before.is_some_and(lacks_parent) {
            self.leave_out(key);
            return None;
        }
        if self.is_full_for(key, parent, keep) {
            return None;
        }
        let now = self.eviction.now();
        if let Some(before) = before {
            self.segments.get_mut(before.segment).used = now;
        }
        let place = self.segments.add(key, before.map(|before| (before, parent)));
        self.table.insert(vacancy, place);
        self.segments.get_mut(place.segment).used = now;
        self.add(slot, place, block.in_memory);
        Some(place)
    }

    /// `slot` holds one block more of a segment.
    fn add(&mut self, slot: usize, place: Place, in_memory: bool) {
        self.segments.get_mut(place.segment).extend(slot, in_memory);
        self.nodes.add(slot);
        self.entries += 1;
        self.eviction.tick();
    }

    fn set_in_memory(&mut self, slot: usize, place: Place, in_memory: bool) {
        let segment = self.segments.get_mut(place.segment);
        if let Ok(at) = segment.find(slot)
            && place.at < segment.runs[at].blocks
        {
            segment.runs[at].set_in_memory(place.at, in_memory);
        }
    }

    fn update(&mut self, slot: usize, key: u64, tier: Tier) {
        if let Some(place) = self.table.get(key) {
            self.set_in_memory(slot, place, tier < Tier::Disk);
        }
    }

    fn remove(&mut self, slot: usize, key: u64) {
        if let Some(place) = self.table.get(key)
            && let Ok(at) = self.segments.get(place.segment).find(slot)
        {
            self.shorten(place.segment, at, place.at);
            self.trim(place.segment);
        }
    }

    /// Ends a run of a segment after `blocks` blocks. The caller trims the segment.
    fn shorten(&mut self, number: u32, at: usize, blocks: u32) {
        let segment = self.segments.get_mut(number);
        let run = &mut segment.runs[at];
        let (slot, gone) = (run.slot as usize, run.shorten(blocks));
        if run.blocks == 0 {
            segment.runs.remove(at);
        }
        if self.nodes.subtract(slot, gone) {
            self.stale -= gone;
        } else {
            self.entries -= gone;
        }
    }

    /// Drops blocks of a segment that nobody holds any more.
    fn trim(&mut self, number: u32) {
        for key in self.segments.trim(number) {
            self.table.remove(key);
        }
    }

    /// Looks at up to `steps` segments for nodes that are forgotten, and removes some of what these hold.
    fn sweep(&mut self, steps: usize) {
        for _ in 0..steps {
            if self.stale == 0 {
                return;
            }
            if self.sweep >= self.segments.numbers() {
                self.sweep = 0;
            }
            let segment = self.segments.get(self.sweep);
            let is_stale = |slot: u32| self.nodes.id(slot as usize).is_none();
            match segment.runs.iter().position(|run| is_stale(run.slot)) {
                Some(at) => {
                    let left = segment.runs[at].blocks.saturating_sub(SWEEP_BLOCKS);
                    self.shorten(self.sweep, at, left);
                    self.trim(self.sweep);
                }
                None => self.sweep += 1,
            }
        }
    }
}

/// What a block is known by.
fn key_of(hash: &BlockHash) -> u64 {
    let BlockHash([a, b, c, d, e, f, g, h, ..]) = *hash;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// The blocks that events name, but for those before them that are named already.
fn keys_of(events: &[BlockEvent]) -> impl Iterator<Item = u64> {
    let before = match events.first() {
        Some(BlockEvent::Stored { parent, .. }) => Some(key_of(parent)),
        _ => None,
    };
    let named = events.iter().map(|event| key_of(hash_of(event)));
    before.into_iter().chain(named)
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
