//! The default policy: the victim is the block that is least likely to return soon.
//!
//! What one request used together returns together, with the next turn of a conversation, or never. So the unit is the
//! run: the piece of a chain that a request found and stored. When and whether runs return is learned from
//! all of them, those that were evicted included (`hazard.rs`), by what can be known of a run: how often its chain was
//! continued and how long ago before, how much of it is new, how often other chains share it. Runs are listed by these
//! traits and by how long they have waited; all runs in one list are worth the same, and the victim is the
//! last block of the oldest run in the list that is worth least.
//!
//! A scan is a lot of runs without past: as soon as such runs have been seen not to return, they are the first to go.
//!
//! Bounds: a few bytes per slot, `RUNS_MIN` runs or a share of the slots, as many ghosts, and counts of a fixed size.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use types::{BlockHash, BlockId};

use super::clock::Clock;
use super::{Policy, Stored, fingerprint};
use crate::digest::DigestBuild;

mod hazard;
mod runs;

use hazard::{Cell, Hazards, Traits, UseKind};
use runs::{Run, RunId, Runs};

/// Runs and ghosts that even a small pool remembers: what returns late returns far beyond such a pool's reach.
/// Some 8 MiB.
const RUNS_MIN: usize = 1 << 16;
/// A large pool's memory reaches further than its history must: a run or ghost per so many slots.
const SLOTS_PER_GHOST: usize = 8;
/// New runs between two fits of the model: often against the changes of a load, and rare against the work.
const RUNS_PER_FIT: u32 = 64;
/// A run is long if it has so many times the blocks of an average one.
const LONG: f32 = 2.0;
/// Weight of the newest run in the average of their lengths.
const LENGTH_WEIGHT: f32 = 1.0 / 256.0;
/// How long the run that was worth least counts as such without another look at all lists.
const VICTIM_MS: u64 = 1000;

/// What is known of a block, cached or evicted.
#[derive(Debug, Default, Clone, Copy)]
struct Past {
    run: RunId,
    depth: u32,
    /// Requests that used it.
    uses: u16,
    /// Times that its chain had been continued when it was stored.
    turns: u16,
}

/// See the module.
#[derive(Debug)]
pub struct Returns {
    clock: Clock,
    slots: Vec<Past>,
    runs: Runs,
    hazards: Hazards,
    /// Runs with an evictable block, by traits and time waited; in each list the oldest first.
    listed: BTreeSet<(Cell, u8, RunId)>,
    /// Evictable blocks whose run is forgotten.
    forgotten: BTreeSet<BlockId>,
    ghosts: HashMap<u64, Past, DigestBuild>,
    ghost_order: VecDeque<(u64, RunId)>,
    ghosts_max: usize,
    runs_until_fit: u32,
    length_average: f32,
    /// The run that was worth least, and when.
    victim: Option<(RunId, u64)>,
}

impl Returns {
    pub(super) fn new(capacity: usize) -> Self {
        let history = RUNS_MIN.max(capacity / SLOTS_PER_GHOST);
        Self {
            clock: Clock::default(),
            slots: vec![Past::default(); capacity],
            runs: Runs::new(history),
            hazards: Hazards::new(),
            listed: BTreeSet::new(),
            forgotten: BTreeSet::new(),
            ghosts: HashMap::default(),
            ghost_order: VecDeque::new(),
            ghosts_max: history,
            runs_until_fit: RUNS_PER_FIT,
            length_average: 0.0,
            victim: None,
        }
    }

    fn past(&self, block: BlockId) -> Past {
        self.slots[block.0 as usize]
    }

    /// A block stops waiting in its run. Returns for how long it did, if the run is remembered.
    fn leave(&mut self, run: RunId, now_ms: u64) -> Option<u64> {
        let span_ms = self.runs.span_ms(now_ms);
        let run = self.runs.get_mut(run)?;
        run.waiting = run.waiting.saturating_sub(1);
        let age_ms = now_ms - run.used_ms;
        let bucket = hazard::bucket(age_ms);
        // Of longer waits only the ends that returned would be counted, and none of those that go on.
        if bucket == 0 || hazard::bucket_start_ms(bucket + 1) <= span_ms {
            self.hazards.returned(run.cell, bucket);
        }
        Some(age_ms)
    }

    fn begin(&mut self, traits: Traits, now_ms: u64) -> RunId {
        self.runs.advance(now_ms, &mut self.hazards);
        let run = Run {
            used_ms: now_ms,
            cell: traits.cell(),
            traits,
            waiting: 0,
            end: None,
            leaf: None,
        };
        let (id, oldest) = self.runs.push(run);
        if let Some((oldest, run)) = oldest
            && let Some((leaf, bucket)) = run.leaf
        {
            self.listed.remove(&(run.cell, bucket, oldest));
            self.forgotten.insert(leaf);
        }
        self.runs_until_fit -= 1;
        if self.runs_until_fit == 0 {
            self.runs_until_fit = RUNS_PER_FIT;
            self.hazards.fit();
            self.victim = None;
        }
        id
    }

    fn join(&mut self, id: RunId, block: BlockId, past: Past) {
        self.slots[block.0 as usize] = Past { run: id, ..past };
        let Some(run) = self.runs.get_mut(id) else { return };
        run.end = Some(block);
        run.waiting += 1;
        run.traits.blocks = run.traits.blocks.max(past.depth + 1);
        run.traits.long = run.traits.blocks as f32 > LONG * self.length_average;
        run.cell = run.traits.cell();
    }

    /// The traits of a run that begins after `parent`.
    fn continuing(&self, parent: Option<BlockId>) -> Traits {
        let before = parent.and_then(|parent| {
            let past = self.past(parent);
            Some((past.depth, self.runs.get(past.run)?))
        });
        before.map_or_else(Traits::default, |(depth, run)| Traits {
            turns: run.traits.turns,
            returned: run.traits.returned.min(depth + 1),
            // How often others use what is shared says nothing of this chain.
            gap_ms: run.traits.gap_ms.filter(|_| run.traits.kind == UseKind::Own),
            ..Traits::default()
        })
    }

    fn list(&mut self, id: RunId, leaf: BlockId, now_ms: u64) {
        let Some(run) = self.runs.get_mut(id) else {
            self.forgotten.insert(leaf);
            return;
        };
        let bucket = hazard::bucket(now_ms - run.used_ms) as u8;
        run.leaf = Some((leaf, bucket));
        self.listed.insert((run.cell, bucket, id));
    }

    fn unlist(&mut self, block: BlockId) {
        self.forgotten.remove(&block);
        let id = self.past(block).run;
        let Some(run) = self.runs.get_mut(id) else { return };
        if let Some((leaf, bucket)) = run.leaf
            && leaf == block
        {
            run.leaf = None;
            self.listed.remove(&(run.cell, bucket, id));
        }
    }

    /// The last block of a request is a run of its own: it is often cut short by the end of the text, and what continues
    /// the text then has another block in its place.
    fn cut_end(&mut self, block: BlockId, now_ms: u64) {
        let past = self.past(block);
        let Some(run) = self.runs.get_mut(past.run) else {
            return;
        };
        let is_end = run.end.take() == Some(block);
        if !is_end || past.uses > 1 || run.traits.kind == UseKind::End {
            return;
        }
        run.waiting -= 1;
        let traits = Traits {
            kind: UseKind::End,
            ..run.traits
        };
        self.length_average += LENGTH_WEIGHT * (traits.blocks as f32 - self.length_average);
        let id = self.begin(traits, now_ms);
        self.join(id, block, past);
        if let Some(run) = self.runs.get_mut(id) {
            run.end = None;
        }
    }

    /// The head of each list that is not empty, with its worth, after moving on those that have waited into another bucket.
    fn least(&mut self, now_ms: u64) -> Option<RunId> {
        let mut least: Option<(f32, RunId)> = None;
        let mut next = self.listed.first().copied();
        while let Some((cell, bucket, id)) = next {
            let waited = hazard::bucket(now_ms - self.runs.get(id)?.used_ms) as u8;
            if waited == bucket {
                let worth = self.hazards.worth(cell, usize::from(bucket));
                if least.is_none_or(|(best, oldest)| (worth, id) < (best, oldest)) {
                    least = Some((worth, id));
                }
                next = self.listed.range((cell, bucket + 1, 0)..).next().copied();
            } else {
                self.listed.remove(&(cell, bucket, id));
                self.listed.insert((cell, waited, id));
                if let Some(run) = self.runs.get_mut(id) {
                    run.leaf = run.leaf.map(|(leaf, _)| (leaf, waited));
                }
                next = self.listed.range((cell, bucket, 0)..).next().copied();
            }
        }
        least.map(|(_, id)| id)
    }

    fn leaf(&self, run: RunId) -> Option<BlockId> {
        self.runs.get(run)?.leaf.map(|(leaf, _)| leaf)
    }

    fn remember(&mut self, hash: BlockHash, past: Past) {
        let ghost = fingerprint(hash);
        self.ghosts.insert(ghost, past);
        self.ghost_order.push_back((ghost, past.run));
        while self.ghost_order.len() > self.ghosts_max {
            if let Some((ghost, run)) = self.ghost_order.pop_front()
                && self.ghosts.get(&ghost).is_some_and(|past| past.run == run)
            {
                self.ghosts.remove(&ghost);
            }
        }
    }
}

impl Policy for Returns {
    fn stored(&mut self, stored: Stored, now: Instant) {
        let now_ms = self.clock.advance(now);
        let ghost = self.ghosts.remove(&fingerprint(stored.hash));
        let gap_ms = ghost.and_then(|ghost| self.leave(ghost.run, now_ms));
        let open = stored.parent.and_then(|parent| {
            let past = self.past(parent);
            let run = self.runs.get_mut(past.run)?;
            if run.end != Some(parent) || run.traits.kind != UseKind::Own {
                return None;
            }
            if ghost.is_none() && past.uses > 1 {
                // All that was used before has come: whether others share it is known by its end.
                run.traits.kind = UseKind::of(past.uses, past.turns.saturating_add(1));
                run.cell = run.traits.cell();
            }
            (run.traits.kind == UseKind::Own).then_some(past.run)
        });
        let id = match open {
            Some(open) => open,
            None => {
                let traits = self.continuing(stored.parent);
                self.begin(traits, now_ms)
            }
        };
        let mut past = Past {
            run: id,
            depth: stored.depth,
            uses: 1,
            turns: 0,
        };
        if let Some(run) = self.runs.get_mut(id) {
            past.turns = run.traits.turns();
            if let Some(ghost) = ghost {
                // Of what was evicted the deepest block says best how often and when the chain was used, as of what is held.
                run.traits.turns = ghost.turns.saturating_add(1);
                run.traits.gap_ms = gap_ms.or(run.traits.gap_ms);
                run.traits.returned = stored.depth + 1;
                past.uses = ghost.uses.saturating_add(1);
                past.turns = ghost.turns;
            }
        }
        self.join(id, stored.block, past);
    }

    fn used(&mut self, blocks: &[BlockId], now: Instant) {
        let now_ms = self.clock.advance(now);
        let Some(deepest) = blocks.last() else { return };
        let deepest = self.past(*deepest);
        let turns = deepest.turns.saturating_add(1);
        let mut open: Option<(RunId, UseKind)> = None;
        // The deepest block says best when the chain was used before; the first one, when what is shared was.
        let chain_gap_ms = self.runs.get(deepest.run).map(|run| now_ms - run.used_ms);
        for block in blocks {
            let mut past = self.past(*block);
            let gap_ms = self.leave(past.run, now_ms);
            past.uses = past.uses.saturating_add(1);
            let kind = UseKind::of(past.uses, turns);
            let id = match open {
                Some((id, same)) if same == kind => id,
                _ => {
                    let traits = Traits {
                        kind,
                        turns,
                        returned: deepest.depth + 1,
                        blocks: deepest.depth + 1,
                        long: false,
                        gap_ms: if kind == UseKind::Own {
                            chain_gap_ms
                        } else {
                            gap_ms
                        },
                    };
                    self.begin(traits, now_ms)
                }
            };
            open = Some((id, kind));
            self.join(id, *block, past);
        }
    }

    fn unpinned(&mut self, _block: BlockId, now: Instant) {
        self.clock.advance(now);
    }

    fn evictable(&mut self, block: BlockId, now: Instant) {
        let now_ms = self.clock.advance(now);
        self.cut_end(block, now_ms);
        let id = self.past(block).run;
        self.list(id, block, now_ms);
    }

    fn unevictable(&mut self, block: BlockId) {
        self.unlist(block);
    }

    fn evicted(&mut self, block: BlockId, hash: BlockHash, _now: Instant) {
        self.unlist(block);
        self.remember(hash, self.past(block));
    }

    fn victim(&mut self, now: Instant) -> Option<BlockId> {
        let now_ms = self.clock.advance(now);
        if let Some(block) = self.forgotten.first() {
            return Some(*block);
        }
        if let Some((run, found_ms)) = self.victim
            && now_ms - found_ms < VICTIM_MS
            && let Some(leaf) = self.leaf(run)
        {
            return Some(leaf);
        }
        let least = self.least(now_ms)?;
        self.victim = Some((least, now_ms));
        self.leaf(least)
    }

    /// Expected hits per second of keeping the block, for the best time to keep it.
    fn worth(&self, block: BlockId, now: Instant) -> f32 {
        let Some(run) = self.runs.get(self.past(block).run) else {
            return 0.0;
        };
        let age_ms = self.clock.at(now) - run.used_ms;
        self.hazards.worth(run.cell, hazard::bucket(age_ms))
    }

    /// The run of the block has waited for as long as makes it worth no more.
    fn lower(&mut self, block: BlockId, worth: f32, now: Instant) {
        let now_ms = self.clock.advance(now);
        let id = self.past(block).run;
        let Some(run) = self.runs.get(id) else { return };
        let (cell, leaf) = (run.cell, run.leaf);
        let waited = hazard::bucket(now_ms - run.used_ms);
        let enough = (waited..hazard::BUCKETS).find(|bucket| self.hazards.worth(cell, *bucket) <= worth);
        let used_ms = now_ms.saturating_sub(hazard::bucket_start_ms(enough.unwrap_or(waited)));
        if used_ms >= run.used_ms {
            return;
        }
        if let Some((leaf, _)) = leaf {
            self.unlist(leaf);
        }
        if let Some(run) = self.runs.get_mut(id) {
            run.used_ms = used_ms;
        }
        if let Some((leaf, _)) = leaf {
            self.list(id, leaf, now_ms);
        }
    }

    fn coldest(&self, count: usize) -> Vec<BlockId> {
        // Lists are few beside runs, and all runs of a list are worth the same, as of when they were put there.
        let mut lists: Vec<(f32, Cell, u8)> = Vec::new();
        let mut next = self.listed.first();
        while let Some((cell, bucket, _)) = next {
            lists.push((self.hazards.worth(*cell, usize::from(*bucket)), *cell, *bucket));
            next = self.listed.range((*cell, bucket + 1, 0)..).next();
        }
        lists.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let runs = lists
            .into_iter()
            .flat_map(|(_, cell, bucket)| self.listed.range((cell, bucket, 0)..(cell, bucket + 1, 0)));
        let leaves = runs.filter_map(|(_, _, id)| self.leaf(*id));
        self.forgotten.iter().copied().chain(leaves).take(count).collect()
    }

    fn is_evictable(&self, block: BlockId) -> bool {
        self.forgotten.contains(&block) || self.leaf(self.past(block).run) == Some(block)
    }
}

#[cfg(test)]
mod tests;
