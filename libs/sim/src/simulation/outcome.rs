//! What became of a simulation's requests and nodes.

use types::{NodeId, Role};

use super::Simulation;

/// What became of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All its tokens came.
    Served(Served),
    /// It was turned away before anything was computed for it.
    Rejected,
    /// It was taken, and did not end well: its nodes died too often, or it had not ended long after the last one came.
    Failed,
}

/// How a request was served.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Served {
    /// Milliseconds from arrival to the first token.
    pub ttft_ms: f64,
    /// The same as the router had predicted it.
    pub ttft_predicted_ms: f64,
    /// Mean of the longest tenth of its gaps, in milliseconds; 0 with one token.
    pub tbt_tail_ms: f64,
    /// Prompt tokens that came from a cache.
    pub cached_tokens: u64,
    /// Of these, tokens that came from another node's.
    pub fetched_tokens: u64,
    /// Milliseconds that its prompt was computed.
    pub compute_ms: f64,
    /// Index of the node that prefilled.
    pub prefill: usize,
    /// Index of the node that decoded.
    pub decode: usize,
    /// Placements that it took.
    pub placements: u32,
}

/// What a node did.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeTotals {
    /// Its name.
    pub id: NodeId,
    /// What it is.
    pub role: Role,
    /// Prompts that it computed.
    pub prefills: usize,
    /// Milliseconds of computing them.
    pub prefill_ms: f64,
    /// Tokens that it decoded.
    pub decoded_tokens: u64,
}

/// The cluster at a moment.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Sample {
    /// Seconds from the start.
    pub at_s: f64,
    /// Prompt tokens that wait or are being computed.
    pub queued_prefill_tokens: u64,
    /// Sequences that decode.
    pub running_sequences: usize,
    /// Mean step of the decode nodes, as a part of the limit on gaps.
    pub decode_load: f64,
}

/// The result of a simulation.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcomes {
    /// One per request, in their order.
    pub requests: Vec<Outcome>,
    /// One per node.
    pub nodes: Vec<NodeTotals>,
    /// One per second.
    pub samples: Vec<Sample>,
    /// All gaps between tokens, in milliseconds.
    pub gaps_ms: Vec<f32>,
    /// Seconds until the last request ended.
    pub duration_s: f64,
}

impl Simulation<'_> {
    pub(super) fn outcomes(self) -> Outcomes {
        let node = |node: super::Node| NodeTotals {
            id: node.id,
            role: node.role,
            prefills: node.totals.prefills,
            prefill_ms: node.totals.prefill_ms,
            decoded_tokens: node.totals.decoded,
        };
        let outcome = |state: super::State| state.outcome.unwrap_or(Outcome::Failed);
        Outcomes {
            requests: self.states.into_iter().map(outcome).collect(),
            nodes: self.nodes.into_iter().map(node).collect(),
            samples: self.samples,
            gaps_ms: self.gaps_ms,
            duration_s: super::ms(self.now_ns) / 1e3,
        }
    }
}
