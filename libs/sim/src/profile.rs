//! How fast a node is: hardware and model as data, with times that were measured where there are any.
//!
//! ```text
//! prefill(n | p) = a (n - p) + b (n² - p²)           n tokens of a prompt, p of them cached
//! step           = c + d sequences + e resident tokens
//! ```
//!
//! Without a calibration, `a` and `b` are the model's operations over the hardware's, and `c` and `e` the bytes that a step reads over
//! the memory's bandwidth.

use serde::{Deserialize, Serialize};
use types::{KvDtype, KvLayout};

/// Bytes of a weight and of an element of KV: bf16.
const ELEMENT_BYTES: f64 = 2.0;
/// Share of the memory beside the weights that KV may take; the rest is for activations.
const KV_MEMORY_SHARE: f64 = 0.9;
/// The unit of [`PrefillTimes`], in tokens.
const UNIT_TOKENS: f64 = 8192.0;

/// The profiles that come with the simulator.
const BUILT_IN: [(&str, &str); 3] = [
    (
        "llama-3-70b-8xa800",
        include_str!("../profiles/llama-3-70b-8xa800.toml"),
    ),
    (
        "llama-3-70b-8xa800-slow-batches",
        include_str!("../profiles/llama-3-70b-8xa800-slow-batches.toml"),
    ),
    (
        "llama-3-8b-1xa800",
        include_str!("../profiles/llama-3-8b-1xa800.toml"),
    ),
];

/// A model on the hardware of one node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// For people.
    pub name: String,
    /// What a node has.
    pub hardware: Hardware,
    /// What it serves.
    pub model: Model,
    /// Measured times, which go before computed ones.
    #[serde(default)]
    pub calibrated: Calibrated,
}

/// What a node has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    /// Accelerators that work as one.
    pub accelerators: f64,
    /// Operations per second of one.
    pub flops: f64,
    /// Memory of one.
    pub memory_bytes: f64,
    /// Bandwidth of the memory of one.
    pub memory_bytes_per_s: f64,
    /// What the node sends, and what it receives, at most.
    pub network_bytes_per_s: f64,
    /// Share of operations and bandwidth that is reached.
    pub efficiency: f64,
}

/// A model's size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Weights.
    pub parameters: f64,
    /// Transformer layers.
    pub layers: usize,
    /// Width of the stream.
    pub hidden: f64,
    /// Heads of K and V.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Longest sequence, in tokens.
    pub context_tokens_max: u64,
}

/// Measured times.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Calibrated {
    /// Of prefills.
    pub prefill: Option<PrefillTimes>,
    /// Of decode steps.
    pub decode: Option<StepTimes>,
}

/// `a` and `b`, in units of 8,192 tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefillTimes {
    /// Seconds per 8,192 tokens without context.
    pub seconds_per_8k_tokens: f64,
    /// Seconds per 8,192² of the squares' difference.
    pub seconds_per_8k_tokens_squared: f64,
}

/// `c`, `d` and `e`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepTimes {
    /// Milliseconds of an empty step.
    pub step_ms: f64,
    /// Milliseconds per sequence.
    pub step_ms_per_sequence: f64,
    /// Milliseconds per thousand tokens of all sequences.
    pub step_ms_per_kilotoken: f64,
}

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// Not TOML, or not a profile.
    #[error("the profile cannot be read: {0}")]
    Syntax(#[from] toml::de::Error),
    /// A number that makes no sense.
    #[error("{name} is {value}, but must be a positive number")]
    NotPositive {
        /// Which one.
        name: &'static str,
        /// As given.
        value: f64,
    },
    /// The weights do not fit.
    #[error("the weights take {weights:.3e} bytes, but the node has {memory:.3e}")]
    WeightsDoNotFit {
        /// Bytes of the weights.
        weights: f64,
        /// Bytes of the node's memory.
        memory: f64,
    },
}

impl Profile {
    /// The names of the profiles that come with the simulator.
    pub fn built_in_names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// The text of a profile that comes with the simulator.
    pub fn built_in(name: &str) -> Option<&'static str> {
        let found = BUILT_IN.iter().find(|(known, _)| *known == name);
        found.map(|(_, text)| *text)
    }

    /// Reads a profile.
    ///
    /// # Errors
    ///
    /// It is no profile, or its numbers make no sense.
    pub fn parse(text: &str) -> Result<Self, ProfileError> {
        let profile: Self = toml::from_str(text)?;
        profile.validate()?;
        Ok(profile)
    }

    /// Milliseconds to prefill a prompt of `tokens`, of which `cached` are.
    pub fn prefill_ms(&self, tokens: u64, cached: u64) -> f64 {
        let PrefillTimes {
            seconds_per_8k_tokens: a,
            seconds_per_8k_tokens_squared: b,
        } = self.prefill_times();
        let (n, p) = (tokens as f64 / UNIT_TOKENS, cached as f64 / UNIT_TOKENS);
        1e3 * (a * (n - p) + b * (n * n - p * p))
    }

    /// `a` and `b` of [`router::cost::Rates::compute`]: the same function in milliseconds per token, and per token and thousand tokens of
    /// context.
    pub fn prefill_rates(&self) -> (f64, f64) {
        let times = self.prefill_times();
        // n² - p² is twice the sum over the new tokens of their mean context.
        let quadratic = times.seconds_per_8k_tokens_squared / (UNIT_TOKENS * UNIT_TOKENS);
        (
            1e3 * times.seconds_per_8k_tokens / UNIT_TOKENS,
            1e3 * 2.0 * quadratic * 1e3,
        )
    }

    /// Milliseconds of a decode step of `sequences` that hold `tokens`.
    pub fn step_ms(&self, sequences: u64, tokens: u64) -> f64 {
        let times = self.step_times();
        times.step_ms
            + times.step_ms_per_sequence * sequences as f64
            + times.step_ms_per_kilotoken * tokens as f64 / 1e3
    }

    /// The format of blocks of `block_tokens`.
    pub fn layout(&self, block_tokens: usize) -> KvLayout {
        KvLayout {
            layers: self.model.layers,
            kv_heads: self.model.kv_heads,
            head_dim: self.model.head_dim,
            block_tokens,
            dtype: KvDtype::F16,
        }
    }

    /// Tokens of KV that fit beside the weights.
    pub fn memory_tokens(&self) -> u64 {
        let free = self.hardware.accelerators * self.hardware.memory_bytes - self.weight_bytes();
        (free * KV_MEMORY_SHARE / self.token_bytes()) as u64
    }

    /// Bytes per millisecond between nodes.
    pub fn network_bytes_per_ms(&self) -> f64 {
        self.hardware.network_bytes_per_s / 1e3
    }

    fn prefill_times(&self) -> PrefillTimes {
        self.calibrated.prefill.unwrap_or_else(|| {
            let (hardware, model) = (&self.hardware, &self.model);
            let flops = hardware.accelerators * hardware.flops * hardware.efficiency;
            // A multiplication and an addition per weight; scores and sums over half of the context, both of them.
            PrefillTimes {
                seconds_per_8k_tokens: 2.0 * model.parameters * UNIT_TOKENS / flops,
                seconds_per_8k_tokens_squared: 2.0
                    * model.layers as f64
                    * model.hidden
                    * UNIT_TOKENS
                    * UNIT_TOKENS
                    / flops,
            }
        })
    }

    fn step_times(&self) -> StepTimes {
        self.calibrated.decode.unwrap_or_else(|| {
            let hardware = &self.hardware;
            let bytes_per_ms =
                hardware.accelerators * hardware.memory_bytes_per_s * hardware.efficiency / 1e3;
            let flops_per_ms = hardware.accelerators * hardware.flops * hardware.efficiency / 1e3;
            StepTimes {
                step_ms: self.weight_bytes() / bytes_per_ms,
                step_ms_per_sequence: 2.0 * self.model.parameters / flops_per_ms,
                step_ms_per_kilotoken: 1e3 * self.token_bytes() / bytes_per_ms,
            }
        })
    }

    fn weight_bytes(&self) -> f64 {
        self.model.parameters * ELEMENT_BYTES
    }

    fn token_bytes(&self) -> f64 {
        let model = &self.model;
        2.0 * (model.layers * model.kv_heads * model.head_dim) as f64 * ELEMENT_BYTES
    }

    fn validate(&self) -> Result<(), ProfileError> {
        let (hardware, model) = (&self.hardware, &self.model);
        let (prefill, step) = (self.prefill_times(), self.step_times());
        let numbers = [
            ("hardware.accelerators", hardware.accelerators),
            ("hardware.flops", hardware.flops),
            ("hardware.memory_bytes", hardware.memory_bytes),
            ("hardware.memory_bytes_per_s", hardware.memory_bytes_per_s),
            ("hardware.network_bytes_per_s", hardware.network_bytes_per_s),
            ("hardware.efficiency", hardware.efficiency),
            ("model.parameters", model.parameters),
            ("model.layers", model.layers as f64),
            ("model.hidden", model.hidden),
            ("model.kv_heads", model.kv_heads as f64),
            ("model.head_dim", model.head_dim as f64),
            ("model.context_tokens_max", model.context_tokens_max as f64),
            (
                "calibrated.prefill.seconds_per_8k_tokens",
                prefill.seconds_per_8k_tokens,
            ),
            ("calibrated.decode.step_ms", step.step_ms),
        ];
        if let Some((name, value)) = numbers
            .into_iter()
            .find(|(_, value)| !(value.is_finite() && *value > 0.0))
        {
            return Err(ProfileError::NotPositive { name, value });
        }
        let slopes = [
            (
                "calibrated.prefill.seconds_per_8k_tokens_squared",
                prefill.seconds_per_8k_tokens_squared,
            ),
            (
                "calibrated.decode.step_ms_per_sequence",
                step.step_ms_per_sequence,
            ),
            (
                "calibrated.decode.step_ms_per_kilotoken",
                step.step_ms_per_kilotoken,
            ),
        ];
        if let Some((name, value)) = slopes
            .into_iter()
            .find(|(_, value)| !(value.is_finite() && *value >= 0.0))
        {
            return Err(ProfileError::NotPositive { name, value });
        }
        let memory = hardware.accelerators * hardware.memory_bytes;
        if self.weight_bytes() >= memory {
            let weights = self.weight_bytes();
            return Err(ProfileError::WeightsDoNotFit { weights, memory });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
