//! What nodes tell each other about their blocks.

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::{BlockHash, BlockId};

/// Counts the uses of one pool slot. A reader that was told generation `g` and finds another one is
/// looking at different content, whatever the hash says.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation of the slot's next content.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// XXH3-64 of all bytes of a block.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Checksum(pub u64);

impl Checksum {
    /// The checksum of a block with these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(XxHash3_64::oneshot(bytes))
    }
}

/// Where a block lies on its node, from fastest to slowest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Accelerator memory.
    Device,
    /// DRAM.
    Host,
    /// Local disk.
    Disk,
}

/// A complete block as its holder describes it to a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockDescriptor {
    /// Identity of the content.
    pub hash: BlockHash,
    /// Slot in the holder's pool.
    pub block: BlockId,
    /// The slot's use that the promise is about.
    pub generation: Generation,
    /// What the reader's bytes must hash to.
    pub checksum: Checksum,
}

/// A change of what a node holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum BlockEvent {
    /// The node now holds `hash` in `tier`. The parent was stored before it and is still held, or is the
    /// root of a [`crate::KvSpace`].
    Stored {
        /// Identity of the block.
        hash: BlockHash,
        /// Identity of the block before it, or the root of its space.
        parent: BlockHash,
        /// Where it lies.
        tier: Tier,
    },
    /// The block changed tier.
    Moved {
        /// Identity of the block.
        hash: BlockHash,
        /// Where it lies now.
        tier: Tier,
    },
    /// The node no longer holds the block.
    Removed {
        /// Identity of the block.
        hash: BlockHash,
    },
}

/// A numbered entry of a node's log. Numbers start at 1 and have no gaps within an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Position in the log.
    pub sequence: u64,
    /// What happened.
    pub event: BlockEvent,
}
