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

use std::cmp::Reverse;
use std::collections::BTreeSet;

use types::{BlockHash, Millis, NodeId, Role, Slo};

use crate::cost::{Prediction, Pressure, Priors, Rates};
use crate::index::Match;
use crate::policy::Policy;

/// Peers named as sources of one prefix: the best one, and some to fall back on.
pub const SOURCES_MAX: usize = 4;

/// Prompt tokens that a decode node computes per step beside its running sequences. The node's own default; only the
/// prediction rests on it.
const LOCAL_STEP_TOKENS: u64 = 256;

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
    /// Scores closer than this are equal, since predictions are not that good; a hash of the prefix decides between them.
    pub tie: Millis,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            local_prefill_tokens_max: 256,
            interference_weight: 0.5,
            decode_gap_weight: 4.0,
            tie: Millis(1.0),
        }
    }
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
    pub matches: &'a [Match],
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
    /// What no report says.
    pub priors: &'a Priors,
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
    pub sources: Vec<Source>,
    /// Tokens that are computed.
    pub new_tokens: u64,
    /// Blocks that the request takes on the decode node beyond those it holds.
    pub decode_blocks: u64,
    /// Time to first token, by terms.
    pub prediction: Prediction,
    /// Gap between tokens.
    pub tbt: Millis,
    /// What policies minimise: the predicted time to first token and the charges for what it does to others.
    pub score: Millis,
    /// What speaks against it most.
    pub objection: Option<Objection>,
}

impl Candidate {
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
    let longest = policy.fetches_longest();
    let mut candidates = Vec::with_capacity((prefills.len() + 1) * decodes.len());
    for decode in &decodes {
        let mut local = weigh(problem, None, decode, longest);
        let most = problem.settings.local_prefill_tokens_max;
        let harmless = most > 0 && keeps_gaps(problem, decode, local.new_tokens);
        if !prefills.is_empty() && local.new_tokens > most && !harmless {
            local.objection = Some(Objection::LocalPrefillTooLong);
        }
        candidates.push(local);
        let remote = prefills
            .iter()
            .map(|prefill| weigh(problem, Some(prefill), decode, longest));
        candidates.extend(remote);
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
    } else if node.context_tokens_max <= problem.prompt_tokens {
        Some(Exclusion::ContextTooSmall)
    } else {
        None
    }
}

/// Works out one candidate. `longest` takes the longest prefix wherever it is; else whatever is quickest.
fn weigh(problem: &Problem<'_>, prefill: Option<&NodeView>, decode: &NodeView, longest: bool) -> Candidate {
    let engine = prefill.unwrap_or(decode);
    let prefix = quickest_prefix(problem, engine, longest);
    let queued_tokens = engine.pressure.queued_prefill_tokens as f64;
    let mut queue = Millis(queued_tokens * engine.rates.prefill_ms_per_token * engine.context_factor);
    let batch = decode.pressure.running_sequences;
    let running = batch + decode.pressure.placed_sequences;
    let tbt = decode.rates.step(batch, decode.pressure.placed_sequences + 1);
    let decode_held = held(problem, &decode.id);

    let (compute, handoff, interference) = match prefill {
        Some(prefill) => (
            prefix.compute,
            unhidden_handoff(problem, prefill, decode, prefix.compute),
            0.0,
        ),
        None => {
            let shared = |tokens: u64| match running {
                0 => 0.0,
                _ => tokens.div_ceil(LOCAL_STEP_TOKENS) as f64 * decode.rates.decode_step_ms,
            };
            // Whatever waits there shares its steps, too.
            queue = queue + Millis(shared(decode.pressure.queued_prefill_tokens));
            let delay = match keeps_gaps(problem, decode, prefix.new_tokens) {
                true => 0.0,
                false => prefix.compute.0 * running as f64,
            };
            let compute = prefix.compute + Millis(shared(prefix.new_tokens));
            (compute, Millis(0.0), delay)
        }
    };
    let prediction = Prediction::of(queue, prefix.promote, prefix.fetch, compute, handoff);
    let settings = problem.settings;
    let charges = settings.interference_weight * interference + settings.decode_gap_weight * tbt.0;
    let blocks = problem.prompt_tokens.div_ceil(problem.shape.block_tokens);
    let mut candidate = Candidate {
        prefill: prefill.map(|node| node.id.clone()),
        decode: decode.id.clone(),
        sources: prefix.sources,
        new_tokens: prefix.new_tokens,
        decode_blocks: blocks.saturating_sub(decode_held as u64),
        prediction,
        tbt,
        score: prediction.total + Millis(charges),
        objection: None,
    };
    candidate.objection = objection(problem, decode, &candidate);
    candidate
}

/// Whether the node's sequences keep the request's limit on gaps while it computes `new` tokens of the prompt beside them.
fn keeps_gaps(problem: &Problem<'_>, decode: &NodeView, new: u64) -> bool {
    let pressure = decode.pressure;
    let step = decode
        .rates
        .step(pressure.running_sequences, pressure.placed_sequences + 1);
    let chunk = new.min(LOCAL_STEP_TOKENS);
    // The last chunk attends to most.
    let beside = decode
        .rates
        .compute(chunk, problem.prompt_tokens.saturating_sub(chunk));
    problem.slo.tbt.is_some_and(|limit| step + beside <= limit)
}

fn objection(problem: &Problem<'_>, decode: &NodeView, candidate: &Candidate) -> Option<Objection> {
    let above = |value: Millis, limit: Option<Millis>| limit.is_some_and(|limit| value > limit);
    if candidate.decode_blocks > decode.pressure.available_blocks {
        Some(Objection::ShortOfBlocks)
    } else if above(candidate.prediction.total, problem.slo.ttft) {
        Some(Objection::MissesTtft)
    } else if above(candidate.tbt, problem.slo.tbt) {
        Some(Objection::MissesTbt)
    } else {
        None
    }
}

/// How an engine gets its prefix.
struct Prefix {
    sources: Vec<Source>,
    new_tokens: u64,
    promote: Millis,
    fetch: Millis,
    compute: Millis,
}

impl Prefix {
    fn total(&self) -> Millis {
        self.promote + self.fetch + self.compute
    }
}

fn quickest_prefix(problem: &Problem<'_>, engine: &NodeView, longest: bool) -> Prefix {
    let own = held(problem, &engine.id);
    // An engine asks its own disk before it asks a peer.
    let promote = promotion(problem, engine, 0);
    let without = prefix_of(problem, engine, own, Vec::new(), (promote, Millis(0.0)));
    let sources = sources(problem, engine, own);
    let Some(best) = sources.first() else {
        return without;
    };
    let bytes = (best.blocks - own) as u64 * problem.shape.block_tokens * problem.shape.token_bytes;
    let source = problem.nodes.iter().find(|node| node.id == best.node);
    let slower = source.map_or(engine.rates.transfer(bytes), |source| {
        transfer(source, engine, bytes)
    });
    let fetch = slower + Millis(problem.priors.fetch_fixed_ms);
    let promote = promote + source.map_or(Millis(0.0), |source| promotion(problem, source, own));
    let with = prefix_of(problem, engine, best.blocks, sources, (promote, fetch));
    if longest || with.total() < without.total() {
        with
    } else {
        without
    }
}

fn prefix_of(
    problem: &Problem<'_>,
    engine: &NodeView,
    blocks: usize,
    sources: Vec<Source>,
    (promote, fetch): (Millis, Millis),
) -> Prefix {
    // The last token is always computed: its logits give the first token.
    let cached = (blocks as u64 * problem.shape.block_tokens).min(problem.prompt_tokens - 1);
    let new_tokens = problem.prompt_tokens - cached;
    Prefix {
        sources,
        new_tokens,
        promote,
        fetch,
        compute: engine.rates.compute(new_tokens, cached),
    }
}

/// What `holder` takes to read from its disk what it has there only, beyond the first `known` blocks of the prompt.
fn promotion(problem: &Problem<'_>, holder: &NodeView, known: usize) -> Millis {
    let found = found(problem, &holder.id);
    let blocks = found.map_or(0, |found| found.blocks.saturating_sub(found.in_memory.max(known)));
    let bytes = blocks as u64 * problem.shape.block_tokens * problem.shape.token_bytes;
    holder.rates.promote(bytes)
}

/// Peers that hold more of the prefix than `engine` does, longest first, and of equals that with more of it in memory. A
/// draining node still serves what it holds.
fn sources(problem: &Problem<'_>, engine: &NodeView, own: usize) -> Vec<Source> {
    let usable = |found: &&Match| {
        let view = problem.nodes.iter().find(|node| node.id == found.node);
        found.blocks > own
            && found.node != engine.id
            && !problem.excluded.contains(&found.node)
            && view.is_some_and(|node| node.readable)
    };
    let mut usable: Vec<&Match> = problem.matches.iter().filter(usable).collect();
    usable.sort_by_key(|found| (Reverse((found.blocks, found.in_memory)), &found.node));
    let source = |found: &&Match| Source {
        node: found.node.clone(),
        blocks: found.blocks,
    };
    usable.iter().take(SOURCES_MAX).map(source).collect()
}

fn held(problem: &Problem<'_>, node: &NodeId) -> usize {
    found(problem, node).map_or(0, |found| found.blocks)
}

fn found<'a>(problem: &Problem<'a>, node: &NodeId) -> Option<&'a Match> {
    problem.matches.iter().find(|found| found.node == *node)
}

/// The part of the handoff that computing does not hide. Layers are pushed as they are computed, so at the least the
/// last one is waited for; where the wire is slower than the engine, the difference is.
fn unhidden_handoff(problem: &Problem<'_>, prefill: &NodeView, decode: &NodeView, compute: Millis) -> Millis {
    let held_tokens = held(problem, &decode.id) as u64 * problem.shape.block_tokens;
    let bytes = problem.prompt_tokens.saturating_sub(held_tokens) * problem.shape.token_bytes;
    let moving = transfer(prefill, decode, bytes).0;
    let exposed = (moving - compute.0).max(moving / problem.shape.layers.max(1) as f64);
    Millis(exposed + problem.priors.handoff_fixed_ms)
}

/// A transfer is as fast as the slower of its ends.
fn transfer(from: &NodeView, to: &NodeView, bytes: u64) -> Millis {
    let (a, b) = (from.rates.transfer(bytes), to.rates.transfer(bytes));
    if a > b { a } else { b }
}

fn reasons(excluded: &[(NodeId, Exclusion)]) -> String {
    if excluded.is_empty() {
        return "none is known".to_owned();
    }
    let reasons = excluded.iter().map(|(node, reason)| {
        let reason = match reason {
            Exclusion::Unreachable => "is unreachable",
            Exclusion::Draining => "is draining",
            Exclusion::FailedBefore => "failed this request",
            Exclusion::ContextTooSmall => "has too small a context",
        };
        format!("{node} {reason}")
    });
    reasons.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
