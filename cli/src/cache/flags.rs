//! The command line of `perigee cache`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use node::config::Duration;

use crate::output::Watch;

/// `perigee cache`.
#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// Show each node's pool in numbers
    Stats(Watch),
    /// Show the blocks that the nodes value most
    Top(TopArgs),
    /// Show which nodes hold a prompt, and how much of it
    Locate(PromptArgs),
    /// Keep a prompt's blocks where they are
    Pin(PinArgs),
    /// End a pin
    Unpin(UnpinArgs),
    /// List what is pinned
    Pins(Watch),
    /// Drop a prompt's blocks, or all
    Evict(EvictArgs),
    /// Let a node fetch a prompt's blocks from another one
    Warm(WarmArgs),
    /// Hash every cached block, and drop those that are corrupt
    Verify {
        /// This node only.
        #[arg(long, value_name = "NODE")]
        node: Option<String>,
    },
    /// Write a prompt's blocks to a file
    Export(ExportArgs),
    /// Put the blocks of a file into a node
    Import(ImportArgs),
}

/// A prompt, in one of several forms.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct PromptArgs {
    /// The prompt's text.
    #[arg(long, group = "prompt", value_name = "TEXT")]
    pub(crate) text: Option<String>,
    /// File with the prompt's text.
    #[arg(long, group = "prompt", value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// The prompt's tokens, separated by commas.
    #[arg(long, group = "prompt", value_name = "TOKENS", value_delimiter = ',')]
    pub(crate) tokens: Option<Vec<u32>>,
    /// The prompt's block hashes from the first one on, separated by commas.
    #[arg(long, group = "prompt", value_name = "HASHES", value_delimiter = ',')]
    pub(crate) hashes: Option<Vec<String>>,
    /// Render the text as a chat message first, as chat completions do.
    #[arg(long)]
    pub(crate) chat: bool,
    /// Tenant whose blocks are meant; empty is the common space.
    #[arg(long, default_value = "", value_name = "TENANT")]
    pub(crate) tenant: String,
    /// Model file or directory, to turn text into tokens.
    #[arg(long, env = "PERIGEE_MODEL", value_name = "PATH")]
    pub(crate) model: Option<PathBuf>,
}

/// Flags of `cache top`.
#[derive(Debug, Clone, Args)]
pub(crate) struct TopArgs {
    /// Blocks to show; at most 1000.
    #[arg(short = 'n', long, default_value_t = 20)]
    pub(crate) count: u64,
    /// The ones that are evicted next instead.
    #[arg(long)]
    pub(crate) coldest: bool,
    /// This node only.
    #[arg(long, value_name = "NODE")]
    pub(crate) node: Option<String>,
    #[command(flatten)]
    pub(crate) watch: Watch,
}

/// Flags of `cache pin`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PinArgs {
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,
    /// Node that keeps them; left out, the one that holds most.
    #[arg(long, value_name = "NODE")]
    pub(crate) node: Option<String>,
    /// How long; left out, until unpinned.
    #[arg(long, value_name = "TIME")]
    pub(crate) ttl: Option<Duration>,
    /// Nodes that shall hold them, this one included.
    #[arg(long, default_value_t = 1)]
    pub(crate) replicas: u64,
}

/// Flags of `cache unpin`.
#[derive(Debug, Clone, Args)]
pub(crate) struct UnpinArgs {
    /// The pin's number, as `pin` and `pins` say it.
    pub(crate) pin_id: u64,
    /// Node that has the pin.
    #[arg(long, value_name = "NODE")]
    pub(crate) node: String,
}

/// Flags of `cache evict`.
#[derive(Debug, Clone, Args)]
pub(crate) struct EvictArgs {
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,
    /// Every block that nobody uses.
    #[arg(long, conflicts_with = "prompt")]
    pub(crate) all: bool,
    /// On this node only.
    #[arg(long, value_name = "NODE")]
    pub(crate) node: Option<String>,
    /// Do not ask.
    #[arg(long)]
    pub(crate) yes: bool,
}

/// Flags of `cache warm`.
#[derive(Debug, Clone, Args)]
pub(crate) struct WarmArgs {
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,
    /// Node that fetches.
    #[arg(long, value_name = "NODE")]
    pub(crate) to: String,
    /// Node that it fetches from; left out, the one that holds most.
    #[arg(long, value_name = "NODE")]
    pub(crate) from: Option<String>,
}

/// Flags of `cache export`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,
    /// File to write; it must not exist.
    pub(crate) file: PathBuf,
    /// Node to read from; left out, the one that holds most.
    #[arg(long, value_name = "NODE")]
    pub(crate) node: Option<String>,
}

/// Flags of `cache import`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ImportArgs {
    /// File that `export` wrote.
    pub(crate) file: PathBuf,
    /// Node that takes the blocks.
    #[arg(long, value_name = "NODE")]
    pub(crate) node: String,
}
