//! One forward pass over any mix of prefill chunks and decode rows.
//!
//! A step takes, for each sequence, the tokens at positions `start ..` and the blocks that hold all of the sequence's KV.
//! It writes the tokens' KV into the blocks and gives the logits that were asked for.
//!
//! Invariant: what a row gives does not depend on the other rows, nor on how a sequence was cut into steps; see
//! [`crate::compute`]. The caller's block table promises that nobody else writes to a step's blocks meanwhile.
//! Elsewhere: the order of operations in a layer (`forward.rs`), who shares a step (the nodes' schedulers).

mod attend;
mod calibration;
mod experts;
mod forward;
mod plan;
mod product;

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::Arc;

use types::{BlockId, ErrorCode, KvLayout, Memory, Token};

pub use self::calibration::{CALIBRATION_TOKENS, Calibration};
use self::forward::Buffers;
use self::plan::Plan;
use crate::compute::Isa;
use crate::compute::kv::Pool;
use crate::compute::rope::RopeTable;
use crate::model::Model;
use crate::threads::{JobPanicked, Threads};

/// Rows of one step. Bounds the working memory; a scheduler's chunks are far below it.
pub const STEP_ROWS_MAX: usize = 8192;

/// Floats of logits that one step may give: 2 GiB.
const LOGITS_MAX: usize = 1 << 29;

/// Which rows of a sequence get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsWanted {
    /// None: the chunk is not the prompt's last.
    None,
    /// The last row's.
    Last,
    /// Every row's.
    All,
}

/// A sequence's part of a step.
#[derive(Debug, Clone, Copy)]
pub struct SequenceStep<'a> {
    /// Tokens to compute, at least one.
    pub tokens: &'a [Token],
    /// Position of the first of them; the KV of all positions before is in the blocks.
    pub start: usize,
    /// The sequence's blocks from position 0 on; they cover `start + tokens.len()` positions.
    pub blocks: &'a [BlockId],
    /// Positions below have their KV already, so that nothing is written for them.
    pub cached_tokens: usize,
    /// Which logits to give.
    pub logits: LogitsWanted,
}

/// Is told of a step's progress, on the thread that called [`Engine::step`]. `Break` abandons the step, which then
/// fails with [`StepError::Aborted`].
pub trait StepObserver {
    /// The layer's KV is read after this returns: cached blocks must have arrived.
    fn before_layer(&mut self, layer: usize) -> ControlFlow<()> {
        let _ = layer;
        ControlFlow::Continue(())
    }

    /// The step's KV of this layer is complete in the blocks.
    fn kv_written(&mut self, layer: usize) -> ControlFlow<()> {
        let _ = layer;
        ControlFlow::Continue(())
    }
}

/// Observes nothing.
impl StepObserver for () {}

/// Why a step, or an engine, cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The layout is not this model's.
    #[error("the layout {found:?} is not the model's, {expected:?}")]
    Layout {
        /// What was given.
        found: KvLayout,
        /// What the model needs at this block size.
        expected: KvLayout,
    },
    /// The block size is impossible.
    #[error("impossible layout: {0}")]
    BadLayout(types::layout::LayoutError),
    /// The CPU cannot compute in this memory.
    #[error("the pool is not host memory")]
    Memory,
    /// The system refused a thread.
    #[error("start an engine thread: {0}")]
    Threads(String),
    /// A sequence has no tokens.
    #[error("sequence {sequence} of the batch has no tokens")]
    Empty {
        /// Index in the batch.
        sequence: usize,
    },
    /// The step is larger than its bound.
    #[error("the step has {rows} rows, more than {STEP_ROWS_MAX}")]
    TooManyRows {
        /// Rows asked for.
        rows: usize,
    },
    /// More logits than a step may give.
    #[error("logits of {rows} rows were asked for, more than {rows_max}")]
    TooManyLogits {
        /// Rows asked for.
        rows: usize,
        /// Rows that would do.
        rows_max: usize,
    },
    /// A token is not in the vocabulary.
    #[error("token {token} is not below the vocabulary of {vocabulary}")]
    Token {
        /// The token.
        token: Token,
        /// Tokens that exist.
        vocabulary: usize,
    },
    /// The sequence would be longer than the model's context.
    #[error(
        "sequence {sequence} of the batch would have {tokens} tokens, more than the context of {context_tokens_max}"
    )]
    Context {
        /// Index in the batch.
        sequence: usize,
        /// Length after the step.
        tokens: usize,
        /// The model's longest.
        context_tokens_max: usize,
    },
    /// The blocks do not cover the sequence.
    #[error("sequence {sequence} of the batch needs {needed} blocks and has {found}")]
    Blocks {
        /// Index in the batch.
        sequence: usize,
        /// Blocks that its tokens occupy.
        needed: usize,
        /// Blocks given.
        found: usize,
    },
    /// A block is not in the pool.
    #[error("block {block} is not below the pool's {blocks}")]
    BlockId {
        /// The block.
        block: BlockId,
        /// Blocks that exist.
        blocks: usize,
    },
    /// Two places of the batch would write to one block.
    #[error("block {block} would be written twice in one step")]
    SharedWrite {
        /// The block.
        block: BlockId,
    },
    /// The observer broke the step off. KV of some layers may be written.
    #[error("the step was aborted at layer {layer}")]
    Aborted {
        /// Where.
        layer: usize,
    },
    /// A defect: KV written by this step is in an unknown state.
    #[error(transparent)]
    Panicked(#[from] JobPanicked),
}

impl StepError {
    /// What a caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Token { .. } | Self::Context { .. } | Self::Empty { .. } | Self::BadLayout(_) => {
                ErrorCode::Invalid
            }
            Self::Aborted { .. } => ErrorCode::Unavailable,
            Self::Threads(_) => ErrorCode::Overloaded,
            Self::Layout { .. }
            | Self::Memory
            | Self::TooManyRows { .. }
            | Self::TooManyLogits { .. }
            | Self::Blocks { .. }
            | Self::BlockId { .. }
            | Self::SharedWrite { .. }
            | Self::Panicked(_) => ErrorCode::Internal,
        }
    }
}

impl From<StepError> for types::Error {
    fn from(error: StepError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// The logits of a step: a row per row asked for, in the order of the batch.
#[derive(Debug)]
pub struct Logits<'a> {
    values: &'a mut [f32],
    vocabulary: usize,
}

impl Logits<'_> {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.values.len() / self.vocabulary
    }

    /// Logits of all tokens of the vocabulary.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.vocabulary..][..self.vocabulary]
    }

    /// As [`Logits::row`], for a sampler to work in.
    pub fn row_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.values[index * self.vocabulary..][..self.vocabulary]
    }
}

/// Computes steps of one model in one pool. Owns its threads and working memory.
pub struct Engine {
    model: Arc<Model>,
    pool: Pool,
    isa: Isa,
    threads: Threads,
    rope: RopeTable,
    local_rope: Option<RopeTable>,
    buffers: Buffers,
}

impl Engine {
    /// An engine of `threads` threads, the one that calls [`Engine::step`] among them, on the fastest instruction set.
    pub fn new(
        model: Arc<Model>,
        memory: Arc<dyn Memory>,
        layout: KvLayout,
        threads: NonZeroUsize,
    ) -> Result<Self, StepError> {
        Self::with_isa(model, memory, layout, threads, Isa::detect())
    }

    /// As [`Engine::new`], on a given instruction set. The bits are the same on all.
    pub fn with_isa(
        model: Arc<Model>,
        memory: Arc<dyn Memory>,
        layout: KvLayout,
        threads: NonZeroUsize,
        isa: Isa,
    ) -> Result<Self, StepError> {
        let expected = model.layout(layout.block_tokens);
        if layout != expected {
            return Err(StepError::Layout {
                found: layout,
                expected,
            });
        }
        layout.validate().map_err(StepError::BadLayout)?;
        let pool = Pool::new(memory, layout).ok_or(StepError::Memory)?;
        let threads = Threads::start(threads).map_err(|error| StepError::Threads(error.to_string()))?;
        let rope = RopeTable::new(&model.config().rope);
        let local_rope = model.config().local_rope.as_ref().map(RopeTable::new);
        let buffers = Buffers::new(threads.count());
        Ok(Self {
            model,
            pool,
            isa,
            threads,
            rope,
            local_rope,
            buffers,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Computes a step. On an error nothing was written, but for [`StepError::Aborted`] and [`StepError::Panicked`].
    pub fn step(
        &mut self,
        batch: &[SequenceStep<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<Logits<'_>, StepError> {
        let plan = Plan::new(batch, self.model.config(), &self.pool)?;
        self.rope.grow(plan.positions());
        if let Some(rope) = &mut self.local_rope {
            rope.grow(plan.positions());
        }
        self.forward(batch, &plan, observer)?;
        Ok(self
            .buffers
            .logits(plan.logit_rows().len(), self.model.config().vocabulary))
    }
}

#[cfg(test)]
mod tests;
