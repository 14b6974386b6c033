//! The wire contract: generated code, and the conversion between wire and domain.
//!
//! The receiver validates: what comes out of `convert` can be trusted, what is in [`v1`] cannot.

pub mod convert;
pub mod span;
pub mod status;
pub mod trace;

/// Generated from `perigee/v1/*.proto`, which document every message.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::disallowed_methods
)]
pub mod v1 {
    tonic::include_proto!("perigee.v1");
}

/// The encoded `FileDescriptorSet` of the contract, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/perigee.bin"));

/// Largest message accepted: a prompt of a million tokens is some 4 MiB, and KV never travels by gRPC.
pub const MESSAGE_BYTES_MAX: usize = 32 << 20;
