//! What completed requests teach beyond what nodes report of themselves.
//!
//! - **Links**: bytes per millisecond from one node to another, from what was fetched and handed over. A node's own rate is one for
//!   all its peers, though some are reached through shared memory and others through a slow switch.
//! - **Pace**: how long a node takes for a prompt, as a multiple of what it says of its steps: what lies between steps is in no step.
//! - **The fixed cost of a handoff**: what a remote prefill takes beyond its predicted terms where nothing queues and nothing is
//!   fetched: the streams, the offer, the landing.
//!
//! Every estimate begins at what is known without it and moves away as far as measurements carry it; one measurement counts at most
//! by a factor of `OUTLIER`, so that a stalled machine or a clock that jumped teaches little.
//!
//! Pure, and the same for equal orders of completions. Elsewhere: who asks (`cost.rs`, `placement/weigh.rs`).

use std::collections::BTreeMap;

use types::{Millis, NodeId};

use super::Prediction;

/// A measurement counts as at most so many times, or at least such a part of, what was expected.
const OUTLIER: f64 = 4.0;

/// Bytes for which a link is taken to be as fast as its ends say: a handful of blocks moves it halfway.
const PRIOR_BYTES: f64 = 4.0 * 1024.0 * 1024.0;

/// What is kept, of a link's sums, when a transfer is added: some hundred transfers count.
const LINK_KEPT: f64 = 0.99;

/// Pairs of nodes that are told apart; 300 nodes make as many. Others go by the rates of their ends.
pub const LINKS_MAX: usize = 1 << 16;

/// Weight of a prompt in its node's pace, if it is a long one.
const PACE_WEIGHT: f64 = 0.05;

/// Prompts with fewer new tokens count for less: they share their steps with others.
const PACE_TOKENS: f64 = 512.0;

/// A pace is between this and its inverse: beyond it, what a node reports is of no use anyway.
const PACE_MIN: f64 = 0.5;

/// Weight of a handoff in the fixed cost of all.
const FIXED_WEIGHT: f64 = 0.02;

/// Bytes, and how long they were on their way.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Moved {
    /// How much.
    pub bytes: u64,
    /// How long.
    pub took: Millis,
}

/// What a placement was predicted to take, for when it is known what it took.
#[derive(Debug, Clone, PartialEq)]
pub struct Foretold {
    /// Who prefills; `None` is the decode node.
    pub prefill: Option<NodeId>,
    /// Who decodes.
    pub decode: NodeId,
    /// Who was to give the prefix.
    pub source: Option<NodeId>,
    /// Tokens that were to be computed.
    pub new_tokens: u64,
    /// Tokens of the whole prompt.
    pub prompt_tokens: u64,
    /// The terms.
    pub prediction: Prediction,
    /// The prefilling node's pace in them.
    pub pace: f64,
}

impl Foretold {
    /// Who prefills.
    pub fn engine(&self) -> &NodeId {
        self.prefill.as_ref().unwrap_or(&self.decode)
    }
}

/// What a placement took, as its nodes measured it.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Tokens of the prompt that were not computed.
    pub cached_tokens: u64,
    /// Waiting for the engine.
    pub queue: Millis,
    /// Getting the prefix, whether or not the prompt queued meanwhile.
    pub fetch: Moved,
    /// From the start of the computation to the first token.
    pub compute: Millis,
    /// KV on its way to the decode node.
    pub handoff: Moved,
    /// The part of that after the computation.
    pub exposed: Millis,
    /// From placement to first token.
    pub ttft: Millis,
}

/// What was learnt.
#[derive(Debug, Default)]
pub(super) struct Learned {
    /// By receiver, since a decision asks for one receiver's links after the other.
    links: BTreeMap<NodeId, Inbound>,
    links_known: usize,
    /// Logarithm of each node's pace.
    paces: BTreeMap<NodeId, f64>,
    /// Milliseconds of a handoff's fixed cost, if any was measured.
    fixed_ms: Option<f64>,
}

/// The links to one node, by who sends.
#[derive(Debug, Default)]
pub struct Inbound(BTreeMap<NodeId, Link>);

#[derive(Debug, Default, Clone, Copy)]
struct Link {
    bytes: f64,
    ms: f64,
}

impl Link {
    /// Expected milliseconds for `bytes`, which the link's ends would take `ends_ms` for.
    fn expect(&self, bytes: f64, ends_ms: f64) -> f64 {
        let prior_ms = PRIOR_BYTES / bytes * ends_ms;
        bytes * (self.ms + prior_ms) / (self.bytes + PRIOR_BYTES)
    }

    fn observe(&mut self, bytes: f64, ms: f64) {
        self.bytes = self.bytes * LINK_KEPT + bytes;
        self.ms = self.ms * LINK_KEPT + ms;
    }
}

impl Inbound {
    /// What `bytes` from `source` take, if anything was learnt; by their ends' rates they would take `ends`.
    pub(crate) fn transfer(&self, source: &NodeId, bytes: u64, ends: Millis) -> Millis {
        match self.0.get(source) {
            Some(link) if bytes > 0 => Millis(link.expect(bytes as f64, ends.0)),
            Some(_) | None => ends,
        }
    }
}

impl Learned {
    pub(super) fn inbound(&self, receiver: &NodeId) -> Option<&Inbound> {
        self.links.get(receiver)
    }

    pub(super) fn pace(&self, node: &NodeId) -> f64 {
        self.paces.get(node).map_or(1.0, |log| log.exp())
    }

    pub(super) fn fixed(&self, assumed: f64) -> f64 {
        self.fixed_ms.unwrap_or(assumed)
    }

    /// `bytes` came from `source` to `receiver`; by the rates of both ends they would have taken `ends`.
    pub(super) fn moved(&mut self, source: &NodeId, receiver: &NodeId, moved: Moved, ends: Millis) {
        let (bytes, ms, ends_ms) = (moved.bytes as f64, moved.took.0, ends.0);
        if !(is_positive(bytes) && is_positive(ms) && is_positive(ends_ms)) {
            return;
        }
        let inbound = self.links.entry(receiver.clone()).or_default();
        if !inbound.0.contains_key(source) {
            if self.links_known >= LINKS_MAX {
                return;
            }
            self.links_known += 1;
        }
        let link = inbound.0.entry(source.clone()).or_default();
        let expected = link.expect(bytes, ends_ms);
        link.observe(bytes, ms.clamp(expected / OUTLIER, expected * OUTLIER));
    }

    /// `node` computed a prompt.
    pub(super) fn computed(&mut self, node: &NodeId, foretold: &Foretold, took: Millis) {
        let said = foretold.prediction.compute.0 / foretold.pace;
        if !(is_positive(said) && is_positive(took.0)) {
            return;
        }
        let weight = PACE_WEIGHT * (foretold.new_tokens as f64 / PACE_TOKENS).min(1.0);
        let log = self.paces.entry(node.clone()).or_insert(0.0);
        let measured = (took.0 / said).ln().clamp(-OUTLIER.ln(), OUTLIER.ln());
        *log = (*log + weight * (measured - *log)).clamp(PACE_MIN.ln(), -PACE_MIN.ln());
    }

    /// A request without queue and fetch took so much more than its computing and moving did.
    pub(super) fn handed_over(&mut self, fixed: Millis, assumed: f64) {
        if fixed.0.is_finite() {
            let known = self.fixed(assumed);
            let measured = fixed.0.clamp(0.0, known.max(assumed) * OUTLIER);
            self.fixed_ms = Some(known + FIXED_WEIGHT * (measured - known));
        }
    }

    pub(super) fn forget(&mut self, node: &NodeId) {
        self.paces.remove(node);
        let mut gone = self.links.remove(node).map_or(0, |inbound| inbound.0.len());
        for inbound in self.links.values_mut() {
            gone += usize::from(inbound.0.remove(node).is_some());
        }
        self.links_known -= gone;
    }
}

fn is_positive(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

#[cfg(test)]
mod tests;
