//! What a step will do, checked and laid out before anything is computed.

use std::collections::HashSet;

use types::BlockId;

use super::{LOGITS_MAX, LogitsWanted, STEP_ROWS_MAX, SequenceStep, StepError};
use crate::compute::attention::tile_rows;
use crate::compute::kv::Pool;
use crate::config::ModelConfig;

/// Consecutive rows of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Index in the batch.
    pub(super) sequence: usize,
    /// First row in the step.
    pub(super) row: usize,
    /// Rows.
    pub(super) rows: usize,
    /// Position of the first row.
    pub(super) position: usize,
}

/// A checked step.
pub(super) struct Plan {
    rows: usize,
    positions: usize,
    tiles: Vec<Run>,
    block_runs: Vec<Run>,
    logit_rows: Vec<usize>,
    logit_tiles: Vec<Run>,
}

impl Plan {
    pub(super) fn new(
        batch: &[SequenceStep<'_>],
        config: &ModelConfig,
        pool: &Pool,
    ) -> Result<Self, StepError> {
        let mut plan = Self {
            rows: 0,
            positions: 0,
            tiles: Vec::new(),
            block_runs: Vec::new(),
            logit_rows: Vec::new(),
            logit_tiles: Vec::new(),
        };
        let mut written = HashSet::new();
        for (sequence, step) in batch.iter().enumerate() {
            check(sequence, step, config, pool)?;
            plan.add(sequence, step, config, pool, &mut written)?;
        }
        let rows_max = LOGITS_MAX / config.vocabulary;
        if plan.logit_rows.len() > rows_max {
            return Err(StepError::TooManyLogits {
                rows: plan.logit_rows.len(),
                rows_max,
            });
        }
        Ok(plan)
    }

    fn add(
        &mut self,
        sequence: usize,
        step: &SequenceStep<'_>,
        config: &ModelConfig,
        pool: &Pool,
        written: &mut HashSet<BlockId>,
    ) -> Result<(), StepError> {
        let (row, rows) = (self.rows, step.tokens.len());
        let whole = Run {
            sequence,
            row,
            rows,
            position: step.start,
        };
        self.rows = row.saturating_add(rows);
        if self.rows > STEP_ROWS_MAX {
            return Err(StepError::TooManyRows { rows: self.rows });
        }
        self.positions = self.positions.max(step.start + rows);
        let block_tokens = pool.layout().block_tokens;
        let tile_rows = tile_rows(config.heads / config.kv_heads);
        self.tiles.extend(whole.split(tile_rows, 0));
        for run in whole.split(block_tokens, step.start % block_tokens) {
            let block = step.blocks[run.position / block_tokens];
            if run.position + run.rows > step.cached_tokens && !written.insert(block) {
                return Err(StepError::SharedWrite { block });
            }
            self.block_runs.push(run);
        }
        let skipped = match step.logits {
            LogitsWanted::None => rows,
            LogitsWanted::Last => rows - 1,
            LogitsWanted::All => 0,
        };
        let wanted = Run {
            sequence,
            row: self.logit_rows.len(),
            rows: rows - skipped,
            position: step.start + skipped,
        };
        self.logit_tiles.extend(wanted.split(tile_rows, 0));
        self.logit_rows.extend(row + skipped..row + rows);
        Ok(())
    }

    /// Rows of the step.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Positions that any row may have.
    pub(super) fn positions(&self) -> usize {
        self.positions
    }

    /// Runs that attend together.
    pub(super) fn tiles(&self) -> &[Run] {
        &self.tiles
    }

    /// Runs that lie in one block each; together all rows.
    pub(super) fn block_runs(&self) -> &[Run] {
        &self.block_runs
    }

    /// Rows whose logits are wanted, ascending.
    pub(super) fn logit_rows(&self) -> &[usize] {
        &self.logit_rows
    }

    /// Runs of these rows that attend together; their rows count from 0 in the order of [`Plan::logit_rows`].
    pub(super) fn logit_tiles(&self) -> &[Run] {
        &self.logit_tiles
    }
}

impl Run {
    /// Cuts the run into pieces of `rows` rows; the first is shorter by `offset`.
    fn split(self, rows: usize, offset: usize) -> impl Iterator<Item = Self> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let piece = (rows - if done == 0 { offset } else { 0 }).min(self.rows - done);
            let run = Self {
                row: self.row + done,
                position: self.position + done,
                rows: piece,
                ..self
            };
            done += piece;
            (piece > 0).then_some(run)
        })
    }
}

fn check(
    sequence: usize,
    step: &SequenceStep<'_>,
    config: &ModelConfig,
    pool: &Pool,
) -> Result<(), StepError> {
    if step.tokens.is_empty() {
        return Err(StepError::Empty { sequence });
    }
    let tokens = step.start.saturating_add(step.tokens.len());
    if tokens > config.context_tokens_max {
        let context_tokens_max = config.context_tokens_max;
        return Err(StepError::Context {
            sequence,
            tokens,
            context_tokens_max,
        });
    }
    let vocabulary = config.vocabulary;
    if let Some(&token) = step.tokens.iter().find(|token| **token as usize >= vocabulary) {
        return Err(StepError::Token { token, vocabulary });
    }
    let needed = pool.layout().blocks_for(tokens);
    let Some(blocks) = step.blocks.get(..needed) else {
        return Err(StepError::Blocks {
            sequence,
            needed,
            found: step.blocks.len(),
        });
    };
    match blocks.iter().find(|block| block.0 as usize >= pool.blocks()) {
        Some(&block) => Err(StepError::BlockId {
            block,
            blocks: pool.blocks(),
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
