//! What workers store: chains of random blocks, in events of a few.

use dynamo_kv_router::protocols::{LocalBlockHash, compute_seq_hash_for_block};

/// Blocks of one event.
pub const EVENT_BLOCKS: usize = 16;
const CHAIN_BLOCKS: usize = 256;
/// Workers that hold a shared chain.
const SHARED_BY: usize = 8;

/// A prefix, as both sides name its blocks.
#[derive(Clone)]
pub struct Chain {
    pub local: Vec<LocalBlockHash>,
    pub sequence: Vec<u64>,
}

/// An event: a worker stores these blocks of a chain.
pub struct Part {
    pub worker: usize,
    pub parent: Option<u64>,
    pub blocks: Vec<(LocalBlockHash, u64)>,
}

pub struct Load {
    pub chains: Vec<Chain>,
    pub parts: Vec<Part>,
}

impl Chain {
    pub fn new(number: u64, blocks: usize) -> Self {
        let local: Vec<_> = (0..blocks as u64)
            .map(|block| LocalBlockHash(mix(mix(number) ^ block)))
            .collect();
        let sequence = compute_seq_hash_for_block(&local);
        Self { local, sequence }
    }

    pub fn first(&self, blocks: usize) -> Self {
        Self {
            local: self.local[..blocks].to_vec(),
            sequence: self.sequence[..blocks].to_vec(),
        }
    }

    fn part(&self, worker: usize, from: usize, to: usize) -> Part {
        let blocks = self.local[from..to]
            .iter()
            .copied()
            .zip(self.sequence[from..to].iter().copied());
        Part {
            worker,
            parent: from.checked_sub(1).map(|before| self.sequence[before]),
            blocks: blocks.collect(),
        }
    }
}

impl Load {
    /// Every block is held by one worker.
    pub fn private(workers: usize, blocks: usize) -> Self {
        Self::private_from(0, workers, blocks)
    }

    pub fn private_from(first: u64, workers: usize, blocks: usize) -> Self {
        Self::of(first, workers, blocks.div_ceil(CHAIN_BLOCKS), |_| 1)
    }

    /// Every block is held by several workers.
    pub fn shared(workers: usize, blocks: usize) -> Self {
        Self::of(0, workers, blocks.div_ceil(CHAIN_BLOCKS * SHARED_BY), |_| {
            SHARED_BY
        })
    }

    /// Of nine chains eight have one holder and one has eight: as many locations of either kind.
    pub fn mixed(workers: usize, blocks: usize) -> Self {
        Self::of(0, workers, blocks.div_ceil(CHAIN_BLOCKS) * 9 / 16, |chain| {
            if chain % 9 == 0 { SHARED_BY } else { 1 }
        })
    }

    /// Workers' events come in turns, as they do where all of them work.
    fn of(first: u64, workers: usize, chains: usize, holders: impl Fn(usize) -> usize) -> Self {
        let chains: Vec<Chain> = (0..chains as u64)
            .map(|chain| Chain::new(first | chain, CHAIN_BLOCKS))
            .collect();
        let mut parts = Vec::new();
        for (group, together) in chains.chunks(workers).enumerate() {
            for from in (0..CHAIN_BLOCKS).step_by(EVENT_BLOCKS) {
                for (number, chain) in together.iter().enumerate() {
                    for holder in 0..holders(group * workers + number).min(workers) {
                        // Spread, so that holders are no neighbours.
                        let worker = (number + holder * (workers / SHARED_BY).max(1)) % workers;
                        parts.push(chain.part(worker, from, from + EVENT_BLOCKS));
                    }
                }
            }
        }
        Self { chains, parts }
    }

    /// Locations.
    pub fn blocks(&self) -> usize {
        self.parts.len() * EVENT_BLOCKS
    }
}

/// A chain at every worker, up to where `length` says.
pub fn held_by_all(chain: &Chain, workers: usize, length: impl Fn(usize) -> usize) -> Vec<Part> {
    let mut parts = Vec::new();
    for worker in 0..workers {
        for from in (0..length(worker)).step_by(EVENT_BLOCKS) {
            parts.push(chain.part(worker, from, length(worker).min(from + EVENT_BLOCKS)));
        }
    }
    parts
}

/// SplitMix64.
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
