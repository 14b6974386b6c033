//! The reader's side of a node's log: decides of every batch whether it continues what is known.
//!
//! Invariant: applying the events that [`Follower::apply`] returns, in order, and forgetting everything where it
//! says so, gives what the node held at the number of the last batch. A batch that does not continue is
//! refused, and the reader subscribes again from [`Follower::resume`].
//!
//! A stream may break anywhere, but delivers what it delivers in order and whole, as gRPC's do. Entries are
//! numbered nonetheless; the parts of a snapshot are not.
//!
//! Pure: the stream and its reconnection are the caller's.

use types::{BlockEvent, Epoch};

use crate::log::{Batch, BatchKind};

/// How far a reader knows one node's log.
#[derive(Debug, Default)]
pub struct Follower {
    epoch: Epoch,
    position: Position,
}

/// What a batch changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Forget everything known of the node before the events.
    pub reset: bool,
    /// Changes, oldest first.
    pub events: Vec<BlockEvent>,
}

/// Why a batch cannot be applied. Subscribe again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Gap {
    /// Entries of another incarnation, whose snapshot is missing.
    #[error("log is of epoch {found}, but epoch {expected} was followed")]
    Epoch {
        /// What was followed.
        expected: Epoch,
        /// What came.
        found: Epoch,
    },
    /// Entries are missing, or come twice.
    #[error("log goes on at {found}, but {expected} was expected")]
    Sequence {
        /// First number expected.
        expected: u64,
        /// First number that came.
        found: u64,
    },
    /// Entries came before any snapshot, or between the parts of one.
    #[error("log entries came where a snapshot was expected")]
    NoSnapshot,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Position {
    #[default]
    Unknown,
    /// Some parts of the snapshot with this number are applied.
    InSnapshot(u64),
    /// Everything up to this number is applied.
    At(u64),
}

impl Follower {
    /// Knows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The epoch and the first sequence number to ask for, as `WatchRequest` carries them. Call it for every new
    /// stream: half a snapshot of an old one is worth nothing.
    pub fn resume(&mut self) -> (Epoch, u64) {
        match self.position {
            Position::At(sequence) => (self.epoch, sequence + 1),
            Position::Unknown | Position::InSnapshot(_) => {
                self.position = Position::Unknown;
                // No incarnation has epoch 0 and no entry number 0: the node answers with a snapshot.
                (Epoch(0), 0)
            }
        }
    }

    /// Forgets the position, as after a [`Gap`]: the next stream starts with a snapshot.
    pub fn reset(&mut self) {
        self.position = Position::Unknown;
    }

    /// The incarnation that is followed, once a snapshot of it was applied to the end.
    pub fn epoch(&self) -> Option<Epoch> {
        match self.position {
            Position::At(_) => Some(self.epoch),
            Position::Unknown | Position::InSnapshot(_) => None,
        }
    }

    /// Number of the last entry applied, unless a snapshot is needed or half applied.
    pub fn sequence(&self) -> Option<u64> {
        match self.position {
            Position::At(sequence) => Some(sequence),
            Position::Unknown | Position::InSnapshot(_) => None,
        }
    }

    /// Takes the next batch of the stream. After a [`Gap`] nothing changed.
    pub fn apply(&mut self, batch: Batch) -> Result<Applied, Gap> {
        let Batch {
            epoch,
            sequence,
            kind,
            events,
        } = batch;
        match kind {
            BatchKind::Snapshot { last } => {
                let continues = epoch == self.epoch && self.position == Position::InSnapshot(sequence);
                self.epoch = epoch;
                self.position = if last {
                    Position::At(sequence)
                } else {
                    Position::InSnapshot(sequence)
                };
                Ok(Applied {
                    reset: !continues,
                    events,
                })
            }
            BatchKind::Entries => {
                let Position::At(known) = self.position else {
                    return Err(Gap::NoSnapshot);
                };
                if epoch != self.epoch {
                    return Err(Gap::Epoch {
                        expected: self.epoch,
                        found: epoch,
                    });
                }
                let before = sequence.checked_sub(events.len() as u64);
                if before != Some(known) {
                    return Err(Gap::Sequence {
                        expected: known + 1,
                        found: before.map_or(0, |before| before + 1),
                    });
                }
                self.position = Position::At(sequence);
                Ok(Applied { reset: false, events })
            }
        }
    }
}
