//! Follows the members: the registry for who is there, and every node for its load and its log.
//!
//! Two streams per node feed the state in `cluster.rs`. A stream that breaks says so at once and is opened again with
//! growing waits, for as long as the state wants the node. A stream that is open but silent for longer than it may be counts
//! as broken. Nothing here fails the process: without the registry and without nodes a router goes on waiting.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kv_store::follower::Follower;
use kv_store::log::Batch;
use node::Channels;
use node::backoff::{self, Backoff};
use node::registry::{Members, Registry};
use proto::v1;
use proto::v1::kv_store_client::KvStoreClient;
use proto::v1::node_client::NodeClient;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use types::{Error, ErrorCode, NodeId, NodeRecord};

use crate::cluster::{Change, Cluster};

/// How often nodes report their load. Twice within a fast decode step would tell nothing new.
pub const REPORT_INTERVAL: Duration = Duration::from_millis(50);

/// Silence after which a node counts as unreachable: reports come every [`REPORT_INTERVAL`], so this is far beyond what a busy
/// machine delays them.
const REPORT_SILENCE_MAX: Duration = Duration::from_secs(5);

/// How long opening a stream may take.
const OPEN_DEADLINE: Duration = Duration::from_secs(5);

/// First wait before a broken stream is opened again.
const RETRY_FIRST: Duration = Duration::from_millis(50);

/// Longest wait. Short, since a node that came back is wanted soon, and a stream per node is no load.
const RETRY_LONGEST: Duration = Duration::from_secs(2);

/// The state of the cluster, shared by the streams that feed it and the requests that are placed by it. Clones are one
/// and the same.
#[derive(Debug, Clone)]
pub struct SharedCluster {
    state: Arc<Mutex<Cluster>>,
    changed: Arc<watch::Sender<()>>,
}

impl SharedCluster {
    /// Shares `cluster`.
    pub fn new(cluster: Cluster) -> Self {
        Self {
            state: Arc::new(Mutex::new(cluster)),
            changed: Arc::new(watch::Sender::new(())),
        }
    }

    /// The state. Held for as long as one decision takes, and never across an await.
    pub fn lock(&self) -> MutexGuard<'_, Cluster> {
        // Every change of the state is complete before anything can panic, so a poisoned lock guards a sound state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notified when a node became reachable or unreachable, joined or left.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn change<T>(&self, with: impl FnOnce(&mut Cluster) -> T) -> T {
        let result = with(&mut self.lock());
        self.changed.send_replace(());
        result
    }
}

/// Keeps [`SharedCluster`] up to date.
#[derive(Debug)]
pub struct Service {
    registry: Arc<dyn Registry>,
    cluster: SharedCluster,
    channels: Channels,
}

impl Service {
    /// A service over these.
    pub fn new(registry: Arc<dyn Registry>, cluster: SharedCluster, channels: Channels) -> Self {
        Self {
            registry,
            cluster,
            channels,
        }
    }

    /// Follows until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut registry = self.registry.watch();
        let mut followed: HashMap<NodeId, CancellationToken> = HashMap::new();
        let mut tasks = JoinSet::new();
        loop {
            let members: Arc<Members> = registry.borrow_and_update().clone();
            for change in self.cluster.change(|cluster| cluster.registry(&members.nodes)) {
                self.carry_out(change, &mut followed, &mut tasks, &shutdown);
            }
            self.warn_of_strangers();
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                changed = registry.changed() => if changed.is_err() {
                    // The registry's task has ended: the last membership is all there will be.
                    shutdown.cancelled().await;
                    break;
                },
                Some(_) = tasks.join_next() => {}
            }
        }
        tasks.shutdown().await;
    }

    fn carry_out(
        &self,
        change: Change,
        followed: &mut HashMap<NodeId, CancellationToken>,
        tasks: &mut JoinSet<()>,
        shutdown: &CancellationToken,
    ) {
        match change {
            Change::Unfollow(id) => {
                if let Some(token) = followed.remove(&id) {
                    token.cancel();
                }
            }
            Change::Follow(record) => {
                let token = shutdown.child_token();
                if let Some(older) = followed.insert(record.id.clone(), token.clone()) {
                    older.cancel();
                }
                let member = Member {
                    record: *record,
                    cluster: self.cluster.clone(),
                    channels: self.channels.clone(),
                };
                tasks.spawn(async move {
                    token.run_until_cancelled(member.follow()).await;
                });
            }
        }
    }

    fn warn_of_strangers(&self) {
        for record in self.cluster.lock().strangers() {
            tracing::warn!(
                node_id = %record.id,
                model = record.model,
                "the node serves other weights under this model's name and gets no requests"
            );
        }
    }
}

/// One incarnation of one node.
struct Member {
    record: NodeRecord,
    cluster: SharedCluster,
    channels: Channels,
}

impl Member {
    async fn follow(self) {
        // Each side goes on without the other one, and both stop once the state wants neither.
        tokio::join!(self.follow_load(), self.follow_log());
        tracing::debug!(node_id = %self.record.id, epoch = %self.record.epoch, "node is no longer followed");
    }

    async fn follow_load(&self) {
        let mut backoff = self.backoff("load");
        loop {
            let error = self.load_stream(&mut backoff).await;
            let (id, epoch) = (&self.record.id, self.record.epoch);
            tracing::debug!(node_id = %id, %error, "load stream ended");
            if !self
                .cluster
                .change(|cluster| cluster.report_stream_ended(id, epoch))
            {
                return;
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    async fn load_stream(&self, backoff: &mut Backoff) -> Error {
        let opened = async {
            let channel = self.channels.get(&self.record.grpc_endpoint)?;
            let request = v1::WatchLoadRequest {
                interval_ms: REPORT_INTERVAL.as_millis() as u64,
            };
            open(NodeClient::new(channel).watch_load(request)).await
        };
        let mut stream = match opened.await {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        let mut first = true;
        loop {
            let report = match tokio::time::timeout(REPORT_SILENCE_MAX, stream.message()).await {
                Ok(Ok(Some(report))) => proto::convert::load(&report),
                Ok(Ok(None)) => return Error::unavailable("the node ended the stream"),
                Ok(Err(status)) => return proto::status::from_status(&status),
                Err(_) => return Error::new(ErrorCode::Timeout, "no report came for too long"),
            };
            backoff.reset();
            let (id, epoch) = (&self.record.id, self.record.epoch);
            let apply = |cluster: &mut Cluster| cluster.reported(id, epoch, report, Instant::now());
            if first {
                self.cluster.change(apply);
                first = false;
            } else {
                apply(&mut self.cluster.lock());
            }
        }
    }

    async fn follow_log(&self) {
        let mut backoff = self.backoff("log");
        let mut follower = Follower::new();
        loop {
            let error = self.log_stream(&mut follower, &mut backoff).await;
            let (id, epoch) = (&self.record.id, self.record.epoch);
            tracing::debug!(node_id = %id, %error, "log stream ended");
            if !self.cluster.change(|cluster| cluster.log_stream_ended(id, epoch)) {
                return;
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    /// A quiet log is a healthy one: a broken connection shows by the channel's own keep-alive.
    async fn log_stream(&self, follower: &mut Follower, backoff: &mut Backoff) -> Error {
        let (epoch, from_sequence) = follower.resume();
        let opened = async {
            let channel = self.channels.get(&self.record.grpc_endpoint)?;
            let request = v1::WatchRequest {
                epoch: epoch.0,
                from_sequence,
            };
            let mut client = KvStoreClient::new(channel).max_decoding_message_size(proto::MESSAGE_BYTES_MAX);
            open(client.watch(request)).await
        };
        let mut stream = match opened.await {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        if follower.sequence().is_some() {
            self.cluster
                .change(|cluster| cluster.log_resumed(&self.record.id, self.record.epoch));
        }
        loop {
            let batch = match stream.message().await {
                Ok(Some(batch)) => Batch::from_wire(&batch),
                Ok(None) => return Error::unavailable("the node ended the stream"),
                Err(status) => return proto::status::from_status(&status),
            };
            let batch = match batch {
                Ok(batch) => batch,
                Err(error) => {
                    follower.reset();
                    return error;
                }
            };
            if batch.epoch != self.record.epoch {
                // Another incarnation answers at this address; the registry will tell which.
                follower.reset();
                return Error::new(
                    ErrorCode::Fenced,
                    format!(
                        "the log is of epoch {}, but the node's is {}",
                        batch.epoch, self.record.epoch
                    ),
                );
            }
            match follower.apply(batch) {
                Ok(applied) => {
                    backoff.reset();
                    self.cluster
                        .lock()
                        .logged(&self.record.id, self.record.epoch, &applied);
                }
                Err(gap) => {
                    follower.reset();
                    return Error::new(ErrorCode::Fenced, gap.to_string());
                }
            }
        }
    }

    fn backoff(&self, stream: &str) -> Backoff {
        let seed = backoff::seed(&format!("{} {stream}", self.record.id));
        Backoff::new(RETRY_FIRST, RETRY_LONGEST, seed)
    }
}

async fn open<T>(
    call: impl Future<Output = Result<tonic::Response<Streaming<T>>, Status>>,
) -> Result<Streaming<T>, Error> {
    match tokio::time::timeout(OPEN_DEADLINE, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(proto::status::from_status(&status)),
        Err(_) => Err(Error::new(ErrorCode::Timeout, "the node did not answer in time")),
    }
}
