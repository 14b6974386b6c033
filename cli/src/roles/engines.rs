//! What a process with a pool does beside holding blocks: it prefills, or decodes, or neither while no model is loaded.
//!
//! A service starts when its role is taken for the first time, and goes on until the model is unloaded or the process ends: a request
//! that comes to a node that has just changed from one to the other is served all the same. A role says what routers send, and not
//! what the node could do.
//!
//! Invariant: what is loaded computes in the pool's own space. A file that was replaced meanwhile is refused.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use engine::{Model, Numerics};
use kv_store::Store;
use kv_store::store_node::StoreNode;
use node::task::{self, OnEnd};
use node::{Channels, Identity, LoadSource, Metrics, Shutdown};
use proto::status::to_status;
use proto::v1;
use proto::v1::decode_server::{Decode, DecodeServer};
use proto::v1::prefill_server::{Prefill, PrefillServer};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use types::{Error, ErrorCode, LoadReport, Role};

use super::Process;

/// Both services over one model and one pool. Clones are one and the same.
#[derive(Clone)]
pub(super) struct Engines {
    shared: Arc<Shared>,
}

struct Shared {
    prefill_config: prefill_node::Config,
    decode_config: decode_node::Config,
    identity: Identity,
    source: ModelSource,
    pool: StoreNode,
    channels: Channels,
    metrics: Metrics,
    shutdown: Shutdown,
    state: RwLock<State>,
}

/// Where the process gets its model.
#[derive(Debug, Clone)]
pub(super) struct ModelSource {
    pub(super) path: PathBuf,
    pub(super) numerics: Numerics,
}

struct State {
    role: Role,
    loaded: Loaded,
}

/// A model in memory, and the services that use it.
struct Loaded {
    model: Option<Arc<Model>>,
    prefill: Option<prefill_node::Handle>,
    decode: Option<decode_node::Handle>,
    /// Ends the services, and nothing else.
    stop: CancellationToken,
    running: TaskTracker,
}

impl ModelSource {
    /// Reads the weights.
    ///
    /// # Errors
    ///
    /// Those of [`Model::load`].
    pub(super) async fn load(&self) -> Result<Arc<Model>, Error> {
        let Self { path, numerics } = self.clone();
        let started = std::time::Instant::now();
        let model = task::blocking("model-load", move || Model::load(&path, numerics)).await??;
        tracing::info!(
            model = %self.path.display(),
            weight_bytes = model.weight_bytes(),
            seconds = started.elapsed().as_secs_f32(),
            "model loaded"
        );
        Ok(model)
    }
}

impl Engines {
    /// Nothing runs yet. `model` is what is loaded already, if the process is to compute from its start.
    pub(super) fn new(
        process: &Process,
        source: ModelSource,
        model: Option<Arc<Model>>,
        pool: StoreNode,
    ) -> Self {
        let settings = &process.settings;
        let threads = settings.model.engine_threads();
        let loaded = Loaded {
            model,
            ..Loaded::nothing(&process.shutdown)
        };
        Self {
            shared: Arc::new(Shared {
                prefill_config: settings.prefill.config(threads),
                decode_config: settings.decode.config(threads),
                identity: process.identity.clone(),
                source,
                pool,
                channels: process.channels.clone(),
                metrics: process.metrics.clone(),
                shutdown: process.shutdown.clone(),
                state: RwLock::new(State {
                    role: process.identity.role,
                    loaded,
                }),
            }),
        }
    }

    /// Starts the service of a role, unless it has started, and loads the model for it, unless that is loaded. Neither this nor
    /// [`Engines::unload`] must overlap with another call of the two.
    ///
    /// # Errors
    ///
    /// The model's and the service's own. `conflict` where the model's file is not the one that the pool is for. `invalid` for a
    /// router, which has no pool.
    pub(super) async fn start(&self, role: Role) -> Result<(), Error> {
        match role {
            Role::Prefill if self.read().loaded.prefill.is_none() => self.start_prefill().await,
            Role::Decode if self.read().loaded.decode.is_none() => self.start_decode().await,
            Role::Prefill | Role::Decode | Role::Store => Ok(()),
            Role::Router => {
                let message = "role is router, but a node with a pool is a prefill, decode or store node";
                Err(Error::invalid("role", message))
            }
        }
    }

    async fn start_prefill(&self) -> Result<(), Error> {
        let (shared, model) = (Arc::clone(&self.shared), self.model().await?);
        let start = move || {
            let deps = prefill_node::Deps {
                identity: shared.identity.clone(),
                model,
                store: shared.store().clone(),
                channels: shared.channels.clone(),
                metrics: shared.metrics.clone(),
            };
            prefill_node::Service::new(shared.prefill_config.clone(), deps)
        };
        let service = task::blocking("prefill-start", start).await??;
        self.write().loaded.prefill = Some(service.handle());
        self.run(|stop| service.run(stop));
        Ok(())
    }

    async fn start_decode(&self) -> Result<(), Error> {
        let (shared, model) = (Arc::clone(&self.shared), self.model().await?);
        let start = move || {
            let deps = decode_node::Deps {
                identity: shared.identity.clone(),
                model,
                store: shared.store().clone(),
                channels: shared.channels.clone(),
                metrics: shared.metrics.clone(),
            };
            decode_node::Service::new(shared.decode_config.clone(), deps)
        };
        let service = task::blocking("decode-start", start).await??;
        self.write().loaded.decode = Some(service.handle());
        self.run(|stop| service.run(stop));
        Ok(())
    }

    /// The model, which is loaded if it is not.
    async fn model(&self) -> Result<Arc<Model>, Error> {
        if let Some(model) = &self.read().loaded.model {
            return Ok(Arc::clone(model));
        }
        let shared = &self.shared;
        let model = shared.source.load().await?;
        let block_tokens = shared.store().layout().block_tokens;
        if model.kv_space(block_tokens) != *shared.store().space() {
            let message = format!(
                "{} is not the model any more that this node has blocks of: start the node again to serve it",
                shared.source.path.display()
            );
            return Err(Error::new(ErrorCode::Conflict, message));
        }
        self.write().loaded.model = Some(Arc::clone(&model));
        Ok(model)
    }

    fn run<F>(&self, service: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let (stop, running) = {
            let loaded = &self.read().loaded;
            (loaded.stop.clone(), loaded.running.clone())
        };
        let on_end = OnEnd::FailProcessUnless(self.shared.shutdown.clone(), stop.clone());
        task::spawn("engine", on_end, running.track_future(service(stop)));
    }

    /// Ends the services and frees the model. The caller has let requests end; whoever comes now is told to go elsewhere.
    pub(super) async fn unload(&self) {
        let unloaded = std::mem::replace(&mut self.write().loaded, Loaded::nothing(&self.shared.shutdown));
        unloaded.stop.cancel();
        unloaded.running.close();
        unloaded.running.wait().await;
        // Freeing gigabytes takes the system a while.
        let freed = task::blocking("model-unload", move || {
            drop(unloaded);
            Ok::<(), Error>(())
        });
        if let Err(error) | Ok(Err(error)) = freed.await {
            tracing::warn!(%error, "the model's memory may not be free");
        }
        tracing::info!(model = %self.shared.source.path.display(), "model unloaded");
    }

    /// Waits until the process is told to end, and its services have ended.
    pub(super) async fn ended(self) {
        self.shared.shutdown.started().await;
        let running = self.read().loaded.running.clone();
        running.close();
        running.wait().await;
    }

    /// What the node is now.
    pub(super) fn role(&self) -> Role {
        self.read().role
    }

    /// Reports as a node of this role from now on, whose service has started.
    pub(super) fn set_role(&self, role: Role) {
        self.write().role = role;
    }

    /// Requests that were accepted and have not ended, in whichever role.
    pub(super) fn requests(&self) -> usize {
        let loaded = &self.read().loaded;
        let prefilling = loaded.prefill.as_ref().map_or(0, prefill_node::Handle::requests);
        let decoding = loaded.decode.as_ref().map_or(0, decode_node::Handle::requests);
        prefilling + decoding
    }

    /// Ends those requests, so that they go on elsewhere.
    pub(super) fn move_away(&self) {
        let loaded = &self.read().loaded;
        if let Some(prefill) = &loaded.prefill {
            prefill.move_away();
        }
        if let Some(decode) = &loaded.decode {
            decode.move_away();
        }
    }

    /// The `Prefill` service in the form that a server takes.
    pub(super) fn prefill_server(&self) -> PrefillServer<Self> {
        PrefillServer::new(self.clone())
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    /// The `Decode` service in the form that a server takes.
    pub(super) fn decode_server(&self) -> DecodeServer<Self> {
        DecodeServer::new(self.clone())
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    // Both fields are written whole, so a panic leaves nothing half done.

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.shared.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.shared.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn store(&self) -> &Store {
        self.pool.store()
    }
}

impl Loaded {
    /// Services that start with it end with the process at the latest.
    fn nothing(shutdown: &Shutdown) -> Self {
        Self {
            model: None,
            prefill: None,
            decode: None,
            stop: shutdown.token().child_token(),
            running: TaskTracker::new(),
        }
    }
}

impl LoadSource for Engines {
    fn load(&self) -> LoadReport {
        let state = self.read();
        let load = match state.role {
            Role::Prefill => state.loaded.prefill.as_ref().map(LoadSource::load),
            Role::Decode => state.loaded.decode.as_ref().map(LoadSource::load),
            Role::Router | Role::Store => None,
        };
        load.unwrap_or_else(|| self.shared.pool.load())
    }
}

fn not_loaded(role: Role) -> Status {
    to_status(&Error::unavailable(format!("this node is no {role} node")))
}

#[tonic::async_trait]
impl Prefill for Engines {
    type PrefillStream = <prefill_node::Handle as Prefill>::PrefillStream;

    async fn prefill(
        &self,
        request: Request<Streaming<v1::PrefillCommand>>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let prefill = self.read().loaded.prefill.clone();
        match prefill {
            Some(prefill) => prefill.prefill(request).await,
            None => Err(not_loaded(Role::Prefill)),
        }
    }
}

#[tonic::async_trait]
impl Decode for Engines {
    type DecodeStream = <decode_node::Handle as Decode>::DecodeStream;

    async fn decode(
        &self,
        request: Request<v1::DecodeRequest>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let decode = self.read().loaded.decode.clone();
        match decode {
            Some(decode) => decode.decode(request).await,
            None => Err(not_loaded(Role::Decode)),
        }
    }
}
