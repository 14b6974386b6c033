//! Which block goes when memory is short: the policies of a block table.
//!
//! The table tells its policy what happens to each slot, and asks it for a victim among the blocks that are evictable:
//! those that nobody pins and that no cached block follows. So whatever a policy answers, leaves go first and no
//! block is left without its parent; a policy decides only which leaf it is.
//!
//! Policies are deterministic, do no I/O, and keep a bounded amount of memory: some bytes per slot, and a history whose size is
//! set when they are made.
//!
//! Elsewhere: how the policies compare (`docs/eviction.md`), who tells them what (`table.rs`).

use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use types::{BlockHash, BlockId};

mod clock;
mod lfu;
mod lru;
pub mod returns;
mod s3fifo;

use lfu::Lfu;
use lru::Lru;
use returns::Returns;
use s3fifo::S3Fifo;

/// A block that has come into the pool.
#[derive(Debug, Clone, Copy)]
pub struct Stored {
    /// Its slot.
    pub block: BlockId,
    /// Its identity, by which a history knows it again.
    pub hash: BlockHash,
    /// The slot of the block before it; `None` after a root.
    pub parent: Option<BlockId>,
    /// Blocks before it.
    pub depth: u32,
}

/// Chooses victims. The table calls it in this order for each block: `stored`, then any number of
/// `used`, `unpinned`, `evictable` and `unevictable`, then `evicted`.
pub trait Policy: fmt::Debug + Send {
    /// A block was committed. It is pinned.
    fn stored(&mut self, stored: Stored, now: Instant);

    /// One request found these blocks: a run of a chain, the block nearest to the root first. They are pinned.
    fn used(&mut self, run: &[BlockId], now: Instant);

    /// The last pin of a block has ended.
    fn unpinned(&mut self, block: BlockId, now: Instant);

    /// From now on the block may be a victim.
    fn evictable(&mut self, block: BlockId, now: Instant);

    /// The block may no longer be a victim: it was pinned, or it has a child.
    fn unevictable(&mut self, block: BlockId);

    /// An evictable block has left the pool.
    fn evicted(&mut self, block: BlockId, hash: BlockHash, now: Instant);

    /// The evictable block that is worth least. `None` if none is evictable.
    fn victim(&mut self, now: Instant) -> Option<BlockId>;

    /// What keeping a cached block is worth; higher is better. Comparable between nodes that run the same policy.
    fn worth(&self, block: BlockId, now: Instant) -> f32;

    /// From now on the block is worth no more than this: it came from a peer that says so, or was only looked at. To move a
    /// block is no use of it. Policies to which the time of a use means nothing leave it as it is.
    fn lower(&mut self, _block: BlockId, _worth: f32, _now: Instant) {}

    /// Up to `count` of the blocks that are evictable now, least worth first.
    fn coldest(&self, count: usize) -> Vec<BlockId>;

    /// Whether the policy takes the block for evictable. For tests.
    fn is_evictable(&self, block: BlockId) -> bool;
}

/// The policies there are.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Eviction {
    /// Least recently used.
    Lru,
    /// Least frequently used while in the pool.
    Lfu,
    /// S3-FIFO: a small queue on probation, a main queue, ghosts.
    S3Fifo,
    /// Least likely to return soon, as learned from the blocks that did and did not: [`returns`].
    #[default]
    Returns,
}

impl Eviction {
    /// Every policy, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::Lru, Self::Lfu, Self::S3Fifo, Self::Returns];

    /// The name used in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::S3Fifo => "s3fifo",
            Self::Returns => "returns",
        }
    }

    /// A policy for a pool of `capacity` slots.
    pub fn policy(self, capacity: usize) -> Box<dyn Policy> {
        match self {
            Self::Lru => Box::new(Lru::new(capacity)),
            Self::Lfu => Box::new(Lfu::new(capacity)),
            Self::S3Fifo => Box::new(S3Fifo::new(capacity)),
            Self::Returns => Box::new(Returns::new(capacity)),
        }
    }
}

impl fmt::Display for Eviction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No policy has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no eviction policy: use lru, lfu, s3fifo or returns")]
pub struct UnknownPolicy {
    /// What was asked for.
    pub name: String,
}

impl FromStr for Eviction {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        let found = Self::ALL.into_iter().find(|policy| policy.name() == name);
        found.ok_or_else(|| UnknownPolicy {
            name: name.to_owned(),
        })
    }
}

/// Half of a hash: a ghost that is taken for another one costs a wrong guess.
fn fingerprint(hash: BlockHash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = hash.0;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests;
