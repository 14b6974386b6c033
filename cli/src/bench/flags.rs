//! Flags of `perigee bench`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use node::config::Duration;

use super::plan::REQUESTS_MAX;

/// Flags of `bench`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BenchArgs {
    /// Base URL of an OpenAI API; otherwise that of the cluster's router.
    #[arg(long, value_name = "URL", conflicts_with = "grpc")]
    pub(crate) url: Option<String>,
    /// Call perigee.v1.Inference/Generate of --router instead.
    #[arg(long)]
    pub(crate) grpc: bool,
    /// What is asked for.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) api: Api,
    /// Model name; the first one that is served if it is not given.
    #[arg(long, default_value = "")]
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) prompts: PromptArgs,
    /// Limit on the time to first token; with --tbt it defines goodput.
    #[arg(long, value_name = "TIME")]
    pub(crate) ttft: Option<Duration>,
    /// Limit on gaps between tokens: on the mean of each request's longest tenth.
    #[arg(long, value_name = "TIME")]
    pub(crate) tbt: Option<Duration>,
    /// Longest time of one request; it fails after that.
    #[arg(long, value_name = "TIME", default_value = "2m")]
    pub(crate) timeout: Duration,
    /// Write a plot to this file: times to first token over time, and distributions.
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
    /// Put every request into the JSON.
    #[arg(long)]
    pub(crate) samples: bool,
    /// End well although requests failed.
    #[arg(long)]
    pub(crate) allow_failures: bool,
}

/// When requests are sent.
#[derive(Debug, Clone, Args)]
pub(crate) struct LoadArgs {
    /// Requests that run at a time: 1 if no rate and no trace is given, otherwise the most that may, 1024 if it is not given.
    #[arg(long, value_name = "COUNT")]
    pub(crate) concurrency: Option<NonZeroUsize>,
    /// Requests per second, at random (Poisson).
    #[arg(long, value_name = "RATE", conflicts_with = "trace")]
    pub(crate) rate: Option<f64>,
    /// Evenly instead.
    #[arg(long, requires = "rate")]
    pub(crate) constant: bool,
    /// Replay a trace in Mooncake's format.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Replay it faster by this factor.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, requires = "trace")]
    pub(crate) speed: f64,
    /// Requests to send: 100, or the whole trace, if no duration is given either.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..=REQUESTS_MAX))]
    pub(crate) requests: Option<u64>,
    /// Send no more after this time.
    #[arg(long, value_name = "TIME")]
    pub(crate) duration: Option<Duration>,
    /// Requests to send before those that count.
    #[arg(long, value_name = "COUNT", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=REQUESTS_MAX))]
    pub(crate) warmup: u64,
    /// Seed of arrivals, lengths and prompts.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

/// What is sent. A token of a prompt is a common word, which most vocabularies have as one; the model's chat template adds some.
#[derive(Debug, Clone, Args)]
pub(crate) struct PromptArgs {
    /// Mean tokens of prompts. Not of a trace's, which has its own.
    #[arg(long, value_name = "TOKENS", default_value_t = 128, conflicts_with = "trace")]
    pub(crate) input_tokens: u64,
    /// Their standard deviation.
    #[arg(long, value_name = "TOKENS", default_value_t = 0, conflicts_with = "trace")]
    pub(crate) input_tokens_stddev: u64,
    /// Tokens that all prompts begin with, as a part of them.
    #[arg(long, value_name = "TOKENS", default_value_t = 0, conflicts_with = "trace")]
    pub(crate) shared_prefix_tokens: u64,
    /// Mean tokens of answers: 64, or the trace's. The model's end of sequence does not end them.
    #[arg(long, value_name = "TOKENS")]
    pub(crate) output_tokens: Option<u64>,
    /// Their standard deviation.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub(crate) output_tokens_stddev: u64,
    /// Tokens that a trace's blocks are made of here, instead of 512: scales its prompts to a model's context.
    #[arg(long, value_name = "TOKENS", requires = "trace", value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub(crate) trace_block_tokens: Option<u64>,
}

/// What is asked for.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Api {
    /// An answer in a conversation: /v1/chat/completions.
    #[default]
    Chat,
    /// The continuation of a text: /v1/completions.
    Completions,
}

impl Api {
    /// Its name in reports.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
        }
    }
}
