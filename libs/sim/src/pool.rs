//! The pool of a simulated node: the store's own block table and log, without bytes.

use std::time::Instant;

use kv_store::Eviction;
use kv_store::log::{Batch, BatchKind, Resume};
use kv_store::table::{BlockTable, Committed, Parent, Purpose, TableLimits};
use types::{BlockHash, BlockId, Checksum, Epoch};

/// The log is read soon after every change; whoever is too late reads a snapshot.
const LOG_ENTRIES_MAX: usize = 1 << 16;

/// The root of all chains. Simulated blocks have no bytes, so any hash that is no block's will do.
const ROOT: BlockHash = BlockHash([0; 16]);

#[derive(Debug)]
pub(crate) struct Pool {
    table: BlockTable,
    /// Log entries that were read, if a first snapshot was.
    read: Option<u64>,
}

/// Blocks that a sequence uses.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Of its chain, from the root on; pinned.
    chain: Vec<BlockId>,
    /// For what is in no full block yet.
    owned: Vec<BlockId>,
}

impl Held {
    pub(crate) fn blocks(&self) -> usize {
        self.chain.len()
    }
}

impl Pool {
    pub(crate) fn new(capacity: usize, eviction: Eviction) -> Self {
        Self {
            table: BlockTable::new(TableLimits {
                capacity,
                log_entries_max: LOG_ENTRIES_MAX,
                leases_max: 1,
                first_lease: 1,
                eviction,
            }),
            read: None,
        }
    }

    pub(crate) fn match_len(&self, chain: &[BlockHash]) -> usize {
        self.table.match_len(chain)
    }

    /// Slots that hold nothing, and those that could.
    pub(crate) fn free_and_evictable(&self) -> (u64, u64) {
        let counts = self.table.counts();
        (counts.free as u64, counts.reclaimable as u64)
    }

    /// Takes what is held of a chain.
    pub(crate) fn begin(&mut self, chain: &[BlockHash], now: Instant) -> Held {
        let found = self.table.match_prefix(chain, now);
        Held {
            chain: found.into_iter().map(|block| block.block).collect(),
            owned: Vec::new(),
        }
    }

    /// Stores the chain's blocks up to `blocks`, or as many as fit.
    pub(crate) fn extend(&mut self, held: &mut Held, chain: &[BlockHash], blocks: usize, now: Instant) {
        commit_run(&mut self.table, &mut held.chain, &chain[..blocks], now);
    }

    /// Takes blocks for a sequence whose whole chain is held, or none if there are too few.
    pub(crate) fn reserve(&mut self, held: &mut Held, blocks: usize, now: Instant) -> bool {
        match self.table.allocate(blocks, now) {
            Ok(more) => {
                held.owned.extend(more);
                true
            }
            Err(_) => false,
        }
    }

    /// Blocks taken for a chain become the chain's.
    pub(crate) fn settle(&mut self, held: &mut Held, chain: &[BlockHash], now: Instant) {
        let missing = chain.len() - held.chain.len();
        let kept = held.owned.len().saturating_sub(missing);
        for block in held.owned.split_off(kept) {
            self.table.free(block);
        }
        self.extend(held, chain, chain.len(), now);
    }

    /// Lets a sequence's blocks go, the last one first.
    pub(crate) fn release(&mut self, held: Held, now: Instant) {
        for block in held.owned {
            self.table.free(block);
        }
        for block in held.chain.into_iter().rev() {
            self.table.unpin(block, now);
        }
    }

    /// What a peer's fetch of the first `blocks` blocks does to them.
    pub(crate) fn read_by_peer(&mut self, chain: &[BlockHash], blocks: usize, now: Instant) {
        let held = self.begin(&chain[..blocks], now);
        self.release(held, now);
    }

    pub(crate) fn has_news(&self) -> bool {
        self.read != Some(self.table.log().last())
    }

    /// What followers of the log are sent.
    pub(crate) fn news(&mut self, epoch: Epoch) -> Vec<Batch> {
        let sequence = self.table.log().last();
        let resumed = self
            .read
            .map(|read| self.table.log().since(read + 1, LOG_ENTRIES_MAX));
        self.read = Some(sequence);
        match resumed {
            Some(Resume::Entries(entries)) => vec![Batch {
                epoch,
                sequence,
                kind: BatchKind::Entries,
                events: entries.into_iter().map(|entry| entry.event).collect(),
            }],
            Some(Resume::SnapshotNeeded) | None => {
                let snapshot = self.table.snapshot().finish();
                snapshot.into_batches(epoch, LOG_ENTRIES_MAX).collect()
            }
        }
    }
}

/// Puts as many blocks of the chain into the pool as fit, and lets them go.
pub(crate) fn keep(table: &mut BlockTable, chain: &[BlockHash], purpose: Purpose, now: Instant) {
    let held = match purpose {
        Purpose::Request => table.match_prefix(chain, now),
        Purpose::Move => table.pin_run(chain),
    };
    let mut pinned: Vec<_> = held.into_iter().map(|block| block.block).collect();
    commit_run(table, &mut pinned, chain, now);
    // The last block first, as a sequence ends.
    for block in pinned.into_iter().rev() {
        table.unpin(block, now);
    }
}

/// Stores what follows the pinned blocks of a chain, as far as it fits.
fn commit_run(table: &mut BlockTable, pinned: &mut Vec<BlockId>, chain: &[BlockHash], now: Instant) {
    for index in pinned.len()..chain.len() {
        let Ok(blocks) = table.allocate(1, now) else { break };
        let parent = match index.checked_sub(1) {
            None => Parent::Root(ROOT),
            Some(before) => Parent::Block(chain[before]),
        };
        match table.commit(blocks[0], parent, chain[index], Checksum(0), now) {
            Committed::Stored(block) => pinned.push(block.block),
            Committed::Duplicate(block) => {
                table.free(blocks[0]);
                pinned.push(block.block);
            }
            Committed::Orphan | Committed::OverQuota => {
                table.free(blocks[0]);
                break;
            }
        }
    }
}
