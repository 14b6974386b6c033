//! Typed async client of every service.
//!
//! Invariant: every unary call ends within a deadline, and every error is a [`types::Error`], also that of a broken
//! connection. What a peer says is checked here, so callers work with domain types only.
//!
//! Elsewhere: connections (`node::channel`), retries and placement (the callers: only they know what is safe to
//! repeat).

mod blocks;
mod cache;
mod call;
mod decode;
mod inference;
mod node;
mod requests;
mod routing;
mod store;
mod tenants;
mod transfer;

pub use self::node::{LoadStream, LogChange, LogLevel, Node, NodeInfo};
pub use blocks::{Blocks, Buffer, Place};
pub use cache::{
    Cache, ExportStream, ExportedChain, Located, PinnedChain, RankedBlock, Verification, VerifyStream,
};
pub use call::UNARY_DEADLINE;
pub use decode::{Decode, DecodeEvent, DecodeStream};
pub use inference::{ClusterStatus, GenerateEvent, GenerateStream, Inference, NodeStatus};
pub use requests::{PlacementTimeline, RequestTimeline, Requests, TimelineSpan};
pub use routing::{Decision, DecisionStream, PlacementCandidate, PlacementSource, Routing};
pub use store::{Acquired, LogBatch, LogStream, RemoteBlock, RemoteRegion, Reserved, Store, StoreStats};
pub use tenants::Tenants;
pub use transfer::{
    Transfer, TransferDescription, TransferDirection, TransferLink, TransferMeasurement, TransferMover,
    TransferTest, TransferTestStream,
};
