//! KV blocks: which ones a node holds, who uses them, and how nodes share them.
//!
//! Every node embeds a [`Store`] over its own pool and is the only authority on it; `perigee store` is one without
//! an engine. Nobody has a list of all blocks: each node's log tells its changes, and whoever wants an
//! index follows the logs.
//!
//! Architecture invariants:
//! - a block is found under a hash only if it is complete, and then never written again;
//! - a reader of another node's memory believes only bytes that match their checksum: what it cannot get or not
//!   verify is a miss, never a wrong token;
//! - memory that a peer may write comes back through the transport's fence, never by a clock.
//!
//! Where things are, the pure modules first:
//! - [`table`]: slots, hashes, pins, leases, tenants; [`policy`]: what is evicted; [`replay`]: how well; [`expiring`]: promises that end by themselves;
//! - [`cooperate`]: which blocks go to a peer instead of being dropped;
//! - [`log`] and [`follower`]: the numbered log and its reader's side;
//! - [`disk`]: the disk tier's own table, files and breaker; [`object`]: the bucket's segments and requests; `tiers.rs`: what moves between
//!   the pool and what is below it;
//! - [`store`]: the table and the bytes behind one handle, with guards; [`sequence`]: the blocks of one sequence;
//! - [`service`]: what peers may ask; [`fetch`]: asking peers;
//! - [`Cache`]: what peers and people may ask beside; [`Exchange`]: giving blocks to peers, in the background, together with the
//!   verification of blocks (`scrub.rs`);
//! - [`transfers`]: how bytes move, for people: a description, metrics, and tests through the real path; [`probe`]: what such
//!   a test moves, and its figures;
//! - [`store_node`]: what `perigee store` runs.
//!
//! Elsewhere: moving bytes (`transfer`), what the bytes mean (`engine`), which peer to ask (`router`).

mod cache;
pub mod config;
pub mod cooperate;
mod digest;
pub mod disk;
mod exchange;
pub mod expiring;
pub mod fetch;
pub mod follower;
pub mod log;
mod metrics;
pub mod object;
pub mod policy;
pub mod probe;
pub mod replay;
mod roots;
mod scrub;
pub mod sequence;
pub mod service;
pub mod store;
pub mod store_node;
pub mod table;
mod tiers;
pub mod transfers;

pub use cache::Cache;
pub use config::{Config, TenantConfig};
pub use exchange::Exchange;
pub use fetch::{Fetch, FetchOutcome, Source, fetch_prefix, promote_prefix};
pub use follower::Follower;
pub use policy::Eviction;
pub use sequence::SequenceBlocks;
pub use service::Service;
pub use store::{BlockPin, Corrupt, Grant, Landed, OwnedBlock, Stats, Store, StoreError, Tenant};
pub use table::{OutOfBlocks, Victim};

#[cfg(test)]
mod testing;
