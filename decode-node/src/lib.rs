//! Owns a request's life: receives KV, batches, streams tokens.
//!
//! A request comes in over gRPC and leaves as tokens. In between it gets its KV, from a prefill node by a handoff or
//! by prefilling here, and a seat in the batch of the one engine, where all sequences advance token by token.
//!
//! Architecture invariants:
//! - the client's stream is the only owner of a request: when it is dropped, everything below it ends;
//! - a request waits for memory without holding any, or holds memory that an older one may take;
//! - memory that was offered to a prefill node comes back through our own transport's fence, and its bytes are believed
//!   only if they match their checksums;
//! - the tokens of a request do not depend on how it was batched, preempted, resumed or prefilled.
//!
//! Where things are, the pure modules first:
//! - [`batch`]: who computes what in the next step; [`handoff`]: when offered memory may be used;
//! - [`output`]: tokens to text and ends; [`rates`]: how fast this node is;
//! - `service.rs`: what is accepted; `request.rs`: the life of a request; `receive.rs`: its handoff;
//! - `engine_loop.rs`: the thread of the engine.
//!
//! Elsewhere: where a request is placed (`router`), the other side of the handoff (`prefill-node`), blocks
//! (`kv-store`), the arithmetic (`engine`).

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use engine::{Engine, Model};
use kv_store::{SequenceBlocks, Store};
use node::{Channels, Identity, Metrics};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use types::{Error, Millis};

pub mod batch;
pub mod config;
mod engine_loop;
pub mod handoff;
mod metrics;
pub mod output;
pub mod pace;
pub mod rates;
mod receive;
mod request;
mod service;
mod shared;

pub use config::Config;
pub use service::Handle;

use crate::engine_loop::{Command, EngineLoop};
use crate::pace::Work;
use crate::shared::Shared;

/// How long interrupted requests may take to give back what they hold. Fences close in milliseconds.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// What a node works with.
pub struct Deps {
    /// What it computes.
    pub model: Arc<Model>,
    /// Its blocks: the engine computes in the store's memory.
    pub store: Store,
    /// To its peers.
    pub channels: Channels,
    /// Where it counts.
    pub metrics: Metrics,
    /// Who it is.
    pub identity: Identity,
}

/// A decode node that is ready to run.
pub struct Service {
    shared: Arc<Shared>,
    engine: Engine,
    commands: mpsc::Receiver<Command>,
}

impl Service {
    /// Prepares the engine. Requests that come before [`Service::run`] wait.
    ///
    /// # Errors
    ///
    /// [`types::ErrorCode::Invalid`] for settings that cannot work, and what the engine says of the store's memory.
    pub fn new(config: Config, deps: Deps) -> Result<Self, Error> {
        config.validate()?;
        let cores = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let threads = config.threads.unwrap_or_else(cores);
        let mut engine = Engine::new(
            deps.model.clone(),
            deps.store.memory(),
            deps.store.layout(),
            threads,
        )?;
        // A place for every request that is accepted, and one for the end.
        let (commands_tx, commands) = mpsc::sync_channel(config.requests_max + 1);
        let shared = Arc::new(Shared::new(config, deps, commands_tx));
        calibrate(&mut engine, &shared);
        Ok(Self {
            shared,
            engine,
            commands,
        })
    }

    /// What serves and reports. Cheap to clone.
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(&self.shared))
    }

    /// Runs until `shutdown`, then refuses new requests and lets those that run go on for
    /// [`Config::drain_timeout`]. When it returns, all blocks are given back.
    ///
    /// # Errors
    ///
    /// [`types::ErrorCode::Internal`] if the engine's thread ended before its time.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let Self {
            shared,
            engine,
            commands,
        } = self;
        let engine_loop = EngineLoop::new(Arc::clone(&shared), engine, commands);
        let (ended_tx, mut ended) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("decode-engine".to_owned());
        let thread = thread.spawn(move || {
            // Dropped at the end of the thread, also by a panic: that is the message.
            let _ended = ended_tx;
            engine_loop.run();
        });
        let thread = thread.map_err(|error| Error::internal(format!("thread decode-engine: {error}")))?;
        let lost = tokio::select! {
            () = shutdown.cancelled() => false,
            _ = &mut ended => true,
        };
        Handle::new(Arc::clone(&shared)).end();
        if !lost && !all_ended(&shared, shared.config.drain_timeout).await {
            tracing::info!(
                requests = shared.accepted(),
                "requests are still running, ending them"
            );
        }
        shared.stopping.cancel();
        shared.stop_engine();
        if !lost {
            // Bounded by one layer of one step: the engine looks at `stopping` before each.
            let _ = ended.await;
        }
        // Requests that were interrupted close their fences; a peer that holds one up is cut off by the transport.
        all_ended(&shared, STOP_TIMEOUT).await;
        match thread.join() {
            Ok(()) if !lost => Ok(()),
            Ok(()) | Err(_) => Err(Error::internal("the engine's thread ended before its time")),
        }
    }
}

/// Measures how fast the engine is before the first request. A pool without room says nothing, and the first steps will.
fn calibrate(engine: &mut Engine, shared: &Shared) {
    let Ok(scratch) = SequenceBlocks::scratch(&shared.store, engine::CALIBRATION_TOKENS) else {
        return;
    };
    let ms = |took: Duration| Millis(took.as_secs_f64() * 1e3);
    match engine.calibrate(scratch.block_ids()) {
        Ok(None) => {}
        Ok(Some(calibration)) => {
            let mut progress = shared.progress();
            let decodes = Work {
                decodes: true,
                ..Work::default()
            };
            progress.pace.observe(&decodes, ms(calibration.decode_step));
            for (positions, took) in calibration.prompts {
                let mut work = Work::default();
                work.add_prompt(&positions);
                progress.pace.observe(&work, ms(took));
            }
        }
        Err(error) => tracing::warn!(%error, "the engine's speed could not be measured"),
    }
}

/// Waits until no request is left, but no longer than `timeout`. False if some are.
async fn all_ended(shared: &Shared, timeout: Duration) -> bool {
    let all = u32::try_from(shared.config.requests_max).unwrap_or(u32::MAX);
    tokio::time::timeout(timeout, shared.requests.acquire_many(all))
        .await
        .is_ok()
}
