//! Blocks by key, in the order of their keys: a hash table whose hash is the key itself.
//!
//! Keys are uniformly random (they are a part of a cryptographic hash), so where a key would lie if they were evenly spread
//! is a good guess of where it lies. Entries go to the right of that place and stay sorted; a look-up ends at the first larger key.
//! Sorted entries make growing a copy from left to right, and a key a cursor that survives every change.
//!
//! Invariant: no unused entry lies between an entry and its home.

use super::holders::Holders;

/// Tables that grow apart, so that growing one of them is short: 2 ms at 10 million blocks.
const SHARD_BITS: u32 = 8;
/// Homes of a shard when it gets its first entry.
const HOMES_MIN: usize = 16;
/// Entries beyond the last home, for those that it displaces.
const MARGIN: usize = 32;
/// Most entries that one insertion may move. Random keys move some five; keys that someone searched for a common beginning
/// could otherwise make every insertion as long as there are of them.
const MOVES_MAX: usize = 4096;

/// What is known of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) key: u64,
    /// The key of the block before it.
    pub(super) parent: u64,
    pub(super) holders: Holders,
    /// Blocks in the table that were stored after it while it was there; a hint for eviction.
    pub(super) children: u16,
    /// When it or a child of it was last stored.
    pub(super) used: u8,
}

/// Where an entry is, or would be; until the next insertion or removal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    shard: usize,
    at: usize,
}

#[derive(Debug)]
pub(super) struct Table {
    shards: Vec<Shard>,
}

#[derive(Debug, Default)]
struct Shard {
    entries: Vec<Entry>,
    homes: usize,
    len: usize,
}

const UNUSED: Entry = Entry {
    key: 0,
    parent: 0,
    holders: Holders::NONE,
    children: 0,
    used: 0,
};

impl Table {
    pub(super) fn new() -> Self {
        Self {
            shards: (0..1 << SHARD_BITS).map(|_| Shard::default()).collect(),
        }
    }

    /// Where `key` is, or where it would have to be inserted.
    pub(super) fn find(&self, key: u64) -> Result<Place, Place> {
        let shard = shard_of(key);
        let found = self.shards[shard].find(key);
        found
            .map(|at| Place { shard, at })
            .map_err(|at| Place { shard, at })
    }

    pub(super) fn get(&self, key: u64) -> Option<&Entry> {
        let shard = &self.shards[shard_of(key)];
        shard.find(key).ok().map(|at| &shard.entries[at])
    }

    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut Entry> {
        let shard = &mut self.shards[shard_of(key)];
        shard.find(key).ok().map(|at| &mut shard.entries[at])
    }

    pub(super) fn at(&self, place: Place) -> &Entry {
        &self.shards[place.shard].entries[place.at]
    }

    pub(super) fn at_mut(&mut self, place: Place) -> &mut Entry {
        &mut self.shards[place.shard].entries[place.at]
    }

    /// Inserts an entry where [`Table::find`] did not find its key. Whether there was room.
    pub(super) fn insert(&mut self, place: Place, entry: Entry) -> bool {
        self.shards[place.shard].insert(place.at, entry)
    }

    pub(super) fn remove(&mut self, place: Place) {
        self.shards[place.shard].remove(place.at);
    }

    /// The first entry whose key is `key` or larger.
    pub(super) fn next(&self, key: u64) -> Option<Place> {
        let first = shard_of(key);
        let at = self.shards[first].next(key).map(|at| Place { shard: first, at });
        at.or_else(|| {
            (first + 1..self.shards.len())
                .find_map(|shard| self.shards[shard].next(0).map(|at| Place { shard, at }))
        })
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

    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        let entries = self.shards.iter().flat_map(|shard| &shard.entries);
        entries.filter(|entry| !entry.holders.is_empty())
    }

    pub(super) fn check_integrity(&self) {
        for (number, shard) in self.shards.iter().enumerate() {
            let used: Vec<usize> = (0..shard.entries.len())
                .filter(|at| !shard.entries[*at].holders.is_empty())
                .collect();
            assert_eq!(used.len(), shard.len);
            for at in &used {
                let key = shard.entries[*at].key;
                assert_eq!((shard_of(key), shard.find(key)), (number, Ok(*at)));
            }
            assert!(
                used.windows(2)
                    .all(|pair| shard.entries[pair[0]].key < shard.entries[pair[1]].key)
            );
        }
    }
}

fn shard_of(key: u64) -> usize {
    (key >> (64 - SHARD_BITS)) as usize
}

impl Shard {
    fn home(&self, key: u64) -> usize {
        home(key, self.homes)
    }

    fn find(&self, key: u64) -> Result<usize, usize> {
        let mut at = self.home(key);
        while let Some(entry) = self.entries.get(at) {
            if entry.holders.is_empty() || entry.key > key {
                break;
            }
            if entry.key == key {
                return Ok(at);
            }
            at += 1;
        }
        Err(at)
    }

    fn next(&self, key: u64) -> Option<usize> {
        let from = self.home(key);
        let rest = self.entries.get(from..)?;
        let found = rest
            .iter()
            .position(|entry| !entry.holders.is_empty() && entry.key >= key);
        found.map(|after| from + after)
    }

    fn insert(&mut self, mut at: usize, entry: Entry) -> bool {
        // At two thirds a look-up reads two entries and an insertion moves few.
        if (self.len + 1) * 3 > self.homes * 2 {
            self.grow();
            at = self.find(entry.key).unwrap_or_else(|at| at);
        }
        let used = self.entries[at..]
            .iter()
            .take_while(|entry| !entry.holders.is_empty());
        let end = at + used.take(MOVES_MAX + 1).count();
        if end - at > MOVES_MAX {
            return false;
        }
        if end + 1 >= self.entries.len() {
            self.entries.reserve_exact(MARGIN + 1);
            self.entries.resize(end + 1 + MARGIN, UNUSED);
        }
        self.entries.copy_within(at..end, at + 1);
        self.entries[at] = entry;
        self.len += 1;
        true
    }

    fn remove(&mut self, at: usize) {
        let displaced = self.entries[at + 1..].iter().enumerate();
        let end = at
            + 1
            + displaced
                .take_while(|(after, entry)| {
                    !entry.holders.is_empty() && self.home(entry.key) < at + 1 + after
                })
                .count();
        self.entries.copy_within(at + 1..end, at);
        self.entries[end - 1] = UNUSED;
        self.len -= 1;
    }

    /// Half as many homes again: after it, 44 % of them are used.
    fn grow(&mut self) {
        let homes = HOMES_MIN.max(self.homes + self.homes / 2);
        let mut entries = vec![UNUSED; homes + MARGIN];
        let mut next = 0;
        for entry in self.entries.iter().filter(|entry| !entry.holders.is_empty()) {
            let at = next.max(home(entry.key, homes));
            if at + 1 >= entries.len() {
                entries.reserve_exact(MARGIN + 1);
                entries.resize(at + 1 + MARGIN, UNUSED);
            }
            entries[at] = *entry;
            next = at + 1;
        }
        (self.entries, self.homes) = (entries, homes);
    }
}

fn home(key: u64, homes: usize) -> usize {
    ((u128::from(key << SHARD_BITS) * homes as u128) >> 64) as usize
}
