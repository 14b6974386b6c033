//! What a store counts: `perigee_kvstore_…`.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use crate::cooperate::Reason;
use crate::table::Counts;

mod disk;
mod object;
mod tenants;

pub(crate) use disk::DiskMetrics;
pub(crate) use object::ObjectMetrics;
pub(crate) use tenants::TenantMetrics;

/// The metrics of one store. Every slot of the pool is in exactly one of the states.
#[derive(Debug)]
pub(crate) struct Metrics {
    free: Gauge,
    owned: Gauge,
    pinned: Gauge,
    idle: Gauge,
    leases: Gauge,
    pub(crate) hit_blocks: Counter,
    pub(crate) missed_blocks: Counter,
    pub(crate) evicted_blocks: Counter,
    pub(crate) corruptions: Counter,
    pub(crate) fetched_blocks: Counter,
    pub(crate) fetched_bytes: Counter,
    pub(crate) fetch_failures: Counter,
    pub(crate) leases_expired: Counter,
    pub(crate) reservations_expired: Counter,
    pub(crate) watch_snapshots: Counter,
    pub(crate) disk: DiskMetrics,
    pub(crate) object: ObjectMetrics,
    pub(crate) tenants: TenantMetrics,
    pub(crate) quarantined: Gauge,
    pub(crate) scrubbed_bytes: Counter,
    pub(crate) offered_blocks: Counter,
    pub(crate) given_blocks: Counter,
    pub(crate) taken_blocks: Counter,
    pub(crate) peer_failures: Counter,
    dropped: Family<ReasonLabel, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

impl Metrics {
    pub(crate) fn register(metrics: &node::Metrics) -> Self {
        let states = metrics.register(
            "perigee_kvstore_blocks",
            "Slots of the pool: free, owned by a writer, cached and pinned, cached and idle",
            Family::<StateLabel, Gauge>::default(),
        );
        let of = |state| states.get_or_create_owned(&StateLabel { state });
        let count = |name, help| metrics.register(name, help, Counter::<u64>::default());
        let dropped = metrics.register(
            "perigee_kvstore_dropped_blocks",
            "Blocks dropped ahead of need, by why they were not offered to a peer",
            Family::<ReasonLabel, Counter>::default(),
        );
        for reason in Reason::ALL {
            // So that all of them show from the start.
            let _ = dropped.get_or_create_owned(&ReasonLabel {
                reason: reason.as_str(),
            });
        }
        Self {
            free: of("free"),
            owned: of("owned"),
            pinned: of("pinned"),
            idle: of("idle"),
            leases: metrics.register(
                "perigee_kvstore_leases",
                "Leases that readers hold",
                Gauge::default(),
            ),
            hit_blocks: count("perigee_kvstore_hit_blocks", "Blocks asked for and held"),
            missed_blocks: count("perigee_kvstore_missed_blocks", "Blocks asked for and not held"),
            evicted_blocks: count("perigee_kvstore_evicted_blocks", "Blocks evicted to make room"),
            corruptions: count(
                "perigee_kvstore_corruptions",
                "Blocks whose bytes did not match their checksum",
            ),
            fetched_blocks: count("perigee_kvstore_fetched_blocks", "Blocks fetched from peers"),
            fetched_bytes: count("perigee_kvstore_fetched_bytes", "Bytes of KV fetched from peers"),
            fetch_failures: count(
                "perigee_kvstore_fetch_failures",
                "Peers that did not give what they were asked for",
            ),
            leases_expired: count("perigee_kvstore_leases_expired", "Leases that readers let expire"),
            reservations_expired: count(
                "perigee_kvstore_reservations_expired",
                "Reservations that writers let expire",
            ),
            watch_snapshots: count(
                "perigee_kvstore_watch_snapshots",
                "Snapshots of the log sent to watchers",
            ),
            quarantined: metrics.register(
                "perigee_kvstore_quarantined",
                "1 if the node's memory changed blocks too often, so that it neither caches nor gives any",
                Gauge::default(),
            ),
            scrubbed_bytes: count(
                "perigee_kvstore_scrubbed_bytes",
                "Bytes of cached blocks verified in the background",
            ),
            offered_blocks: count(
                "perigee_kvstore_offered_blocks",
                "Blocks offered to peers instead of being dropped",
            ),
            given_blocks: count("perigee_kvstore_given_blocks", "Blocks that peers took"),
            taken_blocks: count(
                "perigee_kvstore_taken_blocks",
                "Blocks taken from peers that offered them",
            ),
            peer_failures: count(
                "perigee_kvstore_peer_failures",
                "Questions and offers that a peer did not answer in time",
            ),
            dropped,
            disk: DiskMetrics::register(metrics),
            object: ObjectMetrics::register(metrics),
            tenants: TenantMetrics::register(metrics),
        }
    }

    pub(crate) fn count_dropped(&self, reason: &'static str, blocks: usize) {
        let counter = self.dropped.get_or_create_owned(&ReasonLabel { reason });
        counter.inc_by(blocks as u64);
    }

    pub(crate) fn set_counts(&self, counts: Counts) {
        let Counts {
            capacity: _,
            free,
            owned,
            cached,
            pinned,
            reclaimable: _,
            leases,
        } = counts;
        let set = |gauge: &Gauge, value: usize| {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set(&self.free, free);
        set(&self.owned, owned);
        set(&self.pinned, pinned);
        set(&self.idle, cached - pinned);
        set(&self.leases, leases);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_show_under_their_names() {
        let page = node::Metrics::new();
        let metrics = Metrics::register(&page);
        metrics.set_counts(Counts {
            capacity: 10,
            free: 4,
            owned: 1,
            cached: 5,
            pinned: 2,
            reclaimable: 3,
            leases: 1,
        });
        metrics.fetched_bytes.inc_by(12);
        let text = page.encode();
        for line in [
            "perigee_kvstore_blocks{state=\"free\"} 4",
            "perigee_kvstore_blocks{state=\"owned\"} 1",
            "perigee_kvstore_blocks{state=\"pinned\"} 2",
            "perigee_kvstore_blocks{state=\"idle\"} 3",
            "perigee_kvstore_leases 1",
            "perigee_kvstore_fetched_bytes_total 12",
            "perigee_kvstore_hit_blocks_total 0",
            "perigee_kvstore_corruptions_total 0",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is missing in\n{text}"
            );
        }
    }
}
