//! Checksums of bytes that pass through this processor anyway.
//!
//! Elsewhere: the hash (`digest/xxh3.rs`), who copies (`tcp/link.rs`), who compares (`kv-store`, `client`).

pub(crate) mod xxh3;

use std::num::NonZeroU64;
use std::slice;

use types::Checksum;

use crate::copy::{self, Stores};
use xxh3::{SHORT_BYTES_MAX, Xxh3};

/// The checksum of a known number of bytes, as far as they have come.
#[derive(Clone)]
pub(crate) struct Unit {
    hash: Hash,
    missing: u64,
}

#[derive(Clone)]
enum Hash {
    /// What has come.
    Short(Vec<u8>),
    Long(Xxh3),
}

impl Unit {
    pub(crate) fn new(bytes: u64) -> Self {
        let hash = if bytes > SHORT_BYTES_MAX {
            Hash::Long(Xxh3::new(bytes))
        } else {
            Hash::Short(Vec::new())
        };
        Self { hash, missing: bytes }
    }

    /// Bytes that have not come yet.
    pub(crate) fn missing(&self) -> u64 {
        self.missing
    }

    /// Takes the next `bytes` bytes, which lie at `from`, and copies them to `to` as `stores` says.
    ///
    /// # Safety
    ///
    /// As [`copy::stripes`]; and no more bytes than are missing.
    pub(crate) unsafe fn take(&mut self, from: *const u8, to: *mut u8, bytes: usize, stores: Stores) {
        self.missing -= bytes as u64;
        // SAFETY: the caller's promise. What a short unit hashes is what it wrote, or the caller's where nothing is written.
        unsafe {
            match &mut self.hash {
                Hash::Long(hash) => hash.take(from, to, bytes, stores),
                Hash::Short(come) => {
                    copy::plain(from, to, bytes, stores);
                    let seen = if stores == Stores::None {
                        from
                    } else {
                        to.cast_const()
                    };
                    come.extend_from_slice(slice::from_raw_parts(seen, bytes));
                }
            }
        }
    }

    /// The checksum, if all bytes have come.
    pub(crate) fn finish(&self) -> Option<Checksum> {
        match &self.hash {
            Hash::Long(hash) => hash.finish(),
            Hash::Short(come) => (self.missing == 0).then(|| Checksum::of(come)),
        }
    }
}

/// Checksums of bytes that come in order, one for every `unit_bytes` of them.
pub(crate) struct Digest {
    unit_bytes: u64,
    open: Unit,
    done: Vec<Checksum>,
}

impl Digest {
    pub(crate) fn new(unit_bytes: NonZeroU64) -> Self {
        Self {
            unit_bytes: unit_bytes.get(),
            open: Unit::new(unit_bytes.get()),
            done: Vec::new(),
        }
    }

    /// Takes the next `bytes` bytes, which lie at `from`, and copies them to `to` as `stores` says.
    ///
    /// # Safety
    ///
    /// As [`copy::stripes`].
    pub(crate) unsafe fn take(&mut self, from: *const u8, to: *mut u8, bytes: usize, stores: Stores) {
        let mut done = 0;
        while done < bytes {
            let missing = usize::try_from(self.open.missing()).unwrap_or(usize::MAX);
            let of_unit = missing.min(bytes - done);
            // SAFETY: the next of the caller's bytes, at most as many as the unit lacks.
            unsafe {
                self.open
                    .take(from.wrapping_add(done), to.wrapping_add(done), of_unit, stores);
            }
            done += of_unit;
            if let Some(checksum) = self.open.finish() {
                self.done.push(checksum);
                self.open = Unit::new(self.unit_bytes);
            }
        }
    }

    /// The checksums of all units that are complete.
    pub(crate) fn finish(self) -> Vec<Checksum> {
        self.done
    }
}

#[cfg(test)]
mod tests;
