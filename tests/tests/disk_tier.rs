//! A store's disk tier outlives its process, however that dies, and a store outlives its disk.

#![allow(missing_docs)]

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use engine::fixture::{TinyModel, write_tiny_gguf};
use kv_store::log::{Batch, BatchKind};
use node::Channel;
use proto::v1::kv_store_client::KvStoreClient;
use proto::{convert, v1};
use tests::cases::Random;
use tests::{Cluster, PATIENCE, Process, free_port, perigee, wait_for};
use tokio::time::{Instant, timeout};
use transfer::{HostMemory, Keep, RemoteRegion, Slice, TcpTransport, TransferBatch, Transport, memory, tcp};
use twox_hash::XxHash3_64;
use types::{BlockEvent, BlockHash, Epoch, KvSpace, Tier, Token};

/// Blocks of a chain, which is put in one go.
const CHAIN: usize = 8;
const BLOCK_TOKENS: usize = 32;
const KILLS: u64 = 5;
/// Blocks that come to disk in each life, at least.
const BLOCKS_PER_LIFE: u64 = 64;
/// Of the blocks on disk, how many a restart must find.
const FOUND_MIN: f64 = 0.99;

/// For tests that are not about the machine's disk, which others use too.
const PATIENT: &[&str] = &[
    "kv.disk_rate_min=0B",
    "kv.disk_stall_max=60s",
    "kv.disk_promote_timeout=60s",
];

/// A `perigee store` whose disk tier is always in the same folder.
struct Home {
    folder: tempfile::TempDir,
    /// Settings beside those of every store here.
    settings: &'static [&'static str],
    model: PathBuf,
    registry: String,
    space: KvSpace,
    /// Members of the cluster that the store belongs to.
    _cluster: Cluster,
}

/// One life of it.
struct Life {
    process: Process,
    client: KvStoreClient<Channel>,
    http: String,
}

impl Home {
    fn new(settings: &'static [&'static str]) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        fs::create_dir(folder.path().join("disk")).expect("folder");
        let model = folder.path().join("tiny.gguf");
        write_tiny_gguf(&model, &TinyModel::default()).expect("write the model");
        let cluster = Cluster::start(&model, &["--kv-memory", "16MiB", "--threads", "1"]);
        let file = engine::ModelFile::open(&model).expect("a model");
        Self {
            space: engine::model::kv_space(&file, engine::Precision::Fast, BLOCK_TOKENS),
            folder,
            settings,
            model,
            registry: cluster.ready.registry.clone(),
            _cluster: cluster,
        }
    }

    fn disk(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    async fn live(&self) -> Life {
        let (grpc, http) = (free_port(), free_port());
        let mut command = Command::new(perigee());
        command
            .args(["store", "--registry", &self.registry, "--id", "store-disk"])
            .args(["--grpc-port", &grpc.to_string(), "--http-port", &http.to_string()])
            // Far less than what is put: the disk has to hold it.
            .args(["--kv-memory", "2MiB", "--block-tokens", &BLOCK_TOKENS.to_string()])
            .args([
                "--set",
                "kv.disk_capacity=256MiB",
                "--set",
                "kv.disk_write_rate=0B",
            ])
            .args(self.settings.iter().flat_map(|setting| ["--set", setting]))
            .args(["--set", &format!("kv.disk_path={}", self.disk().display())])
            .arg("--model")
            .arg(&self.model);
        let process = Process::start(&mut command, self.folder.path(), "store");
        let channel = node::channel(&format!("127.0.0.1:{grpc}")).expect("an endpoint");
        let mut client = KvStoreClient::new(channel);
        let start = Instant::now();
        while client.stats(v1::StatsRequest {}).await.is_err() {
            assert!(start.elapsed() < PATIENCE, "the store does not serve");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Life {
            process,
            client,
            http: format!("http://127.0.0.1:{http}"),
        }
    }

    fn chain(&self, seed: u32) -> Vec<BlockHash> {
        let tokens: Vec<Token> = (0..(CHAIN * BLOCK_TOKENS) as u32)
            .map(|i| seed * 1000 + i)
            .collect();
        self.space.root().chain(&tokens, BLOCK_TOKENS)
    }

    /// What the block with this hash holds.
    fn content(&self, hash: BlockHash) -> Vec<u8> {
        let mut random = Random::new(u64::from_le_bytes(hash.0[..8].try_into().expect("8 bytes")));
        let words = self.space.layout.block_bytes() / 8;
        (0..words).flat_map(|_| random.draw().to_le_bytes()).collect()
    }
}

impl Life {
    fn metric(&self, name: &str) -> u64 {
        let page = Command::new("curl")
            .args(["-sf", &format!("{}/metrics", self.http)])
            .output()
            .expect("curl");
        let page = String::from_utf8(page.stdout).expect("UTF-8");
        let line = page.lines().find(|line| line.split(' ').next() == Some(name));
        let value = line.and_then(|line| line.split(' ').nth(1));
        value
            .unwrap_or_else(|| panic!("{name} is missing in\n{page}"))
            .parse()
            .expect("a number")
    }

    /// What the store says it holds, right after its start.
    async fn announced(&mut self) -> HashSet<BlockHash> {
        let request = v1::WatchRequest {
            epoch: 0,
            from_sequence: 0,
        };
        let mut log = self.client.watch(request).await.expect("a log").into_inner();
        let mut held = HashSet::new();
        loop {
            let batch = log.message().await.expect("a batch").expect("a batch");
            let batch = Batch::from_wire(&batch).expect("readable");
            let BatchKind::Snapshot { last } = batch.kind else {
                panic!("a snapshot comes first");
            };
            for event in batch.events {
                let BlockEvent::Stored { hash, tier, .. } = event else {
                    panic!("a snapshot says what is stored");
                };
                assert_eq!(tier, Tier::Disk, "memory is empty after a start");
                held.insert(hash);
            }
            if last {
                return held;
            }
        }
    }
}

/// The other side of puts and gets.
struct Peer {
    transport: Arc<TcpTransport>,
    memory: Arc<HostMemory>,
    region: transfer::RegionId,
    block_bytes: usize,
}

impl Peer {
    async fn new(block_bytes: usize) -> Self {
        // Over TCP, whatever else there is.
        let mut config = tcp::Config::default();
        config.ucx.choice = transfer::ucx::Choice::Tcp;
        let address = "127.0.0.1:0".parse().expect("an address");
        let transport = TcpTransport::bind(address, Epoch(1), config)
            .await
            .expect("bound");
        let memory = HostMemory::allocate(CHAIN * block_bytes).expect("memory");
        Self {
            region: transport.register(memory.clone()).expect("registered"),
            transport,
            memory,
            block_bytes,
        }
    }

    fn batch(&self, region: Option<v1::RemoteRegion>, offsets: impl Iterator<Item = u64>) -> TransferBatch {
        let v1::RemoteRegion { endpoint, epoch, key } = region.expect("a region");
        let len = self.block_bytes as u64;
        let slice = |(i, remote_offset)| Slice {
            local_offset: i as u64 * len,
            remote_offset,
            len,
        };
        TransferBatch {
            region: self.region,
            remote: RemoteRegion {
                endpoint,
                epoch: Epoch(epoch),
                key,
            },
            slices: offsets.enumerate().map(slice).collect(),
            keep: Keep::default(),
        }
    }

    /// `None`: the store is gone.
    async fn put(&self, home: &Home, client: &mut KvStoreClient<Channel>, chain: &[BlockHash]) -> Option<()> {
        let root = home.space.root().0.to_vec();
        let request = v1::ReserveRequest {
            kv_root: root.clone(),
            parent: root,
            hashes: convert::hashes_to_wire(chain),
            lease_ttl_ms: 10_000,
        };
        let reserved = client.reserve(request).await.ok()?.into_inner();
        let hashes = chain.iter().skip(reserved.held_blocks as usize);
        let mut checksums = Vec::new();
        for (i, hash) in hashes.take(reserved.block_offsets.len()).enumerate() {
            let content = home.content(*hash);
            checksums.push(XxHash3_64::oneshot(&content));
            memory::copy_in(&*self.memory, i * self.block_bytes, &content).expect("it fits");
        }
        if checksums.is_empty() {
            return Some(());
        }
        let batch = self.batch(reserved.region, reserved.block_offsets.into_iter());
        self.transport
            .write(batch, Instant::now() + PATIENCE)
            .await
            .ok()?;
        let request = v1::CommitRequest {
            reservation_id: reserved.reservation_id,
            checksums,
        };
        client.commit(request).await.ok().map(|_| ())
    }

    /// Reads what the store gives of the chain, and proves every byte.
    async fn get(&self, home: &Home, client: &mut KvStoreClient<Channel>, chain: &[BlockHash]) -> usize {
        let request = v1::AcquireRequest {
            moved: false,
            kv_root: home.space.root().0.to_vec(),
            hashes: convert::hashes_to_wire(chain),
            lease_ttl_ms: 60_000,
        };
        let acquired = client.acquire(request).await.expect("an answer").into_inner();
        let count = acquired.blocks.len();
        if count == 0 {
            return 0;
        }
        let batch = self.batch(acquired.region, acquired.blocks.iter().map(|block| block.offset));
        self.transport
            .read(batch, Instant::now() + PATIENCE)
            .await
            .expect("read");
        for (i, hash) in chain.iter().take(count).enumerate() {
            let read = memory::copy_out(&*self.memory, i * self.block_bytes, self.block_bytes);
            assert!(
                read.expect("inside") == home.content(*hash),
                "block {hash} has other bytes"
            );
        }
        let request = v1::ReleaseRequest {
            lease_id: acquired.lease_id,
        };
        client.release(request).await.expect("released");
        count
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_killed_while_it_writes_finds_its_disk_again() {
    let home = Arc::new(Home::new(PATIENT));
    let peer = Arc::new(Peer::new(home.space.layout.block_bytes()).await);
    let put = Arc::new(AtomicU32::new(0));
    let (mut on_disk, mut expected, mut found) = (0, 0, 0);
    for _ in 0..=KILLS {
        let mut life = home.live().await;
        let announced = life.announced().await;
        let mut verified = 0;
        for seed in 0..put.load(Ordering::Acquire) {
            let chain = home.chain(seed);
            let promised = chain.iter().take_while(|hash| announced.contains(*hash)).count();
            let read = peer.get(&home, &mut life.client, &chain).await;
            assert!(read <= promised, "what is not announced is not held");
            verified += read as u64;
        }
        assert!(
            verified as f64 >= FOUND_MIN * on_disk as f64,
            "{verified} blocks were read again of {on_disk}, and {} announced",
            announced.len()
        );
        expected += on_disk;
        found += verified;

        let writer = tokio::spawn({
            let (home, peer, put) = (home.clone(), peer.clone(), put.clone());
            let mut client = life.client.clone();
            async move {
                loop {
                    let seed = put.fetch_add(1, Ordering::AcqRel);
                    let chain = home.chain(seed);
                    let putting = peer.put(&home, &mut client, &chain);
                    if !matches!(timeout(PATIENCE, putting).await, Ok(Some(()))) {
                        return;
                    }
                }
            }
        });
        let life = tokio::task::block_in_place(|| {
            on_disk = wait_for("blocks on disk", || {
                let blocks = life.metric("perigee_kvstore_disk_blocks");
                (blocks >= verified + BLOCKS_PER_LIFE).then_some(blocks)
            });
            life.process.kill();
            life
        });
        timeout(PATIENCE, writer)
            .await
            .expect("it ends")
            .expect("no panic");
        drop(life);
    }
    println!(
        "{found} blocks were read and verified after {KILLS} kills; {expected} were known to be on disk"
    );
}

/// A file system of its own, which goes when this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    /// `None`, and it is said why, where this process may not mount.
    fn new(arguments: &[&str], at: &Path) -> Option<Self> {
        let mounted = run("mount", &[arguments, &[&at.to_string_lossy()]].concat());
        mounted.map(|()| Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &["--lazy", &self.0.to_string_lossy()]);
    }
}

/// Bounds what processes read from and write to one device.
struct Slowed {
    group: PathBuf,
    device: String,
    process: u32,
}

impl Slowed {
    /// `None`, and it is said why, where the system has no such bound or this process may not set it.
    fn new(device: &str, bytes_per_second: u64, process: u32) -> Option<Self> {
        let group = PathBuf::from(format!("/sys/fs/cgroup/blkio/perigee-{process}"));
        if let Err(error) = fs::create_dir(&group) {
            println!("skipped: {}: {error}", group.display());
            return None;
        }
        let slowed = Self {
            group,
            device: device.to_owned(),
            process,
        };
        slowed.allow(bytes_per_second);
        fs::write(slowed.group.join("cgroup.procs"), process.to_string()).expect("the process lives");
        Some(slowed)
    }

    /// From now on, so many bytes per second; 0 is no bound.
    fn allow(&self, bytes_per_second: u64) {
        for direction in ["read", "write"] {
            let file = self.group.join(format!("blkio.throttle.{direction}_bps_device"));
            fs::write(&file, format!("{} {bytes_per_second}", self.device)).expect("it can be set");
        }
    }
}

impl Drop for Slowed {
    fn drop(&mut self) {
        // A group goes when nobody is in it.
        fs::write("/sys/fs/cgroup/blkio/cgroup.procs", self.process.to_string()).ok();
        fs::remove_dir(&self.group).ok();
    }
}

/// `None`, and it is said why, where the command fails.
fn run(program: &str, arguments: &[&str]) -> Option<()> {
    let output = Command::new(program).args(arguments).output().expect("start");
    if output.status.success() {
        return Some(());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    println!("skipped: {program} {arguments:?}: {errors}");
    None
}

/// Puts one chain after the other until `enough`, and reads each of them back. Returns how many were put.
async fn put_until(
    home: &Home,
    life: &mut Life,
    peer: &Peer,
    first: u32,
    mut enough: impl FnMut(&Life) -> bool,
) -> u32 {
    let start = Instant::now();
    let mut seed = first;
    while !enough(life) {
        assert!(
            start.elapsed() < PATIENCE,
            "it never came to that\n{}",
            life.process.log()
        );
        let chain = home.chain(seed);
        peer.put(home, &mut life.client, &chain)
            .await
            .expect("the store serves");
        let read = peer.get(home, &mut life.client, &chain).await;
        assert_eq!(read, CHAIN, "what was just put is in memory");
        seed += 1;
    }
    seed
}

/// Enough for [`put_until`] once it has looked so many times.
fn looked(times: u32) -> impl FnMut(&Life) -> bool {
    let mut left = times;
    move |_| {
        left -= 1;
        left == 0
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_system_that_is_really_full_stops_writes_and_nothing_else() {
    let home = Home::new(&[
        "kv.disk_rate_min=0B",
        "kv.disk_stall_max=60s",
        "kv.disk_promote_timeout=60s",
        "kv.disk_bypass_min=1s",
        "kv.disk_bypass_max=1s",
    ]);
    let Some(mounted) = Mounted::new(&["-t", "tmpfs", "-o", "size=4m", "tmpfs"], &home.disk()) else {
        return;
    };
    let peer = Peer::new(home.space.layout.block_bytes()).await;
    let mut life = home.live().await;
    let full = |life: &Life| {
        life.metric("perigee_kvstore_disk_writable") == 0 && life.process.log().contains("the disk is full")
    };
    let put = put_until(&home, &mut life, &peer, 0, full).await;
    // What is there is read while nothing more fits, and every byte of it is right.
    assert_eq!(life.metric("perigee_kvstore_disk_readable"), 1);
    let before = life.metric("perigee_kvstore_disk_read_blocks_total");
    for seed in 0..put {
        peer.get(&home, &mut life.client, &home.chain(seed)).await;
    }
    assert!(life.metric("perigee_kvstore_disk_read_blocks_total") > before);
    let put = put_until(&home, &mut life, &peer, put, looked(20)).await;
    // Room that somebody makes is found.
    let written = life.metric("perigee_kvstore_disk_written_blocks_total");
    run("mount", &["-o", "remount,size=64m", &mounted.0.to_string_lossy()])
        .expect("it was mounted by this process");
    let room = |life: &Life| life.metric("perigee_kvstore_disk_written_blocks_total") > written + 64;
    put_until(&home, &mut life, &peer, put, room).await;
    assert_eq!(life.metric("perigee_kvstore_corruptions_total"), 0);
}

/// A real file system on a real block device, which the system lets through 5 MB per second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_really_slow_is_passed_over_until_it_is_not() {
    const SLOW: u64 = 5_000_000;
    let home = Home::new(&[
        // Three times what the disk will give.
        "kv.disk_rate_min=16MiB",
        "kv.disk_stall_max=60s",
        "kv.disk_promote_timeout=60s",
        "kv.disk_bypass_min=1s",
        "kv.disk_bypass_max=1s",
    ]);
    let image = home.folder.path().join("image");
    let sized = fs::File::create(&image).and_then(|file| file.set_len(128 << 20));
    sized.expect("room for an image");
    let path = image.to_string_lossy();
    let Some(mounted) =
        run("mkfs.ext4", &["-q", &path]).and_then(|()| Mounted::new(&["-o", "loop", &path], &home.disk()))
    else {
        return;
    };
    let device = Command::new("findmnt")
        .args(["-no", "MAJ:MIN"])
        .arg(&mounted.0)
        .output();
    let device = String::from_utf8(device.expect("findmnt").stdout).expect("UTF-8");
    let peer = Peer::new(home.space.layout.block_bytes()).await;
    let mut life = home.live().await;
    let Some(slowed) = Slowed::new(device.trim(), SLOW, life.process.pid().as_raw().unsigned_abs()) else {
        return;
    };
    let slow = |life: &Life| {
        life.metric("perigee_kvstore_disk_readable") == 0 && life.process.log().contains("the disk is slow")
    };
    let put = put_until(&home, &mut life, &peer, 0, slow).await;
    // Nobody waits for it: memory serves.
    let begun = Instant::now();
    let put = put_until(&home, &mut life, &peer, put, looked(20)).await;
    let served = begun.elapsed();
    slowed.allow(0);
    let written = life.metric("perigee_kvstore_disk_written_blocks_total");
    let well = |life: &Life| {
        life.metric("perigee_kvstore_disk_readable") == 1
            && life.metric("perigee_kvstore_disk_written_blocks_total") > written + 64
    };
    let put = put_until(&home, &mut life, &peer, put, well).await;
    let mut from_disk = 0;
    for seed in 0..put {
        from_disk += peer.get(&home, &mut life.client, &home.chain(seed)).await;
    }
    assert!(from_disk > 0);
    assert_eq!(life.metric("perigee_kvstore_corruptions_total"), 0);
    println!("20 chains were put and read in {served:?} while the disk was slow");
}
