//! Rotary position embedding (arXiv 2104.09864) and its long-context variants.

use std::f64::consts::PI;

use super::isa::kernel;
use super::lanes::Lanes;
use crate::config::{RopeConfig, RopeScaling, RopeStyle};

/// Cosines and sines of every position up to the greatest one used so far.
pub(crate) struct RopeTable {
    frequencies: Vec<f64>,
    amplitude: f64,
    /// `[position][pair]`: cosine and sine.
    entries: Vec<[f32; 2]>,
}

impl RopeTable {
    pub(crate) fn new(config: &RopeConfig) -> Self {
        let (frequencies, amplitude) = frequencies(config);
        Self {
            frequencies,
            amplitude,
            entries: Vec::new(),
        }
    }

    /// Makes positions below `positions` available. Callers bound it by the model's context.
    pub(crate) fn grow(&mut self, positions: usize) {
        let pairs = self.frequencies.len();
        let known = self.entries.len().checked_div(pairs).unwrap_or(positions);
        for position in known..positions {
            self.entries.extend(self.frequencies.iter().map(|frequency| {
                let (sine, cosine) = (position as f64 * frequency).sin_cos();
                [(cosine * self.amplitude) as f32, (sine * self.amplitude) as f32]
            }));
        }
    }

    /// One cosine and sine per pair.
    pub(crate) fn at(&self, position: usize) -> &[[f32; 2]] {
        let pairs = self.frequencies.len();
        &self.entries[position * pairs..][..pairs]
    }
}

/// Radians per position of each pair, and what multiplies cosines and sines.
fn frequencies(config: &RopeConfig) -> (Vec<f64>, f64) {
    let dims = config.dims as f64;
    let with_base = |base: f64| -> Vec<f64> {
        (0..config.dims / 2)
            .map(|pair| base.powf(-2.0 * pair as f64 / dims))
            .collect()
    };
    let theta = f64::from(config.theta);
    let plain = with_base(theta);
    match &config.scaling {
        RopeScaling::None => (plain, 1.0),
        RopeScaling::Linear { factor } => (
            plain
                .iter()
                .map(|frequency| frequency / f64::from(*factor))
                .collect(),
            1.0,
        ),
        RopeScaling::Dynamic { factor } => {
            // The base of the longest context from the start: one that grew with the sequence would make the KV of a
            // prefix depend on what follows it.
            let factor = f64::from(*factor);
            let growth = factor * factor - (factor - 1.0);
            (with_base(theta * growth.powf(dims / (dims - 2.0))), 1.0)
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } => {
            let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
            let context = *original_context as f64;
            let scale = |frequency: &f64| {
                let rotations = context * frequency / (2.0 * PI);
                let kept = ((rotations - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / f64::from(*factor))
            };
            (plain.iter().map(scale).collect(), 1.0)
        }
        RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast,
            beta_slow,
            attention_factor,
        } => {
            let factor = f64::from(*factor);
            let pair_of = |rotations: f32| {
                let wavelengths = *original_context as f64 / (f64::from(rotations) * 2.0 * PI);
                dims * wavelengths.ln() / (2.0 * theta.ln())
            };
            let low = pair_of(*beta_fast).floor().max(0.0);
            let high = pair_of(*beta_slow).ceil().min(dims - 1.0).max(low + 1e-3);
            let scale = |(pair, frequency): (usize, &f64)| {
                let scaled = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (scaled / factor + 1.0 - scaled)
            };
            let default = if factor > 1.0 {
                0.1 * factor.ln() + 1.0
            } else {
                1.0
            };
            let amplitude = attention_factor.map_or(default, f64::from);
            (plain.iter().enumerate().map(scale).collect(), amplitude)
        }
        RopeScaling::Factors {
            divisors,
            attention_factor,
        } => {
            let scaled = plain
                .iter()
                .zip(divisors)
                .map(|(frequency, by)| frequency / f64::from(*by));
            (scaled.collect(), f64::from(*attention_factor))
        }
    }
}

kernel! {
    /// Rotates each head of a row and multiplies it by `scale`: queries carry the scores' `1 / sqrt(head_dim)`.
    pub(crate) fn rotate(
        heads: &mut [f32],
        head_dim: usize,
        style: RopeStyle,
        angles: &[[f32; 2]],
        scale: f32,
    ) = rotate_lanes
}

/// `(a, b)` becomes `(fma(a, cos, -(b sin)), fma(a, sin, b cos))`, then each is multiplied by `scale`.
#[inline(always)]
fn rotate_lanes<L: Lanes>(
    heads: &mut [f32],
    head_dim: usize,
    style: RopeStyle,
    angles: &[[f32; 2]],
    scale: f32,
) {
    let turn = |a: f32, b: f32, [cosine, sine]: [f32; 2]| {
        (
            a.mul_add(cosine, -(b * sine)) * scale,
            a.mul_add(sine, b * cosine) * scale,
        )
    };
    for head in heads.chunks_exact_mut(head_dim) {
        let (rotated, passed) = head.split_at_mut(2 * angles.len());
        match style {
            RopeStyle::Interleaved => {
                for (pair, angle) in rotated.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
                    (pair[0], pair[1]) = turn(pair[0], pair[1], *angle);
                }
            }
            RopeStyle::HalfSplit => {
                let (low, high) = rotated.split_at_mut(angles.len());
                for ((a, b), angle) in low.iter_mut().zip(high).zip(angles) {
                    (*a, *b) = turn(*a, *b, *angle);
                }
            }
        }
        for value in passed {
            *value *= scale;
        }
    }
}

#[cfg(test)]
mod tests;
