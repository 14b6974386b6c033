//! A router with scripted nodes, and a small HTTP client.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::fixture::{TinyModel, write_tiny_gguf};
use futures::future::BoxFuture;
use futures::{Stream, StreamExt, stream};
use node::registry::{Members, Registration, Registry, RegistryError};
use node::serve::{self, Server};
use node::{Channels, Drainable, Listeners, LoadSource, NodeService, Readiness};
use proto::status::to_status;
use proto::v1;
use proto::v1::decode_server::{Decode, DecodeServer};
use proto::v1::kv_store_server::{KvStore, KvStoreServer};
use router::{Config, Dependencies, Handle, Model, Service};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status};
use types::{
    BlockEvent, Epoch, Error, KvDtype, KvLayout, KvSpace, LoadReport, NodeId, NodeRecord, Role, TenantQuota,
    TraceParent,
};

/// Nothing in these tests takes longer unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const MODEL: &str = "tiny";

/// Events of one batch of a scripted node's log.
const LOG_EVENTS_MAX: usize = 4096;

/// What a scripted decode node does, in order.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Tokens(Vec<u32>, &'static str),
    /// Tokens with what the node tells of the way so far.
    Told(Vec<u32>, &'static str, v1::RequestReport),
    Logprobs(u32, &'static str, Vec<(u32, f32)>),
    Finish(&'static str, v1::Usage),
    /// An error of the node's own.
    Fail(Error),
    /// What a connection reports that breaks.
    Break,
    /// The stream ends without `finished`.
    End,
    /// Nothing more comes.
    Hang,
}

pub(crate) fn usage(prompt_tokens: u64, completion_tokens: u64, cached_tokens: u64) -> v1::Usage {
    v1::Usage {
        prompt_tokens,
        completion_tokens,
        cached_tokens,
    }
}

/// "Hi there" in two pieces, and its end.
pub(crate) fn greeting() -> Vec<Step> {
    vec![
        Step::Tokens(vec![72, 105], "Hi"),
        Step::Tokens(vec![33], " there"),
        Step::Finish("stop", usage(9, 3, 4)),
    ]
}

type Script = Arc<dyn Fn(&v1::DecodeRequest) -> Vec<Step> + Send + Sync>;

/// A node whose decoding is a script. Its load and its log are served as every node's are.
pub(crate) struct FakeNode {
    pub(crate) record: NodeRecord,
    shared: Arc<Scripted>,
    runtime: Option<Runtime>,
}

struct Scripted {
    script: Script,
    requests: Mutex<Vec<v1::DecodeRequest>>,
    traces: Mutex<Vec<Option<TraceParent>>>,
    hints: watch::Sender<Vec<v1::PrefetchRequest>>,
    streams: watch::Sender<usize>,
    blocks: Vec<BlockEvent>,
    epoch: Epoch,
}

pub(crate) struct Idle;

impl Drainable for Idle {
    fn drain(&self) {}

    fn cordon(&self) {}

    fn resume(&self) -> Result<(), Error> {
        Ok(())
    }
}

impl LoadSource for Idle {
    fn load(&self) -> LoadReport {
        LoadReport {
            free_blocks: 1000,
            prefill_ms_per_token: 1.0,
            decode_step_ms: 5.0,
            ..LoadReport::default()
        }
    }
}

impl FakeNode {
    pub(crate) fn start(
        space: &KvSpace,
        id: &str,
        role: Role,
        script: impl Fn(&v1::DecodeRequest) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        Self::with_blocks(space, id, role, Vec::new(), script)
    }

    /// A node whose log holds `blocks`.
    pub(crate) fn with_blocks(
        space: &KvSpace,
        id: &str,
        role: Role,
        blocks: Vec<BlockEvent>,
        script: impl Fn(&v1::DecodeRequest) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        let shared = Arc::new(Scripted {
            script: Arc::new(script),
            requests: Mutex::default(),
            traces: Mutex::default(),
            hints: watch::Sender::default(),
            streams: watch::Sender::new(0),
            blocks,
            epoch: Epoch(1),
        });
        // A runtime of its own, so that killing the node cuts its connections as the kernel would.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a thread can be made");
        let (tx, rx) = std::sync::mpsc::channel();
        let record = NodeRecord {
            id: id.into(),
            epoch: Epoch(1),
            role,
            grpc_endpoint: String::new(),
            http_endpoint: String::new(),
            transfer_endpoint: String::new(),
            model: MODEL.into(),
            kv_space: Some(space.clone()),
            capacity_blocks: 1000,
            context_tokens_max: 4096,
        };
        let (service, mut served) = (Arc::clone(&shared), record.clone());
        runtime.spawn(async move {
            let config = serve::Config::default();
            let listeners = Listeners::bind(&config).await.expect("port 0 is free");
            served.grpc_endpoint = listeners.grpc_address().to_string();
            let (readiness, forever) = (Readiness::new([]), CancellationToken::new());
            let node = NodeService::new(served, Arc::new(Idle), Arc::new(Idle), forever.clone());
            let routes = Routes::new(node.server())
                .add_service(DecodeServer::from_arc(Arc::clone(&service)))
                .add_service(KvStoreServer::from_arc(service));
            tx.send(listeners.grpc_address()).expect("the test waits");
            let server = Server::new(&config, readiness, node::Metrics::new()).grpc(routes);
            server.run(listeners, forever).await.expect("served");
        });
        let address = rx.recv_timeout(PATIENCE).expect("the node starts");
        Self {
            record: NodeRecord {
                grpc_endpoint: address.to_string(),
                ..record
            },
            shared,
            runtime: Some(runtime),
        }
    }

    /// Requests that it was sent.
    pub(crate) fn requests(&self) -> Vec<v1::DecodeRequest> {
        self.shared.requests.lock().expect("no script panicked").clone()
    }

    /// The traces that those belong to.
    pub(crate) fn traces(&self) -> Vec<Option<TraceParent>> {
        self.shared.traces.lock().expect("no script panicked").clone()
    }

    /// The hints that it was sent, once there is one.
    pub(crate) async fn hints(&self) -> Vec<v1::PrefetchRequest> {
        let mut hints = self.shared.hints.subscribe();
        let waited = tokio::time::timeout(PATIENCE, hints.wait_for(|hints| !hints.is_empty()));
        waited.await.expect("in time").expect("the node lives").clone()
    }

    /// Waits until this many streams are open.
    pub(crate) async fn open_streams(&self, count: usize) {
        let mut streams = self.shared.streams.subscribe();
        let waited = tokio::time::timeout(PATIENCE, streams.wait_for(|open| *open == count));
        waited.await.expect("in time").expect("the node lives");
    }

    /// Cuts everything off at once.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.kill();
    }
}

type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Decode for Scripted {
    type DecodeStream = EventStream<v1::DecodeEvent>;

    async fn decode(
        &self,
        request: Request<v1::DecodeRequest>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let trace = proto::trace::read(request.metadata());
        self.traces.lock().expect("no script panicked").push(trace);
        let request = request.into_inner();
        let steps: VecDeque<Step> = (self.script)(&request).into();
        self.requests.lock().expect("no script panicked").push(request);
        // An error as the first step is one of the call, as nodes refuse what they do not take.
        if let Some(Step::Fail(error)) = steps.front() {
            return Err(to_status(error));
        }
        let open = OpenStream::new(self.streams.clone());
        let steps = stream::unfold((steps, open), |(mut steps, open)| async move {
            let item = match steps.pop_front()? {
                Step::End => return None,
                Step::Hang => std::future::pending().await,
                Step::Fail(error) => Err(to_status(&error)),
                Step::Break => Err(Status::unknown("h2 protocol error: connection reset")),
                Step::Tokens(ids, text) => Ok(tokens(ids, text, Vec::new())),
                Step::Told(ids, text, report) => {
                    let tokens = v1::DecodeTokens {
                        ids,
                        text: text.into(),
                        report: Some(report),
                        ..v1::DecodeTokens::default()
                    };
                    Ok(v1::decode_event::Event::Tokens(tokens))
                }
                Step::Logprobs(id, text, top) => Ok(tokens(vec![id], text, vec![logprob(top)])),
                Step::Finish(reason, usage) => Ok(v1::decode_event::Event::Finished(v1::DecodeFinished {
                    reason: reason.into(),
                    usage: Some(usage),
                    report: Some(v1::RequestReport {
                        decode_node: "scripted".into(),
                        ..v1::RequestReport::default()
                    }),
                })),
            };
            Some((
                item.map(|event| v1::DecodeEvent { event: Some(event) }),
                (steps, open),
            ))
        });
        Ok(Response::new(Box::pin(steps)))
    }
}

fn tokens(ids: Vec<u32>, text: &str, logprobs: Vec<v1::TokenLogprob>) -> v1::decode_event::Event {
    v1::decode_event::Event::Tokens(v1::DecodeTokens {
        ids,
        text: text.into(),
        logprobs,
        report: None,
    })
}

fn logprob(top: Vec<(u32, f32)>) -> v1::TokenLogprob {
    v1::TokenLogprob {
        logprob: top[0].1,
        top: top
            .into_iter()
            .map(|(token, logprob)| v1::TopLogprob {
                token,
                logprob,
                text: Vec::new(),
            })
            .collect(),
    }
}

impl Scripted {
    /// A part of the snapshot of the log.
    fn part(&self, blocks: &[BlockEvent]) -> v1::LogBatch {
        v1::LogBatch {
            epoch: self.epoch.0,
            snapshot: true,
            snapshot_end: false,
            sequence: self.blocks.len() as u64,
            events: blocks.iter().map(proto::convert::event_to_wire).collect(),
        }
    }
}

/// Counts itself among the open streams.
struct OpenStream(watch::Sender<usize>);

impl OpenStream {
    fn new(streams: watch::Sender<usize>) -> Self {
        streams.send_modify(|open| *open += 1);
        Self(streams)
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

#[tonic::async_trait]
impl KvStore for Scripted {
    type WatchStream = EventStream<v1::LogBatch>;

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let parts = self.blocks.chunks(LOG_EVENTS_MAX);
        let mut snapshot: Vec<v1::LogBatch> = parts.map(|part| self.part(part)).collect();
        if snapshot.is_empty() {
            snapshot.push(self.part(&[]));
        }
        if let Some(last) = snapshot.last_mut() {
            last.snapshot_end = true;
        }
        let snapshot = snapshot.into_iter().map(Ok);
        Ok(Response::new(Box::pin(
            stream::iter(snapshot).chain(stream::pending()),
        )))
    }

    async fn acquire(&self, _: Request<v1::AcquireRequest>) -> Result<Response<v1::AcquireResponse>, Status> {
        unreachable!("a router moves no blocks")
    }
    async fn release(&self, _: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        unreachable!("a router moves no blocks")
    }
    async fn reserve(&self, _: Request<v1::ReserveRequest>) -> Result<Response<v1::ReserveResponse>, Status> {
        unreachable!("a router moves no blocks")
    }
    async fn commit(&self, _: Request<v1::CommitRequest>) -> Result<Response<v1::CommitResponse>, Status> {
        unreachable!("a router moves no blocks")
    }
    async fn abort(&self, _: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        unreachable!("a router moves no blocks")
    }
    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        unreachable!("a router moves no blocks")
    }
    async fn prefetch(
        &self,
        request: Request<v1::PrefetchRequest>,
    ) -> Result<Response<v1::PrefetchResponse>, Status> {
        self.hints.send_modify(|hints| hints.push(request.into_inner()));
        Ok(Response::new(v1::PrefetchResponse::default()))
    }
}

#[derive(Debug)]
struct FixedRegistry {
    members: watch::Sender<Arc<Members>>,
}

impl Registry for FixedRegistry {
    fn register(&self, _: NodeRecord) -> BoxFuture<'_, Result<Registration, RegistryError>> {
        unreachable!("these tests register nobody")
    }

    fn put_quota(&self, _: &str, _: TenantQuota) -> BoxFuture<'_, Result<(), RegistryError>> {
        unreachable!("these tests set no quotas")
    }

    fn watch(&self) -> watch::Receiver<Arc<Members>> {
        self.members.subscribe()
    }
}

/// A model file, opened.
pub(crate) struct Fixture {
    pub(crate) model: Arc<Model>,
    pub(crate) space: KvSpace,
    _directory: tempfile::TempDir,
}

/// What the blocks of nodes that serve `model` are made of.
pub(crate) fn space(model: &Model, layout: KvLayout) -> KvSpace {
    KvSpace {
        model_digest: model.digest().to_owned(),
        arithmetic: "fast-1".into(),
        layout,
        adapter: None,
        tenant_salt: String::new(),
    }
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("tiny.gguf");
        write_tiny_gguf(&path, &TinyModel::default()).expect("written");
        let model = Model::open(&path, MODEL).expect("a valid model");
        let layout = KvLayout {
            layers: 2,
            kv_heads: 4,
            head_dim: 32,
            block_tokens: 8,
            dtype: KvDtype::F16,
        };
        let space = space(&model, layout);
        Self {
            model: Arc::new(model),
            space,
            _directory: directory,
        }
    }

    /// A decode node with a script.
    pub(crate) fn decode(
        &self,
        id: &str,
        script: impl Fn(&v1::DecodeRequest) -> Vec<Step> + Send + Sync + 'static,
    ) -> FakeNode {
        FakeNode::start(&self.space, id, Role::Decode, script)
    }

    /// A prefill node. Only its record, load and log matter to a router.
    pub(crate) fn prefill(&self, id: &str) -> FakeNode {
        FakeNode::start(&self.space, id, Role::Prefill, |_| Vec::new())
    }
}

/// A router that serves.
pub(crate) struct Router {
    pub(crate) handle: Handle,
    pub(crate) http: SocketAddr,
    pub(crate) grpc: SocketAddr,
    registry: Arc<FixedRegistry>,
    shutdown: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

/// What tests want: no waiting for nodes that will not come.
pub(crate) fn config() -> Config {
    Config {
        placement_wait: node::config::Duration::from_millis(0),
        ..Config::default()
    }
}

impl Router {
    /// A router over these nodes, once it is connected with all of them.
    pub(crate) async fn start(fixture: &Fixture, config: Config, nodes: &[&FakeNode]) -> Self {
        let registry = Arc::new(FixedRegistry {
            members: watch::Sender::new(Arc::default()),
        });
        let guard = router::Guard::new(&config, false).expect("readable keys");
        let service = Service::new(
            config,
            Dependencies {
                registry: registry.clone(),
                model: fixture.model.clone(),
                channels: Channels::new(),
                metrics: node::Metrics::new(),
                readiness: Readiness::new([]),
                guard,
                tls: None,
                node_id: "router-0".into(),
                traces: router::traces::Config::default(),
            },
        );
        let service = service.expect("a valid configuration");
        let serve = serve::Config::default();
        let listeners = Listeners::bind(&serve).await.expect("port 0 is free");
        let (http, grpc) = (listeners.http_address(), listeners.grpc_address());
        let (handle, shutdown) = (service.handle(), CancellationToken::new());
        let token = shutdown.clone();
        let running = tokio::spawn(async move {
            service
                .run(&serve, Routes::default(), listeners, token)
                .await
                .expect("served");
        });
        let router = Self {
            handle,
            http,
            grpc,
            registry,
            shutdown,
            running,
        };
        router.set_members(nodes.iter().map(|node| node.record.clone()));
        let ids: Vec<NodeId> = nodes.iter().map(|node| node.record.id.clone()).collect();
        router.connected_with(&ids).await;
        router
    }

    pub(crate) fn set_members(&self, records: impl IntoIterator<Item = NodeRecord>) {
        let nodes: BTreeMap<NodeId, NodeRecord> = records
            .into_iter()
            .map(|record| (record.id.clone(), record))
            .collect();
        self.registry.members.send_replace(Arc::new(Members {
            revision: 1,
            nodes,
            quotas: BTreeMap::new(),
            connected: true,
        }));
    }

    /// Waits until exactly these nodes are connected.
    pub(crate) async fn connected_with(&self, ids: &[NodeId]) {
        let cluster = self.handle.dispatcher.cluster();
        let mut changes = cluster.changes();
        let connected = || {
            let status = cluster.lock().status();
            let connected = status.into_iter().filter(|member| member.connected);
            connected.map(|member| member.record.id).collect::<Vec<_>>()
        };
        let mut wanted = ids.to_vec();
        wanted.sort();
        let waited = tokio::time::timeout(PATIENCE, async {
            while connected() != wanted {
                // The first batch of a log is no change of reachability, so it is looked at again soon.
                let _ = tokio::time::timeout(Duration::from_millis(5), changes.changed()).await;
            }
        });
        let outcome = waited.await;
        assert!(
            outcome.is_ok(),
            "connected with {:?} instead of {wanted:?}",
            connected()
        );
    }

    /// Waits until nothing runs and nothing waits.
    pub(crate) async fn idle(&self) {
        let dispatcher = &self.handle.dispatcher;
        let waited = tokio::time::timeout(PATIENCE, async {
            while dispatcher.counts() != (0, 0) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        assert!(
            waited.await.is_ok(),
            "{:?} requests are left",
            dispatcher.counts()
        );
    }

    pub(crate) async fn post(&self, path: &str, body: impl ToString) -> HttpResponse {
        self.send("POST", path, &[], body.to_string().as_bytes()).await
    }

    pub(crate) async fn get(&self, path: &str) -> HttpResponse {
        self.send("GET", path, &[], b"").await
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> HttpResponse {
        let exchange = exchange(self.http, method, path, headers, body);
        tokio::time::timeout(PATIENCE, exchange)
            .await
            .expect("an answer in time")
    }

    /// Sends a request and leaves its answer unread.
    pub(crate) async fn open(&self, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.http).await.expect("the router listens");
        let head = head("POST", path, &[], body.len());
        stream.write_all(head.as_bytes()).await.expect("sent");
        stream.write_all(body.as_bytes()).await.expect("sent");
        stream
    }

    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        tokio::time::timeout(PATIENCE, &mut self.running)
            .await
            .expect("in time")
            .expect("ended well");
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// An HTTP answer.
#[derive(Debug)]
pub(crate) struct HttpResponse {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

impl HttpResponse {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The stream's events as (name, data). The name is empty where OpenAI has none.
    pub(crate) fn events(&self) -> Vec<(String, String)> {
        assert_eq!(self.headers["content-type"], "text/event-stream");
        assert!(self.body.ends_with("\n\n"), "{:?}", self.body);
        let events = self.body.split_terminator("\n\n").map(|event| {
            let (mut name, mut data) = (String::new(), String::new());
            for line in event.lines() {
                match line.split_once(": ") {
                    Some(("event", value)) => name = value.into(),
                    Some(("data", value)) => data = value.into(),
                    other => panic!("{other:?} in {event:?}"),
                }
            }
            (name, data)
        });
        events.collect()
    }

    /// The stream's chunks, which must end with `[DONE]`.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop(), Some((String::new(), "[DONE]".into())));
        let parse = |(name, data): (String, String)| {
            assert_eq!(name, "");
            serde_json::from_str(&data).expect("JSON")
        };
        events.into_iter().map(parse).collect()
    }
}

fn head(method: &str, path: &str, headers: &[(&str, &str)], length: usize) -> String {
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: router\r\nconnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head + &format!("content-length: {length}\r\n\r\n")
}

async fn exchange(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> HttpResponse {
    let mut stream = TcpStream::connect(address).await.expect("the router listens");
    stream
        .write_all(head(method, path, headers, body.len()).as_bytes())
        .await
        .expect("sent");
    // A server that has refused a body need not read it to its end.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("an answer");
    let end = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .expect("a head");
    let text = String::from_utf8(answer[..end].to_vec()).expect("ASCII");
    let mut lines = text.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .expect("a status");
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let chunked = headers
        .get("transfer-encoding")
        .is_some_and(|value| value == "chunked");
    let rest = &answer[end + 4..];
    let body = if chunked { unchunk(rest) } else { rest.to_vec() };
    HttpResponse {
        status: status.parse().expect("a number"),
        headers,
        body: String::from_utf8(body).expect("UTF-8"),
    }
}

fn unchunk(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = rest
            .windows(2)
            .position(|two| two == b"\r\n")
            .expect("a chunk's size");
        let size = std::str::from_utf8(&rest[..end]).expect("ASCII");
        let size = usize::from_str_radix(size, 16).expect("hexadecimal");
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&rest[end + 2..end + 2 + size]);
        rest = &rest[end + 4 + size..];
    }
}
