//! Flags of `perigee sim`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

/// `perigee sim`.
#[derive(Debug, Subcommand)]
pub(crate) enum SimCommand {
    /// Simulate a cluster, and say how it served
    Run(RunArgs),
    /// Search the ratio of prefill to decode nodes, and the size of pools, that serve most per node
    Sweep(SweepArgs),
}

/// What is simulated.
#[derive(Debug, Clone, Args)]
pub(crate) struct ScenarioArgs {
    /// TOML file of the scenario; see docs/simulator.md.
    #[arg(long, value_name = "FILE")]
    pub(crate) scenario: PathBuf,
    /// Trace of requests, in place of the scenario's.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Any key of the scenario, as SECTION.KEY=VALUE. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Write a plot to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

/// Flags of `sim run`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) scenario: ScenarioArgs,
    /// Simulate the scenario with each of these values of a key, as SECTION.KEY=VALUE,VALUE…
    #[arg(long, value_name = "KEY=VALUES")]
    pub(crate) vary: Option<String>,
    /// What the plot shows.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) plot: PlotOf,
    /// Keep the state of every second in the JSON.
    #[arg(long)]
    pub(crate) samples: bool,
}

/// What a plot of `sim run` shows.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PlotOf {
    /// The distribution of times to first token.
    #[default]
    Ttft,
    /// Decode steps over time, as a part of the limit on gaps.
    DecodeLoad,
    /// Queued prompt tokens over time.
    Queue,
}

/// Flags of `sim sweep`.
#[derive(Debug, Clone, Args)]
pub(crate) struct SweepArgs {
    #[command(flatten)]
    pub(crate) scenario: ScenarioArgs,
    /// Nodes of every cluster; the scenario's if it is not given.
    #[arg(long)]
    pub(crate) nodes: Option<usize>,
    /// Tokens that the pool of a prefill node holds. May be repeated, or separated by commas.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',')]
    pub(crate) pool_tokens: Vec<u64>,
    /// Least part of the requests that must meet both limits.
    #[arg(long, default_value_t = 0.9)]
    pub(crate) attainment: f64,
}
