//! Workloads made up to differ from one another, so that a policy is not judged by one trace. All are functions of their seed.

use super::Request;

/// A workload by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// People who think between turns; some conversations go on for long, most end after the first answer.
    Conversations,
    /// Loops of tool calls: a long prompt comes back every few seconds, somewhat longer, until the task is done.
    Agents,
    /// Questions about documents, some of which are much more popular than others (Zipf).
    Documents,
    /// Short requests behind system prompts that many share, among one-shot documents that nobody asks for again.
    Scans,
    /// Agents, then conversations, then documents: what was learned has to be unlearned.
    Phases,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Conversations,
        Self::Agents,
        Self::Documents,
        Self::Scans,
        Self::Phases,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Conversations => "conversations",
            Self::Agents => "agents",
            Self::Documents => "documents",
            Self::Scans => "scans",
            Self::Phases => "phases",
        }
    }

    /// About `count` requests.
    pub fn requests(self, seed: u64, count: usize) -> Vec<Request> {
        let mut making = Making {
            random: Random::new(seed),
            next_block: 0,
            requests: Vec::with_capacity(count),
        };
        match self {
            Self::Conversations => making.conversations(0, count),
            Self::Agents => making.agents(0, count),
            Self::Documents => making.documents(0, count),
            Self::Scans => making.scans(0, count),
            Self::Phases => {
                making.agents(0, count / 3);
                let then_ms = making.last_ms();
                making.conversations(then_ms, count / 3);
                let then_ms = making.last_ms();
                making.documents(then_ms, count / 3);
            }
        }
        making.requests.sort_by_key(|request| request.at_ms);
        making.requests
    }
}

struct Making {
    random: Random,
    next_block: u64,
    requests: Vec<Request>,
}

impl Making {
    fn last_ms(&self) -> u64 {
        self.requests
            .iter()
            .map(|request| request.at_ms)
            .max()
            .unwrap_or(0)
    }

    fn new_blocks(&mut self, count: u64) -> Vec<u64> {
        let first = self.next_block;
        self.next_block += count;
        (first..self.next_block).collect()
    }

    /// A chain that comes back `turns` times, each time longer.
    fn chain(&mut self, mut at_ms: u64, mut blocks: Vec<u64>, turns: u64, pause_ms: f64, growth: u64) {
        for turn in 0..turns {
            if turn > 0 {
                at_ms += 1 + self.random.exponential(pause_ms) as u64;
                let more = 1 + self.random.below(growth);
                let more = self.new_blocks(more);
                blocks.extend(more);
            }
            self.requests.push(Request {
                at_ms,
                blocks: blocks.clone(),
            });
        }
    }

    fn conversations(&mut self, start_ms: u64, count: usize) {
        let system = self.new_blocks(2);
        let mut at_ms = start_ms as f64;
        let until = self.requests.len() + count;
        while self.requests.len() < until {
            at_ms += self.random.exponential(600.0);
            let goes_on = if self.random.below(4) == 0 { 0.85 } else { 0.15 };
            let turns = 1 + self.random.geometric(goes_on).min(30);
            let length = 4 + self.random.exponential(16.0) as u64;
            let mut blocks = system.clone();
            blocks.extend(self.new_blocks(length));
            // People are quick or slow.
            let pause_ms = if self.random.below(2) == 0 {
                40_000.0
            } else {
                240_000.0
            };
            self.chain(at_ms as u64, blocks, turns, pause_ms, 4);
        }
    }

    fn agents(&mut self, start_ms: u64, count: usize) {
        let kinds: Vec<Vec<u64>> = (0..4).map(|_| self.new_blocks(12)).collect();
        let mut at_ms = start_ms as f64;
        let until = self.requests.len() + count;
        while self.requests.len() < until {
            at_ms += self.random.exponential(3_000.0);
            let mut blocks = kinds[self.random.below(4) as usize].clone();
            let length = 2 + self.random.below(12);
            blocks.extend(self.new_blocks(length));
            let turns = 1 + self.random.geometric(0.88).min(60);
            self.chain(at_ms as u64, blocks, turns, 8_000.0, 6);
        }
    }

    fn documents(&mut self, start_ms: u64, count: usize) {
        let documents: Vec<Vec<u64>> = (0..400)
            .map(|_| {
                let length = 8 + self.random.below(60);
                self.new_blocks(length)
            })
            .collect();
        let mut at_ms = start_ms as f64;
        for _ in 0..count {
            at_ms += self.random.exponential(500.0);
            let mut blocks = documents[self.random.zipf(documents.len())].clone();
            let question = 1 + self.random.below(3);
            blocks.extend(self.new_blocks(question));
            self.requests.push(Request {
                at_ms: at_ms as u64,
                blocks,
            });
        }
    }

    fn scans(&mut self, start_ms: u64, count: usize) {
        let prompts: Vec<Vec<u64>> = (0..60).map(|_| self.new_blocks(10)).collect();
        let mut at_ms = start_ms as f64;
        for _ in 0..count {
            at_ms += self.random.exponential(400.0);
            let mut blocks = Vec::new();
            let length = if self.random.below(3) == 0 {
                60 + self.random.below(60)
            } else {
                blocks = prompts[self.random.zipf(prompts.len())].clone();
                1 + self.random.below(6)
            };
            blocks.extend(self.new_blocks(length));
            self.requests.push(Request {
                at_ms: at_ms as u64,
                blocks,
            });
        }
    }
}

/// SplitMix64: small, and the same everywhere.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence that is a function of its seed.
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// The next number, uniform over all.
    #[expect(clippy::should_implement_trait, reason = "it has no end, and is no iterator")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// From zero up to, not including, one.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// From zero up to, not including, `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Exponential, with this mean.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }

    /// Successes before the first failure.
    pub fn geometric(&mut self, success: f64) -> u64 {
        ((1.0 - self.unit()).ln() / success.ln()) as u64
    }

    /// A rank of `count`, the chance of each being as one over it.
    pub fn zipf(&mut self, count: usize) -> usize {
        let rank = ((count as f64 + 1.0).ln() * self.unit()).exp() as usize;
        rank.clamp(1, count) - 1
    }
}

/// The finaliser of SplitMix64: spreads every bit over all.
pub(super) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
