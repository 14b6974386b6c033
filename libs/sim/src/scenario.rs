//! What is simulated: a cluster, a workload, limits and failures, as a TOML file.
//!
//! Everything has a default but what makes one scenario another. `[router]` takes the settings of a real router.

use kv_store::Eviction;
use serde::{Deserialize, Serialize};

use crate::profile::Profile;
use crate::workload::{Workload, WorkloadError};

/// Most nodes of a simulated cluster.
pub const NODES_MAX: usize = 1024;

/// A simulation's input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scenario {
    /// For people.
    pub name: String,
    /// What everything random comes from.
    pub seed: u64,
    /// Name of a built-in profile, or a file.
    pub profile: String,
    /// The nodes.
    pub cluster: Shape,
    /// The routers' settings.
    pub router: router::Config,
    /// The requests.
    pub workload: Workload,
    /// The limits.
    pub slo: Limits,
    /// Nodes that die and return.
    pub failures: Vec<Failure>,
}

/// The nodes of a cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Shape {
    /// Routers. Each one gets every n-th request by chance, and knows the others' only by the nodes' reports.
    pub routers: usize,
    /// Nodes that prefill.
    pub prefill_nodes: usize,
    /// Nodes that decode; at least 1.
    pub decode_nodes: usize,
    /// Tokens that the pool of a prefill node holds.
    pub prefill_pool_tokens: u64,
    /// Tokens that the pool of a decode node holds; what fits beside the weights if it is not set.
    pub decode_pool_tokens: Option<u64>,
    /// What full pools drop.
    pub eviction: Eviction,
    /// How often nodes report their load; as the routers ask for it if it is not set.
    pub report_interval_ms: Option<f64>,
    /// How long a change of a pool takes to reach the routers.
    pub log_delay_ms: f64,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            routers: 1,
            prefill_nodes: 8,
            decode_nodes: 8,
            // 1 TB of memory for Llama-3-70B, as the paper reckons.
            prefill_pool_tokens: 3_000_000,
            decode_pool_tokens: None,
            eviction: Eviction::default(),
            report_interval_ms: None,
            log_delay_ms: 1.0,
        }
    }
}

/// What is asked of latency.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Milliseconds to the first token.
    pub ttft_ms: f64,
    /// Milliseconds of a request's gaps, as the mean of its longest tenth.
    pub tbt_ms: f64,
    /// Whether requests ask for it, so that routers may turn them away. If not, it is only counted how many met it.
    pub asked: bool,
    /// Whether decode nodes turn away what would break the limit on gaps once it is prefilled: Mooncake's stage by stage.
    pub at_decode: bool,
}

impl Default for Limits {
    fn default() -> Self {
        // The paper's, with the middle one of its three limits on gaps.
        Self {
            ttft_ms: 30_000.0,
            tbt_ms: 200.0,
            asked: false,
            at_decode: false,
        }
    }
}

/// A node that dies and returns with an empty pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// `prefill-0`, `decode-3`.
    pub node: String,
    /// When it dies, in seconds from the start.
    pub at_s: f64,
    /// How long it is gone.
    pub for_s: f64,
}

/// Why a scenario cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// Not TOML, or a key or value that is unknown.
    #[error("the scenario cannot be read: {0}")]
    Syntax(#[from] toml::de::Error),
    /// Too few nodes, or too many.
    #[error("{name} is {value}, but must be from {least} to {NODES_MAX}")]
    Count {
        /// Which nodes.
        name: &'static str,
        /// How many.
        value: usize,
        /// At least so many.
        least: usize,
    },
    /// A number that makes no sense.
    #[error("{name} is {value}, but must be a positive number")]
    NotPositive {
        /// Which one.
        name: &'static str,
        /// As given.
        value: f64,
    },
    /// A pool that holds less than the longest sequence could never serve it.
    #[error("{name} is {tokens}, but the model's context has {context_tokens_max}")]
    PoolTooSmall {
        /// Which pool.
        name: &'static str,
        /// Its size.
        tokens: u64,
        /// The model's context.
        context_tokens_max: u64,
    },
    /// A failure of a node that is not there.
    #[error("failures name {0}, which is no node of the cluster")]
    UnknownNode(String),
    /// A setting of the workload.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// A setting of the routers.
    #[error("router.{0}")]
    Router(#[from] router::ConfigError),
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            name: String::new(),
            seed: 1,
            profile: "llama-3-70b-8xa800".to_owned(),
            cluster: Shape::default(),
            router: router::Config::default(),
            workload: Workload::default(),
            slo: Limits::default(),
            failures: Vec::new(),
        }
    }
}

impl Scenario {
    /// Reads a scenario.
    ///
    /// # Errors
    ///
    /// It is none. Its numbers are checked by [`Scenario::validate`].
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        Ok(toml::from_str(text)?)
    }

    /// Checks that it can be run on nodes of this profile.
    ///
    /// # Errors
    ///
    /// The first thing that makes no sense.
    pub fn validate(&self, profile: &Profile) -> Result<(), ScenarioError> {
        let shape = &self.cluster;
        for (name, value, least) in [
            ("cluster.routers", shape.routers, 1),
            ("cluster.prefill_nodes", shape.prefill_nodes, 0),
            ("cluster.decode_nodes", shape.decode_nodes, 1),
        ] {
            if !(least..=NODES_MAX).contains(&value) {
                return Err(ScenarioError::Count { name, value, least });
            }
        }
        let numbers = [
            (
                "cluster.report_interval_ms",
                shape.report_interval_ms.unwrap_or(1.0),
            ),
            ("slo.ttft_ms", self.slo.ttft_ms),
            ("slo.tbt_ms", self.slo.tbt_ms),
        ];
        let failures = self
            .failures
            .iter()
            .map(|failure| ("failures.for_s", failure.for_s));
        for (name, value) in numbers.into_iter().chain(failures) {
            if !(value.is_finite() && value > 0.0) {
                return Err(ScenarioError::NotPositive { name, value });
            }
        }
        let more = self
            .failures
            .iter()
            .map(|failure| ("failures.at_s", failure.at_s));
        for (name, value) in [("cluster.log_delay_ms", shape.log_delay_ms)]
            .into_iter()
            .chain(more)
        {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ScenarioError::NotPositive { name, value });
            }
        }
        let context_tokens_max = profile.model.context_tokens_max;
        for (name, tokens) in [
            ("cluster.prefill_pool_tokens", shape.prefill_pool_tokens),
            ("cluster.decode_pool_tokens", self.decode_pool_tokens(profile)),
        ] {
            if tokens < context_tokens_max {
                return Err(ScenarioError::PoolTooSmall {
                    name,
                    tokens,
                    context_tokens_max,
                });
            }
        }
        if let Some(unknown) = self.failures.iter().find(|failure| !self.has_node(&failure.node)) {
            return Err(ScenarioError::UnknownNode(unknown.node.clone()));
        }
        self.workload.validate()?;
        self.router.validate()?;
        Ok(())
    }

    /// Tokens of a decode node's pool.
    pub fn decode_pool_tokens(&self, profile: &Profile) -> u64 {
        let set = self.cluster.decode_pool_tokens;
        set.unwrap_or_else(|| profile.memory_tokens())
    }

    fn has_node(&self, name: &str) -> bool {
        let shape = &self.cluster;
        let counts = [("prefill-", shape.prefill_nodes), ("decode-", shape.decode_nodes)];
        counts.iter().any(|(role, count)| {
            let index = name.strip_prefix(role).and_then(|index| index.parse().ok());
            index.is_some_and(|index: usize| index < *count)
        })
    }
}

#[cfg(test)]
mod tests;
