//! How one of the candidates is picked.
//!
//! [`Perigee`] is the product; the others exist to be compared with it and to force a request onto given nodes.
//! Every policy sees the same candidates, with the same predictions, and may pick only an eligible one.

use std::collections::BTreeSet;

use types::{BlockHash, NodeId};

use crate::placement::{Candidate, Problem};

/// Picks a candidate.
pub trait Policy: Send + std::fmt::Debug {
    /// Its name on the command line and in explanations.
    fn name(&self) -> &'static str;

    /// The index of an eligible candidate, or `None` if there is none.
    fn choose(&mut self, problem: &Problem<'_>, candidates: &[Candidate]) -> Option<usize>;

    /// Whether the prefix is always taken from whoever holds most of it, rather than where that is quickest.
    fn fetches_longest(&self) -> bool {
        false
    }
}

/// The policies by name.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyName {
    /// [`Perigee`].
    #[default]
    Perigee,
    /// [`RoundRobin`].
    RoundRobin,
    /// [`Random`].
    Random,
}

impl PolicyName {
    /// The policy in its initial state.
    pub fn build(self) -> Box<dyn Policy> {
        match self {
            Self::Perigee => Box::new(Perigee),
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

    fn choose(&mut self, _: &Problem<'_>, candidates: &[Candidate]) -> Option<usize> {
        let remote = eligible(candidates).any(|(_, candidate)| candidate.prefill.is_some());
        let pool: Vec<_> = eligible(candidates)
            .filter(|(_, candidate)| candidate.prefill.is_some() == remote)
            .collect();
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

    fn fetches_longest(&self) -> bool {
        true
    }
}

fn in_turn<'a>(turn: usize, ids: impl Iterator<Item = Option<&'a NodeId>>) -> Option<Option<&'a NodeId>> {
    let distinct: BTreeSet<Option<&NodeId>> = ids.collect();
    let nth = turn.checked_rem(distinct.len())?;
    distinct.into_iter().nth(nth)
}

/// Any eligible candidate, by [`Problem::draw`].
#[derive(Debug, Default, Clone, Copy)]
pub struct Random;

impl Policy for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn choose(&mut self, problem: &Problem<'_>, candidates: &[Candidate]) -> Option<usize> {
        let count = eligible(candidates).count() as u64;
        let nth = problem.draw.checked_rem(count)?;
        eligible(candidates).nth(nth as usize).map(|(index, _)| index)
    }

    fn fetches_longest(&self) -> bool {
        true
    }
}

fn eligible(candidates: &[Candidate]) -> impl Iterator<Item = (usize, &Candidate)> {
    candidates
        .iter()
        .enumerate()
        .filter(|(_, candidate)| candidate.eligible())
}

/// The rendezvous weight of a candidate for a prefix. Every router must give the same, so the function is spelt out:
/// FNV-1a over key and names, finished as in SplitMix64 so that near names are far apart.
fn weight(key: BlockHash, candidate: &Candidate) -> u64 {
    let prefill = candidate.prefill.as_ref().map_or("", NodeId::as_str);
    let bytes = key
        .0
        .iter()
        .chain(prefill.as_bytes())
        .chain(&[0])
        .chain(candidate.decode.as_str().as_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}
