//! KV that changes on its way costs a placement, never a token.

#![allow(missing_docs)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::fixture::{TinyModel, write_tiny_gguf};
use engine::monolith::Monolith;
use engine::{Model, Precision};
use futures::FutureExt;
use futures::future::BoxFuture;
use kv_store::Store;
use node::{Channels, Identity, Metrics};
use proto::v1::decode_client::DecodeClient;
use proto::{convert, status, v1};
use tests::cases::{Case, Random, token};
use tokio::time::Instant;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use transfer::{
    HostMemory, RegionId, RemoteRegion, StatsSnapshot, TcpTransport, TransferBatch, TransferError,
    TransferStats, Transport, memory, tcp,
};
use types::{Epoch, Error, ErrorCode, Memory, NodeId, RequestId, Role, Token};

const BLOCK_TOKENS: usize = 8;
const BLOCKS: usize = 400;
const VOCABULARY: u32 = 256;
const DECODE_EPOCH: Epoch = Epoch(11);
const PREFILL_EPOCH: Epoch = Epoch(12);
/// One handoff in so many has a bit that is wrong.
const FLIP_ODDS: u64 = 4;

/// A transport over which one bit of some handoffs is another one when they have landed.
struct FlipsBits {
    inner: Arc<TcpTransport>,
    state: Arc<Mutex<Flips>>,
}

struct Flips {
    random: Random,
    /// What was granted, by key.
    granted: HashMap<u64, Vec<Range<u64>>>,
    pool: Option<Arc<dyn Memory>>,
    flipped: u64,
}

impl FlipsBits {
    fn new(inner: Arc<TcpTransport>, seed: u64) -> Arc<Self> {
        let state = Flips {
            random: Random::new(seed),
            granted: HashMap::new(),
            pool: None,
            flipped: 0,
        };
        Arc::new(Self {
            inner,
            state: Arc::new(Mutex::new(state)),
        })
    }

    fn flipped(&self) -> u64 {
        self.state.lock().expect("no panic").flipped
    }
}

impl Flips {
    /// Changes one bit of what was granted under `key`, or nothing.
    fn strike(&mut self, key: u64) {
        let ranges = self.granted.remove(&key).expect("revoked once");
        if !self.random.one_in(FLIP_ODDS) {
            return;
        }
        let pool = self.pool.as_ref().expect("registered");
        let range = self.random.choose(&ranges).clone();
        let at = usize::try_from(self.random.between(range.start, range.end - 1)).expect("small");
        let bit = self.random.between(0, 7);
        let byte = memory::copy_out(&**pool, at, 1).expect("inside")[0];
        memory::copy_in(&**pool, at, &[byte ^ 1 << bit]).expect("inside");
        self.flipped += 1;
    }
}

impl Transport for FlipsBits {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn endpoint(&self) -> String {
        self.inner.endpoint()
    }

    fn epoch(&self) -> Epoch {
        self.inner.epoch()
    }

    fn register(&self, memory: Arc<dyn Memory>) -> Result<RegionId, TransferError> {
        self.state.lock().expect("no panic").pool = Some(memory.clone());
        self.inner.register(memory)
    }

    fn unregister(&self, region: RegionId) -> BoxFuture<'static, ()> {
        self.inner.unregister(region)
    }

    fn expose_read(&self, region: RegionId) -> Result<RemoteRegion, TransferError> {
        self.inner.expose_read(region)
    }

    fn grant_write(&self, region: RegionId, ranges: Vec<Range<u64>>) -> Result<RemoteRegion, TransferError> {
        let grant = self.inner.grant_write(region, ranges.clone())?;
        self.state
            .lock()
            .expect("no panic")
            .granted
            .insert(grant.key, ranges);
        Ok(grant)
    }

    fn revoke(&self, grant: &RemoteRegion) -> BoxFuture<'static, ()> {
        let (inner, state, grant) = (self.inner.clone(), self.state.clone(), grant.clone());
        async move {
            inner.revoke(&grant).await;
            // Behind the fence, and before anybody looks: as if it had happened on the way.
            state.lock().expect("no panic").strike(grant.key);
        }
        .boxed()
    }

    fn write(
        &self,
        batch: TransferBatch,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>> {
        self.inner.write(batch, deadline)
    }

    fn read(
        &self,
        batch: TransferBatch,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>> {
        self.inner.read(batch, deadline)
    }

    fn flush(&self, endpoint: &str, deadline: Instant) -> BoxFuture<'static, Result<(), TransferError>> {
        self.inner.flush(endpoint, deadline)
    }

    fn call(
        &self,
        call: transfer::Call,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<transfer::Answered, TransferError>> {
        self.inner.call(call, deadline)
    }

    fn serve_calls(&self, calls: std::sync::Weak<dyn transfer::Calls>) {
        self.inner.serve_calls(calls);
    }

    fn tear_down(&self, endpoint: &str) {
        self.inner.tear_down(endpoint);
    }

    fn stats(&self) -> StatsSnapshot {
        self.inner.stats()
    }
}

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

async fn bind(epoch: Epoch) -> Arc<TcpTransport> {
    TcpTransport::bind(loopback(), epoch, tcp::Config::default())
        .await
        .expect("bound")
}

fn store(model: &Arc<Model>, epoch: Epoch, transport: Arc<dyn Transport>, metrics: &Metrics) -> Store {
    let space = model.kv_space(BLOCK_TOKENS);
    let memory = HostMemory::allocate(BLOCKS * space.layout.block_bytes()).expect("memory");
    Store::new(
        kv_store::Config::default(),
        space,
        epoch,
        memory,
        transport,
        metrics,
    )
    .expect("a store")
}

fn identity(name: &str, epoch: Epoch, role: Role) -> Identity {
    Identity {
        id: NodeId::new(name),
        epoch,
        role,
    }
}

/// A node that serves until the test ends.
async fn serve(server: tonic::transport::server::Router) -> String {
    let listener = tokio::net::TcpListener::bind(loopback()).await.expect("bound");
    let endpoint = listener.local_addr().expect("an address").to_string();
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    endpoint
}

async fn start_prefill(model: &Arc<Model>) -> String {
    let metrics = Metrics::new();
    let deps = prefill_node::Deps {
        identity: identity("prefill-0", PREFILL_EPOCH, Role::Prefill),
        model: model.clone(),
        store: store(model, PREFILL_EPOCH, bind(PREFILL_EPOCH).await, &metrics),
        channels: Channels::new(),
        metrics,
    };
    let config = prefill_node::Config {
        threads: Some(NonZeroUsize::MIN),
        ..Default::default()
    };
    let service = prefill_node::Service::new(config, deps).expect("a service");
    let handle = service.handle();
    tokio::spawn(service.run(CancellationToken::new()));
    serve(Server::builder().add_service(handle.grpc())).await
}

struct DecodeNode {
    endpoint: String,
    store: Store,
    metrics: Metrics,
}

async fn start_decode(model: &Arc<Model>, transport: Arc<dyn Transport>) -> DecodeNode {
    let metrics = Metrics::new();
    let store = store(model, DECODE_EPOCH, transport, &metrics);
    let deps = decode_node::Deps {
        identity: identity("decode-0", DECODE_EPOCH, Role::Decode),
        model: model.clone(),
        store: store.clone(),
        channels: Channels::new(),
        metrics: metrics.clone(),
    };
    let config = decode_node::Config {
        threads: Some(NonZeroUsize::MIN),
        ..Default::default()
    };
    let service = decode_node::Service::new(config, deps).expect("a service");
    let handle = service.handle();
    tokio::spawn(service.run(CancellationToken::new()));
    DecodeNode {
        endpoint: serve(Server::builder().add_service(handle.server())).await,
        store,
        metrics,
    }
}

async fn decode(endpoint: &str, request: v1::DecodeRequest) -> Result<Vec<Token>, Error> {
    let mut client = DecodeClient::new(node::channel(endpoint).expect("an endpoint"));
    let opened = client.decode(request).await;
    let mut stream = opened.map_err(|error| status::from_status(&error))?.into_inner();
    let mut tokens = Vec::new();
    loop {
        let message = stream
            .message()
            .await
            .map_err(|error| status::from_status(&error))?;
        match message.expect("a stream ends with finished or an error").event {
            Some(v1::decode_event::Event::Tokens(more)) => tokens.extend(more.ids),
            Some(v1::decode_event::Event::Finished(_)) => return Ok(tokens),
            None => panic!("an event of an unknown kind"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_bit_in_a_handoff_never_becomes_a_wrong_token() {
    const REQUESTS: usize = 120;
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("tiny.gguf");
    write_tiny_gguf(&path, &TinyModel::default()).expect("write the model");
    let model = Model::load(&path, Precision::Fast).expect("load");
    let transport = FlipsBits::new(bind(DECODE_EPOCH).await, 41);
    let (prefill, node) = (
        start_prefill(&model).await,
        start_decode(&model, transport.clone()).await,
    );

    let mut random = Random::new(42);
    let mut monolith = Monolith::new(model.clone(), BLOCK_TOKENS, 2048, NonZeroUsize::MIN).expect("engine");
    let document: Vec<Token> = (0..300).map(|_| token(&mut random, VOCABULARY)).collect();
    let mut placed_again = 0;
    for index in 0..REQUESTS {
        let case = Case::random(&mut random, std::slice::from_ref(&document), VOCABULARY, 20);
        let request = v1::DecodeRequest {
            request_id: RequestId(index as u128).to_string(),
            kv_root: node.store.common_root().0.to_vec(),
            prompt: case.prompt.clone(),
            sampling: Some(convert::sampling_to_wire(&case.sampling)),
            deadline_ms: 60_000,
            prefill: Some(v1::PrefillPlacement {
                node_id: "prefill-0".into(),
                grpc_endpoint: prefill.clone(),
                epoch: PREFILL_EPOCH.0,
            }),
            ..v1::DecodeRequest::default()
        };
        // What the router does with an error that another placement may mend.
        let tokens = loop {
            match decode(&node.endpoint, request.clone()).await {
                Ok(tokens) => break tokens,
                Err(error) => {
                    assert_eq!(error.code, ErrorCode::Corrupt, "{error}");
                    assert!(error.code.retry_elsewhere());
                    placed_again += 1;
                }
            }
        };
        let expected = monolith.generate(&case.prompt, &case.sampling).expect("generate");
        assert_eq!(tokens, expected, "request {index}");
    }
    let flipped = transport.flipped();
    println!("{flipped} handoffs had a wrong bit, {placed_again} requests were placed again");
    assert!(
        flipped >= 10,
        "only {flipped} bits were flipped: the test proves little"
    );
    assert_eq!(placed_again, flipped);
    assert_eq!(node.store.stats().corruptions, flipped);
    let line = format!("perigee_decode_handoffs_total{{outcome=\"corrupt\"}} {flipped}");
    let metrics = node.metrics.encode();
    assert!(metrics.contains(&line), "{line} is not in {metrics}");
    let start = Instant::now();
    while node.store.stats().blocks.owned > 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "blocks leak");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
