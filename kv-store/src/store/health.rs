//! Whether a node takes blocks: whether its memory can be trusted, looking at its blocks to find out, and draining.

use std::sync::atomic::Ordering;
use std::time::Instant;

use types::{BlockDescriptor, BlockHash, Error};

use super::{Store, now};

impl Store {
    /// Whether this node's memory has changed blocks so often that it neither caches nor gives any. Only a restart ends it.
    pub fn is_quarantined(&self) -> bool {
        self.inner.quarantined.load(Ordering::Relaxed)
    }

    /// Whether this node was told to take nothing new. What it has is read as ever.
    pub fn is_draining(&self) -> bool {
        self.inner.draining.load(Ordering::Relaxed)
    }

    /// Takes nothing new from writers and peers, or takes it again. The engine's own blocks are cached in either case.
    pub fn set_draining(&self, draining: bool) {
        self.inner.draining.store(draining, Ordering::Relaxed);
    }

    /// Refuses what would bring new blocks to a node that drains.
    pub(crate) fn check_takes(&self) -> Result<(), Error> {
        if self.is_draining() {
            return Err(Error::unavailable("the node is draining and takes no new blocks"));
        }
        Ok(())
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
