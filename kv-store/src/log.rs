//! A node's log: every change of what it holds, numbered without gaps.
//!
//! Invariant: whoever applies a snapshot and then the entries after its number knows exactly what the node
//! holds; a parent is always stored before its children and removed after them. The log is a ring: who asks
//! for entries that are gone gets a snapshot, so a slow reader costs the node no memory.
//!
//! Pure. Elsewhere: the reader's side (`follower.rs`), the stream (`service.rs`).

use std::collections::VecDeque;

use proto::{convert, v1};
use types::{BlockEvent, BlockHash, Epoch, Error, LogEntry, Tier};

/// The newest entries of a node's log.
#[derive(Debug)]
pub struct Log {
    entries: VecDeque<LogEntry>,
    /// Number of the newest entry ever; 0 before the first.
    last: u64,
    entries_max: usize,
}

/// How a reader goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// These entries, oldest first. None: the reader knows everything.
    Entries(Vec<LogEntry>),
    /// What it asks for is gone, or never was: it needs a snapshot.
    SnapshotNeeded,
}

/// What a node held after entry `sequence` of its log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The log goes on after this number.
    pub sequence: u64,
    /// What was held, parents before children.
    pub blocks: Vec<SnapshotBlock>,
}

/// A block as a snapshot lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotBlock {
    /// Identity of the block.
    pub hash: BlockHash,
    /// Identity of the block before it, or the root of its space.
    pub parent: BlockHash,
    /// Where it lies.
    pub tier: Tier,
}

/// One message of the stream that a reader follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The incarnation whose log this is.
    pub epoch: Epoch,
    /// Number of the last event; in a snapshot, the number that it stands for.
    pub sequence: u64,
    /// What the events are.
    pub kind: BatchKind,
    /// Changes, oldest first; in a snapshot, one `Stored` per block.
    pub events: Vec<BlockEvent>,
}

/// What the events of a [`Batch`] are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchKind {
    /// Consecutive entries of the log.
    Entries,
    /// A part of a snapshot, which replaces all that was known of the node.
    Snapshot {
        /// No further part follows.
        last: bool,
    },
}

impl Log {
    /// An empty log that keeps the newest `entries_max` entries.
    pub fn new(entries_max: usize) -> Self {
        Self {
            entries: VecDeque::new(),
            last: 0,
            entries_max,
        }
    }

    /// Number of the newest entry; 0 before the first.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Numbers and keeps an event. Returns its number.
    pub fn append(&mut self, event: BlockEvent) -> u64 {
        self.last += 1;
        while self.entries.len() >= self.entries_max.max(1) {
            self.entries.pop_front();
        }
        self.entries.push_back(LogEntry {
            sequence: self.last,
            event,
        });
        self.last
    }

    /// At most `limit` entries from number `from` on.
    pub fn since(&self, from: u64, limit: usize) -> Resume {
        let oldest = self.last + 1 - self.entries.len() as u64;
        if from < oldest || from > self.last + 1 {
            return Resume::SnapshotNeeded;
        }
        let skipped = usize::try_from(from - oldest).expect("at most the entries that are in memory");
        Resume::Entries(self.entries.iter().skip(skipped).take(limit).copied().collect())
    }
}

impl Snapshot {
    /// The messages that carry it, each with at most `events_max` events. Never empty: a node that holds nothing
    /// says so.
    pub fn into_batches(self, epoch: Epoch, events_max: usize) -> impl Iterator<Item = Batch> + Send {
        let events_max = events_max.max(1);
        let total = self.blocks.len();
        let parts = total.div_ceil(events_max).max(1);
        (0..parts).map(move |part| {
            let blocks = &self.blocks[part * events_max..total.min((part + 1) * events_max)];
            Batch {
                epoch,
                sequence: self.sequence,
                kind: BatchKind::Snapshot {
                    last: part + 1 == parts,
                },
                events: blocks.iter().map(SnapshotBlock::event).collect(),
            }
        })
    }
}

impl SnapshotBlock {
    fn event(&self) -> BlockEvent {
        BlockEvent::Stored {
            hash: self.hash,
            parent: self.parent,
            tier: self.tier,
        }
    }
}

impl Batch {
    /// The message for consecutive entries. `None` where there are none to send.
    pub fn of_entries(epoch: Epoch, entries: &[LogEntry]) -> Option<Self> {
        let last = entries.last()?;
        Some(Self {
            epoch,
            sequence: last.sequence,
            kind: BatchKind::Entries,
            events: entries.iter().map(|entry| entry.event).collect(),
        })
    }

    /// The wire form.
    pub fn to_wire(&self) -> v1::LogBatch {
        let (snapshot, snapshot_end) = match self.kind {
            BatchKind::Entries => (false, false),
            BatchKind::Snapshot { last } => (true, last),
        };
        v1::LogBatch {
            epoch: self.epoch.0,
            snapshot,
            snapshot_end,
            sequence: self.sequence,
            events: self.events.iter().map(convert::event_to_wire).collect(),
        }
    }

    /// Reads the wire form.
    pub fn from_wire(wire: &v1::LogBatch) -> Result<Self, Error> {
        let kind = if wire.snapshot {
            BatchKind::Snapshot {
                last: wire.snapshot_end,
            }
        } else {
            BatchKind::Entries
        };
        Ok(Self {
            epoch: Epoch(wire.epoch),
            sequence: wire.sequence,
            kind,
            events: wire.events.iter().map(convert::event).collect::<Result<_, _>>()?,
        })
    }
}

#[cfg(test)]
mod tests;
