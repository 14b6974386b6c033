//! Checksums of bytes that pass through this processor anyway.
//!
//! Whoever copies a block has it in the nearest cache for a moment. Hashed there, piece by piece, a block that comes from
//! memory costs next to nothing more than the copy: to hash it later is to read it from memory once more.
//!
//! Elsewhere: who copies (`tcp/link.rs`), who compares (`kv-store`, `client`).

use std::num::NonZeroU64;

use types::{Checksum, ChecksumBuilder};

/// Checksums of bytes that come in order, one for every `unit_bytes` of them.
pub(crate) struct Digest {
    unit_bytes: u64,
    /// Bytes of the unit that `open` has taken.
    taken: u64,
    open: ChecksumBuilder,
    done: Vec<Checksum>,
}

impl Digest {
    pub(crate) fn new(unit_bytes: NonZeroU64) -> Self {
        Self {
            unit_bytes: unit_bytes.get(),
            taken: 0,
            open: ChecksumBuilder::default(),
            done: Vec::new(),
        }
    }

    /// Takes the next bytes.
    pub(crate) fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let missing = usize::try_from(self.unit_bytes - self.taken).unwrap_or(usize::MAX);
            let (of_unit, rest) = bytes.split_at(bytes.len().min(missing));
            self.open.update(of_unit);
            self.taken += of_unit.len() as u64;
            bytes = rest;
            if self.taken == self.unit_bytes {
                self.done.push(std::mem::take(&mut self.open).finish());
                self.taken = 0;
            }
        }
    }

    /// The checksums of all units that are complete.
    pub(crate) fn finish(self) -> Vec<Checksum> {
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_units_however_the_bytes_come() {
        let bytes: Vec<u8> = (0..5_000_u32).map(|index| (index % 251) as u8).collect();
        let whole: Vec<_> = bytes.chunks_exact(1_500).map(Checksum::of).collect();
        for piece in [1, 64, 999, 1_500, 1_501, 5_000] {
            let mut digest = Digest::new(NonZeroU64::new(1_500).expect("some"));
            bytes.chunks(piece).for_each(|piece| digest.take(piece));
            assert_eq!(digest.finish(), whole, "in pieces of {piece}");
        }
    }
}
