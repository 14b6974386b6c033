//! Verifies cached blocks in the background, and decides when a node's memory is not to be trusted any more.
//!
//! Invariant: a block is pinned only while it is hashed, and hashing is no use of it. A corrupt block is forgotten with all that
//! continues it, whoever uses it: nobody finds it any more.
//!
//! Elsewhere: getting the block again from a peer (`exchange.rs`).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use proto::v1;
use types::BlockId;

use crate::store::Store;
use crate::table::Path;

/// So many corrupt blocks within [`WINDOW`] are no accident.
const CORRUPTIONS_MAX: usize = 3;
/// Memory that works flips a bit in months, not in hours.
const WINDOW: Duration = Duration::from_secs(3600);
/// Chains through one corrupt block that are looked for again.
const PATHS_MAX: usize = 64;
/// Blocks of one part of a pass that somebody waits for.
const PART_BLOCKS: usize = 64;

/// Decides when a node that finds corrupt blocks is to be quarantined. Pure.
#[derive(Debug, Default)]
pub(crate) struct Health {
    found: VecDeque<Instant>,
}

impl Health {
    /// A corrupt block was found. Whether the node is to be quarantined.
    pub(crate) fn corrupt(&mut self, now: Instant) -> bool {
        self.found.push_back(now);
        while self
            .found
            .front()
            .is_some_and(|found| now.saturating_duration_since(*found) > WINDOW)
        {
            self.found.pop_front();
        }
        while self.found.len() > CORRUPTIONS_MAX {
            self.found.pop_front();
        }
        self.found.len() >= CORRUPTIONS_MAX
    }
}

/// What became of one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verified {
    /// Its bytes are what they were.
    Good,
    /// It was gone before it could be looked at.
    Gone,
    /// It was forgotten, with what continued it.
    Corrupt {
        /// The chains that it was part of, to their ends.
        paths: Vec<Path>,
        /// Blocks that were dropped, itself included.
        dropped: usize,
    },
}

/// Goes over the pool, slot by slot, round and round.
#[derive(Debug, Default)]
pub(crate) struct Cursor {
    last: Option<BlockId>,
}

impl Cursor {
    /// Verifies the next block. `None`: nothing is cached.
    pub(crate) fn next(&mut self, store: &Store) -> Option<Verified> {
        let (hash, block, _) = store.table().next_cached(self.last)?;
        self.last = Some(block);
        let good = store.inspect(hash, |held| store.checksum(held.block) == held.checksum);
        let block_bytes = store.layout().block_bytes() as u64;
        store.inner().metrics.scrubbed_bytes.inc_by(block_bytes);
        match good {
            None => Some(Verified::Gone),
            Some(true) => Some(Verified::Good),
            Some(false) => {
                let paths = store.table().paths_through(hash, PATHS_MAX);
                let dropped = store
                    .with_table(|table| table.forget(hash, crate::store::now()))
                    .len();
                store.note_corrupt(crate::store::now());
                Some(Verified::Corrupt { paths, dropped })
            }
        }
    }
}

/// One look at every block, which somebody waits for.
#[derive(Debug)]
pub(crate) struct Pass {
    store: Store,
    cursor: Cursor,
    progress: v1::VerifyResponse,
}

impl Pass {
    pub(crate) fn new(store: Store) -> Self {
        let total_blocks = store.stats().blocks.cached as u64;
        Self {
            store,
            cursor: Cursor::default(),
            progress: v1::VerifyResponse {
                total_blocks,
                ..v1::VerifyResponse::default()
            },
        }
    }

    /// Verifies some blocks. Whether there are more.
    pub(crate) async fn part(&mut self) -> bool {
        for _ in 0..PART_BLOCKS {
            if self.progress.verified_blocks >= self.progress.total_blocks {
                return false;
            }
            match self.cursor.next(&self.store) {
                None => {
                    self.progress.verified_blocks = self.progress.total_blocks;
                    return false;
                }
                Some(Verified::Good | Verified::Gone) => {}
                Some(Verified::Corrupt { dropped, .. }) => {
                    tracing::error!(dropped, "a cached block is corrupt and was dropped");
                    self.progress.corrupt_blocks += 1;
                    self.progress.dropped_blocks += dropped as u64;
                }
            }
            self.progress.verified_blocks += 1;
            // Hashing one block is short, hashing many is not.
            tokio::task::yield_now().await;
        }
        self.progress.verified_blocks < self.progress.total_blocks
    }

    pub(crate) fn progress(&self) -> v1::VerifyResponse {
        self.progress
    }
}

#[cfg(test)]
mod tests;
