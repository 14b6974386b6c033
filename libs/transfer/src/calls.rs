//! Calls: a message to a peer and its answer, and bytes that go with the one or come with the other, in one round trip.
//!
//! A read or a write needs to be told first where; for what is small, asking costs more than moving. In a call the
//! called node decides where bytes go or come from when it has seen the message.
//!
//! Invariant: only the node that owns memory writes it, as for reads and writes, so nothing of a call needs a fence: bytes
//! that come with a call land in memory that the called node's [`Place`] names, and by its own doing; bytes that come with
//! an answer land in the caller's runs. What comes with an answer may be read from memory that is not kept still, so the
//! caller verifies checksums before it believes it.
//!
//! A call whose connection breaks may be made twice, so calls must be idempotent.
//!
//! Elsewhere: what calls mean (`kv-store`), the wire (`tcp.rs`).

use std::num::NonZeroU64;
use std::sync::Arc;

use futures::future::BoxFuture;
use types::{Checksum, Epoch, Memory};

use crate::TransferError;
use crate::transport::{Keep, RegionId};

/// Bytes of a message or an answer. What is larger belongs into gRPC.
pub const MESSAGE_BYTES_MAX: usize = 56 << 10;
/// Bytes that one call moves.
pub const CALL_BYTES_MAX: u64 = 1 << 26;

/// A question to a peer.
#[derive(Debug, Clone)]
pub struct Call {
    /// Where the peer's transport listens.
    pub endpoint: String,
    /// The incarnation that is meant. Another one refuses the call.
    pub epoch: Epoch,
    /// The question, at most [`MESSAGE_BYTES_MAX`].
    pub message: Vec<u8>,
    /// What is to be moved.
    pub payload: Payload,
}

/// What a call moves, at most [`CALL_BYTES_MAX`].
#[derive(Debug, Clone)]
pub enum Payload {
    /// Nothing.
    None,
    /// These bytes of a local region go with the call.
    Send {
        /// The local memory.
        region: RegionId,
        /// Offset and length of each run, in bytes.
        runs: Vec<(u64, u64)>,
    },
    /// Bytes that come with the answer go here, from the first run on, as far as they reach.
    Receive {
        /// The local memory.
        region: RegionId,
        /// Offset and length of each run, in bytes.
        runs: Vec<(u64, u64)>,
        /// What keeps the runs from being used otherwise, as in [`crate::TransferBatch`].
        keep: Keep,
        /// Of how many bytes each the caller wants checksums, as in [`crate::Transport::read_hashed`].
        unit_bytes: Option<NonZeroU64>,
    },
}

impl Call {
    /// Refuses what is larger than calls may be.
    pub(crate) fn check(&self) -> Result<(), TransferError> {
        let runs = match &self.payload {
            Payload::None => &[][..],
            Payload::Send { runs, .. } | Payload::Receive { runs, .. } => runs,
        };
        let sizes = [
            ("message", self.message.len() as u64, MESSAGE_BYTES_MAX as u64),
            ("payload", total(runs), CALL_BYTES_MAX),
        ];
        match sizes.into_iter().find(|(_, bytes, limit)| bytes > limit) {
            None => Ok(()),
            Some((what, bytes, limit)) => Err(TransferError::TooLarge { what, bytes, limit }),
        }
    }
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// The answer.
    pub message: Vec<u8>,
    /// Bytes that came with it.
    pub received_bytes: u64,
    /// What moved the bytes: `tcp`, `ucx` or `mem`.
    pub mover: &'static str,
    /// Of the first of them, if they were asked for and this processor copied the bytes; or none.
    pub checksums: Vec<Checksum>,
}

/// Whoever answers the calls of peers.
pub trait Calls: Send + Sync {
    /// Answers a call with which `payload_bytes` come. Must be idempotent, and end in less than the transport's request
    /// timeout.
    fn call(&self, message: &[u8], payload_bytes: u64) -> BoxFuture<'static, Reply>;
}

/// How a call is answered.
pub enum Reply {
    /// With a message. Bytes that came with the call are thrown away.
    Answer(Vec<u8>),
    /// The call's bytes go there; then with a message.
    Take {
        /// Where the first bytes go; what it has no room for is thrown away.
        into: Place,
        /// Called when they are there, with checksums of the first of them, or none. Dropped without if they did not come, and then nothing writes there any more.
        landed: Landed,
    },
    /// With a message and these bytes, no more than the caller has room for.
    Give {
        /// The answer.
        message: Vec<u8>,
        /// What comes with it.
        from: Place,
    },
}

/// Makes the answer once a call's bytes are where they belong.
pub type Landed = Box<dyn FnOnce(Vec<Checksum>) -> BoxFuture<'static, Vec<u8>> + Send>;

/// Bytes of the called node.
pub struct Place {
    /// The memory.
    pub memory: Arc<dyn Memory>,
    /// Offset and length of each run, in bytes.
    pub runs: Vec<(u64, u64)>,
    /// What keeps the runs. The transport drops it before it calls [`Landed`].
    pub keep: Keep,
    /// Where bytes are taken: of how many each the taker wants checksums, as in [`crate::Transport::read_hashed`].
    pub unit_bytes: Option<NonZeroU64>,
}

impl Place {
    /// Bytes of all runs.
    pub fn len(&self) -> u64 {
        total(&self.runs)
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Bytes of all runs; saturates, so that what overflows is refused as too much.
pub(crate) fn total(runs: &[(u64, u64)]) -> u64 {
    runs.iter()
        .fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes))
}

/// Pairs two lists of runs byte by byte, as `(from, to, bytes)`, until one of them ends.
pub(crate) fn pair(from: &[(u64, u64)], to: &[(u64, u64)]) -> Vec<(u64, u64, u64)> {
    let some = |run: &(u64, u64)| run.1 > 0;
    let (mut sources, mut targets) = (from.iter().copied().filter(some), to.iter().copied().filter(some));
    let (mut source, mut target) = (sources.next(), targets.next());
    let mut pairs = Vec::with_capacity(from.len().max(to.len()));
    while let (Some((from, has)), Some((to, room))) = (source, target) {
        let bytes = has.min(room);
        pairs.push((from, to, bytes));
        let rest = |at: u64, left: u64| (left > bytes).then(|| (at + bytes, left - bytes));
        source = rest(from, has).or_else(|| sources.next());
        target = rest(to, room).or_else(|| targets.next());
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_paired_byte_by_byte() {
        let pairs = pair(&[(0, 4), (10, 0), (20, 4)], &[(100, 3), (200, 5)]);
        assert_eq!(pairs, [(0, 100, 3), (3, 200, 1), (20, 201, 4)]);
        assert_eq!(
            pair(&[(0, 9)], &[(5, 2)]),
            [(0, 5, 2)],
            "it ends with the shorter one"
        );
        assert_eq!(pair(&[], &[(5, 2)]), []);
        assert_eq!(total(&[(0, u64::MAX), (0, 2)]), u64::MAX);
    }
}
