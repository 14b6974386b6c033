//! Where each block lies among the segments, by key.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};

/// Maps that grow apart, so that growing one of them is short: some ms at 10 million blocks.
const SHARD_BITS: u32 = 8;
/// Which bits of a key choose its map: a map uses the highest and the lowest ones itself.
const SHARD_SHIFT: u32 = 40;

/// A block's place: which segment, and how many of its blocks come before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) segment: u32,
    pub(super) at: u32,
}

#[derive(Debug)]
pub(super) struct Table {
    shards: Vec<HashMap<u64, Place, BuildHasherDefault<KeyHasher>>>,
}

/// Keys are a part of a cryptographic hash: they are their own hashes.
#[derive(Debug, Default)]
pub(super) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            shards: (0..1 << SHARD_BITS).map(|_| HashMap::default()).collect(),
        }
    }

    pub(super) fn get(&self, key: u64) -> Option<Place> {
        self.shards[shard_of(key)].get(&key).copied()
    }

    /// Puts a block that is not there.
    pub(super) fn insert(&mut self, key: u64, place: Place) {
        if let Entry::Vacant(vacant) = self.shards[shard_of(key)].entry(key) {
            vacant.insert(place);
        }
    }

    pub(super) fn remove(&mut self, key: u64) {
        self.shards[shard_of(key)].remove(&key);
    }

    /// Looks each of `keys` up. None of these reads waits for another, so the memory serves them together;
    /// the operations that follow find what they need in the cache.
    pub(super) fn fetch(&self, keys: impl Iterator<Item = u64>) {
        let there = keys.filter(|key| self.shards[shard_of(*key)].contains_key(key));
        std::hint::black_box(there.count());
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, Place)> {
        let entries = self.shards.iter().flatten();
        entries.map(|(key, place)| (*key, *place))
    }
}

fn shard_of(key: u64) -> usize {
    (key >> SHARD_SHIFT) as usize % (1 << SHARD_BITS)
}
