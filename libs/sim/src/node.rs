//! A node of the simulated cluster: a pool with the real block table, and an engine that is busy until some moment.

use std::time::{Duration, Instant};

use kv_store::table::{BlockTable, Committed, Parent, Purpose, TableLimits};
use router::cost::Pressure;
use router::placement::NodeView;
use types::{BlockEvent, BlockHash, Checksum, Millis, NodeId, Role};

use crate::Cluster;

/// The log is read right after every change, so no more than one request's events wait in it.
const LOG_ENTRIES_MAX: usize = 1 << 16;

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: NodeId,
    role: Role,
    table: BlockTable,
    /// What the table takes for the start of the simulation; only differences to it matter.
    begun: Instant,
    /// Log entries that were read.
    read: u64,
    busy_until_ms: f64,
    queue: Vec<(f64, u64)>,
    /// Sequences that decode here.
    pub(crate) running: u64,
}

impl Node {
    pub(crate) fn new(role: Role, index: usize, cluster: &Cluster) -> Self {
        let limits = TableLimits {
            capacity: cluster.blocks_per_node,
            log_entries_max: LOG_ENTRIES_MAX,
            leases_max: 1,
            first_lease: 1,
            eviction: cluster.eviction,
        };
        Self {
            id: NodeId::new(format!("{role}-{index}")),
            role,
            table: BlockTable::new(limits),
            begun: Instant::now(),
            read: 0,
            busy_until_ms: 0.0,
            queue: Vec::new(),
            running: 0,
        }
    }

    /// The node as placement sees it.
    pub(crate) fn view(&self, cluster: &Cluster, now_ms: f64) -> NodeView {
        let queued = self
            .queue
            .iter()
            .filter(|(ends_ms, _)| *ends_ms > now_ms)
            .map(|(_, tokens)| tokens)
            .sum();
        NodeView {
            id: self.id.clone(),
            role: self.role,
            reachable: true,
            readable: true,
            draining: false,
            context_tokens_max: cluster.context_tokens_max,
            rates: router::cost::Rates {
                decode_step_ms: cluster.rates.step(0, self.running.saturating_sub(1)).0,
                ..cluster.rates
            },
            pressure: Pressure {
                queued_prefill_tokens: queued,
                running_sequences: self.running,
                placed_sequences: 0,
                available_blocks: self.table.available() as u64,
            },
        }
    }

    /// Leading blocks of the chain that are held.
    pub(crate) fn held(&self, chain: &[BlockHash]) -> usize {
        self.table.match_len(chain)
    }

    /// Queues work on the engine; gives the moment at which it starts.
    pub(crate) fn occupy(&mut self, now_ms: f64, work: Millis, tokens: u64) -> f64 {
        let started_ms = self.busy_until_ms.max(now_ms);
        self.busy_until_ms = started_ms + work.0;
        self.queue.retain(|(ends_ms, _)| *ends_ms > now_ms);
        self.queue.push((self.busy_until_ms, tokens));
        started_ms
    }

    /// Puts as many blocks of the chain into the pool as fit, and gives what the log says of it.
    pub(crate) fn keep(&mut self, chain: &[BlockHash], now_ms: f64) -> Vec<BlockEvent> {
        let now = self.begun + Duration::from_secs_f64(now_ms / 1000.0);
        keep(&mut self.table, chain, Purpose::Request, now);
        self.events()
    }

    fn events(&mut self) -> Vec<BlockEvent> {
        match self.table.log().since(self.read + 1, LOG_ENTRIES_MAX) {
            kv_store::log::Resume::Entries(entries) => {
                self.read = self.table.log().last();
                entries.into_iter().map(|entry| entry.event).collect()
            }
            kv_store::log::Resume::SnapshotNeeded => Vec::new(),
        }
    }
}

/// Puts as many blocks of the chain into the pool as fit.
pub(crate) fn keep(table: &mut BlockTable, chain: &[BlockHash], purpose: Purpose, now: Instant) {
    let held = match purpose {
        Purpose::Request => table.match_prefix(chain, now),
        Purpose::Move => table.pin_run(chain),
    };
    let mut pinned: Vec<_> = held.into_iter().map(|block| block.block).collect();
    for index in pinned.len()..chain.len() {
        let Ok(blocks) = table.allocate(1, now) else { break };
        let parent = match index.checked_sub(1) {
            // The simulated blocks have no bytes; any hash that is no block's will do for the root.
            None => Parent::Root(BlockHash::default()),
            Some(before) => Parent::Block(chain[before]),
        };
        match table.commit(blocks[0], parent, chain[index], Checksum(0), now) {
            Committed::Stored(block) => pinned.push(block.block),
            Committed::Duplicate(block) => {
                table.free(blocks[0]);
                pinned.push(block.block);
            }
            Committed::Orphan | Committed::OverQuota => {
                table.free(blocks[0]);
                break;
            }
        }
    }
    // The last block first, as a sequence ends.
    for block in pinned.into_iter().rev() {
        table.unpin(block, now);
    }
}
