//! How fast this node computes prompts and moves KV, learned from what it does.
//!
//! A step's time is fitted by `ms = a * tokens + b * tokens * context / 1000`, the model that the router
//! predicts with. Least squares with forgetting: a sample's weight halves every `HALF_LIFE_SAMPLES` samples,
//! so that the rates follow a machine that becomes slower or faster.
//!
//! Pure: callers pass what they measured.

use std::ops::Range;

/// Some seconds of steps: long enough to average out noise, short enough to notice a busy neighbour.
const HALF_LIFE_SAMPLES: f64 = 32.0;

/// Below this share of the diagonal the two features were collinear (all samples at one context), and the
/// context term cannot be told from the constant one.
const DETERMINANT_SHARE_MIN: f64 = 1e-4;

/// Weight of a new sample in the mean of transfer rates.
const TRANSFER_WEIGHT: f64 = 0.2;

/// Fit of the time of prefill steps.
#[derive(Debug, Default, Clone, Copy)]
pub struct StepRate {
    tokens_tokens: f64,
    tokens_context: f64,
    context_context: f64,
    tokens_ms: f64,
    context_ms: f64,
}

impl StepRate {
    /// Learns from a step that computed these runs of positions in `elapsed_ms`.
    pub fn observe<'a>(&mut self, chunks: impl Iterator<Item = &'a Range<usize>>, elapsed_ms: f64) {
        let (mut tokens, mut context) = (0.0, 0.0);
        for chunk in chunks {
            let (token_count, mean_context) = (chunk.len() as f64, (chunk.start + chunk.end) as f64 / 2.0);
            tokens += token_count;
            context += token_count * mean_context / 1000.0;
        }
        if tokens == 0.0 || !elapsed_ms.is_finite() {
            return;
        }
        let keep = 0.5_f64.powf(1.0 / HALF_LIFE_SAMPLES);
        let learn = |sum: &mut f64, sample: f64| *sum = *sum * keep + sample;
        learn(&mut self.tokens_tokens, tokens * tokens);
        learn(&mut self.tokens_context, tokens * context);
        learn(&mut self.context_context, context * context);
        learn(&mut self.tokens_ms, tokens * elapsed_ms);
        learn(&mut self.context_ms, context * elapsed_ms);
    }

    /// Milliseconds per token, and per token and thousand tokens of context; 0 until measured, never negative.
    pub fn coefficients(&self) -> (f64, f64) {
        if self.tokens_tokens == 0.0 {
            return (0.0, 0.0);
        }
        let token_alone = (self.tokens_ms / self.tokens_tokens, 0.0);
        let diagonal = self.tokens_tokens * self.context_context;
        let determinant = diagonal - self.tokens_context * self.tokens_context;
        if determinant <= DETERMINANT_SHARE_MIN * diagonal {
            return token_alone;
        }
        let a = (self.context_context * self.tokens_ms - self.tokens_context * self.context_ms) / determinant;
        let b = (self.tokens_tokens * self.context_ms - self.tokens_context * self.tokens_ms) / determinant;
        if b < 0.0 {
            token_alone
        } else if a < 0.0 {
            (0.0, self.context_ms / self.context_context)
        } else {
            (a, b)
        }
    }
}

/// Smoothed bytes per millisecond of transfers.
#[derive(Debug, Default, Clone, Copy)]
pub struct TransferRate(Option<f64>);

impl TransferRate {
    /// Learns from `bytes` that were on their way for `elapsed_ms`.
    pub fn observe(&mut self, bytes: u64, elapsed_ms: f64) {
        if bytes == 0 || !elapsed_ms.is_finite() || elapsed_ms <= 0.0 {
            return;
        }
        let sample = bytes as f64 / elapsed_ms;
        self.0 = Some(match self.0 {
            None => sample,
            Some(mean) => mean + TRANSFER_WEIGHT * (sample - mean),
        });
    }

    /// Bytes per millisecond; 0 until measured.
    pub fn bytes_per_ms(&self) -> f64 {
        self.0.unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests;
