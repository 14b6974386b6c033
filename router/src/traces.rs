//! Traces of requests for a collector that takes OTLP over gRPC.
//!
//! A router exports the whole tree of a request, with the parts that its nodes told of: so nodes need no collector, and all times are
//! on one clock.
//!
//! Invariant: no request waits for its trace. What a full queue has no room for, and what the collector does not take in time, is
//! dropped and counted.
//!
//! Elsewhere: what a request's spans are (`traces/spans.rs`).

mod spans;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use node::Channel;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use types::{Error, NodeId};

use crate::metrics::Metrics;
use crate::timeline::Timeline;

/// Requests whose traces wait to be sent: seconds of a busy router, in some 12 MiB.
const QUEUE_MAX: usize = 4_096;
/// Requests in one message: some 300 KiB.
const BATCH_MAX: usize = 256;
/// How long a batch is waited for: a person who looks at a trace has sent the request seconds ago.
const LINGER: Duration = Duration::from_millis(500);
/// How long the collector may take for a batch.
const EXPORT_DEADLINE: Duration = Duration::from_secs(5);

/// Where traces go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// `host:port` of a collector's OTLP over gRPC; empty exports nothing.
    pub otlp_endpoint: String,
    /// Part of the requests that bring no trace of their own which is recorded, from 0 to 1.
    pub sample_ratio: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            // Whom to tell, only a deployment knows.
            otlp_endpoint: String::new(),
            // A span costs microseconds; a collector of a large cluster samples by itself or asks for less.
            sample_ratio: 1.0,
        }
    }
}

impl Config {
    /// Checks every setting.
    ///
    /// # Errors
    ///
    /// The endpoint is no address, or the ratio none.
    pub fn validate(&self) -> Result<(), Error> {
        if !(0.0..=1.0).contains(&self.sample_ratio) {
            let message = format!(
                "telemetry.sample_ratio is {}, but must be from 0 to 1",
                self.sample_ratio
            );
            return Err(Error::invalid("telemetry.sample_ratio", message));
        }
        if self.otlp_endpoint.starts_with("https://") {
            let message = "telemetry.otlp_endpoint is reached over TLS, which is not supported: name a collector beside the router";
            return Err(Error::invalid("telemetry.otlp_endpoint", message));
        }
        Ok(())
    }
}

/// Takes requests that ended. Clones are one and the same.
#[derive(Debug, Clone)]
pub(crate) struct Exporter {
    queue: mpsc::Sender<Arc<Timeline>>,
    metrics: Metrics,
}

/// Sends what the exporter took.
#[derive(Debug)]
pub(crate) struct Service {
    queue: mpsc::Receiver<Arc<Timeline>>,
    channel: Channel,
    router: NodeId,
    metrics: Metrics,
}

/// An exporter and its service, if there is somebody to tell. Must be called within a tokio runtime.
pub(crate) fn start(
    config: &Config,
    router: NodeId,
    metrics: Metrics,
) -> Result<Option<(Exporter, Service)>, Error> {
    if config.otlp_endpoint.is_empty() {
        return Ok(None);
    }
    let channel = node::channel(&config.otlp_endpoint)
        .map_err(|error| Error::invalid("telemetry.otlp_endpoint", error.message))?;
    let (queue_tx, queue) = mpsc::channel(QUEUE_MAX);
    let exporter = Exporter {
        queue: queue_tx,
        metrics: metrics.clone(),
    };
    let service = Service {
        queue,
        channel,
        router,
        metrics,
    };
    Ok(Some((exporter, service)))
}

impl Exporter {
    /// Takes a request that ended, if its trace is recorded.
    pub(crate) fn export(&self, timeline: &Arc<Timeline>) {
        if timeline.arrival.root.sampled && self.queue.try_send(Arc::clone(timeline)).is_err() {
            self.metrics.traces_dropped(1);
        }
    }
}

impl Service {
    /// Sends until `shutdown`, and then what is left.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut client = TraceServiceClient::new(self.channel.clone());
        let mut batch = Vec::new();
        let mut failing = false;
        loop {
            tokio::select! {
                biased;
                received = self.queue.recv_many(&mut batch, BATCH_MAX) => if received == 0 {
                    return;
                },
                () = shutdown.cancelled() => {
                    self.queue.close();
                    continue;
                }
            }
            if batch.len() < BATCH_MAX && !self.queue.is_closed() {
                // Those of one burst come one by one.
                shutdown.run_until_cancelled(tokio::time::sleep(LINGER)).await;
                while batch.len() < BATCH_MAX
                    && let Ok(timeline) = self.queue.try_recv()
                {
                    batch.push(timeline);
                }
            }
            let request = message(&self.router, &batch);
            let failed = match tokio::time::timeout(EXPORT_DEADLINE, client.export(request)).await {
                Ok(Ok(_)) => None,
                Ok(Err(status)) => Some(status.to_string()),
                Err(_) => Some(format!("no answer within {EXPORT_DEADLINE:?}")),
            };
            match &failed {
                None => self.metrics.traces_exported(batch.len() as u64),
                Some(error) => {
                    self.metrics.traces_dropped(batch.len() as u64);
                    // Once, since a collector that is gone stays so for a while; the counter goes on.
                    if !failing {
                        tracing::warn!(%error, requests = batch.len(), "traces could not be exported and are dropped");
                    }
                }
            }
            failing = failed.is_some();
            batch.clear();
            if failing && shutdown.is_cancelled() {
                // The process is not to wait for a collector that is gone.
                return;
            }
        }
    }
}

/// The spans of all requests, by where they were.
fn message(router: &NodeId, timelines: &[Arc<Timeline>]) -> ExportTraceServiceRequest {
    let mut by_node: BTreeMap<String, Vec<Span>> = BTreeMap::new();
    for timeline in timelines {
        for (node, span) in spans::of(timeline) {
            by_node.entry(node).or_default().push(span);
        }
    }
    let resource_spans = by_node.into_iter().map(|(node, spans)| {
        let node = if node.is_empty() { router.to_string() } else { node };
        ResourceSpans {
            resource: Some(spans::resource(&node)),
            scope_spans: vec![ScopeSpans {
                spans,
                ..ScopeSpans::default()
            }],
            ..ResourceSpans::default()
        }
    });
    ExportTraceServiceRequest {
        resource_spans: resource_spans.collect(),
    }
}
