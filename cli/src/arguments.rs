//! The command line.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use node::config::{ByteSize, Duration};
use types::{Priority, Role};

use crate::bench::BenchArgs;
use crate::cache::CacheCommand;
use crate::check::{ChatFlags, DoctorArgs};
use crate::context::{ClusterFlags, ContextCommand};
use crate::debug::DebugCommand;
use crate::key::KeyCommand;
use crate::manual::{CompletionsArgs, ManArgs};
use crate::output::{Format, Watch};
use crate::pull::PullArgs;
use crate::requests::RequestCommand;
use crate::route::RouteCommand;
use crate::settings::Transport;
use crate::sim::SimCommand;
use crate::tenants::TenantCommand;
use crate::top::TopArgs;

/// KV-cache-centric serving of language models: prefill, decode, a distributed KV store, and a router.
#[derive(Debug, Parser)]
#[command(name = "perigee", version, max_term_width = 100)]
pub(crate) struct Arguments {
    /// How results are printed.
    #[arg(short, long, global = true, value_enum, default_value_t)]
    pub(crate) output: Format,
    #[command(flatten)]
    pub(crate) cluster: ClusterFlags,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole cluster on this machine, one process per node
    Up(UpArgs),
    /// Run the front door: OpenAI HTTP and gRPC
    Router(RoleArgs),
    /// Run a node that turns prompts into KV blocks
    Prefill(RoleArgs),
    /// Run a node that owns requests and streams tokens
    Decode(RoleArgs),
    /// Run a node that only holds KV blocks
    Store(RoleArgs),
    /// Talk to the model
    Chat(ChatArgs),
    /// Generate once from a prompt
    Generate(GenerateArgs),
    /// Start a cluster, hold a conversation, and show where every request ran
    Demo(DemoArgs),
    /// Load a server with requests, and measure its answers
    Bench(BenchArgs),
    /// Show the cluster's nodes and load
    Status(Watch),
    /// Watch nodes and requests, full screen and live
    Top(TopArgs),
    /// Say what is wrong with the cluster, or with this machine, and what to do about it
    Check(CheckArgs),
    /// Name the cause of what is wrong, from the settings, this machine and the cluster together
    Doctor(DoctorArgs),
    /// The cluster's nodes
    #[command(subcommand)]
    Node(NodeCommand),
    /// How KV moves between nodes
    #[command(subcommand)]
    Transfer(TransferCommand),
    /// The cached blocks of all nodes
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Tenants, and what they have of the nodes' pools
    #[command(subcommand)]
    Tenant(TenantCommand),
    /// Where requests were placed, and why
    #[command(subcommand)]
    Route(RouteCommand),
    /// Requests that run, and the last ones: their way through the cluster
    #[command(subcommand)]
    Request(RequestCommand),
    /// Clusters in virtual time
    #[command(subcommand)]
    Sim(SimCommand),
    /// Models on this machine
    #[command(subcommand)]
    Model(ModelCommand),
    /// Keys of a router's callers
    #[command(subcommand)]
    Key(KeyCommand),
    /// Print the configuration that a role would run with, or compare it
    Config(ConfigArgs),
    /// Clusters by name, for --context
    #[command(subcommand)]
    Context(ContextCommand),
    /// Collect what others need to see of a cluster to help with it
    #[command(subcommand)]
    Debug(DebugCommand),
    /// Print a shell's completions of this command line
    Completions(CompletionsArgs),
    /// Print the manual
    Man(ManArgs),
}

/// `perigee node`.
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// List the nodes with their addresses and load
    List(Watch),
    /// Show all that a node says of itself
    Show {
        /// Its name.
        node: String,
        #[command(flatten)]
        watch: Watch,
    },
    /// Let a node finish what it has and take nothing new, so that it can be stopped
    Drain(DrainArgs),
    /// Have routers place nothing new on a node, which keeps its blocks and its requests
    Cordon(NodeTarget),
    /// Let a node that was drained or cordoned take requests again
    Resume(NodeTarget),
    /// Make a prefill node a decode node, or the other way round, without a restart and with its blocks
    Flip(FlipArgs),
    /// Show what a node logs, or change it for a while
    LogLevel(LogLevelArgs),
}

/// Flags of `node log-level`.
#[derive(Debug, Clone, Args)]
pub(crate) struct LogLevelArgs {
    /// Its name.
    pub(crate) node: String,
    /// Levels by module, such as `info,kv_store=debug`; without one, what is logged is only shown.
    pub(crate) filter: Option<String>,
    /// When the node's own setting holds again; at most a day.
    #[arg(long = "for", value_name = "TIME", default_value = "10m", requires = "filter")]
    pub(crate) lasts: Duration,
    /// Go back to the node's own setting now.
    #[arg(long, conflicts_with = "filter")]
    pub(crate) revert: bool,
}

/// A node to talk to.
#[derive(Debug, Clone, Args)]
pub(crate) struct NodeTarget {
    /// Its name.
    #[arg(required_unless_present = "this", conflicts_with = "this")]
    pub(crate) node: Option<String>,
    /// The node of this host or container, found by its own settings (node.listen and node.grpc_port) without a router.
    #[arg(long = "self")]
    pub(crate) this: bool,
    /// With --self: TOML file of the node's settings.
    #[arg(long, env = "PERIGEE_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

/// Flags of `node flip`.
#[derive(Debug, Clone, Args)]
pub(crate) struct FlipArgs {
    /// Its name.
    pub(crate) node: String,
    /// What it is to be. Without one, what it is not.
    #[arg(long, value_name = "ROLE")]
    pub(crate) to: Option<EngineRole>,
    /// How long its requests may take to end before they go on elsewhere; at most 10m.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub(crate) grace: Duration,
    /// Flip also the last decode node of a model.
    #[arg(long)]
    pub(crate) force: bool,
}

/// A role with an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineRole {
    /// Turns prompts into KV blocks.
    Prefill,
    /// Owns requests and streams tokens.
    Decode,
}

impl EngineRole {
    /// The role that is meant.
    pub(crate) fn role(self) -> Role {
        match self {
            Self::Prefill => Role::Prefill,
            Self::Decode => Role::Decode,
        }
    }
}

/// Flags of `node drain`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    pub(crate) target: NodeTarget,
    /// Wait until nothing runs on the node, and its blocks were offered to its peers.
    #[arg(long)]
    pub(crate) wait: bool,
    /// Longest wait; the node goes on draining after it.
    #[arg(long, value_name = "TIME", default_value = "2m")]
    pub(crate) timeout: Duration,
    /// Drain also the last decode node of a model. --self never asks who else there is.
    #[arg(long)]
    pub(crate) force: bool,
}

/// `perigee transfer`.
#[derive(Debug, Subcommand)]
pub(crate) enum TransferCommand {
    /// Show what each pair of nodes uses, and why nothing better
    List(Watch),
    /// Measure bandwidth and latency between two nodes' pools, and verify what arrives
    Test(TransferTestArgs),
}

/// Flags of `transfer test`.
#[derive(Debug, Clone, Args)]
pub(crate) struct TransferTestArgs {
    /// Node that writes and reads.
    pub(crate) from: String,
    /// Node whose memory is written and read.
    pub(crate) to: String,
    /// Largest transfer; at most 16MiB.
    #[arg(long, value_name = "SIZE", default_value = "16MiB")]
    pub(crate) bytes: ByteSize,
    /// Time for all measurements together; at most 1m.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub(crate) duration: Duration,
    /// Which way to measure.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) direction: TransferDirection,
}

/// Which way a test moves bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TransferDirection {
    /// Writes, then reads.
    #[default]
    Both,
    /// FROM writes to TO's memory.
    Write,
    /// FROM reads TO's memory.
    Read,
}

/// Flags of `check`.
#[derive(Debug, Clone, Args)]
pub(crate) struct CheckArgs {
    /// Check this machine and the settings only, before there is a cluster.
    #[arg(long, conflicts_with = "chat")]
    pub(crate) pre: bool,
    #[command(flatten)]
    pub(crate) chat: ChatFlags,
    #[command(flatten)]
    pub(crate) settings: SettingFlags,
}

/// `perigee model`.
#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Get a model
    Pull(PullArgs),
    /// List the catalogue, and what the cluster serves
    List(Watch),
    /// Have a node that holds blocks alone load its model, and prefill or decode
    Load(LoadArgs),
    /// Have a node free its model's memory, and go on as a store with the blocks that it has
    Unload(UnloadArgs),
}

/// Flags of `model load`.
#[derive(Debug, Clone, Args)]
pub(crate) struct LoadArgs {
    /// The node's name.
    pub(crate) node: String,
    /// What it is to be.
    #[arg(long = "as", value_name = "ROLE")]
    pub(crate) role: EngineRole,
    /// How long that may take.
    #[arg(long, value_name = "TIME", default_value = "10m")]
    pub(crate) timeout: Duration,
}

/// Flags of `model unload`.
#[derive(Debug, Clone, Args)]
pub(crate) struct UnloadArgs {
    /// The node's name.
    pub(crate) node: String,
    /// How long its requests may take to end before they go on elsewhere; at most 10m.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub(crate) grace: Duration,
    /// Unload also from the last decode node of a model.
    #[arg(long)]
    pub(crate) force: bool,
}

/// Settings that have a flag; each one overrides the file and the environment.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct SettingFlags {
    /// TOML file of settings; `perigee config` prints one.
    #[arg(long, env = "PERIGEE_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Model file (GGUF) or directory (Hugging Face).
    #[arg(long, value_name = "PATH")]
    pub(crate) model: Option<PathBuf>,
    /// Name under which clients ask for the model.
    #[arg(long, value_name = "NAME")]
    pub(crate) model_name: Option<String>,
    /// Arithmetic of the engine.
    #[arg(long, value_enum)]
    pub(crate) precision: Option<Precision>,
    /// Threads of each engine.
    #[arg(long)]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Size of the pool of KV blocks, such as 2GiB.
    #[arg(long, value_name = "SIZE")]
    pub(crate) kv_memory: Option<String>,
    /// Tokens per KV block; the same on all nodes.
    #[arg(long)]
    pub(crate) block_tokens: Option<usize>,
    /// What moves KV between nodes.
    #[arg(long, value_enum)]
    pub(crate) transport: Option<Transport>,
    /// Any setting, as SECTION.KEY=VALUE. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

/// Arithmetic of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Precision {
    /// f32 throughout: the reference.
    Exact,
    /// Quantised dot products and f16 KV.
    Fast,
}

/// Flags of `router`, `prefill`, `decode` and `store`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RoleArgs {
    #[command(flatten)]
    pub(crate) settings: SettingFlags,
    /// Name of the node, unique in the cluster.
    #[arg(long)]
    pub(crate) id: Option<String>,
    /// Where members are found: etcd://HOST:PORT[,HOST:PORT…] or perigee://HOST:PORT.
    #[arg(long, value_name = "URL")]
    pub(crate) registry: Option<String>,
    /// Address to listen on and to be reached at.
    #[arg(long, value_name = "IP")]
    pub(crate) listen: Option<IpAddr>,
    /// Port of gRPC; 0 takes a free one.
    #[arg(long)]
    pub(crate) grpc_port: Option<u16>,
    /// Port of HTTP; 0 takes a free one.
    #[arg(long)]
    pub(crate) http_port: Option<u16>,
    /// Check the settings, print what is wrong with them, and exit.
    #[arg(long)]
    pub(crate) check_config: bool,
    /// End when stdin ends, as children of `perigee up` do.
    #[arg(long, hide = true)]
    pub(crate) exit_with_parent: bool,
}

/// Flags of `up`.
#[derive(Debug, Clone, Args)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    pub(crate) settings: SettingFlags,
    /// Prefill nodes.
    #[arg(long, default_value_t = 1)]
    pub(crate) prefill: usize,
    /// Decode nodes.
    #[arg(long, default_value_t = 2)]
    pub(crate) decode: usize,
    /// Nodes that only hold blocks.
    #[arg(long, default_value_t = 0)]
    pub(crate) store: usize,
    /// Port of the OpenAI HTTP API; 0 takes a free one.
    #[arg(long, default_value_t = 8080)]
    pub(crate) http_port: u16,
    /// Port of the gRPC API; 0 takes a free one.
    #[arg(long, default_value_t = 50051)]
    pub(crate) grpc_port: u16,
    /// An etcd to use in place of the embedded registry.
    #[arg(long, value_name = "URL")]
    pub(crate) registry: Option<String>,
}

/// Sampling flags of `chat` and `generate`.
#[derive(Debug, Clone, Args)]
pub(crate) struct SamplingArgs {
    /// 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// Keep the likeliest tokens that together reach this probability.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Keep the k likeliest tokens; 0 keeps all.
    #[arg(long, default_value_t = 0)]
    pub(crate) top_k: u32,
    /// Draw the same tokens again.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 256)]
    pub(crate) max_tokens: u64,
    /// Text that ends the output. May be repeated.
    #[arg(long)]
    pub(crate) stop: Vec<String>,
}

/// Flags of `chat`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ChatArgs {
    /// Model name; may be left out where the cluster serves one.
    #[arg(long, default_value = "")]
    pub(crate) model: String,
    /// System message.
    #[arg(long)]
    pub(crate) system: Option<String>,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

/// Flags of `generate`.
#[derive(Debug, Clone, Args)]
pub(crate) struct GenerateArgs {
    /// The prompt; `-` reads it from stdin.
    pub(crate) prompt: String,
    /// Model name; may be left out where the cluster serves one.
    #[arg(long, default_value = "")]
    pub(crate) model: String,
    /// Render the prompt as a chat message first.
    #[arg(long)]
    pub(crate) chat: bool,
    /// Go on after the model's end-of-sequence token.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Tenant whose cache it uses.
    #[arg(long, default_value = "")]
    pub(crate) tenant: String,
    /// How much it matters beside other requests: low, normal or high.
    #[arg(long, default_value_t, value_parser = priority)]
    pub(crate) priority: Priority,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

fn priority(name: &str) -> Result<Priority, String> {
    Priority::parse(name).ok_or_else(|| "it must be low, normal or high".to_owned())
}

/// Flags of `demo`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DemoArgs {
    /// Model file or directory.
    #[arg(long, value_name = "PATH")]
    pub(crate) model: PathBuf,
    /// Prefill nodes.
    #[arg(long, default_value_t = 1)]
    pub(crate) prefill: usize,
    /// Decode nodes.
    #[arg(long, default_value_t = 2)]
    pub(crate) decode: usize,
    /// What moves KV between nodes.
    #[arg(long, value_enum)]
    pub(crate) transport: Option<Transport>,
}

/// Flags of `config`.
#[derive(Debug, Clone, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct ConfigArgs {
    #[command(flatten)]
    pub(crate) view: ViewArgs,
    #[command(subcommand)]
    pub(crate) command: Option<ConfigCommand>,
}

/// `perigee config`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print the configuration, as `config` alone does
    View(ViewArgs),
    /// Show where the configuration differs from the defaults, or from another file
    Diff {
        #[command(flatten)]
        settings: SettingFlags,
        /// TOML file to compare with.
        #[arg(long, value_name = "FILE")]
        other: Option<PathBuf>,
    },
}

/// Flags of `config view`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ViewArgs {
    #[command(flatten)]
    pub(crate) settings: SettingFlags,
    /// Print the reference of all settings instead.
    #[arg(long)]
    pub(crate) markdown: bool,
}
