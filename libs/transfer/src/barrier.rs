//! Waiting for all operations that were begun before now.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Numbers operations as they begin and knows which have not ended.
#[derive(Debug, Default)]
pub(crate) struct Barrier {
    open: Mutex<Open>,
    ended: Notify,
}

#[derive(Debug, Default)]
struct Open {
    begun: u64,
    tickets: BTreeSet<u64>,
}

/// An operation in progress, until it is dropped.
pub(crate) struct Ticket {
    barrier: Arc<Barrier>,
    number: u64,
}

impl Barrier {
    pub(crate) fn begin(self: &Arc<Self>) -> Ticket {
        let mut open = self.open();
        open.begun += 1;
        let number = open.begun;
        open.tickets.insert(number);
        Ticket {
            barrier: self.clone(),
            number,
        }
    }

    /// The number of the operation that began last, for [`Barrier::passed`].
    pub(crate) fn mark(&self) -> u64 {
        self.open().begun
    }

    /// Returns when all operations up to `mark` have ended.
    pub(crate) async fn passed(&self, mark: u64) {
        loop {
            let ended = self.ended.notified();
            if self.open().tickets.first().is_none_or(|first| *first > mark) {
                return;
            }
            ended.await;
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.barrier.open().tickets.remove(&self.number);
        self.barrier.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
