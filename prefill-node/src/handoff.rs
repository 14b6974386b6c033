//! The sender's side of one handoff: which slices may be written to the decode node, which are on their way,
//! and when the handoff has ended.
//!
//! ```text
//! Queued ─> Running ─> Pushing ─> Flushed ─> Landed
//!    └─────────┴──────────┴──────────┴─ stop ─> Stopping ─> Stopped
//! ```
//!
//! Invariants: every (block, layer) is written to the peer at most once, and only after the engine wrote it; it
//! is `Flushed` only when the peer acknowledged all of them; after `stop` no write is begun; it is `Stopped` only
//! when none is in flight.
//!
//! Blocks of a prompt are computed in order, layer by layer, so two counts per layer (written here, sent) stand
//! for all slices, and a long prompt with a slow peer costs no memory. Computing may begin before the peer
//! offered its memory: the slices then wait.
//!
//! A pure state machine: nothing here waits, logs or reads a clock. Elsewhere: the bytes (`push`), the
//! conversation with the decode node (`session`).

use std::collections::BTreeMap;
use std::ops::Range;

use types::{Error, ErrorCode};

/// What is to be handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Layers of a block.
    pub layers: usize,
    /// Leading blocks that the peer holds: never pushed.
    pub held_blocks: usize,
    /// Blocks of the prompt, the last one perhaps partly filled.
    pub blocks: usize,
}

/// Bounds of what is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Writes in flight.
    pub writes_in_flight_max: usize,
    /// Slices of one write, at least 1.
    pub write_slices_max: usize,
    /// (block, layer) pairs of one write. A single slice may exceed it: a block's run of layers is never cut.
    pub write_units_max: usize,
}

/// Names a write in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteId(u64);

/// The same run of layers of neighbouring blocks. A run of layers is contiguous in a block: one slice per block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Which layers.
    pub layers: Range<usize>,
    /// Of which blocks of the prompt.
    pub blocks: Range<usize>,
}

impl Piece {
    fn units(&self) -> usize {
        self.layers.len() * self.blocks.len()
    }
}

/// A write that must be begun now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// Its name when it ends.
    pub id: WriteId,
    /// What it moves.
    pub pieces: Vec<Piece>,
}

/// Where the handoff stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The engine has not begun.
    Queued,
    /// The engine computes, the peer has not offered memory yet.
    Running,
    /// Slices go out as they are computed.
    Pushing,
    /// All is computed, and in the peer's memory.
    Flushed,
    /// The peer was told.
    Landed,
    /// It ends early, and writes are still in flight.
    Stopping,
    /// It ended early, and no write is in flight or will be begun.
    Stopped {
        /// Whether no byte can reach the peer's memory any more. False after a write whose end is unknown: only
        /// the peer's own fence then makes the memory safe.
        quiesced: bool,
    },
}

/// An offer that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// One was made before.
    #[error("memory was offered twice for one handoff")]
    Repeated,
    /// It came before `Started` asked for it.
    #[error("memory was offered before the prefill started")]
    Early,
    /// It does not hold what is to be pushed.
    #[error("the offer holds {offered} blocks, but {needed} are to be pushed")]
    Blocks {
        /// Blocks of the offer.
        offered: usize,
        /// Blocks to push.
        needed: usize,
    },
}

impl OfferError {
    /// What the caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Repeated | Self::Early | Self::Blocks { .. } => ErrorCode::Invalid,
        }
    }
}

impl From<OfferError> for Error {
    fn from(error: OfferError) -> Self {
        Self {
            param: Some("offer".to_owned()),
            ..Self::new(error.code(), error.to_string())
        }
    }
}

/// See the module documentation.
#[derive(Debug, Clone)]
pub struct Handoff {
    shape: Shape,
    limits: Limits,
    /// Per layer: blocks before this one are in our memory. Never less than `sent`.
    written: Vec<usize>,
    /// Per layer: writes of the blocks before this one were begun.
    sent: Vec<usize>,
    in_flight: BTreeMap<WriteId, usize>,
    /// (block, layer) pairs in the peer's memory.
    acknowledged: usize,
    next_write: u64,
    started: bool,
    offered: bool,
    computed: bool,
    landed: bool,
    stopped: bool,
    /// Whether a write ended without our knowing whether all its bytes had arrived.
    unsettled: bool,
}

impl Handoff {
    /// A handoff whose request waits. `held_blocks` must not exceed `blocks`.
    pub fn new(shape: Shape, limits: Limits) -> Self {
        debug_assert!(shape.held_blocks <= shape.blocks);
        Self {
            shape,
            limits,
            written: vec![shape.held_blocks; shape.layers],
            sent: vec![shape.held_blocks; shape.layers],
            in_flight: BTreeMap::new(),
            acknowledged: 0,
            next_write: 0,
            started: false,
            offered: false,
            computed: false,
            landed: false,
            stopped: false,
            unsettled: false,
        }
    }

    /// Blocks that the offer must hold.
    pub fn blocks_to_push(&self) -> usize {
        self.shape.blocks - self.shape.held_blocks
    }

    /// The engine takes the prompt, whose first `cached_blocks` blocks are in our memory already.
    pub fn start(&mut self, cached_blocks: usize) {
        self.started = true;
        for layer in 0..self.shape.layers {
            self.written(layer, cached_blocks);
        }
    }

    /// The engine wrote this layer of all blocks before `blocks_end`.
    pub fn written(&mut self, layer: usize, blocks_end: usize) {
        let end = blocks_end.min(self.shape.blocks);
        self.written[layer] = self.written[layer].max(end);
    }

    /// The engine is done, and wrote every layer of every block.
    pub fn computed(&mut self) {
        debug_assert!(self.stopped || self.written.iter().all(|blocks| *blocks == self.shape.blocks));
        self.computed = true;
    }

    /// The peer offers memory for `blocks` blocks.
    pub fn offer(&mut self, blocks: usize) -> Result<(), OfferError> {
        if !self.started {
            return Err(OfferError::Early);
        }
        if self.offered {
            return Err(OfferError::Repeated);
        }
        if blocks != self.blocks_to_push() {
            return Err(OfferError::Blocks {
                offered: blocks,
                needed: self.blocks_to_push(),
            });
        }
        self.offered = true;
        Ok(())
    }

    /// The next write, if there is something to send and room for it. The caller begins it and reports its end.
    ///
    /// Lower layers first: they are computed first. Neighbouring layers with the same blocks to send (a cached
    /// prefix, or what piled up before the offer) travel as longer slices.
    pub fn next_write(&mut self) -> Option<Write> {
        if !self.offered || self.stopped || self.in_flight.len() >= self.limits.writes_in_flight_max {
            return None;
        }
        let mut pieces = Vec::new();
        let mut slices = self.limits.write_slices_max.max(1);
        let mut units = self.limits.write_units_max;
        let mut layer = 0;
        while layer < self.shape.layers && slices > 0 && units > 0 {
            let layers = self.alike(layer);
            let waiting = self.sent[layer]..self.written[layer];
            layer = layers.end;
            if waiting.is_empty() {
                continue;
            }
            let blocks = waiting.len().min(slices).min((units / layers.len()).max(1));
            let piece = Piece {
                layers,
                blocks: waiting.start..waiting.start + blocks,
            };
            self.sent[piece.layers.clone()].fill(piece.blocks.end);
            slices -= blocks;
            units = units.saturating_sub(piece.units());
            pieces.push(piece);
        }
        if pieces.is_empty() {
            return None;
        }
        let id = WriteId(self.next_write);
        self.next_write += 1;
        self.in_flight.insert(id, pieces.iter().map(Piece::units).sum());
        Some(Write { id, pieces })
    }

    /// The run of layers from `layer` on that have the same blocks to send.
    fn alike(&self, layer: usize) -> Range<usize> {
        let state = |layer: usize| (self.sent[layer], self.written[layer]);
        let end = (layer..self.shape.layers)
            .find(|other| state(*other) != state(layer))
            .unwrap_or(self.shape.layers);
        layer..end
    }

    /// Everything of this write is in the peer's memory.
    pub fn acknowledged(&mut self, id: WriteId) {
        self.acknowledged += self.in_flight.remove(&id).unwrap_or(0);
    }

    /// A write failed, which stops the handoff. `may_still_land` says whether some of its bytes may be on their way.
    pub fn write_failed(&mut self, id: WriteId, may_still_land: bool) {
        self.in_flight.remove(&id);
        self.unsettled |= may_still_land;
        self.stop();
    }

    /// Ends the handoff early. Does nothing after it landed.
    pub fn stop(&mut self) {
        self.stopped = !self.landed;
    }

    /// The peer is being told that all has landed. Only for a handoff that is [`Phase::Flushed`].
    pub fn land(&mut self) {
        debug_assert_eq!(self.phase(), Phase::Flushed);
        self.landed = true;
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        if self.landed {
            Phase::Landed
        } else if self.stopped && !self.in_flight.is_empty() {
            Phase::Stopping
        } else if self.stopped {
            Phase::Stopped {
                quiesced: !self.unsettled,
            }
        } else if !self.started {
            Phase::Queued
        } else if self.computed && self.acknowledged == self.shape.layers * self.blocks_to_push() {
            Phase::Flushed
        } else if self.offered {
            Phase::Pushing
        } else {
            Phase::Running
        }
    }

    /// Property tests call this after every step.
    pub fn check_integrity(&self) {
        let sent: usize = self.sent.iter().map(|end| end - self.shape.held_blocks).sum();
        let in_flight: usize = self.in_flight.values().sum();
        assert!(self.acknowledged + in_flight <= sent, "nothing is counted twice");
        assert!(
            self.stopped || self.acknowledged + in_flight == sent,
            "nothing is lost unless it stops"
        );
        assert!(
            self.in_flight.len() <= self.limits.writes_in_flight_max,
            "writes are bounded"
        );
        for (sent, written) in self.sent.iter().zip(&self.written) {
            assert!(
                sent <= written && *written <= self.shape.blocks,
                "only what exists is sent"
            );
        }
    }
}

#[cfg(test)]
mod tests;
