//! A cluster in virtual time, over the code that serves: the router's index and placement, and the store's block table.
//!
//! Invariant: nothing here decides. Where a request goes, what a node evicts and what an index believes comes from the same
//! modules that production runs; the simulator only says how long things take and in which order they happen.
//! Deterministic: equal inputs give equal outcomes.
//!
//! What it leaves out: batches slow each other down only through a step's length, links are never shared, and admission
//! takes everything.

pub mod cooperation;
mod node;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

use kv_store::Eviction;
use router::cost::{Priors, Rates};
use router::index::PrefixIndex;
use router::placement::{Explanation, KvShape, NoPlacement, Problem, Settings, place};
use router::policy::Policy;
use types::{BlockHash, Millis, NodeId, Role, Slo};

use node::Node;

/// A cluster and what it runs on.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// Nodes that prefill.
    pub prefill_nodes: usize,
    /// Nodes that decode; at least 1.
    pub decode_nodes: usize,
    /// Blocks of each node's pool.
    pub blocks_per_node: usize,
    /// Which blocks a full pool drops.
    pub eviction: Eviction,
    /// Longest sequence, in tokens.
    pub context_tokens_max: u64,
    /// How fast every node is. `decode_step_ms` is that of a batch of one.
    pub rates: Rates,
    /// The size of KV.
    pub shape: KvShape,
}

/// A request of the workload.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// When it comes, in milliseconds from the start.
    pub at_ms: f64,
    /// Hashes of the prompt's full blocks.
    pub chain: Vec<BlockHash>,
    /// Tokens of the prompt; at least 1.
    pub prompt_tokens: u64,
    /// Tokens that it will generate; at least 1.
    pub output_tokens: u64,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It was served.
    Served(Served),
    /// No node could take it.
    Rejected,
}

/// How a request was served.
#[derive(Debug, Clone, PartialEq)]
pub struct Served {
    /// From arrival to first token.
    pub ttft: Millis,
    /// What the router had predicted.
    pub ttft_predicted: Millis,
    /// Prompt tokens that came from a cache.
    pub cached_tokens: u64,
    /// Who prefilled.
    pub prefill: NodeId,
    /// Who decoded.
    pub decode: NodeId,
}

/// What happens next, by time and then by the order in which it was planned.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Event {
    at_us: u64,
    order: usize,
    kind: Kind,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Arrives(usize),
    /// The prompt's blocks are in both nodes' pools.
    Landed {
        request: usize,
        prefill: usize,
        decode: usize,
    },
    Ends {
        decode: usize,
    },
}

struct Simulation<'a> {
    cluster: &'a Cluster,
    arrivals: &'a [Arrival],
    policy: &'a mut dyn Policy,
    nodes: Vec<Node>,
    index: PrefixIndex,
    events: BinaryHeap<Reverse<Event>>,
    planned: usize,
    outcomes: Vec<Outcome>,
}

/// Runs the workload to its end; one outcome per arrival, in their order.
pub fn run(cluster: &Cluster, arrivals: &[Arrival], policy: &mut dyn Policy) -> Vec<Outcome> {
    let named = |role: Role, count: usize| (0..count).map(move |index| Node::new(role, index, cluster));
    let nodes = named(Role::Prefill, cluster.prefill_nodes).chain(named(Role::Decode, cluster.decode_nodes));
    let mut simulation = Simulation {
        cluster,
        arrivals,
        policy,
        nodes: nodes.collect(),
        index: PrefixIndex::new(usize::MAX),
        events: BinaryHeap::new(),
        planned: 0,
        outcomes: vec![Outcome::Rejected; arrivals.len()],
    };
    for (request, arrival) in arrivals.iter().enumerate() {
        simulation.plan(arrival.at_ms, Kind::Arrives(request));
    }
    while let Some(Reverse(event)) = simulation.events.pop() {
        let now_ms = event.at_us as f64 / 1000.0;
        match event.kind {
            Kind::Arrives(request) => simulation.arrives(request, now_ms),
            Kind::Landed {
                request,
                prefill,
                decode,
            } => simulation.landed(request, prefill, decode, now_ms),
            Kind::Ends { decode } => simulation.nodes[decode].running -= 1,
        }
    }
    simulation.outcomes
}

impl Simulation<'_> {
    fn plan(&mut self, at_ms: f64, kind: Kind) {
        self.planned += 1;
        let at_us = (at_ms.max(0.0) * 1000.0) as u64;
        self.events.push(Reverse(Event {
            at_us,
            order: self.planned,
            kind,
        }));
    }

    fn decide(&mut self, request: usize, now_ms: f64) -> Result<Explanation, NoPlacement> {
        let arrival = &self.arrivals[request];
        let views: Vec<_> = self
            .nodes
            .iter()
            .map(|node| node.view(self.cluster, now_ms))
            .collect();
        let problem = Problem {
            key: arrival.chain.first().copied().unwrap_or_default(),
            prompt_tokens: arrival.prompt_tokens,
            matches: &self.index.match_prefix(&arrival.chain),
            nodes: &views,
            excluded: &BTreeSet::new(),
            shape: self.cluster.shape,
            slo: Slo::default(),
            // Any sequence will do, so long as it is the same in every run.
            draw: (request as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32,
            priors: &Priors::default(),
            settings: &Settings::default(),
        };
        place(&problem, self.policy)
    }

    fn arrives(&mut self, request: usize, now_ms: f64) {
        let Ok(explanation) = self.decide(request, now_ms) else {
            return;
        };
        let choice = explanation.choice();
        let position = |id: &NodeId| self.nodes.iter().position(|node| node.id == *id);
        let (Some(decode), Some(prefill)) = (
            position(&choice.decode),
            position(choice.prefill.as_ref().unwrap_or(&choice.decode)),
        ) else {
            return;
        };
        let arrival = &self.arrivals[request];
        let block_tokens = self.cluster.shape.block_tokens;
        // What the index promised may have been evicted since: the node looks again, as a real one does.
        let fetched = choice.sources.iter().filter_map(|source| {
            let holder = self.nodes.iter().find(|node| node.id == source.node)?;
            Some(holder.held(&arrival.chain).min(source.blocks))
        });
        let held = fetched
            .chain([self.nodes[prefill].held(&arrival.chain)])
            .max()
            .unwrap_or(0) as u64;
        let cached_tokens = (held * block_tokens).min(arrival.prompt_tokens);
        let new_tokens = (arrival.prompt_tokens - cached_tokens).max(1);
        let prediction = choice.prediction;
        let compute = self.cluster.rates.compute(new_tokens, cached_tokens);
        let busy = prediction.promote + prediction.fetch + compute;
        let started_ms = self.nodes[prefill].occupy(now_ms, busy, new_tokens);
        let landed_ms = started_ms + (busy + prediction.handoff).0;
        self.outcomes[request] = Outcome::Served(Served {
            ttft: Millis(landed_ms - now_ms),
            ttft_predicted: prediction.total,
            cached_tokens,
            prefill: self.nodes[prefill].id.clone(),
            decode: choice.decode.clone(),
        });
        self.nodes[decode].running += 1;
        self.plan(
            landed_ms,
            Kind::Landed {
                request,
                prefill,
                decode,
            },
        );
    }

    fn landed(&mut self, request: usize, prefill: usize, decode: usize, now_ms: f64) {
        let arrival = &self.arrivals[request];
        for index in BTreeSet::from([prefill, decode]) {
            let node = &mut self.nodes[index];
            for event in node.keep(&arrival.chain, now_ms) {
                self.index.apply(&node.id, &event);
            }
        }
        let batch = self.nodes[decode].running.saturating_sub(1);
        let step = self.cluster.rates.step(0, batch);
        let tokens = arrival.output_tokens.saturating_sub(1);
        self.plan(now_ms + step.0 * tokens as f64, Kind::Ends { decode });
    }
}

#[cfg(test)]
mod tests;
