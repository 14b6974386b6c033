use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use tempfile::TempDir;
use tokio::task::JoinHandle;
use types::{BlockEvent, Tier};

use super::*;
use crate::config::Config;
use crate::disk::Bounds;
use crate::disk::breaker::Limits;
use crate::disk::file::BlockFiles;
use crate::log::Resume;
use crate::store::BlockPin;
use crate::testing::{
    BLOCK_TOKENS, DiskFaults, FaultyFile, PATIENCE, Peer, assert_content, channels, compute, eventually,
    lonely_store, space, tokens,
};
use crate::{Fetch, Source, fetch_prefix};

const POOL: usize = 8;
const CHAIN: usize = 6;

fn bounds() -> Bounds {
    Bounds {
        write_rate_max: 0,
        promote_timeout: PATIENCE,
        limits: Limits {
            rate_min: 0,
            bypass_min: Duration::from_millis(50),
            bypass_max: Duration::from_millis(200),
            ..Bounds::default().limits
        },
        ..Bounds::default()
    }
}

/// A store of [`POOL`] blocks over a disk of `slots` that does what it is told.
struct Tiered {
    store: Store,
    file: std::sync::Arc<FaultyFile>,
    shutdown: CancellationToken,
    running: JoinHandle<()>,
}

impl Tiered {
    fn over(store: Store, folder: &TempDir, slots: u32, bounds: Bounds) -> Self {
        let bytes = space().layout.block_bytes();
        let opened = BlockFiles::open(folder.path(), bytes, store.common_root(), slots);
        let (files, recovered) = opened.unwrap();
        let file = FaultyFile::new(files);
        let disk = Disk::on(file.clone(), bounds, bytes, slots).unwrap();
        assert_eq!(store.mount_disk(disk, recovered), 0);
        let shutdown = CancellationToken::new();
        let (runner, ended) = (store.clone(), shutdown.clone());
        Self {
            store,
            file,
            shutdown,
            running: tokio::spawn(async move { runner.run_tiers(ended).await }),
        }
    }

    fn new(folder: &TempDir, slots: u32) -> Self {
        Self::over(lonely_store(POOL, Config::default()), folder, slots, bounds())
    }

    /// Ends without any care for the disk, and proves that nothing keeps the files.
    async fn stop(self) {
        self.shutdown.cancel();
        self.running.await.unwrap();
        let files = std::sync::Arc::downgrade(&self.file);
        drop((self.store, self.file));
        eventually("the files are closed", || files.strong_count() == 0).await;
    }

    /// Commits a chain, and waits until it is on disk.
    async fn offload(&self, seed: u32) -> Vec<BlockHash> {
        let chain = commit(&self.store, seed);
        self.written(&chain).await;
        chain
    }

    async fn written(&self, chain: &[BlockHash]) {
        eventually("the chain is on disk", || self.on_disk(chain) == chain.len()).await;
    }

    fn on_disk(&self, chain: &[BlockHash]) -> usize {
        self.store.table().disk().match_len(chain)
    }

    async fn promote(&self, chain: &[BlockHash]) -> Vec<BlockPin> {
        promote_prefix(&self.store, chain, Instant::now() + PATIENCE).await
    }

    /// Fills the pool with other things, so that only the disk has what was there.
    async fn forget_memory(&self) {
        // Peers' leases and reads that nobody waits for end a moment later.
        eventually("memory can be taken", || self.store.allocate(POOL).is_ok()).await;
        assert_eq!(self.store.stats().blocks.cached, 0);
        self.check_log();
    }

    /// What a follower of the log knows is what is held, and where.
    fn check_log(&self) {
        let table = self.store.table();
        table.check_integrity();
        table.disk().check_integrity();
        let Resume::Entries(entries) = table.log().since(1, usize::MAX) else {
            panic!("the log is long enough for these tests");
        };
        let mut held: HashMap<BlockHash, (BlockHash, Tier)> = HashMap::new();
        for entry in entries {
            match entry.event {
                BlockEvent::Stored { hash, parent, tier } => {
                    assert!(parent == self.store.common_root() || held.contains_key(&parent));
                    assert!(
                        held.insert(hash, (parent, tier)).is_none(),
                        "{hash} was stored twice"
                    );
                }
                BlockEvent::Moved { hash, tier } => {
                    let known = held.get_mut(&hash).expect("only what is held moves");
                    assert_ne!(known.1, tier);
                    known.1 = tier;
                }
                BlockEvent::Removed { hash } => {
                    assert!(held.remove(&hash).is_some());
                    assert!(held.values().all(|(parent, _)| *parent != hash), "children first");
                }
            }
        }
        for (hash, (_, tier)) in &held {
            assert_eq!(table.tier_of(hash), Some(*tier));
        }
        let snapshot = table.snapshot().finish();
        let mut listed: HashMap<BlockHash, (BlockHash, Tier)> = HashMap::new();
        for block in &snapshot.blocks {
            assert!(block.parent == self.store.common_root() || listed.contains_key(&block.parent));
            listed.insert(block.hash, (block.parent, block.tier));
        }
        assert_eq!(listed, held);
    }
}

fn commit(store: &Store, seed: u32) -> Vec<BlockHash> {
    compute(store, "", &tokens(seed, CHAIN * BLOCK_TOKENS))
        .chain()
        .to_vec()
}

#[tokio::test]
async fn what_memory_forgets_comes_back_from_disk() {
    let folder = tempfile::tempdir().unwrap();
    let tiered = Tiered::new(&folder, 32);
    let chain = tiered.offload(1).await;
    tiered.check_log();
    tiered.forget_memory().await;
    assert_eq!(tiered.store.lookup_len(&chain), 0);
    let pins = tiered.promote(&chain).await;
    assert_content(&tiered.store, &pins, &chain);
    assert!(pins.iter().all(|pin| !pin.is_private()));
    drop(pins);
    assert_eq!(tiered.store.lookup_len(&chain), CHAIN, "it is cached again");
    tiered.check_log();
    tiered.stop().await;
}

#[tokio::test]
async fn a_restart_finds_every_block_that_was_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let tiered = Tiered::new(&folder, 64);
    let mut chains = Vec::new();
    for seed in 1..=8 {
        chains.push(tiered.offload(seed).await);
    }
    tiered.stop().await;

    let tiered = Tiered::new(&folder, 64);
    tiered.check_log();
    assert_eq!(tiered.store.table().disk().counts().stored, chains.len() * CHAIN);
    for chain in &chains {
        let pins = tiered.promote(chain).await;
        assert_content(&tiered.store, &pins, chain);
    }
    tiered.stop().await;
}

#[tokio::test]
async fn a_full_disk_tier_drops_old_leaves_and_stays_closed() {
    let folder = tempfile::tempdir().unwrap();
    let tiered = Tiered::new(&folder, 2 * CHAIN as u32);
    let first = tiered.offload(1).await;
    let second = tiered.offload(2).await;
    let third = tiered.offload(3).await;
    tiered.check_log();
    let counts = tiered.store.table().disk().counts();
    assert_eq!(counts.stored, 2 * CHAIN);
    let lost = tiered.on_disk(&first) + tiered.on_disk(&second);
    assert_eq!((lost, tiered.on_disk(&third)), (CHAIN, CHAIN));
    tiered.stop().await;
}

#[tokio::test]
async fn a_block_that_rots_on_disk_is_a_miss_with_all_that_continues_it() {
    let folder = tempfile::tempdir().unwrap();
    let tiered = Tiered::new(&folder, 32);
    let chain = tiered.offload(1).await;
    tiered.forget_memory().await;
    // Slots are taken in order, and a chain is written in order.
    let blocks = OpenOptions::new()
        .write(true)
        .open(folder.path().join("blocks"))
        .unwrap();
    blocks.write_all_at(&[0xee], 3 * 4096 + 17).unwrap();
    let pins = tiered.promote(&chain).await;
    assert_content(&tiered.store, &pins, &chain[..3]);
    assert_eq!(tiered.on_disk(&chain), 3);
    assert_eq!(tiered.store.stats().corruptions, 1);
    tiered.check_log();
    drop(pins);
    // Computed again, it is written again.
    let again = tiered.offload(1).await;
    assert_eq!(again, chain);
    tiered.forget_memory().await;
    assert_content(&tiered.store, &tiered.promote(&chain).await, &chain);
    tiered.stop().await;
}

#[tokio::test]
async fn the_records_of_dropped_blocks_are_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let tiered = Tiered::new(&folder, 32);
    let chain = tiered.offload(1).await;
    assert_eq!(
        tiered.store.with_table(|table| table.remove_from_disk(&chain[2])),
        CHAIN - 2
    );
    let free = || tiered.store.table().disk().counts().free;
    // They are still in memory, and nothing is written twice without a reason.
    eventually("their slots are free", || free() == 32 - 2).await;
    tiered.check_log();
    tiered.stop().await;
    let tiered = Tiered::new(&folder, 32);
    assert_eq!(tiered.store.table().disk().counts().stored, 2);
    tiered.stop().await;
}

#[tokio::test]
async fn a_full_file_system_stops_writes_and_not_reads() {
    let folder = tempfile::tempdir().unwrap();
    let tiered = Tiered::new(&folder, 32);
    let before = tiered.offload(1).await;
    tiered.file.set(DiskFaults {
        write: Some(io::ErrorKind::StorageFull),
        ..DiskFaults::default()
    });
    let after = commit(&tiered.store, 2);
    let disk = tiered.store.disk().unwrap();
    eventually("writes are held", || !disk.is_writable()).await;
    assert!(disk.is_readable());
    assert_eq!(tiered.on_disk(&after), 0);
    assert_eq!(tiered.store.lookup_len(&after), CHAIN, "serving goes on");
    tiered.forget_memory().await;
    assert_content(&tiered.store, &tiered.promote(&before).await, &before);
    // Room is made.
    tiered.file.set(DiskFaults::default());
    let later = tiered.offload(3).await;
    tiered.forget_memory().await;
    assert_content(&tiered.store, &tiered.promote(&later).await, &later);
    tiered.check_log();
    tiered.stop().await;
}

#[tokio::test]
async fn a_disk_that_fails_is_passed_over_until_it_is_well() {
    let folder = tempfile::tempdir().unwrap();
    let tiered = Tiered::new(&folder, 64);
    let chain = tiered.offload(1).await;
    tiered.forget_memory().await;
    tiered.file.set(DiskFaults {
        read: Some(io::ErrorKind::Other),
        write: Some(io::ErrorKind::Other),
        ..DiskFaults::default()
    });
    let disk = tiered.store.disk().unwrap();
    for _ in 0..3 {
        if disk.is_readable() {
            assert!(tiered.promote(&chain).await.is_empty());
        }
    }
    assert!(!disk.is_readable() && !disk.is_writable());
    // The slots of reads that failed come back a moment later.
    eventually("memory is free", || tiered.store.stats().blocks.owned == 0).await;
    let other = commit(&tiered.store, 2);
    assert_eq!(tiered.store.lookup_len(&other), CHAIN, "serving goes on");
    tiered.file.set(DiskFaults::default());
    eventually("a probe finds it well", || disk.is_readable()).await;
    // What is written to disk leaves no room meanwhile.
    tiered.written(&other).await;
    assert_content(&tiered.store, &tiered.promote(&chain).await, &chain);
    tiered.check_log();
    tiered.stop().await;
}

#[tokio::test]
async fn a_slow_disk_is_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let mut bounds = bounds();
    bounds.limits.rate_min = 1 << 20;
    bounds.limits.bypass_min = PATIENCE;
    let store = lonely_store(POOL, Config::default());
    let tiered = Tiered::over(store, &folder, 64, bounds);
    let chain = tiered.offload(1).await;
    tiered.forget_memory().await;
    let disk = tiered.store.disk().unwrap();
    tiered.file.set(DiskFaults {
        rate: Some(5e3),
        ..DiskFaults::default()
    });
    let began = Instant::now();
    while disk.is_readable() && began.elapsed() < PATIENCE {
        let deadline = Instant::now() + Duration::from_millis(50);
        let pins = promote_prefix(&tiered.store, &chain, deadline).await;
        assert!(
            deadline.elapsed() < Duration::from_secs(1),
            "the disk's slowness is nobody else's"
        );
        drop(pins);
        tiered.forget_memory().await;
    }
    assert!(!disk.is_readable() && !disk.is_writable());
    let other = commit(&tiered.store, 2);
    assert_eq!(tiered.store.lookup_len(&other), CHAIN, "serving goes on");
    tiered.stop().await;
}

#[tokio::test]
async fn a_silent_disk_costs_a_bounded_wait_and_no_memory_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let mut bounds = bounds();
    bounds.limits.stall_max = Duration::from_millis(100);
    let store = lonely_store(POOL, Config::default());
    let tiered = Tiered::over(store, &folder, 64, bounds);
    let chain = tiered.offload(1).await;
    tiered.forget_memory().await;
    tiered.file.set(DiskFaults {
        is_silent: true,
        ..DiskFaults::default()
    });
    let deadline = Instant::now() + Duration::from_millis(50);
    assert!(promote_prefix(&tiered.store, &chain, deadline).await.is_empty());
    assert!(
        tiered.store.stats().blocks.owned > 0,
        "what may still be written to is nobody else's"
    );
    let disk = tiered.store.disk().unwrap();
    eventually("it is passed over", || !disk.is_readable()).await;
    tiered.file.set(DiskFaults::default());
    eventually("its memory is back", || tiered.store.stats().blocks.owned == 0).await;
    eventually("a probe finds it well", || disk.is_readable()).await;
    assert_content(&tiered.store, &tiered.promote(&chain).await, &chain);
    tiered.stop().await;
}

#[tokio::test]
async fn a_disk_that_falls_silent_in_the_middle_of_a_write_is_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let mut bounds = bounds();
    bounds.limits.stall_max = Duration::from_millis(100);
    let store = lonely_store(POOL, Config::default());
    let tiered = Tiered::over(store, &folder, 64, bounds);
    tiered.file.set(DiskFaults {
        is_silent: true,
        ..DiskFaults::default()
    });
    let chain = commit(&tiered.store, 1);
    let disk = tiered.store.disk().unwrap();
    eventually("it is passed over", || !disk.is_readable()).await;
    let pins = tiered.promote(&chain).await;
    assert_content(&tiered.store, &pins, &chain);
    drop(pins);
    tiered.file.set(DiskFaults::default());
    tiered.written(&chain).await;
    tiered.check_log();
    tiered.stop().await;
}

#[tokio::test]
async fn a_file_of_blocks_that_was_lost_is_a_miss() {
    let folder = tempfile::tempdir().unwrap();
    let tiered = Tiered::new(&folder, 32);
    let chain = tiered.offload(1).await;
    tiered.stop().await;
    fs::remove_file(folder.path().join("blocks")).unwrap();
    let tiered = Tiered::new(&folder, 32);
    assert_eq!(tiered.on_disk(&chain), CHAIN);
    assert!(tiered.promote(&chain).await.is_empty());
    assert_eq!(tiered.on_disk(&chain), 0);
    tiered.check_log();
    tiered.stop().await;
}

#[tokio::test]
async fn memory_that_runs_short_is_written_coldest_first() {
    let folder = tempfile::tempdir().unwrap();
    let tiered = Tiered::new(&folder, 64);
    // More chains than the pool holds at a time: each has to be on disk when the next one displaces it.
    let mut chains = Vec::new();
    for seed in 1..=5 {
        chains.push(tiered.offload(seed).await);
    }
    for chain in &chains {
        assert_content(&tiered.store, &tiered.promote(chain).await, chain);
    }
    tiered.check_log();
    tiered.stop().await;
}

#[tokio::test]
async fn a_peer_reads_what_is_only_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let holder = Peer::start(POOL, Config::default()).await;
    let tiered = Tiered::over(holder.store.clone(), &folder, 32, bounds());
    let chain = tiered.offload(1).await;
    tiered.forget_memory().await;
    let reader = Peer::start(POOL, Config::default()).await;
    let sources = [Source {
        node_id: "peer".to_owned(),
        grpc_endpoint: holder.grpc_endpoint.clone(),
        blocks: CHAIN,
    }];
    let fetch = |from| Fetch {
        purpose: crate::table::Purpose::Request,
        root: reader.store.common_root(),
        chain: &chain,
        from,
        sources: &sources,
        deadline: Instant::now() + PATIENCE,
    };
    let fetched = fetch_prefix(&reader.store, &channels(), fetch(0)).await;
    assert_content(&reader.store, &fetched.blocks, &chain);
    assert_eq!(fetched.promoted, 0, "it is no disk of the reader's");

    // From the middle: what comes before is only on disk too.
    drop(fetched);
    tiered.forget_memory().await;
    let mut client = holder.client();
    let request = proto::v1::AcquireRequest {
        moved: false,
        kv_root: holder.store.common_root().0.to_vec(),
        hashes: proto::convert::hashes_to_wire(&chain[3..]),
        lease_ttl_ms: 60_000,
    };
    let answer = client.acquire(request).await.unwrap().into_inner();
    assert_eq!(answer.blocks.len(), CHAIN - 3);
    tiered.check_log();
    reader.stop().await;
    tiered.shutdown.cancel();
    holder.stop().await;
}

#[tokio::test]
async fn a_hint_brings_blocks_into_memory_ahead_of_their_request() {
    let folder = tempfile::tempdir().unwrap();
    let holder = Peer::start(POOL, Config::default()).await;
    let tiered = Tiered::over(holder.store.clone(), &folder, 32, bounds());
    let chain = tiered.offload(1).await;
    tiered.forget_memory().await;
    let mut client = holder.client();
    let hint = proto::v1::PrefetchRequest {
        kv_root: holder.store.common_root().0.to_vec(),
        hashes: proto::convert::hashes_to_wire(&chain),
    };
    let answer = client.prefetch(hint.clone()).await.unwrap().into_inner();
    assert_eq!((answer.held_blocks, answer.promoting_blocks), (0, CHAIN as u64));
    eventually("they are in memory", || holder.store.lookup_len(&chain) == CHAIN).await;
    let answer = client.prefetch(hint).await.unwrap().into_inner();
    assert_eq!((answer.held_blocks, answer.promoting_blocks), (CHAIN as u64, 0));
    tiered.shutdown.cancel();
    holder.stop().await;
}

#[tokio::test]
async fn writing_to_disk_makes_no_block_look_used() {
    let folder = tempfile::tempdir().unwrap();
    let tiered = Tiered::new(&folder, 32);
    let chain = commit(&tiered.store, 1);
    let before: Vec<BlockHash> = coldest(&tiered.store);
    tiered.written(&chain).await;
    assert_eq!(coldest(&tiered.store), before);
    tiered.stop().await;
}

fn coldest(store: &Store) -> Vec<BlockHash> {
    let mut table = store.table();
    let coldest = table.coldest(POOL, std::time::Instant::now());
    coldest.into_iter().map(|victim| victim.hash).collect()
}

/// An end in the middle: a slot whose record was cleared and whose block is half written.
#[tokio::test]
async fn a_block_whose_write_was_cut_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let tiered = Tiered::new(&folder, 32);
    let chain = tiered.offload(1).await;
    tiered.stop().await;
    let index = folder.path().join("index");
    let bytes = fs::read(&index).unwrap();
    // The record of the fourth block is half there.
    let mut torn = bytes.clone();
    let at = disk::format::HEADER_BYTES + 3 * RECORD_BYTES;
    torn[at + 20..at + RECORD_BYTES].fill(0);
    fs::write(&index, &torn).unwrap();
    let store = lonely_store(POOL, Config::default());
    let config = disk::Config {
        folder: folder.path().to_owned(),
        capacity_bytes: 32 * disk::file::slot_bytes(space().layout.block_bytes()),
        bounds: bounds(),
    };
    store.open_disk(&config).unwrap();
    assert_eq!(store.table().disk().match_len(&chain), 3);
    assert_eq!(
        store.table().disk().counts().stored,
        3,
        "what continues a block that is gone is gone too"
    );
    let pins = promote_prefix(&store, &chain, Instant::now() + PATIENCE).await;
    assert_content(&store, &pins, &chain[..3]);
}
