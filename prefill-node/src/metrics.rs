//! What a prefill node counts, as `perigee_prefill_…`.

use node::metrics::{LATENCY_SECONDS, STEP_SECONDS};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::schedule::Schedule;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    /// `landed`, `aborted`, `gone`, or the name of an error code.
    outcome: &'static str,
}

/// Handles of the node's metrics. Clones count into the same numbers.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    requests: Family<OutcomeLabel, Counter>,
    queued_requests: Gauge,
    queued_tokens: Gauge,
    pub(crate) computed_tokens: Counter,
    pub(crate) cached_tokens: Counter,
    pub(crate) step_seconds: Histogram,
    pub(crate) queue_seconds: Histogram,
    pub(crate) handoff_hidden_seconds: Histogram,
    pub(crate) handoff_exposed_seconds: Histogram,
    pub(crate) handoff_bytes: Counter,
}

impl Metrics {
    pub(crate) fn register(metrics: &node::Metrics) -> Self {
        let name = |name: &str| format!("perigee_prefill_{name}");
        let counter = |short: &str, help: &str| metrics.register(&name(short), help, Counter::default());
        let gauge = |short: &str, help: &str| metrics.register(&name(short), help, Gauge::default());
        let seconds =
            |short: &str, help: &str, buckets: &[f64]| metrics.histogram(&name(short), help, buckets);
        Self {
            requests: metrics.register(
                &name("requests"),
                "Requests by how they ended: landed, aborted or gone by the decode node, or an error code",
                Family::default(),
            ),
            queued_requests: gauge("queued_requests", "Prompts that wait or are being computed"),
            queued_tokens: gauge(
                "queued_tokens",
                "Tokens of those prompts that are still to be computed",
            ),
            computed_tokens: counter("computed_tokens", "Prompt tokens computed"),
            cached_tokens: counter("cached_tokens", "Prompt tokens whose KV came from a cache"),
            step_seconds: seconds("step_seconds", "Time of an engine step", STEP_SECONDS),
            queue_seconds: seconds(
                "queue_seconds",
                "From a request's arrival to its first step",
                LATENCY_SECONDS,
            ),
            handoff_hidden_seconds: seconds(
                "handoff_hidden_seconds",
                "Time per request in which KV was on its way while the engine computed",
                LATENCY_SECONDS,
            ),
            handoff_exposed_seconds: seconds(
                "handoff_exposed_seconds",
                "Time per request from the end of the computation to the last acknowledged write",
                STEP_SECONDS,
            ),
            handoff_bytes: counter("handoff_bytes", "Bytes of KV written to decode nodes"),
        }
    }

    pub(crate) fn set_queue(&self, schedule: &Schedule) {
        let gauge = |gauge: &Gauge, value: usize| {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        gauge(&self.queued_requests, schedule.queued_requests());
        gauge(&self.queued_tokens, schedule.queued_tokens());
    }

    pub(crate) fn ended(&self, outcome: &'static str) {
        self.requests.get_or_create(&OutcomeLabel { outcome }).inc();
    }
}
