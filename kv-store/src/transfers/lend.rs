//! The peer's side of a test: blocks that are lent under a lease.
//!
//! Invariant: blocks come back through the fence only, whichever way the probe ends; and it ends exactly once.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use proto::v1;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use types::{Error, ErrorCode};

use super::TEST_BYTES_MAX;
use super::area::Area;
use crate::expiring::Expiring;
use crate::service::{expiry, region_to_wire};
use crate::store::{Grant, Landed, Store};

/// Longest time of a probe, whatever is asked for: a measurement of the longest test, and what its last transfer takes.
pub(super) const PROBE_TTL_MAX: Duration = Duration::from_secs(90);
/// How often probes are checked for their end.
pub(super) const EXPIRY_INTERVAL: Duration = Duration::from_millis(100);
/// Probes at a time, also those that are being filled. A node rarely takes part in more than one test, and all of them
/// together must leave most of the pool.
const PROBES_MAX: usize = 2;
/// When a caller that found no place may try again: measurements take about a second.
const RETRY_MS: u64 = 1000;

/// The probes that are open.
#[derive(Debug)]
pub(super) struct Probes {
    open: Mutex<Expiring<Probe>>,
    places: Arc<Semaphore>,
}

#[derive(Debug)]
struct Probe {
    grant: Grant,
    bytes: u64,
    /// Freed with the probe.
    _place: OwnedSemaphorePermit,
}

impl Probes {
    pub(super) fn new(store: &Store) -> Self {
        Self {
            // Testers of an earlier incarnation must not meet probes of this one: see `Expiring::new`.
            open: Mutex::new(Expiring::new(PROBES_MAX, store.epoch().0)),
            places: Arc::new(Semaphore::new(PROBES_MAX)),
        }
    }

    /// Borrows blocks, fills them, and lets the caller write to them until the lease ends.
    pub(super) async fn open(
        &self,
        store: &Store,
        request: &v1::OpenProbeRequest,
    ) -> Result<v1::OpenProbeResponse, Error> {
        let v1::OpenProbeRequest {
            bytes,
            seed,
            lease_ttl_ms,
        } = *request;
        if bytes == 0 || bytes > TEST_BYTES_MAX {
            return Err(Error::invalid(
                "bytes",
                format!("bytes is {bytes}, but must be from 1 to {TEST_BYTES_MAX}"),
            ));
        }
        let expires = expiry(lease_ttl_ms, PROBE_TTL_MAX)?;
        let place = self.places.clone().try_acquire_owned().map_err(|_| {
            let message = format!("{PROBES_MAX} probes are open, which is the most allowed");
            Error::overloaded(message, RETRY_MS)
        })?;
        let area = Arc::new(Area::borrow(store, bytes)?);
        let checksum = area.fill(seed).await?;
        let bytes = area.bytes();
        // The thread that filled it has ended, and so let go of it.
        let area = Arc::into_inner(area).ok_or_else(|| Error::internal("the area is still being filled"))?;
        let grant = store.grant(area.into_blocks())?;
        let (writable, block_offsets) = (region_to_wire(grant.region()), grant.block_offsets());
        let probe = Probe {
            grant,
            bytes,
            _place: place,
        };
        let probe_id = self.lock().insert(expires, probe);
        let probe_id = probe_id.expect("the table has room for as many probes as there are places");
        Ok(v1::OpenProbeResponse {
            probe_id,
            bytes,
            writable: Some(writable),
            readable: Some(region_to_wire(store.exposed())),
            block_offsets,
            block_bytes: store.layout().block_bytes() as u64,
            checksum,
        })
    }

    /// Fences the caller, and says what it left in the blocks.
    pub(super) async fn close(&self, store: &Store, id: u64) -> Result<v1::CloseProbeResponse, Error> {
        let probe = self.lock().remove(id);
        let Probe { grant, bytes, _place } = probe.ok_or_else(|| {
            Error::new(
                ErrorCode::NotFound,
                format!("probe {id} is not open: it was closed, has expired, or never was"),
            )
        })?;
        let blocks = grant.fence().await.into_iter().map(Landed::into_block);
        let area = Arc::new(Area::of(store, blocks.collect(), bytes));
        Ok(v1::CloseProbeResponse {
            checksum: area.checksum().await?,
        })
    }

    /// Ends the probes whose time has come; their callers are fenced in the background.
    pub(super) fn expire(&self, now: Instant) {
        loop {
            // Taken and dropped one by one, and outside of the lock.
            let probe = self.lock().expire(now);
            match probe {
                Some(probe) => {
                    tracing::info!(bytes = probe.bytes, "a transfer probe was not closed in time");
                    drop(probe);
                }
                None => return,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Expiring<Probe>> {
        self.open
            .lock()
            .expect("nothing panics while it looks up a probe")
    }
}
