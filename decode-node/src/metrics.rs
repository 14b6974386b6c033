//! What a decode node counts: `perigee_decode_…`.

use node::metrics::STEP_SECONDS;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use types::ErrorCode;

use crate::handoff::Outcome;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

/// The metrics of one node. Clones count into the same numbers.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) running: Gauge,
    pub(crate) waiting: Gauge,
    pub(crate) step_seconds: Histogram,
    pub(crate) tokens: Counter,
    pub(crate) prefill_tokens: Counter,
    pub(crate) inter_token_latency_seconds: Histogram,
    pub(crate) preemptions: Counter,
    pub(crate) handoff_bytes: Counter,
    handoffs: Family<OutcomeLabel, Counter>,
    requests: Family<CodeLabel, Counter>,
}

impl Metrics {
    pub(crate) fn register(metrics: &node::Metrics) -> Self {
        let count = |name, help| metrics.register(name, help, Counter::<u64>::default());
        Self {
            running: metrics.register(
                "perigee_decode_running",
                "Sequences in the batch",
                Gauge::default(),
            ),
            waiting: metrics.register(
                "perigee_decode_waiting",
                "Accepted requests that are not in the batch",
                Gauge::default(),
            ),
            step_seconds: metrics.histogram(
                "perigee_decode_step_seconds",
                "One step of the engine",
                STEP_SECONDS,
            ),
            tokens: count("perigee_decode_tokens", "Tokens generated"),
            prefill_tokens: count(
                "perigee_decode_prefill_tokens",
                "Prompt tokens computed on this node",
            ),
            inter_token_latency_seconds: metrics.histogram(
                "perigee_decode_inter_token_latency_seconds",
                "Between two tokens of a sequence, as the engine made them",
                STEP_SECONDS,
            ),
            preemptions: count(
                "perigee_decode_preemptions",
                "Sequences that lost their blocks to an older one",
            ),
            handoff_bytes: count(
                "perigee_decode_handoff_bytes",
                "Bytes of KV received from prefill nodes",
            ),
            handoffs: metrics.register(
                "perigee_decode_handoffs",
                "Handoffs from prefill nodes by how they ended",
                Family::default(),
            ),
            requests: metrics.register(
                "perigee_decode_requests",
                "Requests by error code, ok or cancelled",
                Family::default(),
            ),
        }
    }

    pub(crate) fn handoff_ended(&self, outcome: &Outcome) {
        let label = OutcomeLabel {
            outcome: outcome.as_str(),
        };
        self.handoffs.get_or_create(&label).inc();
    }

    /// `cancelled` is no failure of anybody's, whatever it was answered with.
    pub(crate) fn request_ended(&self, error: Option<ErrorCode>, cancelled: bool) {
        let code = if cancelled {
            "cancelled"
        } else {
            error.map_or("ok", ErrorCode::as_str)
        };
        let label = CodeLabel { code };
        self.requests.get_or_create(&label).inc();
    }
}
