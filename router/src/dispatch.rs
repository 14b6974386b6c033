//! The way of a request through the router: check, tokenise, wait for a place, place, and pass on what the decode node
//! streams.
//!
//! Invariants:
//! - a request ends in [`Event::Finished`] or in one error, never in neither, and never later than its deadline;
//! - dropping a [`Running`] cancels everything below it and frees its place at once;
//! - a request that another node takes over continues with the tokens that the client has, and the client sees no seam.
//!
//! Elsewhere: hints while a request waits (`hint.rs`), one placement's stream (`attempt.rs`), what would be decided (`explain.rs`),
//!  going on after a failure (`running.rs`), times (`latency.rs`).

mod attempt;
mod explain;
mod hint;
mod latency;
mod running;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use node::{Channels, clock};
use proto::v1;
use tokio::sync::Semaphore;
use types::{Error, ErrorCode, Millis, RequestId, TraceParent};

use crate::admission::{Admission, Forecast, Rejection};
use crate::config::Config;
use crate::cost::learning::{Measured, Moved};
use crate::decisions::Ending;
use crate::entropy::Entropy;
use crate::error::RequestError;
use crate::gate::{Asks, Gate, Permit, Refused};
use crate::heat::Heat;
use crate::members::SharedCluster;
use crate::metrics::Metrics;
use crate::model::Model;
use crate::recorder::Recorder;
use crate::request::{self, Input, Prepared, Request};
use crate::requests::{Requests, Track};
use crate::timeline::Arrival;
use crate::watchers::Watchers;

pub use running::Running;

/// Text above this is tokenised on a thread of its own: it would hold up the runtime for more than half a millisecond.
const INLINE_TEXT_BYTES_MAX: usize = 1024;

/// Tokenising threads at a time. More would only take cores from each other.
const TOKENISING_MAX: usize = 4;

/// What a request's stream consists of.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Tokens, and the text that is complete with them.
    Tokens(v1::DecodeTokens),
    /// The end.
    Finished {
        /// `stop` or `length`.
        reason: String,
        /// Tokens of prompt and output.
        usage: v1::Usage,
        /// Where and how it was served.
        report: v1::RequestReport,
    },
}

/// Takes requests. Clones are one and the same.
#[derive(Debug, Clone)]
pub struct Dispatcher {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Config,
    model: Arc<Model>,
    cluster: SharedCluster,
    gate: Gate,
    channels: Channels,
    metrics: Metrics,
    recorder: Recorder,
    requests: Requests,
    watchers: Watchers,
    heat: Mutex<Heat>,
    entropy: Entropy,
    arriving: Semaphore,
    tokenising: Semaphore,
    hints: Arc<Semaphore>,
}

impl Shared {
    fn heat(&self) -> MutexGuard<'_, Heat> {
        // Every change of it is complete before anything can panic.
        self.heat.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dispatcher {
    /// A dispatcher that places requests in `cluster`.
    pub(crate) fn new(
        config: Config,
        model: Arc<Model>,
        cluster: SharedCluster,
        channels: Channels,
        metrics: Metrics,
        watchers: Watchers,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                gate: Gate::new(config.limits()),
                arriving: Semaphore::new(config.arriving_requests_max),
                tokenising: Semaphore::new(TOKENISING_MAX),
                hints: Arc::new(Semaphore::new(hint::HINTS_MAX)),
                entropy: Entropy::default(),
                recorder: Recorder::new(config.decisions_kept),
                requests: Requests::new(config.requests_kept, Box::new(watchers.clone())),
                watchers,
                heat: Mutex::default(),
                config,
                model,
                cluster,
                channels,
                metrics,
            }),
        }
    }

    /// The model that is served.
    pub fn model(&self) -> &Arc<Model> {
        &self.shared.model
    }

    /// What is known of the cluster.
    pub fn cluster(&self) -> &SharedCluster {
        &self.shared.cluster
    }

    /// What was decided.
    pub(crate) fn recorder(&self) -> &Recorder {
        &self.shared.recorder
    }

    /// The requests that run, and the last ones.
    pub(crate) fn requests(&self) -> &Requests {
        &self.shared.requests
    }

    /// What came of the last minutes' requests.
    pub(crate) fn watchers(&self) -> &Watchers {
        &self.shared.watchers
    }

    /// What prompts begin with.
    pub(crate) fn heat(&self) -> MutexGuard<'_, Heat> {
        self.shared.heat()
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// How many requests run and wait.
    pub fn counts(&self) -> (usize, usize) {
        self.shared.gate.counts()
    }

    /// How many requests run or wait that came before `at`.
    pub fn left_from_before(&self, at: Instant) -> usize {
        self.shared.requests.running_from_before(at)
    }

    /// Looks at how much room nodes have, and lets those run who have waited for it. To be called as often as nodes report.
    pub fn make_room(&self) {
        let room = self.shared.cluster.lock().room();
        self.shared.gate.make_room(room);
    }

    /// A fresh id for a request that brings none.
    pub fn request_id(&self) -> RequestId {
        self.shared.entropy.request_id()
    }

    /// A seed for a request that brings none.
    pub fn seed(&self) -> u64 {
        self.shared.entropy.draw()
    }

    /// Takes a request as far as a decode node's acceptance.
    ///
    /// # Errors
    ///
    /// See [`RequestError`]. Nothing runs anywhere then.
    pub async fn begin(&self, request: Request) -> Result<Running, RequestError> {
        let (id, received) = (request.id, request.received);
        let track = self.shared.requests.arrived(self.arrival(&request), received);
        let began = self.try_begin(request, track).await;
        let metrics = &self.shared.metrics;
        metrics.requests_now(self.shared.gate.counts());
        if let Err(error) = &began {
            metrics.request_ended(Some(error.code()));
            if let RequestError::Rejected(rejection) = error {
                metrics.rejected(rejection.overload().constraint);
            }
            let after = received.elapsed();
            tracing::debug!(request_id = %id, code = %error.code(), %error, ?after, "request not begun");
        }
        began
    }

    /// Counts a request that failed before it was one, such as by a body that is no JSON.
    pub fn refused(&self, code: ErrorCode) {
        self.shared.metrics.request_ended(Some(code));
    }

    async fn try_begin(&self, request: Request, track: Track) -> Result<Running, RequestError> {
        let (prepared, permit) = match self.admit(request, &track).await {
            Ok(admitted) => admitted,
            Err(error) => {
                track.end(Ending::Failed(error.code()), &error.to_string());
                return Err(error);
            }
        };
        let mut running = Running::new(Arc::clone(&self.shared), prepared, permit, track);
        running.start().await?;
        Ok(running)
    }

    /// Waits for the request's place.
    async fn admit(&self, request: Request, track: &Track) -> Result<(Prepared, Permit), RequestError> {
        let prepared = self.prepare(request).await?;
        track.tokenised(&prepared);
        let deadline = prepared.received + prepared.time_limit;
        let gate = &self.shared.gate;
        let asks = asks(&prepared);
        if gate.lacks_room() {
            self.make_room();
        }
        let wait = gate.foresee(&asks)?;
        let forecast = Forecast {
            ttft: wait,
            tbt: None,
        };
        Admission::judge(forecast, prepared.received.elapsed(), prepared.terms.slo)?;
        if wait > Millis(0.0) {
            hint::hint(&self.shared, &prepared);
        }
        let cancelled = track.cancelled();
        let permit = tokio::select! {
            // A place that nobody wants any more goes to the next one.
            biased;
            () = cancelled.cancelled() => return Err(RequestError::Cancelled),
            permit = gate.enter(&asks, deadline) => permit,
        };
        let permit = permit.map_err(|refused| match refused {
            Refused::Rejected(rejection) => RequestError::Rejected(rejection),
            Refused::Deadline => RequestError::Deadline {
                limit_ms: prepared.time_limit.as_millis() as u64,
            },
        })?;
        track.admitted();
        Ok((prepared, permit))
    }

    fn arrival(&self, request: &Request) -> Arrival {
        let own = TraceParent {
            // A request that is in no trace is one by itself; 0 is none.
            trace: request.id.0.max(1),
            span: 0,
            sampled: self.shared.watchers.samples(self.shared.entropy.draw()),
        };
        Arrival {
            request: request.id,
            arrived_unix_ms: unix_ms(),
            tenant: request.tenant.clone(),
            priority: request.priority,
            parent: request.trace,
            root: TraceParent {
                span: self.shared.entropy.draw().max(1),
                ..request.trace.unwrap_or(own)
            },
        }
    }

    async fn prepare(&self, request: Request) -> Result<Prepared, RequestError> {
        let _arriving = self.shared.arriving.try_acquire().map_err(|_| {
            RequestError::Rejected(Rejection::Arriving {
                arriving: self.shared.config.arriving_requests_max,
            })
        })?;
        let shared = Arc::clone(&self.shared);
        let context_tokens_max = shared.cluster.lock().context_tokens_max();
        let long = text_bytes(&request.input) > INLINE_TEXT_BYTES_MAX;
        let prepare = move || {
            request::prepare(
                request,
                &shared.model,
                &shared.config,
                context_tokens_max,
                clock::unix_s(SystemTime::now()),
            )
        };
        if !long {
            return prepare();
        }
        let _tokenising = self.shared.tokenising.acquire().await;
        let prepared = node::task::blocking("perigee-tokenise", prepare).await;
        prepared.map_err(RequestError::Internal)?
    }
}

/// What a complete request's nodes say of it, and `ttft` from its placement, as the cost model learns from it.
pub fn measured(report: &v1::RequestReport, cached_tokens: u64, ttft: Millis) -> Measured {
    Measured {
        cached_tokens,
        queue: Millis(report.queue_ms),
        fetch: Moved {
            bytes: report.fetched_bytes,
            took: Millis(report.fetch_ms),
        },
        compute: Millis(report.prefill_ms),
        handoff: Moved {
            bytes: report.handoff_bytes,
            took: Millis(report.handoff_hidden_ms + report.handoff_exposed_ms),
        },
        exposed: Millis(report.handoff_exposed_ms),
        ttft,
    }
}

/// The place that a request needs.
fn asks(request: &Prepared) -> Asks<'_> {
    Asks {
        tenant: &request.tenant,
        terms: request.terms,
        prompt_tokens: request.prompt.len() as u64,
    }
}

fn text_bytes(input: &Input) -> usize {
    match input {
        Input::Text(text) => text.len(),
        Input::Tokens(_) => 0,
        Input::Chat(messages) => {
            let content = messages.iter().filter_map(|message| message["content"].as_str());
            content.map(str::len).sum()
        }
    }
}

pub(crate) fn unix_ms() -> u64 {
    // A clock before 1970 is a date in a template or a list at worst.
    clock::unix_ms(SystemTime::now())
}

/// What is left until `deadline`, at least a millisecond.
fn left(deadline: Instant) -> Duration {
    let left = deadline.saturating_duration_since(Instant::now());
    left.max(Duration::from_millis(1))
}

fn silent(node: &types::NodeId, silence: Duration) -> Error {
    Error::unavailable(format!("{node} sent nothing for {} ms", silence.as_millis()))
}
