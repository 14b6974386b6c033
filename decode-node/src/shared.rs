//! What the parts of a node share: who it is, what it works with, and what it last knew of itself.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use engine::Model;
use kv_store::Store;
use node::{Channels, Recall};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use types::{Error, LoadReport, NodeId, TransferId};

use crate::Deps;
use crate::batch::SequenceId;
use crate::config::Config;
use crate::engine_loop::{Command, Job};
use crate::metrics::Metrics;
use crate::pace::Pace;
use crate::rates::Smoothed;

/// Shortest and longest time after which a refused client is told to come back.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) node_id: NodeId,
    pub(crate) model: Arc<Model>,
    pub(crate) store: Store,
    pub(crate) channels: Channels,
    pub(crate) metrics: Metrics,
    /// Longest sequence that the model and the pool can hold.
    pub(crate) context_tokens: usize,
    /// One permit per accepted request, from its acceptance until its blocks are given back.
    pub(crate) requests: Arc<Semaphore>,
    /// No new requests, since the process ends. The store says whether an operator drained the node.
    pub(crate) ending: AtomicBool,
    /// Requests that run are to end now.
    pub(crate) stopping: CancellationToken,
    /// The same for those that run, and not for those that come.
    pub(crate) moving: Recall,
    /// Whether a sequence waits for blocks, so that nobody outside of the batch should take any.
    pub(crate) short_of_blocks: watch::Sender<bool>,
    commands: SyncSender<Command>,
    next_sequence: AtomicU64,
    next_transfer: AtomicU64,
    progress: Mutex<Progress>,
}

/// What the engine's thread says of its batch after every step, and what requests say of themselves.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) running: usize,
    pub(crate) prefill_tokens: usize,
    pub(crate) resident_tokens: usize,
    pub(crate) pace: Pace,
    pub(crate) transfer_bytes_per_ms: Smoothed,
    pub(crate) request_ms: Smoothed,
}

impl Shared {
    pub(crate) fn new(config: Config, deps: Deps, commands: SyncSender<Command>) -> Self {
        let Deps {
            model,
            store,
            channels,
            metrics,
            identity,
        } = deps;
        let pool_tokens = store.capacity() * store.layout().block_tokens;
        let stopping = CancellationToken::new();
        Self {
            node_id: identity.id,
            metrics: metrics.once(Metrics::register),
            context_tokens: model.config().context_tokens_max.min(pool_tokens),
            requests: Arc::new(Semaphore::new(config.requests_max)),
            ending: AtomicBool::new(false),
            moving: Recall::below(stopping.clone()),
            stopping,
            short_of_blocks: watch::Sender::new(false),
            commands,
            next_sequence: AtomicU64::new(0),
            // Offers of different incarnations are told apart by their epoch.
            next_transfer: AtomicU64::new(1),
            progress: Mutex::default(),
            config,
            model,
            store,
            channels,
        }
    }

    /// The age of a request that is accepted now.
    pub(crate) fn next_sequence(&self) -> SequenceId {
        SequenceId(self.next_sequence.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn next_transfer(&self) -> TransferId {
        TransferId(self.next_transfer.fetch_add(1, Ordering::Relaxed))
    }

    /// Hands a request to the engine's thread. There is always room: the queue has a place for every permit of
    /// `requests`, and a job carries one.
    pub(crate) fn submit(&self, job: Job) -> Result<(), Error> {
        self.commands
            .try_send(Command::Run(Box::new(job)))
            .map_err(|error| match error {
                TrySendError::Disconnected(_) => Error::unavailable("the engine has stopped"),
                TrySendError::Full(_) => Error::internal("the engine's queue is full"),
            })
    }

    /// Whether a sequence waits for blocks now.
    pub(crate) fn is_short_of_blocks(&self) -> bool {
        *self.short_of_blocks.borrow()
    }

    /// Waits until sequences have waited for blocks for `patience` without a break. Cancel safe, but begins anew.
    pub(crate) async fn starved(&self, patience: Duration) {
        let mut short = self.short_of_blocks.subscribe();
        loop {
            // The sender is our own, so it does not go.
            let _ = short.wait_for(|short| *short).await;
            if tokio::time::timeout(patience, short.wait_for(|short| !*short))
                .await
                .is_err()
            {
                return;
            }
        }
    }

    /// Tells the engine's thread to end.
    pub(crate) fn stop_engine(&self) {
        // Full only if it no longer takes anything, and disconnected only if it has ended.
        let _ = self.commands.try_send(Command::Stop);
    }

    pub(crate) fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress
            .lock()
            .expect("nothing panics while it copies numbers")
    }

    /// Whether new requests are refused.
    pub(crate) fn is_draining(&self) -> bool {
        self.ending.load(Ordering::Relaxed) || self.store.is_draining()
    }

    /// Requests that were accepted and have not ended.
    pub(crate) fn accepted(&self) -> usize {
        self.config.requests_max - self.requests.available_permits()
    }

    /// When one of the accepted requests will probably have ended.
    pub(crate) fn retry_after_ms(&self) -> u64 {
        let request_ms = self.progress().request_ms.get();
        let each = request_ms / self.config.requests_max as f64;
        let (least, most) = RETRY_AFTER;
        let wait = Duration::try_from_secs_f64(each / 1000.0).unwrap_or(most);
        u64::try_from(wait.clamp(least, most).as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn load(&self) -> LoadReport {
        let accepted = self.accepted();
        let blocks = self.store.stats().blocks;
        let (disk_blocks, disk_capacity_blocks) = self.store.disk_blocks();
        let progress = self.progress();
        let (prefill_ms_per_token, prefill_ms_per_token_kilocontext) = progress.pace.prefill_rates();
        LoadReport {
            // The service that sends the reports numbers them.
            sequence: 0,
            queued_requests: accepted.saturating_sub(progress.running) as u64,
            queued_prefill_tokens: progress.prefill_tokens as u64,
            running_sequences: progress.running as u64,
            resident_tokens: progress.resident_tokens as u64,
            free_blocks: blocks.free as u64,
            evictable_blocks: blocks.reclaimable as u64,
            prefill_ms_per_token,
            prefill_ms_per_token_kilocontext,
            decode_step_ms: progress.pace.decode_step_ms(),
            transfer_bytes_per_ms: progress.transfer_bytes_per_ms.get(),
            disk_bytes_per_ms: self.store.disk_bytes_per_ms(),
            draining: self.is_draining() || self.store.is_quarantined(),
            drain: None,
            disk_blocks,
            disk_capacity_blocks,
            cordoned: false,
        }
    }
}
