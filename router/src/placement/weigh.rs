//! What each candidate costs.
//!
//! What a node does as the prefilling end of a candidate, and as the decoding end, is worked out once per node; a candidate
//! combines two of them. A decision over 60 prefill nodes and 40 decode nodes weighs 2,440 candidates, which must not each
//! look through all nodes and all matches.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use types::{Millis, NodeId};

use super::{Candidate, DecodeLoad, NodeView, Objection, Problem, SOURCES_MAX, Source};
use crate::cost::Prediction;
use crate::cost::learning::Inbound;
use crate::index::Match;
use crate::policy::Prefixes;

/// Prompt tokens that a decode node computes per step beside its running sequences. The node's own default; only the
/// prediction rests on it.
const LOCAL_STEP_TOKENS: u64 = 256;

/// One problem, by node.
pub(super) struct Weighing<'a> {
    problem: &'a Problem<'a>,
    prefixes: Prefixes,
    nodes: HashMap<&'a NodeId, &'a NodeView>,
    matches: HashMap<&'a NodeId, &'a Match<'a>>,
    /// Of nodes that may be read from, longest first, and of equals that with more of it in memory. A draining node still
    /// serves what it holds.
    readable: Vec<&'a Match<'a>>,
    handoff_fixed: Millis,
}

/// A node as the end that prefills.
pub(super) struct Prefilling<'a> {
    node: &'a NodeView,
    queue: Millis,
    prefix: Prefix,
}

/// A node as the end that decodes.
pub(super) struct Decoding<'a> {
    node: &'a NodeView,
    tbt: Millis,
    /// Blocks beyond those that it holds.
    blocks: u64,
    /// What a prefill node would have to move there.
    handoff_bytes: u64,
    inbound: Option<&'a Inbound>,
}

/// How an engine gets its prefix.
struct Prefix {
    sources: Arc<[Source]>,
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

impl Prefilling<'_> {
    /// When it has computed the prompt.
    pub(super) fn ends(&self) -> Millis {
        self.queue + self.prefix.total()
    }
}

impl<'a> Weighing<'a> {
    pub(super) fn new(problem: &'a Problem<'a>, prefixes: Prefixes) -> Self {
        let nodes: HashMap<_, _> = problem.nodes.iter().map(|node| (&node.id, node)).collect();
        let matches = problem.matches.iter().map(|found| (found.node, found)).collect();
        let is_readable = |found: &&Match| {
            let node = nodes.get(found.node);
            node.is_some_and(|node| node.readable) && !problem.excluded.contains(found.node)
        };
        let mut readable: Vec<_> = problem.matches.iter().filter(is_readable).collect();
        readable.sort_by_key(|found| (Reverse((found.blocks, found.in_memory)), found.node));
        Self {
            problem,
            prefixes,
            nodes,
            matches,
            readable,
            handoff_fixed: problem.costs.handoff_fixed(),
        }
    }

    pub(super) fn prefilling(&self, node: &'a NodeView) -> Prefilling<'a> {
        let queued = node.pressure.queued_prefill_tokens as f64;
        let queue = Millis(queued * node.rates.prefill_ms_per_token * node.context_factor);
        Prefilling {
            node,
            queue,
            prefix: self.prefix(node, queue),
        }
    }

    /// `ahead`: when the request is expected to decode.
    pub(super) fn decoding(&self, node: &'a NodeView, ahead: Millis) -> Decoding<'a> {
        let problem = self.problem;
        let held = self.held(&node.id) as u64;
        let blocks = problem.prompt_tokens.div_ceil(problem.shape.block_tokens);
        let held_tokens = held * problem.shape.block_tokens;
        Decoding {
            node,
            tbt: self.gap(node, ahead),
            blocks: blocks.saturating_sub(held),
            handoff_bytes: problem.prompt_tokens.saturating_sub(held_tokens) * problem.shape.token_bytes,
            inbound: problem.costs.inbound(&node.id),
        }
    }

    /// Between the request's tokens: a step with the batch that there is, or will be.
    fn gap(&self, node: &NodeView, ahead: Millis) -> Millis {
        let pressure = &node.pressure;
        let running = pressure.running_sequences;
        let batch = match self.problem.settings.decode_load {
            DecodeLoad::Unjudged | DecodeLoad::Reported => (running + pressure.placed_sequences) as f64,
            DecodeLoad::Predicted => {
                let step = node.rates.step.of(running as f64);
                self.problem.outlook.batch(&node.id, running, step, ahead)
            }
        };
        node.rates.step.of(batch + 1.0)
    }

    /// `decode` prefills by itself, as what `engine` says. `alone`: no prefill node could.
    pub(super) fn local(&self, engine: &Prefilling<'_>, decode: &Decoding<'_>, alone: bool) -> Candidate {
        let pressure = &decode.node.pressure;
        let running = pressure.running_sequences + pressure.placed_sequences;
        let shared = |tokens: u64| match running {
            0 => Millis(0.0),
            _ => Millis(
                tokens.div_ceil(LOCAL_STEP_TOKENS) as f64 * decode.node.rates.step.of(running as f64).0,
            ),
        };
        let Prefix {
            new_tokens, compute, ..
        } = engine.prefix;
        let keeps_gaps = self.keeps_gaps(decode, new_tokens);
        let interference = match keeps_gaps {
            true => 0.0,
            false => compute.0 * running as f64,
        };
        // Whatever waits there shares its steps, too.
        let queue = engine.queue + shared(pressure.queued_prefill_tokens);
        let terms = (queue, compute + shared(new_tokens), Millis(0.0));
        let mut candidate = self.candidate(None, engine, decode, terms, interference);
        let most = self.problem.settings.local_prefill_tokens_max;
        if !alone && new_tokens > most && (most == 0 || !keeps_gaps) {
            candidate.objection = Some(Objection::LocalPrefillTooLong);
        }
        candidate
    }

    /// Whether the node's sequences keep the request's limit on gaps while it computes `new` tokens of the prompt beside them.
    fn keeps_gaps(&self, decode: &Decoding<'_>, new: u64) -> bool {
        let chunk = new.min(LOCAL_STEP_TOKENS);
        // The last chunk attends to most.
        let before = self.problem.prompt_tokens.saturating_sub(chunk);
        let beside = decode.node.rates.compute(chunk, before);
        self.problem
            .slo
            .tbt
            .is_some_and(|limit| decode.tbt + beside <= limit)
    }

    /// `engine` prefills for `decode`.
    pub(super) fn remote(&self, engine: &Prefilling<'_>, decode: &Decoding<'_>) -> Candidate {
        let handoff = self.unhidden_handoff(engine, decode);
        let prefill = Some(engine.node.id.clone());
        let terms = (engine.queue, engine.prefix.compute, handoff);
        self.candidate(prefill, engine, decode, terms, 0.0)
    }

    fn candidate(
        &self,
        prefill: Option<NodeId>,
        engine: &Prefilling<'_>,
        decode: &Decoding<'_>,
        (queue, compute, handoff): (Millis, Millis, Millis),
        interference: f64,
    ) -> Candidate {
        let Prefix {
            sources,
            new_tokens,
            promote,
            fetch,
            ..
        } = &engine.prefix;
        let prediction = Prediction::of(queue, *promote, *fetch, compute, handoff);
        let settings = self.problem.settings;
        let interference_charge = Millis(settings.interference_weight * interference);
        let gap_charge = Millis(settings.decode_gap_weight * decode.tbt.0);
        Candidate {
            prefill,
            decode: decode.node.id.clone(),
            sources: sources.clone(),
            new_tokens: *new_tokens,
            decode_blocks: decode.blocks,
            prediction,
            tbt: decode.tbt,
            interference_charge,
            gap_charge,
            score: prediction.total + Millis(interference_charge.0 + gap_charge.0),
            objection: self.objection(prediction.total, decode),
        }
    }

    fn objection(&self, ttft: Millis, decode: &Decoding<'_>) -> Option<Objection> {
        let above = |value: Millis, limit: Option<Millis>| limit.is_some_and(|limit| value > limit);
        if decode.blocks > decode.node.pressure.available_blocks {
            Some(Objection::ShortOfBlocks)
        } else if above(ttft, self.problem.slo.ttft) {
            Some(Objection::MissesTtft)
        } else if above(decode.tbt, self.problem.slo.tbt) {
            Some(Objection::MissesTbt)
        } else {
            None
        }
    }

    /// A prompt that has to wait for `queue` gets its prefix meanwhile.
    fn prefix(&self, engine: &NodeView, queue: Millis) -> Prefix {
        let own = self.held(&engine.id);
        // An engine asks its own disk before it asks a peer.
        let promote = self.promotion(engine, 0);
        let without = self.prefix_of(engine, own, Arc::default(), unhidden(queue, promote, Millis(0.0)));
        if self.prefixes == Prefixes::Own {
            return without;
        }
        let sources = self.sources(engine, own);
        let Some(best) = sources.first().map(|best| best.blocks) else {
            return without;
        };
        let source = self.nodes.get(&sources[0].node).copied();
        let fetch = source.map_or(Millis(0.0), |source| {
            let inbound = self.problem.costs.inbound(&engine.id);
            transfer(source, engine, inbound, self.bytes(best - own))
        });
        let fetch = fetch + Millis(self.problem.costs.priors().fetch_fixed_ms);
        let promote = promote + source.map_or(Millis(0.0), |source| self.promotion(source, own));
        let with = self.prefix_of(engine, best, sources, unhidden(queue, promote, fetch));
        let fetches = match self.prefixes {
            Prefixes::Own => false,
            Prefixes::Longest => true,
            Prefixes::Quickest => with.total() < without.total(),
            Prefixes::Balanced(threshold) => best as f64 > threshold * own as f64,
        };
        if fetches { with } else { without }
    }

    fn prefix_of(
        &self,
        engine: &NodeView,
        blocks: usize,
        sources: Arc<[Source]>,
        (promote, fetch): (Millis, Millis),
    ) -> Prefix {
        let problem = self.problem;
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
    fn promotion(&self, holder: &NodeView, known: usize) -> Millis {
        let found = self.matches.get(&holder.id);
        let blocks = found.map_or(0, |found| found.blocks.saturating_sub(found.in_memory.max(known)));
        holder.rates.promote(self.bytes(blocks))
    }

    /// Peers that hold more of the prefix than `engine` does, best first.
    fn sources(&self, engine: &NodeView, own: usize) -> Arc<[Source]> {
        let longer = self.readable.iter().take_while(|found| found.blocks > own);
        longer
            .filter(|found| *found.node != engine.id)
            .take(SOURCES_MAX)
            .map(|found| Source {
                node: found.node.clone(),
                blocks: found.blocks,
            })
            .collect()
    }

    fn held(&self, node: &NodeId) -> usize {
        self.matches.get(node).map_or(0, |found| found.blocks)
    }

    fn bytes(&self, blocks: usize) -> u64 {
        blocks as u64 * self.problem.shape.block_tokens * self.problem.shape.token_bytes
    }

    /// The part of the handoff that computing does not hide. Layers are pushed as they are computed, so at the least the
    /// last one is waited for; where the wire is slower than the engine, the difference is.
    fn unhidden_handoff(&self, engine: &Prefilling<'_>, decode: &Decoding<'_>) -> Millis {
        let moving = transfer(engine.node, decode.node, decode.inbound, decode.handoff_bytes).0;
        let layers = self.problem.shape.layers.max(1) as f64;
        let exposed = (moving - engine.prefix.compute.0).max(moving / layers);
        Millis(exposed) + self.handoff_fixed
    }
}

/// What is left of promoting, and then fetching, a prefix after `queue`.
fn unhidden(queue: Millis, promote: Millis, fetch: Millis) -> (Millis, Millis) {
    let promoted = (promote.0 - queue.0).max(0.0);
    let both = (promote.0 + fetch.0 - queue.0).max(0.0);
    (Millis(promoted), Millis(both - promoted))
}

/// A transfer is as fast as the slower of its ends, until their link is known.
fn transfer(from: &NodeView, to: &NodeView, inbound: Option<&Inbound>, bytes: u64) -> Millis {
    let ends = from.rates.transfer(&to.rates, bytes);
    inbound.map_or(ends, |links| links.transfer(&from.id, bytes, ends))
}
