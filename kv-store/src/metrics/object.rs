//! What an object tier counts: `perigee_kvstore_object_…`. All zero on a node without one.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

/// The metrics of one object tier.
#[derive(Debug)]
pub(crate) struct ObjectMetrics {
    pub(crate) usable: Gauge,
    pub(crate) read_segments: Counter,
    pub(crate) read_blocks: Counter,
    pub(crate) read_bytes: Counter,
    pub(crate) missed_segments: Counter,
    pub(crate) written_segments: Counter,
    pub(crate) written_bytes: Counter,
    pub(crate) errors: Counter,
    pub(crate) corruptions: Counter,
    pub(crate) promotions_cut: Counter,
}

impl ObjectMetrics {
    pub(crate) fn register(metrics: &node::Metrics) -> Self {
        let count = |name, help| metrics.register(name, help, Counter::<u64>::default());
        Self {
            usable: metrics.register(
                "perigee_kvstore_object_usable",
                "1 while the bucket is used, 0 while it is bypassed or absent",
                Gauge::<i64>::default(),
            ),
            read_segments: count(
                "perigee_kvstore_object_read_segments",
                "Segments promoted from the bucket",
            ),
            read_blocks: count(
                "perigee_kvstore_object_read_blocks",
                "Blocks promoted from the bucket",
            ),
            read_bytes: count(
                "perigee_kvstore_object_read_bytes",
                "Bytes of KV promoted from the bucket",
            ),
            missed_segments: count(
                "perigee_kvstore_object_missed_segments",
                "Segments that the bucket was asked for and did not have",
            ),
            written_segments: count(
                "perigee_kvstore_object_written_segments",
                "Segments written to the bucket",
            ),
            written_bytes: count(
                "perigee_kvstore_object_written_bytes",
                "Bytes written to the bucket",
            ),
            errors: count(
                "perigee_kvstore_object_errors",
                "Requests that the bucket refused or did not answer in time",
            ),
            corruptions: count(
                "perigee_kvstore_object_corruptions",
                "Objects that were not the segment that their name says",
            ),
            promotions_cut: count(
                "perigee_kvstore_object_promotions_cut",
                "Promotions from the bucket that ended for want of time",
            ),
        }
    }
}
