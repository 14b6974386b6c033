//! Against servers that do what a test tells them: what a caller gets to see of every way a call can end.

use std::time::Duration;

use client::{Decode, DecodeEvent, GenerateEvent, Inference, Store};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use node::Channel;
use proto::v1;
use proto::v1::decode_server::DecodeServer;
use proto::v1::inference_server::InferenceServer;
use proto::v1::kv_store_server::{KvStore, KvStoreServer};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use types::{
    BlockEvent, BlockHash, Checksum, Epoch, Error, ErrorCode, FinishReason, Generation, LeaseId, LoadReport,
    RequestId, Tier,
};

/// Longer than anything here takes; a test that waits for it has failed.
const DEADLINE: Duration = Duration::from_secs(30);
/// For calls that are never answered.
const SOON: Duration = Duration::from_millis(100);

async fn serve(services: Routes) -> Channel {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let server = Server::builder().add_routes(services);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    channel(&address.to_string())
}

fn channel(address: &str) -> Channel {
    node::channel(address).expect("an address")
}

/// Sends these events, and then ends or hangs.
#[derive(Clone)]
struct Script<T> {
    events: Vec<Result<T, Status>>,
    hangs: bool,
}

impl<T: Clone + Send + 'static> Script<T> {
    fn new(events: Vec<Result<T, Status>>) -> Self {
        Self { events, hangs: false }
    }

    fn play(&self) -> BoxStream<'static, Result<T, Status>> {
        let events = stream::iter(self.events.clone());
        match self.hangs {
            true => events.chain(stream::pending()).boxed(),
            false => events.boxed(),
        }
    }
}

#[tonic::async_trait]
impl v1::decode_server::Decode for Script<v1::DecodeEvent> {
    type DecodeStream = BoxStream<'static, Result<v1::DecodeEvent, Status>>;

    async fn decode(&self, _: Request<v1::DecodeRequest>) -> Result<Response<Self::DecodeStream>, Status> {
        Ok(Response::new(self.play()))
    }
}

fn tokens(id: u32) -> v1::DecodeEvent {
    let tokens = v1::DecodeTokens {
        ids: vec![id],
        ..v1::DecodeTokens::default()
    };
    v1::DecodeEvent {
        event: Some(v1::decode_event::Event::Tokens(tokens)),
    }
}

fn finished(reason: &str) -> v1::DecodeEvent {
    let finished = v1::DecodeFinished {
        reason: reason.to_owned(),
        usage: Some(v1::Usage {
            completion_tokens: 1,
            ..v1::Usage::default()
        }),
        report: None,
    };
    v1::DecodeEvent {
        event: Some(v1::decode_event::Event::Finished(finished)),
    }
}

/// What a caller gets of the script: ids of tokens, then how it ended.
async fn decode(
    script: Script<v1::DecodeEvent>,
    deadline: Duration,
) -> (Vec<u32>, Result<FinishReason, Error>) {
    let channel = serve(Routes::new(DecodeServer::new(script))).await;
    let request = v1::DecodeRequest {
        deadline_ms: u64::try_from(deadline.as_millis()).expect("short"),
        ..v1::DecodeRequest::default()
    };
    let mut stream = Decode::new(channel).decode(request).await.expect("answers");
    let mut ids = Vec::new();
    loop {
        let end = match stream.next().await {
            Ok(Some(DecodeEvent::Tokens(tokens))) => {
                ids.extend(tokens.ids);
                continue;
            }
            Ok(Some(DecodeEvent::Finished { reason, .. })) => Ok(reason),
            Ok(None) => panic!("ended with neither"),
            Err(error) => Err(error),
        };
        assert_eq!(stream.next().await, Ok(None), "nothing follows the end");
        return (ids, end);
    }
}

#[tokio::test]
async fn a_request_ends_with_its_finish() {
    let script = Script::new(vec![Ok(tokens(7)), Ok(tokens(8)), Ok(finished("length"))]);
    assert_eq!(
        decode(script, DEADLINE).await,
        (vec![7, 8], Ok(FinishReason::Length))
    );
}

#[tokio::test]
async fn a_request_ends_with_the_error_of_the_server() {
    let error = Error::overloaded("the batch is full", 250);
    let script = Script::new(vec![Ok(tokens(7)), Err(proto::status::to_status(&error))]);
    assert_eq!(decode(script, DEADLINE).await, (vec![7], Err(error)));
}

#[tokio::test]
async fn a_stream_that_only_stops_is_an_error() {
    let (ids, end) = decode(Script::new(vec![Ok(tokens(7))]), DEADLINE).await;
    assert_eq!(
        (ids, end.map_err(|error| error.code)),
        (vec![7], Err(ErrorCode::Unavailable))
    );
}

#[tokio::test]
async fn a_stream_that_hangs_ends_with_the_deadline() {
    let script = Script {
        events: vec![Ok(tokens(7))],
        hangs: true,
    };
    let ended = tokio::time::timeout(DEADLINE, decode(script, 5 * SOON)).await;
    let (ids, end) = ended.expect("ends in time");
    assert_eq!(
        (ids, end.map_err(|error| error.code)),
        (vec![7], Err(ErrorCode::Timeout))
    );
}

#[tokio::test]
async fn what_a_server_must_not_say_is_an_error() {
    for event in [finished("tired"), v1::DecodeEvent { event: None }] {
        let (_, end) = decode(Script::new(vec![Ok(event)]), DEADLINE).await;
        assert_eq!(end.map_err(|error| error.code), Err(ErrorCode::Internal));
    }
}

#[tokio::test]
async fn a_peer_that_is_not_there_is_unavailable_and_one_that_hangs_is_late() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    let node = client::Node::new(channel(&address)).with_deadline(SOON);
    let late = tokio::time::timeout(DEADLINE, node.info())
        .await
        .expect("ends in time");
    assert_eq!(late.expect_err("hangs").code, ErrorCode::Timeout);
    drop(listener);
    let gone = client::Node::new(channel(&address))
        .info()
        .await
        .expect_err("is not there");
    assert_eq!(gone.code, ErrorCode::Unavailable);
    assert!(gone.message.starts_with("Node/Info: "), "{gone}");
}

#[tokio::test]
async fn a_peer_that_has_tls_alone_is_unavailable_and_the_reason_guessed() {
    /// As a TLS server says that what it heard is no handshake: a fatal alert, protocol_version, and its goodbye. Together they are
    /// longer than the head of an HTTP/2 frame, so that nobody waits for the rest of one.
    const ALERT: &[u8] = &[21, 3, 3, 0, 2, 2, 70, 21, 3, 3, 0, 2, 1, 0];
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(ALERT).await;
            // Whatever is left unread would turn the end of the connection into a reset.
            let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        }
    });
    let call = client::Node::new(channel(&address)).with_deadline(DEADLINE);
    let error = call.info().await.expect_err("no HTTP/2");
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    assert!(error.message.contains("is TLS on at one end alone?"), "{error}");
}

#[derive(Clone)]
struct FrontDoor {
    script: Script<v1::GenerateResponse>,
    status: v1::ClusterStatusResponse,
}

#[tonic::async_trait]
impl v1::inference_server::Inference for FrontDoor {
    type GenerateStream = BoxStream<'static, Result<v1::GenerateResponse, Status>>;

    async fn generate(
        &self,
        _: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        Ok(Response::new(self.script.play()))
    }

    async fn list_models(
        &self,
        _: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let error = Error::new(ErrorCode::NotFound, "no model is loaded");
        Err(proto::status::to_status(&error))
    }

    async fn cluster_status(
        &self,
        _: Request<v1::ClusterStatusRequest>,
    ) -> Result<Response<v1::ClusterStatusResponse>, Status> {
        Ok(Response::new(self.status.clone()))
    }
}

#[tokio::test]
async fn the_front_door_speaks_in_typed_events() {
    use v1::generate_response::Event;
    let id = RequestId(7);
    let accepted = v1::Accepted {
        request_id: id.to_string(),
        model: "smollm2".to_owned(),
        prompt_tokens: 3,
    };
    let finished = v1::Finished {
        reason: "stop".to_owned(),
        ..v1::Finished::default()
    };
    let events = [
        Event::Accepted(accepted),
        Event::Tokens(v1::TokenChunk::default()),
        Event::Finished(finished),
    ];
    let load = LoadReport {
        free_blocks: 5,
        ..LoadReport::default()
    };
    let record = r#"{"id":"decode-0","epoch":1,"role":"decode","grpc_endpoint":"","http_endpoint":"","transfer_endpoint":"","model":"","kv_space":null,"capacity_blocks":8,"context_tokens_max":0}"#;
    let node = |load_json: String| v1::NodeStatus {
        record_json: record.to_owned(),
        load_json,
        connected: true,
        indexed_blocks: 2,
    };
    let front_door = FrontDoor {
        script: Script::new(
            events
                .map(|event| Ok(v1::GenerateResponse { event: Some(event) }))
                .into(),
        ),
        status: v1::ClusterStatusResponse {
            nodes: vec![
                node(serde_json::to_string(&load).expect("serialises")),
                node(String::new()),
            ],
            requests_running: 1,
            requests_waiting: 2,
        },
    };
    let client = Inference::new(serve(Routes::new(InferenceServer::new(front_door))).await);
    let mut stream = client
        .generate(v1::GenerateRequest::default(), DEADLINE)
        .await
        .expect("answers");
    let mut next = async || stream.next().await.expect("no error");
    let Some(GenerateEvent::Accepted { request_id, .. }) = next().await else {
        panic!("is accepted first");
    };
    assert_eq!(request_id, id);
    assert!(matches!(next().await, Some(GenerateEvent::Tokens(_))));
    let end = next().await;
    assert!(
        matches!(
            end,
            Some(GenerateEvent::Finished {
                reason: FinishReason::Stop,
                ..
            })
        ),
        "{end:?}"
    );
    assert_eq!(next().await, None);

    let status = client.cluster_status().await.expect("answers");
    assert_eq!((status.requests_running, status.requests_waiting), (1, 2));
    let loads: Vec<_> = status.nodes.iter().map(|node| node.load).collect();
    assert_eq!(loads, [Some(load), None]);
    let error = client.list_models().await.expect_err("is refused");
    assert_eq!(error, Error::new(ErrorCode::NotFound, "no model is loaded"));
}

/// Answers with what it was made with, whatever is asked.
#[derive(Clone, Default)]
struct Shelf {
    acquired: v1::AcquireResponse,
    reserved: v1::ReserveResponse,
    log: Vec<v1::LogBatch>,
}

#[tonic::async_trait]
impl KvStore for Shelf {
    async fn acquire(&self, _: Request<v1::AcquireRequest>) -> Result<Response<v1::AcquireResponse>, Status> {
        Ok(Response::new(self.acquired.clone()))
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let held = request.get_ref().lease_id == self.acquired.lease_id;
        Ok(Response::new(v1::ReleaseResponse { held }))
    }

    async fn reserve(&self, _: Request<v1::ReserveRequest>) -> Result<Response<v1::ReserveResponse>, Status> {
        Ok(Response::new(self.reserved.clone()))
    }

    async fn commit(
        &self,
        request: Request<v1::CommitRequest>,
    ) -> Result<Response<v1::CommitResponse>, Status> {
        match request.get_ref().checksums.as_slice() {
            [5] => Ok(Response::new(v1::CommitResponse {})),
            _ => Err(proto::status::to_status(&Error::new(
                ErrorCode::Corrupt,
                "block 0 does not match",
            ))),
        }
    }

    async fn abort(&self, _: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        Ok(Response::new(v1::AbortResponse {}))
    }

    type WatchStream = BoxStream<'static, Result<v1::LogBatch, Status>>;

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(
            stream::iter(self.log.clone().into_iter().map(Ok)).boxed(),
        ))
    }

    async fn prefetch(
        &self,
        _: Request<v1::PrefetchRequest>,
    ) -> Result<Response<v1::PrefetchResponse>, Status> {
        Ok(Response::new(v1::PrefetchResponse::default()))
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        Ok(Response::new(v1::StatsResponse {
            hits: 3,
            ..v1::StatsResponse::default()
        }))
    }
}

const ROOT: BlockHash = BlockHash([0; 16]);
const FIRST: BlockHash = BlockHash([1; 16]);
const SECOND: BlockHash = BlockHash([2; 16]);

fn descriptor(hash: BlockHash) -> v1::BlockDescriptor {
    v1::BlockDescriptor {
        hash: hash.0.to_vec(),
        offset: 64,
        generation: 2,
        checksum: 5,
    }
}

fn region() -> Option<v1::RemoteRegion> {
    Some(v1::RemoteRegion {
        endpoint: "tcp://127.0.0.1:1".to_owned(),
        epoch: 3,
        key: 4,
    })
}

async fn store(shelf: Shelf) -> Store {
    Store::new(serve(Routes::new(KvStoreServer::new(shelf))).await)
}

async fn acquire(acquired: v1::AcquireResponse) -> Result<Option<client::Acquired>, Error> {
    let shelf = Shelf {
        acquired,
        ..Shelf::default()
    };
    store(shelf).await.acquire(ROOT, &[FIRST, SECOND], DEADLINE).await
}

#[tokio::test]
async fn acquired_blocks_are_those_that_were_asked_for() {
    assert_eq!(
        acquire(v1::AcquireResponse::default()).await,
        Ok(None),
        "a miss is no error"
    );
    let held = |blocks| v1::AcquireResponse {
        lease_id: 9,
        region: region(),
        blocks,
    };
    let acquired = acquire(held(vec![descriptor(FIRST)]))
        .await
        .expect("answers")
        .expect("a hit");
    assert_eq!(
        (acquired.lease, acquired.region.epoch, acquired.region.key),
        (LeaseId(9), Epoch(3), 4)
    );
    let block = acquired.blocks[0];
    assert_eq!((block.hash, block.offset), (FIRST, 64));
    assert_eq!((block.generation, block.checksum), (Generation(2), Checksum(5)));

    let short = v1::BlockDescriptor {
        hash: vec![1, 2],
        ..descriptor(FIRST)
    };
    let lies = [
        held(vec![descriptor(SECOND)]),
        held(vec![descriptor(FIRST), descriptor(SECOND), descriptor(SECOND)]),
        held(vec![short]),
        v1::AcquireResponse {
            region: None,
            ..held(vec![descriptor(FIRST)])
        },
    ];
    for lie in lies {
        let shown = format!("{lie:?}");
        assert!(acquire(lie).await.is_err(), "{shown}");
    }
}

#[tokio::test]
async fn a_put_is_reserved_and_then_committed_or_aborted() {
    let reserved = v1::ReserveResponse {
        reservation_id: 11,
        region: region(),
        held_blocks: 1,
        block_offsets: vec![128],
    };
    let shelf = Shelf {
        reserved: reserved.clone(),
        ..Shelf::default()
    };
    let store = store(shelf).await;
    let answer = store
        .reserve(ROOT, ROOT, &[FIRST, SECOND], DEADLINE)
        .await
        .expect("answers");
    assert_eq!((answer.reservation_id, answer.held_blocks), (11, 1));
    assert_eq!(answer.block_offsets, [128]);
    let too_many = store
        .reserve(ROOT, ROOT, &[FIRST], DEADLINE)
        .await
        .expect_err("1 held and 1 offered");
    assert_eq!(too_many.code, ErrorCode::Internal);
    assert_eq!(store.commit(11, &[Checksum(5)]).await, Ok(()));
    let corrupt = store.commit(11, &[Checksum(6)]).await.expect_err("is checked");
    assert_eq!(corrupt.code, ErrorCode::Corrupt);
    assert_eq!(store.abort(11).await, Ok(()));
    assert_eq!(store.release(LeaseId(1)).await, Ok(false));
    assert_eq!(store.stats().await.expect("answers").hits, 3);
}

#[tokio::test]
async fn the_log_is_read_to_its_end_and_not_beyond_what_can_be_read() {
    let stored = BlockEvent::Stored {
        hash: FIRST,
        parent: ROOT,
        tier: Tier::Host,
    };
    let batch = |events| v1::LogBatch {
        epoch: 3,
        snapshot: true,
        snapshot_end: true,
        sequence: 1,
        events,
    };
    let log = vec![
        batch(vec![proto::convert::event_to_wire(&stored)]),
        batch(vec![v1::BlockEvent { event: None }]),
    ];
    let shelf = Shelf {
        log,
        ..Shelf::default()
    };
    let store = store(shelf).await;
    let mut stream = store.watch(Epoch(3), 1).await.expect("answers");
    let first = stream.next().await.expect("can be read").expect("goes on");
    assert_eq!(
        (first.epoch, first.sequence, first.events),
        (Epoch(3), 1, vec![stored])
    );
    assert_eq!(
        stream.next().await.expect_err("cannot be read").code,
        ErrorCode::Invalid
    );
    assert_eq!(stream.next().await, Ok(None));
}
