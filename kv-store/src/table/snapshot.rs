//! Everything that a table holds, for an index that begins or has lost the log.

use super::{BlockTable, SlotState, TIER};
use crate::log::{Snapshot, SnapshotBlock};

/// A snapshot whose blocks are not in order yet.
#[derive(Debug)]
pub struct SnapshotDraft {
    sequence: u64,
    blocks: Vec<(u64, SnapshotBlock)>,
}

impl SnapshotDraft {
    /// Puts parents before children.
    pub fn finish(mut self) -> Snapshot {
        // The order in which they were stored: a block is stored after its parent, which then outlives it.
        self.blocks.sort_unstable_by_key(|(stored_at, _)| *stored_at);
        Snapshot {
            sequence: self.sequence,
            blocks: self.blocks.into_iter().map(|(_, block)| block).collect(),
        }
    }
}

impl BlockTable {
    /// Everything that is held, as of now. Sorting is left to [`SnapshotDraft::finish`], outside of any lock.
    pub fn snapshot(&self) -> SnapshotDraft {
        // In the order of memory: looking blocks up would hold the lock several times as long.
        let held = self.slots.iter().filter_map(|slot| {
            let SlotState::Cached(cached) = &slot.state else {
                return None;
            };
            let listed = SnapshotBlock {
                hash: cached.hash,
                parent: cached.parent_hash,
                tier: TIER,
            };
            Some((cached.stored_at, listed))
        });
        let mut blocks = Vec::with_capacity(self.by_hash.len());
        blocks.extend(held.chain(self.on_disk_only()));
        SnapshotDraft {
            sequence: self.log.last(),
            blocks,
        }
    }
}
