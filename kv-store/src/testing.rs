//! What the tests of this crate share: small pools, blocks whose bytes are known, and nodes on 127.0.0.1.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use node::{Channel, Channels};
use proto::v1::cache_client::CacheClient;
use proto::v1::kv_store_client::KvStoreClient;
use proto::v1::transfer_client::TransferClient;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use transfer::mem::Faults;
use transfer::{HostMemory, MemNetwork, TcpTransport, Transport};
use types::{BlockHash, BlockId, Epoch, KvDtype, KvLayout, KvSpace, Memory, NodeId, NodeRecord, Role, Token};

use crate::cache::Cache;
use crate::disk::file::{BlockFile, BlockFiles};
use crate::disk::format::Record;
use crate::disk::table::SlotId;
use crate::service::Service;
use crate::store::{BlockPin, Store};
use crate::transfers::{self, HostReader};
use crate::{Config, SequenceBlocks};

pub(crate) const BLOCK_TOKENS: usize = 8;

/// Long enough for a machine whose cores are all busy; nothing waits this long unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// 512 bytes per block.
pub(crate) fn space() -> KvSpace {
    KvSpace {
        model_digest: "00aa".into(),
        arithmetic: "fast/1".into(),
        layout: KvLayout {
            layers: 2,
            kv_heads: 1,
            head_dim: 8,
            block_tokens: BLOCK_TOKENS,
            dtype: KvDtype::F16,
        },
        adapter: None,
        tenant_salt: String::new(),
    }
}

/// A store of `blocks` blocks that nobody else can reach.
pub(crate) fn lonely_store(blocks: usize, config: Config) -> Store {
    let network = MemNetwork::new(0, Faults::default());
    store_on(blocks, config, Epoch(7), network.join("lonely", Epoch(7)))
}

pub(crate) fn store_on(blocks: usize, config: Config, epoch: Epoch, transport: Arc<dyn Transport>) -> Store {
    let memory = HostMemory::allocate(blocks * space().layout.block_bytes()).unwrap();
    Store::new(config, space(), epoch, memory, transport, &node::Metrics::new()).unwrap()
}

/// Different tokens for every seed.
pub(crate) fn tokens(seed: u32, count: usize) -> Vec<Token> {
    (0..count as u32).map(|i| seed * 10_000 + i).collect()
}

/// What the block with this hash holds, in all tests.
pub(crate) fn content(hash: BlockHash) -> Vec<u8> {
    let bytes = space().layout.block_bytes();
    hash.0
        .iter()
        .copied()
        .cycle()
        .zip(0u8..=255)
        .map(|(byte, i)| byte ^ i)
        .cycle()
        .take(bytes)
        .collect()
}

pub(crate) fn write(store: &Store, block: BlockId, bytes: &[u8]) {
    let at = store.byte_range(block).start as usize;
    transfer::memory::copy_in(store.memory().as_ref(), at, bytes).unwrap();
}

pub(crate) fn read(store: &Store, block: BlockId) -> Vec<u8> {
    let at = store.byte_range(block).start as usize;
    transfer::memory::copy_out(store.memory().as_ref(), at, space().layout.block_bytes()).unwrap()
}

/// Computes and commits every full block of the tokens, as an engine would.
pub(crate) fn compute(store: &Store, tenant: &str, tokens: &[Token]) -> SequenceBlocks {
    let mut sequence = SequenceBlocks::begin(store, tenant, tokens);
    let full = tokens.len() / BLOCK_TOKENS * BLOCK_TOKENS;
    sequence.grow_to(full).unwrap();
    for index in sequence.shared_blocks()..sequence.chain().len() {
        write(
            store,
            sequence.block_ids()[index],
            &content(sequence.chain()[index]),
        );
    }
    sequence.commit_full(tokens, full);
    sequence
}

pub(crate) fn assert_content(store: &Store, pins: &[BlockPin], chain: &[BlockHash]) {
    assert_eq!(pins.iter().map(BlockPin::hash).collect::<Vec<_>>(), chain);
    for pin in pins {
        assert_eq!(
            read(store, pin.block()),
            content(pin.hash()),
            "block {}",
            pin.hash()
        );
    }
}

/// A store that others reach over gRPC and TCP.
pub(crate) struct Peer {
    pub(crate) store: Store,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) transfers: transfers::Service,
    pub(crate) cache: Cache,
    pub(crate) grpc_endpoint: String,
    shutdown: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Peer {
    pub(crate) async fn start(blocks: usize, config: Config) -> Self {
        let epoch = Epoch(7);
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let transport = TcpTransport::bind(address, epoch, transfer::tcp::Config::default())
            .await
            .unwrap();
        Self::serve(store_on(blocks, config, epoch, transport)).await
    }

    pub(crate) async fn serve(store: Store) -> Self {
        let shutdown = CancellationToken::new();
        let service = Service::new(store.clone(), shutdown.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let grpc_endpoint = listener.local_addr().unwrap().to_string();
        let host = HostReader::new("/".into(), &std::collections::BTreeMap::new());
        let transfers = transfers::Service::new(store.clone(), channels(), host, shutdown.clone());
        let id = NodeId::new(grpc_endpoint.as_str());
        let cache = Cache::new(store.clone(), id, channels(), shutdown.clone());
        let server = Server::builder()
            .add_service(cache.server())
            .add_service(service.server())
            .add_service(transfers.server());
        let ended = shutdown.clone().cancelled_owned();
        let serving = server.serve_with_incoming_shutdown(TcpListenerStream::new(listener), ended);
        let tasks = vec![
            tokio::spawn(service.run()),
            tokio::spawn(transfers.clone().run()),
            tokio::spawn(async move { serving.await.unwrap() }),
        ];
        Self {
            transport: store.transport(),
            store,
            transfers,
            cache,
            grpc_endpoint,
            shutdown,
            tasks,
        }
    }

    pub(crate) fn client(&self) -> KvStoreClient<Channel> {
        KvStoreClient::new(node::channel(&self.grpc_endpoint).unwrap())
    }

    pub(crate) fn cache_client(&self) -> CacheClient<Channel> {
        CacheClient::new(node::channel(&self.grpc_endpoint).unwrap())
    }

    /// Its entry in the registry.
    pub(crate) fn record(&self) -> NodeRecord {
        NodeRecord {
            id: NodeId::new(self.grpc_endpoint.as_str()),
            epoch: self.store.epoch(),
            role: Role::Store,
            grpc_endpoint: self.grpc_endpoint.clone(),
            http_endpoint: String::new(),
            transfer_endpoint: self.transport.endpoint(),
            model: "tiny".into(),
            kv_space: Some(space()),
            capacity_blocks: self.store.capacity() as u64,
            context_tokens_max: 0,
        }
    }

    pub(crate) fn transfer_client(&self) -> TransferClient<Channel> {
        TransferClient::new(node::channel(&self.grpc_endpoint).unwrap())
    }

    /// Ends in order, and proves that it does.
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        for task in self.tasks {
            timeout_at(Instant::now() + PATIENCE, task)
                .await
                .expect("it ends")
                .unwrap();
        }
    }
}

pub(crate) fn channels() -> Channels {
    Channels::new()
}

/// Waits until `holds`, and fails with `what` if it does not come true.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What a [`FaultyFile`] does wrong at the moment.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct DiskFaults {
    pub(crate) read: Option<io::ErrorKind>,
    pub(crate) write: Option<io::ErrorKind>,
    /// Bytes per second of the whole disk.
    pub(crate) rate: Option<f64>,
    /// Operations wait until it is false again.
    pub(crate) is_silent: bool,
}

/// A disk that fails, fills up, slows down or falls silent when it is told to.
pub(crate) struct FaultyFile {
    file: BlockFiles,
    faults: Mutex<DiskFaults>,
    changed: Condvar,
    /// One operation at a time where the disk is slow.
    arm: Mutex<()>,
}

impl FaultyFile {
    pub(crate) fn new(file: BlockFiles) -> Arc<Self> {
        Arc::new(Self {
            file,
            faults: Mutex::default(),
            changed: Condvar::new(),
            arm: Mutex::default(),
        })
    }

    pub(crate) fn set(&self, faults: DiskFaults) {
        *self.faults.lock().unwrap() = faults;
        self.changed.notify_all();
    }

    fn suffer(&self, fault: impl Fn(&DiskFaults) -> Option<io::ErrorKind>) -> io::Result<()> {
        let mut faults = self.faults.lock().unwrap();
        while faults.is_silent {
            faults = self.changed.wait(faults).unwrap();
        }
        let (rate, fault) = (faults.rate, fault(&faults));
        drop(faults);
        if let Some(rate) = rate {
            let arm = self.arm.lock().unwrap();
            let time = Duration::from_secs_f64(space().layout.block_bytes() as f64 / rate);
            // Nobody notifies it: a pause that holds the disk's only arm.
            drop(Condvar::new().wait_timeout_while(arm, time, |()| true).unwrap());
        }
        fault.map_or(Ok(()), |kind| Err(kind.into()))
    }
}

impl BlockFile for FaultyFile {
    fn read(&self, slot: SlotId, memory: &dyn Memory, offset: usize) -> io::Result<()> {
        self.suffer(|faults| faults.read)?;
        self.file.read(slot, memory, offset)
    }

    fn write(&self, slot: SlotId, memory: &dyn Memory, offset: usize) -> io::Result<()> {
        self.suffer(|faults| faults.write)?;
        self.file.write(slot, memory, offset)
    }

    fn write_record(&self, slot: SlotId, record: Option<&Record>) -> io::Result<()> {
        self.file.write_record(slot, record)
    }
}
