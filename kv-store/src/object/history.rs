//! What a node remembers of segments: how often requests found them here, which ones the bucket has, and which ones it has not.
//!
//! Nobody has a list of the bucket's objects. What is remembered is a guess that saves requests: a wrong one costs a request or a hit, and
//! never a wrong token.
//!
//! Bounds: each memory holds `REMEMBERED_MAX` segments and forgets the one it has known for longest; the queue holds `QUEUED_MAX`.
//!
//! Pure: callers pass `now`.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use types::BlockHash;

use super::segment::Grid;
use crate::digest::DigestBuild;

/// Segments remembered of each kind: some MiB, and at 128 tokens per segment the last eight million tokens.
const REMEMBERED_MAX: usize = 1 << 16;
/// Segments that wait to be written. More than a minute of the default rate; what finds no place waits for its next use.
const QUEUED_MAX: usize = 1024;

/// A segment that is worth keeping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Hash of the block before its first one: the name of the segment that must be there before it. `None` after the root.
    pub before: Option<BlockHash>,
    /// Its blocks.
    pub blocks: Vec<BlockHash>,
    /// What the bucket has under its name is no good.
    pub replaces: bool,
}

/// What one node remembers.
#[derive(Debug)]
pub struct History {
    grid: Grid,
    /// Requests that found a segment here before it is written. The one that computed it is not among them.
    reuses_min: u32,
    missing_ttl: Duration,
    known: Recent<Known>,
    missing: Recent<Instant>,
    queue: VecDeque<Candidate>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// Found here by so many requests.
    Reused(u32),
    /// In the queue, or being written.
    Queued,
    /// In the bucket.
    Stored,
    /// In the bucket, but not as it was written.
    Damaged,
}

impl Candidate {
    /// What its object is called after.
    pub fn name(&self) -> BlockHash {
        *self.blocks.last().expect("a segment has blocks")
    }
}

impl History {
    /// Remembers nothing yet. Segments are worth keeping once `uses_min` requests had them, the one that computed them included.
    pub fn new(grid: Grid, uses_min: u32, missing_ttl: Duration) -> Self {
        Self {
            grid,
            reuses_min: uses_min.saturating_sub(1),
            missing_ttl,
            known: Recent::default(),
            missing: Recent::default(),
            queue: VecDeque::new(),
        }
    }

    /// A request found these leading blocks of its chain in a cache.
    pub fn reused(&mut self, run: &[BlockHash]) {
        self.note(run, |reuses| reuses.saturating_add(1));
    }

    /// Somebody wants these leading blocks of a chain to be kept.
    pub fn wanted(&mut self, run: &[BlockHash]) {
        let enough = self.reuses_min;
        self.note(run, |_| enough);
    }

    fn note(&mut self, run: &[BlockHash], count: impl Fn(u32) -> u32) {
        for range in self.grid.segments(0, run.len()) {
            let blocks = &run[range.clone()];
            let name = blocks[blocks.len() - 1];
            let (reuses, replaces) = match self.known.get(&name) {
                Some(Known::Stored | Known::Queued) => continue,
                Some(Known::Damaged) => (self.reuses_min, true),
                Some(Known::Reused(reuses)) => (count(*reuses), false),
                None => (count(0), false),
            };
            if reuses < self.reuses_min || self.queue.len() >= QUEUED_MAX {
                if !replaces {
                    self.known.insert(name, Known::Reused(reuses));
                }
                continue;
            }
            self.known.insert(name, Known::Queued);
            self.queue.push_back(Candidate {
                before: range.start.checked_sub(1).map(|before| run[before]),
                blocks: blocks.to_vec(),
                replaces,
            });
        }
    }

    /// The next segment to write. Say with [`History::wrote`] or [`History::gave_up`] what became of it.
    pub fn take_next(&mut self) -> Option<Candidate> {
        self.queue.pop_front()
    }

    /// Whether the bucket is known to have the segment with this name.
    pub fn is_stored(&self, name: &BlockHash) -> bool {
        self.known.get(name) == Some(&Known::Stored)
    }

    /// The bucket has the segment.
    pub fn wrote(&mut self, name: BlockHash) {
        self.known.insert(name, Known::Stored);
        self.missing.remove(&name);
    }

    /// The segment was not written. Its next use tries again.
    pub fn gave_up(&mut self, candidate: &Candidate) {
        let known = if candidate.replaces {
            Known::Damaged
        } else {
            Known::Reused(self.reuses_min.saturating_sub(1))
        };
        self.known.insert(candidate.name(), known);
    }

    /// The bucket does not have the segment with this name. Its next use here writes it, if it was thought to be there.
    pub fn is_absent(&mut self, name: BlockHash, now: Instant) {
        if self.is_stored(&name) {
            self.known
                .insert(name, Known::Reused(self.reuses_min.saturating_sub(1)));
        }
        self.missing.insert(name, now + self.missing_ttl);
    }

    /// What the bucket has under this name is no good: it is not asked for again for a while, and its next use here replaces it.
    pub fn is_damaged(&mut self, name: BlockHash, now: Instant) {
        self.known.insert(name, Known::Damaged);
        self.missing.insert(name, now + self.missing_ttl);
    }

    /// Whether asking the bucket for the segment is worth a request.
    pub fn may_be_stored(&self, name: &BlockHash, now: Instant) -> bool {
        self.missing.get(name).is_none_or(|until| *until <= now)
    }
}

/// A map that forgets what it has known for longest.
#[derive(Debug)]
struct Recent<V> {
    values: HashMap<BlockHash, (V, u64), DigestBuild>,
    /// Names with the number of the insertion that put them there; older ones of the same name are void.
    order: VecDeque<(BlockHash, u64)>,
    inserted: u64,
}

impl<V> Default for Recent<V> {
    fn default() -> Self {
        Self {
            values: HashMap::default(),
            order: VecDeque::new(),
            inserted: 0,
        }
    }
}

impl<V> Recent<V> {
    fn get(&self, name: &BlockHash) -> Option<&V> {
        self.values.get(name).map(|(value, _)| value)
    }

    /// A name that is there keeps its age.
    fn insert(&mut self, name: BlockHash, value: V) {
        if let Some((known, _)) = self.values.get_mut(&name) {
            *known = value;
            return;
        }
        self.inserted += 1;
        self.values.insert(name, (value, self.inserted));
        self.order.push_back((name, self.inserted));
        while self.order.len() > REMEMBERED_MAX {
            let Some((oldest, number)) = self.order.pop_front() else {
                return;
            };
            if self
                .values
                .get(&oldest)
                .is_some_and(|(_, known)| *known == number)
            {
                self.values.remove(&oldest);
            }
        }
    }

    fn remove(&mut self, name: &BlockHash) {
        self.values.remove(name);
    }
}

#[cfg(test)]
mod tests;
