//! Who takes part in the cluster, and how busy each one says it is.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Epoch, KvSpace, NodeId};

/// What a node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The front door.
    Router,
    /// Turns prompts into KV blocks.
    Prefill,
    /// Owns requests and streams tokens.
    Decode,
    /// Holds blocks only.
    Store,
}

impl Role {
    const ALL: [Self; 4] = [Self::Router, Self::Prefill, Self::Decode, Self::Store];

    /// The name used on the command line, in metrics and in the registry.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Store => "store",
        }
    }

    /// The role of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A node's entry in the registry. It says where the node is, never what blocks it holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The node's name.
    pub id: NodeId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// What it does.
    pub role: Role,
    /// `host:port` of its gRPC services.
    pub grpc_endpoint: String,
    /// `host:port` of its HTTP side: metrics, health, and the OpenAI API on a router.
    pub http_endpoint: String,
    /// Where the transport reaches its memory, such as `tcp://host:port`. Empty on a router.
    pub transfer_endpoint: String,
    /// The model's name as clients say it. Empty on a store that has not learned one.
    pub model: String,
    /// What its blocks are made of. `None` on a router.
    pub kv_space: Option<KvSpace>,
    /// Blocks its pool holds.
    pub capacity_blocks: u64,
    /// Longest sequence its engine takes, in tokens. 0 without an engine.
    pub context_tokens_max: u64,
}

/// What a node reports of itself every report interval. All rates are measured, never configured.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Grows with every report of an epoch.
    pub sequence: u64,
    /// Requests that wait for the engine.
    pub queued_requests: u64,
    /// Prompt tokens that wait or are being computed.
    pub queued_prefill_tokens: u64,
    /// Sequences in the decode batch.
    pub running_sequences: u64,
    /// Tokens of KV those sequences hold.
    pub resident_tokens: u64,
    /// Pool slots that hold nothing.
    pub free_blocks: u64,
    /// Pool slots that hold cached blocks nobody uses: free on demand.
    pub evictable_blocks: u64,
    /// Milliseconds per prompt token without context, smoothed; 0 until measured.
    pub prefill_ms_per_token: f64,
    /// Milliseconds per prompt token and thousand tokens of context, smoothed; 0 until measured.
    pub prefill_ms_per_token_kilocontext: f64,
    /// Milliseconds per decode step, smoothed; 0 until measured.
    pub decode_step_ms: f64,
    /// Bytes per millisecond at which KV arrives or leaves, smoothed; 0 until measured.
    pub transfer_bytes_per_ms: f64,
    /// Bytes per millisecond at which blocks come from the node's disk, as last measured; 0 without a disk, and until measured.
    pub disk_bytes_per_ms: f64,
    /// The node finishes what it has and takes nothing new.
    pub draining: bool,
    /// How far that is, where an operator drained the node. `None` also from nodes that do not say.
    #[serde(default)]
    pub drain: Option<DrainProgress>,
    /// Blocks on the node's disk; 0 without one, and from nodes that do not say.
    #[serde(default)]
    pub disk_blocks: u64,
    /// Blocks that its disk can hold.
    #[serde(default)]
    pub disk_capacity_blocks: u64,
    /// An operator asks routers to place nothing new here. The node itself refuses nothing.
    #[serde(default)]
    pub cordoned: bool,
}

impl LoadReport {
    /// Whether routers may place requests on the node.
    pub fn takes_requests(&self) -> bool {
        !self.draining && !self.cordoned
    }

    /// Blocks that requests hold, of a pool of `capacity_blocks`.
    pub fn used_blocks(&self, capacity_blocks: u64) -> u64 {
        capacity_blocks.saturating_sub(self.free_blocks + self.evictable_blocks)
    }

    /// `draining`, `cordoned` or `ready`, as it is shown to people.
    pub fn state(&self) -> &'static str {
        match (self.draining, self.cordoned) {
            (true, _) => "draining",
            (false, true) => "cordoned",
            (false, false) => "ready",
        }
    }
}

/// How far a node is that an operator drained.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainProgress {
    /// Requests that were accepted and have not ended.
    pub requests: u64,
    /// Cached blocks that were not offered to peers yet.
    pub blocks: u64,
    /// Nothing runs any more, and peers have what they wanted: the process may end.
    pub done: bool,
}
