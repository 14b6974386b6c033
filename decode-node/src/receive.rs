//! Runs one handoff: the stream to a prefill node, and the memory that is offered over it.
//!
//! Invariant: offered memory is in a [`Grant`] until our own transport's fence gave it back, whatever becomes of this
//! code. When [`receive`] returns, no write of the prefill node can touch what it returns, and the stream is closed; a
//! fence that takes longer than a request may wait goes on in the background, and frees its blocks when it is done.
//!
//! Elsewhere: the decisions (`handoff.rs`), the fence (`transfer`), what is done with the sequence (`request.rs`).

use std::collections::VecDeque;
use std::time::Duration;

use kv_store::{Grant, SequenceBlocks};
use proto::v1::prefill_client::PrefillClient;
use proto::v1::prefill_event::Event as Wire;
use proto::{convert, status, trace, v1};
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use types::{Checksum, Error, ErrorCode, RequestId, SamplingParams, Token, TraceParent, TransferId};

use crate::handoff::{Action, Event, Handoff, Outcome};
use crate::request::{Interruption, Watch};
use crate::shared::Shared;

/// A stream carries at most a start, an offer and an abort, so none of them ever waits.
const COMMANDS_MAX: usize = 3;

/// Heartbeats of a prefill node that may be missed before it counts as stalled, however short our own limit is.
const HEARTBEATS_MISSED_MAX: u32 = 3;

/// What is to be received.
pub(crate) struct Wanted<'a> {
    pub(crate) request_id: RequestId,
    pub(crate) tokens: &'a [Token],
    pub(crate) prompt_tokens: usize,
    pub(crate) params: &'a SamplingParams,
    pub(crate) tenant: &'a str,
    pub(crate) placement: &'a v1::PrefillPlacement,
    pub(crate) sources: &'a [v1::PrefixSource],
    pub(crate) trace: Option<TraceParent>,
}

/// How a handoff that did not fail ended.
pub(crate) enum Received {
    /// All KV is here, and verified.
    Landed(Box<Landed>),
    /// There was no memory for it in time. Nothing is held.
    Short,
}

/// The result of a handoff.
pub(crate) struct Landed {
    /// With the KV of all tokens that were asked for.
    pub(crate) blocks: SequenceBlocks,
    /// When the prefill was asked for, and when it started.
    pub(crate) requested_at: Instant,
    pub(crate) started_at: Instant,
    /// When the prefill node said that all is here, and when that was verified.
    pub(crate) landed_at: Instant,
    pub(crate) verified_at: Instant,
    /// What the prefill node says of it.
    pub(crate) report: v1::PrefillLanded,
}

/// Receives the KV of what `blocks` do not hold. At least one block must be missing.
pub(crate) async fn receive(
    shared: &Shared,
    watch: &Watch,
    wanted: Wanted<'_>,
    blocks: SequenceBlocks,
) -> Result<Received, Error> {
    let transfer = shared.next_transfer();
    let missing = shared.store.layout().blocks_for(wanted.tokens.len()) - blocks.shared_blocks();
    let (commands, outgoing) = mpsc::channel(COMMANDS_MAX);
    let receiver = Receiver {
        shared,
        watch,
        node: &wanted.placement.node_id,
        transfer,
        missing,
        commands,
        allocation: None,
        grant: None,
        written: Vec::new(),
        blocks: Some(blocks),
        requested_at: Instant::now(),
        started_at: Instant::now(),
        landed: None,
        landed_at: None,
        interrupted: false,
        heard_at: Instant::now(),
        silence_max: Some(shared.config.stall_timeout),
    };
    receiver.send(v1::prefill_command::Command::Start(start(
        shared, watch, &wanted, missing,
    )));
    let (outcome, receiver) = match open(shared, watch, &wanted, outgoing).await {
        Ok(events) => receiver.run(events).await,
        Err(outcome) => (outcome, receiver),
    };
    shared.metrics.handoff_ended(&outcome);
    receiver.conclude(outcome)
}

fn start(shared: &Shared, watch: &Watch, wanted: &Wanted<'_>, missing: usize) -> v1::PrefillStart {
    let blocks = shared.store.layout().blocks_for(wanted.tokens.len());
    v1::PrefillStart {
        request_id: wanted.request_id.to_string(),
        kv_root: shared.store.common_root().0.to_vec(),
        tokens: wanted.tokens.to_vec(),
        prompt_tokens: wanted.prompt_tokens as u64,
        held_blocks: (blocks - missing) as u64,
        sampling: Some(convert::sampling_to_wire(wanted.params)),
        sources: wanted.sources.to_vec(),
        deadline_ms: watch.remaining_ms(),
        prefill_epoch: wanted.placement.epoch,
        tenant: wanted.tenant.to_owned(),
    }
}

async fn open(
    shared: &Shared,
    watch: &Watch,
    wanted: &Wanted<'_>,
    outgoing: mpsc::Receiver<v1::PrefillCommand>,
) -> Result<Streaming<v1::PrefillEvent>, Outcome> {
    let placement = wanted.placement;
    let channel = shared
        .channels
        .get(&placement.grpc_endpoint)
        .map_err(Outcome::Failed)?;
    let mut client = PrefillClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
    let mut call = tonic::Request::new(ReceiverStream::new(outgoing));
    if let Some(parent) = wanted.trace {
        trace::write(call.metadata_mut(), parent);
    }
    let opened = client.prefill(call);
    tokio::select! {
        // A request that nobody wants opens no stream.
        biased;
        why = watch.interrupted() => Err(match why {
            Interruption::Deadline => Outcome::TimedOut,
            Interruption::ClientGone | Interruption::Stopping => Outcome::Cancelled,
        }),
        opened = timeout(shared.config.stall_timeout, opened) => match opened {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(error)) => Err(Outcome::Failed(at(&placement.node_id, status::from_status(&error)))),
            Err(_) => {
                let stalled = stalled(&placement.node_id, shared.config.stall_timeout);
                Err(Outcome::Failed(stalled))
            }
        },
    }
}

/// Nothing was told to the client yet, so the request may go elsewhere.
fn stalled(node: &str, silence: Duration) -> Error {
    Error::unavailable(format!(
        "prefill node {node} has said nothing for {} ms",
        silence.as_millis()
    ))
}

/// Says which node an error is from.
fn at(node: &str, error: Error) -> Error {
    Error {
        message: format!("prefill node {node}: {}", error.message),
        ..error
    }
}

struct Receiver<'a> {
    shared: &'a Shared,
    watch: &'a Watch,
    node: &'a str,
    transfer: TransferId,
    /// Blocks to be filled.
    missing: usize,
    commands: mpsc::Sender<v1::PrefillCommand>,
    /// When the search for blocks ends, while it goes on.
    allocation: Option<Instant>,
    grant: Option<Grant>,
    /// Blocks behind the fence.
    written: Vec<kv_store::Landed>,
    /// `None` while they are verified, and after what was written turned out to be wrong.
    blocks: Option<SequenceBlocks>,
    requested_at: Instant,
    started_at: Instant,
    landed: Option<v1::PrefillLanded>,
    landed_at: Option<Instant>,
    interrupted: bool,
    /// When the prefill node said anything last.
    heard_at: Instant,
    /// How long it may say nothing. `None` where silence means nothing.
    silence_max: Option<Duration>,
}

impl Receiver<'_> {
    async fn run(mut self, mut events: Streaming<v1::PrefillEvent>) -> (Outcome, Self) {
        let mut handoff = Handoff::new(self.transfer, self.missing);
        let patience = self.shared.config.allocate_timeout;
        let mut poll = poll_interval(self.shared.config.blocks_poll);
        let mut answers = VecDeque::new();
        let mut closed = false;
        loop {
            let event = match answers.pop_front() {
                Some(answer) => answer,
                None => tokio::select! {
                    // Who no longer wants it is asked first: an offer that was not made needs no fence.
                    biased;
                    why = self.watch.interrupted(), if !self.interrupted => self.interrupt(why),
                    message = events.message(), if !closed => {
                        closed = !matches!(message, Ok(Some(_)));
                        match self.read(message) {
                            Some(event) => event,
                            None => continue,
                        }
                    }
                    silence = silence(self.heard_at, self.silence_max) => {
                        self.silence_max = None;
                        Event::Stalled(stalled(self.node, silence))
                    }
                    // The prefix is pinned, which is memory that the sequences in the batch cannot take.
                    () = self.shared.starved(patience), if handoff.is_requested() => Event::Short,
                    _ = poll.tick(), if self.allocation.is_some() => match self.try_allocate() {
                        Some(event) => event,
                        None => continue,
                    },
                },
            };
            match handoff.on(event) {
                Action::Wait => {}
                Action::Allocate => {
                    self.allocation = Some(Instant::now() + self.shared.config.allocate_timeout);
                    answers.extend(self.try_allocate());
                }
                Action::Offer => self.offer(),
                Action::Fence { abort } => answers.push_back(self.fence(abort).await),
                Action::Verify => answers.push_back(self.verify().await),
                Action::End(outcome) => return (outcome, self),
            }
        }
    }

    fn interrupt(&mut self, why: Interruption) -> Event {
        self.interrupted = true;
        match why {
            Interruption::Deadline => Event::DeadlinePassed,
            Interruption::ClientGone | Interruption::Stopping => Event::Cancelled,
        }
    }

    /// What a message means. A place in the prefill node's queue means nothing here.
    fn read(&mut self, message: Result<Option<v1::PrefillEvent>, Status>) -> Option<Event> {
        self.heard_at = Instant::now();
        let closed = match message {
            Ok(Some(message)) => return self.read_event(message.event),
            Ok(None) => Error::unavailable("the stream ended before the KV landed"),
            Err(error) => status::from_status(&error),
        };
        self.silence_max = None;
        Some(Event::Closed(at(self.node, closed)))
    }

    fn read_event(&mut self, event: Option<Wire>) -> Option<Event> {
        match event {
            Some(Wire::Queued(queued)) => {
                // An older node promises nothing, and may compute for long.
                let promised =
                    Duration::from_millis(queued.heartbeat_ms).saturating_mul(HEARTBEATS_MISSED_MAX);
                let limit = self.shared.config.stall_timeout.max(promised);
                self.silence_max = (queued.heartbeat_ms > 0).then_some(limit);
                None
            }
            Some(Wire::Alive(_)) | None => None,
            Some(Wire::Started(started)) => {
                self.started_at = Instant::now();
                Some(Event::Started {
                    blocks: started.blocks,
                })
            }
            Some(Wire::Landed(landed)) => {
                let event = Event::Landed {
                    transfer: TransferId(landed.transfer_id),
                    checksums: landed.checksums.len(),
                };
                // A second one is no news, and must not replace what is being verified.
                self.landed.get_or_insert(landed);
                self.landed_at.get_or_insert(self.heard_at);
                Some(event)
            }
            Some(Wire::Failure(failure)) => {
                Some(Event::Failed(at(self.node, status::from_failure(&failure))))
            }
            Some(Wire::Quiesced(_)) => Some(Event::Quiesced),
        }
    }

    /// Looks for blocks once. `None` while the search goes on.
    fn try_allocate(&mut self) -> Option<Event> {
        let until = self.allocation?;
        // Sequences that wait for blocks are older than this offer. Asked first, because allocating evicts.
        let short = self.shared.is_short_of_blocks();
        let blocks = if short {
            None
        } else {
            self.shared.store.allocate(self.missing).ok()
        };
        let event = match blocks.map(|blocks| self.shared.store.grant(blocks)) {
            Some(Ok(grant)) => {
                self.grant = Some(grant);
                Event::Allocated
            }
            Some(Err(error)) => Event::AllocationFailed(error.into()),
            None if self.interrupted || Instant::now() >= until => Event::Short,
            None => return None,
        };
        self.allocation = None;
        Some(event)
    }

    fn offer(&self) {
        let Some(grant) = &self.grant else { return };
        let region = grant.region();
        self.send(v1::prefill_command::Command::Offer(v1::PrefillOffer {
            transfer_id: self.transfer.0,
            region: Some(v1::RemoteRegion {
                endpoint: region.endpoint.clone(),
                epoch: region.epoch.0,
                key: region.key,
            }),
            block_offsets: grant.block_offsets(),
        }));
    }

    async fn fence(&mut self, abort: bool) -> Event {
        if abort {
            self.send(v1::prefill_command::Command::Abort(v1::PrefillAbort {
                reason: "the decode node ends the handoff".to_owned(),
            }));
        }
        let Some(grant) = self.grant.take() else {
            return Event::Fenced;
        };
        let patience = self.shared.config.fence_timeout;
        match timeout(patience, grant.fence()).await {
            Ok(blocks) => {
                self.written = blocks;
                Event::Fenced
            }
            // The future that is dropped here leaves the fence to the background.
            Err(_) => {
                let ms = patience.as_millis();
                tracing::warn!(
                    node = self.node,
                    ms,
                    "the fence of a handoff does not close: its blocks wait for it"
                );
                Event::FenceSlow(Error::unavailable(format!(
                    "the fence of a handoff from prefill node {} did not close within {ms} ms",
                    self.node
                )))
            }
        }
    }

    /// Hashing many blocks takes longer than a task may, so a thread does it.
    async fn verify(&mut self) -> Event {
        let checksums: Vec<Checksum> = match &self.landed {
            Some(landed) => landed.checksums.iter().copied().map(Checksum).collect(),
            None => Vec::new(),
        };
        let written = std::mem::take(&mut self.written);
        let Some(mut blocks) = self.blocks.take() else {
            return Event::Unverified(Error::internal("a handoff was verified twice"));
        };
        let verified = node::task::blocking("verify-handoff", move || {
            blocks.adopt(written, &checksums).map(|()| blocks)
        });
        match verified.await {
            Ok(Ok(blocks)) => {
                self.blocks = Some(blocks);
                Event::Verified
            }
            Ok(Err(corrupt)) => Event::Corrupt(at(self.node, corrupt.into())),
            Err(error) => Event::Unverified(error),
        }
    }

    fn send(&self, command: v1::prefill_command::Command) {
        // There is room for every command, and a closed stream is noticed where its events are read.
        let _ = self.commands.try_send(v1::PrefillCommand {
            command: Some(command),
        });
    }

    fn conclude(self, outcome: Outcome) -> Result<Received, Error> {
        match outcome {
            Outcome::Adopted => {
                let (Some(blocks), Some(report)) = (self.blocks, self.landed) else {
                    return Err(Error::internal("a handoff was adopted without having landed"));
                };
                Ok(Received::Landed(Box::new(Landed {
                    blocks,
                    requested_at: self.requested_at,
                    started_at: self.started_at,
                    landed_at: self.landed_at.unwrap_or(self.heard_at),
                    verified_at: Instant::now(),
                    report,
                })))
            }
            Outcome::Short => Ok(Received::Short),
            Outcome::Cancelled => Err(Error::unavailable("the request was cancelled")),
            Outcome::TimedOut => Err(Error::new(
                ErrorCode::Timeout,
                format!(
                    "the deadline passed before prefill node {} had delivered the KV",
                    self.node
                ),
            )),
            Outcome::Corrupt(error) | Outcome::Failed(error) => Err(error),
        }
    }
}

/// Waits until nothing was heard for as long as is allowed; for ever where that is not limited. Cancel safe.
async fn silence(heard_at: Instant, silence_max: Option<Duration>) -> Duration {
    match silence_max {
        Some(limit) => {
            sleep_until(heard_at + limit).await;
            limit
        }
        None => std::future::pending().await,
    }
}

fn poll_interval(period: Duration) -> Interval {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}
