//! One watcher of the log: what it is sent next.

use proto::v1;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use types::Epoch;

use crate::log::{Batch, Resume};
use crate::store::Store;

/// Where a watcher is in the log. Nothing is kept for it while it does not ask, but the rest of a snapshot it is in.
pub(super) struct Watcher {
    store: Store,
    shutdown: CancellationToken,
    changes: watch::Receiver<u64>,
    /// The parts of a snapshot that are still to be sent.
    snapshot: Box<dyn Iterator<Item = Batch> + Send>,
    /// First entry that it has not been sent.
    next: u64,
    _permit: OwnedSemaphorePermit,
}

impl Watcher {
    pub(super) fn new(
        store: &Store,
        shutdown: CancellationToken,
        permit: OwnedSemaphorePermit,
        request: &v1::WatchRequest,
    ) -> Self {
        let known = Epoch(request.epoch) == store.epoch();
        Self {
            changes: store.changes(),
            store: store.clone(),
            shutdown,
            snapshot: Box::new(std::iter::empty()),
            // No entry has number 0, so that is answered with a snapshot.
            next: if known { request.from_sequence } else { 0 },
            _permit: permit,
        }
    }

    /// What can be sent without waiting.
    pub(super) fn ready(&mut self) -> Option<Batch> {
        if let Some(part) = self.snapshot.next() {
            return Some(part);
        }
        // Before looking, so that no change is missed between looking and waiting.
        self.changes.borrow_and_update();
        let events_max = self.store.config().watch_buffer_events.max(1);
        let resumed = self.store.table().log().since(self.next, events_max);
        match resumed {
            Resume::Entries(entries) => {
                let batch = Batch::of_entries(self.store.epoch(), &entries)?;
                self.next = batch.sequence + 1;
                Some(batch)
            }
            Resume::SnapshotNeeded => {
                let draft = self.store.table().snapshot();
                let snapshot = draft.finish();
                self.store.inner().metrics.watch_snapshots.inc();
                self.next = snapshot.sequence + 1;
                self.snapshot = Box::new(snapshot.into_batches(self.store.epoch(), events_max));
                self.snapshot.next()
            }
        }
    }
}

/// The step of the watcher's stream. `None`, the end, comes with shutdown only.
pub(super) async fn next_batch(mut watcher: Watcher) -> Option<(Result<v1::LogBatch, Status>, Watcher)> {
    while !watcher.shutdown.is_cancelled() {
        if let Some(batch) = watcher.ready() {
            return Some((Ok(batch.to_wire()), watcher));
        }
        tokio::select! {
            () = watcher.shutdown.cancelled() => {}
            // The store that holds the sender is held by the watcher.
            _ = watcher.changes.changed() => {}
        }
    }
    None
}
