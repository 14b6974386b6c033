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

/// Reads a message of a request or an answer.
pub(super) fn read<M: Message + Default>(bytes: &[u8]) -> Result<M, WireError> {
    M::decode(bytes).map_err(|_| WireError::Message)
}

/// Whether a message is small enough to be sent.
pub(super) fn fits(message: &impl Message) -> bool {
    message.encoded_len() <= EXTRA_BYTES_MAX
}
