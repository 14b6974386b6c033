//! KV blocks: table, tiers, leases, eviction, log, and the service that shares them.
