//! What follows a request's table, or answers it, where UCX takes part: protobuf messages of at most 64 KiB.

use prost::Message;

use super::wire::{EXTRA_BYTES_MAX, WireError};
use crate::ucx::{Addresses, Exposed};

/// Of `Introduce`: where UCX finds the client.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Introduction {
    /// Endpoint of the client's own server: who it is.
    #[prost(string, tag = "1")]
    pub(super) endpoint: String,
    /// Its incarnation.
    #[prost(uint64, tag = "2")]
    pub(super) epoch: u64,
    #[prost(message, optional, tag = "3")]
    pub(super) workers: Option<Addresses>,
    /// Memory of it, for a look at how it can be reached.
    #[prost(message, optional, tag = "4")]
    pub(super) memory: Option<Exposed>,
    /// Use UCX for this pair even if it only offers TCP.
    #[prost(bool, tag = "5")]
    pub(super) forced: bool,
    /// Equal on nodes that may be able to map each other's memory; empty if that is not known.
    #[prost(string, tag = "6")]
    pub(super) host: String,
}

/// The answer to an introduction.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Introduced {
    /// Names the link in later requests. 0: there is none, and bytes go over TCP.
    #[prost(uint64, tag = "1")]
    pub(super) link: u64,
    /// Those of the server.
    #[prost(message, optional, tag = "2")]
    pub(super) workers: Option<Addresses>,
    /// Whether it is by mapping each other's memory; by a network otherwise.
    #[prost(bool, tag = "5")]
    pub(super) shared: bool,
    /// What UCX uses between the two.
    #[prost(string, repeated, tag = "3")]
    pub(super) lanes: Vec<String>,
    /// Why there is no link.
    #[prost(string, tag = "4")]
    pub(super) obstacle: String,
}

/// Of `Fetch`: where the client has the bytes.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Source {
    #[prost(uint64, tag = "1")]
    pub(super) link: u64,
    #[prost(message, optional, tag = "2")]
    pub(super) memory: Option<Exposed>,
    /// Offset in that memory of each slice, in the order of the table.
    #[prost(uint64, repeated, tag = "3")]
    pub(super) offsets: Vec<u64>,
}

/// Of `Admit`. Its answer is an [`Exposed`].
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Visit {
    #[prost(uint64, tag = "1")]
    pub(super) link: u64,
}

/// Of `Call`: the message, and where UCX finds what comes with it.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Question {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) message: Vec<u8>,
    /// The link through which bytes go, either way. 0: they come in line.
    #[prost(uint64, tag = "2")]
    pub(super) link: u64,
    /// Where the client has the bytes that come with the call, if they do not come in line.
    #[prost(message, optional, tag = "3")]
    pub(super) place: Option<Runs>,
    /// Bytes that the client has room for.
    #[prost(uint64, tag = "4")]
    pub(super) room_bytes: u64,
}

/// The answer to a call.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Response {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) message: Vec<u8>,
    /// Where the server has the bytes that come with it, if they do not come in line.
    #[prost(message, optional, tag = "2")]
    pub(super) place: Option<Runs>,
}

/// Runs of bytes of some memory.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Runs {
    #[prost(message, optional, tag = "1")]
    pub(super) memory: Option<Exposed>,
    #[prost(uint64, repeated, tag = "2")]
    pub(super) offsets: Vec<u64>,
    #[prost(uint64, repeated, tag = "3")]
    pub(super) lengths: Vec<u64>,
}

impl Runs {
    pub(super) fn new(memory: Exposed, runs: &[(u64, u64)]) -> Self {
        Self {
            memory: Some(memory),
            offsets: runs.iter().map(|(offset, _)| *offset).collect(),
            lengths: runs.iter().map(|(_, bytes)| *bytes).collect(),
        }
    }

    /// The memory and the runs, offset and length of each.
    pub(super) fn take(self) -> Result<(Exposed, Vec<(u64, u64)>), WireError> {
        match self.memory {
            Some(memory) if self.offsets.len() == self.lengths.len() => {
                Ok((memory, self.offsets.into_iter().zip(self.lengths).collect()))
            }
            _ => Err(WireError::Message),
        }
    }
}

/// Reads a message of a request or an answer.
pub(super) fn read<M: Message + Default>(bytes: &[u8]) -> Result<M, WireError> {
    M::decode(bytes).map_err(|_| WireError::Message)
}

/// Whether a message is small enough to be sent.
pub(super) fn fits(message: &impl Message) -> bool {
    message.encoded_len() <= EXTRA_BYTES_MAX
}
