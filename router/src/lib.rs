//! The front door: takes requests over HTTP and gRPC, tokenises them, and sends each one to where its cache is nearest.
//!
//! A router holds no state that its nodes could not tell it again: it can be killed and started anew, and several of them
//! serve one cluster without knowing of each other.
//!
//! Where things are, the pure modules first:
//! - [`index`]: which node holds which block; [`cost`]: what a placement takes, in milliseconds;
//! - [`residents`] and [`lengths`]: how busy decode nodes will be;
//! - [`placement`] and [`policy`]: where a request goes; [`admission`] and [`tenants`]: whether it may;
//! - [`cluster`]: all of that together, fed by events;
//! - [`decisions`]: the last placements with their reasons; [`timeline`]: a request's way;
//! - [`request`] and [`model`]: from what a client says to tokens;
//! - [`members`]: the streams from the nodes; [`gate`]: waiting for a place; [`dispatch`]: a request's life;
//! - [`access`]: who may call what; [`guard`]: holds the doors to it;
//! - [`history`] and [`heat`]: what came of the last minutes' requests, and what prompts begin with;
//! - `grpc` and `openai`: the two front doors; `routing`: what the router decided, for whoever asks; `requests`: those that run,
//!   and the last ones; `traces`: their export; `ui`: the live page.
//!
//! Architecture invariant: the pure modules know neither tokio nor tonic, so the simulator runs them as they are.

pub mod access;
pub mod admission;
pub mod cluster;
pub mod config;
pub mod cost;
pub mod decisions;
pub mod dispatch;
pub mod entropy;
pub mod error;
pub mod gate;
mod grpc;
pub mod guard;
pub mod heat;
pub mod history;
pub mod index;
pub mod lengths;
pub mod members;
pub mod metrics;
pub mod model;
mod openai;
pub mod placement;
pub mod policy;
mod quotas;
mod recorder;
pub mod request;
mod requests;
pub mod residents;
mod routing;
pub mod tenants;
pub mod timeline;
pub mod traces;
mod ui;
mod watchers;

use std::sync::Arc;
use std::time::Duration;

use node::registry::Registry;
use node::serve::{self, ServeError, Server};
use node::{Channels, Listeners, Readiness, Tls};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use types::NodeId;

pub use config::{ClientCertificates, Config, ConfigError};
pub use dispatch::Dispatcher;
pub use guard::Guard;
pub use model::Model;

use cluster::Cluster;
use members::SharedCluster;
use metrics::Metrics;
use watchers::Watchers;

/// A condition of readiness: some decode node takes requests.
pub const DECODE_NODE: &str = "decode_node";

/// How often gauges are brought up to date.
const GAUGE_INTERVAL: Duration = Duration::from_secs(1);

/// What a router needs from its process.
#[derive(Debug)]
pub struct Dependencies {
    /// Who is there.
    pub registry: Arc<dyn Registry>,
    /// What is served.
    pub model: Arc<Model>,
    /// Connections to nodes.
    pub channels: Channels,
    /// Where the router's metrics go.
    pub metrics: node::Metrics,
    /// Told whether requests can be served.
    pub readiness: Readiness,
    /// Who may call.
    pub guard: Guard,
    /// What is served with, if over TLS.
    pub tls: Option<Tls>,
    /// Who this router is.
    pub node_id: NodeId,
    /// Where traces go.
    pub traces: traces::Config,
}

/// A router.
#[derive(Debug)]
pub struct Service {
    dispatcher: Dispatcher,
    members: members::Service,
    registry: Arc<dyn Registry>,
    node_metrics: node::Metrics,
    metrics: Metrics,
    readiness: Readiness,
    guard: Guard,
    tls: Option<Tls>,
    client_certificates: ClientCertificates,
    node_id: NodeId,
    traces: Option<traces::Service>,
}

/// A handle on a router that runs. Clones are one and the same.
#[derive(Debug, Clone)]
pub struct Handle {
    /// Takes requests within the process.
    pub dispatcher: Dispatcher,
}

impl Service {
    /// A router that does nothing yet. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// A setting makes no sense.
    pub fn new(config: Config, dependencies: Dependencies) -> Result<Self, ConfigError> {
        config.validate()?;
        dependencies.traces.validate()?;
        let Dependencies {
            registry,
            model,
            channels,
            metrics: node_metrics,
            readiness,
            guard,
            tls,
            node_id,
            traces: traces_config,
        } = dependencies;
        let cluster = SharedCluster::new(Cluster::new(
            model.name(),
            model.digest(),
            config.index_entries_max,
            config.priors(),
            config.policy.build(),
            config.placement(),
        ));
        let metrics = Metrics::register(&node_metrics);
        let members = members::Service::new(registry.clone(), cluster.clone(), channels.clone());
        readiness.miss(DECODE_NODE, "no decode node takes requests yet");
        let client_certificates = config.client_certificates;
        let (exporter, traces) = match traces::start(&traces_config, node_id.clone(), metrics.clone())? {
            Some((exporter, service)) => (Some(exporter), Some(service)),
            None => (None, None),
        };
        let watchers = Watchers::new(exporter, traces_config.sample_ratio);
        Ok(Self {
            dispatcher: Dispatcher::new(config, model, cluster, channels, metrics.clone(), watchers),
            members,
            registry,
            node_metrics,
            metrics,
            readiness,
            guard,
            tls,
            client_certificates,
            node_id,
            traces,
        })
    }

    /// A handle on it.
    pub fn handle(&self) -> Handle {
        Handle {
            dispatcher: self.dispatcher.clone(),
        }
    }

    /// Serves on `listeners` until `shutdown`; requests that run then may end within `config.drain_deadline`. `more` are the gRPC
    /// services that the process adds, such as its `perigee.v1.Node`.
    ///
    /// # Errors
    ///
    /// A server failed.
    pub async fn run(
        self,
        config: &serve::Config,
        more: Routes,
        listeners: Listeners,
        shutdown: CancellationToken,
    ) -> Result<(), RunError> {
        let Self {
            dispatcher,
            members,
            registry,
            node_metrics,
            metrics,
            readiness,
            guard,
            tls,
            client_certificates,
            node_id,
            traces,
        } = self;
        let ui = ui::Ui::new(dispatcher.clone(), node_id, shutdown.clone());
        let grpc = more
            .add_service(grpc::Service::server(dispatcher.clone()))
            .add_service(routing::Service::server(dispatcher.clone(), shutdown.clone()))
            .add_service(requests::service::Service::server(dispatcher.requests().clone()))
            .add_service(quotas::Service::server(registry))
            .add_service(reflection().build_v1()?)
            .add_service(reflection().build_v1alpha()?);
        let http = openai::routes(dispatcher.clone());
        let server = Server::new(config, readiness.clone(), node_metrics)
            .tls(tls, client_certificates.into())
            .grpc(guard::grpc(grpc, guard.clone(), dispatcher.clone()))
            .http(guard::http(http, guard.clone(), dispatcher.clone()))
            .http(guard::pages(ui.routes(), guard.clone(), dispatcher.clone()));
        // Requests that drain still need the nodes' streams.
        let drained = CancellationToken::new();
        let serving = async {
            let result = server.run(listeners, shutdown).await;
            drained.cancel();
            result
        };
        let exporting = async {
            if let Some(traces) = traces {
                traces.run(drained.clone()).await;
            }
        };
        let (result, (), (), (), (), (), Ok(())) = tokio::join!(
            serving,
            ui.run(drained.clone()),
            exporting,
            members.run(drained.clone()),
            observe(&dispatcher, &metrics, &readiness, &drained),
            make_room(&dispatcher, &drained),
            guard.follow(drained.clone()),
        );
        Ok(result?)
    }
}

/// Why a router ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A server failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The reflection service cannot read our own descriptors.
    #[error("reflection cannot be set up: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

/// Lets requests run as nodes' reports say that there is room.
async fn make_room(dispatcher: &Dispatcher, until: &CancellationToken) {
    let mut tick = tokio::time::interval(members::REPORT_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while until.run_until_cancelled(tick.tick()).await.is_some() {
        dispatcher.make_room();
    }
}

/// Tells readiness and gauges what the cluster is like.
async fn observe(
    dispatcher: &Dispatcher,
    metrics: &Metrics,
    readiness: &Readiness,
    until: &CancellationToken,
) {
    let mut changes = dispatcher.cluster().changes();
    let mut tick = tokio::time::interval(GAUGE_INTERVAL);
    loop {
        let (blocks, refused, decode_nodes) = {
            let cluster = dispatcher.cluster().lock();
            (
                cluster.index().len(),
                cluster.index().refused(),
                cluster.decode_nodes(),
            )
        };
        metrics.cluster_now(blocks, refused, decode_nodes);
        metrics.requests_now(dispatcher.counts());
        dispatcher.watchers().tokens(dispatcher.requests().tokens());
        match decode_nodes {
            0 => readiness.miss(DECODE_NODE, "no decode node takes requests"),
            _ => readiness.meet(DECODE_NODE),
        }
        tokio::select! {
            biased;
            () = until.cancelled() => return,
            // The sender is held by the dispatcher, so this does not fail.
            _ = changes.changed() => {}
            _ = tick.tick() => {}
        }
    }
}
