//! What a full index forgets: chains from their ends, those first that were stored longest ago.
//!
//! Near the bound a hand goes over the table, in the order of keys and so at random. Of a few ends of chains that it meets, the
//! oldest one is forgotten, then the block before it, and so on, up to where the chain branches or to a block that was stored again since.
//! How far an insertion goes is bounded; room is made ahead of need, so that long ways between ends
//! of chains spread over many insertions. Deterministic: the same events leave the same index.

use super::PrefixIndex;
use super::table::{Entry, Place};

/// Room is made when less than this part of the bound is left.
const RESERVE: usize = 64;
/// Entries that one insertion looks at or forgets.
const STEPS: usize = 64;
/// Ends of chains that compete for being the oldest.
const SAMPLES: u8 = 4;
/// Moments that a full index tells apart; after 16 times as many, old is taken for new.
const MOMENTS: usize = 16;

#[derive(Debug)]
pub(super) struct Eviction {
    /// Pairs from which on room is made.
    crowded: usize,
    /// Insertions in one moment, and how many this one has seen.
    moment: usize,
    inserted: usize,
    now: u8,
    hand: u64,
    /// The oldest end met, and how many were met.
    oldest: Option<Tail>,
    samples: u8,
    /// What is being forgotten.
    tail: Option<Tail>,
    /// The last block that was left out: what follows it is too, for it would be of little use.
    left_out: Option<u64>,
}

/// The end of a chain. Blocks before it go with it unless they were used later than it was.
#[derive(Debug, Clone, Copy)]
struct Tail {
    key: u64,
    used: u8,
}

impl Eviction {
    pub(super) fn new(entries_max: usize) -> Self {
        Self {
            crowded: entries_max - entries_max / RESERVE,
            moment: entries_max / MOMENTS,
            inserted: 0,
            now: 0,
            hand: 0,
            oldest: None,
            samples: 0,
            tail: None,
            left_out: None,
        }
    }

    /// The current moment.
    pub(super) fn now(&self) -> u8 {
        self.now
    }

    /// A pair was inserted.
    pub(super) fn tick(&mut self) {
        self.inserted += 1;
        if self.inserted > self.moment {
            (self.inserted, self.now) = (0, self.now.wrapping_add(1));
        }
    }

    fn age(&self, used: u8) -> u8 {
        self.now.wrapping_sub(used)
    }

    /// Weighs the end of a chain; it is the next to go if it is the oldest of those met lately.
    fn sample(&mut self, end: Tail) {
        if self
            .oldest
            .is_none_or(|oldest| self.age(end.used) > self.age(oldest.used))
        {
            self.oldest = Some(end);
        }
        self.samples += 1;
        if self.samples == SAMPLES {
            self.samples = 0;
            self.tail = self.oldest.take();
        }
    }
}

impl PrefixIndex {
    /// Whether there is no room for a pair more, of a block `key` that follows `parent`. Makes some near the bound.
    pub(super) fn is_full_for(&mut self, key: u64, parent: u64) -> bool {
        let mut is_left_out = self.eviction.left_out == Some(parent);
        if !is_left_out && self.entries + self.stale >= self.eviction.crowded {
            self.make_room(key, parent);
            is_left_out = self.entries + self.stale >= self.entries_max;
        }
        if is_left_out {
            self.eviction.left_out = Some(key);
        } else if self.eviction.left_out == Some(key) {
            self.eviction.left_out = None;
        }
        is_left_out
    }

    /// Neither `key` nor `parent` is forgotten.
    fn make_room(&mut self, key: u64, parent: u64) {
        self.sweep(STEPS);
        for _ in 0..STEPS {
            if self.entries + self.stale < self.eviction.crowded {
                return;
            }
            let tail = self.eviction.tail.or_else(|| self.next_tail(key, parent));
            if let Some(tail) = tail {
                self.eviction.tail = self.forget_end(tail, key, parent);
            }
        }
    }

    /// Moves the hand by one entry.
    fn next_tail(&mut self, key: u64, parent: u64) -> Option<Tail> {
        let Some(place) = self.table.next(self.eviction.hand) else {
            self.eviction.hand = 0;
            return None;
        };
        let entry = *self.table.at(place);
        self.eviction.hand = entry.key.wrapping_add(1);
        if is_end(&entry, key, parent) {
            let (key, used) = (entry.key, entry.used);
            self.eviction.sample(Tail { key, used });
        }
        self.eviction.tail
    }

    /// Forgets a block if it is still the end of a chain. What goes next.
    fn forget_end(&mut self, tail: Tail, key: u64, parent: u64) -> Option<Tail> {
        let place = self.table.find(tail.key).ok()?;
        let entry = *self.table.at(place);
        let is_younger = self.eviction.age(entry.used) < self.eviction.age(tail.used);
        if !is_end(&entry, key, parent) || is_younger {
            return None;
        }
        self.forget_block(place);
        Some(Tail {
            key: entry.parent,
            used: tail.used,
        })
    }

    fn forget_block(&mut self, place: Place) {
        let entry = *self.table.at(place);
        let known = self.sets.count_among(entry.holders, self.nodes.live());
        self.drop_holders(place, |_, _| true);
        self.refused += known as u64;
    }
}

fn is_end(entry: &Entry, key: u64, parent: u64) -> bool {
    entry.children == 0 && entry.key != key && entry.key != parent
}
