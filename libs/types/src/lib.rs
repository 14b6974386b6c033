//! The words that every part of Perigee shares: ids, block hashes, the KV layout, SLOs, priorities, sampling
//! parameters and error codes.
//!
//! Architecture invariant: this crate is pure. It has no async code, does no I/O, reads no clock and
//! imports nothing else of the workspace, so every decision that is made in these terms can be
//! replayed.

pub mod block;
pub mod error;
pub mod hash;
pub mod host;
pub mod ids;
pub mod latency;
pub mod layout;
pub mod member;
pub mod memory;
pub mod overload;
pub mod sampling;
pub mod tenant;
pub mod trace;

pub use block::{BlockDescriptor, BlockEvent, Checksum, Generation, LogEntry, Tier};
pub use error::{Error, ErrorCode};
pub use hash::{BlockHash, KvSpace};
pub use host::{HostFacts, RdmaDevice, RdmaGid, RdmaPort};
pub use ids::{BlockId, Epoch, LeaseId, NodeId, RequestId, TransferId};
pub use latency::{Millis, Slo};
pub use layout::{KvDtype, KvLayout};
pub use member::{DrainProgress, LoadReport, NodeRecord, Role};
pub use memory::{Memory, MemoryKind};
pub use overload::{Constraint, Overload, Priority};
pub use sampling::{FinishReason, SamplingParams, TokenLogprob};
pub use tenant::TenantQuota;
pub use trace::TraceParent;

/// A token id of the model's vocabulary.
pub type Token = u32;
