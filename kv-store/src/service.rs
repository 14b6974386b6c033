//! The `perigee.v1.KvStore` service: what peers may do with this node's blocks. A thin shell over [`Store`].
//!
//! Invariant: an answer's promises are kept by guards that live in tables with an expiry, so a peer that vanishes
//! costs memory for a bounded time. A watcher costs one message at most: it is served from the log when it
//! asks for more, and by a snapshot once it has fallen behind the log.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, stream};
use proto::v1::kv_store_server::{KvStore, KvStoreServer};
use proto::{convert, status, v1};
use tokio::sync::Semaphore;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use transfer::{Calls, RemoteRegion};
use types::{BlockHash, Error, ErrorCode, LeaseId};

use crate::expiring::Full;
use crate::fetch::promote_prefix;
use crate::store::{self, BlockPin, Store, Tenant};
use crate::table::Purpose;

mod calls;
mod put;
mod watch;

use put::Puts;
use watch::Watcher;

/// Looking more often than this would only keep the lock of the table busy.
const EXPIRY_INTERVAL_MIN: Duration = Duration::from_millis(1);

/// When a watcher that found no place may try again: places become free when routers restart.
const WATCH_RETRY_MS: u64 = 1000;

/// The service of one store. Clones are one and the same.
#[derive(Debug, Clone)]
pub struct Service {
    store: Store,
    puts: Arc<Puts>,
    watchers: Arc<Semaphore>,
    shutdown: CancellationToken,
}

impl Service {
    /// A service that ends at `shutdown`: its streams too, or nothing could drain.
    pub fn new(store: Store, shutdown: CancellationToken) -> Self {
        Self {
            puts: Arc::new(Puts::new(&store)),
            watchers: Arc::new(Semaphore::new(store.config().watchers_max)),
            store,
            shutdown,
        }
    }

    /// The service in the form that a server takes.
    pub fn server(&self) -> KvStoreServer<Self> {
        KvStoreServer::new(self.clone())
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    /// Answers calls over the transfer connection, and ends leases and reservations whose time has come, until shutdown.
    /// One of these must run per store.
    pub async fn run(self) {
        let calls: Arc<dyn Calls> = Arc::new(self.clone());
        self.store.transport().serve_calls(Arc::downgrade(&calls));
        let mut interval =
            tokio::time::interval(self.store.config().expiry_interval.max(EXPIRY_INTERVAL_MIN));
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => break,
                _ = interval.tick() => self.expire(),
            }
        }
        // No reservation outlives the runtime that its fence needs: every one ends by then.
        let last = Instant::now() + self.store.config().reservation_ttl_max;
        self.puts.expire(last.into_std());
    }

    fn expire(&self) {
        let now = store::now();
        let metrics = &self.store.inner().metrics;
        let leases = self.store.with_table(|table| table.expire_leases(now));
        metrics.leases_expired.inc_by(leases as u64);
        let reservations = self.puts.expire(now);
        metrics.reservations_expired.inc_by(reservations as u64);
    }

    fn read_hashes(&self, hashes: &[Vec<u8>]) -> Result<Vec<BlockHash>, Error> {
        let hashes_max = self.store.config().hashes_max;
        if hashes.len() > hashes_max {
            return Err(Error::invalid(
                "hashes",
                format!(
                    "{} hashes were given, but at most {hashes_max} are allowed",
                    hashes.len()
                ),
            ));
        }
        convert::hashes("hashes", hashes)
    }

    async fn acquire(&self, request: &v1::AcquireRequest) -> Result<v1::AcquireResponse, Error> {
        check_root(&self.store, &request.kv_root)?;
        let hashes = self.read_hashes(&request.hashes)?;
        let config = self.store.config();
        let expires = expiry(request.lease_ttl_ms, config.lease_ttl_max)?;
        let purpose = if request.moved {
            Purpose::Move
        } else {
            Purpose::Request
        };
        let given = if self.store.is_quarantined() {
            &[][..]
        } else {
            &hashes
        };
        // Held until they are leased.
        let _promoted = self.promote(given).await;
        let leased = self
            .store
            .with_table(|table| table.lease(given, purpose, expires, store::now()));
        let leased = leased.map_err(|full| too_many("leases", full, config.expiry_interval))?;
        let (lease, blocks) = leased.unwrap_or_default();
        if purpose == Purpose::Request {
            self.store.count_match(hashes.len(), blocks.len());
        }
        let blocks = blocks.iter().map(|held| v1::BlockDescriptor {
            hash: held.hash.0.to_vec(),
            offset: self.store.byte_range(held.block).start,
            generation: held.generation.0,
            checksum: held.checksum.0,
        });
        Ok(v1::AcquireResponse {
            lease_id: lease.0,
            blocks: blocks.collect(),
            region: Some(region_to_wire(self.store.exposed())),
        })
    }

    /// Brings what is on disk of the chain into memory, for as long as a disk is waited for.
    async fn promote(&self, hashes: &[BlockHash]) -> Vec<BlockPin> {
        match self.store.disk() {
            None => Vec::new(),
            Some(disk) => {
                let deadline = Instant::now() + disk.bounds().promote_timeout;
                promote_prefix(&self.store, hashes, deadline).await
            }
        }
    }

    /// Begins to read what is on disk of the chain, if not too many others are being read.
    fn prefetch(&self, request: &v1::PrefetchRequest) -> Result<v1::PrefetchResponse, Error> {
        check_root(&self.store, &request.kv_root)?;
        let hashes = self.read_hashes(&request.hashes)?;
        let (held, promoting) = self.store.read_ahead(hashes);
        Ok(v1::PrefetchResponse {
            held_blocks: held as u64,
            promoting_blocks: promoting as u64,
        })
    }

    fn reserve(&self, request: &v1::ReserveRequest) -> Result<v1::ReserveResponse, Error> {
        check_root(&self.store, &request.kv_root)?;
        self.store.check_takes()?;
        let parent = convert::hash("parent", &request.parent)?;
        let hashes = self.read_hashes(&request.hashes)?;
        let expires = expiry(request.lease_ttl_ms, self.store.config().reservation_ttl_max)?;
        self.puts.reserve(&self.store, parent, &hashes, expires)
    }

    fn stats(&self) -> v1::StatsResponse {
        let stats = self.store.stats();
        v1::StatsResponse {
            capacity_blocks: stats.blocks.capacity as u64,
            free_blocks: stats.blocks.free as u64,
            cached_blocks: stats.blocks.cached as u64,
            pinned_blocks: stats.blocks.pinned as u64,
            block_bytes: stats.block_bytes as u64,
            hits: stats.hits,
            misses: stats.misses,
            evictions: stats.evictions,
            corruptions: stats.corruptions,
            log_sequence: stats.log_sequence,
            object_tier: self.store.object_stats(),
            tenants: self.store.tenants().into_iter().map(tenant_to_wire).collect(),
        }
    }
}

#[tonic::async_trait]
impl KvStore for Service {
    async fn acquire(
        &self,
        request: Request<v1::AcquireRequest>,
    ) -> Result<Response<v1::AcquireResponse>, Status> {
        answer(self.acquire(request.get_ref()).await)
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let lease = LeaseId(request.get_ref().lease_id);
        let held = self.store.with_table(|table| table.release(lease, store::now()));
        answer(Ok(v1::ReleaseResponse { held }))
    }

    async fn reserve(
        &self,
        request: Request<v1::ReserveRequest>,
    ) -> Result<Response<v1::ReserveResponse>, Status> {
        answer(self.reserve(request.get_ref()))
    }

    async fn commit(
        &self,
        request: Request<v1::CommitRequest>,
    ) -> Result<Response<v1::CommitResponse>, Status> {
        let v1::CommitRequest {
            reservation_id,
            checksums,
        } = request.into_inner();
        let committed = self.puts.commit(&self.store, reservation_id, &checksums).await;
        answer(committed.map(|()| v1::CommitResponse {}))
    }

    async fn abort(&self, request: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        let aborted = self.puts.abort(request.get_ref().reservation_id).await;
        answer(aborted.map(|()| v1::AbortResponse {}))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::LogBatch, Status>> + Send>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let Ok(permit) = self.watchers.clone().try_acquire_owned() else {
            let watchers_max = self.store.config().watchers_max;
            let message = format!("{watchers_max} watchers follow this node, which is the most allowed");
            return answer(Err(Error::overloaded(message, WATCH_RETRY_MS)));
        };
        let watcher = Watcher::new(&self.store, self.shutdown.clone(), permit, request.get_ref());
        Ok(Response::new(Box::pin(stream::unfold(
            watcher,
            watch::next_batch,
        ))))
    }

    async fn prefetch(
        &self,
        request: Request<v1::PrefetchRequest>,
    ) -> Result<Response<v1::PrefetchResponse>, Status> {
        answer(self.prefetch(request.get_ref()))
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        answer(Ok(self.stats()))
    }
}

pub(crate) fn answer<T>(result: Result<T, Error>) -> Result<Response<T>, Status> {
    result
        .map(Response::new)
        .map_err(|error| status::to_status(&error))
}

/// Refuses blocks of another model, format or arithmetic.
pub(crate) fn check_root(store: &Store, kv_root: &[u8]) -> Result<(), Error> {
    let theirs = convert::hash("kv_root", kv_root)?;
    let ours = store.common_root();
    if theirs == ours {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::Conflict,
        format!("kv_root is {theirs}, but this node's blocks are of {ours}"),
    ))
}

/// When a promise that was asked for `ttl_ms` ends.
pub(crate) fn expiry(ttl_ms: u64, ttl_max: Duration) -> Result<std::time::Instant, Error> {
    if ttl_ms == 0 {
        return Err(Error::invalid("lease_ttl_ms", "lease_ttl_ms must be at least 1"));
    }
    Ok(store::now() + Duration::from_millis(ttl_ms).min(ttl_max))
}

fn too_many(what: &str, full: Full, retry: Duration) -> Error {
    let retry_ms = u64::try_from(retry.as_millis()).unwrap_or(u64::MAX);
    Error::overloaded(format!("{what}: {full}"), retry_ms)
}

fn tenant_to_wire(tenant: Tenant) -> v1::TenantStats {
    let Tenant {
        root,
        name,
        cached_blocks,
        blocks_max,
        weight,
    } = tenant;
    v1::TenantStats {
        root: root.map_or_else(Vec::new, |root| root.0.to_vec()),
        name,
        cached_blocks: cached_blocks as u64,
        blocks_max: blocks_max.map(|blocks| blocks as u64),
        weight,
    }
}

pub(crate) fn region_to_wire(region: &RemoteRegion) -> v1::RemoteRegion {
    v1::RemoteRegion {
        endpoint: region.endpoint.clone(),
        epoch: region.epoch.0,
        key: region.key,
    }
}

#[cfg(test)]
mod tests;
