//! What a disk tier counts: `perigee_kvstore_disk_…`. All zero on a node without one.

use std::fmt::Debug;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

use crate::disk::Disk;
use crate::disk::table::DiskTable;

/// The metrics of one disk tier.
#[derive(Debug)]
pub(crate) struct DiskMetrics {
    capacity: Gauge,
    stored: Gauge,
    readable: Gauge,
    writable: Gauge,
    pub(crate) read_blocks: Counter,
    pub(crate) read_bytes: Counter,
    pub(crate) written_blocks: Counter,
    pub(crate) written_bytes: Counter,
    pub(crate) evicted_blocks: Counter,
    pub(crate) errors: Counter,
    pub(crate) corruptions: Counter,
    pub(crate) promotions_cut: Counter,
}

impl DiskMetrics {
    pub(crate) fn register(metrics: &node::Metrics) -> Self {
        let gauge = |name, help| metrics.register(name, help, Gauge::<i64>::default());
        let count = |name, help| metrics.register(name, help, Counter::<u64>::default());
        Self {
            capacity: gauge("perigee_kvstore_disk_capacity_blocks", "Slots of the disk tier"),
            stored: gauge("perigee_kvstore_disk_blocks", "Blocks on disk"),
            readable: gauge(
                "perigee_kvstore_disk_readable",
                "1 while blocks are read from disk, 0 while it is bypassed or absent",
            ),
            writable: gauge(
                "perigee_kvstore_disk_writable",
                "1 while blocks are written to disk, 0 while it is full, bypassed or absent",
            ),
            read_blocks: count("perigee_kvstore_disk_read_blocks", "Blocks promoted from disk"),
            read_bytes: count(
                "perigee_kvstore_disk_read_bytes",
                "Bytes of KV promoted from disk",
            ),
            written_blocks: count("perigee_kvstore_disk_written_blocks", "Blocks offloaded to disk"),
            written_bytes: count(
                "perigee_kvstore_disk_written_bytes",
                "Bytes of KV offloaded to disk",
            ),
            evicted_blocks: count(
                "perigee_kvstore_disk_evicted_blocks",
                "Blocks that left the disk to make room",
            ),
            errors: count(
                "perigee_kvstore_disk_errors",
                "Reads and writes of blocks that the disk refused",
            ),
            corruptions: count(
                "perigee_kvstore_disk_corruptions",
                "Blocks on disk whose bytes did not match their checksum",
            ),
            promotions_cut: count(
                "perigee_kvstore_disk_promotions_cut",
                "Promotions that ended before all blocks had come: for want of time or memory, or by a failure",
            ),
        }
    }

    pub(crate) fn set_counts(&self, disk: &DiskTable) {
        let counts = disk.counts();
        self.capacity
            .set(i64::try_from(counts.capacity).unwrap_or(i64::MAX));
        self.stored.set(i64::try_from(counts.stored).unwrap_or(i64::MAX));
    }

    pub(crate) fn set_health(&self, disk: &Disk) {
        self.readable.set(i64::from(disk.is_readable()));
        self.writable.set(i64::from(disk.is_writable()));
    }
}
