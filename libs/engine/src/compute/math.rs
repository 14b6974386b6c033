//! Element-wise functions and reductions over a row.

use super::isa::kernel;
use super::lanes::{LANES, Lanes};

/// `exp` of each lane, within 2 ulp; 0 below -87.3, where the result would be subnormal, and at most `exp(88.3)`.
///
/// Cody-Waite reduction by multiples of ln 2 and Cephes' polynomial of degree 6.
#[inline(always)]
pub(crate) fn exp<L: Lanes>(x: L) -> L {
    const LOWEST: f32 = -87.3;
    const HIGHEST: f32 = 88.3;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const COEFFICIENTS: [f32; 6] = [
        1.987_569_1e-4,
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];

    let clamped = L::splat(LOWEST).max(L::splat(HIGHEST).min(x));
    let n = clamped.mul(L::splat(std::f32::consts::LOG2_E)).round();
    let r = n.mul_add(L::splat(-LN_2_HIGH), clamped);
    let r = n.mul_add(L::splat(-LN_2_LOW), r);
    let mut p = L::splat(COEFFICIENTS[0]);
    for coefficient in &COEFFICIENTS[1..] {
        p = p.mul_add(r, L::splat(*coefficient));
    }
    let p = p.mul_add(r.mul(r), r).add(L::splat(1.0));
    p.scale_by_power_of_two(n).zero_unless_greater(x, LOWEST)
}

/// [`exp`] of one value, bit for bit what a lane gives.
#[inline(always)]
pub(crate) fn exp_one<L: Lanes>(x: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    exp(L::splat(x)).store(&mut lanes);
    lanes[0]
}

/// `x / (1 + exp(-x))`.
#[inline(always)]
pub(crate) fn silu<L: Lanes>(x: L) -> L {
    let denominator = L::splat(1.0).add(exp(L::splat(0.0).sub(x)));
    x.div(denominator)
}

/// `0.5 x (1 + tanh(u))` with `u = sqrt(2 / pi) (x + 0.044715 x³)`, as `x / (1 + exp(-2 u))`.
#[inline(always)]
pub(crate) fn gelu_tanh<L: Lanes>(x: L) -> L {
    const CUBIC: f32 = 0.044_715;
    const TWICE_ROOT: f32 = 2.0 * 0.797_884_6;
    let cube = x.mul(x).mul(x);
    let minus_twice = cube.mul_add(L::splat(CUBIC), x).mul(L::splat(-TWICE_ROOT));
    x.div(L::splat(1.0).add(exp(minus_twice)))
}

/// `cap * tanh(x / cap)`, with `tanh(y) = 1 - 2 / (exp(2 y) + 1)`.
#[inline(always)]
pub(crate) fn soft_cap<L: Lanes>(x: L, cap: f32) -> L {
    let exponential = exp(x.mul(L::splat(2.0)).div(L::splat(cap)));
    let rest = L::splat(2.0).div(exponential.add(L::splat(1.0)));
    L::splat(1.0).sub(rest).mul(L::splat(cap))
}

kernel! {
    /// [`soft_cap`] of every element.
    pub(crate) fn soft_cap_row(row: &mut [f32], cap: f32) = soft_cap_row_lanes
}

#[inline(always)]
fn soft_cap_row_lanes<L: Lanes>(row: &mut [f32], cap: f32) {
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        soft_cap(L::load(chunk), cap).store(chunk);
    }
    if !rest.is_empty() {
        soft_cap(L::load_partial(rest, 0.0), cap).store_partial(rest);
    }
}

kernel! {
    /// `row[i] = exp(row[i] - greatest) / sum`.
    pub(crate) fn softmax_row(row: &mut [f32]) = softmax_row_lanes
}

#[inline(always)]
fn softmax_row_lanes<L: Lanes>(row: &mut [f32]) {
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    let mut greatest = L::load_partial(rest, f32::NEG_INFINITY);
    for chunk in chunks.iter() {
        greatest = greatest.max(L::load(chunk));
    }
    let greatest = L::splat(greatest.greatest());
    let mut total = L::splat(0.0);
    for chunk in chunks.iter_mut() {
        let weights = exp(L::load(chunk).sub(greatest));
        weights.store(chunk);
        total = total.add(weights);
    }
    if !rest.is_empty() {
        let weights = exp(L::load_partial(rest, f32::NEG_INFINITY).sub(greatest));
        weights.store_partial(rest);
        total = total.add(weights);
    }
    let total = L::splat(total.sum());
    for chunk in chunks {
        L::load(chunk).div(total).store(chunk);
    }
    if !rest.is_empty() {
        L::load_partial(rest, 0.0).div(total).store_partial(rest);
    }
}

kernel! {
    /// `sum[i] = fma(weight, x[i], sum[i])`.
    pub(crate) fn add_weighted(sum: &mut [f32], weight: f32, x: &[f32]) = add_weighted_lanes
}

#[inline(always)]
fn add_weighted_lanes<L: Lanes>(sum: &mut [f32], weight: f32, x: &[f32]) {
    assert_eq!(sum.len(), x.len(), "rows of one width");
    let (chunks, rest) = sum.as_chunks_mut::<LANES>();
    let (others, rest_others) = x.as_chunks::<LANES>();
    let weights = L::splat(weight);
    for (sum, x) in chunks.iter_mut().zip(others) {
        weights.mul_add(L::load(x), L::load(sum)).store(sum);
    }
    if !rest.is_empty() {
        let x = L::load_partial(rest_others, 0.0);
        weights.mul_add(x, L::load_partial(rest, 0.0)).store_partial(rest);
    }
}

kernel! {
    /// RMSNorm (arXiv 1910.07467): `out = x / sqrt(mean(x²) + epsilon) * weight`.
    pub(crate) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) = rms_norm_lanes
}

#[inline(always)]
fn rms_norm_lanes<L: Lanes>(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    assert!(
        x.len() == weight.len() && x.len() == out.len(),
        "rows of one width"
    );
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut squares = L::splat(0.0);
    for chunk in chunks {
        let lanes = L::load(chunk);
        squares = lanes.mul_add(lanes, squares);
    }
    if !rest.is_empty() {
        let lanes = L::load_partial(rest, 0.0);
        squares = lanes.mul_add(lanes, squares);
    }
    let mean = squares.sum() / x.len() as f32;
    let factor = L::splat(1.0 / (mean + epsilon).sqrt());
    let (weights, rest_weights) = weight.as_chunks::<LANES>();
    let (outs, rest_out) = out.as_chunks_mut::<LANES>();
    for ((chunk, weight), out) in chunks.iter().zip(weights).zip(outs) {
        L::load(chunk).mul(factor).mul(L::load(weight)).store(out);
    }
    if !rest.is_empty() {
        let scaled = L::load_partial(rest, 0.0).mul(factor);
        scaled
            .mul(L::load_partial(rest_weights, 0.0))
            .store_partial(rest_out);
    }
}

kernel! {
    /// `x += y`.
    pub(crate) fn add_assign(x: &mut [f32], y: &[f32]) = add_assign_lanes
}

#[inline(always)]
fn add_assign_lanes<L: Lanes>(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "rows of one width");
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    let (others, rest_others) = y.as_chunks::<LANES>();
    for (x, y) in chunks.iter_mut().zip(others) {
        L::load(x).add(L::load(y)).store(x);
    }
    for (x, y) in rest.iter_mut().zip(rest_others) {
        *x += y;
    }
}

kernel! {
    /// Rounds to binary16, ties to even.
    pub(crate) fn to_f16(from: &[f32], to: &mut [u16]) = to_f16_lanes
}

#[inline(always)]
fn to_f16_lanes<L: Lanes>(from: &[f32], to: &mut [u16]) {
    assert_eq!(from.len(), to.len(), "rows of one width");
    let (chunks, rest) = from.as_chunks::<LANES>();
    let (outs, rest_out) = to.as_chunks_mut::<LANES>();
    for (from, to) in chunks.iter().zip(outs) {
        L::load(from).to_f16(to);
    }
    if !rest.is_empty() {
        let mut lanes = [0; LANES];
        L::load_partial(rest, 0.0).to_f16(&mut lanes);
        rest_out.copy_from_slice(&lanes[..rest.len()]);
    }
}

#[cfg(test)]
mod tests;
