//! A node's blocks, for the code of the same process: the table, the bytes it is about, and guards.
//!
//! Invariant: whoever holds a guard may use its block as the guard says, and nobody can give a block back
//! while another one still uses it. [`OwnedBlock`] is the right to write, [`BlockPin`] the right to read,
//! [`Grant`] the state in which a peer may write: from it a block returns through the transport's fence only.
//!
//! The table is behind one mutex that is held for table operations alone: never across an await, and never
//! while a block is hashed or moved.
//!
//! Elsewhere: decisions (`table.rs`), one sequence's blocks (`sequence.rs`), peers (`service.rs`, `fetch.rs`).

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use tokio::sync::{Semaphore, watch};
use transfer::{RegionId, RemoteRegion, TransferError, Transport};
use types::layout::LayoutError;
use types::{
    BlockDescriptor, BlockHash, BlockId, Checksum, Epoch, ErrorCode, Generation, KvLayout, KvSpace, Memory,
    MemoryKind, TenantQuota, Token,
};

use crate::Config;
use crate::disk::Disk;
use crate::fetch::Flights;
use crate::metrics::Metrics;
use crate::object::Objects;
use crate::roots::Roots;
use crate::scrub::Health;
use crate::table::{BlockTable, Committed, Counts, OutOfBlocks, Parent, TableLimits};

mod grant;
mod guard;
mod health;
mod tenants;
mod verify;

pub use grant::{Grant, Landed};
pub use guard::{BlockPin, OwnedBlock};
pub use tenants::Tenant;
pub use verify::Corrupt;

/// A node's blocks. Clones are handles of the same store.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

/// Why a pool cannot become a store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The shape of a block is unusable.
    #[error("the KV layout is unusable: {0}")]
    Layout(#[from] LayoutError),
    /// Not one block fits.
    #[error("a pool of {memory_bytes} bytes holds no block of {block_bytes} bytes")]
    TooSmall {
        /// Size of the pool.
        memory_bytes: usize,
        /// Size of a block.
        block_bytes: usize,
    },
    /// Blocks are numbered by 32 bits.
    #[error(
        "a pool of {blocks} blocks is larger than the {} that can be numbered",
        u32::MAX
    )]
    TooLarge {
        /// Blocks that would fit.
        blocks: usize,
    },
    /// Checksums are computed by this processor.
    #[error("the pool is memory of kind {kind:?}, but a store needs host memory")]
    NotHost {
        /// The memory's kind.
        kind: MemoryKind,
    },
    /// The transport refused the pool.
    #[error("the pool cannot be registered for transfers: {0}")]
    Transport(#[from] TransferError),
}

impl StoreError {
    /// What the caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Layout(_) | Self::TooSmall { .. } | Self::TooLarge { .. } | Self::NotHost { .. } => {
                ErrorCode::Invalid
            }
            Self::Transport(error) => error.code(),
        }
    }
}

impl From<StoreError> for types::Error {
    fn from(error: StoreError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// A store in numbers.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Slots by use.
    pub blocks: Counts,
    /// Bytes of one block.
    pub block_bytes: usize,
    /// Blocks asked for and held.
    pub hits: u64,
    /// Blocks asked for and not held.
    pub misses: u64,
    /// Blocks evicted to make room.
    pub evictions: u64,
    /// Blocks whose bytes did not match their checksum.
    pub corruptions: u64,
    /// Bytes fetched from peers.
    pub fetched_bytes: u64,
    /// Number of the newest entry of the log.
    pub log_sequence: u64,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("blocks", &self.table().counts())
            .finish()
    }
}

pub(crate) struct Inner {
    pub(crate) config: Config,
    space: KvSpace,
    common_root: BlockHash,
    epoch: Epoch,
    memory: Arc<dyn Memory>,
    transport: Arc<dyn Transport>,
    region: RegionId,
    exposed: RemoteRegion,
    block_bytes: usize,
    table: Mutex<BlockTable>,
    /// Below the pool, once it is mounted.
    pub(crate) disk: OnceLock<Disk>,
    /// Below both, once it is mounted.
    pub(crate) objects: OnceLock<Objects>,
    roots: Mutex<Roots>,
    /// What operators have set for tenants.
    quotas: Mutex<BTreeMap<String, TenantQuota>>,
    /// Number of the newest log entry.
    changed: watch::Sender<u64>,
    pub(crate) flights: Arc<Flights>,
    pub(crate) fetch_permits: Semaphore,
    pub(crate) read_ahead_permits: Arc<Semaphore>,
    pub(crate) metrics: Metrics,
    quarantined: AtomicBool,
    draining: AtomicBool,
    health: Mutex<Health>,
}

impl Store {
    /// Manages `memory` as a pool of as many blocks as fit, registers it with the transport and lets peers read it.
    ///
    /// `epoch` is this incarnation of the node; `space` is the space that tenants share. One process has one
    /// store per set of metrics.
    pub fn new(
        config: Config,
        space: KvSpace,
        epoch: Epoch,
        memory: Arc<dyn Memory>,
        transport: Arc<dyn Transport>,
        metrics: &node::Metrics,
    ) -> Result<Self, StoreError> {
        space.layout.validate()?;
        let kind = memory.kind();
        if kind != MemoryKind::Host {
            return Err(StoreError::NotHost { kind });
        }
        let block_bytes = space.layout.block_bytes();
        let capacity = memory.len() / block_bytes;
        if capacity == 0 {
            return Err(StoreError::TooSmall {
                memory_bytes: memory.len(),
                block_bytes,
            });
        }
        if u32::try_from(capacity).is_err() {
            return Err(StoreError::TooLarge { blocks: capacity });
        }
        let region = transport.register(memory.clone())?;
        let exposed = transport.expose_read(region)?;
        let mut table = BlockTable::new(TableLimits {
            capacity,
            log_entries_max: config.log_entries_max,
            leases_max: config.leases_max,
            // Epochs are far apart, so no incarnation gets to the lease ids of the next one.
            first_lease: epoch.0,
            eviction: config.eviction,
        });
        table.limit_tenants(tenants::limits(&config, &BTreeMap::new(), &space));
        let metrics = Metrics::register(metrics);
        metrics.set_counts(table.counts());
        Ok(Self {
            inner: Arc::new(Inner {
                common_root: space.root(),
                epoch,
                memory,
                transport,
                region,
                exposed,
                block_bytes,
                table: Mutex::new(table),
                disk: OnceLock::new(),
                objects: OnceLock::new(),
                roots: Mutex::new(Roots::new(space.clone())),
                quotas: Mutex::default(),
                changed: watch::Sender::new(0),
                flights: Arc::default(),
                fetch_permits: Semaphore::new(config.fetches_max.max(1)),
                read_ahead_permits: Arc::new(Semaphore::new(config.prefetches_max)),
                metrics,
                quarantined: AtomicBool::new(false),
                draining: AtomicBool::new(false),
                health: Mutex::default(),
                space,
                config,
            }),
        })
    }

    /// The space that tenants share.
    pub fn space(&self) -> &KvSpace {
        &self.inner.space
    }

    /// Root of [`Store::space`]: the identity that nodes compare.
    pub fn common_root(&self) -> BlockHash {
        self.inner.common_root
    }

    /// Format and size of a block.
    pub fn layout(&self) -> KvLayout {
        self.inner.space.layout
    }

    /// This incarnation of the node.
    pub fn epoch(&self) -> Epoch {
        self.inner.epoch
    }

    /// Bounds and times.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The pool. Block `i` starts at byte `i * block_bytes`.
    pub fn memory(&self) -> Arc<dyn Memory> {
        self.inner.memory.clone()
    }

    /// The pool, as the local side of transfers.
    pub fn region(&self) -> RegionId {
        self.inner.region
    }

    /// The pool, as peers read it.
    pub fn exposed(&self) -> &RemoteRegion {
        &self.inner.exposed
    }

    /// What moves bytes to and from peers.
    pub fn transport(&self) -> Arc<dyn Transport> {
        self.inner.transport.clone()
    }

    /// Blocks of the pool.
    pub fn capacity(&self) -> usize {
        self.inner.memory.len() / self.inner.block_bytes
    }

    /// Where a block lies in the pool and its region, in bytes.
    pub fn byte_range(&self, block: BlockId) -> Range<u64> {
        let bytes = self.inner.block_bytes as u64;
        let start = u64::from(block.0) * bytes;
        start..start + bytes
    }

    /// Where a block begins in the pool, in bytes.
    pub(crate) fn offset(&self, block: BlockId) -> usize {
        block.0 as usize * self.inner.block_bytes
    }

    /// The root of a tenant's space, and the hashes of every full block of `tokens` in it. The empty tenant
    /// is the common space.
    pub fn chain(&self, tenant: &str, tokens: &[Token]) -> (BlockHash, Vec<BlockHash>) {
        let root = self.roots().of_tenant(tenant);
        (root, root.chain(tokens, self.layout().block_tokens))
    }

    /// Knows the root of a tenant's space from now on, so that its first blocks have a parent here.
    pub(crate) fn remember_tenant(&self, tenant: &str) {
        if !tenant.is_empty() {
            self.roots().of_tenant(tenant);
        }
    }

    /// Pins the longest leading run of held blocks, and counts the rest as misses.
    pub fn match_prefix(&self, hashes: &[BlockHash]) -> Vec<BlockPin> {
        let held = self.with_table(|table| table.match_prefix(hashes, now()));
        self.count_match(hashes.len(), held.len());
        self.pins(held)
    }

    /// As [`Store::match_prefix`], but neither counts nor is a use: for whoever asks again, or only looks.
    pub(crate) fn pin_held(&self, hashes: &[BlockHash]) -> Vec<BlockPin> {
        let held = self.with_table(|table| table.pin_run(hashes));
        self.pins(held)
    }

    /// Guards of blocks that were pinned.
    fn pins(&self, held: Vec<BlockDescriptor>) -> Vec<BlockPin> {
        held.into_iter()
            .map(|descriptor| BlockPin::cached(self.clone(), descriptor))
            .collect()
    }

    /// Leading blocks of a chain that are held now. They may be evicted at any time.
    pub fn lookup_len(&self, chain: &[BlockHash]) -> usize {
        self.table().match_len(chain)
    }

    /// Whether each block is held now. They may be evicted at any time.
    pub fn exists(&self, hashes: &[BlockHash]) -> Vec<bool> {
        self.table().exists(hashes)
    }

    /// Blocks that [`Store::allocate`] could give now.
    pub fn available(&self) -> usize {
        self.table().available()
    }

    /// Takes `count` blocks for writing, or none; their bytes are what was there before. Evicts blocks that
    /// nobody pins where too few are free.
    pub fn allocate(&self, count: usize) -> Result<Vec<OwnedBlock>, OutOfBlocks> {
        let blocks = self.with_table(|table| table.allocate(count, now()))?;
        Ok(blocks
            .into_iter()
            .map(|block| OwnedBlock::new(self.clone(), block))
            .collect())
    }

    /// Takes as many blocks as there are, up to `count`.
    pub(crate) fn allocate_up_to(&self, count: usize) -> Vec<OwnedBlock> {
        let blocks = self.with_table(|table| table.allocate(count.min(table.available()), now()));
        let blocks = blocks.expect("what is available can be allocated");
        blocks
            .into_iter()
            .map(|block| OwnedBlock::new(self.clone(), block))
            .collect()
    }

    /// Takes up to `count` blocks for a use that is worth little: evicts no more than `evictions_max` blocks for it.
    pub(crate) fn allocate_sparing(&self, count: usize, evictions_max: usize) -> Vec<OwnedBlock> {
        let blocks = self.with_table(|table| {
            let spare = table.counts().free.saturating_add(evictions_max);
            table.allocate(count.min(spare).min(table.available()), now())
        });
        let blocks = blocks.expect("what is available can be allocated");
        blocks
            .into_iter()
            .map(|block| OwnedBlock::new(self.clone(), block))
            .collect()
    }

    /// Makes a complete block available under its hash. Nobody may write it any more, not even the caller.
    ///
    /// If the hash is held already, the result is a pin of that block (the bytes are the same) and the slot
    /// given is freed: see [`BlockPin::block`] for the block to use. If the parent is neither held nor a root, or if the
    /// tenant uses all of its quota, the block cannot be cached: the result is a private pin
    /// ([`BlockPin::is_private`]) of the slot given.
    pub fn commit(&self, block: OwnedBlock, parent: BlockHash, hash: BlockHash) -> BlockPin {
        let (pin, _displaced) = self.commit_keeping(block, parent, hash);
        pin
    }

    /// As [`Store::commit`], but the slot of a block that was held already is returned instead of being freed.
    pub(crate) fn commit_keeping(
        &self,
        block: OwnedBlock,
        parent: BlockHash,
        hash: BlockHash,
    ) -> (BlockPin, Option<OwnedBlock>) {
        let checksum = self.checksum(block.block());
        self.publish(block, self.parent(parent), hash, checksum)
    }

    /// Verifies a block that a peer wrote, then commits it. A block that fails is freed.
    pub fn adopt(
        &self,
        block: OwnedBlock,
        parent: BlockHash,
        hash: BlockHash,
        checksum: Checksum,
    ) -> Result<BlockPin, Corrupt> {
        self.verify(&block, hash, checksum)?;
        Ok(self.commit_verified(block, parent, hash, checksum))
    }

    /// The second half of [`Store::adopt`], for callers that verify many blocks before they commit one.
    pub(crate) fn commit_verified(
        &self,
        block: OwnedBlock,
        parent: BlockHash,
        hash: BlockHash,
        checksum: Checksum,
    ) -> BlockPin {
        let (pin, _displaced) = self.publish(block, self.parent(parent), hash, checksum);
        pin
    }

    /// Lets a peer write to these blocks, and nowhere else. The blocks come back from [`Grant::fence`].
    pub fn grant(&self, blocks: Vec<OwnedBlock>) -> Result<Grant, TransferError> {
        Grant::new(self.clone(), blocks)
    }

    /// The store in numbers.
    pub fn stats(&self) -> Stats {
        let (blocks, evictions, log_sequence) = {
            let table = self.table();
            (table.counts(), table.evictions(), table.log().last())
        };
        let metrics = &self.inner.metrics;
        Stats {
            blocks,
            block_bytes: self.inner.block_bytes,
            hits: metrics.hit_blocks.get(),
            misses: metrics.missed_blocks.get(),
            evictions,
            corruptions: metrics.corruptions.get(),
            fetched_bytes: metrics.fetched_bytes.get(),
            log_sequence,
        }
    }

    /// Notices new entries of the log: holds the number of the newest one.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }

    pub(crate) fn learn_root(&self, root: BlockHash) {
        self.roots().learn(root);
    }

    pub(crate) fn is_root(&self, hash: BlockHash) -> bool {
        self.roots().is_root(hash)
    }

    pub(crate) fn count_match(&self, asked: usize, held: usize) {
        self.inner.metrics.hit_blocks.inc_by(held as u64);
        self.inner.metrics.missed_blocks.inc_by((asked - held) as u64);
    }

    fn quotas(&self) -> MutexGuard<'_, BTreeMap<String, TenantQuota>> {
        let quotas = self.inner.quotas.lock();
        // They are replaced whole, so a panic leaves nothing half done.
        quotas.unwrap_or_else(PoisonError::into_inner)
    }

    /// For looking only; changes go through [`Store::with_table`].
    pub(crate) fn table(&self) -> MutexGuard<'_, BlockTable> {
        self.inner
            .table
            .lock()
            .expect("a panic inside the table is a defect that nothing may outlive")
    }

    /// Runs one change of the table, and tells metrics and watchers.
    pub(crate) fn with_table<R>(&self, change: impl FnOnce(&mut BlockTable) -> R) -> R {
        let mut table = self.table();
        let (evicted, left_disk) = (table.evictions(), table.disk().evictions());
        let limited = table.tenant_events();
        let result = change(&mut table);
        // Inside the lock, so that gauges never go back to older counts.
        self.inner.metrics.set_counts(table.counts());
        self.inner.metrics.tenants.add(limited, table.tenant_events());
        self.inner.metrics.disk.set_counts(table.disk());
        let evicted = table.evictions() - evicted;
        let left_disk = table.disk().evictions() - left_disk;
        let newest = table.log().last();
        drop(table);
        self.inner.metrics.evicted_blocks.inc_by(evicted);
        self.inner.metrics.disk.evicted_blocks.inc_by(left_disk);
        self.inner.changed.send_if_modified(|known| {
            let newer = newest > *known;
            *known = newest.max(*known);
            newer
        });
        result
    }

    /// Makes a block whose bytes have this checksum available.
    pub(crate) fn publish(
        &self,
        block: OwnedBlock,
        parent: Parent,
        hash: BlockHash,
        checksum: Checksum,
    ) -> (BlockPin, Option<OwnedBlock>) {
        let committed = if self.is_quarantined() {
            Committed::Orphan
        } else {
            self.with_table(|table| table.commit(block.block(), parent, hash, checksum, now()))
        };
        match committed {
            Committed::Stored(descriptor) => {
                block.give_up();
                (BlockPin::cached(self.clone(), descriptor), None)
            }
            Committed::Duplicate(descriptor) => (BlockPin::cached(self.clone(), descriptor), Some(block)),
            Committed::Orphan | Committed::OverQuota => {
                let descriptor = BlockDescriptor {
                    hash,
                    block: block.block(),
                    generation: self.generation(block.block()),
                    checksum,
                };
                (BlockPin::private(block, descriptor), None)
            }
        }
    }

    fn parent(&self, hash: BlockHash) -> Parent {
        if self.is_root(hash) {
            Parent::Root(hash)
        } else {
            Parent::Block(hash)
        }
    }

    fn generation(&self, block: BlockId) -> Generation {
        self.table().generation(block)
    }

    fn roots(&self) -> MutexGuard<'_, Roots> {
        self.inner
            .roots
            .lock()
            .expect("nothing panics while it looks up a root")
    }
}

/// The table's clock, which tests may pause.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests;
