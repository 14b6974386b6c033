//! The two-phase put: a peer reserves slots, writes to them, and commits or aborts.
//!
//! Invariant: slots go from the writer to the cache or back to the pool only through the fence, whichever way the
//! reservation ends; and it ends exactly once, since whoever takes it out of the table is its only owner.

use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use proto::v1;
use types::{BlockHash, Checksum, Error, ErrorCode};

use super::{region_to_wire, too_many};
use crate::expiring::Expiring;
use crate::store::{BlockPin, Corrupt, Grant, Landed, Store};

/// When a writer whose tenant uses all of its quota may try again: readers' leases end, and sequences.
const QUOTA_RETRY_MS: u64 = 1000;

/// The reservations that are open.
#[derive(Debug)]
pub(super) struct Puts {
    open: Mutex<Expiring<Reservation>>,
}

#[derive(Debug)]
struct Reservation {
    grant: Grant,
    /// The block before the first one granted, or the root.
    parent: BlockHash,
    /// Identities of the blocks granted.
    hashes: Vec<BlockHash>,
    /// Keeps what comes before, so that the blocks find their parent.
    before: Vec<BlockPin>,
}

impl Puts {
    pub(super) fn new(store: &Store) -> Self {
        Self {
            // Writers of an earlier incarnation must not meet reservations of this one: see `Expiring::new`.
            open: Mutex::new(Expiring::new(store.config().reservations_max, store.epoch().0)),
        }
    }

    /// Grants slots for those of the hashes that are not held. Opens nothing (id 0) where none are to be written.
    pub(super) fn reserve(
        &self,
        store: &Store,
        parent: BlockHash,
        hashes: &[BlockHash],
        expires: Instant,
    ) -> Result<v1::ReserveResponse, Error> {
        let retry = store.config().expiry_interval;
        let full = |full| too_many("reservations", full, retry);
        self.lock().check_room().map_err(full)?;
        let mut before = Vec::new();
        if !store.is_root(parent) {
            before = store.pin_parent(parent)?;
        }
        let held = store.pin_held(hashes);
        let held_blocks = held.len() as u64;
        let missing = &hashes[held.len()..];
        let parent = held.last().map_or(parent, BlockPin::hash);
        before.extend(held);
        let blocks = store.allocate_up_to(missing.len());
        if blocks.is_empty() {
            return Ok(v1::ReserveResponse {
                reservation_id: 0,
                region: None,
                held_blocks,
                block_offsets: Vec::new(),
            });
        }
        let hashes = missing[..blocks.len()].to_vec();
        let grant = store.grant(blocks)?;
        let region = region_to_wire(grant.region());
        let block_offsets = grant.block_offsets();
        let reservation = Reservation {
            grant,
            parent,
            hashes,
            before,
        };
        let reservation_id = self.lock().insert(expires, reservation).map_err(full)?;
        Ok(v1::ReserveResponse {
            reservation_id,
            region: Some(region),
            held_blocks,
            block_offsets,
        })
    }

    /// Fences the writer, verifies every block, then publishes all of them, or none.
    pub(super) async fn commit(&self, store: &Store, id: u64, checksums: &[u64]) -> Result<(), Error> {
        let Reservation {
            grant,
            parent,
            hashes,
            before,
        } = self.take(id)?;
        let blocks = grant.fence().await;
        if checksums.len() != blocks.len() {
            let given = checksums.len();
            let granted = blocks.len();
            return Err(Error::invalid(
                "checksums",
                format!("{given} checksums were given for {granted} blocks; the reservation is aborted"),
            ));
        }
        let checksums = checksums.iter().copied().map(Checksum);
        let promised = hashes.into_iter().zip(checksums);
        let written: Vec<_> = blocks.into_iter().zip(promised).collect();
        verify(store, &written).await?;
        let written_blocks = written.len();
        let kept = publish(store, written, parent);
        // Only now may what comes before be evicted.
        drop(before);
        if kept < written_blocks && !store.is_quarantined() {
            let message =
                format!("{kept} of {written_blocks} blocks were cached: their tenant uses all of its quota");
            return Err(Error::overloaded(message, QUOTA_RETRY_MS));
        }
        Ok(())
    }

    /// Fences the writer and frees the slots.
    pub(super) async fn abort(&self, id: u64) -> Result<(), Error> {
        let reservation = self.take(id)?;
        drop(reservation.grant.fence().await);
        Ok(())
    }

    /// Ends the reservations whose time has come; their writers are fenced in the background. Returns how many
    /// they were.
    pub(super) fn expire(&self, now: Instant) -> usize {
        let mut expired = 0;
        loop {
            // Taken and dropped one by one, and outside of the lock.
            let reservation = self.lock().expire(now);
            match reservation {
                Some(reservation) => drop(reservation),
                None => return expired,
            }
            expired += 1;
        }
    }

    fn take(&self, id: u64) -> Result<Reservation, Error> {
        let reservation = self.lock().remove(id);
        reservation.ok_or_else(|| {
            Error::new(
                ErrorCode::NotFound,
                format!("reservation {id} is not open: it was ended, has expired, or never was"),
            )
        })
    }

    fn lock(&self) -> MutexGuard<'_, Expiring<Reservation>> {
        self.open
            .lock()
            .expect("nothing panics while it looks up a reservation")
    }
}

/// A block that was written, and what it was promised to be.
type Written = (Landed, (BlockHash, Checksum));

/// Verifies all blocks, or says which is wrong.
pub(super) async fn verify(store: &Store, written: &[Written]) -> Result<(), Corrupt> {
    for (block, (hash, checksum)) in written {
        block.verify(store, *hash, *checksum)?;
        // Hashing one block is short, hashing all of them is not.
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// Makes verified blocks, which follow each other, available under their hashes. Those before must be pinned. Returns how many
/// were cached: the others find no parent, or no place within their tenant's quota.
pub(super) fn publish(store: &Store, written: Vec<Written>, mut parent: BlockHash) -> usize {
    let mut published = Vec::new();
    for (block, (hash, checksum)) in written {
        published.push(store.commit_verified(block.into_block(), parent, hash, checksum));
        parent = hash;
    }
    // Only now may any of them be evicted.
    published.iter().filter(|pin| !pin.is_private()).count()
}
