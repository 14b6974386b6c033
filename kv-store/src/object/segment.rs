//! Segments: which blocks of a chain share an object, and the object's bytes.
//!
//! A segment is a run of consecutive blocks, aligned from the chain's root, so that any two nodes cut a chain at the same places. It is
//! named by the hash of its last block, which commits to all tokens before it: two nodes that write a segment write the same
//! name, and which one of them was last does not matter.
//!
//! Invariant: a segment is believed only as far as the reader can prove it. The reader knows the hashes that it wants, so the header has
//! to name exactly those, and each block has to match its checksum.
//!
//! Pure. Elsewhere: requests (`object.rs`), which segments are written (`history.rs`).

use std::ops::Range;

use twox_hash::XxHash3_64;
use types::{BlockHash, Checksum};

/// What an object weighs at most, unless one block is heavier. A request costs the same for a byte and for some MiB, which take about as long to
/// move as the request's own round trip: smaller ones would cost more requests, larger ones more blocks that nobody wants.
const SEGMENT_BYTES_MAX: usize = 4 << 20;
/// Blocks of a segment at most. A prompt's end that fills no segment is not kept, so a segment must be short against a prompt worth keeping.
const SEGMENT_BLOCKS_MAX: usize = 16;

const MAGIC: [u8; 8] = *b"PERIGEES";
const VERSION: u32 = 1;
/// Magic, version, number of blocks, bytes of a block, root of the space.
const FIXED_BYTES: usize = 8 + 4 + 4 + 8 + 16;
/// A block's hash and checksum.
const ENTRY_BYTES: usize = 16 + 8;
const SUM_BYTES: usize = 8;

/// How chains are cut into segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    root: BlockHash,
    block_bytes: usize,
    blocks: usize,
}

/// Why an object is not the segment that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// It was cut off, or is something else.
    #[error("it has {found} bytes, but a segment here has {expected}")]
    Length {
        /// The object's.
        found: u64,
        /// What all segments of this space have.
        expected: u64,
    },
    /// It is no segment.
    #[error("it is no segment of blocks")]
    Foreign,
    /// Another layout of bytes.
    #[error("its format has version {found}, but this program reads version {VERSION}")]
    Version {
        /// The object's.
        found: u32,
    },
    /// Its header changed after it was written.
    #[error("its header does not match its checksum")]
    Damaged,
    /// It is of another model, arithmetic, or size of blocks.
    #[error("its blocks are of space {found}")]
    Space {
        /// The object's.
        found: BlockHash,
    },
    /// It holds other blocks than its name says.
    #[error("its block {index} is {found}")]
    Block {
        /// Which one of the segment.
        index: usize,
        /// What it is.
        found: BlockHash,
    },
    /// A block's bytes changed.
    #[error("block {hash} does not match its checksum")]
    Bytes {
        /// Which one.
        hash: BlockHash,
    },
}

impl Grid {
    /// The grid of all nodes whose common space has this root and whose blocks have this size.
    pub fn new(root: BlockHash, block_bytes: usize) -> Self {
        Self {
            root,
            block_bytes,
            blocks: (SEGMENT_BYTES_MAX / block_bytes.max(1)).clamp(1, SEGMENT_BLOCKS_MAX),
        }
    }

    /// Blocks of a segment.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Root of the space that tenants share.
    pub fn root(&self) -> BlockHash {
        self.root
    }

    /// Where the complete segments of a chain of `len` blocks lie, from the one on that holds block `from`.
    pub fn segments(&self, from: usize, len: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let blocks = self.blocks;
        (from / blocks..len / blocks).map(move |segment| segment * blocks..(segment + 1) * blocks)
    }

    /// Bytes of an object.
    pub fn object_bytes(&self) -> u64 {
        (self.header_bytes() + self.blocks * self.block_bytes) as u64
    }

    /// Bytes before the first block.
    pub fn header_bytes(&self) -> usize {
        FIXED_BYTES + self.blocks * ENTRY_BYTES + SUM_BYTES
    }

    /// Where block `index` of a segment lies in its object.
    pub fn block_range(&self, index: usize) -> Range<usize> {
        let start = self.header_bytes() + index * self.block_bytes;
        start..start + self.block_bytes
    }

    /// The bytes before the blocks of a segment.
    ///
    /// # Panics
    ///
    /// If these are not as many blocks as a segment has.
    pub fn encode_header(&self, entries: &[(BlockHash, Checksum)]) -> Vec<u8> {
        assert_eq!(entries.len(), self.blocks, "a segment is complete");
        let mut bytes = Vec::with_capacity(self.header_bytes());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        // At most `SEGMENT_BLOCKS_MAX`.
        bytes.extend_from_slice(&(self.blocks as u32).to_le_bytes());
        bytes.extend_from_slice(&(self.block_bytes as u64).to_le_bytes());
        bytes.extend_from_slice(&self.root.0);
        for (hash, checksum) in entries {
            bytes.extend_from_slice(&hash.0);
            bytes.extend_from_slice(&checksum.0.to_le_bytes());
        }
        let sum = XxHash3_64::oneshot(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// The checksum that each block of the object must have, if the object is the segment with these hashes.
    ///
    /// # Errors
    ///
    /// See [`SegmentError`].
    pub fn decode(&self, object: &[u8], hashes: &[BlockHash]) -> Result<Vec<Checksum>, SegmentError> {
        if object.get(..8).is_some_and(|magic| *magic != MAGIC) {
            return Err(SegmentError::Foreign);
        }
        if object.len() as u64 != self.object_bytes() || hashes.len() != self.blocks {
            return Err(SegmentError::Length {
                found: object.len() as u64,
                expected: self.object_bytes(),
            });
        }
        let found = u32::from_le_bytes(array(object, 8));
        if found != VERSION {
            return Err(SegmentError::Version { found });
        }
        let sum_at = self.header_bytes() - SUM_BYTES;
        if XxHash3_64::oneshot(&object[..sum_at]) != u64::from_le_bytes(array(object, sum_at)) {
            return Err(SegmentError::Damaged);
        }
        let space = BlockHash(array(object, 24));
        let blocks = u32::from_le_bytes(array(object, 12)) as usize;
        let block_bytes = u64::from_le_bytes(array(object, 16));
        if space != self.root || blocks != self.blocks || block_bytes != self.block_bytes as u64 {
            return Err(SegmentError::Space { found: space });
        }
        let mut checksums = Vec::with_capacity(self.blocks);
        for (index, hash) in hashes.iter().enumerate() {
            let at = FIXED_BYTES + index * ENTRY_BYTES;
            let found = BlockHash(array(object, at));
            if found != *hash {
                return Err(SegmentError::Block { index, found });
            }
            checksums.push(Checksum(u64::from_le_bytes(array(object, at + 16))));
        }
        Ok(checksums)
    }
}

/// `N` bytes from `at` on, which the caller knows to be there.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

#[cfg(test)]
mod tests;
