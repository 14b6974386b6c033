//! How fast an engine is, before its first request.
//!
//! A node that has just started would otherwise be predicted by what others measured, or by assumptions, until it has served some
//! prompts; and a router that takes it for slow sends it none. Three short steps tell: prompt tokens without context, prompt tokens
//! behind a long context, and one decoded token. A step before them pages the weights in.

use std::ops::Range;
use std::time::{Duration, Instant};

use types::{BlockId, Token};

use super::{Engine, LogitsWanted, SequenceStep, StepError};

/// Tokens of a measured prompt: enough for weights to be unpacked once for many, and a fraction of a second on a slow machine.
const PROMPT_TOKENS: usize = 64;

/// Tokens before the second one. Nearer to the first, what context takes could not be told from noise.
const CONTEXT_TOKENS: usize = 1024;

/// Blocks' tokens that [`Engine::calibrate`] makes use of.
pub const CALIBRATION_TOKENS: usize = CONTEXT_TOKENS + PROMPT_TOKENS;

/// What the steps took.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// Positions that were computed as parts of a prompt, and how long that took.
    pub prompts: Vec<(Range<usize>, Duration)>,
    /// One step of one sequence.
    pub decode_step: Duration,
}

impl Engine {
    /// Measures how fast the engine is, in `blocks` that are the caller's alone and hold nothing of worth. Where they hold fewer
    /// than [`CALIBRATION_TOKENS`] tokens, prompts are shorter and perhaps there is only one; without blocks there is no answer.
    ///
    /// # Errors
    ///
    /// What [`Engine::step`] says.
    pub fn calibrate(&mut self, blocks: &[BlockId]) -> Result<Option<Calibration>, StepError> {
        let context_tokens_max = self.model().config().context_tokens_max;
        let room = (blocks.len() * self.pool.layout().block_tokens).min(context_tokens_max);
        if room == 0 {
            return Ok(None);
        }
        let prompt = PROMPT_TOKENS.min(room);
        self.timed(blocks, 0..prompt)?;
        let behind = room.min(CALIBRATION_TOKENS) - prompt;
        let starts = [Some(0), Some(behind).filter(|behind| *behind >= prompt)];
        let mut prompts = Vec::new();
        for start in starts.into_iter().flatten() {
            let positions = start..start + prompt;
            let took = self.timed(blocks, positions.clone())?;
            prompts.push((positions, took));
        }
        let decode_step = self.timed(blocks, prompt - 1..prompt)?;
        Ok(Some(Calibration { prompts, decode_step }))
    }

    /// Computes the positions as if all before them were there. What is there does not matter: it takes no more time and no less.
    fn timed(&mut self, blocks: &[BlockId], positions: Range<usize>) -> Result<Duration, StepError> {
        let tokens: Vec<Token> = vec![0; positions.len()];
        let sequence = SequenceStep {
            tokens: &tokens,
            start: positions.start,
            blocks,
            cached_tokens: positions.start,
            logits: LogitsWanted::Last,
        };
        let begun = Instant::now();
        self.step(&[sequence], &mut ())?;
        Ok(begun.elapsed())
    }
}
