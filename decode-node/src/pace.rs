//! How many prompt tokens fit into a step beside running sequences, so that these keep their limits on gaps.
//!
//! What a step will take is foreseen from the rates that were measured, and multiplied by what steps take longer than foreseen at the
//! 99th percentile: that is learned, too, so that a busy machine is no reason to miss a limit. Pure: times come from the caller.

use std::ops::Range;

use types::Millis;

use crate::rates::{PrefillRate, Smoothed};

/// Steps out of a hundred that may take longer than their limit says.
const MISSED_PER_CENT: f64 = 1.0;
/// How fast the margin follows what steps take. One step that takes twice as long adds 5 %.
const LEARNING: f64 = 0.05;
/// A margin beyond would leave prompts nothing on a machine that stood still for a while.
const MARGIN_MAX: f64 = 3.0;
/// Prompts advance by so many tokens in each step, whatever that costs: otherwise a limit below what a step takes would stop them.
pub const PROMPT_TOKENS_MIN: usize = 8;

/// What steps take.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    decode_step: Smoothed,
    prefill: PrefillRate,
    margin: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            decode_step: Smoothed::default(),
            prefill: PrefillRate::default(),
            margin: 1.0,
        }
    }
}

/// The work of a step.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Work {
    /// Tokens of prompts.
    pub prompt_tokens: f64,
    /// The sum over them of the thousands of tokens that each one attends to.
    pub token_kilocontext: f64,
    /// Whether sequences draw tokens in it, too.
    pub decodes: bool,
}

impl Work {
    /// Adds the tokens at these positions of a prompt.
    pub fn add_prompt(&mut self, positions: &Range<usize>) {
        let tokens = positions.len() as f64;
        self.prompt_tokens += tokens;
        self.token_kilocontext += tokens * (positions.start + positions.end) as f64 / 2000.0;
    }
}

impl Pace {
    /// Takes in what a step took.
    pub fn observe(&mut self, work: &Work, took: Millis) {
        if work.decodes && work.prompt_tokens > 0.0 {
            self.learn_margin(self.foreseen(work).0, took.0);
        }
        if work.prompt_tokens == 0.0 {
            self.decode_step.observe(took.0);
        } else {
            // The running sequences' rows share the step; their time is known from steps of their own.
            let beside = if work.decodes { self.decode_step.get() } else { 0.0 };
            let alone = (took.0 - beside).max(0.0);
            self.prefill
                .observe(work.prompt_tokens, work.token_kilocontext, alone);
        }
    }

    /// Follows a quantile: one miss in a hundred outweighs the other steps.
    fn learn_margin(&mut self, foreseen: f64, took: f64) {
        let ratio = took / foreseen;
        if !(foreseen > 0.0 && ratio.is_finite()) {
            return;
        }
        let missed = MISSED_PER_CENT / 100.0;
        let step = match ratio > self.margin {
            true => 1.0 - missed,
            false => -missed,
        };
        self.margin = (self.margin + LEARNING * step).clamp(1.0, MARGIN_MAX);
    }

    /// What a step of that work will take, on average.
    pub fn foreseen(&self, work: &Work) -> Millis {
        let (token, kilocontext) = self.prefill.get();
        let decode = if work.decodes { self.decode_step.get() } else { 0.0 };
        Millis(decode + token * work.prompt_tokens + kilocontext * work.token_kilocontext)
    }

    /// Prompt tokens, from the position `start` of a prompt on, that a step may compute beside sequences whose gaps must not exceed
    /// `limit`: at least [`PROMPT_TOKENS_MIN`], and at most `most`. All of them while nothing is measured.
    pub fn prompt_tokens(&self, limit: Millis, start: usize, most: usize) -> usize {
        let (token, kilocontext) = self.prefill.get();
        if token <= 0.0 {
            return most;
        }
        let room = limit.0 / self.margin - self.decode_step.get();
        // Each attends to what is before it; that the last ones attend to some hundred more is within the margin.
        let each = token + kilocontext * start as f64 / 1000.0;
        let fits = if room > 0.0 { (room / each) as usize } else { 0 };
        fits.max(PROMPT_TOKENS_MIN).min(most)
    }

    /// Milliseconds of a step without prompts; 0 means not measured yet.
    pub fn decode_step_ms(&self) -> f64 {
        self.decode_step.get()
    }

    /// As [`PrefillRate::get`].
    pub fn prefill_rates(&self) -> (f64, f64) {
        self.prefill.get()
    }
}

#[cfg(test)]
mod tests;
