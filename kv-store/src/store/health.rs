//! Whether a node's memory can be trusted, and looking at its blocks to find out.

use std::sync::atomic::Ordering;
use std::time::Instant;

use types::{BlockDescriptor, BlockHash};

use super::{Store, now};

impl Store {
    /// Whether this node's memory has changed blocks so often that it neither caches nor gives any. Only a restart ends it.
    pub fn is_quarantined(&self) -> bool {
        self.inner.quarantined.load(Ordering::Relaxed)
    }

    /// Counts a cached block whose bytes changed, and quarantines the node after too many.
    pub(crate) fn note_corrupt(&self, now: Instant) {
        self.inner.metrics.corruptions.inc();
        let mut health = self
            .inner
            .health
            .lock()
            .expect("nothing panics while it counts corrupt blocks");
        if health.corrupt(now) && !self.inner.quarantined.swap(true, Ordering::Relaxed) {
            self.inner.metrics.quarantined.set(1);
            tracing::error!(
                "this node's memory changed too many blocks: it caches and gives none until it is restarted"
            );
        }
    }

    /// Pins one block to look at it, which is no use of it.
    pub(crate) fn inspect<R>(&self, hash: BlockHash, look: impl FnOnce(&BlockDescriptor) -> R) -> Option<R> {
        let held = self.with_table(|table| table.pin_run(&[hash]).pop())?;
        let result = look(&held);
        self.with_table(|table| table.unpin_unused(held.block, now()));
        Some(result)
    }
}
