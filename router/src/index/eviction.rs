//! What a full index forgets: chains from their ends, those first that were stored longest ago.
//!
//! Near the bound a hand goes over the segments, far from one to the next. Of a few with an end that it meets, the oldest one is
//! forgotten from its end up to where it branches, then the segment before it, and so on, up to one that was stored again since.
//! How far an insertion goes is bounded; room is made ahead of need, so that long ways between ends
//! of chains spread over many insertions. Deterministic: the same events leave the same index.

use super::PrefixIndex;

/// Room is made when less than this part of the bound is left.
const RESERVE: usize = 64;
/// Segments looked at, and blocks forgotten, by one insertion.
const STEPS: usize = 64;
/// Ends of chains that compete for being the oldest.
const SAMPLES: u8 = 4;
/// Moments that a full index tells apart; after 16 times as many, old is taken for new.
const MOMENTS: usize = 16;
/// The golden ratio of all numbers: steps of it come evenly near to every number.
const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

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

/// The end of a chain. Segments before it go with it unless they were used later than it was.
#[derive(Debug, Clone, Copy)]
struct Tail {
    segment: u32,
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
    /// Whether there is no room for a pair more, of a block `key` that follows `parent`. Makes some near the bound, and not of the
    /// segment `keep`.
    pub(super) fn is_full_for(&mut self, key: u64, parent: u64, keep: Option<u32>) -> bool {
        let mut is_left_out = self.eviction.left_out == Some(parent);
        if !is_left_out && self.occupied() >= self.eviction.crowded {
            self.make_room(keep);
            is_left_out = self.occupied() >= self.entries_max;
        }
        if is_left_out {
            self.leave_out(key);
        } else if self.eviction.left_out == Some(key) {
            self.eviction.left_out = None;
        }
        is_left_out
    }

    /// What follows `key` is left out, as it is.
    pub(super) fn leave_out(&mut self, key: u64) {
        self.eviction.left_out = Some(key);
    }

    fn make_room(&mut self, keep: Option<u32>) {
        let mut steps = STEPS;
        while steps > 0 && self.occupied() >= self.eviction.crowded {
            steps -= 1;
            let tail = self.eviction.tail.or_else(|| self.next_tail(keep));
            if let Some(tail) = tail {
                let before = self.occupied();
                self.eviction.tail = self.forget_end(tail, keep, steps + 1);
                steps = steps.saturating_sub(before - self.occupied());
            }
        }
    }

    /// Moves the hand by one segment.
    fn next_tail(&mut self, keep: Option<u32>) -> Option<Tail> {
        self.eviction.hand = self.eviction.hand.wrapping_add(STRIDE);
        let among = u128::from(self.segments.numbers());
        let segment = ((u128::from(self.eviction.hand) * among) >> 64) as u32;
        if among > 0 && self.has_end(segment, keep) {
            let used = self.segments.get(segment).used;
            self.eviction.sample(Tail { segment, used });
        }
        self.eviction.tail
    }

    /// Forgets up to `most` last blocks of a segment if it still has an end. What goes next.
    fn forget_end(&mut self, tail: Tail, keep: Option<u32>, most: usize) -> Option<Tail> {
        let segment = self.segments.get(tail.segment);
        let is_younger = self.eviction.age(segment.used) < self.eviction.age(tail.used);
        if !self.has_end(tail.segment, keep) || is_younger {
            return None;
        }
        let excess = self.occupied() - self.eviction.crowded + 1;
        let blocks = excess.div_ceil(segment.runs.len()).min(most) as u32;
        let left = segment.len().saturating_sub(blocks).max(segment.branched());
        let next = match left {
            0 => self.segments.link(tail.segment).map(|place| place.segment),
            _ => Some(tail.segment),
        };
        self.forget_beyond(tail.segment, left);
        next.map(|segment| Tail { segment, ..tail })
    }

    fn forget_beyond(&mut self, number: u32, left: u32) {
        let runs = self.segments.get(number).runs.len();
        // From the last one, since a run without blocks goes.
        for at in (0..runs).rev() {
            let known = self.entries;
            self.shorten(number, at, left);
            self.refused += (known - self.entries) as u64;
        }
        self.trim(number);
    }

    /// Whether a segment has last blocks that no branch needs.
    fn has_end(&self, number: u32, keep: Option<u32>) -> bool {
        let segment = self.segments.get(number);
        segment.len() > segment.branched() && keep != Some(number)
    }
}
