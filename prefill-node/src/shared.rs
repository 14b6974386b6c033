//! What all sessions of a node, its engine thread and its reports have in common.

use std::sync::{Arc, Mutex};

use engine::Model;
use kv_store::Store;
use node::{Channels, Recall};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use types::{Error, LoadReport, NodeId};

use crate::Config;
use crate::engine_loop::{Job, lock};
use crate::metrics::Metrics;
use crate::overlap::Overlap;
use crate::rates::{StepRate, TransferRate};
use crate::request::Accepts;
use crate::schedule::{Place, Schedule, Ticket};

/// A client that was refused comes back no sooner, whatever the prediction.
const RETRY_AFTER_MS_MIN: f64 = 50.0;
/// And no later: by then the queue is another one.
const RETRY_AFTER_MS_MAX: f64 = 60_000.0;

pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) node_id: NodeId,
    pub(crate) accepts: Accepts,
    pub(crate) model: Arc<Model>,
    pub(crate) store: Store,
    pub(crate) channels: Channels,
    pub(crate) schedule: Arc<Mutex<Schedule>>,
    pub(crate) step_rate: Arc<Mutex<StepRate>>,
    pub(crate) transfer_rate: Mutex<TransferRate>,
    /// One permit per block of the pool. A prompt claims all blocks that it can need before it takes any, first come
    /// first served, so prompts never hold blocks while they wait for each other's.
    pub(crate) memory: Arc<Semaphore>,
    /// The strong sender is the service's, so that the engine ends with it.
    pub(crate) jobs: mpsc::WeakSender<Job>,
    pub(crate) metrics: Metrics,
    /// Nothing new is accepted, since the process ends. The store says whether an operator drained the node.
    pub(crate) ending: CancellationToken,
    /// Nothing goes on.
    pub(crate) stop: CancellationToken,
    /// Nothing of what runs goes on, but what comes does.
    pub(crate) moving: Recall,
    pub(crate) sessions: TaskTracker,
    pub(crate) session_permits: Arc<Semaphore>,
}

/// A place in the queue, given back on drop.
pub(crate) struct Admitted {
    schedule: Arc<Mutex<Schedule>>,
    metrics: Metrics,
    place: Place,
}

impl Shared {
    /// Takes a prompt of `tokens` tokens into the queue, or says when to come back.
    pub(crate) fn admit(&self, tokens: usize) -> Result<Admitted, Error> {
        let mut schedule = lock(&self.schedule);
        let place = schedule.admit(tokens).map_err(|full| {
            let queued = schedule.queued_tokens();
            full.into_error(self.retry_after_ms(queued))
        })?;
        self.metrics.set_queue(&schedule);
        Ok(Admitted {
            schedule: self.schedule.clone(),
            metrics: self.metrics.clone(),
            place,
        })
    }

    /// Gives a prompt to the engine.
    pub(crate) async fn submit(&self, job: Job) -> Result<(), Error> {
        let gone = || Error::unavailable("the engine of this prefill node has ended");
        let jobs = self.jobs.upgrade().ok_or_else(gone)?;
        // The channel holds as many jobs as the queue, so this does not wait.
        jobs.send(job).await.map_err(|_| gone())
    }

    /// Learns from a handoff that landed.
    pub(crate) fn observe_handoff(&self, overlap: &Overlap, bytes: u64) {
        let metrics = &self.metrics;
        metrics.handoff_bytes.inc_by(bytes);
        metrics
            .handoff_hidden_seconds
            .observe(overlap.hidden().as_secs_f64());
        metrics
            .handoff_exposed_seconds
            .observe(overlap.exposed().as_secs_f64());
        lock(&self.transfer_rate).observe(bytes, overlap.busy().as_secs_f64() * 1e3);
    }

    /// Whether new requests are refused.
    pub(crate) fn is_draining(&self) -> bool {
        self.ending.is_cancelled() || self.store.is_draining()
    }

    pub(crate) fn load(&self) -> LoadReport {
        let (queued_requests, queued_tokens) = {
            let schedule = lock(&self.schedule);
            (schedule.queued_requests(), schedule.queued_tokens())
        };
        let (ms_per_token, ms_per_token_kilocontext) = lock(&self.step_rate).coefficients();
        let blocks = self.store.stats().blocks;
        let (disk_blocks, disk_capacity_blocks) = self.store.disk_blocks();
        LoadReport {
            sequence: 0,
            queued_requests: queued_requests as u64,
            queued_prefill_tokens: queued_tokens as u64,
            running_sequences: 0,
            resident_tokens: 0,
            free_blocks: blocks.free as u64,
            evictable_blocks: blocks.reclaimable as u64,
            prefill_ms_per_token: ms_per_token,
            prefill_ms_per_token_kilocontext: ms_per_token_kilocontext,
            decode_step_ms: 0.0,
            transfer_bytes_per_ms: lock(&self.transfer_rate).bytes_per_ms(),
            disk_bytes_per_ms: self.store.disk_bytes_per_ms(),
            draining: self.is_draining() || self.store.is_quarantined(),
            drain: None,
            disk_blocks,
            disk_capacity_blocks,
            cordoned: false,
        }
    }

    fn retry_after_ms(&self, queued_tokens: usize) -> u64 {
        let (ms_per_token, _) = lock(&self.step_rate).coefficients();
        let wait = (queued_tokens as f64 * ms_per_token).clamp(RETRY_AFTER_MS_MIN, RETRY_AFTER_MS_MAX);
        wait.ceil() as u64
    }
}

impl Admitted {
    pub(crate) fn ticket(&self) -> Ticket {
        self.place.ticket
    }

    pub(crate) fn place(&self) -> Place {
        self.place
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut schedule = lock(&self.schedule);
        schedule.remove(self.place.ticket);
        self.metrics.set_queue(&schedule);
    }
}
