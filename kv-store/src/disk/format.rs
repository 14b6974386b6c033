//! What the index file of a disk says, byte by byte.
//!
//! The file is a header of [`HEADER_BYTES`] and then one record of [`RECORD_BYTES`] per slot. Both end in their own XXH3-64, so a
//! torn or stale one reads as none. The checksum of a record is seeded with the number of its slot and the file's instance:
//! a record that got to another place, or is left of an earlier use of the file, is none either.
//!
//! Persisted, and so never changed without a new `VERSION`: files of another version are dropped, as a cache may be.
//! Pure. Elsewhere: when they are written (`file.rs`).

use twox_hash::XxHash3_64;
use types::{BlockHash, Checksum};

use super::table::SlotId;

/// A page, so that records begin on one.
pub const HEADER_BYTES: usize = 4096;
/// Divides a page, so that no record crosses one.
pub const RECORD_BYTES: usize = 64;

const MAGIC: [u8; 8] = *b"PERIGEE\x01";
const VERSION: u32 = 1;
/// What the header holds before its checksum.
const HEADER_BODY: usize = 8 + 4 + 8 + 16 + 8;
/// What a record holds before its checksum.
const RECORD_BODY: usize = RECORD_BYTES - 8;
const FOLLOWS_ROOT: u8 = 1;

/// What a file of blocks is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of one block.
    pub block_bytes: u64,
    /// Root of the space that tenants share.
    pub root: BlockHash,
    /// Another one each time the file is begun anew.
    pub instance: u64,
}

/// Why the blocks of a file are of no use, or not to be touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It is no index of ours.
    #[error("it is no index of a disk tier")]
    Foreign,
    /// Another layout of bytes.
    #[error("its format has version {found}, but this program writes version {VERSION}")]
    Version {
        /// The file's.
        found: u32,
    },
    /// It was not written to its end, or changed since.
    #[error("its header is damaged")]
    Damaged,
}

/// What a slot holds, as its record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Identity of the block.
    pub hash: BlockHash,
    /// Identity of the block before it, or the root of its space.
    pub parent: BlockHash,
    /// Whether `parent` is a root.
    pub follows_root: bool,
    /// XXH3-64 of its bytes.
    pub checksum: Checksum,
    /// Counts the blocks written: higher ones are newer, and a parent has a lower one than its children.
    pub sequence: u64,
}

impl Header {
    /// The bytes at the beginning of the file.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.block_bytes.to_le_bytes());
        bytes[20..36].copy_from_slice(&self.root.0);
        bytes[36..44].copy_from_slice(&self.instance.to_le_bytes());
        let sum = XxHash3_64::oneshot(&bytes[..HEADER_BODY]);
        bytes[HEADER_BODY..HEADER_BODY + 8].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads what [`Header::encode`] gives.
    ///
    /// # Errors
    ///
    /// See [`HeaderError`]; only [`HeaderError::Foreign`] means that the file is somebody else's.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        if bytes[..8] != MAGIC {
            return Err(HeaderError::Foreign);
        }
        let found = u32::from_le_bytes(array(bytes, 8));
        if found != VERSION {
            return Err(HeaderError::Version { found });
        }
        let sum = u64::from_le_bytes(array(bytes, HEADER_BODY));
        if XxHash3_64::oneshot(&bytes[..HEADER_BODY]) != sum {
            return Err(HeaderError::Damaged);
        }
        Ok(Self {
            block_bytes: u64::from_le_bytes(array(bytes, 12)),
            root: BlockHash(array(bytes, 20)),
            instance: u64::from_le_bytes(array(bytes, 36)),
        })
    }
}

impl Record {
    /// The bytes of the record of `slot`.
    pub fn encode(&self, slot: SlotId, instance: u64) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..16].copy_from_slice(&self.hash.0);
        bytes[16..32].copy_from_slice(&self.parent.0);
        bytes[32..40].copy_from_slice(&self.checksum.0.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[48] = if self.follows_root { FOLLOWS_ROOT } else { 0 };
        let sum = record_sum(&bytes, slot, instance);
        bytes[RECORD_BODY..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads what [`Record::encode`] gives for the same slot and instance; anything else is no record.
    pub fn decode(bytes: &[u8; RECORD_BYTES], slot: SlotId, instance: u64) -> Option<Self> {
        let sum = u64::from_le_bytes(array(bytes, RECORD_BODY));
        if record_sum(bytes, slot, instance) != sum {
            return None;
        }
        Some(Self {
            hash: BlockHash(array(bytes, 0)),
            parent: BlockHash(array(bytes, 16)),
            checksum: Checksum(u64::from_le_bytes(array(bytes, 32))),
            sequence: u64::from_le_bytes(array(bytes, 40)),
            follows_root: bytes[48] == FOLLOWS_ROOT,
        })
    }
}

fn record_sum(bytes: &[u8; RECORD_BYTES], slot: SlotId, instance: u64) -> u64 {
    // Multiplied by an odd number, so that no two slots of two instances share a seed by mere addition.
    let seed = instance
        ^ u64::from(slot.0)
            .wrapping_add(1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    XxHash3_64::oneshot_with_seed(seed, &bytes[..RECORD_BODY])
}

/// `N` bytes from `at` on, which the caller knows to be there.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

#[cfg(test)]
mod tests;
