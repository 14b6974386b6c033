//! One process that does everything: a model, its own memory and one sequence at a time.
//!
//! What a cluster answers must equal what this gives, token for token. Used by tests, benches and `perigee generate --local`.

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{MmapMut, MmapRaw};
use types::{BlockId, ErrorCode, KvLayout, Memory, MemoryKind, SamplingParams, Token};

use crate::model::Model;
use crate::sampler::{SampleError, sample};
use crate::step::{Engine, LogitsWanted, SequenceStep, StepError};

/// Rows of a prefill chunk: enough that weights are read seldom, little enough working memory.
const CHUNK_ROWS: usize = 512;

/// Zeroed memory of this process.
pub struct OwnMemory {
    map: MmapRaw,
}

impl OwnMemory {
    /// Allocates `bytes` bytes; pages are taken when they are first touched.
    pub fn allocate(bytes: usize) -> std::io::Result<Self> {
        Ok(Self {
            map: MmapMut::map_anon(bytes.max(1))?.into(),
        })
    }
}

// SAFETY: an anonymous map is page aligned, zeroed, readable and writable, and stays at its address until it is dropped. It is only
// ever accessed through raw pointers.
unsafe impl Memory for OwnMemory {
    fn base(&self) -> NonNull<u8> {
        NonNull::new(self.map.as_mut_ptr()).expect("a map has an address")
    }

    fn len(&self) -> usize {
        self.map.len()
    }

    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }
}

/// Why a generation ended in no tokens.
#[derive(Debug, thiserror::Error)]
pub enum MonolithError {
    /// The step failed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// No token can be drawn.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// The system has no memory for the blocks.
    #[error("allocate {bytes} bytes of KV memory: {source}")]
    Memory {
        /// What was asked for.
        bytes: usize,
        /// What the system says.
        source: std::io::Error,
    },
    /// The prompt leaves no room in the context.
    #[error("the prompt has {prompt_tokens} tokens, not between 1 and {prompt_tokens_max}")]
    Prompt {
        /// Its length.
        prompt_tokens: usize,
        /// The longest that leaves room for a token.
        prompt_tokens_max: usize,
    },
}

impl MonolithError {
    /// What a caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Step(error) => error.code(),
            Self::Sample(error) => error.code(),
            Self::Memory { .. } => ErrorCode::Overloaded,
            Self::Prompt { .. } => ErrorCode::Invalid,
        }
    }
}

/// A model with memory for one sequence.
pub struct Monolith {
    engine: Engine,
    memory: Arc<OwnMemory>,
    blocks: Vec<BlockId>,
    layout: KvLayout,
}

impl Monolith {
    /// Memory for one sequence of `context_tokens` tokens, or the model's context if that is less.
    pub fn new(
        model: Arc<Model>,
        block_tokens: usize,
        context_tokens: usize,
        threads: NonZeroUsize,
    ) -> Result<Self, MonolithError> {
        let layout = model.layout(block_tokens);
        layout.validate().map_err(StepError::BadLayout)?;
        let tokens = context_tokens.min(model.config().context_tokens_max);
        let blocks = layout.blocks_for(tokens);
        let bytes = blocks * layout.block_bytes();
        let memory = OwnMemory::allocate(bytes).map_err(|source| MonolithError::Memory { bytes, source })?;
        let memory = Arc::new(memory);
        let engine = Engine::new(model, Arc::clone(&memory) as Arc<dyn Memory>, layout, threads)?;
        let blocks = (0..).map(BlockId).take(blocks).collect();
        Ok(Self {
            engine,
            memory,
            blocks,
            layout,
        })
    }

    /// The engine, for steps of the caller's own over [`Monolith::blocks`].
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// The memory behind the blocks.
    pub fn memory(&self) -> &Arc<OwnMemory> {
        &self.memory
    }

    /// The sequence's blocks.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// The layout of the blocks.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Logits of the rows of `tokens`, which are at positions `start ..`: all rows, `[row][vocabulary]`, or the last row's.
    pub fn logits(
        &mut self,
        tokens: &[Token],
        start: usize,
        wanted: LogitsWanted,
    ) -> Result<Vec<f32>, StepError> {
        let mut all = Vec::new();
        for (index, chunk) in tokens.chunks(CHUNK_ROWS).enumerate() {
            let first = start + index * CHUNK_ROWS;
            let last = (index + 1) * CHUNK_ROWS >= tokens.len();
            let logits = if wanted == LogitsWanted::Last && !last {
                LogitsWanted::None
            } else {
                wanted
            };
            let step = SequenceStep {
                tokens: chunk,
                start: first,
                blocks: &self.blocks,
                cached_tokens: 0,
                logits,
            };
            let logits = self.engine.step(&[step], &mut ())?;
            (0..logits.rows()).for_each(|row| all.extend_from_slice(logits.row(row)));
        }
        Ok(all)
    }

    /// The tokens that follow `prompt`: at most `max_tokens`, up to and with the first that ends the output.
    pub fn generate(
        &mut self,
        prompt: &[Token],
        params: &SamplingParams,
    ) -> Result<Vec<Token>, MonolithError> {
        let capacity = self.blocks.len() * self.layout.block_tokens;
        let capacity = capacity.min(self.engine.model().config().context_tokens_max);
        if prompt.is_empty() || prompt.len() >= capacity {
            let (prompt_tokens, prompt_tokens_max) = (prompt.len(), capacity.saturating_sub(1));
            return Err(MonolithError::Prompt {
                prompt_tokens,
                prompt_tokens_max,
            });
        }
        let room = (capacity - prompt.len()).min(params.max_tokens as usize);
        let eos = self.engine.model().config().eos_tokens.clone();
        let ends =
            |token| params.stop_tokens.contains(&token) || (!params.ignore_eos && eos.contains(&token));
        let mut generated: Vec<Token> = Vec::new();
        let mut logits = self.logits(prompt, 0, LogitsWanted::Last)?;
        while generated.len() < room {
            let token = sample(&mut logits, params, prompt, &generated)?.token;
            generated.push(token);
            if ends(token) || generated.len() == room {
                break;
            }
            let position = prompt.len() + generated.len() - 1;
            logits = self.logits(&[token], position, LogitsWanted::Last)?;
        }
        Ok(generated)
    }
}

#[cfg(test)]
mod tests;
