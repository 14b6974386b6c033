//! Handoffs, against a prefill node that is written out here and misbehaves as the test says.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
mod slow_fence;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use decode_node::Config;
use engine::LogitsWanted;
use engine::sampler::sample;
use proto::v1::prefill_command::Command;
use proto::v1::prefill_event::Event;
use proto::v1::prefill_server::{Prefill, PrefillServer};
use proto::{convert, status, v1};
use rstest::rstest;
use slow_fence::SlowFence;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use transfer::memory::copy_out;
use transfer::{RegionId, RemoteRegion, Slice, TcpTransport, TransferBatch, TransferError, Transport};
use twox_hash::XxHash3_64;
use types::{Epoch, Error, ErrorCode, SamplingParams, Token};

/// How the prefill node behaves once it has the prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Behaviour {
    Good,
    /// One byte on its way changes after the checksum was taken.
    WrongByte,
    /// Says that it queues, and nothing more.
    StallsInQueue,
    /// Takes the offer, writes half of it, and says nothing more.
    StallsWriting,
    /// Promises heartbeats, and says nothing more.
    SilentInQueue,
    /// Promises heartbeats, takes the offer, writes half of it, and says nothing more.
    SilentWriting,
    /// Computes for far longer than silence may last, but says that it lives.
    SlowButAlive,
    /// Takes the offer, writes half of it, and breaks the stream.
    DiesWriting,
    LandsTwice,
    /// Lands before anything was offered.
    LandsUnasked,
    /// Names another transfer.
    LandsAnother,
    Fails(ErrorCode),
    /// Writes half, waits until the test says so, and then writes the rest, whatever was said meanwhile.
    WritesLate,
}

#[derive(Clone)]
struct Peer {
    behaviour: Behaviour,
    transport: Arc<TcpTransport>,
    /// Lets a [`Behaviour::WritesLate`] go on.
    go: Arc<Notify>,
    /// What the late write came to.
    late: mpsc::Sender<Result<(), TransferError>>,
    /// The first messages of all streams.
    starts: mpsc::UnboundedSender<v1::PrefillStart>,
    /// Told when the decode node ended a stream, with whether it said so.
    ended: mpsc::UnboundedSender<bool>,
    /// Told when half of the KV is written.
    half_written: mpsc::UnboundedSender<()>,
}

/// What the test keeps of a peer.
struct Running {
    endpoint: String,
    go: Arc<Notify>,
    late: mpsc::Receiver<Result<(), TransferError>>,
    starts: mpsc::UnboundedReceiver<v1::PrefillStart>,
    ended: mpsc::UnboundedReceiver<bool>,
    half_written: mpsc::UnboundedReceiver<()>,
    _server: tokio::task::JoinHandle<()>,
}

impl Running {
    fn placement(&self) -> v1::PrefillPlacement {
        v1::PrefillPlacement {
            node_id: "prefill-0".into(),
            grpc_endpoint: self.endpoint.clone(),
            epoch: 3,
        }
    }
}

async fn start_peer(behaviour: Behaviour) -> Running {
    let transport = TcpTransport::bind(loopback(), Epoch(3), transfer::tcp::Config::default())
        .await
        .unwrap();
    let (late_tx, late) = mpsc::channel(1);
    let (starts_tx, starts) = mpsc::unbounded_channel();
    let (ended_tx, ended) = mpsc::unbounded_channel();
    let (half_written_tx, half_written) = mpsc::unbounded_channel();
    let go = Arc::new(Notify::new());
    let peer = Peer {
        behaviour,
        transport,
        go: go.clone(),
        late: late_tx,
        starts: starts_tx,
        ended: ended_tx,
        half_written: half_written_tx,
    };
    let listener = tokio::net::TcpListener::bind(loopback()).await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    let serving = Server::builder()
        .add_service(PrefillServer::new(peer))
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    let server = tokio::spawn(async move { serving.await.unwrap() });
    Running {
        endpoint,
        go,
        late,
        starts,
        ended,
        half_written,
        _server: server,
    }
}

/// What a peer that promises heartbeats says of them.
const HEARTBEAT: Duration = Duration::from_millis(10);
/// Longer than a busy machine makes a heartbeat late.
const STALL_TIMEOUT: Duration = Duration::from_millis(400);

type Events = mpsc::Sender<Result<v1::PrefillEvent, Status>>;

#[tonic::async_trait]
impl Prefill for Peer {
    type PrefillStream = ReceiverStream<Result<v1::PrefillEvent, Status>>;

    async fn prefill(
        &self,
        request: Request<Streaming<v1::PrefillCommand>>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let (events, outgoing) = mpsc::channel(16);
        let peer = self.clone();
        tokio::spawn(async move { peer.serve(request.into_inner(), events).await });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// What a prefill computes: its KV in a registered memory, and the message that tells of it.
struct Computed {
    region: RegionId,
    slices: Vec<Slice>,
    landed: v1::PrefillLanded,
}

impl Peer {
    async fn serve(self, mut commands: Streaming<v1::PrefillCommand>, events: Events) {
        let Some(Command::Start(start)) = next(&mut commands).await else {
            panic!("a stream begins with a start")
        };
        let _ = self.starts.send(start.clone());
        let promises = matches!(
            self.behaviour,
            Behaviour::SilentInQueue | Behaviour::SilentWriting | Behaviour::SlowButAlive
        );
        let queued = v1::PrefillQueued {
            heartbeat_ms: if promises { HEARTBEAT.as_millis() as u64 } else { 0 },
            ..v1::PrefillQueued::default()
        };
        tell(&events, Event::Queued(queued)).await;
        let blocks = start.tokens.len().div_ceil(BLOCK_TOKENS) as u64 - start.held_blocks;
        match self.behaviour {
            Behaviour::StallsInQueue | Behaviour::SilentInQueue => return self.hold(commands, events).await,
            Behaviour::Fails(code) => {
                let failure = status::to_failure(&Error::new(code, "scripted"));
                return tell(&events, Event::Failure(failure)).await;
            }
            Behaviour::LandsUnasked => {
                tell(&events, Event::Landed(v1::PrefillLanded::default())).await;
                return self.hold(commands, events).await;
            }
            Behaviour::SlowButAlive => {
                let until = Instant::now() + 3 * STALL_TIMEOUT;
                while Instant::now() < until {
                    tell(&events, Event::Alive(v1::PrefillAlive {})).await;
                    tokio::time::sleep(HEARTBEAT).await;
                }
                tell(&events, Event::Started(v1::PrefillStarted { blocks })).await;
            }
            _ => tell(&events, Event::Started(v1::PrefillStarted { blocks })).await,
        }
        let Some(Command::Offer(offer)) = next(&mut commands).await else {
            let _ = self.ended.send(false);
            return;
        };
        assert_eq!(offer.block_offsets.len() as u64, blocks);
        let mut computed = self.compute(&start, &offer);
        let rest = computed.slices.split_off(computed.slices.len() / 2);
        let region = remote(&offer);
        if self
            .write(computed.region, &region, computed.slices.clone())
            .await
            .is_err()
        {
            // The decode node has given up already.
            return self.hold(commands, events).await;
        }
        let _ = self.half_written.send(());
        match self.behaviour {
            Behaviour::StallsWriting | Behaviour::SilentWriting => return self.hold(commands, events).await,
            Behaviour::DiesWriting => {
                let _ = events.send(Err(Status::unknown("gone"))).await;
                return;
            }
            Behaviour::WritesLate => {
                self.hold(commands, events).await;
                self.go.notified().await;
                let result = self.write(computed.region, &region, rest).await;
                let _ = self.late.send(result).await;
                return;
            }
            _ => {}
        }
        if self.write(computed.region, &region, rest).await.is_err() {
            return self.hold(commands, events).await;
        }
        let mut landed = computed.landed;
        if self.behaviour == Behaviour::WrongByte {
            *landed.checksums.last_mut().unwrap() ^= 1;
        }
        if self.behaviour == Behaviour::LandsAnother {
            landed.transfer_id += 1;
        }
        if self.behaviour == Behaviour::LandsTwice {
            let token = (landed.first_token + 1) % VOCABULARY as u32;
            tell(&events, Event::Landed(landed.clone())).await;
            landed = v1::PrefillLanded {
                first_token: token,
                checksums: Vec::new(),
                ..landed
            };
        }
        tell(&events, Event::Landed(landed)).await;
        self.hold(commands, events).await;
    }

    /// Keeps the stream open until the decode node ends it.
    async fn hold(&self, mut commands: Streaming<v1::PrefillCommand>, events: Events) {
        let said = matches!(next(&mut commands).await, Some(Command::Abort(_)));
        drop(events);
        let _ = self.ended.send(said);
    }

    fn compute(&self, start: &v1::PrefillStart, offer: &v1::PrefillOffer) -> Computed {
        let mut monolith = monolith();
        let tokens: &[Token] = &start.tokens;
        let mut logits = monolith.logits(tokens, 0, LogitsWanted::Last).unwrap();
        let params = convert::sampling(start.sampling.clone()).unwrap();
        let (prompt, generated) = tokens.split_at(start.prompt_tokens as usize);
        let sampled = sample(&mut logits, &params, prompt, generated).unwrap();
        let block_bytes = monolith.layout().block_bytes() as u64;
        let local = |index: usize| (start.held_blocks + index as u64) * block_bytes;
        let slices: Vec<Slice> = offer
            .block_offsets
            .iter()
            .enumerate()
            .map(|(index, offset)| Slice {
                local_offset: local(index),
                remote_offset: *offset,
                len: block_bytes,
            })
            .collect();
        let bytes = |slice: &Slice| {
            copy_out(
                monolith.memory().as_ref(),
                slice.local_offset as usize,
                block_bytes as usize,
            )
            .unwrap()
        };
        let landed = v1::PrefillLanded {
            transfer_id: offer.transfer_id,
            checksums: slices
                .iter()
                .map(|slice| XxHash3_64::oneshot(&bytes(slice)))
                .collect(),
            first_token: sampled.token,
            logprob: sampled
                .logprob
                .map(|logprob| convert::logprob_to_wire(&logprob, |_| Vec::new())),
            cached_tokens: start.held_blocks * BLOCK_TOKENS as u64,
            handoff_bytes: slices.len() as u64 * block_bytes,
            prefill_ms: 1.0,
            handoff_hidden_ms: 0.5,
            handoff_exposed_ms: 0.25,
            transport: "ucx".to_owned(),
            ..v1::PrefillLanded::default()
        };
        Computed {
            region: self.transport.register(monolith.memory().clone()).unwrap(),
            slices,
            landed,
        }
    }

    async fn write(
        &self,
        region: RegionId,
        remote: &RemoteRegion,
        slices: Vec<Slice>,
    ) -> Result<(), TransferError> {
        let batch = TransferBatch {
            region,
            remote: remote.clone(),
            slices,
            keep: transfer::Keep::default(),
        };
        self.transport
            .write(batch, Instant::now() + PATIENCE)
            .await
            .map(|_| ())
    }
}

async fn next(commands: &mut Streaming<v1::PrefillCommand>) -> Option<Command> {
    commands.message().await.ok().flatten()?.command
}

async fn tell(events: &Events, event: Event) {
    // The decode node may have gone.
    let _ = events.send(Ok(v1::PrefillEvent { event: Some(event) })).await;
}

fn remote(offer: &v1::PrefillOffer) -> RemoteRegion {
    let region = offer.region.clone().unwrap();
    RemoteRegion {
        endpoint: region.endpoint,
        epoch: Epoch(region.epoch),
        key: region.key,
    }
}

fn placed(node: &Node, peer: &Running, prompt: &[Token], params: &SamplingParams) -> v1::DecodeRequest {
    v1::DecodeRequest {
        prefill: Some(peer.placement()),
        ..node.request(prompt, params)
    }
}

fn handoffs(node: &Node, outcome: &str) -> f64 {
    node.metric(&format!("perigee_decode_handoffs_total{{outcome=\"{outcome}\"}}"))
}

fn pool(node: &Node) -> Vec<u8> {
    let memory = node.store.memory();
    copy_out(memory.as_ref(), 0, memory.len()).unwrap()
}

#[rstest]
#[case(Behaviour::Good)]
#[case(Behaviour::LandsTwice)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_after_a_handoff_equal_the_monoliths(#[case] behaviour: Behaviour) {
    let peer = start_peer(behaviour).await;
    let node = Node::start(300, config()).await;
    let mut dice = Dice(21);
    let mut requests = Vec::new();
    for _ in 0..24 {
        let length = dice.between(1, 120);
        let (prompt, params) = (dice.tokens(length), dice.params(20));
        let params = SamplingParams {
            logprobs: Some(1),
            ..params
        };
        requests.push((prompt, params));
    }
    let answers = requests
        .iter()
        .map(|(prompt, params)| node.decode(placed(&node, &peer, prompt, params)));
    for ((prompt, params), answer) in requests.iter().zip(futures::future::join_all(answers).await) {
        let answer = answer.unwrap();
        assert_eq!(answer.tokens, expected(prompt, params), "{params:?}");
        assert_eq!(answer.logprobs.len(), answer.tokens.len());
        assert_eq!(
            answer.text,
            node.decode(node.request(prompt, params)).await.unwrap().text
        );
        let report = answer.report();
        let blocks = prompt.len().div_ceil(BLOCK_TOKENS) as u64;
        assert_eq!(
            report.handoff_bytes,
            blocks * node.store.layout().block_bytes() as u64
        );
        assert_eq!(
            (report.prefill_node.as_str(), report.decode_node.as_str()),
            ("prefill-0", "decode-0")
        );
        assert_eq!(report.transport, "ucx", "as the prefill node says");
        assert!(report.queue_ms > 0.0 && report.prefill_ms == 1.0);
    }
    assert_eq!(handoffs(&node, "adopted"), 24.0);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_that_is_held_here_is_not_sent_again() {
    let mut peer = start_peer(Behaviour::Good).await;
    let node = Node::start(100, config()).await;
    let params = SamplingParams {
        max_tokens: 5,
        ignore_eos: true,
        ..Default::default()
    };
    let mut conversation = Dice(22).tokens(35);
    for held in [0, 5, 6] {
        let answer = node
            .decode(placed(&node, &peer, &conversation, &params))
            .await
            .unwrap();
        assert_eq!(answer.tokens, expected(&conversation, &params));
        assert_eq!(peer.starts.recv().await.unwrap().held_blocks, held);
        conversation.extend(answer.tokens);
        conversation.extend([7, 8, 9]);
    }
    // Nothing at all is missing of this one, so nobody is asked.
    conversation.truncate(48);
    let answer = node
        .decode(placed(&node, &peer, &conversation, &params))
        .await
        .unwrap();
    assert_eq!(answer.tokens, expected(&conversation, &params));
    assert_eq!((answer.cached_tokens(), answer.report().handoff_bytes), (48, 0));
    assert!(peer.starts.try_recv().is_err());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resumed_request_is_prefilled_with_what_was_generated() {
    let mut peer = start_peer(Behaviour::Good).await;
    let node = Node::start(100, config()).await;
    let mut dice = Dice(23);
    for _ in 0..8 {
        let prompt = dice.tokens(20);
        let params = SamplingParams {
            ignore_eos: true,
            max_tokens: 12,
            ..dice.params(12)
        };
        let whole = expected(&prompt, &params);
        let resumed = dice.between(1, 11);
        let request = v1::DecodeRequest {
            resumed: whole[..resumed].to_vec(),
            ..placed(&node, &peer, &prompt, &params)
        };
        let answer = node.decode(request).await.unwrap();
        assert_eq!(answer.tokens, whole[resumed..]);
        assert_eq!(peer.starts.recv().await.unwrap().prompt_tokens, 20);
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_that_only_the_last_token_completes_is_cached_too() {
    let peer = start_peer(Behaviour::Good).await;
    let node = Node::start(100, config()).await;
    let prompt = Dice(24).tokens(2 * BLOCK_TOKENS - 1);
    let one = SamplingParams {
        max_tokens: 1,
        ..Default::default()
    };
    let answer = node.decode(placed(&node, &peer, &prompt, &one)).await.unwrap();
    let next = [prompt, answer.tokens, vec![9]].concat();
    assert_eq!(
        node.decode(node.request(&next, &one))
            .await
            .unwrap()
            .cached_tokens(),
        2 * BLOCK_TOKENS
    );
    node.stop().await;
}

#[rstest]
#[case::wrong_bytes(Behaviour::WrongByte, ErrorCode::Corrupt, "corrupt")]
#[case::stalled_in_the_queue(Behaviour::StallsInQueue, ErrorCode::Timeout, "timed_out")]
#[case::stalled_while_writing(Behaviour::StallsWriting, ErrorCode::Timeout, "timed_out")]
#[case::silent_in_the_queue(Behaviour::SilentInQueue, ErrorCode::Unavailable, "failed")]
#[case::silent_while_writing(Behaviour::SilentWriting, ErrorCode::Unavailable, "failed")]
#[case::died_while_writing(Behaviour::DiesWriting, ErrorCode::Unavailable, "failed")]
#[case::landed_unasked(Behaviour::LandsUnasked, ErrorCode::Internal, "failed")]
#[case::landed_another(Behaviour::LandsAnother, ErrorCode::Internal, "failed")]
#[case::overloaded(Behaviour::Fails(ErrorCode::Overloaded), ErrorCode::Overloaded, "failed")]
#[case::restarted(Behaviour::Fails(ErrorCode::Fenced), ErrorCode::Fenced, "failed")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handoff_that_goes_wrong_is_a_typed_error_and_leaves_nothing(
    #[case] behaviour: Behaviour,
    #[case] code: ErrorCode,
    #[case] outcome: &str,
) {
    let mut peer = start_peer(behaviour).await;
    let settings = Config {
        stall_timeout: STALL_TIMEOUT,
        ..config()
    };
    let node = Node::start(60, settings).await;
    let prompt = Dice(25).tokens(50);
    let params = SamplingParams {
        max_tokens: 4,
        ..Default::default()
    };
    let stalls = matches!(behaviour, Behaviour::StallsInQueue | Behaviour::StallsWriting);
    let deadline_ms = if stalls { 1_000 } else { 30_000 };
    let request = v1::DecodeRequest {
        deadline_ms,
        ..placed(&node, &peer, &prompt, &params)
    };
    let mut stream = node.open(request).await.unwrap();
    let error = stream
        .message()
        .await
        .expect_err("nothing is emitted before the error");
    assert_eq!(status::from_status(&error).code, code, "{error}");
    node.at_rest().await;
    assert_eq!(node.store.stats().blocks.cached, 0, "nothing of it is believed");
    assert_eq!(handoffs(&node, outcome), 1.0);
    assert_eq!(
        node.store.stats().corruptions,
        u64::from(code == ErrorCode::Corrupt)
    );
    let silent = matches!(behaviour, Behaviour::SilentInQueue | Behaviour::SilentWriting);
    if stalls || silent || outcome == "corrupt" {
        tokio::time::timeout(PATIENCE, peer.ended.recv())
            .await
            .expect("the other side learns of the end")
            .unwrap();
    }
    // The node is as good as before.
    assert_eq!(
        node.decode(node.request(&prompt, &params)).await.unwrap().tokens,
        expected(&prompt, &params)
    );
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_prefill_that_says_that_it_lives_is_not_taken_for_a_stall() {
    let peer = start_peer(Behaviour::SlowButAlive).await;
    let settings = Config {
        stall_timeout: STALL_TIMEOUT,
        ..config()
    };
    let node = Node::start(60, settings).await;
    let (prompt, params) = (Dice(33).tokens(50), SamplingParams::default());
    let answer = node.decode(placed(&node, &peer, &prompt, &params)).await.unwrap();
    assert_eq!(answer.tokens, expected(&prompt, &params));
    assert_eq!(handoffs(&node, "adopted"), 1.0);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_that_does_not_close_ends_the_request_and_keeps_the_blocks_until_it_does() {
    let peer = start_peer(Behaviour::Good).await;
    let inner = TcpTransport::bind(loopback(), EPOCH, transfer::tcp::Config::default())
        .await
        .unwrap();
    let transport = SlowFence::new(inner);
    let settings = Config {
        fence_timeout: Duration::from_millis(30),
        ..config()
    };
    let node = Node::start_on(60, settings, transport.clone()).await;
    let (prompt, params) = (Dice(32).tokens(50), SamplingParams::default());
    let error = node
        .decode(placed(&node, &peer, &prompt, &params))
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    assert_eq!(handoffs(&node, "failed"), 1.0);
    let granted = prompt.len().div_ceil(BLOCK_TOKENS);
    eventually("the request is over", || node.handle.requests() == 0).await;
    assert_eq!(
        node.store.stats().blocks.owned,
        granted,
        "nobody gets blocks that a peer may write"
    );
    // The node serves on meanwhile.
    assert_eq!(
        node.decode(node.request(&prompt, &params)).await.unwrap().tokens,
        expected(&prompt, &params)
    );
    transport.let_fences_close();
    node.at_rest().await;
    assert_eq!(transport.revocations(), 1, "a grant is revoked once");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_after_the_end_touch_nothing() {
    let mut peer = start_peer(Behaviour::WritesLate).await;
    let node = Node::start(60, config()).await;
    let prompt = Dice(26).tokens(50);
    let stream = node
        .open(placed(&node, &peer, &prompt, &SamplingParams::default()))
        .await
        .unwrap();
    tokio::time::timeout(PATIENCE, peer.half_written.recv())
        .await
        .expect("it writes")
        .unwrap();
    drop(stream);
    node.at_rest().await;
    let before = pool(&node);
    assert!(before.iter().any(|byte| *byte != 0), "half of it was written");
    peer.go.notify_one();
    let late = tokio::time::timeout(PATIENCE, peer.late.recv())
        .await
        .expect("it tries")
        .unwrap();
    assert!(matches!(late, Err(TransferError::UnknownKey { .. })), "{late:?}");
    assert!(before == pool(&node), "a write came through the fence");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_node_that_is_not_there_is_unavailable() {
    let node = Node::start(60, config()).await;
    let free_port = tokio::net::TcpListener::bind(loopback())
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let placement = v1::PrefillPlacement {
        node_id: "prefill-0".into(),
        grpc_endpoint: free_port.to_string(),
        epoch: 3,
    };
    let request = v1::DecodeRequest {
        prefill: Some(placement),
        ..node.request(&[5; 20], &SamplingParams::default())
    };
    assert_eq!(
        node.decode(request).await.unwrap_err().code,
        ErrorCode::Unavailable
    );
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handoff_that_finds_no_blocks_waits_in_the_batchs_queue_instead() {
    let mut peer = start_peer(Behaviour::Good).await;
    let node = Node::start(
        20,
        Config {
            allocate_timeout: Duration::from_millis(30),
            ..config()
        },
    )
    .await;
    let outside = node.store.allocate(18).unwrap();
    let prompt = Dice(27).tokens(40);
    let params = SamplingParams {
        max_tokens: 7,
        ..Default::default()
    };
    let answer = {
        let answer = node.decode(placed(&node, &peer, &prompt, &params));
        let give_back = async {
            peer.ended.recv().await.unwrap();
            drop(outside);
        };
        tokio::join!(answer, give_back).0.unwrap()
    };
    assert_eq!(answer.tokens, expected(&prompt, &params));
    assert_eq!(answer.report().prefill_node, "decode-0");
    assert_eq!(handoffs(&node, "short"), 1.0);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handoff_that_queues_elsewhere_gives_its_prefix_to_those_who_wait_for_memory() {
    let mut peer = start_peer(Behaviour::StallsInQueue).await;
    let node = Node::start(
        12,
        Config {
            allocate_timeout: Duration::from_millis(30),
            ..config()
        },
    )
    .await;
    let prompt = Dice(30).tokens(50);
    let params = SamplingParams {
        max_tokens: 3,
        ..Default::default()
    };
    node.decode(node.request(&prompt, &params)).await.unwrap();
    let queued = node
        .open(placed(
            &node,
            &peer,
            &[prompt.as_slice(), &[5; 20]].concat(),
            &params,
        ))
        .await
        .unwrap();
    assert_eq!(peer.starts.recv().await.unwrap().held_blocks, 6);
    // Needs more than what the prefix that is pinned for the handoff leaves.
    let other = Dice(31).tokens(80);
    let (answer, queued) = tokio::join!(node.decode(node.request(&other, &params)), collect(queued));
    assert_eq!(answer.unwrap().tokens, expected(&other, &params));
    assert_eq!(
        queued.unwrap().tokens,
        expected(&[prompt.as_slice(), &[5; 20]].concat(), &params)
    );
    assert_eq!(handoffs(&node, "short"), 1.0);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handoffs_in_a_pool_that_is_too_small_for_all_give_the_same_tokens() {
    let peer = start_peer(Behaviour::Good).await;
    let node = Node::start(
        16,
        Config {
            allocate_timeout: Duration::from_millis(100),
            ..config()
        },
    )
    .await;
    let mut dice = Dice(28);
    let requests: Vec<_> = (0..24)
        .map(|_| {
            let length = dice.between(1, 50);
            (dice.tokens(length), dice.params(60))
        })
        .collect();
    let answers = requests.iter().enumerate().map(|(index, (prompt, params))| {
        let request = if index % 3 == 0 {
            node.request(prompt, params)
        } else {
            placed(&node, &peer, prompt, params)
        };
        node.decode(request)
    });
    for ((prompt, params), answer) in requests.iter().zip(futures::future::join_all(answers).await) {
        assert_eq!(answer.unwrap().tokens, expected(prompt, params), "{params:?}");
    }
    node.stop().await;
}

#[rstest]
#[case(Behaviour::Good)]
#[case(Behaviour::StallsInQueue)]
#[case(Behaviour::StallsWriting)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_at_any_moment_ends_the_handoff(#[case] behaviour: Behaviour) {
    let peer = start_peer(behaviour).await;
    let node = Node::start(60, config()).await;
    let mut dice = Dice(29);
    let params = SamplingParams {
        max_tokens: 50,
        ignore_eos: true,
        ..Default::default()
    };
    for _ in 0..25 {
        let prompt = dice.tokens(40);
        let stream = node.open(placed(&node, &peer, &prompt, &params)).await.unwrap();
        let patience = Duration::from_micros(dice.below(20_000) as u64);
        // However far it has come by then.
        let _ = tokio::time::timeout(patience, collect(stream)).await;
    }
    node.at_rest().await;
    node.stop().await;
}
