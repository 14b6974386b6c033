//! One-sided memory transfers: a peer writes straight into memory that was granted to it, or reads memory
//! that was exposed, and the owner's code takes no part.
//!
//! Invariant, **the fence**: memory is touched for a peer only while the grant that allows it is open, and
//! [`Transport::revoke`] returns only when it is closed and nobody touches the memory any more. So a
//! receiver may reuse memory after `revoke`, however late, slow or hostile the writer is. No clock is involved.
//!
//! ```
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! use std::time::Duration;
//! use tokio::time::Instant;
//! use transfer::{HostMemory, Keep, Slice, TcpTransport, TransferBatch, Transport, memory, tcp};
//! use types::Epoch;
//!
//! let address = "127.0.0.1:0".parse()?;
//! let receiver = TcpTransport::bind(address, Epoch(1), tcp::Config::default()).await?;
//! let pool = HostMemory::allocate(1 << 20)?;
//! let grant = receiver.grant_write(receiver.register(pool.clone())?, vec![4096..8192])?;
//!
//! // `grant` travels to the sender.
//! let sender = TcpTransport::bind(address, Epoch(1), tcp::Config::default()).await?;
//! let source = HostMemory::allocate(4096)?;
//! memory::copy_in(&*source, 0, b"keys and values")?;
//! let slices = vec![Slice { local_offset: 0, remote_offset: 4096, len: 15 }];
//! let batch = TransferBatch { region: sender.register(source)?, remote: grant.clone(), slices, keep: Keep::default() };
//! sender.write(batch, Instant::now() + Duration::from_secs(5)).await?;
//!
//! // The sender says that it is done; the receiver fences and then looks.
//! receiver.revoke(&grant).await;
//! assert_eq!(memory::copy_out(&*pool, 4096, 15)?, b"keys and values");
//! # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
//! ```
//!
//! Where things are:
//! - [`transport`]: the [`Transport`] trait, what travels in an offer, and [`choose`], the seam for more transports;
//! - [`calls`]: a message and bytes to a peer or back, in one round trip;
//! - [`tcp`]: the built-in transport, and the specification of its wire format;
//! - [`mem`]: a deterministic network with seeded faults, for tests;
//! - [`memory`]: memory of this process, and checked copies in and out of any [`types::Memory`];
//! - `region.rs`: which memory is registered, what is granted, and the fence itself (shared by all transports);
//! - `copy.rs`: copies of mapped memory, past the caches or through them;
//! - `digest.rs`: checksums of bytes that are copied here anyway;
//! - `cursor.rs`: the system calls that move bytes between a socket and raw memory.
//!
//! Elsewhere: who may use which block and when (`kv-store`), checksums and generations that tell a reader
//! whether the bytes are what was promised (`kv-store`), the offer and its owner (`decode-node`).
#![allow(unsafe_code)] // Bytes move to and from memory that kernels and peers share; see `cursor` and `memory`.

mod barrier;
pub mod calls;
mod copy;
mod cursor;
mod digest;
pub mod error;
pub mod mem;
pub mod memory;
mod region;
mod split;
pub mod stats;
pub mod tcp;
pub mod transport;
pub mod ucx;

pub use calls::{Answered, Call, Calls, Payload, Place, Reply};
pub use error::TransferError;
pub use mem::{MemNetwork, MemTransport};
pub use memory::{HostMemory, MemoryError};
pub use stats::StatsSnapshot;
pub use tcp::TcpTransport;
pub use transport::{
    Keep, Link, Mover, RegionId, RemoteRegion, Slice, TransferBatch, TransferStats, Transport, choose,
};
