//! The arithmetic of the CPU, and the contract that makes it bit-identical everywhere.
//!
//! Invariant: every output element is computed by one fixed sequence of IEEE operations, which depends on the model, the
//! precision and the element's own inputs alone. Tiling, threads, the number of rows in a batch and the instruction
//! set choose only *when* and *where* an element is computed. The sequences, for finite values:
//!
//! - **Dense product** (`dense`): `y[n] = fma(x[k], w[n][k], y[n])` for `k` in order, from 0.
//! - **Quantised product** (`quantised`): activations are rounded to `i8` per 32 columns, scale `amax / 127`. For each block
//!   of 32 columns in order, from 0: `y = fma(w_scale * x_scale, float(dot), y)`, `dot` being the exact integer sum; then, if the
//!   format has a minimum, `y = fma(w_min, x_scale * float(sum of x), y)`. Formats with two scales per block do the first
//!   step for each half. The normalised stream has a few channels that are far larger than the rest, for which 8 bits are too
//!   coarse: it is rounded to two planes, the second holding what the first leaves, and `y` is the sum of both planes' products.
//! - **Sums over a row** (RMSNorm, softmax): partial sum `i mod 16` per lane in order, then a fixed tree.
//! - **exp**: one polynomial (`math`).
//! - **Attention** (`attention`): K and V come out of the blocks only. Scores are dense products over the head. Softmax and the
//!   weighted sum of V run over fixed segments of 256 positions, which are joined in order by rescaling.
//!
//! Elsewhere: the order of the layers (`crate::step`), the threads (`crate::threads`).

// A kernel's counters address several arrays at once.
#![allow(clippy::needless_range_loop)]

pub(crate) mod activations;
pub(crate) mod attention;
pub(crate) mod dense;
pub(crate) mod isa;
pub(crate) mod kv;
pub(crate) mod lanes;
pub(crate) mod math;
pub(crate) mod matrix;
pub(crate) mod pages;
pub(crate) mod quantised;
pub(crate) mod repack;
pub(crate) mod rope;
pub(crate) mod shared;

pub use isa::Isa;
