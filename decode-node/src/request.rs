//! The life of one accepted request: its KV, its place in the batch, its tokens on their way to the client.
//!
//! Invariant: a request ends in `finished` or in an error, told to the client by a message that has its place reserved
//! from the start. When its task ends, whatever it held (a handoff, blocks, a place) is given back or on its way
//! back through the engine's thread.
//!
//! Elsewhere: whether it is accepted (`service.rs`), the handoff (`receive.rs`), the batch (`engine_loop.rs`).

use std::sync::Arc;

use kv_store::{Fetch, SequenceBlocks, Source};
use proto::{convert, span, status, v1};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use types::{
    Error, ErrorCode, FinishReason, Millis, RequestId, SamplingParams, Token, TokenLogprob, TraceParent,
};

use crate::batch::SequenceId;
use crate::engine_loop::{EVENTS_BESIDE_TOKENS, Event, Generated, Job, Start};
use crate::output::Output;
use crate::receive::{Landed, Received, Wanted, receive};
use crate::shared::Shared;

/// Tokens in one message to a client that lags behind.
const TOKENS_PER_MESSAGE_MAX: usize = 64;

/// What goes to the client.
pub(crate) type Message = Result<v1::DecodeEvent, Status>;

/// A request that passed all checks.
pub(crate) struct Request {
    pub(crate) id: RequestId,
    pub(crate) sequence: SequenceId,
    /// The prompt, then what another node had generated.
    pub(crate) tokens: Vec<Token>,
    pub(crate) prompt_tokens: usize,
    pub(crate) params: Arc<SamplingParams>,
    pub(crate) tenant: String,
    /// Longest gap between its tokens.
    pub(crate) gap: Option<Millis>,
    pub(crate) prefill: Option<v1::PrefillPlacement>,
    pub(crate) sources: Vec<v1::PrefixSource>,
    /// The trace that it belongs to.
    pub(crate) trace: Option<TraceParent>,
    pub(crate) output: Output,
    pub(crate) accepted_at: Instant,
    pub(crate) permit: OwnedSemaphorePermit,
}

/// Why a request ends before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interruption {
    /// The client dropped the call.
    ClientGone,
    /// Its time is over.
    Deadline,
    /// The node ends.
    Stopping,
}

impl From<Interruption> for Error {
    fn from(why: Interruption) -> Self {
        match why {
            Interruption::ClientGone => Self::unavailable("the client ended the call"),
            Interruption::Deadline => Self::new(ErrorCode::Timeout, "the request's deadline passed"),
            Interruption::Stopping => {
                Self::unavailable("the node gives up its requests, which go on elsewhere")
            }
        }
    }
}

/// Says when a request is to end before its time.
pub(crate) struct Watch {
    pub(crate) client: mpsc::Sender<Message>,
    pub(crate) deadline: Instant,
    pub(crate) stopping: CancellationToken,
}

impl Watch {
    /// Waits for the first reason. Cancel safe; returns at once where it returned before.
    pub(crate) async fn interrupted(&self) -> Interruption {
        tokio::select! {
            // A client that is gone needs no other reason.
            biased;
            () = self.client.closed() => Interruption::ClientGone,
            () = self.stopping.cancelled() => Interruption::Stopping,
            () = tokio::time::sleep_until(self.deadline) => Interruption::Deadline,
        }
    }

    /// What is left of the request's time.
    pub(crate) fn remaining_ms(&self) -> u64 {
        let left = self.deadline.saturating_duration_since(Instant::now());
        u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1)
    }

    /// Gives up waiting for `future` when the request is to end.
    async fn guard<T>(&self, future: impl Future<Output = T>) -> Result<T, Error> {
        tokio::select! {
            // What is there already is not worth more than knowing that nobody wants it.
            biased;
            why = self.interrupted() => Err(why.into()),
            value = future => Ok(value),
        }
    }
}

/// Serves one request to its end.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    request: Request,
    watch: Watch,
    last: mpsc::OwnedPermit<Message>,
) {
    let accepted_at = request.accepted_at;
    let ended = run(&shared, request, &watch).await;
    let code = ended.as_ref().err().map(|error| error.code);
    shared
        .metrics
        .request_ended(code, code.is_some() && watch.client.is_closed());
    let message = match ended {
        Ok(finished) => {
            let ms = accepted_at.elapsed().as_secs_f64() * 1000.0;
            shared.progress().request_ms.observe(ms);
            tracing::debug!(ms, "request finished");
            Ok(event(v1::decode_event::Event::Finished(finished)))
        }
        Err(error) => {
            tracing::debug!(%error, code = %error.code, "request failed");
            Err(status::to_status(&error))
        }
    };
    // The watch holds a sender too, and the stream ends when all are gone.
    drop(watch);
    last.send(message);
}

async fn run(shared: &Shared, request: Request, watch: &Watch) -> Result<v1::DecodeFinished, Error> {
    let mut running = Running::new(shared, watch, &request);
    let Request {
        id,
        sequence,
        mut tokens,
        prompt_tokens,
        params,
        tenant,
        gap,
        prefill,
        sources,
        trace,
        mut output,
        ..
    } = request;
    let mut start = Start::Prefill;
    if let Some(placement) = &prefill {
        let blocks = SequenceBlocks::begin(&shared.store, &tenant, &tokens);
        let complete = blocks.shared_blocks() == shared.store.layout().blocks_for(tokens.len());
        if !complete {
            let wanted = Wanted {
                request_id: id,
                tokens: &tokens,
                prompt_tokens,
                params: &params,
                tenant: &tenant,
                placement,
                sources: &sources,
                trace,
            };
            match receive(shared, watch, wanted, blocks).await? {
                Received::Landed(landed) => {
                    running.landed(placement, &landed, params.logprobs.is_some())?;
                    let Landed { blocks, report, .. } = *landed;
                    tokens.push(report.first_token);
                    let text = output.push(report.first_token).text;
                    let logprob = report.logprob.as_ref().map(convert::logprob);
                    let first = Generated {
                        token: report.first_token,
                        text,
                        logprob,
                    };
                    running.send_tokens(vec![first]).await?;
                    start = Start::Received(blocks);
                }
                Received::Short => tracing::debug!("no blocks for a handoff in time, prefilling here"),
            }
        }
    }
    if let (Start::Received(_), Some(reason)) = (&start, output.finish())
        && !tokens.len().is_multiple_of(shared.store.layout().block_tokens)
    {
        return Ok(running.finished(reason, output.generated()));
    }
    if matches!(start, Start::Prefill) {
        running.fetch(&tenant, &tokens, &sources).await?;
    }
    let generated = output.generated();
    let room = output.remaining() + EVENTS_BESIDE_TOKENS;
    let (events_tx, events) = mpsc::channel(room);
    shared.submit(Job {
        sequence,
        tokens,
        prompt_tokens,
        params,
        tenant,
        gap,
        output,
        start,
        events: events_tx,
        permit: request.permit,
    })?;
    running.forward(events, generated).await
}

/// A request on its way, and what is to be reported of it.
struct Running<'a> {
    shared: &'a Shared,
    watch: &'a Watch,
    accepted_at: Instant,
    prompt_tokens: usize,
    cached_tokens: usize,
    report: v1::RequestReport,
    /// When the first token went out.
    first_at: Option<Instant>,
}

impl<'a> Running<'a> {
    fn new(shared: &'a Shared, watch: &'a Watch, request: &Request) -> Self {
        let node_id = shared.node_id.as_str().to_owned();
        Self {
            shared,
            watch,
            accepted_at: request.accepted_at,
            prompt_tokens: request.prompt_tokens,
            cached_tokens: 0,
            report: v1::RequestReport {
                prefill_node: node_id.clone(),
                decode_node: node_id,
                transport: "none".to_owned(),
                placements: 1,
                ..v1::RequestReport::default()
            },
            first_at: None,
        }
    }

    /// Notes a part of the way, from the request's acceptance on.
    fn span(&mut self, name: &str, from: Instant, to: Instant) -> &mut v1::Span {
        let node = &self.shared.node_id;
        let start = from.saturating_duration_since(self.accepted_at);
        let span = span::span(name, node.as_str(), start, to.saturating_duration_since(from));
        self.report.spans.push(span);
        self.report.spans.last_mut().expect("one was pushed")
    }

    /// Checks and notes what the prefill node says of the handoff.
    fn landed(
        &mut self,
        placement: &v1::PrefillPlacement,
        landed: &Landed,
        logprobs: bool,
    ) -> Result<(), Error> {
        let told = &landed.report;
        if logprobs && told.logprob.is_none() {
            let node = &placement.node_id;
            return Err(Error::internal(format!(
                "prefill node {node} gave no log-probability"
            )));
        }
        let vocabulary = self.shared.model.config().vocabulary;
        if told.first_token as usize >= vocabulary {
            return Err(Error::internal(format!(
                "prefill node {} drew token {}, but the model has {vocabulary}",
                placement.node_id, told.first_token
            )));
        }
        let cached = usize::try_from(told.cached_tokens).unwrap_or(usize::MAX);
        self.cached_tokens = cached.min(self.prompt_tokens);
        let report = &mut self.report;
        report.prefill_node = placement.node_id.clone();
        report.fetched_bytes = told.fetched_bytes;
        report.handoff_bytes = told.handoff_bytes;
        report.transport = if told.transport.is_empty() {
            "none".to_owned()
        } else {
            told.transport.clone()
        };
        report.fetch_ms = told.fetch_ms;
        report.queue_ms = ms(landed.started_at.duration_since(self.accepted_at));
        report.prefill_ms = told.prefill_ms;
        report.handoff_hidden_ms = told.handoff_hidden_ms;
        report.handoff_exposed_ms = told.handoff_exposed_ms;
        // The prefill node began when it was asked, but for the way of one message.
        let asked = landed.requested_at.saturating_duration_since(self.accepted_at);
        report.spans.extend(span::shifted(&told.spans, asked));
        self.span(span::VERIFY, landed.landed_at, landed.verified_at);
        self.shared.metrics.handoff_bytes.inc_by(told.handoff_bytes);
        let moving_ms = told.handoff_hidden_ms + told.handoff_exposed_ms;
        if moving_ms > 0.0 {
            let rate = told.handoff_bytes as f64 / moving_ms;
            self.shared.progress().transfer_bytes_per_ms.observe(rate);
        }
        Ok(())
    }

    /// Brings what this node's lower tiers and peers hold of the prefix into this node's store. Nothing stays pinned: the batch pins it again when
    /// there is room, so that nobody who waits holds memory.
    async fn fetch(
        &mut self,
        tenant: &str,
        tokens: &[Token],
        sources: &[v1::PrefixSource],
    ) -> Result<(), Error> {
        let store = &self.shared.store;
        let has_source = !sources.is_empty() || store.has_lower_tiers();
        if !has_source || self.shared.is_short_of_blocks() {
            return Ok(());
        }
        let sources: Vec<Source> = sources.iter().map(Source::from).collect();
        let (root, chain) = store.chain(tenant, tokens);
        let fetch = Fetch {
            purpose: kv_store::table::Purpose::Request,
            root,
            chain: &chain,
            from: 0,
            sources: &sources,
            deadline: self.watch.deadline,
        };
        let began = Instant::now();
        let fetched = self
            .watch
            .guard(kv_store::fetch_prefix(store, &self.shared.channels, fetch))
            .await?;
        self.report.fetched_bytes = fetched.bytes;
        self.report.fetch_ms = ms(began.elapsed());
        let span = self.span(span::FETCH, began, Instant::now());
        span.bytes = fetched.bytes;
        span.detail = fetched.origin();
        Ok(())
    }

    /// Passes the engine's events on until the last one.
    async fn forward(
        &mut self,
        mut events: mpsc::Receiver<Event>,
        mut generated: usize,
    ) -> Result<v1::DecodeFinished, Error> {
        let submitted_at = Instant::now();
        let mut started_at = None;
        let mut batch = Vec::new();
        loop {
            let count = self
                .watch
                .guard(events.recv_many(&mut batch, TOKENS_PER_MESSAGE_MAX))
                .await?;
            if count == 0 {
                return Err(Error::internal("the engine has ended"));
            }
            let mut tokens = Vec::new();
            let mut end = None;
            for event in batch.drain(..) {
                match event {
                    Event::Started { cached_tokens, at } => {
                        let at = Instant::from_std(at);
                        started_at = Some(at);
                        self.cached_tokens = cached_tokens.min(self.prompt_tokens);
                        self.report.queue_ms = ms(at.duration_since(self.accepted_at));
                        self.span(span::QUEUE, submitted_at, at);
                    }
                    Event::Token(token) => tokens.push(token),
                    Event::Finished(reason) => end = Some(Ok(reason)),
                    Event::Failed(error) => end = Some(Err(error)),
                }
            }
            generated += tokens.len();
            if !tokens.is_empty() {
                if let Some(at) = started_at.take() {
                    let now = Instant::now();
                    self.report.prefill_ms = ms(now.duration_since(at));
                    self.span(span::PREFILL, at, now);
                }
                self.send_tokens(tokens).await?;
            }
            if let Some(end) = end {
                return Ok(self.finished(end?, generated));
            }
        }
    }

    async fn send_tokens(&mut self, tokens: Vec<Generated>) -> Result<(), Error> {
        let mut message = v1::DecodeTokens::default();
        if self.first_at.is_none() {
            self.first_at = Some(Instant::now());
            message.report = Some(self.report.clone());
        }
        for Generated { token, text, logprob } in tokens {
            message.ids.push(token);
            message.text.push_str(&text);
            message
                .logprobs
                .extend(logprob.map(|logprob| self.wire(&logprob)));
        }
        let message = Ok(event(v1::decode_event::Event::Tokens(message)));
        match self.watch.guard(self.watch.client.send(message)).await? {
            Ok(()) => Ok(()),
            Err(_) => Err(Interruption::ClientGone.into()),
        }
    }

    fn wire(&self, logprob: &TokenLogprob) -> v1::TokenLogprob {
        let tokenizer = self.shared.model.tokenizer();
        convert::logprob_to_wire(logprob, |token| tokenizer.token_bytes(token).to_vec())
    }

    fn finished(&mut self, reason: FinishReason, generated: usize) -> v1::DecodeFinished {
        if let Some(first_at) = self.first_at {
            self.span(span::DECODE, first_at, Instant::now());
        }
        finished(
            reason,
            self.prompt_tokens,
            generated,
            self.cached_tokens,
            std::mem::take(&mut self.report),
        )
    }
}

/// The last message of a request that ended well.
pub(crate) fn finished(
    reason: FinishReason,
    prompt_tokens: usize,
    generated: usize,
    cached_tokens: usize,
    report: v1::RequestReport,
) -> v1::DecodeFinished {
    v1::DecodeFinished {
        reason: reason.as_str().to_owned(),
        usage: Some(v1::Usage {
            prompt_tokens: prompt_tokens as u64,
            completion_tokens: generated as u64,
            cached_tokens: cached_tokens as u64,
        }),
        report: Some(report),
    }
}

pub(crate) fn event(event: v1::decode_event::Event) -> v1::DecodeEvent {
    v1::DecodeEvent { event: Some(event) }
}

fn ms(duration: std::time::Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
