//! Which blocks are being fetched at the moment, so that nobody fetches them twice.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use types::BlockHash;

/// The blocks in flight. Bounded by the fetches in flight and the length of their chains.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    by_hash: Mutex<HashMap<BlockHash, watch::Receiver<()>>>,
}

/// Who fetches the first of the hashes that were claimed.
pub(crate) enum Claim {
    /// The caller, and as many of those that follow as nobody else fetches.
    Lead(Flight),
    /// Somebody else.
    Follow(Following),
}

/// The duty to fetch some blocks. Dropping it, also when the fetch is cancelled, wakes those who wait for them.
#[must_use = "dropping it ends the flight"]
pub(crate) struct Flight {
    flights: Arc<Flights>,
    hashes: Vec<BlockHash>,
    /// Never used, only dropped.
    _ended_tx: watch::Sender<()>,
}

/// Waits for a flight of somebody else.
pub(crate) struct Following(watch::Receiver<()>);

impl Flights {
    pub(crate) fn claim(self: &Arc<Self>, hashes: &[BlockHash]) -> Claim {
        let mut by_hash = self.lock();
        if let Some(first) = hashes.first()
            && let Some(flight) = by_hash.get(first)
        {
            return Claim::Follow(Following(flight.clone()));
        }
        let unclaimed = hashes.iter().take_while(|hash| !by_hash.contains_key(*hash));
        let hashes: Vec<BlockHash> = unclaimed.copied().collect();
        let (ended_tx, ended_rx) = watch::channel(());
        by_hash.extend(hashes.iter().map(|hash| (*hash, ended_rx.clone())));
        drop(by_hash);
        Claim::Lead(Flight {
            flights: self.clone(),
            hashes,
            _ended_tx: ended_tx,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<BlockHash, watch::Receiver<()>>> {
        // Entries are independent, so a panic in between leaves nothing half done.
        self.by_hash.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flight {
    /// Blocks to fetch.
    pub(crate) fn len(&self) -> usize {
        self.hashes.len()
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let mut by_hash = self.flights.lock();
        for hash in &self.hashes {
            by_hash.remove(hash);
        }
    }
}

impl Following {
    /// Returns when the flight has ended, whatever it brought.
    pub(crate) async fn ended(mut self) {
        while self.0.changed().await.is_ok() {}
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn hashes(range: std::ops::Range<u8>) -> Vec<BlockHash> {
        range.map(|byte| BlockHash([byte; 16])).collect()
    }

    #[test]
    fn blocks_in_flight_are_claimed_once_and_free_after() {
        let flights = Arc::new(Flights::default());
        let Claim::Lead(middle) = flights.claim(&hashes(3..6)) else {
            panic!("nobody claimed them before");
        };
        let Claim::Lead(front) = flights.claim(&hashes(0..8)) else {
            panic!("the first is unclaimed");
        };
        assert_eq!(
            (middle.len(), front.len()),
            (3, 3),
            "a claim ends where another one begins"
        );
        let Claim::Follow(following) = flights.claim(&hashes(4..5)) else {
            panic!("it is in flight");
        };
        let mut ended = Box::pin(following.ended());
        assert!(ended.as_mut().now_or_never().is_none());
        drop(middle);
        assert!(ended.as_mut().now_or_never().is_some());
        assert!(matches!(flights.claim(&hashes(4..5)), Claim::Lead(_)));
        drop(front);
        assert!(flights.lock().is_empty());
    }
}
