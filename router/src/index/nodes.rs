//! The nodes that the index tells apart, by small numbers: slots.
//!
//! A node that is forgotten leaves its slot stale: segments still name it, and it is vacant only when none does.

use std::collections::HashMap;

use types::NodeId;

/// Nodes, known and stale ones, that are told apart.
pub(super) const SLOTS_MAX: usize = 1 << 14;

#[derive(Debug, Default)]
pub(super) struct Nodes {
    /// Whose each slot is; nobody's if it is vacant or stale.
    ids: Vec<Option<NodeId>>,
    /// Blocks that each slot is said to hold.
    blocks: Vec<usize>,
    by_name: HashMap<NodeId, usize>,
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
        let is_vacant = |slot: &usize| self.ids[*slot].is_none() && self.blocks[*slot] == 0;
        let slot = (0..self.len()).find(is_vacant).unwrap_or(self.len());
        if slot >= SLOTS_MAX {
            return None;
        }
        if slot == self.len() {
            self.ids.push(None);
            self.blocks.push(0);
        }
        self.ids[slot] = Some(node.clone());
        self.by_name.insert(node.clone(), slot);
        Some(slot)
    }

    /// Makes a node's slot stale, or vacant if it holds no block. How many it holds.
    pub(super) fn forget(&mut self, node: &NodeId) -> usize {
        let Some(slot) = self.by_name.remove(node) else {
            return 0;
        };
        self.ids[slot] = None;
        self.blocks[slot]
    }

    /// The slot holds one more block.
    pub(super) fn add(&mut self, slot: usize) {
        self.blocks[slot] += 1;
    }

    /// The slot holds so many blocks less. Whether it is stale.
    pub(super) fn subtract(&mut self, slot: usize, blocks: usize) -> bool {
        self.blocks[slot] -= blocks;
        self.ids[slot].is_none()
    }

    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn stale_count(&self) -> usize {
        let slots = self.ids.iter().zip(&self.blocks);
        slots.filter(|(id, blocks)| id.is_none() && **blocks > 0).count()
    }

    pub(super) fn id(&self, slot: usize) -> Option<&NodeId> {
        self.ids[slot].as_ref()
    }

    pub(super) fn blocks(&self, slot: usize) -> usize {
        self.blocks[slot]
    }
}
