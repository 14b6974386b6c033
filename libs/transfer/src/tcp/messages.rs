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
    pub(super) workers: Option<Workers>,
    /// Memory of it, for a look at how it can be reached.
    #[prost(message, optional, tag = "4")]
    pub(super) memory: Option<Exposure>,
    /// Use UCX for this pair even if it only offers TCP.
    #[prost(bool, tag = "5")]
    pub(super) forced: bool,
    /// Equal on nodes that may be able to map each other's memory; empty if that is not known.
    #[prost(string, tag = "6")]
    pub(super) host: String,
}

/// Addresses of a node's UCX workers. Empty where there is none.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Workers {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) shared: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) network: Vec<u8>,
}

/// The answer to an introduction.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Introduced {
    /// Names the link in later requests. 0: there is none, and bytes go over TCP.
    #[prost(uint64, tag = "1")]
    pub(super) link: u64,
    /// Those of the server.
    #[prost(message, optional, tag = "2")]
    pub(super) workers: Option<Workers>,
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
    pub(super) memory: Option<Exposure>,
    /// Offset in that memory of each slice, in the order of the table.
    #[prost(uint64, repeated, tag = "3")]
    pub(super) offsets: Vec<u64>,
}

/// Of `Admit`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Visit {
    #[prost(uint64, tag = "1")]
    pub(super) link: u64,
}

/// How memory is reached through UCX. Also the answer to `Admit`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Exposure {
    /// Address of the first byte, in the owner's process.
    #[prost(fixed64, tag = "1")]
    pub(super) base: u64,
    #[prost(uint64, tag = "2")]
    pub(super) bytes: u64,
    /// UCX's packed keys, as in [`Exposed`].
    #[prost(bytes = "vec", tag = "3")]
    pub(super) shared_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) network_key: Vec<u8>,
}

impl From<&Addresses> for Workers {
    fn from(addresses: &Addresses) -> Self {
        let Addresses { shared, network } = addresses.clone();
        Self { shared, network }
    }
}

impl From<Workers> for Addresses {
    fn from(workers: Workers) -> Self {
        let Workers { shared, network } = workers;
        Self { shared, network }
    }
}

impl From<Exposed> for Exposure {
    fn from(exposed: Exposed) -> Self {
        let Exposed {
            base,
            bytes,
            shared_key,
            network_key,
        } = exposed;
        Self {
            base,
            bytes,
            shared_key,
            network_key,
        }
    }
}

impl From<Exposure> for Exposed {
    fn from(exposure: Exposure) -> Self {
        let Exposure {
            base,
            bytes,
            shared_key,
            network_key,
        } = exposure;
        Self {
            base,
            bytes,
            shared_key,
            network_key,
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
