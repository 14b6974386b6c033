//! Where a request goes: which node prefills, which decodes, and where the cached prefix comes from.
//!
//! Every (prefill node, decode node) pair is a candidate, and so is every decode node alone, which then prefills by itself
//! ("local"): conditional disaggregation is one more candidate of the same formula. For each one the prediction of
//! `cost.rs` is worked out, with the prefix fetched from a peer where that beats computing it; a [`Policy`] then picks.
//!
//! A local prefill shares its engine with running sequences: each of them waits for every chunk. Where the request names a limit
//! on gaps, and a step with a chunk beside it keeps that, nobody is harmed: the decode node is one more place to prefill.
//! Elsewhere the delay is charged to the candidate's score, and beyond [`Settings::local_prefill_tokens_max`] new tokens a decode
//! node prefills only where no prefill node can: a long prompt on an idle decode node would be the quickest choice for itself and
//! the worst for whoever comes next.
//!
//! Invariant: a node that is unreachable, draining, excluded or too small for the prompt is in no candidate.
//! Pure and deterministic: equal problems give equal placements, in every router.
//!
//! Elsewhere: what a candidate costs (`placement/weigh.rs`), which one is picked (`policy.rs`).

mod weigh;

use std::collections::BTreeSet;
use std::sync::Arc;

use types::{BlockHash, Millis, NodeId, Role, Slo};

use crate::cost::{CostModel, Prediction, Pressure, Rates};
use crate::index::Match;
use crate::policy::Policy;
use crate::residents::Outlook;
use weigh::{Prefilling, Weighing};

/// Peers named as sources of one prefix: the best one, and some to fall back on.
pub const SOURCES_MAX: usize = 4;

/// What an operator may want otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Most new prompt tokens that a decode node prefills by itself while a prefill node could, if that breaks the limit on gaps
    /// or there is none; 0: it never does. Short extensions (the next turn of a conversation) cost less there than a handoff
    /// does; one step of the decode node holds them.
    pub local_prefill_tokens_max: u64,
    /// Milliseconds of time to first token that one millisecond of delay of one running sequence is worth, if that breaks the
    /// limit on gaps or there is none.
    pub interference_weight: f64,
    /// Milliseconds of time to first token that one millisecond of gap between this request's tokens is worth. Small: it
    /// spreads decodes over equal nodes without outweighing a cached prefix.
    pub decode_gap_weight: f64,
    /// By which batch of a decode node gaps are predicted.
    pub decode_load: DecodeLoad,
    /// How long a prompt may have to wait at a node.
    pub node_queue_max: Millis,
    /// Scores closer than this are equal, since predictions are not that good; a hash of the prefix decides between them.
    pub tie: Millis,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            local_prefill_tokens_max: 256,
            interference_weight: 0.5,
            decode_gap_weight: 4.0,
            decode_load: DecodeLoad::default(),
            node_queue_max: Millis(2_000.0),
            tie: Millis(1.0),
        }
    }
}

/// By which batch of a decode node the gaps of a request are predicted, and whether a request is turned away for them.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecodeLoad {
    /// The batch that it has now, and nobody is turned away for it.
    Unjudged,
    /// The batch that it has now.
    Reported,
    /// The batch that it is expected to have when the prompt is computed.
    #[default]
    Predicted,
}

/// A node as placement sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeView {
    /// Its name.
    pub id: NodeId,
    /// What it does.
    pub role: Role,
    /// Whether its load is being reported.
    pub reachable: bool,
    /// Whether its log is being followed, so that what the index says of it holds.
    pub readable: bool,
    /// It takes nothing new.
    pub draining: bool,
    /// An operator wants nothing new placed on it.
    pub cordoned: bool,
    /// Longest sequence that it takes, in tokens.
    pub context_tokens_max: u64,
    /// How fast it is.
    pub rates: Rates,
    /// How busy it is.
    pub pressure: Pressure,
    /// What a queued token takes, as a multiple of one without context.
    pub context_factor: f64,
}

/// The size of KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Tokens per block.
    pub block_tokens: u64,
    /// Bytes per token, all layers.
    pub token_bytes: u64,
    /// Layers, each of which is pushed as soon as it is computed.
    pub layers: u64,
}

/// One request and the cluster at this moment.
#[derive(Debug)]
pub struct Problem<'a> {
    /// Decides between equals: the hash of the request's first block, so that what shares a prefix meets on one node.
    pub key: BlockHash,
    /// Tokens of the sequence so far; at least 1.
    pub prompt_tokens: u64,
    /// What is held where of the prompt's full blocks.
    pub matches: &'a [Match<'a>],
    /// The nodes that serve the request's model.
    pub nodes: &'a [NodeView],
    /// Nodes on which earlier tries of this request failed.
    pub excluded: &'a BTreeSet<NodeId>,
    /// The size of KV.
    pub shape: KvShape,
    /// What the request asks for, less the time that has passed.
    pub slo: Slo,
    /// A random number, for policies that want one.
    pub draw: u64,
    /// What is known of the answers that nodes give and will give.
    pub outlook: Outlook<'a>,
    /// What is known of the nodes' speed beyond their own rates.
    pub costs: &'a CostModel,
    /// What the operator set.
    pub settings: &'a Settings,
}

/// A peer that holds a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The peer.
    pub node: NodeId,
    /// Leading full blocks of the prompt.
    pub blocks: usize,
}

/// What speaks against a candidate, least first. Only the last one bars it; the others rank it behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Objection {
    /// The gap between tokens is predicted above the request's limit.
    MissesTbt,
    /// The first token is predicted after the request's limit.
    MissesTtft,
    /// The decode node has too few free blocks now, and would have to preempt.
    ShortOfBlocks,
    /// More new tokens than a decode node should prefill by itself.
    LocalPrefillTooLong,
}

/// One way to serve the request.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Who prefills; `None` is the decode node.
    pub prefill: Option<NodeId>,
    /// Who decodes.
    pub decode: NodeId,
    /// Where the prefill gets the blocks that it lacks, best first. Empty if computing them is quicker.
    pub sources: Arc<[Source]>,
    /// Tokens that are computed.
    pub new_tokens: u64,
    /// Blocks that the request takes on the decode node beyond those it holds.
    pub decode_blocks: u64,
    /// Time to first token, by terms.
    pub prediction: Prediction,
    /// Gap between tokens.
    pub tbt: Millis,
    /// What the score is charged for the delay of sequences that run there.
    pub interference_charge: Millis,
    /// What it is charged for the gap between tokens.
    pub gap_charge: Millis,
    /// What policies minimise: the predicted time to first token and the charges for what it does to others.
    pub score: Millis,
    /// What speaks against it most.
    pub objection: Option<Objection>,
}

impl Candidate {
    /// Who prefills: the decode node, if nobody else does.
    pub fn engine(&self) -> &NodeId {
        self.prefill.as_ref().unwrap_or(&self.decode)
    }

    /// Whether a policy may pick it.
    pub fn eligible(&self) -> bool {
        self.objection != Some(Objection::LocalPrefillTooLong)
    }
}

/// Why a node is in no candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exclusion {
    /// No live stream of load reports.
    Unreachable,
    /// Takes nothing new.
    Draining,
    /// An operator wants nothing new there.
    Cordoned,
    /// An earlier try of this request failed there.
    FailedBefore,
    /// The prompt exceeds its context.
    ContextTooSmall,
}

/// A decision with its reasons.
#[derive(Debug, Clone, PartialEq)]
pub struct Explanation {
    /// The policy that chose.
    pub policy: &'static str,
    /// Index of the choice.
    pub chosen: usize,
    /// Everything that was weighed.
    pub candidates: Vec<Candidate>,
    /// Nodes that were not weighed.
    pub excluded: Vec<(NodeId, Exclusion)>,
}

impl Explanation {
    /// The choice.
    pub fn choice(&self) -> &Candidate {
        &self.candidates[self.chosen]
    }
}

/// Nobody can decode the request now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no decode node can take the request: {}", reasons(.excluded))]
pub struct NoPlacement {
    /// Why not, node by node.
    pub excluded: Vec<(NodeId, Exclusion)>,
}

/// Weighs every candidate and lets `policy` pick.
pub fn place(problem: &Problem<'_>, policy: &mut dyn Policy) -> Result<Explanation, NoPlacement> {
    let mut excluded = Vec::new();
    let mut prefills: Vec<&NodeView> = Vec::new();
    let mut decodes: Vec<&NodeView> = Vec::new();
    for node in problem.nodes {
        let group = match node.role {
            Role::Prefill => &mut prefills,
            Role::Decode => &mut decodes,
            Role::Router | Role::Store => continue,
        };
        match exclusion(problem, node) {
            Some(reason) => excluded.push((node.id.clone(), reason)),
            None => group.push(node),
        }
    }
    let weighing = Weighing::new(problem, policy.prefixes());
    let prefills: Vec<Prefilling<'_>> = prefills
        .into_iter()
        .map(|node| weighing.prefilling(node))
        .collect();
    // Whatever prefills it apart, the request decodes then at the earliest.
    let apart = prefills
        .iter()
        .map(Prefilling::ends)
        .min_by(|a, b| a.0.total_cmp(&b.0));
    let mut candidates = Vec::with_capacity((prefills.len() + 1) * decodes.len());
    for node in decodes {
        let engine = weighing.prefilling(node);
        let decode = weighing.decoding(node, engine.ends());
        candidates.push(weighing.local(&engine, &decode, prefills.is_empty()));
        let Some(ahead) = apart else { continue };
        let decode = weighing.decoding(node, ahead);
        candidates.extend(prefills.iter().map(|engine| weighing.remote(engine, &decode)));
    }
    match policy.choose(problem, &candidates) {
        Some(chosen) => Ok(Explanation {
            policy: policy.name(),
            chosen,
            candidates,
            excluded,
        }),
        None => Err(NoPlacement { excluded }),
    }
}

fn exclusion(problem: &Problem<'_>, node: &NodeView) -> Option<Exclusion> {
    if problem.excluded.contains(&node.id) {
        Some(Exclusion::FailedBefore)
    } else if !node.reachable {
        Some(Exclusion::Unreachable)
    } else if node.draining {
        Some(Exclusion::Draining)
    } else if node.cordoned {
        Some(Exclusion::Cordoned)
    } else if node.context_tokens_max <= problem.prompt_tokens {
        Some(Exclusion::ContextTooSmall)
    } else {
        None
    }
}

fn reasons(excluded: &[(NodeId, Exclusion)]) -> String {
    if excluded.is_empty() {
        return "none is known".to_owned();
    }
    let reasons = excluded.iter().map(|(node, reason)| {
        let reason = match reason {
            Exclusion::Unreachable => "is unreachable",
            Exclusion::Draining => "is draining",
            Exclusion::Cordoned => "is cordoned",
            Exclusion::FailedBefore => "failed this request",
            Exclusion::ContextTooSmall => "has too small a context",
        };
        format!("{node} {reason}")
    });
    reasons.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
