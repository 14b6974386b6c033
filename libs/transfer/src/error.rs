//! How a transfer fails.

use types::{Epoch, ErrorCode, MemoryKind};

use crate::{MemoryError, RegionId};

/// Why a transport refused a call or could not complete it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The local region was never registered, or is unregistered.
    #[error("region {} is not registered", region.0)]
    UnknownRegion {
        /// The region that was named.
        region: RegionId,
    },
    /// A range of local memory that does not exist.
    #[error("{len} bytes at offset {offset} are outside a region of {region_bytes} bytes")]
    OutOfBounds {
        /// First byte.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// What there is.
        region_bytes: u64,
    },
    /// The transport cannot move this kind of memory.
    #[error("memory of kind {kind:?} cannot be registered with this transport")]
    UnsupportedMemory {
        /// The memory's kind.
        kind: MemoryKind,
    },
    /// No transport of this process reaches such an endpoint.
    #[error("endpoint {endpoint:?} has no scheme that a transport of this node serves")]
    UnsupportedEndpoint {
        /// What was asked for.
        endpoint: String,
    },
    /// No memory of that size.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// A table of the transport is full.
    #[error("no more than {limit} {what} fit")]
    Full {
        /// What the table holds.
        what: &'static str,
        /// Its bound.
        limit: usize,
    },
    /// The listening socket could not be set up.
    #[error("cannot listen on {address}: {reason}")]
    Bind {
        /// Where.
        address: String,
        /// The system's words.
        reason: String,
    },
    /// The peer knows no such grant: it was revoked, or never given.
    #[error("{endpoint} has no grant {key:016x}: it was revoked or never given")]
    UnknownKey {
        /// The peer.
        endpoint: String,
        /// The grant that was named.
        key: u64,
    },
    /// The grant is for the other direction.
    #[error("grant {key:016x} of {endpoint} does not allow this direction")]
    Denied {
        /// The peer.
        endpoint: String,
        /// The grant that was named.
        key: u64,
    },
    /// A slice leaves the ranges of the grant.
    #[error("{len} bytes at offset {offset} are outside the grant of {endpoint}")]
    OutOfRange {
        /// The peer.
        endpoint: String,
        /// First byte, in the peer's memory.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// The peer is another incarnation than the one that gave the grant.
    #[error("{endpoint} is at epoch {current}, the grant is of epoch {epoch}")]
    Fenced {
        /// The peer.
        endpoint: String,
        /// The grant's epoch.
        epoch: Epoch,
        /// The peer's epoch.
        current: Epoch,
    },
    /// The peer answers no calls.
    #[error("{endpoint} answers no calls")]
    Unserved {
        /// The peer.
        endpoint: String,
    },
    /// A call is larger than calls may be.
    #[error("a call with {bytes} bytes of {what}, more than {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// Its bound.
        limit: u64,
    },
    /// No connection came about. Nothing was sent.
    #[error("cannot reach {endpoint}: {reason}")]
    Unreachable {
        /// The peer.
        endpoint: String,
        /// The system's words.
        reason: String,
    },
    /// The connection broke or was cut before the acknowledgement.
    #[error("connection to {endpoint} lost: {reason}")]
    ConnectionLost {
        /// The peer.
        endpoint: String,
        /// The system's words.
        reason: String,
    },
    /// The deadline passed before the acknowledgement. The connections involved were cut.
    #[error("deadline passed while waiting for {endpoint}")]
    Timeout {
        /// The peer.
        endpoint: String,
    },
    /// UCX cannot move the bytes, and nothing else may.
    #[error("ucx cannot reach {endpoint}: {reason}")]
    Ucx {
        /// The peer.
        endpoint: String,
        /// What is in the way.
        reason: String,
    },
    /// UCX is forced, and cannot be used here.
    #[error("transfers are forced to use ucx, but it cannot be used: {reason}")]
    NoUcx {
        /// What is in the way.
        reason: String,
    },
    /// The peer answered what the protocol does not allow.
    #[error("{endpoint} broke the transfer protocol: {reason}")]
    Protocol {
        /// The peer.
        endpoint: String,
        /// What was wrong.
        reason: String,
    },
    /// This transport was closed.
    #[error("the transport is closed")]
    Closed,
}

impl TransferError {
    /// What the caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::OutOfBounds { .. }
            | Self::UnsupportedMemory { .. }
            | Self::UnsupportedEndpoint { .. }
            | Self::TooLarge { .. }
            | Self::OutOfRange { .. } => ErrorCode::Invalid,
            Self::Memory(error) => error.code(),
            Self::UnknownRegion { .. } | Self::UnknownKey { .. } => ErrorCode::NotFound,
            Self::Denied { .. } => ErrorCode::Denied,
            Self::Full { .. } => ErrorCode::Overloaded,
            Self::Fenced { .. } => ErrorCode::Fenced,
            // One-sided writes have no effect beyond memory that was granted for them, so "nothing was done"
            // holds for all that anyone may look at.
            Self::Bind { .. }
            | Self::Unreachable { .. }
            | Self::ConnectionLost { .. }
            | Self::Ucx { .. }
            | Self::NoUcx { .. }
            | Self::Unserved { .. }
            | Self::Closed => ErrorCode::Unavailable,
            Self::Timeout { .. } => ErrorCode::Timeout,
            Self::Protocol { .. } => ErrorCode::Internal,
        }
    }
}

impl From<TransferError> for types::Error {
    fn from(error: TransferError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
