//! Runs of blocks that follow each other, and how far along each of them its holders go.
//!
//! A chain that branches nowhere is one segment. Where another chain leaves it, at whatever block, a segment begins that
//! names the block before it; nothing is split or copied. A block that continues the end of a segment makes it longer.
//!
//! Invariant: the holders of a segment hold blocks from its beginning on without a gap, and its last block has a holder.

use types::BlockHash;

use super::key_of;
use super::table::Place;

/// One node and a segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) slot: u32,
    /// Leading blocks of the segment that it holds.
    pub(super) blocks: u32,
    /// How many of them are in memory.
    pub(super) in_memory: u32,
}

/// Blocks that follow each other. One without blocks is vacant.
#[derive(Debug, Default)]
pub(super) struct Segment {
    pub(super) keys: Vec<u64>,
    /// By slot.
    pub(super) runs: Vec<Run>,
    /// The block before the first one, if it was there. It may have gone since: see [`Segments::link`].
    before: Option<(Place, u64)>,
    /// Segments that begin after one of these blocks, and how many blocks the last one of them needs. Hints for eviction.
    branches: u32,
    branched: u32,
    /// When a block of it was last stored.
    pub(super) used: u8,
}

#[derive(Debug, Default)]
pub(super) struct Segments {
    segments: Vec<Segment>,
    vacant: Vec<u32>,
}

impl Run {
    /// Takes block `at`, one of the run, to be in memory or not. What follows a block that is not in memory is not taken to be.
    pub(super) fn set_in_memory(&mut self, at: u32, in_memory: bool) {
        if !in_memory {
            self.in_memory = self.in_memory.min(at);
        } else if self.in_memory == at {
            self.in_memory = at + 1;
        }
    }

    /// Ends the run after `blocks` blocks. How many these are less.
    pub(super) fn shorten(&mut self, blocks: u32) -> usize {
        let gone = self.blocks.saturating_sub(blocks);
        self.blocks -= gone;
        self.in_memory = self.in_memory.min(self.blocks);
        gone as usize
    }
}

impl Segment {
    pub(super) fn len(&self) -> u32 {
        self.keys.len() as u32
    }

    /// Where the run of `slot` is, or would be.
    pub(super) fn find(&self, slot: usize) -> Result<usize, usize> {
        match self.runs.as_slice() {
            [only] if only.slot as usize == slot => Ok(0),
            runs => runs.binary_search_by_key(&slot, |run| run.slot as usize),
        }
    }

    /// Leading blocks that `slot` holds.
    pub(super) fn held(&self, slot: usize) -> u32 {
        self.find(slot).map_or(0, |at| self.runs[at].blocks)
    }

    /// One block more is held by `slot`.
    pub(super) fn extend(&mut self, slot: usize, in_memory: bool) {
        let at = self.find(slot).unwrap_or_else(|at| {
            let run = Run {
                slot: slot as u32,
                blocks: 0,
                in_memory: 0,
            };
            if self.runs.is_empty() {
                self.runs.reserve_exact(1);
            }
            self.runs.insert(at, run);
            at
        });
        let run = &mut self.runs[at];
        run.blocks += 1;
        run.set_in_memory(run.blocks - 1, in_memory);
    }

    /// How many of `hashes`, of which the first one is its first block, lie along the segment. A block's hash covers all before it,
    /// so this is a search.
    pub(super) fn common(&self, hashes: &[BlockHash]) -> usize {
        let is_same = |at: usize| key_of(&hashes[at]) == self.keys[at];
        let most = self.keys.len().min(hashes.len());
        if is_same(most - 1) {
            return most;
        }
        let (mut same, mut other) = (1, most - 1);
        while same < other {
            let middle = same + (other - same) / 2;
            if is_same(middle) {
                same = middle + 1;
            } else {
                other = middle;
            }
        }
        same
    }

    /// How many leading blocks no branch needs to go.
    pub(super) fn branched(&self) -> u32 {
        self.branched
    }

    fn push(&mut self, key: u64) {
        let keys = &mut self.keys;
        if keys.len() == keys.capacity() {
            // Half as many again, and not twice as many; the smallest allocation has room for three.
            keys.reserve_exact(keys.len() / 2 + 3);
        }
        keys.push(key);
    }
}

impl Segments {
    pub(super) fn get(&self, number: u32) -> &Segment {
        &self.segments[number as usize]
    }

    pub(super) fn get_mut(&mut self, number: u32) -> &mut Segment {
        &mut self.segments[number as usize]
    }

    /// Numbers that segments have or had.
    pub(super) fn numbers(&self) -> u32 {
        self.segments.len() as u32
    }

    /// Whether `place` is where block `key` lies.
    pub(super) fn has(&self, place: Place, key: u64) -> bool {
        let segment = self.segments.get(place.segment as usize);
        segment.is_some_and(|segment| segment.keys.get(place.at as usize) == Some(&key))
    }

    /// The block after `place` on its segment, if it is `key`.
    pub(super) fn next(&self, place: Place, key: u64) -> Option<Place> {
        let at = place.at + 1;
        let next = Place { at, ..place };
        self.has(next, key).then_some(next)
    }

    /// Makes room for a block, which its holder must be added to: after the block `before`, or else as the first one of a chain.
    pub(super) fn add(&mut self, key: u64, before: Option<(Place, u64)>) -> Place {
        if let Some((place, _)) = before
            && self.get(place.segment).len() == place.at + 1
        {
            self.get_mut(place.segment).push(key);
            return Place {
                at: place.at + 1,
                ..place
            };
        }
        let number = self.vacant.pop().unwrap_or_else(|| {
            self.segments.push(Segment::default());
            self.segments.len() as u32 - 1
        });
        self.get_mut(number).push(key);
        self.join(number, before);
        Place {
            segment: number,
            at: 0,
        }
    }

    /// The block before a segment, where it still is there.
    pub(super) fn link(&self, number: u32) -> Option<Place> {
        let (place, key) = self.get(number).before?;
        self.has(place, key).then_some(place)
    }

    /// Says which block is before a segment, unless that is known.
    pub(super) fn join(&mut self, number: u32, before: Option<(Place, u64)>) {
        if let Some((place, _)) = before
            && place.segment != number
            && self.link(number).is_none()
        {
            self.get_mut(number).before = before;
            let parent = self.get_mut(place.segment);
            parent.branches += 1;
            parent.branched = parent.branched.max(place.at + 1);
        }
    }

    /// Drops blocks that no run covers. Which these are; without any left the segment is vacant.
    pub(super) fn trim(&mut self, number: u32) -> Vec<u64> {
        let segment = self.get_mut(number);
        let longest = segment.runs.iter().map(|run| run.blocks).max().unwrap_or(0);
        let dropped = segment.keys.split_off(longest as usize);
        segment.branched = segment.branched.min(longest);
        if segment.keys.len() < segment.keys.capacity() / 4 {
            segment.keys.shrink_to_fit();
        }
        if longest == 0 {
            self.release(number);
        }
        dropped
    }

    fn release(&mut self, number: u32) {
        if let Some(place) = self.link(number) {
            let parent = self.get_mut(place.segment);
            // One that was there before a branch lost sight of it does not count that branch.
            parent.branches = parent.branches.saturating_sub(1);
            if parent.branches == 0 {
                parent.branched = 0;
            }
        }
        *self.get_mut(number) = Segment::default();
        self.vacant.push(number);
    }

    /// The segments that are not vacant.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Segment)> {
        let numbered = (0u32..).zip(&self.segments);
        numbered.filter(|(_, segment)| !segment.keys.is_empty())
    }
}
