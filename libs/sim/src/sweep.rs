//! Which cluster serves most per node: the rate that each one sustains, found by bisection.

use serde::Serialize;

use crate::profile::Profile;
use crate::report::Report;
use crate::scenario::Scenario;
use crate::simulation;
use crate::trace::Request;

/// Slowest and fastest speed that is tried, as a multiple of the scenario's.
const SPEEDS: (f64, f64) = (1.0 / 16.0, 16.0);

/// Halvings of the range of speeds, on a logarithmic scale: the result is within 3 % of the most that is sustained.
const HALVINGS: u32 = 8;

/// What is searched.
#[derive(Debug, Clone, PartialEq)]
pub struct Sweep {
    /// Nodes of every cluster; each one has at least one of either role.
    pub nodes: usize,
    /// Tokens of prefill nodes' pools.
    pub pool_tokens: Vec<u64>,
    /// Least part of the requests that must meet both limits.
    pub attainment: f64,
}

/// A cluster of the sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Point {
    /// Nodes that prefill.
    pub prefill_nodes: usize,
    /// Nodes that decode.
    pub decode_nodes: usize,
    /// Tokens of prefill nodes' pools.
    pub pool_tokens: u64,
}

/// What a cluster sustains.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sustained {
    /// The cluster.
    pub point: Point,
    /// The fastest speed at which enough requests met both limits; `None` if they did at none that was tried.
    pub speed: Option<f64>,
    /// The figures at this speed, or at the slowest one.
    pub report: Report,
}

impl Sweep {
    /// Every cluster.
    pub fn points(&self) -> Vec<Point> {
        let sizes = self.pool_tokens.iter();
        let point = |pool_tokens: u64, prefill_nodes: usize| Point {
            prefill_nodes,
            decode_nodes: self.nodes - prefill_nodes,
            pool_tokens,
        };
        sizes
            .flat_map(|tokens| (1..self.nodes).map(move |prefill| point(*tokens, prefill)))
            .collect()
    }
}

impl Point {
    /// The scenario with this cluster.
    pub fn applied_to(&self, scenario: &Scenario) -> Scenario {
        let mut scenario = scenario.clone();
        scenario.cluster.prefill_nodes = self.prefill_nodes;
        scenario.cluster.decode_nodes = self.decode_nodes;
        scenario.cluster.prefill_pool_tokens = self.pool_tokens;
        scenario
    }
}

/// Runs a scenario on the requests of `trace`, or its own.
pub fn report(scenario: &Scenario, profile: &Profile, trace: Option<&[Request]>) -> Report {
    let requests = scenario.workload.requests(trace, scenario.seed);
    let outcomes = simulation::run(scenario, profile, &requests);
    Report::of(scenario, &requests, outcomes)
}

/// The fastest speed at which at least `attainment` of the requests meet both limits.
pub fn sustained(
    scenario: &Scenario,
    profile: &Profile,
    trace: Option<&[Request]>,
    point: Point,
    attainment: f64,
) -> Sustained {
    let at = |factor: f64| {
        let mut faster = point.applied_to(scenario);
        faster.workload.speed *= factor;
        let mut report = report(&faster, profile, trace);
        report.samples.clear();
        (faster.workload.speed, report)
    };
    let (mut slow, mut fast) = (SPEEDS.0.log2(), SPEEDS.1.log2());
    let mut best = None;
    for _ in 0..HALVINGS {
        let middle = (slow + fast) / 2.0;
        let (speed, report) = at(middle.exp2());
        if report.attainment >= attainment {
            best = Some((speed, report));
            slow = middle;
        } else {
            fast = middle;
        }
    }
    match best {
        Some((speed, report)) => Sustained {
            point,
            speed: Some(speed),
            report,
        },
        None => Sustained {
            point,
            speed: None,
            report: at(SPEEDS.0).1,
        },
    }
}

#[cfg(test)]
mod tests;
