//! A simulated node: a pool, a queue of prefills, a batch that decodes.

use std::collections::{BTreeMap, VecDeque};

use types::{Epoch, LoadReport, NodeId, NodeRecord, Role};

use crate::pool::{Held, Pool};
use crate::profile::Profile;

/// Weight of the newest step in the reported mean, as a real node has it.
const STEP_SMOOTHING: f64 = 0.05;
/// Weight of the newest transfer in the reported mean, as a real node has it.
const TRANSFER_SMOOTHING: f64 = 0.2;

/// A request's stay on its nodes. Another placement of the same request is another visit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Visit {
    pub(super) request: usize,
    pub(super) attempt: u32,
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) role: Role,
    pub(super) record: NodeRecord,
    pub(super) epoch: Epoch,
    pub(super) alive: bool,
    pub(super) pool: Pool,
    pub(super) prefills: Prefills,
    pub(super) batch: Batch,
    pub(super) log_planned: bool,
    pub(super) totals: Totals,
    reports: u64,
    transfer_bytes_per_ms: Option<f64>,
}

/// What a node has done.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Totals {
    /// Prompts computed.
    pub(super) prefills: usize,
    /// Milliseconds of computing prompts.
    pub(super) prefill_ms: f64,
    /// Tokens decoded.
    pub(super) decoded: u64,
}

/// Prompts that wait and the one that is computed: the oldest one that is ready is next.
#[derive(Debug, Default)]
pub(super) struct Prefills {
    pub(super) waiting: VecDeque<Prefill>,
    pub(super) current: Option<Computing>,
    /// Blocks of prompts that are computed and not yet landed.
    pub(super) landing: BTreeMap<Visit, Held>,
}

#[derive(Debug)]
pub(super) struct Prefill {
    pub(super) visit: Visit,
    /// Whether its prefix has arrived.
    pub(super) ready: bool,
    /// Blocks of the prefix once it has.
    pub(super) prefix_blocks: usize,
    pub(super) cached_tokens: u64,
    pub(super) prompt_tokens: u64,
    pub(super) held: Held,
    /// Tokens computed so far; only a decode node computes a part at a time.
    pub(super) done_tokens: u64,
    /// When a decode node began with it.
    pub(super) starts_ns: u64,
}

#[derive(Debug)]
pub(super) struct Computing {
    pub(super) prefill: Prefill,
    pub(super) starts_ns: u64,
    pub(super) ends_ns: u64,
}

/// Sequences that decode.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) running: Vec<Sequence>,
    /// Those that join with the next step.
    pub(super) joining: Vec<Sequence>,
    /// Those that have no memory yet.
    pub(super) waiting: VecDeque<Landing>,
    /// The step that is being computed.
    pub(super) step: Option<Step>,
    /// Tokens of all that run.
    pub(super) resident_tokens: u64,
    step_ms: Option<f64>,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) visit: Visit,
    pub(super) left: u64,
    pub(super) tokens: u64,
    pub(super) held: Held,
}

/// A prompt that was computed elsewhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct Landing {
    pub(super) visit: Visit,
    pub(super) tokens: u64,
    pub(super) left: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub(super) decodes: bool,
    pub(super) ms: f64,
    /// Milliseconds of the chunk in it.
    pub(super) chunk_ms: f64,
    /// The part of a prompt that is computed beside: whose, and how many tokens.
    pub(super) chunk: Option<(Visit, u64)>,
}

impl Prefill {
    pub(super) fn new_tokens(&self) -> u64 {
        self.prompt_tokens - self.cached_tokens
    }

    pub(super) fn left_tokens(&self) -> u64 {
        self.new_tokens() - self.done_tokens
    }
}

impl Node {
    pub(super) fn new(record: NodeRecord, pool: Pool) -> Self {
        Self {
            id: record.id.clone(),
            role: record.role,
            epoch: record.epoch,
            record,
            alive: true,
            pool,
            prefills: Prefills::default(),
            batch: Batch::default(),
            log_planned: false,
            totals: Totals::default(),
            reports: 0,
            transfer_bytes_per_ms: None,
        }
    }

    /// Everything that was there is lost. What was done counts still.
    pub(super) fn die(&mut self, pool: Pool) {
        self.alive = false;
        self.pool = pool;
        self.prefills = Prefills::default();
        self.batch = Batch::default();
        self.log_planned = false;
        self.transfer_bytes_per_ms = None;
        self.epoch = Epoch(self.epoch.0 + 1);
        self.record.epoch = self.epoch;
    }

    pub(super) fn moved(&mut self, bytes: u64, ms: f64) {
        if bytes > 0 && ms > 0.0 {
            let rate = bytes as f64 / ms;
            let mean = self.transfer_bytes_per_ms.unwrap_or(rate);
            self.transfer_bytes_per_ms = Some(mean + TRANSFER_SMOOTHING * (rate - mean));
        }
    }

    /// What the node says of itself. Its prefill rates are what it would learn from noiseless steps.
    pub(super) fn report(&mut self, profile: &Profile, now_ns: u64) -> LoadReport {
        self.reports += 1;
        let (free_blocks, evictable_blocks) = self.pool.free_and_evictable();
        let (prefill_ms_per_token, prefill_ms_per_token_kilocontext) = profile.prefill_rates();
        let batch = &self.batch;
        LoadReport {
            sequence: self.reports,
            queued_requests: (self.prefills.waiting.len() + batch.waiting.len()) as u64,
            queued_prefill_tokens: self.prefills.queued_tokens(now_ns),
            running_sequences: batch.sequences() as u64,
            resident_tokens: batch.resident_tokens,
            free_blocks,
            evictable_blocks,
            prefill_ms_per_token,
            prefill_ms_per_token_kilocontext,
            decode_step_ms: batch.step_ms.unwrap_or(0.0),
            transfer_bytes_per_ms: self.transfer_bytes_per_ms.unwrap_or(0.0),
            disk_bytes_per_ms: 0.0,
            draining: false,
            drain: None,
            disk_blocks: 0,
            disk_capacity_blocks: 0,
            cordoned: false,
        }
    }
}

impl Prefills {
    /// Tokens that are still to be computed.
    pub(super) fn queued_tokens(&self, now_ns: u64) -> u64 {
        let waiting: u64 = self.waiting.iter().map(Prefill::left_tokens).sum();
        let current = self.current.as_ref().map_or(0, |current| {
            let span = (current.ends_ns - current.starts_ns).max(1) as f64;
            let left = current.ends_ns.saturating_sub(now_ns) as f64 / span;
            (current.prefill.new_tokens() as f64 * left).ceil() as u64
        });
        waiting + current
    }

    /// The oldest prompt that can be computed.
    pub(super) fn next_ready(&self) -> Option<usize> {
        self.waiting.iter().position(|prefill| prefill.ready)
    }
}

impl Batch {
    pub(super) fn sequences(&self) -> usize {
        self.running.len() + self.joining.len()
    }

    pub(super) fn stepped(&mut self, ms: f64) {
        let mean = self.step_ms.unwrap_or(ms);
        self.step_ms = Some(mean + STEP_SMOOTHING * (ms - mean));
    }
}
