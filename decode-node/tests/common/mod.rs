//! A decode node on 127.0.0.1 with a tiny random model, and what a client sees of it.

#![allow(dead_code, reason = "every test binary uses its own part of this")]

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use decode_node::{Config, Deps, Handle, Service};
use engine::fixture::{TinyModel, write_tiny_gguf};
use engine::monolith::Monolith;
use engine::{Model, Precision};
use kv_store::Store;
use node::{Channel, Channels, Identity, Metrics};
use proto::v1::decode_client::DecodeClient;
use proto::{convert, status, v1};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use transfer::{HostMemory, TcpTransport, Transport};
use types::{Epoch, Error, NodeId, RequestId, Role, SamplingParams, Token};

pub(crate) const BLOCK_TOKENS: usize = 8;
pub(crate) const VOCABULARY: usize = 320;
pub(crate) const EPOCH: Epoch = Epoch(11);
/// Long enough for a machine whose cores are all busy; nothing waits this long unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn model() -> Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    let model = MODEL.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tiny.gguf");
        let tiny = TinyModel {
            hidden: 64,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            intermediate: 96,
            ..TinyModel::default()
        };
        write_tiny_gguf(&path, &tiny).unwrap();
        Model::load(&path, Precision::Fast).unwrap()
    });
    assert_eq!(model.config().vocabulary, VOCABULARY);
    Arc::clone(model)
}

pub(crate) fn monolith() -> Monolith {
    Monolith::new(model(), BLOCK_TOKENS, 2048, NonZeroUsize::MIN).unwrap()
}

/// Random numbers that are the same in every run (SplitMix64).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }

    pub(crate) fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// Tokens that are text: no special ones.
    pub(crate) fn tokens(&mut self, count: usize) -> Vec<Token> {
        (0..count)
            .map(|_| self.between(3, VOCABULARY - 1) as Token)
            .collect()
    }

    pub(crate) fn params(&mut self, max_tokens: usize) -> SamplingParams {
        let greedy = self.below(3) == 0;
        SamplingParams {
            temperature: if greedy {
                0.0
            } else {
                0.7 + self.below(5) as f32 * 0.2
            },
            top_k: [0, 5, 40][self.below(3)],
            top_p: [1.0, 0.9][self.below(2)],
            repetition_penalty: [1.0, 1.2][self.below(2)],
            frequency_penalty: [0.0, 0.5][self.below(2)],
            seed: self.below(1000) as u64,
            max_tokens: self.between(1, max_tokens) as u32,
            ..SamplingParams::default()
        }
    }
}

/// A running node. Stop it at the end: that proves that it gives everything back.
pub(crate) struct Node {
    pub(crate) handle: Handle,
    pub(crate) store: Store,
    pub(crate) metrics: Metrics,
    pub(crate) endpoint: String,
    pub(crate) shutdown: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Node {
    pub(crate) async fn start(blocks: usize, config: Config) -> Self {
        let transport = TcpTransport::bind(loopback(), EPOCH, transfer::tcp::Config::default())
            .await
            .unwrap();
        Self::start_on(blocks, config, transport).await
    }

    pub(crate) async fn start_on(blocks: usize, config: Config, transport: Arc<dyn Transport>) -> Self {
        let model = model();
        let space = model.kv_space(BLOCK_TOKENS);
        let memory = HostMemory::allocate(blocks * space.layout.block_bytes()).unwrap();
        let metrics = Metrics::new();
        let store = Store::new(
            kv_store::Config::default(),
            space,
            EPOCH,
            memory,
            transport,
            &metrics,
        )
        .unwrap();
        let identity = Identity {
            id: NodeId::new("decode-0"),
            epoch: EPOCH,
            role: Role::Decode,
        };
        let deps = Deps {
            model,
            store: store.clone(),
            channels: Channels::new(),
            metrics: metrics.clone(),
            identity,
        };
        let service = Service::new(config, deps).unwrap();
        let handle = service.handle();
        let shutdown = CancellationToken::new();
        let blocks_shutdown = shutdown.clone();
        let blocks_service = kv_store::Service::new(store.clone(), shutdown.clone());
        let listener = tokio::net::TcpListener::bind(loopback()).await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let server = Server::builder()
            .add_service(handle.server())
            .add_service(blocks_service.server());
        let serving = server.serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            shutdown.clone().cancelled_owned(),
        );
        let tasks = vec![
            tokio::spawn(async move { serving.await.unwrap() }),
            tokio::spawn(async move { service.run(blocks_shutdown).await.unwrap() }),
        ];
        Self {
            handle,
            store,
            metrics,
            endpoint,
            shutdown,
            tasks,
        }
    }

    pub(crate) fn client(&self) -> DecodeClient<Channel> {
        DecodeClient::new(node::channel(&self.endpoint).unwrap())
    }

    pub(crate) async fn decode(&self, request: v1::DecodeRequest) -> Result<Answer, Error> {
        collect(self.open(request).await?).await
    }

    pub(crate) async fn open(&self, request: v1::DecodeRequest) -> Result<Streaming<v1::DecodeEvent>, Error> {
        let opened = self.client().decode(request).await;
        opened
            .map(tonic::Response::into_inner)
            .map_err(|error| status::from_status(&error))
    }

    pub(crate) fn request(&self, prompt: &[Token], params: &SamplingParams) -> v1::DecodeRequest {
        v1::DecodeRequest {
            request_id: RequestId(77).to_string(),
            kv_root: self.store.common_root().0.to_vec(),
            prompt: prompt.to_vec(),
            sampling: Some(convert::sampling_to_wire(params)),
            deadline_ms: u64::try_from(PATIENCE.as_millis()).unwrap(),
            ..v1::DecodeRequest::default()
        }
    }

    /// The value of a metric without labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.metrics.encode();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .parse()
            .unwrap()
    }

    /// Waits until no request is left and nobody holds a block.
    pub(crate) async fn at_rest(&self) {
        eventually("the node holds nothing", || {
            let blocks = self.store.stats().blocks;
            self.handle.requests() == 0 && blocks.owned == 0 && blocks.pinned == 0
        })
        .await;
    }

    /// Ends in order, and proves that everything is given back.
    pub(crate) async fn stop(self) {
        self.at_rest().await;
        self.shutdown.cancel();
        for task in self.tasks {
            tokio::time::timeout(PATIENCE, task)
                .await
                .expect("it ends")
                .unwrap();
        }
    }
}

pub(crate) fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// Settings of a test: small steps, so that many happen.
pub(crate) fn config() -> Config {
    Config {
        threads: Some(NonZeroUsize::MIN),
        step_tokens: 48,
        sequences_max: 16,
        ..Config::default()
    }
}

/// Everything that a client got.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<Token>,
    pub(crate) text: String,
    pub(crate) logprobs: Vec<v1::TokenLogprob>,
    pub(crate) finished: v1::DecodeFinished,
}

impl Answer {
    pub(crate) fn cached_tokens(&self) -> usize {
        self.finished.usage.unwrap().cached_tokens as usize
    }

    pub(crate) fn report(&self) -> &v1::RequestReport {
        self.finished.report.as_ref().unwrap()
    }
}

pub(crate) async fn collect(mut stream: Streaming<v1::DecodeEvent>) -> Result<Answer, Error> {
    let (mut tokens, mut text, mut logprobs) = (Vec::new(), String::new(), Vec::new());
    loop {
        let message = tokio::time::timeout(PATIENCE, stream.message())
            .await
            .expect("a stream never hangs");
        let message = message.map_err(|error| status::from_status(&error))?;
        match message
            .expect("a stream ends with finished or an error")
            .event
            .expect("no empty event")
        {
            v1::decode_event::Event::Tokens(message) => {
                tokens.extend(message.ids);
                text.push_str(&message.text);
                logprobs.extend(message.logprobs);
            }
            v1::decode_event::Event::Finished(finished) => {
                assert!(
                    stream.message().await.unwrap().is_none(),
                    "nothing follows the end"
                );
                return Ok(Answer {
                    tokens,
                    text,
                    logprobs,
                    finished,
                });
            }
        }
    }
}

/// Waits until `holds`, and fails with `what` if it does not come true.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What one process gives for the same request.
pub(crate) fn expected(prompt: &[Token], params: &SamplingParams) -> Vec<Token> {
    monolith().generate(prompt, params).unwrap()
}
