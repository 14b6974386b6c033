//! The `perigee.v1.Transfer` service: how this node moves bytes, for people, and tests of it through the real path.
//!
//! A test moves a random pattern between blocks of two pools by the calls that move KV: granted memory, the transport's
//! `write` and `read`, the fence. Each side verifies what it received.
//!
//! Invariant: a test costs a node little. The blocks it borrows are few, never cached and never found by a hash; they come
//! back through the fence, when the test closes its probe or when the probe's time is over; and the tests and
//! probes of a node at a time are bounded.
//!
//! Elsewhere: sizes, slices and figures (`probe.rs`), what the findings mean (`perigee check`).

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, stream};
use node::{Channels, task};
use proto::v1;
use proto::v1::transfer_server::{Transfer, TransferServer};
use tokio::sync::Semaphore;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use types::{Error, HostFacts};

use crate::probe::{self, Direction};
use crate::service::answer;
use crate::store::Store;

mod area;
mod lend;
mod measure;
mod metrics;

use lend::Probes;
use measure::{Measuring, Test};
pub(crate) use metrics::register as register_metrics;

/// A second test would measure the first one.
const TESTS_MAX: usize = 1;
/// When a caller that found a test running may try again.
const TEST_RETRY_MS: u64 = 5000;
/// What a test takes where the caller does not say.
const TEST_DURATION: Duration = Duration::from_secs(5);
/// What it takes at most.
const TEST_DURATION_MAX: Duration = Duration::from_secs(60);
/// Largest transfer of a test, and so the most that a probe lends.
pub const TEST_BYTES_MAX: u64 = probe::SIZES[probe::SIZES.len() - 1];

/// The service of one pool. Clones are one and the same.
#[derive(Clone)]
pub struct Service {
    store: Store,
    channels: Channels,
    /// What the host offers, read anew for each answer.
    host: HostReader,
    probes: Arc<Probes>,
    tests: Arc<Semaphore>,
    shutdown: CancellationToken,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("store", &self.store).finish()
    }
}

/// Where facts of the host come from.
#[derive(Debug, Clone)]
pub struct HostReader {
    root: PathBuf,
    gid_index: Option<u32>,
}

impl HostReader {
    /// Reads below `root`: `/`, but in tests. `settings` are the node's own for UCX.
    pub fn new(root: PathBuf, settings: &BTreeMap<String, String>) -> Self {
        Self {
            root,
            gid_index: node::host::gid_index(settings),
        }
    }

    async fn read(&self) -> Result<HostFacts, Error> {
        let root = self.root.clone();
        let facts = task::blocking("host-facts", move || node::host::read(&root)).await?;
        Ok(HostFacts {
            gid_index: self.gid_index,
            ..facts
        })
    }
}

impl Service {
    /// A service that ends at `shutdown`.
    pub fn new(store: Store, channels: Channels, host: HostReader, shutdown: CancellationToken) -> Self {
        Self {
            probes: Arc::new(Probes::new(&store)),
            tests: Arc::new(Semaphore::new(TESTS_MAX)),
            store,
            channels,
            host,
            shutdown,
        }
    }

    /// The service in the form that a server takes.
    pub fn server(&self) -> TransferServer<Self> {
        TransferServer::new(self.clone())
    }

    /// Ends probes whose time has come, until shutdown. One of these must run per store.
    pub async fn run(self) {
        let mut interval = tokio::time::interval(lend::EXPIRY_INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => break,
                _ = interval.tick() => self.probes.expire(Instant::now().into_std()),
            }
        }
        // No probe outlives the runtime that its fence needs: every one ends by then.
        self.probes
            .expire((Instant::now() + lend::PROBE_TTL_MAX).into_std());
    }

    async fn describe(&self) -> Result<v1::DescribeTransfersResponse, Error> {
        let transport = self.store.transport();
        let movers = transport.movers().into_iter().map(|mover| v1::TransferMover {
            name: mover.name,
            usable: mover.usable,
            detail: mover.detail,
        });
        let links = transport.links().into_iter().map(|link| v1::TransferLink {
            endpoint: link.endpoint,
            mover: link.mover,
            lanes: link.lanes,
            obstacle: link.obstacle,
            connections: link.connections,
            written_bytes: link.written_bytes,
            read_bytes: link.read_bytes,
            failures: link.failures,
        });
        Ok(v1::DescribeTransfersResponse {
            endpoint: transport.endpoint(),
            movers: movers.collect(),
            links: links.collect(),
            host_json: proto::convert::host_to_json(&self.host.read().await?),
        })
    }

    fn start_test(&self, request: &v1::TestTransferRequest) -> Result<Measuring, Error> {
        let directions: &[Direction] = match v1::TransferDirection::try_from(request.direction) {
            Ok(v1::TransferDirection::Unspecified) => &[Direction::Write, Direction::Read],
            Ok(v1::TransferDirection::Write) => &[Direction::Write],
            Ok(v1::TransferDirection::Read) => &[Direction::Read],
            Err(_) => {
                let message = format!("direction {} is none that is known", request.direction);
                return Err(Error::invalid("direction", message));
            }
        };
        let permit = self
            .tests
            .clone()
            .try_acquire_owned()
            .map_err(|_| Error::overloaded("this node runs another transfer test", TEST_RETRY_MS))?;
        let channel = self.channels.get(&request.peer_grpc_endpoint)?;
        let duration = match request.duration_ms {
            0 => TEST_DURATION,
            millis => Duration::from_millis(millis).min(TEST_DURATION_MAX),
        };
        let bytes_max = match request.bytes_max {
            0 => TEST_BYTES_MAX,
            bytes => bytes.min(TEST_BYTES_MAX),
        };
        Ok(Measuring::new(
            Test {
                store: self.store.clone(),
                channel,
                steps: probe::steps(bytes_max, directions),
                duration,
            },
            permit,
            self.shutdown.clone(),
        ))
    }
}

#[tonic::async_trait]
impl Transfer for Service {
    async fn describe(
        &self,
        _: Request<v1::DescribeTransfersRequest>,
    ) -> Result<Response<v1::DescribeTransfersResponse>, Status> {
        answer(self.describe().await)
    }

    type TestStream = Pin<Box<dyn Stream<Item = Result<v1::TestTransferResponse, Status>> + Send>>;

    async fn test(
        &self,
        request: Request<v1::TestTransferRequest>,
    ) -> Result<Response<Self::TestStream>, Status> {
        let measuring = self.start_test(request.get_ref());
        answer(measuring.map(|measuring| {
            let measurements: Self::TestStream = Box::pin(stream::unfold(measuring, measure::next));
            measurements
        }))
    }

    async fn open_probe(
        &self,
        request: Request<v1::OpenProbeRequest>,
    ) -> Result<Response<v1::OpenProbeResponse>, Status> {
        answer(self.probes.open(&self.store, request.get_ref()).await)
    }

    async fn close_probe(
        &self,
        request: Request<v1::CloseProbeRequest>,
    ) -> Result<Response<v1::CloseProbeResponse>, Status> {
        answer(self.probes.close(&self.store, request.get_ref().probe_id).await)
    }
}

#[cfg(test)]
mod tests;
