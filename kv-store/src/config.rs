//! What can be set of a store, with the defaults and their reasons.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use crate::policy::Eviction;

/// Bounds and times of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Longest lease that a reader gets, whatever it asks for.
    pub lease_ttl_max: Duration,
    /// Leases open at a time.
    pub leases_max: usize,
    /// Longest time between a writer's `Reserve` and `Commit`, whatever it asks for.
    pub reservation_ttl_max: Duration,
    /// Reservations open at a time.
    pub reservations_max: usize,
    /// How often leases and reservations are checked for their end; at least 1 ms.
    pub expiry_interval: Duration,
    /// Blocks that one `Acquire` or `Reserve` may name.
    pub hashes_max: usize,
    /// Entries of the log that are kept, at least 1, for watchers to resume from.
    pub log_entries_max: usize,
    /// Events in one message of the log, at least 1: all that is buffered for one watcher.
    pub watch_buffer_events: usize,
    /// Watchers at a time.
    pub watchers_max: usize,
    /// Fetches from peers at a time, over all requests of this node; at least 1.
    pub fetches_max: usize,
    /// Bytes that one fetch has in flight: what is lost when the peer dies.
    pub fetch_batch_bytes: u64,
    /// Prefixes that are read from disk ahead of their request at a time.
    pub prefetches_max: usize,
    /// Longest wait for a peer's answer to `Acquire`.
    pub acquire_timeout: Duration,
    /// Which block goes when memory is short.
    pub eviction: Eviction,
    /// Bytes per second that the node gives to peers instead of dropping them, and as many that it takes; 0 does neither.
    pub cooperation_bytes_per_second: u64,
    /// Nodes that hold a block beyond which moves between them make no copy more of it; at least 1.
    pub copies_max: usize,
    /// Longest wait for a peer that takes what it was offered.
    pub offer_timeout: Duration,
    /// Longest time for which a node that ends gives its blocks to its peers.
    pub handover_timeout: Duration,
    /// Prefixes that are pinned at a time. Together they hold at most half of the pool.
    pub pins_max: usize,
    /// Bytes per second that are verified in the background; 0 verifies none.
    pub scrub_bytes_per_second: u64,
    /// Bytes of blocks that a tenant may have in the pool, unless `tenants` says otherwise; 0 is no bound.
    pub tenant_bytes_max: u64,
    /// Limits of single tenants, by name; the empty one is what has no tenant.
    pub tenants: BTreeMap<String, TenantConfig>,
}

/// What one tenant may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantConfig {
    /// Bytes of its blocks in the pool; `None` is [`Config::tenant_bytes_max`], 0 is no bound.
    pub bytes_max: Option<u64>,
    /// Its part of the pool when memory is short, beside the weights of the other tenants with blocks.
    pub weight: NonZeroU32,
}

impl Default for TenantConfig {
    fn default() -> Self {
        Self {
            bytes_max: None,
            // Tenants that nobody wrote anything about weigh as much.
            weight: NonZeroU32::MIN,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            // A fetch of a million-token prefix over 10 Gbit/s ends within it.
            lease_ttl_max: Duration::from_secs(60),
            // Far more than there are requests in flight; some KiB each.
            leases_max: 4096,
            // Writers put what they have at hand.
            reservation_ttl_max: Duration::from_secs(30),
            // Each one holds a grant of the transport.
            reservations_max: 256,
            // Small against every sensible lease, and nothing against the cost of one check.
            expiry_interval: Duration::from_millis(100),
            // A prompt of half a million tokens at 32 tokens per block.
            hashes_max: 16 * 1024,
            // A watcher that was away while 64 Ki blocks changed is as well served by a snapshot. Some 4 MiB.
            log_entries_max: 64 * 1024,
            // About 50 KiB on the wire.
            watch_buffer_events: 1024,
            // Routers and people who look.
            watchers_max: 64,
            // Enough to fill a link; more would only make all of them later.
            fetches_max: 16,
            // Some milliseconds at 10 Gbit/s, and large against a round trip.
            fetch_batch_bytes: 16 << 20,
            // Hints beyond it would only make the disk slower for those that are here.
            prefetches_max: 16,
            // A peer that needs longer is no faster than computing.
            acquire_timeout: Duration::from_secs(2),
            // What hits most on all traces we know: see docs/eviction.md.
            eviction: Eviction::Returns,
            // A fifth of 10 Gbit/s: requests' own transfers keep the rest.
            cooperation_bytes_per_second: 256 << 20,
            // As many as a pin may want. A lower one keeps nodes that lack a common beginning from taking anything: docs/cooperation.md.
            copies_max: 64,
            // What one second brings is offered at a time; a peer that is slower than that is not worth waiting for.
            offer_timeout: Duration::from_secs(2),
            // Within the grace that supervisors give before they kill.
            handover_timeout: Duration::from_secs(5),
            // People pin system prompts and documents, by hand.
            pins_max: 256,
            // A pool of 64 GiB in about an hour, for less than 1 % of a core.
            scrub_bytes_per_second: 16 << 20,
            // A pool that others leave unused is better filled; shares keep them apart when it is short.
            tenant_bytes_max: 0,
            tenants: BTreeMap::new(),
        }
    }
}
