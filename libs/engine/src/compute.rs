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
//! - **FP8 product** (`dense`): for each block of 128 columns in order, from 0: `y[n] = fma(scale, sum, y[n])`, `sum` being the dense
//!   product of the block's columns. `exact` multiplies every weight with its scale first, and is a dense product of that.
//! - **Sums over a row** (RMSNorm, softmax): partial sum `i mod 16` per lane in order, then a fixed tree.
//! - **exp**: one polynomial (`math`). **SiLU**, **GELU** and **soft caps** are fixed expressions of it, element by element.
//! - **Attention** (`attention`): K and V come out of the blocks only. Scores are dense products over the head. Softmax and the
//!   weighted sum of V run over fixed segments of 256 positions, which are joined in order by rescaling. A window takes away the
//!   positions before it, by the query's own position: they are no part of any maximum or sum.
//! - **Norms of queries and keys, of branches, and the scale of embeddings**: as the stream's norm, over the head or all heads; what is
//!   normalised after its product is stored, normalised, and added to the stream.
//! - **Experts** (`crate::step`): the router's row is a softmax; the greatest are picked, of equal ones the first, and, where the model
//!   says so, divided by their sum in the order of their numbers. Each expert's product is that of the row alone; from 0, in the
//!   order of their numbers, `y = fma(weight, product, y)`, and then `y` is added to the stream.
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
