//! How one of the candidates is picked.
//!
//! [`Perigee`] is the product; the others exist to be compared with it and to force a request onto given nodes: those of the
//! Mooncake paper (FAST'25, section 6.2 and Algorithm 1), Dynamo's, and round robin.
//! Every policy sees the same candidates, with the same predictions, and may pick only an eligible one. All but [`Perigee`] choose
//! the prefill node and the decode node apart from each other, and let a decode node prefill only where no prefill node can.
//!
//! Elsewhere: the predictions (`placement.rs`), the limits that a choice must keep (`admission.rs`).

use std::collections::BTreeSet;

use types::{BlockHash, NodeId};

use crate::placement::{Candidate, NodeView, Problem};

/// [`KvCentric`] fetches a prefix that is more than so many times as long as the node's own. The paper tunes it by hand and does
/// not say to what.
const BALANCING_THRESHOLD: f64 = 1.3;
/// What a block on disk is worth to [`Dynamo`], where one in memory is worth a block.
const DYNAMO_DISK_CREDIT: f64 = 0.25;

/// Picks a candidate.
pub trait Policy: Send + std::fmt::Debug {
    /// Its name on the command line and in explanations.
    fn name(&self) -> &'static str;

    /// The index of an eligible candidate, or `None` if there is none.
    fn choose(&mut self, problem: &Problem<'_>, candidates: &[Candidate]) -> Option<usize>;

    /// The same policy in the same state: what a question is put to that must not advance this one.
    fn copy(&self) -> Box<dyn Policy>;

    /// Where the prefix of its candidates comes from.
    fn prefixes(&self) -> Prefixes {
        Prefixes::Own
    }
}

/// Where a candidate gets the prefix that it does not compute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Prefixes {
    /// Only what the node holds itself.
    Own,
    /// From whoever holds most of it.
    Longest,
    /// From whoever holds most of it, if that is predicted to be quicker than to compute it.
    Quickest,
    /// From whoever holds most of it, if that is more than so many times what the node holds itself.
    Balanced(f64),
}

/// The policies by name.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyName {
    /// [`Perigee`].
    #[default]
    Perigee,
    /// [`KvCentric`].
    KvCentric,
    /// [`LocalCacheAware`].
    LocalCacheAware,
    /// [`LeastLoaded`].
    LeastLoaded,
    /// [`Dynamo`].
    Dynamo,
    /// [`RoundRobin`].
    RoundRobin,
    /// [`Random`].
    Random,
}

impl PolicyName {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Perigee,
        Self::KvCentric,
        Self::LocalCacheAware,
        Self::LeastLoaded,
        Self::Dynamo,
        Self::RoundRobin,
        Self::Random,
    ];

    /// The policy in its initial state.
    pub fn build(self) -> Box<dyn Policy> {
        match self {
            Self::Perigee => Box::new(Perigee),
            Self::KvCentric => Box::new(KvCentric),
            Self::LocalCacheAware => Box::new(LocalCacheAware),
            Self::LeastLoaded => Box::new(LeastLoaded),
            Self::Dynamo => Box::new(Dynamo),
            Self::RoundRobin => Box::new(RoundRobin::default()),
            Self::Random => Box::new(Random),
        }
    }
}

/// Least score among those with the least objection; a hash of the prefix decides between scores that are as good as equal.
///
/// The hash is a rendezvous: when a node comes or goes, only the prefixes that it wins or had won move.
#[derive(Debug, Default, Clone, Copy)]
pub struct Perigee;

impl Policy for Perigee {
    fn name(&self) -> &'static str {
        "perigee"
    }

    fn copy(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }

    fn choose(&mut self, problem: &Problem<'_>, candidates: &[Candidate]) -> Option<usize> {
        let least = eligible(candidates)
            .map(|(_, candidate)| candidate.objection)
            .min()?;
        let admitted = || eligible(candidates).filter(|(_, candidate)| candidate.objection == least);
        let best = admitted()
            .map(|(_, candidate)| candidate.score.0)
            .fold(f64::INFINITY, f64::min);
        admitted()
            .filter(|(_, candidate)| candidate.score.0 <= best + problem.settings.tie.0)
            .max_by_key(|(_, candidate)| weight(problem.key, candidate))
            .map(|(index, _)| index)
    }

    fn prefixes(&self) -> Prefixes {
        Prefixes::Quickest
    }
}

/// Algorithm 1 of the Mooncake paper: the prefill node with the least predicted time to first token, where a prefix that is much
/// longer elsewhere is fetched, and so spreads; and the decode node with the least gap between tokens.
#[derive(Debug, Default, Clone, Copy)]
pub struct KvCentric;

impl Policy for KvCentric {
    fn name(&self) -> &'static str {
        "kv_centric"
    }

    fn copy(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }

    fn choose(&mut self, problem: &Problem<'_>, candidates: &[Candidate]) -> Option<usize> {
        pair(problem, candidates, time_to_prefill, gap)
    }

    fn prefixes(&self) -> Prefixes {
        Prefixes::Balanced(BALANCING_THRESHOLD)
    }
}

/// The paper's "cache-aware" scheduling: as [`KvCentric`], with what each node holds itself.
#[derive(Debug, Default, Clone, Copy)]
pub struct LocalCacheAware;

impl Policy for LocalCacheAware {
    fn name(&self) -> &'static str {
        "local_cache_aware"
    }

    fn copy(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }

    fn choose(&mut self, problem: &Problem<'_>, candidates: &[Candidate]) -> Option<usize> {
        pair(problem, candidates, time_to_prefill, gap)
    }
}

/// The paper's "load balancing" scheduling: the prefill node that will be idle first, whatever it holds.
#[derive(Debug, Default, Clone, Copy)]
pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn name(&self) -> &'static str {
        "least_loaded"
    }

    fn copy(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }

    fn choose(&mut self, problem: &Problem<'_>, candidates: &[Candidate]) -> Option<usize> {
        let queue = |_: &Problem<'_>, candidate: &Candidate| candidate.prediction.queue.0;
        pair(problem, candidates, queue, gap)
    }
}

/// NVIDIA Dynamo's default cost, for comparisons: blocks to prefill less blocks held, and for decoding, blocks in use. In blocks,
/// with its default weights and no temperature. Source: `lib/kv-router` of Dynamo 1.6, whose prefill router counts no decode
/// blocks, and whose decode router no overlap.
#[derive(Debug, Default, Clone, Copy)]
pub struct Dynamo;

impl Policy for Dynamo {
    fn name(&self) -> &'static str {
        "dynamo"
    }

    fn copy(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }

    fn choose(&mut self, problem: &Problem<'_>, candidates: &[Candidate]) -> Option<usize> {
        let view = |id: &NodeId| problem.nodes.iter().find(|node| node.id == *id);
        let prefill_blocks = |problem: &Problem<'_>, candidate: &Candidate| {
            let id = candidate.prefill.as_ref().unwrap_or(&candidate.decode);
            let queued = view(id).map_or(0, |node| node.pressure.queued_prefill_tokens);
            let blocks = (queued + problem.prompt_tokens) as f64 / problem.shape.block_tokens as f64;
            (blocks - credit(problem, id)).max(0.0)
        };
        let decode_blocks = |_: &Problem<'_>, candidate: &Candidate| {
            let available = |node: &NodeView| node.pressure.available_blocks as f64;
            -view(&candidate.decode).map_or(0.0, available)
        };
        pair(problem, candidates, prefill_blocks, decode_blocks)
    }
}

/// What the blocks that a node holds of the prompt are worth to [`Dynamo`].
fn credit(problem: &Problem<'_>, node: &NodeId) -> f64 {
    let found = problem.matches.iter().find(|found| found.node == node);
    found.map_or(0.0, |found| {
        found.in_memory as f64 + DYNAMO_DISK_CREDIT * (found.blocks - found.in_memory) as f64
    })
}

/// Until the first token is computed, but for what depends on the decode node.
fn time_to_prefill(_: &Problem<'_>, candidate: &Candidate) -> f64 {
    candidate.prediction.total.0 - candidate.prediction.handoff.0
}

/// Between tokens.
fn gap(_: &Problem<'_>, candidate: &Candidate) -> f64 {
    candidate.tbt.0
}

/// The candidate of the prefill node and the decode node that each cost least. Of equals, the prefix decides, as with
/// [`Perigee`].
fn pair(
    problem: &Problem<'_>,
    candidates: &[Candidate],
    prefill_cost: impl Fn(&Problem<'_>, &Candidate) -> f64,
    decode_cost: impl Fn(&Problem<'_>, &Candidate) -> f64,
) -> Option<usize> {
    let pool = apart(candidates);
    let least = |cost: &dyn Fn(&Candidate) -> f64, name: fn(&Candidate) -> &str| {
        let compare = |a: &&Candidate, b: &&Candidate| {
            let hash = |candidate: &&Candidate| rendezvous(problem.key, [name(candidate)]);
            cost(a).total_cmp(&cost(b)).then_with(|| hash(b).cmp(&hash(a)))
        };
        pool.iter().map(|(_, candidate)| *candidate).min_by(compare)
    };
    let prefill = least(&|candidate| prefill_cost(problem, candidate), prefill_name)?;
    let decode = least(&|candidate| decode_cost(problem, candidate), |candidate| {
        candidate.decode.as_str()
    })?;
    let (prefill, decode) = (&prefill.prefill, &decode.decode);
    pool.iter()
        .find(|(_, candidate)| candidate.prefill == *prefill && candidate.decode == *decode)
        .map(|(index, _)| *index)
}

/// The candidates whose prefill is apart from their decode; all eligible ones where there is no such candidate.
fn apart(candidates: &[Candidate]) -> Vec<(usize, &Candidate)> {
    let remote = eligible(candidates).any(|(_, candidate)| candidate.prefill.is_some());
    eligible(candidates)
        .filter(|(_, candidate)| candidate.prefill.is_some() == remote)
        .collect()
}

/// Takes prefill nodes and decode nodes in turn, by name, whatever their load. A decode node prefills by itself only where
/// there is no prefill node.
#[derive(Debug, Default, Clone, Copy)]
pub struct RoundRobin {
    turn: usize,
}

impl Policy for RoundRobin {
    fn name(&self) -> &'static str {
        "round_robin"
    }

    fn copy(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }

    fn choose(&mut self, _: &Problem<'_>, candidates: &[Candidate]) -> Option<usize> {
        let pool = apart(candidates);
        let prefill = in_turn(
            self.turn,
            pool.iter().map(|(_, candidate)| candidate.prefill.as_ref()),
        )?;
        let decode = in_turn(
            self.turn,
            pool.iter().map(|(_, candidate)| Some(&candidate.decode)),
        )?;
        self.turn = self.turn.wrapping_add(1);
        pool.iter()
            .find(|(_, candidate)| candidate.prefill.as_ref() == prefill && Some(&candidate.decode) == decode)
            .map(|(index, _)| *index)
    }

    fn prefixes(&self) -> Prefixes {
        Prefixes::Longest
    }
}

fn in_turn<'a>(turn: usize, ids: impl Iterator<Item = Option<&'a NodeId>>) -> Option<Option<&'a NodeId>> {
    let distinct: BTreeSet<Option<&NodeId>> = ids.collect();
    let nth = turn.checked_rem(distinct.len())?;
    distinct.into_iter().nth(nth)
}

/// Any pair of a prefill node and a decode node, by [`Problem::draw`].
#[derive(Debug, Default, Clone, Copy)]
pub struct Random;

impl Policy for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn copy(&self) -> Box<dyn Policy> {
        Box::new(*self)
    }

    fn choose(&mut self, problem: &Problem<'_>, candidates: &[Candidate]) -> Option<usize> {
        let pool = apart(candidates);
        let nth = problem.draw.checked_rem(pool.len() as u64)?;
        pool.get(nth as usize).map(|(index, _)| *index)
    }
}

fn eligible(candidates: &[Candidate]) -> impl Iterator<Item = (usize, &Candidate)> {
    candidates
        .iter()
        .enumerate()
        .filter(|(_, candidate)| candidate.eligible())
}

fn prefill_name(candidate: &Candidate) -> &str {
    candidate.prefill.as_ref().map_or("", NodeId::as_str)
}

/// The rendezvous weight of a candidate for a prefix.
fn weight(key: BlockHash, candidate: &Candidate) -> u64 {
    rendezvous(key, [prefill_name(candidate), candidate.decode.as_str()])
}

/// The rendezvous weight of names for a prefix. Every router must give the same, so the function is spelt out:
/// FNV-1a over key and names, finished as in SplitMix64 so that near names are far apart.
fn rendezvous<const NAMES: usize>(key: BlockHash, names: [&str; NAMES]) -> u64 {
    let names = names.iter().enumerate().flat_map(|(place, name)| {
        let separator = (place > 0).then_some(0);
        separator.into_iter().chain(name.bytes())
    });
    let bytes = key.0.into_iter().chain(names);
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}
