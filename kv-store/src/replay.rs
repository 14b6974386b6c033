//! What a pool would have hit: requests replayed against the real block table.
//!
//! Each request matches its chain, as many leading blocks as are held, and then stores the rest in order, evicting
//! as it must; in the end it lets all its blocks go, the last one first. So hits are blocks of the contiguous
//! prefix that is held when a request comes, out of all blocks of all requests, the first time a
//! block is seen included.
//!
//! Elsewhere: workloads made up to differ ([`workloads`]), the optimum in hindsight ([`optimum`]), the figures
//! (`docs/eviction.md`, by `examples/eviction.rs`).

use std::time::{Duration, Instant};

use types::{BlockHash, Checksum};

use crate::policy::Eviction;
use crate::table::{BlockTable, Committed, Parent, TableLimits};

pub mod optimum;
pub mod workloads;

/// The root of all replayed chains.
const ROOT: BlockHash = BlockHash([0xff; 16]);

/// One request: the blocks of its prompt, root first. A block's number stands for its whole prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// When it comes, in milliseconds from the start.
    pub at_ms: u64,
    /// Its blocks.
    pub blocks: Vec<u64>,
}

/// Blocks that were asked for, and those that were held.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Hits {
    /// Blocks of the contiguous prefixes that were held.
    pub held: u64,
    /// Blocks asked for.
    pub asked: u64,
}

impl Hits {
    /// The share of blocks that were held.
    pub fn ratio(&self) -> f64 {
        self.held as f64 / self.asked.max(1) as f64
    }
}

/// Replays the requests, in order, on a pool of `capacity` blocks.
///
/// A request that is longer than the pool stores what fits.
pub fn replay(requests: &[Request], capacity: usize, eviction: Eviction) -> Hits {
    let mut table = BlockTable::new(TableLimits {
        capacity,
        // Nobody follows this log.
        log_entries_max: 1,
        leases_max: 1,
        first_lease: 1,
        eviction,
    });
    let begun = Instant::now();
    let mut hits = Hits::default();
    for request in requests {
        let now = begun + Duration::from_millis(request.at_ms);
        let chain: Vec<BlockHash> = request.blocks.iter().map(|block| hash(*block)).collect();
        let held = serve(&mut table, &chain, now);
        hits.held += held as u64;
        hits.asked += chain.len() as u64;
    }
    hits
}

/// One request. Returns how many of its blocks were held.
fn serve(table: &mut BlockTable, chain: &[BlockHash], now: Instant) -> usize {
    let found = table.match_prefix(chain, now);
    let held = found.len();
    let mut pinned: Vec<_> = found.into_iter().map(|block| block.block).collect();
    let mut parent = match held {
        0 => Parent::Root(ROOT),
        held => Parent::Block(chain[held - 1]),
    };
    for hash in &chain[held..] {
        let Some(block) = table
            .allocate(1, now)
            .ok()
            .and_then(|blocks| blocks.first().copied())
        else {
            break;
        };
        match table.commit(block, parent, *hash, Checksum::default(), now) {
            Committed::Stored(stored) => pinned.push(stored.block),
            Committed::Duplicate(duplicate) => {
                table.free(block);
                pinned.push(duplicate.block);
            }
            Committed::Orphan | Committed::OverQuota => {
                table.free(block);
                break;
            }
        }
        parent = Parent::Block(*hash);
    }
    for block in pinned.into_iter().rev() {
        table.unpin(block, now);
    }
    held
}

/// A digest of a block's number, as uniform as a real one.
fn hash(block: u64) -> BlockHash {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&workloads::mix(block).to_le_bytes());
    bytes[8..].copy_from_slice(&block.to_le_bytes());
    BlockHash(bytes)
}

#[cfg(test)]
mod tests;
