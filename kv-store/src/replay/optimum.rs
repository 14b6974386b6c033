//! The optimum in hindsight, for comparison.
//!
//! Belady's rule under the table's constraint: of the leaves that the current request does not use, the one that is next
//! used furthest in the future goes; of equals, the deepest. A block is never used before its ancestors, so
//! each leaf is used no sooner than the blocks before it, and the furthest of all blocks is always a leaf (or has a leaf below it
//! that is as far): leaves first costs the rule nothing. What it lacks to be the true optimum is the choice not to
//! store a block at all.

use std::collections::{BTreeSet, HashMap};

use super::{Hits, Request};

/// When a block that no later request names is used.
const NEVER: usize = usize::MAX;

#[derive(Debug, Default)]
struct Node {
    /// Requests that use the block, the next one last.
    uses: Vec<usize>,
    depth: usize,
    parent: Option<u64>,
    children: usize,
    held: bool,
    /// Used by the current request.
    busy: bool,
}

impl Node {
    fn key(&self, block: u64) -> (usize, usize, u64) {
        (self.uses.last().copied().unwrap_or(NEVER), self.depth, block)
    }

    fn is_evictable(&self) -> bool {
        self.held && !self.busy && self.children == 0
    }
}

/// What the optimum hits on a pool of `capacity` blocks.
pub fn belady(requests: &[Request], capacity: usize) -> Hits {
    let mut nodes: HashMap<u64, Node> = HashMap::new();
    for (i, request) in requests.iter().enumerate().rev() {
        for (depth, block) in request.blocks.iter().enumerate() {
            let node = nodes.entry(*block).or_default();
            node.uses.push(i);
            node.depth = depth;
            node.parent = depth.checked_sub(1).map(|before| request.blocks[before]);
        }
    }
    let mut leaves: BTreeSet<(usize, usize, u64)> = BTreeSet::new();
    let mut held_count = 0;
    let mut hits = Hits::default();
    for request in requests {
        let is_held = |block: &&u64| nodes.get(*block).is_some_and(|node| node.held);
        let held = request.blocks.iter().take_while(is_held).count();
        hits.held += held as u64;
        hits.asked += request.blocks.len() as u64;
        for block in &request.blocks {
            let Some(node) = nodes.get_mut(block) else {
                continue;
            };
            leaves.remove(&node.key(*block));
            node.uses.pop();
            node.busy = true;
        }
        for block in &request.blocks[held..] {
            if held_count == capacity {
                let Some((_, _, victim)) = leaves.pop_last() else {
                    break;
                };
                drop_leaf(&mut nodes, &mut leaves, victim);
                held_count -= 1;
            }
            let Some(node) = nodes.get_mut(block) else {
                continue;
            };
            node.held = true;
            held_count += 1;
            let parent = node.parent;
            if let Some(parent) = parent.and_then(|parent| nodes.get_mut(&parent)) {
                parent.children += 1;
            }
        }
        for block in &request.blocks {
            let Some(node) = nodes.get_mut(block) else {
                continue;
            };
            node.busy = false;
            if node.is_evictable() {
                leaves.insert(node.key(*block));
            }
        }
    }
    hits
}

fn drop_leaf(nodes: &mut HashMap<u64, Node>, leaves: &mut BTreeSet<(usize, usize, u64)>, victim: u64) {
    let Some(node) = nodes.get_mut(&victim) else {
        return;
    };
    node.held = false;
    let Some(parent_block) = node.parent else { return };
    let Some(parent) = nodes.get_mut(&parent_block) else {
        return;
    };
    parent.children -= 1;
    if parent.is_evictable() {
        leaves.insert(parent.key(parent_block));
    }
}
