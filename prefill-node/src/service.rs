//! A prefill node's service: starts the engine, accepts streams, drains.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use engine::{Engine, Model};
use kv_store::{SequenceBlocks, Store};
use node::Recall;
use node::task::{self, OnEnd};
use node::{Channels, Identity, LoadSource};
use proto::v1::prefill_server::{Prefill, PrefillServer};
use proto::{status, v1};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;
use types::{Error, LoadReport};

use crate::Config;
use crate::engine_loop::{self, EngineLoop, Job};
use crate::metrics::Metrics;
use crate::peer::EVENTS_MAX;
use crate::rates::{StepRate, TransferRate};
use crate::request::Accepts;
use crate::schedule::{Limits, Schedule};
use crate::session;
use crate::shared::Shared;

/// A client that found every session taken comes back after this; sessions end all the time.
const SESSIONS_RETRY_AFTER_MS: u64 = 100;

/// What a prefill node works with.
#[derive(Debug, Clone)]
pub struct Deps {
    /// Who it is. The store's epoch is the same.
    pub identity: Identity,
    /// What it computes.
    pub model: Arc<Model>,
    /// Its blocks. The engine computes in the store's memory.
    pub store: Store,
    /// Connections to peers, for prefixes they have.
    pub channels: Channels,
    /// Where it counts.
    pub metrics: node::Metrics,
}

/// A prefill node that is ready to run.
pub struct Service {
    handle: Handle,
    jobs: mpsc::Sender<Job>,
    engine_alive: oneshot::Receiver<()>,
}

/// The node as its servers see it: the gRPC service, and the source of its load reports. Clones are one and the same.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Service {
    /// Starts the engine's thread. Nothing is accepted before [`Handle::grpc`] is served.
    ///
    /// # Errors
    ///
    /// [`types::ErrorCode::Invalid`] for a setting that cannot work; the engine's own if it does not fit the store.
    pub fn new(config: Config, deps: Deps) -> Result<Self, Error> {
        config.validate()?;
        let Deps {
            identity,
            model,
            store,
            channels,
            metrics,
        } = deps;
        let layout = store.layout();
        let threads = config.threads.unwrap_or_else(all_cores);
        let mut engine = Engine::new(model.clone(), store.memory(), layout, threads)?;
        let metrics = metrics.once(Metrics::register);
        let schedule = Arc::new(Mutex::new(Schedule::new(Limits {
            requests_max: config.queue_requests_max,
            tokens_max: config.queue_tokens_max,
            step_tokens: config.step_tokens,
            step_sequences_max: config.step_sequences_max,
            block_tokens: layout.block_tokens,
        })));
        let step_rate = Arc::new(Mutex::new(calibrated(&mut engine, &store)));
        let (jobs_tx, jobs_rx) = mpsc::channel(config.queue_requests_max);
        let engine_loop = EngineLoop {
            engine,
            block_tokens: layout.block_tokens,
            schedule: schedule.clone(),
            rate: step_rate.clone(),
            metrics: metrics.clone(),
        };
        let engine_alive = engine_loop::spawn(engine_loop, jobs_rx)
            .map_err(|error| Error::internal(format!("the engine's thread cannot start: {error}")))?;
        let stop = CancellationToken::new();
        let shared = Shared {
            node_id: identity.id,
            accepts: Accepts {
                kv_root: store.common_root(),
                epoch: identity.epoch,
                vocabulary: model.config().vocabulary,
                context_tokens_max: model.config().context_tokens_max,
                capacity_blocks: store.capacity(),
                layout,
                timeout_max: config.request_timeout_max,
            },
            memory: Arc::new(Semaphore::new(store.capacity().min(Semaphore::MAX_PERMITS))),
            session_permits: Arc::new(Semaphore::new(config.sessions_max)),
            jobs: jobs_tx.downgrade(),
            transfer_rate: Mutex::new(TransferRate::default()),
            ending: CancellationToken::new(),
            moving: Recall::below(stop.clone()),
            stop,
            sessions: TaskTracker::new(),
            config,
            model,
            store,
            channels,
            schedule,
            step_rate,
            metrics,
        };
        Ok(Self {
            handle: Handle {
                shared: Arc::new(shared),
            },
            jobs: jobs_tx,
            engine_alive,
        })
    }

    /// The node as its servers see it.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Runs until `shutdown`, then refuses new requests, lets the running ones end within
    /// [`Config::drain_timeout`], stops the rest, and waits for the engine.
    ///
    /// # Errors
    ///
    /// [`types::ErrorCode::Internal`] if the engine's thread ended by itself: the node cannot serve any more.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let Self {
            handle,
            jobs,
            mut engine_alive,
        } = self;
        let shared = &handle.shared;
        let died = tokio::select! {
            () = shutdown.cancelled() => false,
            _ = &mut engine_alive => true,
        };
        shared.ending.cancel();
        shared.sessions.close();
        if died {
            shared.stop.cancel();
            return Err(Error::internal("the engine's thread ended by itself"));
        }
        if timeout(shared.config.drain_timeout, shared.sessions.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                sessions = shared.sessions.len(),
                "requests still ran when the drain's deadline passed"
            );
            shared.stop.cancel();
            // Each one still tells its decode node, and waits for its writes as long as that may take.
            let patience = shared.config.quiesce_timeout * 2;
            if timeout(patience, shared.sessions.wait()).await.is_err() {
                tracing::error!(
                    sessions = shared.sessions.len(),
                    "requests did not end when they were stopped"
                );
            }
        }
        drop(jobs);
        // A job that was cancelled is dropped within a layer.
        if timeout(shared.config.quiesce_timeout, engine_alive)
            .await
            .is_err()
        {
            tracing::error!("the engine did not end");
        }
        Ok(())
    }
}

/// What the engine's speed is before the first request. A pool without room says nothing, and the first steps will.
fn calibrated(engine: &mut Engine, store: &Store) -> StepRate {
    let mut rate = StepRate::default();
    let Ok(scratch) = SequenceBlocks::scratch(store, engine::CALIBRATION_TOKENS) else {
        return rate;
    };
    match engine.calibrate(scratch.block_ids()) {
        Ok(calibration) => {
            for (positions, took) in calibration.iter().flat_map(|calibration| &calibration.prompts) {
                rate.observe([positions].into_iter(), took.as_secs_f64() * 1e3);
            }
        }
        Err(error) => tracing::warn!(%error, "the engine's speed could not be measured"),
    }
    rate
}

impl Handle {
    /// The service in the form that a server takes.
    pub fn grpc(&self) -> PrefillServer<Self> {
        PrefillServer::new(self.clone())
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    /// Refuses new requests from now on; what runs goes on.
    pub fn drain(&self) {
        self.shared.store.set_draining(true);
    }

    /// Takes requests again after [`Handle::drain`]. A node that ends takes none.
    pub fn resume(&self) {
        self.shared.store.set_draining(false);
    }

    /// Ends the requests that run, so that they go on elsewhere.
    pub fn move_away(&self) {
        self.shared.moving.end();
    }

    /// Requests that were accepted and have not ended.
    pub fn requests(&self) -> usize {
        self.shared.sessions.len()
    }
}

impl LoadSource for Handle {
    fn load(&self) -> LoadReport {
        self.shared.load()
    }
}

#[tonic::async_trait]
impl Prefill for Handle {
    type PrefillStream = ReceiverStream<Result<v1::PrefillEvent, Status>>;

    async fn prefill(
        &self,
        request: Request<Streaming<v1::PrefillCommand>>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let shared = self.shared.clone();
        if shared.is_draining() {
            return Err(status::to_status(&Error::unavailable(
                "the prefill node is draining",
            )));
        }
        let permit = shared.session_permits.clone().try_acquire_owned().map_err(|_| {
            let message = format!("all {} sessions are taken", shared.config.sessions_max);
            status::to_status(&Error::overloaded(message, SESSIONS_RETRY_AFTER_MS))
        })?;
        let (events_tx, events_rx) = mpsc::channel(EVENTS_MAX);
        let sessions = shared.sessions.clone();
        let span = tracing::info_span!(
            "prefill",
            request_id = tracing::field::Empty,
            trace_id = tracing::field::Empty,
            node_id = %shared.node_id,
        );
        if let Some(parent) = proto::trace::read(request.metadata()) {
            span.record("trace_id", format_args!("{:032x}", parent.trace));
        }
        let session = async move {
            session::run(shared, request.into_inner(), events_tx).await;
            drop(permit);
            Ok::<(), Error>(())
        };
        task::spawn(
            "prefill-session",
            OnEnd::Log,
            sessions.track_future(session.instrument(span)),
        );
        Ok(Response::new(ReceiverStream::new(events_rx)))
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle")
            .field("load", &self.shared.load())
            .finish()
    }
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service")
            .field("handle", &self.handle)
            .finish_non_exhaustive()
    }
}

fn all_cores() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}
