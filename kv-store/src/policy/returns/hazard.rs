//! How likely blocks are to be used again, by how long they have waited and by what they are part of.
//!
//! A survival model, learned online. Time since the last use is cut into buckets, two per octave. In each bucket the model
//! counts blocks that returned and blocks that waited through it, per [`Traits`]. The chance to return within a
//! bucket (the hazard) is the chance over all blocks, times one factor per trait and octave, fitted by iterative scaling. A
//! factor that few returns speak for stays near one; a bucket that nothing is known of gets the chance of the
//! buckets before it, and where the chance is the same in each octave the order is that of LRU.
//!
//! From the hazards follows what a waiting block is worth: the best rate of hits per second of occupied slot that
//! keeping it for any time to come can give (a Gittins index).
//!
//! Old counts fade, so that a change of the load is learned.

use std::array;
use std::cell::OnceCell;

/// Buckets of waiting time.
pub(super) const BUCKETS: usize = 44;
/// Two buckets each.
const OCTAVES: usize = BUCKETS / 2;
/// Where the second bucket begins. The last one begins after six days.
const FIRST_BUCKET_MS: f64 = 250.0;

const TURNS: usize = 7;
const SHARES: usize = 7;
/// Turns of what one chain uses, uses of what several do, ends.
const KINDS: usize = TURNS + SHARES + 1;
const GROWTHS: usize = 6;
const GAPS: usize = 11;
const CELLS: usize = KINDS * GROWTHS * GAPS;

/// Counted at a time: chance to return in one bucket before anything is known, and how many blocks it stands for.
const PRIOR_CHANCE: f32 = 0.02;
const PRIOR_BLOCKS: f32 = 50.0;
/// How much an octave without data follows the one before it.
const PRIOR_DRIFT: f32 = 0.3;
/// Returns that it takes to believe half of a factor.
const FACTOR_RETURNS: f32 = 10.0;
/// Rounds of iterative scaling. More move nothing by a per cent.
const FIT_ROUNDS: usize = 2;
/// No bucket is certain.
const CHANCE_MAX: f32 = 0.9;
/// What is left of a count at the next fit.
const FADE: f32 = 0.995;
/// Less than this is nothing.
const COUNT_MIN: f32 = 0.01;

/// What a run of blocks is, for the model.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum UseKind {
    /// Used by one chain only.
    #[default]
    Own,
    /// Used by several chains, a prompt or document that they share: with the octave of its uses.
    Shared(u8),
    /// The end of what a request used.
    End,
}

impl UseKind {
    /// Of blocks that were used so often, in a chain that was continued so often.
    pub(super) fn of(uses: u16, turns: u16) -> Self {
        if uses > turns.saturating_add(1) {
            Self::Shared((uses.ilog2() as u8).min(SHARES as u8) - 1)
        } else {
            Self::Own
        }
    }
}

/// What the chance to return depends on, besides the time waited.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Traits {
    pub(super) kind: UseKind,
    /// Times the chain was continued, if the run is a continuation.
    pub(super) turns: u16,
    /// Blocks of the chain.
    pub(super) blocks: u32,
    /// Of these, blocks that had been used before.
    pub(super) returned: u32,
    /// Whether the chain is much longer than most.
    pub(super) long: bool,
    /// Time between the last two uses of the chain.
    pub(super) gap_ms: Option<u64>,
}

/// One combination of traits.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cell(u16);

impl Traits {
    /// Times the chain was continued. Where most of it is new, what it shares with another chain is a common beginning.
    pub(super) fn turns(&self) -> u16 {
        if 2 * self.returned >= self.blocks {
            self.turns
        } else {
            self.turns.min(1)
        }
    }

    pub(super) fn cell(&self) -> Cell {
        let kind = match self.kind {
            UseKind::Own => match self.turns() {
                few @ 0..=3 => usize::from(few),
                4..=5 => 4,
                6..=8 => 5,
                _ => 6,
            },
            UseKind::Shared(octave) => TURNS + usize::from(octave),
            UseKind::End => TURNS + SHARES,
        };
        let new = self.blocks.saturating_sub(self.returned);
        let growth = match f64::from(new) / f64::from(self.blocks.max(1)) {
            _ if new == 0 => 0,
            few if few < 0.08 => 1,
            some if some < 0.2 => 2,
            many if many < 0.5 => 3,
            _ => 4 + usize::from(self.long),
        };
        let gap = match self.gap_ms {
            None => 0,
            // Octaves from one second on.
            Some(gap_ms) => (1 + (gap_ms / 1000).max(1).ilog2() as usize).min(GAPS - 1),
        };
        let cell = (kind * GROWTHS + growth) * GAPS + gap;
        Cell(u16::try_from(cell).expect("there are fewer than 2^16 cells"))
    }
}

impl Cell {
    fn index(self) -> usize {
        usize::from(self.0)
    }

    /// The cell's row in the table of each of the three factors.
    fn levels(index: usize) -> [usize; 3] {
        [index / (GROWTHS * GAPS), index / GAPS % GROWTHS, index % GAPS]
    }
}

/// The bucket of a waiting time.
pub(super) fn bucket(age_ms: u64) -> usize {
    let halves = (age_ms as f64 / FIRST_BUCKET_MS).log2() * 2.0;
    if halves < 0.0 {
        0
    } else {
        (1 + halves as usize).min(BUCKETS - 1)
    }
}

/// Where a bucket begins.
pub(super) fn bucket_start_ms(bucket: usize) -> u64 {
    start(bucket).ceil() as u64
}

fn start(bucket: usize) -> f64 {
    match bucket {
        0 => 0.0,
        bucket => FIRST_BUCKET_MS * 2f64.powf((bucket - 1) as f64 / 2.0),
    }
}

#[derive(Debug, Clone, Copy)]
struct Counts {
    returned: [f32; BUCKETS],
    waited: [f32; BUCKETS],
}

impl Counts {
    const NONE: Self = Self {
        returned: [0.0; BUCKETS],
        waited: [0.0; BUCKETS],
    };

    fn seen(&self, bucket: usize) -> f32 {
        self.returned[bucket] + self.waited[bucket]
    }
}

type Factors = Vec<[f32; OCTAVES]>;

/// The counts, and the hazards fitted to them.
#[derive(Debug)]
pub(super) struct Hazards {
    counts: Vec<Counts>,
    pooled: [f32; BUCKETS],
    factors: [Factors; 3],
    /// Worth per cell and bucket, computed when it is first asked for after a fit.
    worths: Vec<OnceCell<Box<[f32; BUCKETS]>>>,
}

impl Hazards {
    pub(super) fn new() -> Self {
        let mut hazards = Self {
            counts: vec![Counts::NONE; CELLS],
            pooled: [PRIOR_CHANCE; BUCKETS],
            factors: no_factors(),
            worths: no_worths(),
        };
        hazards.fit();
        hazards
    }

    /// A block was used again after waiting so long.
    pub(super) fn returned(&mut self, cell: Cell, bucket: usize) {
        self.counts[cell.index()].returned[bucket] += 1.0;
    }

    /// Blocks waited through the bucket.
    pub(super) fn waited(&mut self, cell: Cell, bucket: usize, blocks: u32) {
        self.counts[cell.index()].waited[bucket] += blocks as f32;
    }

    /// What a slot is worth whose block has waited so long: hits per second.
    pub(super) fn worth(&self, cell: Cell, bucket: usize) -> f32 {
        self.worths[cell.index()].get_or_init(|| Box::new(self.worths_of(cell)))[bucket]
    }

    /// Fits the hazards to the counts, and lets the counts fade.
    pub(super) fn fit(&mut self) {
        let known = |counts: &Counts| counts.seen(0) > COUNT_MIN;
        let cells: Vec<usize> = (0..CELLS).filter(|cell| known(&self.counts[*cell])).collect();
        self.pooled = self.pool(&cells);
        self.factors = no_factors();
        for _ in 0..FIT_ROUNDS {
            for factor in 0..self.factors.len() {
                self.fit_factor(factor, &cells);
            }
        }
        self.worths = no_worths();
        for cell in cells {
            let counts = &mut self.counts[cell];
            for count in counts.returned.iter_mut().chain(&mut counts.waited) {
                *count *= FADE;
            }
        }
    }

    fn pool(&self, cells: &[usize]) -> [f32; BUCKETS] {
        let mut prior = PRIOR_CHANCE;
        array::from_fn(|bucket| {
            let returned: f32 = cells.iter().map(|cell| self.counts[*cell].returned[bucket]).sum();
            let seen: f32 = cells.iter().map(|cell| self.counts[*cell].seen(bucket)).sum();
            let chance = (returned + PRIOR_BLOCKS * prior) / (seen + PRIOR_BLOCKS);
            if seen > PRIOR_BLOCKS {
                prior += PRIOR_DRIFT * (chance - prior);
            }
            chance
        })
    }

    /// Scales one factor until the returns it predicts are those that were counted.
    fn fit_factor(&mut self, factor: usize, cells: &[usize]) {
        let levels = self.factors[factor].len();
        let mut counted = vec![[FACTOR_RETURNS; OCTAVES]; levels];
        let mut predicted = vec![[FACTOR_RETURNS; OCTAVES]; levels];
        for cell in cells {
            let counts = &self.counts[*cell];
            let level = Cell::levels(*cell)[factor];
            for bucket in 0..BUCKETS {
                counted[level][bucket / 2] += counts.returned[bucket];
                predicted[level][bucket / 2] += counts.seen(bucket) * self.chance(*cell, bucket);
            }
        }
        for (level, scaled) in self.factors[factor].iter_mut().enumerate() {
            for (octave, scaled) in scaled.iter_mut().enumerate() {
                *scaled *= counted[level][octave] / predicted[level][octave];
            }
        }
    }

    /// The hazard: the chance that a block which waited until the bucket returns within it.
    fn chance(&self, cell: usize, bucket: usize) -> f32 {
        let levels = Cell::levels(cell);
        let factors = self.factors.iter().zip(levels);
        let factor: f32 = factors.map(|(factor, level)| factor[level][bucket / 2]).product();
        (self.pooled[bucket] * factor).min(CHANCE_MAX)
    }

    fn worths_of(&self, cell: Cell) -> [f32; BUCKETS] {
        let chances: [f32; BUCKETS] = array::from_fn(|bucket| self.chance(cell.index(), bucket));
        let mut worths: [f32; BUCKETS] = array::from_fn(|from| best_rate(&chances, from));
        // Whoever waited longer than buckets reach comes last.
        worths[BUCKETS - 1] = worths[BUCKETS - 2] / 2.0;
        worths
    }
}

/// The best ratio of expected hits to expected seconds, over all times to stop waiting.
fn best_rate(chances: &[f32; BUCKETS], from: usize) -> f32 {
    let (mut waiting, mut hits, mut seconds, mut best) = (1.0f32, 0.0f32, 0.0f32, 0.0f32);
    for (bucket, chance) in chances.iter().enumerate().take(BUCKETS - 1).skip(from) {
        let width = ((start(bucket + 1) - start(bucket)) / 1000.0) as f32;
        hits += waiting * chance;
        // Those that return do so halfway.
        seconds += waiting * width * (1.0 - chance / 2.0);
        waiting *= 1.0 - chance;
        best = best.max(hits / seconds);
    }
    best
}

fn no_worths() -> Vec<OnceCell<Box<[f32; BUCKETS]>>> {
    vec![OnceCell::new(); CELLS]
}

fn no_factors() -> [Factors; 3] {
    [KINDS, GROWTHS, GAPS].map(|levels| vec![[1.0; OCTAVES]; levels])
}
