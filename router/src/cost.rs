//! What a placement costs, in milliseconds.
//!
//! ```text
//! ttft = queue + promote + fetch + compute(new | prefix) + handoff not hidden
//! ```
//!
//! The rates are what the nodes measured and reported, corrected by what completed requests took ([`learning`]). A node that has
//! not measured yet borrows the mean of its peers' rates, and where nobody has measured the [`Priors`] hold. Between two reports
//! of a node, what this router placed there is added to what the node said, so that a burst does not pile onto the one node that
//! looked idle; the next report takes it over, so the sum is never staler than one report interval.
//!
//! Pure: callers pass `now`. Elsewhere: what is learnt from completed requests (`cost/learning.rs`), decode steps
//! (`cost/steps.rs`), the choice (`placement.rs`), the reports (`members.rs`).

pub mod learning;
mod steps;

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use types::{LoadReport, Millis, NodeId};

use learning::{Foretold, Inbound, Learned, Measured, Moved};
pub use steps::StepTime;
use steps::Steps;

/// A placement reaches its node, and the node's next report, only after the way there. What was placed this shortly before a
/// report arrived is not in it yet.
const REPORT_LAG: Duration = Duration::from_millis(25);

/// Most placements that are remembered; beyond it new ones are not counted until reports or ends clear old ones. Far above
/// what admission lets run.
const LEDGER_ENTRIES_MAX: usize = 4_096;

/// What is kept, of the sums behind [`CostModel::context_factor`], when a prompt is added: some hundred prompts count.
const CONTEXT_KEPT: f64 = 0.99;

/// What is assumed before anything was measured, and what no report says.
#[derive(Debug, Clone, PartialEq)]
pub struct Priors {
    /// Milliseconds per prompt token without context. A small model on two CPU cores.
    pub prefill_ms_per_token: f64,
    /// Milliseconds per prompt token and thousand tokens of context.
    pub prefill_ms_per_token_kilocontext: f64,
    /// Milliseconds per decode step of one sequence.
    pub decode_step_ms: f64,
    /// Bytes per millisecond between nodes. 1 GB/s: plain TCP on one machine or a 10 Gbit/s link.
    pub transfer_bytes_per_ms: f64,
    /// Bytes per millisecond from a node's disk. 1 GB/s: a cloud volume or an older local drive.
    pub disk_bytes_per_ms: f64,
    /// Fixed cost of asking a peer for blocks: acquire, read, verify.
    pub fetch_fixed_ms: f64,
    /// Fixed cost of a remote prefill: the stream, the offer and the landing.
    pub handoff_fixed_ms: f64,
}

impl Default for Priors {
    fn default() -> Self {
        Self {
            prefill_ms_per_token: 2.0,
            prefill_ms_per_token_kilocontext: 0.5,
            decode_step_ms: 10.0,
            transfer_bytes_per_ms: 1e6,
            disk_bytes_per_ms: 1e6,
            fetch_fixed_ms: 2.0,
            handoff_fixed_ms: 2.0,
        }
    }
}

/// The rates of one node, none of them 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// `a` of [`Rates::compute`].
    pub prefill_ms_per_token: f64,
    /// `b` of [`Rates::compute`]; may be 0.
    pub prefill_ms_per_token_kilocontext: f64,
    /// A decode step.
    pub step: StepTime,
    /// Bytes per millisecond between nodes.
    pub transfer_bytes_per_ms: f64,
    /// Bytes per millisecond from the node's disk.
    pub disk_bytes_per_ms: f64,
}

impl Rates {
    /// Milliseconds to prefill `new` tokens after `prefix` tokens: `a·new + b·new·(prefix + new/2)/1000`, since the mean
    /// new token attends to the prefix and half of the new ones.
    pub fn compute(&self, new: u64, prefix: u64) -> Millis {
        let (new, prefix) = (new as f64, prefix as f64);
        let context = new * (prefix + new / 2.0) / 1000.0;
        Millis(self.prefill_ms_per_token * new + self.prefill_ms_per_token_kilocontext * context)
    }

    /// Milliseconds to move `bytes` between this node and `other`: as fast as the slower of them.
    pub fn transfer(&self, other: &Self, bytes: u64) -> Millis {
        let slower = self.transfer_bytes_per_ms.min(other.transfer_bytes_per_ms);
        Millis(bytes as f64 / slower)
    }

    /// Milliseconds to read `bytes` from the node's disk.
    pub fn promote(&self, bytes: u64) -> Millis {
        Millis(bytes as f64 / self.disk_bytes_per_ms)
    }
}

/// How busy a node is: its report, and what was placed there since.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Pressure {
    /// Prompt tokens that wait or are being computed.
    pub queued_prefill_tokens: u64,
    /// Sequences that decode, by the report.
    pub running_sequences: u64,
    /// Sequences placed since.
    pub placed_sequences: u64,
    /// Blocks that a new sequence could take.
    pub available_blocks: u64,
}

/// Every term of a prediction, so that it can be explained and held against what was measured.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Waiting for the prefilling engine.
    pub queue: Millis,
    /// Reading the part of the prefix that its holders have on disk only, as far as queueing does not hide it.
    pub promote: Millis,
    /// Pulling the part of the prefix that the prefilling node lacks, as far as queueing does not hide it.
    pub fetch: Millis,
    /// Computing the new tokens.
    pub compute: Millis,
    /// Moving KV to the decode node, as far as computing does not hide it.
    pub handoff: Millis,
    /// Their sum: time to first token after placement.
    pub total: Millis,
}

impl Prediction {
    /// The prediction with these terms.
    pub fn of(queue: Millis, promote: Millis, fetch: Millis, compute: Millis, handoff: Millis) -> Self {
        Self {
            queue,
            promote,
            fetch,
            compute,
            handoff,
            total: [queue, promote, fetch, compute, handoff].into_iter().sum(),
        }
    }
}

/// Names a placement in the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlacementId(pub u64);

/// What a placement puts on its nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Where the prompt is computed: a prefill node, or the decode node itself.
    pub prefill: NodeId,
    /// Tokens that are computed there.
    pub prefill_tokens: u64,
    /// Where the request decodes.
    pub decode: NodeId,
    /// Blocks that it will take there.
    pub decode_blocks: u64,
}

#[derive(Debug)]
struct LedgerEntry {
    placed: Placed,
    at: Instant,
    /// Whether the node's report speaks of it by now, or its work there is over.
    prefill_known: bool,
    decode_known: bool,
}

/// What is known of every node's speed and load.
#[derive(Debug)]
pub struct CostModel {
    priors: Priors,
    /// In order, so that sums over them are the same in every router.
    reports: BTreeMap<NodeId, LoadReport>,
    steps: BTreeMap<NodeId, Steps>,
    learned: Learned,
    ledger: HashMap<PlacementId, LedgerEntry>,
    next_placement: u64,
    /// Milliseconds that recent prompts were predicted to compute, and what they would without context.
    computed_ms: (f64, f64),
}

impl CostModel {
    /// Knows nothing but the priors.
    pub fn new(priors: Priors) -> Self {
        Self {
            priors,
            reports: BTreeMap::new(),
            steps: BTreeMap::new(),
            learned: Learned::default(),
            ledger: HashMap::new(),
            next_placement: 0,
            computed_ms: (0.0, 0.0),
        }
    }

    /// What is assumed where nothing was measured.
    pub fn priors(&self) -> &Priors {
        &self.priors
    }

    /// Fixed cost of a remote prefill.
    pub fn handoff_fixed(&self) -> Millis {
        Millis(self.learned.fixed(self.priors.handoff_fixed_ms))
    }

    /// What is known of the links to `receiver`.
    pub fn inbound(&self, receiver: &NodeId) -> Option<&Inbound> {
        self.learned.inbound(receiver)
    }

    /// How long `node` takes for a prompt, as a multiple of what it says of its steps.
    pub fn pace(&self, node: &NodeId) -> f64 {
        self.learned.pace(node)
    }

    /// A request is complete: what was foretold of its placement is held against what its nodes measured.
    pub fn completed(&mut self, foretold: &Foretold, measured: &Measured) {
        if let Some(prefill) = &foretold.prefill {
            self.moved(prefill, &foretold.decode, measured.handoff);
        }
        // A prefix that was gone when it was asked for is no error of the model.
        if foretold.new_tokens + measured.cached_tokens != foretold.prompt_tokens {
            return;
        }
        let engine = foretold.engine();
        if let Some(source) = &foretold.source {
            let took = Millis(measured.fetch.took.0 - self.priors.fetch_fixed_ms);
            self.moved(
                source,
                engine,
                Moved {
                    took,
                    ..measured.fetch
                },
            );
        }
        self.learned.computed(engine, foretold, measured.compute);
        let prediction = &foretold.prediction;
        let other_waits = prediction.queue + prediction.promote + prediction.fetch;
        if foretold.prefill.is_some() && other_waits == Millis(0.0) {
            let fixed = measured.ttft.0 - measured.compute.0 - measured.exposed.0;
            self.learned
                .handed_over(Millis(fixed), self.priors.handoff_fixed_ms);
        }
    }

    fn moved(&mut self, source: &NodeId, receiver: &NodeId, moved: Moved) {
        let ends = self.rates(source).transfer(&self.rates(receiver), moved.bytes);
        self.learned.moved(source, receiver, moved, ends);
    }

    /// A prompt was placed on `node`, whose `new_tokens` are predicted to compute for so long.
    pub fn learn_context(&mut self, node: &NodeId, new_tokens: u64, compute: Millis) {
        let without = self.rates(node).prefill_ms_per_token * new_tokens as f64;
        let (with, sum) = self.computed_ms;
        self.computed_ms = (with * CONTEXT_KEPT + compute.0, sum * CONTEXT_KEPT + without);
    }

    /// What a queued token takes, as a multiple of one without context. Reports say how many tokens queue, and not behind how
    /// many others each of them is; recent prompts tell that.
    pub fn context_factor(&self) -> f64 {
        let (with, without) = self.computed_ms;
        if without > 0.0 {
            (with / without).max(1.0)
        } else {
            1.0
        }
    }

    /// Takes in a node's report, which from now on speaks for what was placed there before.
    pub fn report(&mut self, node: &NodeId, report: LoadReport, now: Instant) {
        // Without sequences, what is reported is of a batch that is gone.
        if report.running_sequences > 0 && is_rate(report.decode_step_ms) {
            let steps = self.steps.entry(node.clone()).or_default();
            steps.observe(report.running_sequences, report.decode_step_ms);
        }
        self.reports.insert(node.clone(), report);
        for entry in self.ledger.values_mut() {
            if entry.at + REPORT_LAG <= now {
                entry.prefill_known |= entry.placed.prefill == *node;
                entry.decode_known |= entry.placed.decode == *node;
            }
        }
        self.sweep();
    }

    /// Forgets a node that left or started anew.
    pub fn forget(&mut self, node: &NodeId) {
        self.reports.remove(node);
        self.steps.remove(node);
        self.learned.forget(node);
        for entry in self.ledger.values_mut() {
            entry.prefill_known |= entry.placed.prefill == *node;
            entry.decode_known |= entry.placed.decode == *node;
        }
        self.sweep();
    }

    /// The last report of `node`.
    pub fn last_report(&self, node: &NodeId) -> Option<&LoadReport> {
        self.reports.get(node)
    }

    /// Counts a placement until the nodes' reports do.
    pub fn place(&mut self, placed: Placed, now: Instant) -> PlacementId {
        let id = PlacementId(self.next_placement);
        self.next_placement += 1;
        if self.ledger.len() < LEDGER_ENTRIES_MAX {
            let entry = LedgerEntry {
                placed,
                at: now,
                prefill_known: false,
                decode_known: false,
            };
            self.ledger.insert(id, entry);
        }
        id
    }

    /// The prompt of a placement is computed: its tokens queue no more.
    pub fn prefilled(&mut self, id: PlacementId) {
        if let Some(entry) = self.ledger.get_mut(&id) {
            entry.prefill_known = true;
            if entry.decode_known {
                self.ledger.remove(&id);
            }
        }
    }

    /// A placement ended, in whichever way.
    pub fn ended(&mut self, id: PlacementId) {
        self.ledger.remove(&id);
    }

    /// How busy each node is of which anything is known.
    pub fn pressures(&self) -> HashMap<&NodeId, Pressure> {
        let reported = |report: &LoadReport| Pressure {
            queued_prefill_tokens: report.queued_prefill_tokens,
            running_sequences: report.running_sequences,
            placed_sequences: 0,
            available_blocks: report.free_blocks + report.evictable_blocks,
        };
        let reports = self.reports.iter();
        let mut pressures: HashMap<_, _> = reports.map(|(node, report)| (node, reported(report))).collect();
        for LedgerEntry {
            placed,
            prefill_known,
            decode_known,
            ..
        } in self.ledger.values()
        {
            if !prefill_known {
                let prefill = pressures.entry(&placed.prefill).or_default();
                prefill.queued_prefill_tokens += placed.prefill_tokens;
            }
            if !decode_known {
                let decode = pressures.entry(&placed.decode).or_default();
                decode.placed_sequences += 1;
                decode.available_blocks = decode.available_blocks.saturating_sub(placed.decode_blocks);
            }
        }
        pressures
    }

    /// The speeds of `node`: measured, or borrowed from its peers, or assumed.
    pub fn rates(&self, node: &NodeId) -> Rates {
        let own = self.reports.get(node);
        let rate = |of: fn(&LoadReport) -> f64, prior: f64| {
            let measured = own.map(of).filter(|value| is_rate(*value));
            measured.or_else(|| self.mean_rate(of)).unwrap_or(prior)
        };
        let (priors, pace) = (&self.priors, self.learned.pace(node));
        Rates {
            prefill_ms_per_token: pace
                * rate(|report| report.prefill_ms_per_token, priors.prefill_ms_per_token),
            prefill_ms_per_token_kilocontext: pace
                * rate(
                    |report| report.prefill_ms_per_token_kilocontext,
                    priors.prefill_ms_per_token_kilocontext,
                ),
            step: self.step(node),
            transfer_bytes_per_ms: rate(
                |report| report.transfer_bytes_per_ms,
                priors.transfer_bytes_per_ms,
            ),
            disk_bytes_per_ms: rate(|report| report.disk_bytes_per_ms, priors.disk_bytes_per_ms),
        }
    }

    /// What the node's own reports say of its steps, or those of its peers, or what is assumed.
    fn step(&self, node: &NodeId) -> StepTime {
        let own = self.steps.get(node).and_then(Steps::fit);
        let of_all = || self.steps.values().copied().reduce(Steps::and)?.fit();
        own.or_else(of_all)
            .unwrap_or_else(|| StepTime::assumed(self.priors.decode_step_ms))
    }

    fn mean_rate(&self, of: fn(&LoadReport) -> f64) -> Option<f64> {
        let measured = self.reports.values().map(of).filter(|value| is_rate(*value));
        let (sum, count) = measured.fold((0.0, 0u32), |(sum, count), value| (sum + value, count + 1));
        (count > 0).then(|| sum / f64::from(count))
    }

    fn sweep(&mut self) {
        self.ledger
            .retain(|_, entry| !(entry.prefill_known && entry.decode_known));
    }
}

/// Reports say 0 for what was not measured yet.
fn is_rate(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

#[cfg(test)]
mod tests;
