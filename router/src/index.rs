//! Which node holds which block, as the nodes' own logs tell it.
//!
//! Invariant: what [`PrefixIndex::match_prefix`] says is never more than what the events said. A node keeps no block whose ancestor
//! it has dropped, so a node that holds block `i` of a chain holds every block before it; the index leans on this twice: a
//! match is a search and not a scan, and an entry that the index had no room for can only make it answer less.
//!
//! The index is a hint. A block may be gone when a reader asks for it, which is then a miss and no error.
//! Pure: no clock, no I/O. Elsewhere: following the logs (`members.rs`), the use of matches (`placement.rs`).

mod node_set;

use std::collections::HashMap;

use types::{BlockEvent, BlockHash, NodeId, Tier};

use node_set::NodeSet;

/// Most (node, block) pairs that are remembered by default. With 100 bytes each this bounds the index to some 200 MiB, and
/// at 32 tokens per block it stands for 64 million cached tokens.
pub const ENTRIES_MAX_DEFAULT: usize = 2_000_000;

/// Blocks by holder, for every node that was heard of.
#[derive(Debug)]
pub struct PrefixIndex {
    holders: HashMap<BlockHash, NodeSet>,
    nodes: Vec<Option<Indexed>>,
    slots: HashMap<NodeId, usize>,
    entries: usize,
    entries_max: usize,
    refused: u64,
}

#[derive(Debug)]
struct Indexed {
    id: NodeId,
    /// Its blocks and the fastest tier that each is in.
    blocks: HashMap<BlockHash, Tier>,
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
            holders: HashMap::new(),
            nodes: Vec::new(),
            slots: HashMap::new(),
            entries: 0,
            entries_max,
            refused: 0,
        }
    }

    /// Takes in one event of `node`'s log. At the bound, new blocks are left out and counted in
    /// [`PrefixIndex::refused`], so what is known stays true; evictions on the nodes make room again.
    pub fn apply(&mut self, node: &NodeId, event: &BlockEvent) {
        match event {
            BlockEvent::Stored { hash, tier, .. } => self.insert(node, *hash, *tier),
            BlockEvent::Moved { hash, tier } => {
                let slot = self.slots.get(node);
                let indexed = slot.and_then(|slot| self.nodes[*slot].as_mut());
                if let Some(known) = indexed.and_then(|indexed| indexed.blocks.get_mut(hash)) {
                    *known = *tier;
                }
            }
            BlockEvent::Removed { hash } => self.remove(node, *hash),
        }
    }

    /// Forgets every block of `node`: its epoch changed, or a snapshot is about to replace what was known.
    pub fn reset(&mut self, node: &NodeId) {
        let Some(slot) = self.slots.remove(node) else {
            return;
        };
        let indexed = self.nodes[slot].take().expect("a named slot is occupied");
        self.entries -= indexed.blocks.len();
        for hash in indexed.blocks.into_keys() {
            self.forget_holder(hash, slot);
        }
    }

    /// How many leading blocks of the chain `hashes` each node holds, longest first, then by name. Nodes that hold none are
    /// left out.
    ///
    /// The cost is one look-up per block where nodes' runs end, times the logarithm of the chain's length, whatever the
    /// number of nodes; and that logarithm for each node that holds something.
    pub fn match_prefix(&self, hashes: &[BlockHash]) -> Vec<Match> {
        let mut runs = Vec::new();
        let mut alive = self.holders_of(hashes.first());
        let (mut held, mut stride) = (0, 1);
        while !alive.is_empty() {
            let probe = (held + stride).min(hashes.len());
            let next = self.holders_of(hashes.get(probe));
            self.bisect(hashes, held, probe, alive.minus(&next), &mut runs);
            alive.intersect(&next);
            (held, stride) = (probe, stride * 2);
        }
        let mut matches: Vec<Match> = runs
            .into_iter()
            .filter_map(|(slot, blocks)| {
                let indexed = self.nodes[slot].as_ref()?;
                // A tier holds no block without those before it, so what is in memory comes first.
                let is_fast =
                    |hash: &BlockHash| indexed.blocks.get(hash).is_some_and(|tier| *tier < Tier::Disk);
                Some(Match {
                    node: indexed.id.clone(),
                    blocks,
                    in_memory: hashes[..blocks].partition_point(is_fast),
                })
            })
            .collect();
        matches.sort_by(|a, b| b.blocks.cmp(&a.blocks).then_with(|| a.node.cmp(&b.node)));
        matches
    }

    /// Blocks of `node` that are known.
    pub fn blocks(&self, node: &NodeId) -> usize {
        let slot = self.slots.get(node);
        let indexed = slot.and_then(|slot| self.nodes[*slot].as_ref());
        indexed.map_or(0, |indexed| indexed.blocks.len())
    }

    /// (node, block) pairs that are known.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Blocks that were left out for lack of room, ever.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Property tests call this after every step.
    pub fn check_integrity(&self) {
        let sum: usize = self.nodes.iter().flatten().map(|node| node.blocks.len()).sum();
        assert_eq!(sum, self.entries);
        assert!(self.entries <= self.entries_max);
        assert_eq!(self.slots.len(), self.nodes.iter().flatten().count());
        let mut pairs = 0;
        for (hash, set) in &self.holders {
            assert!(!set.is_empty(), "{hash} is kept without a holder");
            for slot in set.iter() {
                let node = self.nodes[slot].as_ref().expect("a holder is a live node");
                assert!(node.blocks.contains_key(hash));
                pairs += 1;
            }
        }
        assert_eq!(pairs, self.entries);
    }

    fn insert(&mut self, node: &NodeId, hash: BlockHash, tier: Tier) {
        let slot = self.slot_of(node);
        let indexed = self.nodes[slot].as_mut().expect("slot_of gives an occupied slot");
        if let Some(known) = indexed.blocks.get_mut(&hash) {
            *known = tier;
            return;
        }
        if self.entries >= self.entries_max {
            self.refused += 1;
            return;
        }
        indexed.blocks.insert(hash, tier);
        self.holders.entry(hash).or_default().insert(slot);
        self.entries += 1;
    }

    fn remove(&mut self, node: &NodeId, hash: BlockHash) {
        let Some(&slot) = self.slots.get(node) else {
            return;
        };
        let indexed = self.nodes[slot].as_mut().expect("a named slot is occupied");
        if indexed.blocks.remove(&hash).is_some() {
            self.entries -= 1;
            self.forget_holder(hash, slot);
        }
    }

    fn forget_holder(&mut self, hash: BlockHash, slot: usize) {
        let set = self
            .holders
            .get_mut(&hash)
            .expect("every block of a node has holders");
        set.remove(slot);
        if set.is_empty() {
            self.holders.remove(&hash);
        }
    }

    fn slot_of(&mut self, node: &NodeId) -> usize {
        if let Some(slot) = self.slots.get(node) {
            return *slot;
        }
        let vacant = self.nodes.iter().position(Option::is_none);
        let slot = vacant.unwrap_or_else(|| {
            self.nodes.push(None);
            self.nodes.len() - 1
        });
        self.nodes[slot] = Some(Indexed {
            id: node.clone(),
            blocks: HashMap::new(),
        });
        self.slots.insert(node.clone(), slot);
        slot
    }

    fn holders_of(&self, hash: Option<&BlockHash>) -> NodeSet {
        hash.and_then(|hash| self.holders.get(hash))
            .cloned()
            .unwrap_or_default()
    }

    /// Finds where the run of each node of `set` ends. All of them hold block `held`, none holds block `lacked`.
    fn bisect(
        &self,
        hashes: &[BlockHash],
        held: usize,
        lacked: usize,
        set: NodeSet,
        runs: &mut Vec<(usize, usize)>,
    ) {
        if set.is_empty() {
            return;
        }
        if lacked - held <= 1 {
            runs.extend(set.iter().map(|slot| (slot, held + 1)));
            return;
        }
        let middle = held + (lacked - held) / 2;
        let holders = self.holders_of(hashes.get(middle));
        self.bisect(hashes, held, middle, set.minus(&holders), runs);
        let mut rest = set;
        rest.intersect(&holders);
        self.bisect(hashes, middle, lacked, rest, runs);
    }
}

#[cfg(test)]
mod tests;
