//! Transfers that end badly, thousands of them at once, over each way of moving bytes.
#![allow(clippy::single_range_in_vec_init)] // A grant of one range is what is meant.
#![allow(clippy::unwrap_used)] // A test.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rstest::rstest;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use transfer::memory::{copy_in, with_bytes};
use transfer::ucx::Choice;
use transfer::{
    Keep, RegionId, RemoteRegion, Slice, TcpTransport, TransferBatch, TransferError, Transport, tcp,
};
use types::{Epoch, ErrorCode, Memory};

/// Longer than anything here takes, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// After this, nothing of a storm may be left.
const CALM: Duration = Duration::from_secs(1);

/// What moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mover {
    Tcp,
    Ucx,
}

/// A transport that moves bytes in this way, or `None`, with a line that says why there is none here.
async fn bind(mover: Mover, address: SocketAddr, epoch: u64) -> Option<Arc<TcpTransport>> {
    let mut config = tcp::Config::default();
    config.ucx.choice = match mover {
        Mover::Tcp => Choice::Tcp,
        Mover::Ucx => Choice::Ucx,
    };
    match TcpTransport::bind(address, Epoch(epoch), config).await {
        Ok(transport) if mover == Mover::Tcp => Some(transport),
        Ok(transport) => {
            let movers = transport.movers();
            let ucx = movers.iter().find(|found| found.name == "ucx");
            if ucx.is_some_and(|ucx| ucx.usable) {
                return Some(transport);
            }
            let why = ucx.map_or("this build has none", |ucx| &ucx.detail);
            println!("skipped: UCX moves nothing here: {why}");
            None
        }
        Err(error) if mover == Mover::Ucx => {
            println!("skipped: UCX moves nothing here: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn anywhere() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// What one node keeps to one peer. A UCX link has one of its own.
fn connections_per_pair(mover: Mover) -> usize {
    tcp::Config::default().connections_per_peer.get() + usize::from(mover == Mover::Ucx)
}

/// Random numbers that are the same in every run (SplitMix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Files, sockets and the like that this process has open. Hence a process runs one of these tests, as nextest does it.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

async fn eventually(within: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A node that writes. What it writes is all `pattern`.
#[derive(Clone)]
struct Writer {
    transport: Arc<TcpTransport>,
    region: RegionId,
    pattern: u8,
}

impl Writer {
    async fn start(mover: Mover, pattern: u8, bytes: u64) -> Option<Self> {
        let transport = bind(mover, anywhere(), 1).await?;
        let memory = transport.allocate(bytes as usize).unwrap();
        copy_in(&*memory, 0, &vec![pattern; bytes as usize]).unwrap();
        let region = transport.register(memory).unwrap();
        Some(Self {
            transport,
            region,
            pattern,
        })
    }

    /// Writes `len` bytes to `offset` of what was granted.
    async fn write(
        &self,
        remote: &RemoteRegion,
        offset: u64,
        len: u64,
        deadline: Instant,
    ) -> Result<(), TransferError> {
        let slice = Slice {
            local_offset: 0,
            remote_offset: offset,
            len,
        };
        let batch = TransferBatch {
            region: self.region,
            remote: remote.clone(),
            slices: vec![slice],
            keep: Keep::default(),
        };
        self.transport.write(batch, deadline).await.map(drop)
    }
}

impl Writer {
    /// Writes again for as long as what fails is the way to the peer: a connection to the incarnation before, whose end
    /// is only noticed now, or one that was tried while nobody listened.
    async fn write_until_answered(&self, remote: &RemoteRegion, len: u64) -> Result<(), TransferError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.write(remote, 0, len, deadline).await {
                Err(error) if error.code() == ErrorCode::Unavailable && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                answered => return answered,
            }
        }
    }
}

/// Blocks of one node's memory, each of which holds one pattern throughout while nobody may write it.
struct Blocks {
    transport: Arc<TcpTransport>,
    memory: Arc<dyn Memory>,
    region: RegionId,
    block_bytes: u64,
    /// Blocks that nobody uses, the one that was freed last in front, each with the pattern it was left with.
    free: Mutex<VecDeque<(u64, u8)>>,
}

impl Blocks {
    fn take(&self) -> (u64, u8) {
        let mut free = self.free.lock().unwrap();
        free.pop_front().expect("more blocks than tasks")
    }

    fn give_back(&self, block: u64, pattern: u8) {
        self.free.lock().unwrap().push_front((block, pattern));
    }

    fn grant(&self, block: u64) -> RemoteRegion {
        let start = block * self.block_bytes;
        self.transport
            .grant_write(self.region, vec![start..start + self.block_bytes])
            .unwrap()
    }

    /// How many bytes of the block are not `pattern`.
    fn foreign(&self, block: u64, pattern: u8) -> u64 {
        let at = (block * self.block_bytes) as usize;
        let count = |bytes: &[u8]| bytes.iter().filter(|byte| **byte != pattern).count();
        with_bytes(&*self.memory, at, self.block_bytes as usize, count).unwrap() as u64
    }
}

/// How a transfer is ended.
#[derive(Debug, Clone, Copy)]
enum End {
    SenderDrops,
    ReceiverRevokes,
    DeadlinePasses,
    ConnectionsAreCut,
}

/// What came of the transfers that were to be aborted.
#[derive(Debug, Default)]
struct Tally {
    aborted: AtomicU64,
    landed_first: AtomicU64,
}

/// Begins a write of one writer, ends it at a random point, and gives the memory to another writer at once.
async fn abort_and_reuse(blocks: &Blocks, [first, second]: [&Writer; 2], dice: &mut Dice, tally: &Tally) {
    let (block, left_with) = blocks.take();
    assert_eq!(blocks.foreign(block, left_with), 0, "written while nobody might");
    let (offset, len) = (block * blocks.block_bytes, blocks.block_bytes);
    let grant = blocks.grant(block);
    // A cut ends the transfers of all tasks, and is rare enough that most of them end by themselves.
    let end = match dice.below(64) {
        0 => End::ConnectionsAreCut,
        odds => [End::SenderDrops, End::ReceiverRevokes, End::DeadlinePasses][odds as usize % 3],
    };
    let patience = match end {
        End::DeadlinePasses => Duration::from_micros(dice.below(2_000)),
        End::SenderDrops | End::ReceiverRevokes | End::ConnectionsAreCut => PATIENCE,
    };
    let mut writing = tokio::spawn({
        let (first, grant) = (first.clone(), grant.clone());
        async move { first.write(&grant, offset, len, Instant::now() + patience).await }
    });
    // Points of all magnitudes, from before the first byte to after the last one.
    let magnitude = dice.below(8);
    for _ in 0..dice.below(1 << magnitude) {
        tokio::task::yield_now().await;
    }
    let mut ended = None;
    match end {
        End::SenderDrops => writing.abort(),
        // The sender goes on, and finds the grant closed.
        End::ReceiverRevokes => {}
        End::DeadlinePasses => ended = Some((&mut writing).await.unwrap()),
        End::ConnectionsAreCut => first.transport.tear_down(&blocks.transport.endpoint()),
    }
    blocks.transport.revoke(&grant).await;

    let grant = blocks.grant(block);
    second
        .write(&grant, offset, len, Instant::now() + PATIENCE)
        .await
        .expect("what becomes of one writer is nothing to another one");
    blocks.transport.revoke(&grant).await;
    assert_eq!(
        blocks.foreign(block, second.pattern),
        0,
        "bytes of an ended transfer are in memory that has another owner, after {end:?}"
    );
    blocks.give_back(block, second.pattern);

    let ended = match ended {
        Some(ended) => Some(ended),
        None => timeout(PATIENCE, writing)
            .await
            .expect("every transfer ends")
            .ok(),
    };
    match ended {
        Some(Ok(())) => tally.landed_first.fetch_add(1, Relaxed),
        // One whose task was aborted has no result.
        Some(Err(_)) | None => tally.aborted.fetch_add(1, Relaxed),
    };
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_aborted_transfers_leave_no_foreign_byte_and_nothing_behind(
    #[values(Mover::Tcp, Mover::Ucx)] mover: Mover,
) {
    const ABORTED: u64 = 10_000;
    const TASKS: u64 = 16;
    const BLOCK_BYTES: u64 = 96 << 10;
    let before = descriptors();
    let Some(transport) = bind(mover, anywhere(), 1).await else {
        return;
    };
    let memory = transport.allocate((2 * TASKS * BLOCK_BYTES) as usize).unwrap();
    let region = transport.register(memory.clone()).unwrap();
    let blocks = Arc::new(Blocks {
        transport,
        region,
        block_bytes: BLOCK_BYTES,
        free: Mutex::new((0..2 * TASKS).map(|block| (block, 0)).collect()),
        memory,
    });
    // Each open grant holds the memory too.
    let holders = Arc::strong_count(&blocks.memory);
    let first = Writer::start(mover, 0x5a, BLOCK_BYTES).await.unwrap();
    let second = Writer::start(mover, 0xc3, BLOCK_BYTES).await.unwrap();
    let tally = Arc::new(Tally::default());
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (blocks, tally) = (blocks.clone(), tally.clone());
        let writers = [first.clone(), second.clone()];
        tasks.spawn(async move {
            let mut dice = Dice(task);
            while tally.aborted.load(Relaxed) < ABORTED {
                abort_and_reuse(&blocks, [&writers[0], &writers[1]], &mut dice, &tally).await;
            }
        });
    }
    while let Some(joined) = tasks.join_next().await {
        joined.unwrap();
    }
    println!("{mover:?}: {tally:?}");
    let landed_first = tally.landed_first.load(Relaxed);
    assert!(
        landed_first > 0,
        "not one landed: the aborts came too early to prove much"
    );
    let near = || [&first, &second].map(|writer| writer.transport.stats());
    eventually(CALM, "no grant and no transfer is left", || {
        Arc::strong_count(&blocks.memory) == holders
            && near().iter().all(|stats| stats.batches_in_flight == 0)
    })
    .await;
    let connections = 2 * connections_per_pair(mover) as u64;
    eventually(CALM, "no connection is left but those that are kept", || {
        blocks.transport.stats().connections_served <= connections
    })
    .await;
    for (block, pattern) in blocks.free.lock().unwrap().iter() {
        assert_eq!(
            blocks.foreign(*block, *pattern),
            0,
            "block {block} changed after the storm"
        );
    }
    assert_eq!(blocks.free.lock().unwrap().len() as u64, 2 * TASKS);
    assert_eq!(blocks.transport.stats().protocol_violations, 0);
    if mover == Mover::Ucx {
        assert!(second.transport.stats().ucx_batches > 0, "UCX moved something");
    }
    for transport in [&first.transport, &second.transport, &blocks.transport] {
        transport.close().await;
    }
    drop((first, second, blocks));
    eventually(CALM, "every descriptor is closed", || descriptors() <= before).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_small_transfers_use_a_handful_of_sockets(
    #[values(Mover::Tcp, Mover::Ucx)] mover: Mover,
) {
    const TRANSFERS: u64 = 100_000;
    const TASKS: u64 = 32;
    const CELL_BYTES: u64 = 4096;
    let Some(far) = bind(mover, anywhere(), 1).await else {
        return;
    };
    let memory = far.allocate((TASKS * CELL_BYTES) as usize).unwrap();
    let region = far.register(memory.clone()).unwrap();
    let grant = far.grant_write(region, vec![0..TASKS * CELL_BYTES]).unwrap();
    let near = Writer::start(mover, 0x77, CELL_BYTES).await.unwrap();
    let done = Arc::new(AtomicU64::new(0));
    let before = descriptors();
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (near, grant, done) = (near.clone(), grant.clone(), done.clone());
        tasks.spawn(async move {
            let mut dice = Dice(task);
            while done.fetch_add(1, Relaxed) < TRANSFERS {
                let len = 1 + dice.below(CELL_BYTES);
                near.write(&grant, task * CELL_BYTES, len, Instant::now() + PATIENCE)
                    .await
                    .unwrap();
            }
        });
    }
    let per_peer = connections_per_pair(mover);
    let mut most = 0;
    let mut look = tokio::time::interval(Duration::from_millis(10));
    loop {
        tokio::select! {
            _ = look.tick() => most = most.max(descriptors().saturating_sub(before)),
            joined = tasks.join_next() => match joined {
                Some(joined) => joined.unwrap(),
                None => break,
            },
        }
    }
    let (near_stats, far_stats) = (near.transport.stats(), far.stats());
    println!(
        "{mover:?}: {} connections, {most} more descriptors at most",
        near_stats.connections_opened
    );
    assert!(near_stats.batches >= TRANSFERS);
    assert!(near_stats.connections_opened <= per_peer as u64, "{near_stats:?}");
    assert!(far_stats.connections_accepted <= per_peer as u64, "{far_stats:?}");
    // Both ends of every connection are in this process; UCX has a few files of its own for the pair.
    let of_ucx = if mover == Mover::Ucx { 32 } else { 0 };
    assert!(most <= 2 * per_peer + of_ucx, "{most} more descriptors");
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_peer_refuses_every_grant_of_its_past(#[values(Mover::Tcp, Mover::Ucx)] mover: Mover) {
    const RESTARTS: u64 = 100;
    const BYTES: u64 = 16 << 10;
    let Some(mut far) = bind(mover, anywhere(), 1).await else {
        return;
    };
    let near = Writer::start(mover, 0x3c, BYTES).await.unwrap();
    let port = far.endpoint().rsplit_once(':').unwrap().1.parse().unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut stale: Vec<RemoteRegion> = Vec::new();
    for epoch in 1..=RESTARTS {
        let memory = far.allocate(BYTES as usize).unwrap();
        let region = far.register(memory.clone()).unwrap();
        // All that was ever granted, by however many incarnations ago.
        for grant in &stale {
            match near.write_until_answered(grant, BYTES).await {
                Err(TransferError::Fenced {
                    epoch: of, current, ..
                }) => {
                    assert_eq!((of, current), (grant.epoch, Epoch(epoch)));
                }
                other => panic!("a grant of epoch {:?} in epoch {epoch}: {other:?}", grant.epoch),
            }
        }
        let untouched = with_bytes(&*memory, 0, BYTES as usize, |bytes| {
            bytes.iter().all(|byte| *byte == 0)
        });
        assert!(untouched.unwrap(), "a stale write reached memory");
        let grant = far.grant_write(region, vec![0..BYTES]).unwrap();
        near.write_until_answered(&grant, BYTES).await.unwrap();
        let written = with_bytes(&*memory, 0, BYTES as usize, |bytes| {
            bytes.iter().all(|byte| *byte == 0x3c)
        });
        assert!(written.unwrap());
        stale.push(grant.clone());
        if stale.len() > 4 {
            stale.remove(1);
        }
        // One that is under way when the process dies; it ends, in whatever way.
        let late = tokio::spawn({
            let near = near.clone();
            async move { near.write(&grant, 0, BYTES, Instant::now() + PATIENCE).await }
        });
        far.close().await;
        drop(far);
        let _ = timeout(PATIENCE, late).await.expect("it ends").unwrap();
        far = bind(mover, address, epoch + 1).await.unwrap();
    }
}
