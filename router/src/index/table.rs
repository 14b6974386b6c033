//! Where each block lies among the segments, by key: a hash table whose hash is the key itself.
//!
//! Keys are uniformly random (they are a part of a cryptographic hash), so where a key would lie if they were evenly spread in their
//! order is where it is looked for, and then to the right of that, around the end, up to a free entry. A look-up so reads
//! one place of memory, and growing copies from left to right.
//!
//! Invariant: no free entry lies between an entry and its home.

/// Tables that grow apart, so that growing one of them is short: 2 ms at 10 million blocks.
const SHARD_BITS: u32 = 8;
/// Entries of a shard when it gets its first one.
const ENTRIES_MIN: usize = 64;
/// A shard with fewer grows fourfold, which halves the copying; all shards together then take 4 MiB.
const ENTRIES_FEW: usize = 1024;
/// Most entries between a new one and its home. Random keys have some five; keys that someone searched for a common beginning
/// could otherwise make every look-up as long as there are of them.
const PROBES_MAX: usize = 1024;

/// A block's place: which segment, and how many of its blocks come before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) segment: u32,
    pub(super) at: u32,
}

#[derive(Debug)]
pub(super) struct Table {
    shards: Vec<Shard>,
    /// Blocks ever removed: each may move others.
    removals: u64,
}

/// Where a block can be inserted that is not there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vacancy {
    key: u64,
    at: usize,
    removals: u64,
}

#[derive(Debug, Default)]
struct Shard {
    entries: Vec<Entry>,
    len: usize,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    key: u64,
    place: Place,
}

const FREE: Entry = Entry {
    key: 0,
    place: Place {
        segment: u32::MAX,
        at: 0,
    },
};

impl Table {
    pub(super) fn new() -> Self {
        Self {
            shards: (0..1 << SHARD_BITS).map(|_| Shard::default()).collect(),
            removals: 0,
        }
    }

    pub(super) fn get(&self, key: u64) -> Option<Place> {
        let shard = &self.shards[shard_of(key)];
        let found = shard.find(key).ok()?;
        Some(shard.entries[found].place)
    }

    /// Where `key` is, or else where it can be inserted. `None` if too many keys like it are there.
    #[inline(always)]
    pub(super) fn get_or_vacancy(&mut self, key: u64) -> Option<Result<Place, Vacancy>> {
        let shard = &mut self.shards[shard_of(key)];
        // At two thirds a look-up reads some five entries: one or two lines of memory.
        if (shard.len + 1) * 3 > shard.entries.len() * 2 {
            shard.grow();
        }
        match shard.find(key) {
            Ok(at) => Some(Ok(shard.entries[at].place)),
            Err(at) => {
                let removals = self.removals;
                (shard.distance(shard.home(key), at) < PROBES_MAX).then_some(Err(Vacancy {
                    key,
                    at,
                    removals,
                }))
            }
        }
    }

    /// Inserts a block; there was no other insertion since it was looked for.
    pub(super) fn insert(&mut self, vacancy: Vacancy, place: Place) {
        let Vacancy {
            key,
            mut at,
            removals,
        } = vacancy;
        let shard = &mut self.shards[shard_of(key)];
        if removals != self.removals {
            at = shard.find(key).unwrap_or_else(|at| at);
        }
        shard.entries[at] = Entry { key, place };
        shard.len += 1;
    }

    pub(super) fn remove(&mut self, key: u64) {
        let shard = &mut self.shards[shard_of(key)];
        if let Ok(at) = shard.find(key) {
            shard.remove(at);
            self.removals += 1;
        }
    }

    /// Reads where each of `keys` lies. None of these reads waits for another, so the memory serves them together;
    /// the operations that follow find what they need in the cache.
    pub(super) fn fetch(&self, keys: impl Iterator<Item = u64>) {
        let read = keys.fold(0, |read, key| {
            let shard = &self.shards[shard_of(key)];
            read ^ shard.entries.get(shard.home(key)).map_or(0, |entry| entry.key)
        });
        std::hint::black_box(read);
    }

    /// How many blocks there are; checks that each can be found.
    pub(super) fn check_integrity(&self) -> usize {
        for (number, shard) in self.shards.iter().enumerate() {
            let used = shard
                .entries
                .iter()
                .enumerate()
                .filter(|(_, entry)| !entry.is_free());
            for (at, entry) in used.clone() {
                assert_eq!((shard_of(entry.key), shard.find(entry.key)), (number, Ok(at)));
            }
            assert_eq!(used.count(), shard.len);
        }
        self.shards.iter().map(|shard| shard.len).sum()
    }
}

fn shard_of(key: u64) -> usize {
    (key >> (64 - SHARD_BITS)) as usize
}

impl Entry {
    fn is_free(&self) -> bool {
        self.place.segment == FREE.place.segment
    }
}

impl Shard {
    fn home(&self, key: u64) -> usize {
        ((u128::from(key << SHARD_BITS) * self.entries.len() as u128) >> 64) as usize
    }

    fn after(&self, at: usize) -> usize {
        if at + 1 == self.entries.len() { 0 } else { at + 1 }
    }

    /// Entries from one on to another one, around the end.
    fn distance(&self, from: usize, to: usize) -> usize {
        let around = if to < from { self.entries.len() } else { 0 };
        around + to - from
    }

    /// Where `key` is, or else where it would be put.
    fn find(&self, key: u64) -> Result<usize, usize> {
        let mut at = self.home(key);
        while let Some(entry) = self.entries.get(at)
            && !entry.is_free()
        {
            if entry.key == key {
                return Ok(at);
            }
            at = self.after(at);
        }
        Err(at)
    }

    /// Frees an entry; those after it that their homes let move up.
    fn remove(&mut self, at: usize) {
        let (mut free, mut next) = (at, self.after(at));
        while !self.entries[next].is_free() {
            let home = self.home(self.entries[next].key);
            if self.distance(home, next) >= self.distance(free, next) {
                self.entries[free] = self.entries[next];
                free = next;
            }
            next = self.after(next);
        }
        self.entries[free] = FREE;
        self.len -= 1;
    }

    /// Twice as many entries, or more: after it, at most a third of them are used. Apart from what calls it often and needs it rarely.
    #[cold]
    #[inline(never)]
    fn grow(&mut self) {
        let times = if self.entries.len() < ENTRIES_FEW { 4 } else { 2 };
        let len = ENTRIES_MIN.max(times * self.entries.len());
        let entries = std::mem::replace(&mut self.entries, vec![FREE; len]);
        for entry in entries.into_iter().filter(|entry| !entry.is_free()) {
            let mut at = self.home(entry.key);
            while !self.entries[at].is_free() {
                at = self.after(at);
            }
            self.entries[at] = entry;
        }
    }
}
