//! A prefill node on 127.0.0.1, and a decode side that is written out by hand.

use std::future::Future;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use engine::fixture::{TinyModel, write_tiny_gguf};
use engine::monolith::Monolith;
use engine::step::LogitsWanted;
use engine::{Model, Precision, sampler};
use kv_store::{Grant, Store};
use node::{Channels, Identity};
use prefill_node::{Config, Deps, Handle, Service};
use proto::v1::prefill_client::PrefillClient;
use proto::v1::prefill_command::Command;
use proto::v1::prefill_event::Event;
use proto::{convert, status, v1};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Server;
use transfer::{HostMemory, TcpTransport};
use types::{BlockId, Epoch, Error, Memory, NodeId, RequestId, Role, SamplingParams, Token};

pub(crate) const BLOCK_TOKENS: usize = 8;
pub(crate) const EPOCH: Epoch = Epoch(41);

/// What offered memory is filled with. As K of a token it would be eight equal numbers.
const UNTOUCHED: u8 = 0xA5;

/// Nothing waits this long unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn tiny_model() -> Arc<Model> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("tiny.gguf");
    let shape = TinyModel {
        layers: 3,
        ..TinyModel::default()
    };
    write_tiny_gguf(&path, &shape).expect("written");
    Model::load(&path, Precision::Fast).expect("loaded")
}

/// Tokens that differ between seeds from the first one on.
pub(crate) fn prompt(seed: u32, length: usize) -> Vec<Token> {
    (0..length as u32)
        .map(|i| (seed * 37 + i * 11 + i * i % 7) % 256)
        .collect()
}

async fn store(model: &Arc<Model>, blocks: usize, epoch: Epoch) -> (Store, Arc<TcpTransport>) {
    let space = model.kv_space(BLOCK_TOKENS);
    let memory = HostMemory::allocate(blocks * space.layout.block_bytes()).expect("memory");
    let address = SocketAddr::from(([127, 0, 0, 1], 0));
    let transport = TcpTransport::bind(address, epoch, transfer::tcp::Config::default())
        .await
        .expect("bound");
    let config = kv_store::Config::default();
    let metrics = node::Metrics::new();
    let store = Store::new(config, space, epoch, memory, transport.clone(), &metrics).expect("a store");
    (store, transport)
}

/// A whole prefill node.
pub(crate) struct PrefillNode {
    pub(crate) handle: Handle,
    pub(crate) store: Store,
    pub(crate) metrics: node::Metrics,
    pub(crate) grpc_endpoint: String,
    pub(crate) shutdown: CancellationToken,
    pub(crate) running: JoinHandle<Result<(), Error>>,
}

impl PrefillNode {
    pub(crate) async fn start(model: &Arc<Model>, blocks: usize, config: Config) -> Self {
        let (store, _) = store(model, blocks, EPOCH).await;
        let metrics = node::Metrics::new();
        let deps = Deps {
            identity: Identity {
                id: NodeId::new("prefill-0"),
                epoch: EPOCH,
                role: Role::Prefill,
            },
            model: model.clone(),
            store: store.clone(),
            channels: Channels::new(),
            metrics: metrics.clone(),
        };
        let config = Config {
            threads: NonZeroUsize::new(2),
            ..config
        };
        let service = Service::new(config, deps).expect("a service");
        let handle = service.handle();
        let shutdown = CancellationToken::new();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let grpc_endpoint = listener.local_addr().expect("an address").to_string();
        let blocks_service = kv_store::Service::new(store.clone(), shutdown.clone());
        let server = Server::builder()
            .add_service(handle.grpc())
            .add_service(blocks_service.server());
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        tokio::spawn(blocks_service.run());
        let running = tokio::spawn(service.run(shutdown.clone()));
        Self {
            handle,
            store,
            metrics,
            grpc_endpoint,
            shutdown,
            running,
        }
    }

    /// Waits until no request holds anything.
    pub(crate) async fn idle(&self) {
        eventually("the node holds no blocks", || {
            let blocks = self.store.stats().blocks;
            blocks.owned == 0 && blocks.pinned == 0 && blocks.leases == 0
        })
        .await;
    }

    pub(crate) fn source(&self, blocks: u64) -> v1::PrefixSource {
        v1::PrefixSource {
            node_id: "prefill-0".into(),
            grpc_endpoint: self.grpc_endpoint.clone(),
            blocks,
        }
    }
}

/// What a decode node has: memory, and a connection.
pub(crate) struct DecodeSide {
    pub(crate) store: Store,
    pub(crate) transport: Arc<TcpTransport>,
    client: PrefillClient<node::Channel>,
}

impl DecodeSide {
    pub(crate) async fn start(model: &Arc<Model>, blocks: usize, node: &PrefillNode) -> Self {
        let (store, transport) = store(model, blocks, Epoch(9)).await;
        let channel = node::channel(&node.grpc_endpoint).expect("an endpoint");
        Self {
            store,
            transport,
            client: PrefillClient::new(channel),
        }
    }

    /// A request for `tokens`, all of them the client's prompt.
    pub(crate) fn request(&self, tokens: &[Token]) -> v1::PrefillStart {
        v1::PrefillStart {
            request_id: RequestId(u128::from(tokens[0]) << 32 | tokens.len() as u128).to_string(),
            kv_root: self.store.common_root().0.to_vec(),
            tokens: tokens.to_vec(),
            prompt_tokens: tokens.len() as u64,
            held_blocks: 0,
            sampling: None,
            sources: Vec::new(),
            deadline_ms: 60_000,
            prefill_epoch: EPOCH.0,
            tenant: String::new(),
        }
    }

    pub(crate) async fn open(&self, start: v1::PrefillStart) -> Conversation {
        let (commands, outgoing) = mpsc::channel(4);
        let conversation_start = Command::Start(start);
        let send = commands.send(v1::PrefillCommand {
            command: Some(conversation_start),
        });
        send.await.expect("room");
        let mut client = self.client.clone();
        let events = client
            .prefill(ReceiverStream::new(outgoing))
            .await
            .expect("opened")
            .into_inner();
        Conversation { commands, events }
    }

    /// Grants memory for `blocks` blocks, filled with a pattern that no KV has.
    pub(crate) fn grant(&self, blocks: u64) -> Grant {
        let owned = self.store.allocate(blocks as usize).expect("room");
        let pattern = vec![UNTOUCHED; self.store.layout().block_bytes()];
        for block in &owned {
            let at = self.store.byte_range(block.block()).start as usize;
            transfer::memory::copy_in(self.store.memory().as_ref(), at, &pattern).expect("in the pool");
        }
        self.store.grant(owned).expect("granted")
    }

    /// Granted blocks whose first bytes have been written.
    pub(crate) fn blocks_reached(&self, grant: &Grant) -> usize {
        let memory = self.store.memory();
        let touched = |offset: &u64| {
            let first =
                transfer::memory::copy_out(memory.as_ref(), *offset as usize, 8).expect("in the pool");
            first != [UNTOUCHED; 8]
        };
        grant
            .block_offsets()
            .iter()
            .filter(|offset| touched(offset))
            .count()
    }

    /// The whole conversation of a well-behaved decode node.
    pub(crate) async fn receive(&self, start: v1::PrefillStart) -> Result<Received, Error> {
        let mut conversation = self.open(start).await;
        let blocks = conversation.started().await?;
        let grant = self.grant(blocks);
        conversation.offer(7, &grant).await;
        let landed = conversation.landed().await?;
        assert_eq!(landed.transfer_id, 7);
        let ids = grant.blocks().to_vec();
        let bytes = ids.iter().map(|id| bytes_of(&self.store, *id)).collect();
        let checksums = ids
            .iter()
            .map(|id| self.store.checksum(*id).0)
            .collect::<Vec<_>>();
        assert_eq!(
            landed.checksums, checksums,
            "the checksums are those of the bytes that landed"
        );
        grant.fence().await;
        Ok(Received { landed, bytes })
    }
}

pub(crate) struct Received {
    pub(crate) landed: v1::PrefillLanded,
    /// Of each pushed block.
    pub(crate) bytes: Vec<Vec<u8>>,
}

/// An open stream.
pub(crate) struct Conversation {
    pub(crate) commands: mpsc::Sender<v1::PrefillCommand>,
    pub(crate) events: Streaming<v1::PrefillEvent>,
}

impl Conversation {
    pub(crate) async fn event(&mut self) -> Option<Result<Event, Error>> {
        let next = timeout(PATIENCE, self.events.message())
            .await
            .expect("an event in time");
        match next {
            Ok(None) => None,
            Ok(Some(event)) => Some(Ok(event.event.expect("an event of a known kind"))),
            Err(error) => Some(Err(status::from_status(&error))),
        }
    }

    /// Waits for `Started`, and returns how many blocks it wants.
    pub(crate) async fn started(&mut self) -> Result<u64, Error> {
        loop {
            match self.event().await.expect("the stream goes on")? {
                Event::Queued(_) | Event::Alive(_) => {}
                Event::Started(started) => return Ok(started.blocks),
                Event::Failure(failure) => return Err(status::from_failure(&failure)),
                other => panic!("{other:?} instead of Started"),
            }
        }
    }

    pub(crate) async fn landed(&mut self) -> Result<v1::PrefillLanded, Error> {
        match self.last().await {
            Event::Landed(landed) => Ok(landed),
            Event::Failure(failure) => Err(status::from_failure(&failure)),
            other => panic!("{other:?} instead of Landed"),
        }
    }

    pub(crate) async fn failed(&mut self) -> Error {
        match self.last().await {
            Event::Failure(failure) => status::from_failure(&failure),
            other => panic!("{other:?} instead of Failure"),
        }
    }

    /// The event that ends the conversation. Nothing comes after it.
    pub(crate) async fn last(&mut self) -> Event {
        loop {
            match self
                .event()
                .await
                .expect("the stream goes on")
                .expect("no broken stream")
            {
                Event::Queued(_) | Event::Started(_) | Event::Alive(_) => {}
                last => {
                    assert!(self.event().await.is_none(), "nothing comes after {last:?}");
                    return last;
                }
            }
        }
    }

    pub(crate) async fn offer(&self, transfer_id: u64, grant: &Grant) {
        let region = grant.region();
        self.send(Command::Offer(v1::PrefillOffer {
            transfer_id,
            region: Some(v1::RemoteRegion {
                endpoint: region.endpoint.clone(),
                epoch: region.epoch.0,
                key: region.key,
            }),
            block_offsets: grant.block_offsets(),
        }))
        .await;
    }

    pub(crate) async fn abort(&self) {
        self.send(Command::Abort(v1::PrefillAbort {
            reason: "the test wants it".into(),
        }))
        .await;
    }

    /// A stream that the node has ended takes nothing any more, which is no failure.
    pub(crate) async fn send(&self, command: Command) {
        let _ = self
            .commands
            .send(v1::PrefillCommand {
                command: Some(command),
            })
            .await;
    }
}

/// What one engine alone computes.
pub(crate) struct Reference {
    monolith: Monolith,
}

impl Reference {
    pub(crate) fn new(model: &Arc<Model>) -> Self {
        let monolith =
            Monolith::new(model.clone(), BLOCK_TOKENS, 2048, NonZeroUsize::MIN).expect("an engine");
        Self { monolith }
    }

    /// The bytes of every block of `tokens`, and the token that follows.
    pub(crate) fn prefill(
        &mut self,
        tokens: &[Token],
        prompt_tokens: usize,
        params: &SamplingParams,
    ) -> (Vec<Vec<u8>>, Token) {
        let mut logits = self
            .monolith
            .logits(tokens, 0, LogitsWanted::Last)
            .expect("computed");
        let (prompt, generated) = tokens.split_at(prompt_tokens);
        let token = sampler::sample(&mut logits, params, prompt, generated)
            .expect("sampled")
            .token;
        let layout = *self.monolith.layout();
        let blocks = &self.monolith.blocks()[..layout.blocks_for(tokens.len())];
        let memory = self.monolith.memory();
        let bytes = blocks.iter().map(|block| {
            let at = block.0 as usize * layout.block_bytes();
            transfer::memory::copy_out(memory.as_ref() as &dyn Memory, at, layout.block_bytes())
                .expect("in the pool")
        });
        (bytes.collect(), token)
    }
}

pub(crate) fn bytes_of(store: &Store, block: BlockId) -> Vec<u8> {
    let range = store.byte_range(block);
    let len = (range.end - range.start) as usize;
    transfer::memory::copy_out(store.memory().as_ref(), range.start as usize, len).expect("in the pool")
}

pub(crate) fn sampled(temperature: f32, seed: u64) -> SamplingParams {
    SamplingParams {
        temperature,
        seed,
        ..SamplingParams::default()
    }
}

pub(crate) fn to_wire(params: &SamplingParams) -> Option<v1::Sampling> {
    Some(convert::sampling_to_wire(params))
}

/// Waits until the predicate holds.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Ends within [`PATIENCE`].
pub(crate) async fn in_time<T>(work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.expect("in time")
}
