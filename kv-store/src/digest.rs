//! Hashing of what is a hash already.

use std::hash::{BuildHasherDefault, Hasher};

/// For maps whose keys are block hashes: uniform digests, so that eight of their bytes are as good as any hash of them.
pub(crate) type DigestBuild = BuildHasherDefault<DigestHasher>;

/// Takes the first eight bytes of a digest.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct DigestHasher(u64);

impl Hasher for DigestHasher {
    fn write(&mut self, bytes: &[u8]) {
        for (i, byte) in bytes.iter().take(8).enumerate() {
            self.0 ^= u64::from(*byte) << (8 * i);
        }
    }

    /// The length that arrays write before their bytes, which is the same for all keys.
    fn write_usize(&mut self, _length: usize) {}

    fn write_u64(&mut self, digest: u64) {
        self.0 = digest;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
