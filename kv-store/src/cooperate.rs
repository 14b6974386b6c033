//! Cooperative memory: whether a block that eviction would take goes to a peer, to which one, and whether that peer takes it.
//!
//! A node that runs short of memory asks its peers about the blocks that eviction would take next: how much of their chains each
//! peer holds, and what the blocks are worth that the peer itself would give up next. A block that a peer holds is a
//! duplicate and is dropped. A last copy is offered to the peer where it displaces what is worth least (N-chance
//! forwarding), and the peer fetches it while the giver still holds it. Where nobody has use for it, it is dropped as ever.
//!
//! There is no index of the cluster to look this up in, and none is needed: a question names some chains, costs 16 bytes per
//! block, and is answered from a hash table. A cluster of more peers than one round asks may take a duplicate for a last
//! copy, which then costs a transfer; it never takes a last copy for a duplicate.
//!
//! Invariants:
//! - what is moved is a run that ends in a leaf and begins where the taker's part of the chain ends, so no node holds an orphan;
//! - a run moves only to where it is worth clearly more than what it displaces, keeps its worth when it has moved, and moves
//!   a bounded number of times: nothing is passed back and forth;
//! - two nodes that hold the last two copies do not both drop theirs on the other one's word;
//! - a move makes no copy of what enough nodes hold: only requests and pins spread a block further;
//! - what is given and what is taken stay within their rates, and no peer gets more than twice its fair share.
//!
//! Pure: callers pass `now`. Elsewhere: asking, offering and fetching (`exchange.rs`), what a block is worth (`table.rs`).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use types::{BlockHash, NodeId};

use crate::table::Path;

/// How much more a run must be worth than what it displaces, as a part of its own worth. Without it, nodes that are equally
/// cold would swap blocks for ever. Policies that learn value alike blocks differently on each node: docs/cooperation.md.
const WORTH_MARGIN: f32 = 0.5;
/// No peer is given more than this many times what it would get if all peers were given the same. A node that
/// has just joined is the coldest of all, and would otherwise be sent everything at once.
const FAIR_SHARES_MAX: f64 = 2.0;
/// After so many blocks, what was given counts half: shares are those of the recent past.
const SHARE_MEMORY_BLOCKS: f64 = 16_384.0;
/// Blocks that a peer may be given before shares mean anything.
const SHARE_SLACK_BLOCKS: f64 = 512.0;
/// A new node takes this part of its rate at first, and all of it once it is [`Limits::ramp`] old.
const RAMP_FLOOR: f64 = 1.0 / 16.0;
/// Blocks whose moves are remembered. A block that was forgotten may move some times more.
const MOVES_MAX: usize = 64 * 1024;
/// Blocks that a node remembers to have confirmed to a peer.
const CONFIRMED_MAX: usize = 16 * 1024;

/// What cooperation may cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Blocks given per second, and taken per second: as many may move at once after a quiet second.
    pub blocks_per_second: f64,
    /// Longest run that is moved.
    pub run_blocks_max: usize,
    /// How often a block may move before it is dropped.
    pub recirculations_max: u8,
    /// Nodes that hold a block, this one included, beyond which no move makes one copy more of it.
    pub copies_max: usize,
    /// How long a new node takes to reach its full rate.
    pub ramp: Duration,
    /// How long a node keeps a block for a peer that may have dropped its own copy on this node's word.
    pub confirmation_ttl: Duration,
}

/// A block that eviction would take, with all that comes before it.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The block's chain; the block is a leaf that nobody uses.
    pub path: Path,
    /// What keeping it is worth.
    pub worth: f32,
}

/// What a peer said about the candidates.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Who says it.
    pub peer: NodeId,
    /// Leading blocks of each candidate's chain that it holds.
    pub held: Vec<usize>,
    /// What it would give up, block by block, for as many blocks as it would take now: as
    /// [`price`](crate::table::BlockTable::price) says.
    pub price: Vec<f32>,
}

/// What to do with a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Nothing yet: it was not needed, or a peer may be relying on it.
    Keep,
    /// Let its last `blocks` blocks go.
    Drop {
        /// Blocks of the chain's end.
        blocks: usize,
        /// Why they are not offered.
        why: Reason,
    },
    /// Offer the chain from block `from` on to the report's peer, then let its last `blocks` blocks go.
    Offer {
        /// Index of the report.
        report: usize,
        /// First block that the peer lacks.
        from: usize,
        /// Blocks of the chain's end that leave this node.
        blocks: usize,
    },
}

/// Why a block is dropped and not offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// A peer holds it too.
    Duplicate,
    /// It has moved as often as it may.
    Exhausted,
    /// No peer has colder blocks, or room for so long a run, or lacks only what may be copied.
    NoTaker,
    /// As much was given in the last second as may be.
    Rate,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Duplicate, Self::Exhausted, Self::NoTaker, Self::Rate];

    /// The name used in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Duplicate => "duplicate",
            Self::Exhausted => "exhausted",
            Self::NoTaker => "no_taker",
            Self::Rate => "rate",
        }
    }
}

/// Decides what a node gives.
#[derive(Debug)]
pub struct Giver {
    id: NodeId,
    limits: Limits,
    rate: Bucket,
    /// Blocks given to each peer lately.
    given: BTreeMap<NodeId, f64>,
    moves: Moves,
    confirmed: Confirmed,
}

/// Decides what a node takes.
#[derive(Debug)]
pub struct Taker {
    rate: Bucket,
    started: Instant,
    ramp: Duration,
}

/// A run that a peer offers.
#[derive(Debug, Clone, PartialEq)]
pub struct Offered {
    /// Blocks of the run.
    pub blocks: usize,
    /// What keeping it is worth.
    pub worth: f32,
    /// Whether what comes before it is held here, or is the root of a space.
    pub attached: bool,
}

impl Giver {
    /// A node that has given nothing yet.
    pub fn new(id: NodeId, limits: Limits, now: Instant) -> Self {
        Self {
            id,
            limits,
            rate: Bucket::full(limits.blocks_per_second, now),
            given: BTreeMap::new(),
            moves: Moves::default(),
            confirmed: Confirmed::default(),
        }
    }

    /// Decides about the candidates, coldest first, so that at least `blocks` slots become free if that many can.
    pub fn decide(
        &mut self,
        candidates: &[Candidate],
        reports: &[Report],
        blocks: usize,
        now: Instant,
    ) -> Vec<Fate> {
        let mut fates = vec![Fate::Keep; candidates.len()];
        let mut missing = blocks;
        let mut promised = vec![0; reports.len()];
        // Duplicates first: dropping one costs the cluster nothing.
        for (index, candidate) in candidates.iter().enumerate() {
            let leaf = candidate.path.hashes.last().copied().unwrap_or_default();
            let len = candidate.path.hashes.len();
            let mut holders = reports
                .iter()
                .filter(|report| report.held.get(index) == Some(&len));
            if missing > 0 && holders.any(|holder| !self.owes(leaf, &holder.peer, now)) {
                let blocks = candidate.path.tail.min(missing);
                fates[index] = Fate::Drop {
                    blocks,
                    why: Reason::Duplicate,
                };
                missing -= blocks;
            }
        }
        for (index, candidate) in candidates.iter().enumerate() {
            let len = candidate.path.hashes.len();
            let held = |report: &Report| report.held.get(index) == Some(&len);
            if missing == 0 || fates[index] != Fate::Keep || reports.iter().any(held) {
                continue;
            }
            fates[index] = match self.target(index, candidate, reports, &promised, now) {
                Ok((report, from)) => {
                    promised[report] += len - from;
                    self.count(&reports[report].peer, len - from);
                    Fate::Offer {
                        report,
                        from,
                        blocks: candidate.path.tail,
                    }
                }
                Err(why) => Fate::Drop {
                    blocks: candidate.path.tail.min(missing),
                    why,
                },
            };
            missing = missing.saturating_sub(candidate.path.tail);
        }
        fates
    }

    /// A peer was told that these blocks are held here, and may drop its own copies for that reason.
    pub fn confirm(&mut self, peer: &NodeId, hashes: &[BlockHash], now: Instant) {
        let until = now + self.limits.confirmation_ttl;
        for hash in hashes {
            self.confirmed.insert(*hash, peer.clone(), until);
        }
    }

    /// A block came from a peer, where it had moved `recirculations` times before.
    pub fn received(&mut self, hash: BlockHash, recirculations: u8) {
        self.moves.insert(hash, recirculations.saturating_add(1));
    }

    /// How often the block has moved.
    pub fn recirculations(&self, hash: BlockHash) -> u8 {
        self.moves.of.get(&hash).copied().unwrap_or_default()
    }

    /// A block left, or was used: what it went through before counts no more.
    pub fn forget(&mut self, hash: BlockHash) {
        self.moves.of.remove(&hash);
    }

    /// Whether this node must keep its copy of a block although `holder` has one: the holder asked a moment ago, and of two
    /// nodes that rely on each other the one with the smaller name keeps its copy.
    fn owes(&self, hash: BlockHash, holder: &NodeId, now: Instant) -> bool {
        self.id < *holder && self.confirmed.is_owed(hash, holder, now)
    }

    /// The peer to offer a candidate to, and the first block that it lacks.
    fn target(
        &mut self,
        index: usize,
        candidate: &Candidate,
        reports: &[Report],
        promised: &[usize],
        now: Instant,
    ) -> Result<(usize, usize), Reason> {
        let Path { hashes, tail, .. } = &candidate.path;
        let moved = hashes.last().map_or(0, |leaf| self.recirculations(*leaf));
        if moved >= self.limits.recirculations_max {
            return Err(Reason::Exhausted);
        }
        let mut best: Option<(f32, usize, usize)> = None;
        for (report, said) in reports.iter().enumerate() {
            let held = said.held.get(index).copied().unwrap_or_default();
            let run = hashes.len().saturating_sub(held);
            // Blocks that other chains here share stay, so moving them makes copies: at most as many as are freed.
            let copies = run.saturating_sub(*tail);
            let holders = 1 + reports
                .iter()
                .filter(|other| other.held.get(index) > Some(&held))
                .count();
            // The first block that would be copied has most holders: who holds one after it holds it, too.
            let spreads = copies > 0 && holders >= self.limits.copies_max;
            let fits = run <= self.limits.run_blocks_max && copies <= *tail && !spreads;
            let Some(price) = price_of(&said.price, promised[report], run) else {
                continue;
            };
            if !fits || !is_worth(candidate.worth, price) || !self.within_share(said, run, reports.len()) {
                continue;
            }
            // What the cluster gains per block moved. Peers with free slots gain most, and are told apart by what they cost.
            let gain = (candidate.worth - price) * (*tail as f32 / run as f32);
            let better = best.is_none_or(|(gain_best, copies_best, _)| {
                gain > gain_best || (gain == gain_best && copies < copies_best)
            });
            if better {
                best = Some((gain, copies, report));
            }
        }
        let (_, _, report) = best.ok_or(Reason::NoTaker)?;
        let from = reports[report].held.get(index).copied().unwrap_or_default();
        if !self.rate.take(hashes.len() - from, now) {
            return Err(Reason::Rate);
        }
        Ok((report, from))
    }

    fn within_share(&self, report: &Report, run: usize, peers: usize) -> bool {
        let total: f64 = self.given.values().sum();
        let given = self.given.get(&report.peer).copied().unwrap_or_default();
        let share = (FAIR_SHARES_MAX / peers.max(1) as f64).min(1.0);
        given + run as f64 <= share * (total + run as f64) + SHARE_SLACK_BLOCKS
    }

    fn count(&mut self, peer: &NodeId, blocks: usize) {
        *self.given.entry(peer.clone()).or_default() += blocks as f64;
        if self.given.values().sum::<f64>() > SHARE_MEMORY_BLOCKS {
            self.given.retain(|_, given| {
                *given /= 2.0;
                *given >= 1.0
            });
        }
    }
}

impl Taker {
    /// A node that starts now.
    pub fn new(limits: Limits, now: Instant) -> Self {
        Self {
            rate: Bucket::full(limits.blocks_per_second, now),
            started: now,
            ramp: limits.ramp,
        }
    }

    /// Blocks that it would take now.
    pub fn room(&mut self, now: Instant) -> usize {
        let room = self.rate.available(now) * self.ramped(now);
        room as usize
    }

    /// Which of the runs to take, whole or not at all. `price` is what would be given up for them, block by block.
    pub fn take(&mut self, runs: &[Offered], price: &[f32], now: Instant) -> Vec<bool> {
        let mut displaced = 0;
        let takes = runs.iter().map(|run| {
            let Some(price) = price_of(price, displaced, run.blocks) else {
                return false;
            };
            let fits = run.attached && run.blocks <= self.room(now) && is_worth(run.worth, price);
            let taken = fits && self.rate.take(run.blocks, now);
            if taken {
                displaced += run.blocks;
            }
            taken
        });
        takes.collect()
    }

    fn ramped(&self, now: Instant) -> f64 {
        if self.ramp.is_zero() {
            return 1.0;
        }
        let age = now.saturating_duration_since(self.started).as_secs_f64();
        (age / self.ramp.as_secs_f64()).clamp(RAMP_FLOOR, 1.0)
    }
}

/// The most that one of `blocks` blocks costs, after `before` others were paid for. `None`: so many cannot be had.
fn price_of(price: &[f32], before: usize, blocks: usize) -> Option<f32> {
    let paid = price.get(before..before.checked_add(blocks)?)?;
    paid.iter().copied().reduce(f32::max)
}

/// Whether a run of this worth may displace a block of that worth.
fn is_worth(worth: f32, displaced: f32) -> bool {
    displaced < worth - WORTH_MARGIN * worth.abs()
}

/// So much per second, of which what one second brings is saved up.
#[derive(Debug)]
struct Bucket {
    per_second: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn full(per_second: f64, now: Instant) -> Self {
        Self {
            per_second,
            level: per_second,
            at: now,
        }
    }

    fn available(&mut self, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + passed * self.per_second).min(self.per_second);
        self.at = self.at.max(now);
        self.level
    }

    fn take(&mut self, count: usize, now: Instant) -> bool {
        let fits = count as f64 <= self.available(now);
        if fits {
            self.level -= count as f64;
        }
        fits
    }
}

/// How often blocks have moved, for as many as are remembered.
#[derive(Debug, Default)]
struct Moves {
    of: HashMap<BlockHash, u8>,
    /// Oldest first; may name blocks that were forgotten meanwhile.
    order: VecDeque<BlockHash>,
}

impl Moves {
    fn insert(&mut self, hash: BlockHash, moves: u8) {
        self.of.insert(hash, moves);
        self.order.push_back(hash);
        while self.order.len() > MOVES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.of.remove(&oldest);
        }
    }
}

/// What was confirmed to whom, until when.
#[derive(Debug, Default)]
struct Confirmed {
    of: HashMap<BlockHash, (NodeId, Instant)>,
    order: VecDeque<BlockHash>,
}

impl Confirmed {
    fn insert(&mut self, hash: BlockHash, peer: NodeId, until: Instant) {
        self.of.insert(hash, (peer, until));
        self.order.push_back(hash);
        while self.order.len() > CONFIRMED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.of.remove(&oldest);
        }
    }

    fn is_owed(&self, hash: BlockHash, peer: &NodeId, now: Instant) -> bool {
        self.of
            .get(&hash)
            .is_some_and(|(asked, until)| asked == peer && now < *until)
    }
}

#[cfg(test)]
mod tests;
