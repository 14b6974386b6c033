//! How well several pools serve as one: requests over nodes that hold blocks for each other, through the store's own table and its
//! decisions about what to give and to take.
//!
//! A request hits the longest run that any node holds, since nodes fetch from each other, and leaves its whole prompt on the node
//! that serves it: what was fetched is a copy from then on. Counted are blocks, as published traces name them.
//!
//! Deterministic, and without a network: a peer that is asked answers at once, and what it takes has arrived at once.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use kv_store::Eviction;
use kv_store::cooperate::{Candidate, Fate, Giver, Limits, Offered, Report, Taker};
use kv_store::table::{BlockTable, Purpose, TableLimits};
use types::{BlockHash, NodeId};

use crate::pool::keep;
use crate::trace::{self, TraceError};

/// Nobody follows the logs.
const LOG_ENTRIES_MAX: usize = 1;
/// Chains about which peers are asked in one round.
const CANDIDATES_MAX: usize = 32;
/// Blocks whose price a peer says in one report.
const PRICE_BLOCKS_MAX: usize = 512;
/// Rounds after one request. The margin of free slots needs few; the rest is left to eviction.
const ROUNDS_MAX: usize = 8;
/// A node keeps one of so many slots free.
const MARGIN_SHARE: usize = 64;
/// Requests over which load is averaged: about a minute of the published trace.
const LOAD_MEMORY_REQUESTS: f64 = 200.0;

/// How requests are spread over the nodes that serve.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Routing {
    /// To the node with the longest run of the prompt, so long as it has had no more than `load_max` times the mean of the
    /// recent blocks; among equals to the one that has had least.
    Affinity {
        /// Most load of a node, as a multiple of the mean.
        load_max: f64,
    },
    /// To one after the other, whatever they hold.
    RoundRobin,
}

/// The pools.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pools {
    /// Nodes that requests are placed on.
    pub serving: usize,
    /// Nodes that only hold blocks.
    pub stores: usize,
    /// Blocks of each node.
    pub blocks_per_node: usize,
    /// What every node evicts.
    pub eviction: Eviction,
    /// How requests are spread.
    pub routing: Routing,
    /// What nodes may give to each other; `None`: they do not cooperate.
    pub cooperation: Option<Limits>,
}

/// A request.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// When it comes, from the start.
    pub at: Duration,
    /// Its blocks.
    pub chain: Vec<BlockHash>,
}

/// What the pools were good for.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Served {
    /// Blocks asked for.
    pub blocks: usize,
    /// Blocks that some node held, with all before them.
    pub hits: usize,
    /// Hits that the serving node held itself.
    pub hits_local: usize,
    /// Blocks that moved to a peer instead of being dropped, with what came along.
    pub moved: usize,
    /// Most load of a node, as a multiple of the mean.
    pub load_max: f64,
    /// What is held in the end.
    pub copies: Copies,
}

/// How often blocks are held.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Copies {
    /// Slots with a block.
    pub slots: usize,
    /// Different blocks in them.
    pub blocks: usize,
    /// Most slots with one and the same block.
    pub most: usize,
}

impl Copies {
    /// Slots that hold what another one holds, too, as a part of all.
    pub fn share(&self) -> f64 {
        (self.slots - self.blocks) as f64 / self.slots.max(1) as f64
    }
}

impl Served {
    /// Hits as a part of the blocks asked for.
    pub fn hit_ratio(&self) -> f64 {
        self.hits as f64 / self.blocks.max(1) as f64
    }
}

struct Pool {
    id: NodeId,
    table: BlockTable,
    cooperation: Option<(Giver, Taker)>,
    /// Blocks of recent requests.
    load: f64,
    served: usize,
}

/// Reads the blocks of a trace of [`trace::parse`]'s format, each prompt's last one also if it is not full: here blocks are counted.
///
/// # Errors
///
/// The first line that is no request.
pub fn prompts_of_trace(text: &str) -> Result<Vec<Prompt>, TraceError> {
    trace::each_line(text, |line| {
        Ok(Prompt {
            at: line.at()?,
            chain: line.blocks(),
        })
    })
}

/// Serves the prompts in their order.
pub fn run(pools: &Pools, prompts: &[Prompt]) -> Served {
    let begun = Instant::now();
    let mut nodes: Vec<Pool> = (0..pools.serving + pools.stores)
        .map(|index| Pool::new(index, pools, begun))
        .collect();
    let mut served = Served::default();
    for (request, prompt) in prompts.iter().enumerate() {
        let now = begun + prompt.at;
        let chain = &prompt.chain;
        let held: Vec<usize> = nodes.iter().map(|node| node.table.match_len(chain)).collect();
        let chosen = choose(pools, &nodes, &held, request, chain.len());
        for node in &mut nodes {
            node.load *= 1.0 - 1.0 / LOAD_MEMORY_REQUESTS;
        }
        let hits = held.iter().copied().max().unwrap_or_default();
        served.blocks += chain.len();
        served.hits += hits;
        served.hits_local += held[chosen];
        if hits > held[chosen]
            && let Some(source) = held.iter().position(|held| *held == hits)
        {
            read_by_peer(&mut nodes[source].table, &chain[..hits], now);
        }
        let node = &mut nodes[chosen];
        node.load += chain.len() as f64;
        node.served += chain.len();
        keep(&mut node.table, chain, Purpose::Request, now);
        if pools.cooperation.is_some() {
            for _ in 0..ROUNDS_MAX {
                if !round(&mut nodes, chosen, now, &mut served) {
                    break;
                }
            }
        }
    }
    let most = nodes.iter().map(|node| node.served).max().unwrap_or_default();
    served.load_max = most as f64 * pools.serving as f64 / served.blocks.max(1) as f64;
    served.copies = copies(&nodes);
    served
}

fn copies(nodes: &[Pool]) -> Copies {
    let mut holders: HashMap<BlockHash, usize> = HashMap::new();
    for node in nodes {
        for block in node.table.snapshot().finish().blocks {
            *holders.entry(block.hash).or_default() += 1;
        }
    }
    Copies {
        slots: holders.values().sum(),
        blocks: holders.len(),
        most: holders.values().copied().max().unwrap_or_default(),
    }
}

impl Pool {
    fn new(index: usize, pools: &Pools, now: Instant) -> Self {
        let id = NodeId::new(format!("node-{index}"));
        let table = BlockTable::new(TableLimits {
            capacity: pools.blocks_per_node,
            log_entries_max: LOG_ENTRIES_MAX,
            leases_max: 1,
            first_lease: 1,
            eviction: pools.eviction,
        });
        let cooperation = pools
            .cooperation
            .map(|limits| (Giver::new(id.clone(), limits, now), Taker::new(limits, now)));
        Self {
            id,
            table,
            cooperation,
            load: 0.0,
            served: 0,
        }
    }

    fn margin(&self) -> usize {
        self.table.counts().capacity / MARGIN_SHARE
    }

    fn missing(&self) -> usize {
        self.margin().saturating_sub(self.table.counts().free)
    }
}

fn choose(pools: &Pools, nodes: &[Pool], held: &[usize], request: usize, blocks: usize) -> usize {
    match pools.routing {
        Routing::RoundRobin => request % pools.serving,
        Routing::Affinity { load_max } => {
            let serving = &nodes[..pools.serving];
            let total: f64 = serving.iter().map(|node| node.load).sum();
            let most = load_max * total / pools.serving as f64 + blocks as f64;
            let rank = |index: usize| {
                let run = if nodes[index].load <= most { held[index] } else { 0 };
                (std::cmp::Reverse(run), nodes[index].load)
            };
            let better = |a: &usize, b: &usize| {
                rank(*a)
                    .partial_cmp(&rank(*b))
                    .unwrap_or(std::cmp::Ordering::Equal)
            };
            (0..pools.serving).min_by(better).unwrap_or_default()
        }
    }
}

/// What a peer's fetch does to the node it fetches from.
fn read_by_peer(table: &mut BlockTable, chain: &[BlockHash], now: Instant) {
    if let Ok(Some((lease, _))) = table.lease(chain, Purpose::Request, now, now) {
        table.release(lease, now);
    }
}

/// One round of a node that has too few free slots. Whether it may need another one.
fn round(nodes: &mut [Pool], giver: usize, now: Instant, served: &mut Served) -> bool {
    let missing = nodes[giver].missing();
    if missing == 0 {
        return false;
    }
    let coldest = nodes[giver].table.coldest(CANDIDATES_MAX, now);
    let candidates: Vec<Candidate> = coldest
        .iter()
        .filter_map(|victim| {
            let path = nodes[giver].table.path(victim.hash)?;
            Some(Candidate {
                path,
                worth: victim.worth,
            })
        })
        .collect();
    let peers: Vec<usize> = (0..nodes.len()).filter(|node| *node != giver).collect();
    let reports: Vec<Report> = peers
        .iter()
        .map(|peer| report(&mut nodes[*peer], &candidates, now))
        .collect();
    let Some((decides, _)) = &mut nodes[giver].cooperation else {
        return false;
    };
    let fates = decides.decide(&candidates, &reports, missing, now);
    for (candidate, fate) in candidates.iter().zip(fates) {
        let blocks = match fate {
            Fate::Keep => 0,
            Fate::Drop { blocks, .. } => blocks,
            Fate::Offer { report, from, blocks } => {
                served.moved += offer(nodes, giver, peers[report], candidate, from, now);
                blocks
            }
        };
        for hash in candidate.path.hashes.iter().rev().take(blocks) {
            if !nodes[giver].table.evict(*hash, now) {
                break;
            }
        }
    }
    nodes[giver].missing() < missing
}

fn report(peer: &mut Pool, candidates: &[Candidate], now: Instant) -> Report {
    let held = candidates
        .iter()
        .map(|candidate| peer.table.match_len(&candidate.path.hashes));
    let room = peer.cooperation.as_mut().map_or(0, |(_, taker)| taker.room(now));
    let room = room.min(PRICE_BLOCKS_MAX);
    Report {
        peer: peer.id.clone(),
        held: held.collect(),
        price: peer.table.price(room, peer.margin(), now),
    }
}

/// Moves a run, if the peer takes it. Returns the blocks that were moved.
fn offer(
    nodes: &mut [Pool],
    giver: usize,
    taker: usize,
    candidate: &Candidate,
    from: usize,
    now: Instant,
) -> usize {
    let run = &candidate.path.hashes[from..];
    let moves: Vec<u8> = match &nodes[giver].cooperation {
        Some((giver, _)) => run.iter().map(|hash| giver.recirculations(*hash)).collect(),
        None => return 0,
    };
    let peer = &mut nodes[taker];
    let margin = peer.margin();
    let price = peer.table.price(run.len(), margin, now);
    let offered = Offered {
        blocks: run.len(),
        worth: candidate.worth,
        attached: peer.table.match_len(&candidate.path.hashes) >= from,
    };
    let Some((giver, decides)) = &mut peer.cooperation else {
        return 0;
    };
    if decides.take(&[offered], &price, now) != [true] {
        return 0;
    }
    keep(&mut peer.table, &candidate.path.hashes, Purpose::Move, now);
    peer.table.make_room(margin, now);
    for (hash, moves) in run.iter().zip(moves) {
        peer.table.lower_worth(*hash, candidate.worth, now);
        giver.received(*hash, moves);
    }
    run.len()
}

#[cfg(test)]
mod tests;
