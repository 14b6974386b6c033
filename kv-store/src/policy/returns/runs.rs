//! The runs of blocks that requests used, newest last, and how far each has waited.
//!
//! Invariant: a run is a piece of one chain, so at most one of its blocks is evictable: its deepest cached one. The
//! number of runs is bounded; the oldest is forgotten first.

use std::collections::VecDeque;

use types::BlockId;

use super::hazard::{self, BUCKETS, Cell, Hazards, Traits};

/// Numbers runs in the order of their use.
pub(super) type RunId = u64;

/// Blocks that one request used together.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub(super) used_ms: u64,
    pub(super) traits: Traits,
    pub(super) cell: Cell,
    /// Blocks not used again since, cached or not.
    pub(super) waiting: u32,
    /// The last block that joined; `None` once blocks may join no more.
    pub(super) end: Option<BlockId>,
    /// The block that is evictable, and the bucket under which the run is listed for it.
    pub(super) leaf: Option<(BlockId, u8)>,
}

#[derive(Debug)]
pub(super) struct Runs {
    runs: VecDeque<Run>,
    first: RunId,
    runs_max: usize,
    /// For each bucket, the first run that has not waited until its start.
    reached: [RunId; BUCKETS],
}

impl Runs {
    pub(super) fn new(runs_max: usize) -> Self {
        Self {
            runs: VecDeque::new(),
            first: 0,
            runs_max,
            reached: [0; BUCKETS],
        }
    }

    pub(super) fn get(&self, id: RunId) -> Option<&Run> {
        self.runs.get(self.index(id)?)
    }

    pub(super) fn get_mut(&mut self, id: RunId) -> Option<&mut Run> {
        let index = self.index(id)?;
        self.runs.get_mut(index)
    }

    /// Adds the newest run. The oldest one may have to go: it is returned.
    pub(super) fn push(&mut self, run: Run) -> (RunId, Option<(RunId, Run)>) {
        let id = self.first + self.runs.len() as u64;
        self.runs.push_back(run);
        if self.runs.len() <= self.runs_max {
            return (id, None);
        }
        let oldest = self.runs.pop_front().map(|run| (self.first, run));
        self.first += 1;
        (id, oldest)
    }

    /// How long the oldest run has waited: what is older cannot be counted.
    pub(super) fn span_ms(&self, now_ms: u64) -> u64 {
        self.runs.front().map_or(0, |run| now_ms - run.used_ms)
    }

    /// Counts the runs that have waited through another bucket. Amortised, one step per run and bucket.
    pub(super) fn advance(&mut self, now_ms: u64, hazards: &mut Hazards) {
        for bucket in 1..BUCKETS {
            let start_ms = hazard::bucket_start_ms(bucket);
            let mut reached = self.reached[bucket].max(self.first);
            while let Some(run) = self.get(reached) {
                if now_ms - run.used_ms < start_ms {
                    break;
                }
                hazards.waited(run.cell, bucket - 1, run.waiting);
                reached += 1;
            }
            self.reached[bucket] = reached;
        }
    }

    fn index(&self, id: RunId) -> Option<usize> {
        usize::try_from(id.checked_sub(self.first)?).ok()
    }
}
