//! Perigee's index.

use std::hint::black_box;
use std::time::Instant;

use types::{BlockEvent, BlockHash, NodeId, Tier};

use crate::Subject;
use crate::load::{Chain, Part, mix};
use crate::router::index::PrefixIndex;

pub struct Perigee {
    index: PrefixIndex,
    nodes: Vec<NodeId>,
}

impl Perigee {
    pub fn new(workers: usize, entries_max: usize) -> Self {
        Self {
            index: PrefixIndex::new(entries_max),
            nodes: (0..workers)
                .map(|worker| NodeId::new(format!("node-{worker:03}")))
                .collect(),
        }
    }
}

/// A whole hash of the 64 bits that the other side has.
fn hash(sequence: u64) -> BlockHash {
    BlockHash((u128::from(sequence) << 64 | u128::from(mix(sequence))).to_be_bytes())
}

fn events(part: &Part) -> Vec<BlockEvent> {
    let mut parent = part.parent.map_or(BlockHash([0; 16]), hash);
    let stored = part.blocks.iter().map(|(_, sequence)| {
        let hash = hash(*sequence);
        let stored = BlockEvent::Stored {
            hash,
            parent,
            tier: Tier::Host,
        };
        parent = hash;
        stored
    });
    stored.collect()
}

impl Subject for Perigee {
    type Query = Vec<BlockHash>;

    fn query(chain: &Chain) -> Self::Query {
        chain.sequence.iter().map(|sequence| hash(*sequence)).collect()
    }

    fn store(&mut self, parts: &[Part]) -> f64 {
        let batches: Vec<_> = parts.iter().map(|part| (part.worker, events(part))).collect();
        let start = Instant::now();
        for (worker, events) in batches {
            self.index.apply_all(&self.nodes[worker], &events);
        }
        start.elapsed().as_secs_f64()
    }

    fn store_streaming(&mut self, parts: &[Part]) {
        for part in parts {
            self.index.apply_all(&self.nodes[part.worker], &events(part));
        }
    }

    fn find(&self, query: &Self::Query) -> usize {
        let matches = self.index.match_prefix(query);
        black_box(&matches).iter().map(|found| found.blocks).sum()
    }

    fn remove(&mut self, worker: usize) {
        self.index.reset(&self.nodes[worker]);
    }
}
