//! A weight matrix in whatever form, and where its products go.

use std::io;
use std::ops::Range;

use super::activations::ActivationBlock;
use super::dense::{self, Dense};
use super::isa::kernel;
use super::lanes::{BLOCK, LANES, Lanes};
use super::math::{gelu_tanh, silu};
use super::quantised::{self, Quantised};
use super::shared::Shared;
use crate::tensor::TensorView;

/// What becomes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// `out = product`.
    Store,
    /// `out += product`.
    Add,
    /// `out = silu(out) * product`: the feed-forward gate.
    SiluGate,
    /// `out = gelu(out) * product`, likewise.
    GeluGate,
}

/// Where products go: `[rows][stride]` from column `first_column` on.
pub(crate) struct Target<'a> {
    pub(crate) out: &'a Shared<'a, f32>,
    pub(crate) stride: usize,
    pub(crate) first_column: usize,
    pub(crate) epilogue: Epilogue,
}

impl Target<'_> {
    /// Outputs `output .. output + count` of row `row`.
    #[inline(always)]
    pub(crate) fn put<L: Lanes>(&self, row: usize, output: usize, count: usize, product: L) {
        let start = row * self.stride + self.first_column + output;
        // SAFETY: an element belongs to one output of one row, and `Matmul` gives each to one item of a job.
        let out = unsafe { self.out.range(start, count) };
        if let Ok(out) = <&mut [f32; LANES]>::try_from(&mut *out) {
            self.apply(L::load(out), product).store(out);
        } else {
            self.apply(L::load_partial(out, 0.0), product).store_partial(out);
        }
    }

    #[inline(always)]
    fn apply<L: Lanes>(&self, old: L, product: L) -> L {
        match self.epilogue {
            Epilogue::Store => product,
            Epilogue::Add => old.add(product),
            Epilogue::SiluGate => silu(old).mul(product),
            Epilogue::GeluGate => gelu_tanh(old).mul(product),
        }
    }
}

/// The rows that a matrix is multiplied with.
#[derive(Clone, Copy)]
pub(crate) enum Activations<'a> {
    /// `[rows][cols]`.
    Dense(&'a [f32]),
    /// `[rows][planes][cols / 32]`; a row's product is the sum of its planes'.
    Quantised {
        blocks: &'a [ActivationBlock],
        planes: Planes,
    },
}

/// How finely activations are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Planes {
    /// 8 bits.
    One = 1,
    /// 8 bits, and 8 for what they leave.
    Two = 2,
}

/// A weight matrix `[outputs, inputs]`.
pub(crate) enum Matrix {
    Dense(Dense),
    Quantised(Quantised),
}

impl Matrix {
    /// Packs a matrix. `exact` widens every weight to `f32`; else weights keep their bits.
    pub(crate) fn pack(view: &TensorView<'_>, exact: bool) -> io::Result<Self> {
        if !exact
            && view.cols.is_multiple_of(BLOCK)
            && let Some(quantised) = Quantised::pack(view)?
        {
            return Ok(Self::Quantised(quantised));
        }
        Ok(Self::Dense(Dense::pack(view, !exact)?))
    }

    /// Packs a matrix of FP8 numbers and the scales that go with them: one for all, one for each row, or one for each block of
    /// 128 rows and columns.
    pub(crate) fn pack_scaled(
        view: &TensorView<'_>,
        scales: &TensorView<'_>,
        exact: bool,
    ) -> io::Result<Self> {
        Ok(Self::Dense(Dense::pack_scaled(view, scales, !exact)?))
    }

    /// Outputs.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Dense(dense) => dense.rows(),
            Self::Quantised(quantised) => quantised.rows(),
        }
    }

    /// Inputs.
    pub(crate) fn cols(&self) -> usize {
        match self {
            Self::Dense(dense) => dense.cols(),
            Self::Quantised(quantised) => quantised.cols(),
        }
    }

    /// Groups of sixteen outputs, the unit in which work is split.
    pub(crate) fn tiles(&self) -> usize {
        self.rows().div_ceil(LANES)
    }

    /// Whether it takes [`Activations::Quantised`].
    pub(crate) fn quantised(&self) -> bool {
        matches!(self, Self::Quantised(_))
    }

    /// Bytes of packed weights.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Dense(dense) => dense.bytes(),
            Self::Quantised(quantised) => quantised.bytes(),
        }
    }
}

kernel! {
    /// Tiles `tiles` of `matrix` times rows `rows` of `activations` into `target`.
    pub(crate) fn multiply(
        matrix: &Matrix,
        tiles: Range<usize>,
        activations: Activations<'_>,
        rows: Range<usize>,
        target: &Target<'_>,
    ) = multiply_lanes
}

#[inline(always)]
fn multiply_lanes<L: Lanes>(
    matrix: &Matrix,
    tiles: Range<usize>,
    activations: Activations<'_>,
    rows: Range<usize>,
    target: &Target<'_>,
) {
    match (matrix, activations) {
        (Matrix::Dense(matrix), Activations::Dense(x)) => {
            dense::multiply::<L>(matrix, tiles, x, rows, target);
        }
        (Matrix::Quantised(matrix), Activations::Quantised { blocks, planes }) => {
            quantised::multiply::<L>(matrix, tiles, blocks, planes, rows, target);
        }
        (Matrix::Dense(_), Activations::Quantised { .. }) | (Matrix::Quantised(_), Activations::Dense(_)) => {
            unreachable!("activations are made in the form that `Matrix::quantised` asks for")
        }
    }
}
