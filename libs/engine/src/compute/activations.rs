//! Rows of activations in the form that a matrix consumes.

use super::isa::kernel;
use super::lanes::{BLOCK, LANES, Lanes, Words};

/// Below this amplitude a block counts as zero, so that `127 / amplitude` stays finite.
const AMPLITUDE_MIN: f32 = 1e-30;

/// 32 columns of one row, rounded to 8 bits.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C, align(16))]
pub(crate) struct ActivationBlock {
    /// The columns.
    pub(crate) words: Words,
    /// Value of a unit.
    pub(crate) scale: f32,
    /// `scale` times the sum of all columns.
    pub(crate) scaled_sum: f32,
    /// Sums of each half's columns.
    pub(crate) sums: [i32; 2],
}

/// Units of the second plane to one of the first.
const PLANE_RATIO: f32 = 254.0;

kernel! {
    /// Rounds a row, whose width is a multiple of 32, to one or two planes of blocks; a plane is `width / 32` blocks.
    ///
    /// The first plane holds `round(x / (amax / 127))`, ties to even. The second holds what is left, in units 254 times smaller.
    pub(crate) fn quantise_row(row: &[f32], blocks: &mut [ActivationBlock]) = quantise_row_lanes
}

#[inline(always)]
fn quantise_row_lanes<L: Lanes>(row: &[f32], blocks: &mut [ActivationBlock]) {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let (first, second) = blocks.split_at_mut(chunks.len() / 2);
    assert!(
        rest.is_empty() && chunks.len() == 2 * first.len(),
        "a block per 32 columns"
    );
    assert!(
        second.is_empty() || second.len() == first.len(),
        "one or two planes"
    );
    for (index, (pair, block)) in chunks.chunks_exact(BLOCK / LANES).zip(first).enumerate() {
        let (low, high) = (L::load(&pair[0]), L::load(&pair[1]));
        let amplitude = low.abs().max(high.abs()).greatest();
        if amplitude < AMPLITUDE_MIN {
            *block = ActivationBlock::default();
            if let Some(rest) = second.get_mut(index) {
                *rest = ActivationBlock::default();
            }
            continue;
        }
        let (scale, per_unit) = (amplitude / 127.0, 127.0 / amplitude);
        let codes = (round_to_unit(low, per_unit), round_to_unit(high, per_unit));
        fill(block, codes, scale);
        if let Some(rest) = second.get_mut(index) {
            let unit = L::splat(-scale);
            let (low, high) = (codes.0.mul_add(unit, low), codes.1.mul_add(unit, high));
            let per_unit = per_unit * PLANE_RATIO;
            fill(
                rest,
                (round_to_unit(low, per_unit), round_to_unit(high, per_unit)),
                scale / PLANE_RATIO,
            );
        }
    }
}

/// Integral lanes in `-127..=127`.
#[inline(always)]
fn round_to_unit<L: Lanes>(x: L, per_unit: f32) -> L {
    L::splat(-127.0).max(L::splat(127.0).min(x.mul(L::splat(per_unit))).round())
}

#[inline(always)]
fn fill<L: Lanes>(block: &mut ActivationBlock, (low, high): (L, L), scale: f32) {
    // Sums of integers below 2^24: exact in any order.
    let (sum_low, sum_high) = (low.sum(), high.sum());
    block.scale = scale;
    block.scaled_sum = scale * (sum_low + sum_high);
    block.sums = [sum_low as i32, sum_high as i32];
    let (first, second) = block.words.split_at_mut(LANES / 4);
    first.copy_from_slice(&low.to_words());
    second.copy_from_slice(&high.to_words());
}

#[cfg(test)]
mod tests;
