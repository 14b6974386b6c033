//! Schedulers of others, to compare with: those of Figure 5 of Mooncake's FAST'25 paper, and Dynamo's default cost.
//!
//! They see what our own policies see, and choose among prefill nodes only. But for Algorithm 1 none of them moves a prefix between
//! nodes.

use router::placement::{Candidate, NodeView, Problem};
use router::policy::Policy;
use serde::{Deserialize, Serialize};
use types::NodeId;

/// `kvcache_balancing_threshold` of Algorithm 1: a prefix is fetched where the best holder has so many times what the node has.
const BALANCING_THRESHOLD: f64 = 1.3;

/// A scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// Any nodes.
    Random,
    /// The prefill node with the fewest queued tokens.
    LeastLoaded,
    /// The least of queue and computation, with what each node itself has cached.
    LocalCacheAware,
    /// Algorithm 1: the same with a prefix that may be fetched from its best holder.
    KvCentric,
    /// `active prefill tokens + prompt tokens - overlap`, and the decode node with the fewest active blocks.
    Dynamo,
}

impl Reference {
    /// Whether a node that holds `own` blocks of a prompt fetches what another one has, which is `best` blocks.
    pub fn fetches(self, own: usize, best: usize) -> bool {
        match self {
            Self::KvCentric => best as f64 > BALANCING_THRESHOLD * own as f64,
            Self::Random | Self::LeastLoaded | Self::LocalCacheAware | Self::Dynamo => false,
        }
    }

    fn cost(self, problem: &Problem<'_>, candidate: &Candidate, prefill: &NodeView) -> f64 {
        let own = held(problem, &prefill.id);
        let best = problem
            .matches
            .iter()
            .map(|found| found.blocks)
            .max()
            .unwrap_or_default();
        let queue_ms = candidate.prediction.queue.0;
        let compute_ms = |blocks: usize| {
            let cached = (blocks as u64 * problem.shape.block_tokens).min(problem.prompt_tokens - 1);
            prefill.rates.compute(problem.prompt_tokens - cached, cached).0
        };
        let queued_tokens = prefill.pressure.queued_prefill_tokens as f64;
        match self {
            Self::Random => 0.0,
            Self::LeastLoaded => queued_tokens,
            Self::LocalCacheAware => queue_ms + compute_ms(own),
            Self::KvCentric if self.fetches(own, best) => {
                let bytes = (best - own) as u64 * problem.shape.block_tokens * problem.shape.token_bytes;
                queue_ms + compute_ms(best) + prefill.rates.transfer(bytes).0
            }
            Self::KvCentric => queue_ms + compute_ms(own),
            Self::Dynamo => {
                let overlap = own as f64 * problem.shape.block_tokens as f64;
                queued_tokens + problem.prompt_tokens as f64 - overlap
            }
        }
    }

    /// What the decode node is chosen by, least first.
    fn decode_cost(self, candidate: &Candidate, decode: &NodeView) -> f64 {
        match self {
            Self::Dynamo => -(decode.pressure.available_blocks as f64),
            Self::Random | Self::LeastLoaded | Self::LocalCacheAware | Self::KvCentric => candidate.tbt.0,
        }
    }
}

impl Policy for Reference {
    fn name(&self) -> &'static str {
        match self {
            Self::Random => "random (reference)",
            Self::LeastLoaded => "least_loaded (reference)",
            Self::LocalCacheAware => "local_cache_aware (reference)",
            Self::KvCentric => "kv_centric (reference)",
            Self::Dynamo => "dynamo (reference)",
        }
    }

    fn choose(&mut self, problem: &Problem<'_>, candidates: &[Candidate]) -> Option<usize> {
        let view = |id: &NodeId| problem.nodes.iter().find(|node| node.id == *id);
        let remote = candidates.iter().enumerate().filter_map(|(index, candidate)| {
            let prefill = view(candidate.prefill.as_ref()?)?;
            let decode = view(&candidate.decode)?;
            Some((index, candidate, prefill, decode))
        });
        if *self == Self::Random {
            let count = remote.clone().count() as u64;
            let nth = problem.draw.checked_rem(count)?;
            return remote.map(|(index, ..)| index).nth(nth as usize);
        }
        remote
            .map(|(index, candidate, prefill, decode)| {
                let cost = self.cost(problem, candidate, prefill);
                (cost, self.decode_cost(candidate, decode), index)
            })
            .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)))
            .map(|(_, _, index)| index)
    }

    fn fetches_longest(&self) -> bool {
        true
    }
}

fn held(problem: &Problem<'_>, node: &NodeId) -> usize {
    let found = problem.matches.iter().find(|found| found.node == *node);
    found.map_or(0, |found| found.blocks)
}

#[cfg(test)]
mod tests;
