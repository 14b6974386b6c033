//! Which blocks are written to disk, and when.
//!
//! Blocks are written behind their commits, so that evicting one from memory costs nothing and a restart finds what the pool held.
//! While memory is not short, they go in the order of their commits: the node's own log is the queue, and its bound is the
//! queue's. Once memory is short, the rate of writing may not suffice for everything: then those that eviction takes next are
//! written, the most worth of them first, and whatever is evicted unwritten was worth the least.
//!
//! A block goes only after its ancestors. They are asked for on the way, root first.

use std::collections::VecDeque;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use types::{BlockEvent, BlockHash, Tier};

use super::Offloading;
use crate::disk::{Disk, DiskError, Kind};
use crate::log::Resume;
use crate::store::Store;
use crate::table::Offload;

/// Memory is short when less than one slot in so many is free.
const SHORT_OF_FREE: usize = 8;
/// Blocks looked at in one go: what eviction takes next, or entries of the log.
const WINDOW: usize = 256;
/// Blocks written before the disk is looked after again.
const BATCH_MAX: usize = 1024;

/// Where the writer is.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// First entry of the log that was not looked at.
    next: u64,
    /// Blocks to be written, in this order. At most as many as the pool has.
    queue: VecDeque<BlockHash>,
}

impl Plan {
    /// Fills the queue, if it is empty. It stays empty where nothing is to be written.
    fn refill(&mut self, store: &Store) {
        if !self.queue.is_empty() {
            return;
        }
        let mut table = store.table();
        let counts = table.counts();
        if counts.free * SHORT_OF_FREE < counts.capacity {
            let mut coldest = table.coldest(WINDOW, crate::store::now());
            coldest.retain(|victim| !table.disk().contains_or_awaits(&victim.hash));
            drop(table);
            coldest.sort_by(|a, b| b.worth.total_cmp(&a.worth));
            self.queue.extend(coldest.into_iter().map(|victim| victim.hash));
            if !self.queue.is_empty() {
                return;
            }
        } else {
            drop(table);
        }
        self.follow_log(store);
    }

    fn follow_log(&mut self, store: &Store) {
        while self.queue.is_empty() {
            let resumed = store.table().log().since(self.next, WINDOW);
            match resumed {
                Resume::Entries(entries) => {
                    let Some(last) = entries.last() else {
                        return;
                    };
                    self.next = last.sequence + 1;
                    let stored = entries.iter().filter_map(|entry| match entry.event {
                        BlockEvent::Stored {
                            hash,
                            tier: Tier::Host,
                            ..
                        } => Some(hash),
                        BlockEvent::Stored { .. } | BlockEvent::Moved { .. } | BlockEvent::Removed { .. } => {
                            None
                        }
                    });
                    self.queue.extend(stored);
                }
                Resume::SnapshotNeeded => {
                    let draft = store.table().snapshot();
                    let snapshot = draft.finish();
                    self.next = snapshot.sequence + 1;
                    let in_memory = snapshot.blocks.iter().filter(|block| block.tier == Tier::Host);
                    self.queue.extend(in_memory.map(|block| block.hash));
                }
            }
        }
    }
}

/// Writes what is to be written, up to a batch.
pub(super) async fn run(store: &Store, disk: &Disk, plan: &mut Plan) {
    let mut under_way = FuturesUnordered::new();
    let mut begun = 0;
    loop {
        while under_way.len() < disk.writes_max() && begun < BATCH_MAX && disk.is_writable() {
            plan.refill(store);
            let Some(offloading) = next(store, plan, under_way.is_empty()) else {
                break;
            };
            begun += 1;
            under_way.push(write(store, disk, offloading));
        }
        if under_way.next().await.is_none() {
            return;
        }
    }
}

/// The next block whose ancestors are on disk. None: nothing is left, or what is left has to wait for a write that is under way.
fn next(store: &Store, plan: &mut Plan, is_idle: bool) -> Option<Offloading> {
    // A chain is walked up to its root at most once, and every block is queued once per walk.
    let mut climbed = 0;
    while let Some(hash) = plan.queue.front().copied() {
        match store.with_table(|table| table.begin_offload(&hash)) {
            Offload::Write(block, reserved) => {
                plan.queue.pop_front();
                return Some(Offloading {
                    store: store.clone(),
                    block,
                    reserved,
                    is_written: false,
                });
            }
            Offload::ParentFirst(parent) => {
                let is_awaited = store.table().disk().contains_or_awaits(&parent);
                if is_awaited && !is_idle {
                    return None;
                }
                if is_awaited || climbed >= store.capacity() {
                    plan.queue.pop_front();
                    continue;
                }
                climbed += 1;
                plan.queue.push_front(parent);
            }
            Offload::Nothing => {
                plan.queue.pop_front();
            }
        }
    }
    None
}

async fn write(store: &Store, disk: &Disk, offloading: Offloading) {
    disk.pace_write().await;
    let bytes = store.layout().block_bytes();
    let (offloading, result) = disk
        .run(Kind::Write, bytes, offloading, |file, offloading| {
            offloading.run(file)
        })
        .await;
    // Commits or gives up.
    drop(offloading);
    let metrics = &store.inner().metrics.disk;
    match result {
        Ok(()) => {
            metrics.written_blocks.inc();
            metrics.written_bytes.inc_by(bytes as u64);
        }
        Err(DiskError::Bypassed) => {}
        Err(error @ DiskError::Io(_)) => {
            metrics.errors.inc();
            tracing::debug!(%error, "block not written to disk");
        }
    }
}
