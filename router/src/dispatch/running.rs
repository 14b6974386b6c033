//! A request that runs, on whichever node.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1;
use proto::v1::decode_event::Event as WireEvent;
use tokio_util::sync::CancellationToken;
use types::{Epoch, Error, ErrorCode, KvSpace, Millis, NodeId, Slo, Token};

use super::attempt::{Attempt, Failure, Nodes, Placed, decode_request};
use super::latency::{Arrival, Latency, millis};
use super::{Event, Shared, measured, unix_ms};
use crate::admission::{Admission, Forecast};
use crate::cluster::{Assignment, Query};
use crate::decisions::{Ending, Subject};
use crate::error::RequestError;
use crate::gate::Permit;
use crate::placement::{Candidate, NoPlacement};
use crate::request::{self, Prepared};
use crate::requests::{Chosen, Track};
use crate::residents::Answer;

/// A request that a decode node has accepted. Ask it for events until it has none.
#[derive(Debug)]
pub struct Running {
    shared: Arc<Shared>,
    request: Prepared,
    deadline: Instant,
    /// What the client was given.
    generated: Vec<Token>,
    attempt: Option<Attempt>,
    failed: BTreeMap<NodeId, Epoch>,
    last_error: Option<Error>,
    placements: u32,
    /// What the first placement was predicted to take, and when it was made.
    predicted: Option<(Millis, Instant)>,
    /// Number of the decision behind the last placement.
    decision: Option<u64>,
    latency: Latency,
    track: Track,
    ended: bool,
    /// Last, so that the place is free only after the node was told.
    _permit: Permit,
}

impl Running {
    pub(super) fn new(shared: Arc<Shared>, request: Prepared, permit: Permit, track: Track) -> Self {
        Self {
            deadline: request.received + request.time_limit,
            latency: Latency::new(request.received),
            shared,
            request,
            generated: Vec::new(),
            attempt: None,
            failed: BTreeMap::new(),
            last_error: None,
            placements: 0,
            predicted: None,
            decision: None,
            track,
            ended: false,
            _permit: permit,
        }
    }

    /// The request.
    pub fn request(&self) -> &Prepared {
        &self.request
    }

    /// Where its time went so far: the value of `Server-Timing`.
    pub(crate) fn server_timing(&self) -> String {
        self.track.server_timing()
    }

    /// Finds the first decode node that accepts the request.
    pub(super) async fn start(&mut self) -> Result<(), RequestError> {
        let bound = self.bound();
        let result = bound.hold(self.place()).await;
        if let Err(error) = &result {
            self.settle(Ending::Failed(error.code()));
            self.track.end(Ending::Failed(error.code()), &error.to_string());
        }
        // An error here is the caller's to count.
        self.ended = result.is_err();
        self.attempt = Some(result?);
        Ok(())
    }

    /// The next event: `None` after the last one, which is `Finished` or an error.
    pub async fn next(&mut self) -> Option<Result<Event, RequestError>> {
        if self.ended {
            return None;
        }
        let bound = self.bound();
        let result = bound.hold(self.advance()).await;
        match &result {
            Ok(Event::Tokens(_)) => {}
            Ok(Event::Finished { .. }) => self.end(None),
            Err(error) => {
                tracing::debug!(request_id = %self.request.id, code = %error.code(), %error, "request failed");
                self.end(Some(error));
            }
        }
        Some(result)
    }

    async fn advance(&mut self) -> Result<Event, RequestError> {
        loop {
            let attempt = match &mut self.attempt {
                Some(attempt) => attempt,
                None => {
                    let attempt = self.place().await?;
                    self.attempt.insert(attempt)
                }
            };
            let config = &self.shared.config;
            let silence_max = match attempt.tokens {
                0 => config.first_token_silence_max,
                _ => config.token_silence_max,
            };
            match attempt.receive(silence_max.into()).await {
                Ok(WireEvent::Tokens(tokens)) => return Ok(self.tokens(tokens)),
                Ok(WireEvent::Finished(finished)) => return Ok(self.finished(finished)),
                Err(failure) => {
                    let (nodes, tokens) = (attempt.nodes.clone(), attempt.tokens);
                    // Cancels what may still run there, before anybody else continues.
                    self.attempt = None;
                    self.give_up(&nodes, tokens, failure)?;
                }
            }
        }
    }

    /// Places the request until a node accepts it.
    async fn place(&mut self) -> Result<Attempt, RequestError> {
        let mut changes = self.shared.cluster.changes();
        let wait_until = Instant::now() + self.shared.config.placement_wait.get();
        let mut sought = Instant::now();
        loop {
            changes.mark_unchanged();
            let (space, assignment, subject) = match self.assign() {
                Ok(assigned) => assigned,
                Err(nobody) => {
                    let full = self
                        .last_error
                        .as_ref()
                        .is_some_and(|error| error.code == ErrorCode::Overloaded);
                    let changed = tokio::time::timeout_at(wait_until.into(), changes.changed());
                    if full || changed.await.is_err() {
                        return Err(self.last_error.take().map_or(nobody.into(), RequestError::Node));
                    }
                    continue;
                }
            };
            let placed = Placed::new(
                assignment.id,
                assignment.foretold.clone(),
                self.shared.cluster.clone(),
            );
            let choice = assignment.explanation.choice();
            self.log(choice);
            let forecast = Forecast::of(choice, self.shared.config.decode_load);
            let request = decode_request(&assignment, space.root(), &self.request, &self.generated);
            let recorder = &self.shared.recorder;
            self.decision = Some(recorder.record(subject, assignment.explanation));
            self.judge(forecast)?;
            self.placements += 1;
            let trace = self.track.placed(Chosen {
                number: self.placements,
                prefill: assignment.prefill.as_ref().map(|node| node.id.clone()),
                decode: assignment.decode.id.clone(),
                sought,
                ttft_predicted: forecast.ttft,
            });
            let nodes = Nodes {
                decode: assignment.decode,
                prefill: assignment.prefill,
            };
            let (channels, deadline) = (&self.shared.channels, self.deadline);
            let silence_max = self.shared.config.dispatch_deadline.get();
            match Attempt::open(channels, nodes, placed, request, trace, silence_max, deadline).await {
                Ok(attempt) => {
                    self.track.accepted();
                    return Ok(attempt);
                }
                Err((nodes, failure)) => self.give_up(&nodes, 0, failure)?,
            }
            sought = Instant::now();
        }
    }

    fn assign(&self) -> Result<(KvSpace, Assignment, Subject), NoPlacement> {
        let space = self.shared.cluster.lock().kv_space();
        let space = space.ok_or_else(|| NoPlacement { excluded: Vec::new() })?;
        let sequence: Vec<Token> = self
            .request
            .prompt
            .iter()
            .chain(&self.generated)
            .copied()
            .collect();
        let began = Instant::now();
        // Hashed before the lock is taken: a long prompt takes a millisecond.
        let (hashes, key) = request::hashes(&space, &self.request.tenant, &sequence);
        let answer = Answer {
            tenant: self.request.tenant.clone(),
            tokens: self.generated.len() as u64,
            tokens_max: u64::from(self.request.sampling.max_tokens),
        };
        let query = Query {
            key,
            hashes: &hashes,
            prompt_tokens: sequence.len() as u64,
            failed: &self.failed,
            slo: self.slo_left(),
            answer: &answer,
            draw: self.shared.entropy.draw(),
        };
        let (assignment, tie) = {
            let mut cluster = self.shared.cluster.lock();
            (cluster.place(&space, &query, Instant::now())?, cluster.tie())
        };
        if self.placements == 0 {
            self.shared.heat().asked(&self.request.tenant, &hashes, began);
        }
        let subject = Subject {
            request: Some(self.request.id),
            made_unix_ms: unix_ms(),
            tenant: self.request.tenant.clone(),
            prompt_tokens: query.prompt_tokens,
            tie,
            took: millis(began, Instant::now()),
        };
        Ok((space, assignment, subject))
    }

    /// Holds the first placement's prediction against what the request allows. A request that runs is not judged again: it
    /// was promised an answer.
    fn judge(&mut self, forecast: Forecast) -> Result<(), RequestError> {
        if self.predicted.is_none() {
            let waited = self.request.received.elapsed();
            Admission::judge(forecast, waited, self.request.terms.slo)?;
            self.predicted = Some((forecast.ttft, Instant::now()));
        }
        Ok(())
    }

    /// Puts the choice into the request's trace, with the terms that `perigee route explain` shows.
    fn log(&self, choice: &Candidate) {
        let prediction = &choice.prediction;
        tracing::debug!(
            request_id = %self.request.id,
            placement = self.placements + 1,
            prefill = choice.prefill.as_ref().map_or("local", NodeId::as_str),
            decode = %choice.decode,
            source = choice.sources.first().map_or("", |source| source.node.as_str()),
            new_tokens = choice.new_tokens,
            queue_ms = prediction.queue.0,
            promote_ms = prediction.promote.0,
            fetch_ms = prediction.fetch.0,
            compute_ms = prediction.compute.0,
            handoff_ms = prediction.handoff.0,
            ttft_ms = prediction.total.0,
            tbt_ms = choice.tbt.0,
            interference_charge_ms = choice.interference_charge.0,
            gap_charge_ms = choice.gap_charge.0,
            score_ms = choice.score.0,
            "placed"
        );
    }

    /// Says how the last placement ended, if there was one.
    fn settle(&self, ending: Ending) {
        if let Some(number) = self.decision {
            self.shared.recorder.ended(number, ending);
        }
    }

    /// Decides whether another placement follows a failure, and keeps whoever is at fault out of it.
    fn give_up(&mut self, nodes: &Nodes, tokens: u64, failure: Failure) -> Result<(), RequestError> {
        let again = failure.retryable(!self.generated.is_empty());
        let blamed = failure.blamed(nodes, tokens);
        tracing::info!(
            request_id = %self.request.id,
            node_id = %blamed.id,
            error = %failure.error,
            tokens = self.generated.len(),
            again = again && self.placements < self.shared.config.placements_max,
            "placement failed"
        );
        self.settle(Ending::Failed(failure.error.code));
        self.track.placement_ended(Ending::Failed(failure.error.code));
        if !again || self.placements >= self.shared.config.placements_max {
            return Err(RequestError::Node(failure.error));
        }
        self.failed.insert(blamed.id.clone(), blamed.epoch);
        self.last_error = Some(failure.error);
        self.shared.metrics.replaced();
        Ok(())
    }

    fn tokens(&mut self, mut tokens: v1::DecodeTokens) -> Event {
        let report = tokens.report.take();
        self.generated.extend(&tokens.ids);
        if let Some(attempt) = &mut self.attempt
            && !tokens.ids.is_empty()
        {
            let now = Instant::now();
            if attempt.tokens == 0 {
                attempt.placed.prefilled(now);
                if let Some(number) = self.decision {
                    let ttft = millis(attempt.placed_at, now);
                    self.shared.recorder.first_token(number, ttft);
                }
            }
            attempt.tokens += tokens.ids.len() as u64;
            self.track.tokens(tokens.ids.len() as u64, now, report);
            match self.latency.tokens(tokens.ids.len() as u64, now) {
                Arrival::First(ttft) => {
                    self.shared.metrics.first_token(ttft);
                    if let Some((predicted, _)) = self.predicted.filter(|_| self.placements == 1) {
                        self.shared
                            .metrics
                            .predicted(predicted, millis(attempt.placed_at, now));
                    }
                }
                Arrival::Later(gap) => self.shared.metrics.gap(gap),
            }
        }
        Event::Tokens(tokens)
    }

    fn finished(&mut self, finished: v1::DecodeFinished) -> Event {
        let v1::DecodeFinished {
            reason,
            usage,
            report,
        } = finished;
        let usage = usage.unwrap_or(v1::Usage {
            prompt_tokens: self.request.prompt.len() as u64,
            completion_tokens: self.generated.len() as u64,
            cached_tokens: 0,
        });
        let report = report.unwrap_or_default();
        if let Some(attempt) = &mut self.attempt {
            attempt.placed.answered(usage.completion_tokens);
            // What was placed before has left blocks, and tokens, that nobody foretold.
            if let (Some(at), 1) = (self.latency.first(), self.placements) {
                let measured = measured(&report, usage.cached_tokens, millis(attempt.placed_at, at));
                attempt.placed.completed(&measured);
                self.shared.metrics.terms(attempt.placed.prediction(), &measured);
            }
        }
        let predicted = self.predicted.map_or(0.0, |(predicted, at)| {
            // From arrival, as `ttft_ms` is.
            millis(self.request.received, at).0 + predicted.0
        });
        let report = v1::RequestReport {
            ttft_ms: self.latency.ttft().0,
            tbt_mean_ms: self.latency.tbt_mean().0,
            tbt_max_ms: self.latency.tbt_max().0,
            placements: self.placements,
            ttft_predicted_ms: predicted,
            ..report
        };
        self.track.answered(&usage, &report);
        self.shared
            .metrics
            .used(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens);
        Event::Finished {
            reason,
            usage,
            report,
        }
    }

    /// What the request still asks of latency: its first token is due in less time than at first, or is out.
    fn slo_left(&self) -> Slo {
        let ttft = self.request.terms.slo.ttft.filter(|_| self.generated.is_empty());
        let passed = millis(self.request.received, Instant::now()).0;
        Slo {
            ttft: ttft.map(|limit| Millis((limit.0 - passed).max(0.0))),
            tbt: self.request.terms.slo.tbt,
        }
    }

    fn bound(&self) -> Bound {
        Bound {
            deadline: self.deadline,
            limit: self.request.time_limit,
            cancelled: self.track.cancelled(),
        }
    }

    fn end(&mut self, error: Option<&RequestError>) {
        self.ended = true;
        self.attempt = None;
        let code = error.map(RequestError::code);
        let ending = code.map_or(Ending::Finished, Ending::Failed);
        self.settle(ending);
        self.track
            .end(ending, &error.map(ToString::to_string).unwrap_or_default());
        self.shared.metrics.request_ended(code);
    }
}

/// What ends a request before it ends by itself.
struct Bound {
    deadline: Instant,
    limit: Duration,
    cancelled: CancellationToken,
}

impl Bound {
    /// What `work` gives, unless the request ends before.
    async fn hold<T>(self, work: impl Future<Output = Result<T, RequestError>>) -> Result<T, RequestError> {
        let limit_ms = self.limit.as_millis() as u64;
        let in_time = tokio::time::timeout_at(self.deadline.into(), work);
        tokio::select! {
            // Who is told to end gives nothing more.
            biased;
            () = self.cancelled.cancelled() => Err(RequestError::Cancelled),
            result = in_time => result.unwrap_or(Err(RequestError::Deadline { limit_ms })),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            tracing::debug!(request_id = %self.request.id, "request cancelled");
            self.settle(Ending::Cancelled);
            self.track.end(Ending::Cancelled, "");
            self.shared.metrics.request_cancelled();
        }
    }
}
