//! What a process with an engine does: it prefills or decodes, and either once it was told to change.
//!
//! A service starts when its role is taken for the first time, and goes on until the process ends: a request that comes to a node
//! that has just changed its role is served all the same. A role says what routers send, and not what the node could do.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use engine::Model;
use kv_store::Store;
use node::task::{self, OnEnd};
use node::{Channels, Identity, LoadSource, Metrics, Shutdown};
use proto::status::to_status;
use proto::v1;
use proto::v1::decode_server::{Decode, DecodeServer};
use proto::v1::prefill_server::{Prefill, PrefillServer};
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use types::{Error, LoadReport, Role};

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
    model: Arc<Model>,
    store: Store,
    channels: Channels,
    metrics: Metrics,
    shutdown: Shutdown,
    role: Mutex<Role>,
    prefill: OnceLock<prefill_node::Handle>,
    decode: OnceLock<decode_node::Handle>,
    running: TaskTracker,
}

impl Engines {
    /// Nothing runs yet.
    pub(super) fn new(process: &Process, model: Arc<Model>, store: Store) -> Self {
        let settings = &process.settings;
        let threads = settings.model.engine_threads();
        Self {
            shared: Arc::new(Shared {
                prefill_config: settings.prefill.config(threads),
                decode_config: settings.decode.config(threads),
                identity: process.identity.clone(),
                model,
                store,
                channels: process.channels.clone(),
                metrics: process.metrics.clone(),
                shutdown: process.shutdown.clone(),
                role: Mutex::new(process.identity.role),
                prefill: OnceLock::new(),
                decode: OnceLock::new(),
                running: TaskTracker::new(),
            }),
        }
    }

    /// Starts the service of a role, unless it has started. Calls of one role must not overlap.
    ///
    /// # Errors
    ///
    /// The service's own; `invalid` for a role without an engine.
    pub(super) async fn start(&self, role: Role) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        match role {
            Role::Prefill if shared.prefill.get().is_none() => {
                let start = {
                    let shared = Arc::clone(&shared);
                    move || prefill_node::Service::new(shared.prefill_config.clone(), shared.prefill_deps())
                };
                let service = task::blocking("prefill-start", start).await??;
                let _ = shared.prefill.set(service.handle());
                self.run(service.run(shared.shutdown.token()));
            }
            Role::Decode if shared.decode.get().is_none() => {
                let start = {
                    let shared = Arc::clone(&shared);
                    move || decode_node::Service::new(shared.decode_config.clone(), shared.decode_deps())
                };
                let service = task::blocking("decode-start", start).await??;
                let _ = shared.decode.set(service.handle());
                self.run(service.run(shared.shutdown.token()));
            }
            Role::Prefill | Role::Decode => {}
            Role::Router | Role::Store => {
                let message =
                    format!("role is {role}, but a node with an engine is a prefill node or a decode node");
                return Err(Error::invalid("role", message));
            }
        }
        Ok(())
    }

    fn run(&self, service: impl Future<Output = Result<(), Error>> + Send + 'static) {
        let shared = &self.shared;
        let on_end = OnEnd::FailProcess(shared.shutdown.clone());
        task::spawn("engine", on_end, shared.running.track_future(service));
    }

    /// Waits until the process is told to end, and its services have ended.
    pub(super) async fn ended(self) {
        self.shared.shutdown.started().await;
        self.shared.running.close();
        self.shared.running.wait().await;
    }

    /// What the node is now.
    pub(super) fn role(&self) -> Role {
        *self.current()
    }

    /// Reports as a node of this role from now on, whose service has started.
    pub(super) fn set_role(&self, role: Role) {
        *self.current() = role;
    }

    /// Requests that were accepted and have not ended, in whichever role.
    pub(super) fn requests(&self) -> usize {
        let shared = &self.shared;
        let prefilling = shared.prefill.get().map_or(0, prefill_node::Handle::requests);
        let decoding = shared.decode.get().map_or(0, decode_node::Handle::requests);
        prefilling + decoding
    }

    /// Ends those requests, so that they go on elsewhere.
    pub(super) fn move_away(&self) {
        if let Some(prefill) = self.shared.prefill.get() {
            prefill.move_away();
        }
        if let Some(decode) = self.shared.decode.get() {
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

    fn current(&self) -> MutexGuard<'_, Role> {
        // It is written whole, so a panic leaves nothing half done.
        self.shared.role.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn prefill_deps(&self) -> prefill_node::Deps {
        prefill_node::Deps {
            identity: self.identity.clone(),
            model: self.model.clone(),
            store: self.store.clone(),
            channels: self.channels.clone(),
            metrics: self.metrics.clone(),
        }
    }

    fn decode_deps(&self) -> decode_node::Deps {
        decode_node::Deps {
            identity: self.identity.clone(),
            model: self.model.clone(),
            store: self.store.clone(),
            channels: self.channels.clone(),
            metrics: self.metrics.clone(),
        }
    }
}

impl LoadSource for Engines {
    fn load(&self) -> LoadReport {
        let shared = &self.shared;
        let load = match self.role() {
            Role::Prefill => shared.prefill.get().map(LoadSource::load),
            Role::Decode => shared.decode.get().map(LoadSource::load),
            Role::Router | Role::Store => None,
        };
        load.unwrap_or_default()
    }
}

fn never_started(role: Role) -> Status {
    to_status(&Error::unavailable(format!("this node is no {role} node")))
}

#[tonic::async_trait]
impl Prefill for Engines {
    type PrefillStream = <prefill_node::Handle as Prefill>::PrefillStream;

    async fn prefill(
        &self,
        request: Request<Streaming<v1::PrefillCommand>>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        match self.shared.prefill.get() {
            Some(prefill) => prefill.prefill(request).await,
            None => Err(never_started(Role::Prefill)),
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
        match self.shared.decode.get() {
            Some(decode) => decode.decode(request).await,
            None => Err(never_started(Role::Decode)),
        }
    }
}
