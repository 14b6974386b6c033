//! The requests of this router: those that run, and the last ones that ended, each with its way.
//!
//! Invariants:
//! - a [`Track`] is a request that runs: it is listed for as long as the track lives, and ends as cancelled if nobody said how;
//! - of what ended, a bounded number is kept; what runs is bounded by admission.
//!
//! A request has a lock of its own, which its progress takes; the common one is taken when it comes and goes, and by whoever looks.
//! Elsewhere: what is kept of each (`timeline.rs`), the service over gRPC (`requests/service.rs`).

pub(crate) mod service;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use proto::v1;
use tokio_util::sync::CancellationToken;
use types::{Millis, NodeId, RequestId, TraceParent};

use crate::decisions::Ending;
use crate::request::Prepared;
use crate::timeline::{Arrival, PlacementTimes, Span, Timeline, Told, parts, server_timing};

/// Most requests that can be kept: some 48 MiB.
pub(crate) const REQUESTS_KEPT_MAX: usize = 16_384;

/// The requests. Clones are one and the same.
#[derive(Debug, Clone)]
pub(crate) struct Requests {
    shared: Arc<Shared>,
}

/// A request at one moment: its way, and how old it is.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) timeline: Arc<Timeline>,
    /// Since it arrived; where it has ended, that is no more than a time after its end.
    pub(crate) now: Millis,
}

/// A request that runs. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Track {
    requests: Requests,
    live: Arc<Live>,
    number: u64,
}

/// Nodes that were chosen for a request.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) number: u32,
    pub(crate) prefill: Option<NodeId>,
    pub(crate) decode: NodeId,
    /// When the search for them began.
    pub(crate) sought: Instant,
    pub(crate) ttft_predicted: Millis,
}

#[derive(Debug)]
struct Shared {
    kept_max: usize,
    watch: Box<dyn Watch>,
    /// Tokens that went out ever.
    tokens: AtomicU64,
    table: Mutex<Table>,
}

/// Who is told what becomes of requests. Called within the request's own task, so it must neither block nor wait.
pub(crate) trait Watch: Send + Sync + std::fmt::Debug {
    /// A request's first token came, so long after its arrival.
    fn first_token(&self, placement: &PlacementTimes, ttft: Millis);

    /// A request ended.
    fn ended(&self, timeline: &Arc<Timeline>);
}

#[derive(Debug, Default)]
struct Table {
    running: BTreeMap<u64, Arc<Live>>,
    /// Oldest first.
    ended: VecDeque<Arc<Timeline>>,
    /// Number of the next request.
    next: u64,
}

#[derive(Debug)]
struct Live {
    received: Instant,
    cancelled: CancellationToken,
    /// Copied only when it changes while somebody looks.
    timeline: Mutex<Arc<Timeline>>,
}

impl Requests {
    /// Keeps the last `kept_max` that ended.
    pub(crate) fn new(kept_max: usize, watch: Box<dyn Watch>) -> Self {
        Self {
            shared: Arc::new(Shared {
                kept_max,
                watch,
                tokens: AtomicU64::new(0),
                table: Mutex::default(),
            }),
        }
    }

    /// A request arrived.
    pub(crate) fn arrived(&self, arrival: Arrival, received: Instant) -> Track {
        let live = Arc::new(Live {
            received,
            cancelled: CancellationToken::new(),
            timeline: Mutex::new(Arc::new(Timeline::new(arrival))),
        });
        let mut table = self.lock();
        let number = table.next;
        table.next += 1;
        table.running.insert(number, Arc::clone(&live));
        drop(table);
        let requests = self.clone();
        Track {
            requests,
            live,
            number,
        }
    }

    /// How many of those that run came before `at`.
    pub(crate) fn running_from_before(&self, at: Instant) -> usize {
        let table = self.lock();
        table.running.values().filter(|live| live.received < at).count()
    }

    /// Up to `count` of those that run, and up to `ended` of the others; newest first.
    pub(crate) fn newest(&self, running: usize, ended: usize) -> (Vec<Snapshot>, Vec<Snapshot>) {
        let (live, done) = {
            let table = self.lock();
            let live: Vec<Arc<Live>> = table.running.values().rev().take(running).cloned().collect();
            let done: Vec<Arc<Timeline>> = table.ended.iter().rev().take(ended).cloned().collect();
            (live, done)
        };
        let live = live.iter().map(|live| live.snapshot());
        (live.collect(), done.into_iter().map(Snapshot::ended).collect())
    }

    /// The requests that `wanted` names, newest first.
    pub(crate) fn of_id(&self, wanted: RequestId) -> Vec<Snapshot> {
        let is_wanted = |snapshot: &Snapshot| snapshot.timeline.arrival.request == wanted;
        let (running, ended) = self.newest(usize::MAX, usize::MAX);
        running.into_iter().chain(ended).filter(is_wanted).collect()
    }

    /// Ends those that run under this name. How many these are.
    pub(crate) fn cancel(&self, wanted: RequestId) -> usize {
        let live: Vec<Arc<Live>> = self.lock().running.values().cloned().collect();
        let wanted = live.iter().filter(|live| live.lock().arrival.request == wanted);
        wanted.inspect(|live| live.cancelled.cancel()).count()
    }

    /// Tokens that went out ever.
    pub(crate) fn tokens(&self) -> u64 {
        self.shared.tokens.load(Ordering::Relaxed)
    }

    /// Most that are kept of those that ended.
    pub(crate) fn kept_max(&self) -> usize {
        self.shared.kept_max
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Every change of the table is complete before anything can panic.
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Snapshot {
    fn ended(timeline: Arc<Timeline>) -> Self {
        let now = timeline.age(Millis(0.0));
        Self { timeline, now }
    }
}

impl Live {
    fn lock(&self) -> MutexGuard<'_, Arc<Timeline>> {
        // As above.
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Timeline) -> T) -> T {
        change(Arc::make_mut(&mut self.lock()))
    }

    fn at(&self, moment: Instant) -> Millis {
        Millis(moment.saturating_duration_since(self.received).as_secs_f64() * 1e3)
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            timeline: Arc::clone(&self.lock()),
            now: self.at(Instant::now()),
        }
    }
}

impl Track {
    /// Returns once somebody wants the request to end. Cancel safe.
    pub(crate) fn cancelled(&self) -> CancellationToken {
        self.live.cancelled.clone()
    }

    /// It is one that can be placed.
    pub(crate) fn tokenised(&self, prepared: &Prepared) {
        let at = self.now();
        self.live.change(|timeline| {
            timeline.tokenised = Some(at);
            timeline.slo = prepared.terms.slo;
            timeline.arrival.priority = prepared.terms.priority;
            timeline.prompt_tokens = prepared.prompt.len() as u64;
            timeline.output_tokens_max = u64::from(prepared.sampling.max_tokens);
        });
    }

    /// It was let in.
    pub(crate) fn admitted(&self) {
        let at = self.now();
        self.live.change(|timeline| timeline.admitted = Some(at));
    }

    /// Nodes were chosen, and the decode node is called. What its part of the trace is to be below.
    pub(crate) fn placed(&self, chosen: Chosen) -> TraceParent {
        let Chosen {
            number,
            prefill,
            decode,
            sought,
            ttft_predicted,
        } = chosen;
        let (sought, called) = (self.live.at(sought), self.now());
        self.live.change(|timeline| {
            timeline.placed(PlacementTimes {
                number,
                prefill,
                decode,
                sought,
                called,
                accepted: None,
                first_token: None,
                ended: None,
                ttft_predicted,
                told: Told::default(),
            });
            timeline.arrival.placement(number)
        })
    }

    /// The decode node accepted.
    pub(crate) fn accepted(&self) {
        let at = self.now();
        self.live.change(|timeline| {
            if let Some(placement) = timeline.placement() {
                placement.accepted = Some(at);
            }
        });
    }

    /// `count` tokens came, perhaps with what the nodes tell so far.
    pub(crate) fn tokens(&self, count: u64, at: Instant, report: Option<v1::RequestReport>) {
        let at = self.live.at(at);
        let shared = &self.requests.shared;
        shared.tokens.fetch_add(count, Ordering::Relaxed);
        self.live.change(|timeline| {
            let is_first = timeline.first_token.is_none() && count > 0;
            timeline.tokens(count, at);
            let Some(placement) = timeline.placement() else {
                return;
            };
            if let Some(report) = report {
                placement.told = told(report);
            }
            if is_first {
                shared.watch.first_token(placement, at);
            }
        });
    }

    /// The nodes tell the rest.
    pub(crate) fn answered(&self, usage: &v1::Usage, report: &v1::RequestReport) {
        self.live.change(|timeline| {
            timeline.cached_tokens = usage.cached_tokens;
            if let Some(placement) = timeline.placement() {
                // A node that tells no parts at the end may have told some before.
                if placement.told.spans.is_empty() || !report.spans.is_empty() {
                    placement.told = told(report.clone());
                }
            }
        });
    }

    /// The last placement ended, and another one may follow.
    pub(crate) fn placement_ended(&self, ending: Ending) {
        let at = self.now();
        self.live.change(|timeline| timeline.placement_ended(at, ending));
    }

    /// It ended. What is said first holds.
    pub(crate) fn end(&self, ending: Ending, error: &str) {
        let timeline = {
            let mut timeline = self.live.lock();
            if timeline.ended.is_some() {
                return;
            }
            Arc::make_mut(&mut timeline).end(self.now(), ending, error);
            Arc::clone(&timeline)
        };
        let shared = &self.requests.shared;
        {
            let mut table = self.requests.lock();
            table.running.remove(&self.number);
            if table.ended.len() >= shared.kept_max {
                table.ended.pop_front();
            }
            if shared.kept_max > 0 {
                table.ended.push_back(Arc::clone(&timeline));
            }
        }
        shared.watch.ended(&timeline);
    }

    /// The header that tells a client where its time went so far.
    pub(crate) fn server_timing(&self) -> String {
        let now = self.now();
        server_timing(&parts(&self.live.lock(), now))
    }

    fn now(&self) -> Millis {
        self.live.at(Instant::now())
    }
}

impl Drop for Track {
    fn drop(&mut self) {
        self.end(Ending::Cancelled, "");
    }
}

fn told(report: v1::RequestReport) -> Told {
    let span = |span: v1::Span| Span {
        name: span.name,
        node: span.node,
        start: Millis(span.start_ms),
        duration: Millis(span.duration_ms),
        bytes: span.bytes,
        detail: span.detail,
    };
    let spans = report.spans.into_iter().take(proto::span::SPANS_MAX);
    Told {
        spans: spans.map(span).collect(),
        fetched_bytes: report.fetched_bytes,
        handoff_bytes: report.handoff_bytes,
        handoff_hidden: Millis(report.handoff_hidden_ms),
        handoff_exposed: Millis(report.handoff_exposed_ms),
        transport: report.transport,
    }
}

#[cfg(test)]
mod tests;
