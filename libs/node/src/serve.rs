//! The two sides on which a process is reached: gRPC, and HTTP for metrics and health (and a router's API).
//!
//! Order of a life: bind first, so that a taken port is the first thing that fails and the real port is known
//! before it is registered; serve while becoming ready; at shutdown stop being ready, stop accepting, drain what
//! runs, and after a deadline let go of the rest.
//!
//! Invariant: [`Readiness`] is the only source of `/readyz` and of `grpc.health.v1`, so the two never disagree for
//! longer than it takes to tell. `/livez` answers as long as the runtime does.
//!
//! Elsewhere: what is served (the roles), message size limits (on each service, from [`proto::MESSAGE_BYTES_MAX`]).

mod incoming;
mod readiness;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use futures::FutureExt;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use types::ErrorCode;

pub use incoming::Peer;
pub use readiness::Readiness;

use incoming::{Incoming, Secure};

use crate::channel::{KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT};
use crate::config;
use crate::metrics::Metrics;
use crate::tls::{ClientCertificates, Tls};

/// Calls that one connection may have open. A router has one connection to each node and one call per request.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 4096;
/// Bounds the headers of one call.
pub const HEADER_BYTES_MAX: u32 = 64 << 10;
/// The content type of [`Metrics::encode`].
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where to listen, and how long an end may take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// `host:port` of gRPC; port 0 takes a free one.
    pub grpc_listen: String,
    /// `host:port` of HTTP; port 0 takes a free one.
    pub http_listen: String,
    /// How long requests may go on after the process was told to end.
    pub drain_deadline: config::Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            // Free ports: several nodes share a machine under `perigee up`. A deployment sets both.
            grpc_listen: "127.0.0.1:0".to_owned(),
            http_listen: "127.0.0.1:0".to_owned(),
            // Kubernetes kills a pod 30 s after it told it to end.
            drain_deadline: config::Duration::from_secs(25),
        }
    }
}

/// Why a process cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The configured address.
        address: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The gRPC server failed.
    #[error("gRPC server failed: {0}")]
    Grpc(#[from] tonic::transport::Error),
    /// The HTTP server failed.
    #[error("HTTP server failed: {0}")]
    Http(#[source] std::io::Error),
}

impl ServeError {
    /// What the caller can do.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Bind { .. } => ErrorCode::Invalid,
            Self::Grpc(_) | Self::Http(_) => ErrorCode::Internal,
        }
    }
}

/// Bound sockets that wait to be served.
#[derive(Debug)]
pub struct Listeners {
    grpc: TcpListener,
    grpc_address: SocketAddr,
    http: TcpListener,
    http_address: SocketAddr,
}

impl Listeners {
    /// Binds both sides.
    ///
    /// # Errors
    ///
    /// An address cannot be read, is taken, or is not this machine's.
    pub async fn bind(config: &Config) -> Result<Self, ServeError> {
        let (grpc, grpc_address) = bind(&config.grpc_listen).await?;
        let (http, http_address) = bind(&config.http_listen).await?;
        Ok(Self {
            grpc,
            grpc_address,
            http,
            http_address,
        })
    }

    /// Where gRPC is really served: never port 0.
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc_address
    }

    /// Where HTTP is really served: never port 0.
    pub fn http_address(&self) -> SocketAddr {
        self.http_address
    }
}

async fn bind(address: &str) -> Result<(TcpListener, SocketAddr), ServeError> {
    let refuse = |source| ServeError::Bind {
        address: address.to_owned(),
        source,
    };
    let listener = TcpListener::bind(address).await.map_err(refuse)?;
    let bound = listener.local_addr().map_err(refuse)?;
    Ok((listener, bound))
}

/// What a process serves. Health, metrics and readiness come by themselves.
#[derive(Debug, Clone)]
pub struct Server {
    grpc: Routes,
    http: axum::Router,
    readiness: Readiness,
    metrics: Metrics,
    tls: Option<(Tls, ClientCertificates)>,
    drain_deadline: Duration,
}

impl Server {
    /// A server of nothing but health and metrics.
    pub fn new(config: &Config, readiness: Readiness, metrics: Metrics) -> Self {
        Self {
            grpc: Routes::default(),
            http: axum::Router::new(),
            readiness,
            metrics,
            tls: None,
            drain_deadline: config.drain_deadline.into(),
        }
    }

    /// Serves both sides over TLS. `clients` is for gRPC: HTTP demands no certificate of anyone, since Kubernetes, which asks for
    /// health there, has none.
    #[must_use]
    pub fn tls(mut self, tls: Option<Tls>, clients: ClientCertificates) -> Self {
        self.tls = tls.map(|tls| (tls, clients));
        self
    }

    /// Serves these gRPC services: `Routes::new(a).add_service(b)`.
    #[must_use]
    pub fn grpc(mut self, services: Routes) -> Self {
        self.grpc = services;
        self
    }

    /// Serves these HTTP routes beside `/metrics`, `/livez` and `/readyz`.
    #[must_use]
    pub fn http(mut self, routes: axum::Router) -> Self {
        self.http = self.http.merge(routes);
        self
    }

    /// Serves until `shutdown`, then drains. Returns when both sides have ended, at the latest
    /// [`Config::drain_deadline`] after `shutdown`; what still runs then is cut off.
    ///
    /// # Errors
    ///
    /// A side failed while it was not asked to end. The other side is ended too.
    pub async fn run(self, listeners: Listeners, shutdown: CancellationToken) -> Result<(), ServeError> {
        let Self {
            grpc,
            http,
            readiness,
            metrics,
            tls,
            drain_deadline,
        } = self;
        let (grpc_tls, http_tls) = secure(tls);
        let admin = admin_routes(readiness.clone(), metrics);
        // A failure of one side is a reason for the other one to end, but not for the whole process's token:
        // that is the caller's to decide.
        let ending = shutdown.child_token();
        let grpc = serve_grpc(
            Incoming::new(listeners.grpc, grpc_tls),
            grpc,
            readiness.clone(),
            ending.clone(),
        );
        let http = serve_http(
            Incoming::new(listeners.http, http_tls),
            http.merge(admin),
            ending.clone(),
        );
        let failure = OnceLock::new();
        let note = |result: Result<(), ServeError>| {
            if let Err(error) = result {
                ending.cancel();
                // A second failure is a consequence of the first one.
                let _ = failure.set(error);
            }
        };
        let both = async { tokio::join!(grpc.map(note), http.map(note)) };
        let too_late = async {
            ending.cancelled().await;
            readiness.miss("drain", "shutting down");
            tokio::time::sleep(drain_deadline).await;
        };
        tokio::select! {
            // A drain that ends with its deadline has ended well.
            biased;
            ((), ()) = both => {}
            () = too_late => {
                tracing::warn!(deadline = ?drain_deadline, "requests still ran when the drain's deadline passed");
            }
        }
        failure.into_inner().map_or(Ok(()), Err)
    }
}

/// What the two sides make connections with.
fn secure(tls: Option<(Tls, ClientCertificates)>) -> (Secure, Secure) {
    const HAS_CERTIFICATE: &str = "who serves over TLS was checked to have a certificate";
    let Some((tls, clients)) = tls else {
        return (None, None);
    };
    let http = tls.clone();
    (
        Some(Box::new(move || tls.grpc_server(clients).expect(HAS_CERTIFICATE))),
        Some(Box::new(move || http.http_server().expect(HAS_CERTIFICATE))),
    )
}

async fn serve_grpc(
    incoming: Incoming,
    services: Routes,
    readiness: Readiness,
    ending: CancellationToken,
) -> Result<(), ServeError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", ServingStatus::NotServing).await;
    let server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .add_routes(services.add_service(health))
        .serve_with_incoming_shutdown(incoming.into_stream(), ending.clone().cancelled_owned());
    // Health is reported until the server has ended, since it is asked for during the drain most of all.
    tokio::select! {
        result = server => result.map_err(ServeError::Grpc),
        never = report_health(reporter, readiness, ending) => match never {},
    }
}

async fn report_health(
    mut reporter: HealthReporter,
    readiness: Readiness,
    ending: CancellationToken,
) -> Infallible {
    let mut reasons = readiness.watch();
    let mut reported = false;
    while !ending.is_cancelled() {
        let ready = reasons.borrow_and_update().is_empty();
        // Watchers are told of every status that is set, also of the same one again.
        if ready != reported {
            let status = if ready {
                ServingStatus::Serving
            } else {
                ServingStatus::NotServing
            };
            reporter.set_service_status("", status).await;
            reported = ready;
        }
        tokio::select! {
            () = ending.cancelled() => {}
            // The sender is held by `readiness`, so this does not fail.
            _ = reasons.changed() => {}
        }
    }
    reporter.set_service_status("", ServingStatus::NotServing).await;
    // Taking the status away ends its watchers' streams, which would otherwise hold up the drain; who only asks
    // must go on hearing it.
    reporter.clear_service_status("").await;
    reporter.set_service_status("", ServingStatus::NotServing).await;
    std::future::pending().await
}

async fn serve_http(
    incoming: Incoming,
    routes: axum::Router,
    ending: CancellationToken,
) -> Result<(), ServeError> {
    axum::serve(incoming, routes.into_make_service_with_connect_info::<Peer>())
        .with_graceful_shutdown(ending.cancelled_owned())
        .await
        .map_err(ServeError::Http)
}

/// `/metrics`, `/livez` and `/readyz`.
pub fn admin_routes(readiness: Readiness, metrics: Metrics) -> axum::Router {
    axum::Router::new()
        .route("/metrics", get(show_metrics).with_state(metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(show_readiness).with_state(readiness))
}

async fn show_metrics(State(metrics): State<Metrics>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, OPENMETRICS)], metrics.encode())
}

async fn show_readiness(State(readiness): State<Readiness>) -> impl IntoResponse {
    let reasons = readiness.reasons();
    let status = match reasons.is_empty() {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let body = serde_json::json!({ "ready": reasons.is_empty(), "reasons": reasons });
    (status, Json(body))
}

#[cfg(test)]
mod tests;
