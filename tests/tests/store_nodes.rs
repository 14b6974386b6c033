//! Nodes that only hold blocks, as processes: what is read of them is right, or it is a miss or an error that says why.

#![allow(missing_docs)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use client::{Blocks, Buffer, Place};
use engine::fixture::{TinyModel, write_tiny_gguf};
use tests::cases::Random;
use tests::{Cluster, PATIENCE, Process, client, newer, perigee, records, wait_for_status};
use tokio::task::JoinSet;
use transfer::{TcpTransport, tcp};
use types::{BlockHash, Epoch, Error, ErrorCode, NodeRecord, Token};

const STORES: usize = 3;
const READERS: u32 = 4;
/// Conversations that the readers share, and their length.
const CHAINS: u64 = 64;
const BLOCKS: usize = 5;
/// Calls that must have ended since the last change before a node is killed or looked at again.
const CALLS_PER_LIFE: u64 = 200;
/// A node whose process died is out of the router's reach within this.
const UNROUTABLE_WITHIN: Duration = Duration::from_secs(2);

/// A store that is started again under its name.
struct Store {
    id: String,
    registry: String,
    model: PathBuf,
    folder: tempfile::TempDir,
}

impl Store {
    fn new(number: usize, cluster: &Cluster, model: &Path) -> Self {
        Self {
            id: format!("store-{number}"),
            registry: cluster.ready.registry.clone(),
            model: model.to_owned(),
            folder: tempfile::tempdir().expect("folder"),
        }
    }

    fn start(&self) -> Process {
        let mut command = Command::new(perigee());
        command
            .args(["store", "--registry", &self.registry, "--id", &self.id])
            .args(["--kv-memory", "1MiB", "--model"])
            .arg(&self.model);
        Process::start(&mut command, self.folder.path(), &self.id)
    }

    /// Waits until the router does not count on it any more, and says how long that took.
    async fn unroutable(&self, grpc: &str) -> Duration {
        let begun = Instant::now();
        let mut client = client(grpc).await;
        wait_for_status(&mut client, |status| {
            if records(&status).any(|record| record.id.as_str() == self.id) {
                return Err(format!("the router still counts on {}", self.id));
            }
            Ok(begun.elapsed())
        })
        .await
    }
}

/// What readers and writers found.
#[derive(Default)]
struct Found {
    calls: AtomicU64,
    blocks: AtomicU64,
    misses: AtomicU64,
    errors: AtomicU64,
    stop: AtomicBool,
}

/// Bytes that only the block with this hash has.
fn content(hash: BlockHash, block_bytes: usize) -> Vec<u8> {
    hash.0.iter().copied().cycle().take(block_bytes).collect()
}

/// Puts and gets at random until it is told to stop.
async fn use_stores(
    seed: u32,
    transport: Arc<TcpTransport>,
    records: Arc<Mutex<Vec<NodeRecord>>>,
    found: Arc<Found>,
) {
    let mut random = Random::new(u64::from(seed));
    let mut buffer: Option<Buffer> = None;
    while !found.stop.load(Relaxed) {
        let record = random.choose(&records.lock().expect("nobody panics")).clone();
        let blocks = Blocks::new(transport.clone(), &record).expect("a store holds blocks");
        let blocks = blocks.with_deadline(Duration::from_secs(2));
        let buffer = buffer.get_or_insert_with(|| blocks.allocate(BLOCKS).expect("memory"));
        let block_tokens = record.kv_space.as_ref().expect("a space").layout.block_tokens;
        // One of a few conversations, so that readers find what others have put.
        let conversation = random.between(0, CHAINS - 1) as Token;
        let tokens: Vec<Token> = (0..(BLOCKS * block_tokens) as Token)
            .map(|i| i ^ conversation)
            .collect();
        let chain = blocks.kv_root().chain(&tokens, block_tokens);
        let begun = Instant::now();
        let outcome = if random.one_in(3) {
            for (at, hash) in chain.iter().enumerate() {
                buffer
                    .fill(at, &content(*hash, blocks.block_bytes()))
                    .expect("it fits");
            }
            let place = Place {
                parent: blocks.kv_root(),
                tenant: "",
            };
            blocks.put_from(place, &chain, buffer, 0).await.map(drop)
        } else {
            read(&blocks, &chain, buffer, &found).await
        };
        assert!(
            begun.elapsed() < PATIENCE,
            "a call hung for {:?}",
            begun.elapsed()
        );
        if let Err(error) = outcome {
            let expected = [ErrorCode::Unavailable, ErrorCode::Fenced, ErrorCode::Timeout];
            assert!(expected.contains(&error.code), "{error}");
            found.errors.fetch_add(1, Relaxed);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        found.calls.fetch_add(1, Relaxed);
    }
}

async fn read(blocks: &Blocks, chain: &[BlockHash], buffer: &Buffer, found: &Found) -> Result<(), Error> {
    for at in 0..chain.len() {
        buffer.fill(at, &vec![0xee; blocks.block_bytes()])?;
    }
    let got = blocks.get_into(chain, buffer, 0).await?;
    for (at, hash) in chain[..got].iter().enumerate() {
        assert!(
            buffer.bytes(at)? == content(*hash, blocks.block_bytes()),
            "wrong bytes in block {at}"
        );
    }
    found.blocks.fetch_add(got as u64, Relaxed);
    found.misses.fetch_add(u64::from(got < chain.len()), Relaxed);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_die_in_turn_under_load_and_no_byte_is_wrong() {
    let folder = tempfile::tempdir().expect("folder");
    let model = folder.path().join("tiny.gguf");
    write_tiny_gguf(&model, &TinyModel::default()).expect("model");
    let cluster = Cluster::start(&model, &["--prefill", "1", "--decode", "1"]);
    let grpc = &cluster.ready.grpc;
    let stores: Vec<Store> = (0..STORES)
        .map(|number| Store::new(number, &cluster, &model))
        .collect();
    let mut processes: Vec<Process> = stores.iter().map(Store::start).collect();
    let records = Arc::new(Mutex::new(Vec::new()));
    for store in &stores {
        let record = newer(grpc, &store.id, Epoch(0)).await;
        records.lock().expect("nobody panics").push(record);
    }
    let address = "127.0.0.1:0".parse().expect("an address");
    let transport = TcpTransport::bind(address, Epoch(1), tcp::Config::default());
    let transport = transport.await.expect("bound");
    let found = Arc::new(Found::default());
    let mut users = JoinSet::new();
    for seed in 0..READERS {
        users.spawn(use_stores(
            seed,
            transport.clone(),
            records.clone(),
            found.clone(),
        ));
    }
    let busy = async |users: &mut JoinSet<()>| {
        let since = found.calls.load(Relaxed);
        while found.calls.load(Relaxed) < since + CALLS_PER_LIFE {
            // Whoever panicked says so now.
            if let Some(ended) = users.try_join_next() {
                ended.expect("readers and writers do not end by themselves");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    for (number, store) in stores.iter().enumerate() {
        busy(&mut users).await;
        let past = records.lock().expect("nobody panics")[number].clone();
        let errors = found.errors.load(Relaxed);
        processes[number].kill();
        let took = store.unroutable(grpc).await;
        assert!(took < UNROUTABLE_WITHIN, "{} was routable for {took:?}", store.id);
        busy(&mut users).await;
        assert!(
            found.errors.load(Relaxed) > errors,
            "nobody noticed: the test proves little"
        );
        processes[number] = store.start();
        let record = newer(grpc, &store.id, past.epoch).await;
        let blocks = Blocks::new(transport.clone(), &record).expect("a store holds blocks");
        let chain = blocks.kv_root().chain(&[1; 1024], 32);
        assert_eq!(
            blocks.exists(&chain).await,
            Ok(vec![false; chain.len()]),
            "it came back empty"
        );
        records.lock().expect("nobody panics")[number] = record;
    }
    busy(&mut users).await;
    found.stop.store(true, Relaxed);
    while let Some(ended) = users.join_next().await {
        ended.expect("no reader found anything wrong");
    }
    let (blocks, misses) = (found.blocks.load(Relaxed), found.misses.load(Relaxed));
    assert!(
        blocks > 100 && misses > 0,
        "{blocks} blocks read, {misses} misses"
    );
    transport.close().await;
}
