//! Whether the bytes of a block are what was promised.

use std::num::NonZeroU64;

use types::{BlockHash, BlockId, Checksum, ErrorCode};

use super::{OwnedBlock, Store};

/// Bytes that are not what their checksum says. They were dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("block {hash} has checksum {:016x}, but {:016x} was promised", found.0, expected.0)]
pub struct Corrupt {
    /// Identity the block should have had.
    pub hash: BlockHash,
    /// Checksum promised.
    pub expected: Checksum,
    /// Checksum of the bytes.
    pub found: Checksum,
}

impl From<Corrupt> for types::Error {
    fn from(error: Corrupt) -> Self {
        Self::new(ErrorCode::Corrupt, error.to_string())
    }
}

impl Store {
    /// Checks the bytes of a block that a peer wrote; counts it if they are wrong.
    pub fn verify(&self, block: &OwnedBlock, hash: BlockHash, expected: Checksum) -> Result<(), Corrupt> {
        self.verify_seen(block, None, hash, expected)
    }

    /// As [`Store::verify`], for a block whose checksum was `seen` when it was written here, if it was.
    pub(crate) fn verify_seen(
        &self,
        block: &OwnedBlock,
        seen: Option<Checksum>,
        hash: BlockHash,
        expected: Checksum,
    ) -> Result<(), Corrupt> {
        let found = seen.unwrap_or_else(|| self.checksum(block.block()));
        if found == expected {
            return Ok(());
        }
        self.inner.metrics.corruptions.inc();
        Err(Corrupt {
            hash,
            expected,
            found,
        })
    }

    /// What a transfer is to make checksums of: a block.
    pub(crate) fn unit_bytes(&self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.inner.block_bytes as u64)
    }

    /// XXH3-64 of all bytes of a block. The caller owns or pins it.
    pub fn checksum(&self, block: BlockId) -> Checksum {
        let bytes = self.inner.block_bytes;
        let hashed = transfer::memory::with_bytes(
            self.inner.memory.as_ref(),
            self.offset(block),
            bytes,
            Checksum::of,
        );
        hashed.expect("blocks are inside the pool, and the pool is host memory")
    }
}
