//! The requests of a scenario: a trace, or a synthetic workload of a seed.

use std::time::Duration;

use kv_store::replay::workloads::{self, Random};
use serde::{Deserialize, Serialize};

use crate::trace::{self, Request, TRACE_BLOCK_TOKENS};

/// Most tokens of a synthetic answer.
const OUTPUT_TOKENS_MAX: f64 = 4096.0;

/// Where requests come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Workload {
    /// A trace file. Without one, requests are made up.
    pub trace: Option<String>,
    /// What is made up.
    pub synthetic: Synthetic,
    /// Most requests; of a trace the first ones.
    pub requests: usize,
    /// Factor on the rate of a trace: 2 sends it in half of its time.
    pub speed: f64,
    /// Tokens per block.
    pub block_tokens: u64,
    /// Where it is set, every answer has so many tokens.
    pub output_tokens: Option<u64>,
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            trace: None,
            synthetic: Synthetic::default(),
            requests: 20_000,
            speed: 1.0,
            block_tokens: TRACE_BLOCK_TOKENS,
            output_tokens: None,
        }
    }
}

/// A workload that is a function of the seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Synthetic {
    /// What prompts have in common.
    pub kind: Kind,
    /// Requests per second, on average.
    pub rate_per_s: f64,
    /// Makes arrivals bursty.
    pub burst: Option<Burst>,
    /// Mean tokens of an answer; exponential.
    pub output_tokens_mean: f64,
    /// Blocks of the one prefix of [`Kind::HotPrefix`].
    pub prefix_blocks: u64,
}

impl Default for Synthetic {
    fn default() -> Self {
        Self {
            kind: Kind::Conversations,
            rate_per_s: 3.0,
            burst: None,
            // The conversation trace's.
            output_tokens_mean: 343.0,
            prefix_blocks: 16,
        }
    }
}

/// What prompts have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Sessions of several turns behind one system prompt.
    Conversations,
    /// Loops of tool calls: a long prompt that returns every few seconds, somewhat longer.
    Agents,
    /// Questions about documents of different popularity.
    Documents,
    /// Shared system prompts, among documents that come once.
    Scans,
    /// Agents, then conversations, then documents.
    Phases,
    /// One long prefix that all prompts begin with, and a short rest.
    HotPrefix,
}

/// A part of every period in which the rate is higher.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Burst {
    /// Seconds from one burst to the next one.
    pub period_s: f64,
    /// Part of the period that is a burst, between 0 and 1.
    pub share: f64,
    /// Rate of a burst, as a multiple of the rate between bursts; at least 1.
    pub factor: f64,
}

/// A setting of a workload that makes no sense.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{name} is {value}, but must be {wanted}")]
pub struct WorkloadError {
    name: &'static str,
    value: f64,
    wanted: &'static str,
}

impl Workload {
    /// Checks the numbers.
    ///
    /// # Errors
    ///
    /// The first one that makes no sense.
    pub fn validate(&self) -> Result<(), WorkloadError> {
        let refuse = |name, value, wanted| Err(WorkloadError { name, value, wanted });
        let positive = [
            ("workload.speed", self.speed),
            ("workload.requests", self.requests as f64),
            ("workload.synthetic.rate_per_s", self.synthetic.rate_per_s),
            (
                "workload.synthetic.output_tokens_mean",
                self.synthetic.output_tokens_mean,
            ),
        ];
        for (name, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                return refuse(name, value, "a positive number");
            }
        }
        let tokens = self.block_tokens;
        if !(tokens.is_power_of_two() && (8..=1024).contains(&tokens)) {
            return refuse(
                "workload.block_tokens",
                tokens as f64,
                "a power of two from 8 to 1024",
            );
        }
        if let Some(burst) = self.synthetic.burst {
            if !(burst.period_s.is_finite() && burst.period_s > 0.0) {
                let name = "workload.synthetic.burst.period_s";
                return refuse(name, burst.period_s, "a positive number");
            }
            if !(burst.share > 0.0 && burst.share < 1.0) {
                let name = "workload.synthetic.burst.share";
                return refuse(name, burst.share, "between 0 and 1");
            }
            if !(burst.factor.is_finite() && burst.factor >= 1.0) {
                let name = "workload.synthetic.burst.factor";
                return refuse(name, burst.factor, "at least 1");
            }
        }
        Ok(())
    }

    /// The requests, in the order of their coming: those of the trace whose requests are given, or made up from `seed`.
    pub fn requests(&self, trace: Option<&[Request]>, seed: u64) -> Vec<Request> {
        let mut requests = match trace {
            Some(trace) => trace[..trace.len().min(self.requests)].to_vec(),
            None => self.synthetic.requests(seed, self.requests, self.block_tokens),
        };
        // Traces are sorted but for a few lines.
        requests.sort_by_key(|request| request.at);
        for request in &mut requests {
            request.at = request.at.div_f64(self.speed);
            request.output_tokens = self.output_tokens.unwrap_or(request.output_tokens).max(1);
        }
        requests
    }
}

impl Synthetic {
    fn requests(&self, seed: u64, count: usize, block_tokens: u64) -> Vec<Request> {
        let mut random = Random::new(seed);
        let mut prompts: Vec<(f64, Vec<u64>)> = match self.kind.replayed() {
            Some(workload) => {
                // The middle: sessions begin before it and end after it, so that its rate is even.
                // Phases are to be uneven.
                let edges = if self.kind == Kind::Phases { 0 } else { count };
                let requests = workload.requests(seed, count + 2 * edges);
                let middle = requests.into_iter().skip(edges).take(count);
                middle
                    .map(|request| (request.at_ms as f64 / 1e3, request.blocks))
                    .collect()
            }
            None => self.hot_prefix(&mut random, count),
        };
        // Sessions keep their pauses relative to one another, and the whole gets its rate.
        let at = |prompt: Option<&(f64, Vec<u64>)>| prompt.map_or(0.0, |(at, _)| *at);
        let (first, last) = (at(prompts.first()), at(prompts.last()));
        let scale = prompts.len() as f64 / self.rate_per_s / (last - first).max(f64::MIN_POSITIVE);
        for (at, _) in &mut prompts {
            *at = (*at - first) * scale;
            if let Some(burst) = self.burst {
                *at = burst.warp(*at);
            }
        }
        let request = |(at, blocks): (f64, Vec<u64>)| {
            let rest = random.below(block_tokens);
            let output = random.exponential(self.output_tokens_mean).min(OUTPUT_TOKENS_MAX);
            let chain: Vec<_> = blocks.into_iter().map(trace::hash).collect();
            Request {
                at: Duration::from_secs_f64(at),
                key: chain.first().copied().unwrap_or_default(),
                prompt_tokens: chain.len() as u64 * block_tokens + rest,
                chain,
                output_tokens: 1 + output as u64,
            }
        };
        prompts.into_iter().map(request).collect()
    }

    fn hot_prefix(&self, random: &mut Random, count: usize) -> Vec<(f64, Vec<u64>)> {
        let (mut at, mut next) = (0.0, self.prefix_blocks);
        let mut prompt = || {
            at += random.exponential(1.0);
            let rest = 1 + random.below(4);
            let mut blocks: Vec<u64> = (0..self.prefix_blocks).collect();
            blocks.extend(next..next + rest);
            next += rest;
            (at, blocks)
        };
        (0..count).map(|_| prompt()).collect()
    }
}

impl Kind {
    fn replayed(self) -> Option<workloads::Workload> {
        match self {
            Self::Conversations => Some(workloads::Workload::Conversations),
            Self::Agents => Some(workloads::Workload::Agents),
            Self::Documents => Some(workloads::Workload::Documents),
            Self::Scans => Some(workloads::Workload::Scans),
            Self::Phases => Some(workloads::Workload::Phases),
            Self::HotPrefix => None,
        }
    }
}

impl Burst {
    /// Moves an arrival of a process of one rate to where the bursty one of the same mean rate has it.
    fn warp(&self, at: f64) -> f64 {
        let Self {
            period_s,
            share,
            factor,
        } = *self;
        let (period, within) = ((at / period_s).floor(), (at / period_s).fract());
        // The part of a period's arrivals that come in its burst.
        let burst = factor * share / (factor * share + 1.0 - share);
        let place = if within < burst {
            within / burst * share
        } else {
            share + (within - burst) / (1.0 - burst) * (1.0 - share)
        };
        (period + place) * period_s
    }
}

#[cfg(test)]
mod tests;
