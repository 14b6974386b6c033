//! The `perigee.v1.Node` service: what every node says of itself.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use futures::future::BoxFuture;
use futures::{Stream, stream};
use proto::v1;
use proto::v1::node_server::{Node, NodeServer};
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use types::{Error, LoadReport, NodeRecord, Role};

use crate::clock;
use crate::telemetry::LogLevels;

/// Between two reports where the watcher asks for nothing else. The router adds what it placed itself meanwhile.
pub const REPORT_INTERVAL: Duration = Duration::from_millis(100);
/// A watcher that asks for more gets this: reports must stay cheap beside an engine step.
pub const REPORT_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// A watcher that asks for less gets this.
pub const REPORT_INTERVAL_MAX: Duration = Duration::from_secs(60);

/// Longest time that requests can be given before a node changes its role: by then it is the wrong tool.
const FLIP_GRACE_MAX: Duration = Duration::from_secs(600);

/// Where reports come from. Called once per interval and watcher, so it must neither block nor wait.
pub trait LoadSource: Send + Sync + 'static {
    /// How busy the node is now. `sequence` is filled in by the service.
    fn load(&self) -> LoadReport;
}

/// What `Drain`, `Cordon` and `Resume` do.
pub trait Drainable: Send + Sync + 'static {
    /// Finishes what runs and takes nothing new. Only starts that, and bears being called again.
    fn drain(&self);

    /// Asks routers to place nothing new here.
    fn cordon(&self);

    /// Takes requests again. A node that was neither drained nor cordoned stays as it is.
    ///
    /// # Errors
    ///
    /// The node does not take requests for another reason than a `Drain`.
    fn resume(&self) -> Result<(), Error>;
}

/// What `Flip` does.
pub trait Flippable: Send + Sync + 'static {
    /// What the node is now.
    fn role(&self) -> Role;

    /// Takes another role, and gives the one that it had. As a store it has no model in memory. Requests have `grace` to end; then they are ended so that their clients
    /// go on elsewhere. Goes on where the caller does not wait any more.
    ///
    /// # Errors
    ///
    /// `invalid` for a role that it cannot have, `conflict` while it drains or flips already, and whatever keeps it from working in
    /// the new one, such as a model that does not load: then it goes on in its own.
    fn flip(&self, to: Role, grace: Duration) -> BoxFuture<'_, Result<Role, Error>>;
}

/// The service of one node. Clones are one and the same.
#[derive(Clone)]
pub struct NodeService {
    shared: Arc<Shared>,
    log_levels: Option<LogLevels>,
    flippable: Option<Arc<dyn Flippable>>,
}

struct Shared {
    record: NodeRecord,
    source: Arc<dyn LoadSource>,
    drainable: Arc<dyn Drainable>,
    shutdown: CancellationToken,
    /// Shared by all watchers, so that a report's number is unique in the epoch.
    sequence: AtomicU64,
}

impl fmt::Debug for NodeService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeService")
            .field("record", &self.record())
            .finish()
    }
}

impl NodeService {
    /// A service for the node that `record` describes. Watchers' streams end at `shutdown`, or nothing could drain.
    pub fn new(
        record: NodeRecord,
        source: Arc<dyn LoadSource>,
        drainable: Arc<dyn Drainable>,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                record,
                source,
                drainable,
                shutdown,
                sequence: AtomicU64::new(0),
            }),
            log_levels: None,
            flippable: None,
        }
    }

    /// Lets callers change what the process logs.
    #[must_use]
    pub fn with_log_levels(self, log_levels: LogLevels) -> Self {
        Self {
            log_levels: Some(log_levels),
            ..self
        }
    }

    /// Lets callers change the node's role.
    #[must_use]
    pub fn with_flip(self, flippable: Arc<dyn Flippable>) -> Self {
        Self {
            flippable: Some(flippable),
            ..self
        }
    }

    fn record(&self) -> NodeRecord {
        let record = self.shared.record.clone();
        let role = self.flippable.as_ref().map_or(record.role, |flips| flips.role());
        NodeRecord { role, ..record }
    }

    /// The service in the form that a server takes.
    pub fn server(&self) -> NodeServer<Self> {
        NodeServer::new(self.clone())
    }

    async fn flip_to(&self, role: &str, grace: Duration) -> Result<Role, Error> {
        let unknown = || {
            Error::invalid(
                "role",
                format!("role is {role:?}, but must be prefill, decode or store"),
            )
        };
        let to = Role::parse(role).ok_or_else(unknown)?;
        if grace > FLIP_GRACE_MAX {
            let message = format!(
                "grace_ms is {}, but at most {} are allowed",
                grace.as_millis(),
                FLIP_GRACE_MAX.as_millis()
            );
            return Err(Error::invalid("grace_ms", message));
        }
        let fixed = || {
            let message = format!("a {} cannot take another role", self.record().role);
            Error::invalid("role", message)
        };
        self.flippable.as_ref().ok_or_else(fixed)?.flip(to, grace).await
    }

    fn report(&self) -> LoadReport {
        LoadReport {
            sequence: self.shared.sequence.fetch_add(1, Ordering::Relaxed) + 1,
            ..self.shared.source.load()
        }
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn info(&self, _: Request<v1::InfoRequest>) -> Result<Response<v1::InfoResponse>, Status> {
        Ok(Response::new(v1::InfoResponse {
            record_json: proto::convert::record_to_json(&self.record()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            unix_time_ms: clock::unix_ms(SystemTime::now()),
        }))
    }

    type WatchLoadStream = Pin<Box<dyn Stream<Item = Result<v1::LoadReport, Status>> + Send>>;

    async fn watch_load(
        &self,
        request: Request<v1::WatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        let interval = report_interval(request.get_ref().interval_ms);
        let reports = stream::unfold((self.clone(), interval), next_report);
        Ok(Response::new(Box::pin(reports)))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        self.shared.drainable.drain();
        Ok(Response::new(v1::DrainResponse {}))
    }

    async fn cordon(&self, _: Request<v1::CordonRequest>) -> Result<Response<v1::CordonResponse>, Status> {
        self.shared.drainable.cordon();
        Ok(Response::new(v1::CordonResponse {}))
    }

    async fn flip(&self, request: Request<v1::FlipRequest>) -> Result<Response<v1::FlipResponse>, Status> {
        let v1::FlipRequest { role, grace_ms } = request.into_inner();
        let had = self.flip_to(&role, Duration::from_millis(grace_ms)).await;
        let had = had.map_err(|error| proto::status::to_status(&error))?;
        Ok(Response::new(v1::FlipResponse {
            role: had.as_str().to_owned(),
        }))
    }

    async fn resume(&self, _: Request<v1::ResumeRequest>) -> Result<Response<v1::ResumeResponse>, Status> {
        let resumed = self.shared.drainable.resume();
        resumed.map_err(|error| proto::status::to_status(&error))?;
        Ok(Response::new(v1::ResumeResponse {}))
    }

    async fn log_level(
        &self,
        request: Request<v1::LogLevelRequest>,
    ) -> Result<Response<v1::LogLevelResponse>, Status> {
        let v1::LogLevelRequest {
            filter,
            for_ms,
            revert,
        } = request.into_inner();
        let none = || Error::unavailable("what this process logs cannot be changed");
        let levels = self.log_levels.as_ref().ok_or_else(none);
        let levels = levels.map_err(|error| proto::status::to_status(&error))?;
        if revert {
            levels.revert();
        } else if !filter.is_empty() {
            let lasts = (for_ms > 0).then_some(Duration::from_millis(for_ms));
            let set = levels.set(&filter, lasts);
            set.map_err(|error| proto::status::to_status(&error))?;
        }
        let showing = levels.showing();
        Ok(Response::new(v1::LogLevelResponse {
            filter: showing.filter,
            configured: showing.configured,
            reverts_in_ms: showing
                .reverts_in
                .map_or(0, |left| left.as_millis().max(1) as u64),
        }))
    }
}

async fn next_report(
    (service, mut interval): (NodeService, Interval),
) -> Option<(Result<v1::LoadReport, Status>, (NodeService, Interval))> {
    tokio::select! {
        // A node that ends says so rather than reporting once more.
        biased;
        () = service.shared.shutdown.cancelled() => None,
        _ = interval.tick() => {
            let report = proto::convert::load_to_wire(&service.report());
            Some((Ok(report), (service, interval)))
        }
    }
}

/// The first tick is at once.
fn report_interval(asked_ms: u64) -> Interval {
    let interval = match asked_ms {
        0 => REPORT_INTERVAL,
        asked => Duration::from_millis(asked).clamp(REPORT_INTERVAL_MIN, REPORT_INTERVAL_MAX),
    };
    let mut interval = tokio::time::interval(interval);
    // A slow watcher gets the newest report, not a burst of late ones.
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

#[cfg(test)]
pub(crate) mod tests;
