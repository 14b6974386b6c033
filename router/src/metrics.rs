//! What a router measures. Every name begins with `perigee_router_`.

use std::sync::atomic::AtomicU64;

use node::metrics::{LATENCY_SECONDS, STEP_SECONDS};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use types::{Constraint, ErrorCode, Millis};

use crate::cost::Prediction;
use crate::cost::learning::Measured;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    /// `ok`, `cancelled`, or the error's code.
    code: &'static str,
}

/// What there was too little of for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Bound {
    /// `ttft`, `tbt` or `queue`.
    constraint: &'static str,
}

/// A term of a prediction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Term {
    /// `queue`, `compute` or `handoff`.
    term: &'static str,
}

/// Seconds by term.
type Terms = Family<Term, Counter<f64, AtomicU64>>;

/// The metrics of a router. Clones share them.
#[derive(Debug, Clone)]
pub struct Metrics {
    requests: Family<Outcome, Counter>,
    rejections: Family<Bound, Counter>,
    ttft: Histogram,
    inter_token: Histogram,
    prediction_error: Histogram,
    terms_predicted: Terms,
    terms_measured: Terms,
    terms_missed: Terms,
    replacements: Counter,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    completion_tokens: Counter,
    running: Gauge,
    waiting: Gauge,
    index_blocks: Gauge,
    index_refused: Gauge<f64, AtomicU64>,
    decode_nodes: Gauge,
    traces: Family<Fate, Counter>,
}

/// What became of a request's trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Fate {
    /// `exported` or `dropped`.
    fate: &'static str,
}

impl Metrics {
    /// Adds the metrics to the process's.
    ///
    /// # Panics
    ///
    /// If the process has a router already.
    pub fn register(metrics: &node::Metrics) -> Self {
        let name = |suffix: &str| format!("perigee_router_{suffix}");
        let counter = |suffix: &str, help: &str| metrics.register(&name(suffix), help, Counter::default());
        let gauge = |suffix: &str, help: &str| metrics.register(&name(suffix), help, Gauge::default());
        let histogram =
            |suffix: &str, help: &str, buckets: &[f64]| metrics.histogram(&name(suffix), help, buckets);
        let terms =
            |suffix: &str, help: &str| -> Terms { metrics.register(&name(suffix), help, Terms::default()) };
        let rejections: Family<Bound, Counter> = metrics.register(
            &name("rejections"),
            "Requests that were turned away, by what there was too little of",
            Family::default(),
        );
        // Shown from the start, so that the first rejection is an increase.
        for constraint in Constraint::ALL.map(Constraint::as_str) {
            drop(rejections.get_or_create(&Bound { constraint }));
        }
        let traces: Family<Fate, Counter> = metrics.register(
            &name("traces"),
            "Requests whose trace was exported, or dropped since the collector was too slow or gone",
            Family::default(),
        );
        for fate in ["exported", "dropped"] {
            drop(traces.get_or_create(&Fate { fate }));
        }
        Self {
            requests: metrics.register(
                &name("requests"),
                "Requests that ended, by code",
                Family::default(),
            ),
            rejections,
            ttft: histogram(
                "time_to_first_token_seconds",
                "Arrival to first token",
                LATENCY_SECONDS,
            ),
            inter_token: histogram("inter_token_latency_seconds", "Gap between tokens", STEP_SECONDS),
            prediction_error: histogram(
                "time_to_first_token_error_seconds",
                "Distance between predicted and measured time from placement to first token",
                LATENCY_SECONDS,
            ),
            terms_predicted: terms(
                "terms_predicted_seconds",
                "Predicted terms of the time to first token, summed up over complete requests",
            ),
            terms_measured: terms(
                "terms_measured_seconds",
                "What these terms took by the nodes' own clocks",
            ),
            terms_missed: terms(
                "terms_missed_seconds",
                "Distances between predicted and measured terms, summed up over complete requests",
            ),
            replacements: counter(
                "replacements",
                "Placements of requests that another node had failed",
            ),
            prompt_tokens: counter("prompt_tokens", "Prompt tokens of requests that ended well"),
            cached_tokens: counter("cached_tokens", "Those that came from a cache"),
            completion_tokens: counter("completion_tokens", "Tokens generated"),
            running: gauge("running_requests", "Requests on nodes"),
            waiting: gauge("waiting_requests", "Requests that wait for a place"),
            index_blocks: gauge("index_blocks", "Pairs of node and block in the prefix index"),
            index_refused: metrics.register(
                &name("index_refused_blocks"),
                "Blocks that the prefix index had no room for, or whose parent it did not know their node to hold",
                Gauge::default(),
            ),
            decode_nodes: gauge("decode_nodes", "Decode nodes that take requests"),
            traces,
        }
    }

    pub(crate) fn request_ended(&self, code: Option<ErrorCode>) {
        let code = code.map_or("ok", ErrorCode::as_str);
        self.requests.get_or_create(&Outcome { code }).inc();
    }

    pub(crate) fn rejected(&self, constraint: Constraint) {
        let constraint = constraint.as_str();
        self.rejections.get_or_create(&Bound { constraint }).inc();
    }

    pub(crate) fn request_cancelled(&self) {
        self.requests.get_or_create(&Outcome { code: "cancelled" }).inc();
    }

    pub(crate) fn first_token(&self, ttft: Millis) {
        self.ttft.observe(ttft.0 / 1e3);
    }

    /// `actual` and `predicted` both count from the placement.
    pub(crate) fn predicted(&self, predicted: Millis, actual: Millis) {
        self.prediction_error
            .observe((predicted.0 - actual.0).abs() / 1e3);
    }

    /// How far each term of a prediction was off.
    pub(crate) fn terms(&self, foretold: &Prediction, measured: &Measured) {
        // The wait for the engine and the one for the prefix are one: whatever is longer hides the other.
        let waited = (foretold.queue + foretold.promote + foretold.fetch, measured.queue);
        let rest = measured.ttft.0 - measured.queue.0 - measured.compute.0;
        let terms = [
            ("queue", waited),
            ("compute", (foretold.compute, measured.compute)),
            ("handoff", (foretold.handoff, Millis(rest))),
        ];
        for (term, (predicted, measured)) in terms {
            let add = |sums: &Terms, ms: f64| {
                // A counter that takes what is not a number, or is negative, is lost.
                let seconds = if ms.is_finite() { ms.max(0.0) / 1e3 } else { 0.0 };
                sums.get_or_create(&Term { term }).inc_by(seconds);
            };
            add(&self.terms_predicted, predicted.0);
            add(&self.terms_measured, measured.0);
            add(&self.terms_missed, (predicted.0 - measured.0).abs());
        }
    }

    pub(crate) fn traces_exported(&self, count: u64) {
        self.traces
            .get_or_create(&Fate { fate: "exported" })
            .inc_by(count);
    }

    pub(crate) fn traces_dropped(&self, count: u64) {
        self.traces.get_or_create(&Fate { fate: "dropped" }).inc_by(count);
    }

    pub(crate) fn gap(&self, gap: Millis) {
        self.inter_token.observe(gap.0 / 1e3);
    }

    pub(crate) fn replaced(&self) {
        self.replacements.inc();
    }

    pub(crate) fn used(&self, prompt_tokens: u64, cached_tokens: u64, completion_tokens: u64) {
        self.prompt_tokens.inc_by(prompt_tokens);
        self.cached_tokens.inc_by(cached_tokens);
        self.completion_tokens.inc_by(completion_tokens);
    }

    pub(crate) fn requests_now(&self, (running, waiting): (usize, usize)) {
        self.running.set(running as i64);
        self.waiting.set(waiting as i64);
    }

    pub(crate) fn cluster_now(&self, index_blocks: usize, index_refused: u64, decode_nodes: usize) {
        self.index_blocks.set(index_blocks as i64);
        self.index_refused.set(index_refused as f64);
        self.decode_nodes.set(decode_nodes as i64);
    }
}
