//! The nodes that the index tells apart, by small numbers: slots.
//!
//! A node that is forgotten leaves its slot stale: blocks still name it, and it is vacant only when none does.

use std::collections::HashMap;

use types::NodeId;

use super::holders::{SLOTS_MAX, assign, members};

#[derive(Debug, Default)]
pub(super) struct Nodes {
    slots: Vec<Slot>,
    by_name: HashMap<NodeId, usize>,
    /// The slots of nodes that are known, and those that are stale, as bitsets.
    live: Vec<u64>,
    stale: Vec<u64>,
}

#[derive(Debug, Default)]
struct Slot {
    /// Whose it is; nobody's if it is vacant or stale.
    id: Option<NodeId>,
    /// Blocks that name the slot.
    blocks: usize,
    /// Place of the name among all names.
    rank: usize,
}

impl Nodes {
    pub(super) fn slot(&self, node: &NodeId) -> Option<usize> {
        self.by_name.get(node).copied()
    }

    /// A node's slot, a new one if need be. `None` if there are too many nodes.
    pub(super) fn slot_or_new(&mut self, node: &NodeId) -> Option<usize> {
        if let Some(slot) = self.slot(node) {
            return Some(slot);
        }
        let vacant = |slot: &Slot| slot.id.is_none() && slot.blocks == 0;
        let slot = self.slots.iter().position(vacant).unwrap_or(self.slots.len());
        if slot >= SLOTS_MAX {
            return None;
        }
        if slot == self.slots.len() {
            self.slots.push(Slot::default());
            let words = self.slots.len().div_ceil(64);
            self.live.resize(words, 0);
            self.stale.resize(words, 0);
        }
        self.slots[slot].id = Some(node.clone());
        assign(&mut self.live, slot, true);
        self.by_name.insert(node.clone(), slot);
        self.rank();
        Some(slot)
    }

    /// Makes a node's slot stale, or vacant if no block names it. How many do.
    pub(super) fn forget(&mut self, node: &NodeId) -> usize {
        let Some(slot) = self.by_name.remove(node) else {
            return 0;
        };
        assign(&mut self.live, slot, false);
        self.slots[slot].id = None;
        let blocks = self.slots[slot].blocks;
        assign(&mut self.stale, slot, blocks > 0);
        blocks
    }

    /// One more block names the slot.
    pub(super) fn add(&mut self, slot: usize) {
        self.slots[slot].blocks += 1;
    }

    /// One block less names the slot. Whether it is stale.
    pub(super) fn subtract(&mut self, slot: usize) -> bool {
        let of = &mut self.slots[slot];
        of.blocks -= 1;
        let is_stale = of.id.is_none();
        if is_stale && of.blocks == 0 {
            assign(&mut self.stale, slot, false);
        }
        is_stale
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn live(&self) -> &[u64] {
        &self.live
    }

    pub(super) fn stale(&self) -> &[u64] {
        &self.stale
    }

    pub(super) fn stale_count(&self) -> usize {
        members(&self.stale).count()
    }

    pub(super) fn id(&self, slot: usize) -> Option<&NodeId> {
        self.slots[slot].id.as_ref()
    }

    pub(super) fn blocks(&self, slot: usize) -> usize {
        self.slots[slot].blocks
    }

    /// Orders slots as their nodes' names are.
    pub(super) fn rank_of(&self, slot: usize) -> usize {
        self.slots[slot].rank
    }

    fn rank(&mut self) {
        let mut names: Vec<(&NodeId, usize)> = self.by_name.iter().map(|(id, slot)| (id, *slot)).collect();
        names.sort_unstable();
        for (rank, (_, slot)) in names.into_iter().enumerate() {
            self.slots[slot].rank = rank;
        }
    }
}
