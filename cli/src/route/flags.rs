//! The command line of `perigee route`.

use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::output::Watch;

/// `perigee route`.
#[derive(Debug, Subcommand)]
pub(crate) enum RouteCommand {
    /// Show every candidate of a placement with its predicted times, and why one was chosen
    Explain(ExplainArgs),
    /// List the router's last placements
    List(ListArgs),
}

/// Flags of `route explain`. Without any, the last placement is meant.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ExplainArgs {
    /// A request that was placed, by its id.
    #[arg(long, group = "what", value_name = "ID")]
    pub(super) request: Option<String>,
    /// A prompt that is not sent; `-` reads it from stdin.
    #[arg(long, group = "what", value_name = "TEXT")]
    pub(super) prompt: Option<String>,
    /// File with such a prompt.
    #[arg(long, group = "what", value_name = "FILE")]
    pub(super) prompt_file: Option<PathBuf>,
    /// The tokens of such a prompt, separated by commas.
    #[arg(long, group = "what", value_name = "TOKENS", value_delimiter = ',')]
    pub(super) tokens: Option<Vec<u32>>,
    /// Every placement as it is made, until interrupted.
    #[arg(long, group = "what")]
    pub(super) live: bool,
    /// Render the prompt as a chat message first, as chat completions do.
    #[arg(long)]
    pub(super) chat: bool,
    /// Tenant whose cache the prompt would use.
    #[arg(long, default_value = "", value_name = "TENANT")]
    pub(super) tenant: String,
    /// Limit on the prompt's time to first token, in milliseconds.
    #[arg(long, value_name = "MS")]
    pub(super) ttft_slo: Option<f64>,
    /// Limit on the gaps between its tokens, in milliseconds.
    #[arg(long, value_name = "MS")]
    pub(super) tbt_slo: Option<f64>,
    /// Show all candidates, and not only the best ones.
    #[arg(long)]
    pub(super) all: bool,
}

/// Flags of `route list`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ListArgs {
    /// Most placements to list.
    #[arg(long, default_value = "20", value_name = "COUNT")]
    pub(super) count: NonZeroU32,
    #[command(flatten)]
    pub(super) watch: Watch,
}
