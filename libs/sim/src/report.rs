//! What came of a simulation, in the figures that people compare.

use serde::Serialize;
use types::Role;

use crate::scenario::Scenario;
use crate::simulation::{NodeTotals, Outcome, Outcomes, Sample, Served};
use crate::trace::Request;

/// The figures of one simulation. All are functions of scenario and workload: equal inputs give equal bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The scenario's name.
    pub name: String,
    /// The routers' policy.
    pub policy: String,
    /// The seed.
    pub seed: u64,
    /// Nodes that prefill and nodes that decode.
    pub prefill_nodes: usize,
    /// See there.
    pub decode_nodes: usize,
    /// Requests that came.
    pub requests: usize,
    /// Requests that were served to their ends.
    pub served: usize,
    /// Requests that were turned away.
    pub rejected: usize,
    /// Requests that were taken and did not end well.
    pub failed: usize,
    /// Seconds from the first to the last arrival.
    pub arrivals_s: f64,
    /// Seconds until the last request ended.
    pub duration_s: f64,
    /// Milliseconds to the first token, of the served ones.
    pub ttft_ms: Summary,
    /// The same as its percentiles from 1 to 100.
    pub ttft_percentiles_ms: Vec<f64>,
    /// Milliseconds between tokens, of all gaps.
    pub tbt_ms: Summary,
    /// Mean of each request's longest tenth of gaps, in milliseconds.
    pub tbt_tail_ms: Summary,
    /// Part of the served prompt tokens that came from a cache.
    pub hit_ratio: f64,
    /// Part of the served prompt tokens that came from another node's cache.
    pub fetched_ratio: f64,
    /// Mean milliseconds that a prompt was computed.
    pub compute_ms_mean: f64,
    /// Mean distance of the predicted time to first token from the real one, in milliseconds.
    pub prediction_error_ms: f64,
    /// Requests that met both limits.
    pub met: usize,
    /// They as a part of all that came.
    pub attainment: f64,
    /// Requests per second that met both limits.
    pub goodput_per_s: f64,
    /// The same per node.
    pub goodput_per_node_per_s: f64,
    /// Most computing of a prefill node, as a multiple of their mean.
    pub prefill_balance: f64,
    /// Most tokens of a decode node, as a multiple of their mean.
    pub decode_balance: f64,
    /// Part of the arrivals' time that prefill nodes computed.
    pub prefill_utilisation: f64,
    /// Decode load while requests came: the step as a part of the limit on gaps.
    pub decode_load: Load,
    /// One per node.
    pub nodes: Vec<NodeReport>,
    /// One per second.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<Sample>,
}

/// A distribution; all 0 of nothing. Percentiles are values that occurred (nearest rank).
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// The mean.
    pub mean: f64,
    /// The median.
    pub p50: f64,
    /// 90 of 100 are no larger.
    pub p90: f64,
    /// 95 of 100 are no larger.
    pub p95: f64,
    /// 99 of 100 are no larger.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

/// How a load was over time.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub struct Load {
    /// Its mean.
    pub mean: f64,
    /// Its standard deviation.
    pub deviation: f64,
}

/// What a node did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NodeReport {
    /// Its name.
    pub node: String,
    /// Prompts that it computed.
    pub prefills: usize,
    /// Seconds of computing them.
    pub prefill_s: f64,
    /// Tokens that it decoded.
    pub decoded_tokens: u64,
}

impl Report {
    /// The figures of `outcomes`, which are those of `requests`.
    pub fn of(scenario: &Scenario, requests: &[Request], outcomes: Outcomes) -> Self {
        let served: Vec<(&Request, &Served)> = requests
            .iter()
            .zip(&outcomes.requests)
            .filter_map(|(request, outcome)| match outcome {
                Outcome::Served(served) => Some((request, served)),
                Outcome::Rejected | Outcome::Failed => None,
            })
            .collect();
        let count = |wanted: &Outcome| outcomes.requests.iter().filter(|one| *one == wanted).count();
        let (rejected, failed) = (count(&Outcome::Rejected), count(&Outcome::Failed));
        let each = |of: fn(&Served) -> f64| served.iter().map(move |(_, served)| of(served));
        let prompt_tokens: u64 = served.iter().map(|(request, _)| request.prompt_tokens).sum();
        let ratio = |tokens: u64| tokens as f64 / prompt_tokens.max(1) as f64;
        let limits = &scenario.slo;
        let met = served
            .iter()
            .filter(|(_, one)| one.ttft_ms <= limits.ttft_ms && one.tbt_tail_ms <= limits.tbt_ms)
            .count();
        let arrivals_s = requests.last().map_or(0.0, |last| last.at.as_secs_f64());
        let goodput_per_s = met as f64 / arrivals_s.max(f64::MIN_POSITIVE);
        let nodes = &outcomes.nodes;
        let of_role = |role: Role| nodes.iter().filter(move |node| node.role == role);
        let prefill_ms: Vec<f64> = of_role(Role::Prefill).map(|node| node.prefill_ms).collect();
        let decoded: Vec<f64> = of_role(Role::Decode)
            .map(|node| node.decoded_tokens as f64)
            .collect();
        let shape = &scenario.cluster;
        Self {
            name: scenario.name.clone(),
            policy: scenario.router.policy.build().name().to_owned(),
            seed: scenario.seed,
            prefill_nodes: shape.prefill_nodes,
            decode_nodes: shape.decode_nodes,
            requests: requests.len(),
            served: served.len(),
            rejected,
            failed,
            arrivals_s,
            duration_s: outcomes.duration_s,
            ttft_ms: Summary::of(each(|served| served.ttft_ms).collect()),
            ttft_percentiles_ms: percentiles(each(|served| served.ttft_ms).collect()),
            tbt_ms: Summary::of(outcomes.gaps_ms.iter().map(|gap| f64::from(*gap)).collect()),
            tbt_tail_ms: Summary::of(each(|served| served.tbt_tail_ms).collect()),
            hit_ratio: ratio(served.iter().map(|(_, served)| served.cached_tokens).sum()),
            fetched_ratio: ratio(served.iter().map(|(_, served)| served.fetched_tokens).sum()),
            compute_ms_mean: mean(each(|served| served.compute_ms)),
            prediction_error_ms: mean(each(|served| (served.ttft_ms - served.ttft_predicted_ms).abs())),
            met,
            attainment: met as f64 / requests.len().max(1) as f64,
            goodput_per_s,
            goodput_per_node_per_s: goodput_per_s / (shape.prefill_nodes + shape.decode_nodes) as f64,
            prefill_balance: balance(&prefill_ms),
            decode_balance: balance(&decoded),
            prefill_utilisation: mean(prefill_ms.iter().copied()) / 1e3 / arrivals_s.max(f64::MIN_POSITIVE),
            decode_load: Load::of(&outcomes.samples, arrivals_s),
            nodes: nodes.iter().map(NodeReport::of).collect(),
            samples: outcomes.samples,
        }
    }
}

impl Summary {
    /// Of these values, in any order.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        let Some(max) = values.last().copied() else {
            return Self::default();
        };
        let rank = |percent| nearest_rank(&values, percent);
        Self {
            mean: mean(values.iter().copied()),
            p50: rank(50),
            p90: rank(90),
            p95: rank(95),
            p99: rank(99),
            max,
        }
    }
}

impl Load {
    fn of(samples: &[Sample], until_s: f64) -> Self {
        // The first tenth fills the cluster.
        let while_coming = |sample: &&Sample| (until_s * 0.1..=until_s).contains(&sample.at_s);
        let loads = || {
            samples
                .iter()
                .filter(while_coming)
                .map(|sample| sample.decode_load)
        };
        let mean_load = mean(loads());
        Self {
            mean: mean_load,
            deviation: mean(loads().map(|load| (load - mean_load).powi(2))).sqrt(),
        }
    }
}

impl NodeReport {
    fn of(node: &NodeTotals) -> Self {
        Self {
            node: node.id.to_string(),
            prefills: node.prefills,
            prefill_s: node.prefill_ms / 1e3,
            decoded_tokens: node.decoded_tokens,
        }
    }
}

/// Percentiles from 1 to 100; none of nothing.
pub fn percentiles(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_unstable_by(f64::total_cmp);
    if values.is_empty() {
        return values;
    }
    (1..=100).map(|percent| nearest_rank(&values, percent)).collect()
}

/// Of sorted values, of which there is one at least.
fn nearest_rank(sorted: &[f64], percent: usize) -> f64 {
    sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1]
}

/// The part of a request's gaps, longest first, that its limit is held against.
const TAIL_SHARE: f64 = 0.1;

/// The mean of a request's longest tenth of gaps, which is what a limit on gaps is held against; 0 of none.
pub fn tail_mean(gaps_ms: &mut [f32]) -> f64 {
    if gaps_ms.is_empty() {
        return 0.0;
    }
    let count = ((gaps_ms.len() as f64 * TAIL_SHARE).ceil() as usize).max(1);
    gaps_ms.sort_unstable_by(|a, b| b.total_cmp(a));
    mean(gaps_ms[..count].iter().map(|gap| f64::from(*gap)))
}

/// 0 of nothing.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0u64), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

/// The largest as a multiple of the mean; 1 of nothing.
fn balance(values: &[f64]) -> f64 {
    let mean = mean(values.iter().copied());
    if mean == 0.0 {
        return 1.0;
    }
    values.iter().copied().fold(0.0, f64::max) / mean
}

#[cfg(test)]
mod tests;
