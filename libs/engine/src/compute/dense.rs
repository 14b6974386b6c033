//! Matrices of plain floating-point weights, and their product with `f32` activations.
//!
//! Packed for sixteen outputs at a time: `[tile][column][16]`. A lane's sum is one chain of fused multiply-adds over the
//! columns in order.

use std::io;
use std::ops::Range;

use super::lanes::{LANES, Lanes, floats, halves};
use super::matrix::Target;
use super::pages::Pages;
use crate::dequantise::dequantise_row;
use crate::tensor::{TensorFormat, TensorView};

/// How a packed weight is stored.
pub(crate) trait Element {
    const BYTES: usize;
    /// Column of a tile, widened exactly.
    fn load<L: Lanes>(column: &[u8]) -> L;
}

pub(crate) struct Single;
pub(crate) struct Half;
pub(crate) struct Brain;

impl Element for Single {
    const BYTES: usize = 4;
    #[inline(always)]
    fn load<L: Lanes>(column: &[u8]) -> L {
        L::load(&floats(column))
    }
}

impl Element for Half {
    const BYTES: usize = 2;
    #[inline(always)]
    fn load<L: Lanes>(column: &[u8]) -> L {
        L::from_f16(&halves(column))
    }
}

impl Element for Brain {
    const BYTES: usize = 2;
    #[inline(always)]
    fn load<L: Lanes>(column: &[u8]) -> L {
        L::from_bf16(&halves(column))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Storage {
    Single,
    Half,
    Brain,
}

/// A packed matrix `[rows, cols]`.
pub(crate) struct Dense {
    storage: Storage,
    rows: usize,
    cols: usize,
    tiles: Pages,
}

impl Dense {
    /// Packs a matrix of any format. Formats of 16 bits keep them if `compact`; everything else becomes `f32`.
    pub(crate) fn pack(view: &TensorView<'_>, compact: bool) -> io::Result<Self> {
        let storage = match view.format {
            TensorFormat::F16 if compact => Storage::Half,
            TensorFormat::Bf16 if compact => Storage::Brain,
            _ => Storage::Single,
        };
        let bytes = if storage == Storage::Single { 4 } else { 2 };
        let tile_bytes = view.cols * LANES * bytes;
        let mut tiles = Pages::zeroed(view.rows.div_ceil(LANES) * tile_bytes)?;
        let row_bytes = view.format.row_bytes(view.cols);
        let mut row = vec![0.0; view.cols];
        for (index, encoded) in view.bytes.chunks_exact(row_bytes).enumerate() {
            let tile = &mut tiles.bytes_mut()[index / LANES * tile_bytes..][..tile_bytes];
            let places = tile[index % LANES * bytes..].chunks_mut(LANES * bytes);
            if storage == Storage::Single {
                dequantise_row(view.format, encoded, &mut row);
                for (place, value) in places.zip(&row) {
                    place[..4].copy_from_slice(&value.to_le_bytes());
                }
            } else {
                for (place, value) in places.zip(encoded.chunks_exact(2)) {
                    place[..2].copy_from_slice(value);
                }
            }
        }
        Ok(Self {
            storage,
            rows: view.rows,
            cols: view.cols,
            tiles,
        })
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn bytes(&self) -> usize {
        self.tiles.bytes().len()
    }
}

/// Tiles `tiles` of `matrix` times rows `rows` of `activations` into `target`.
#[inline(always)]
pub(crate) fn multiply<L: Lanes>(
    matrix: &Dense,
    tiles: Range<usize>,
    activations: &[f32],
    rows: Range<usize>,
    target: &Target<'_>,
) {
    match matrix.storage {
        Storage::Single => multiply_elements::<L, Single>(matrix, tiles, activations, rows, target),
        Storage::Half => multiply_elements::<L, Half>(matrix, tiles, activations, rows, target),
        Storage::Brain => multiply_elements::<L, Brain>(matrix, tiles, activations, rows, target),
    }
}

/// One row keeps four tiles in flight and two rows two, since one chain alone waits for each multiply-add.
#[inline(always)]
fn multiply_elements<L: Lanes, E: Element>(
    matrix: &Dense,
    tiles: Range<usize>,
    activations: &[f32],
    rows: Range<usize>,
    target: &Target<'_>,
) {
    let mut tile = tiles.start;
    while tile < tiles.end {
        let run_tiles = if tiles.end - tile >= 4 { 4 } else { 1 };
        let mut row = rows.start;
        macro_rules! run {
            ($count:literal, $tiles:literal) => {
                while rows.end - row >= $count {
                    for first in (tile..tile + run_tiles).step_by(if run_tiles == 4 { $tiles } else { 1 }) {
                        if run_tiles == 4 {
                            block::<L, E, $count, $tiles>(matrix, first, activations, row, target);
                        } else {
                            block::<L, E, $count, 1>(matrix, first, activations, row, target);
                        }
                    }
                    row += $count;
                }
            };
        }
        if L::TILE_ROWS >= 8 {
            run!(8, 1);
        }
        if L::TILE_ROWS >= 4 {
            run!(4, 1);
            run!(2, 2);
        }
        run!(1, 4);
        tile += run_tiles;
    }
}

/// `T` tiles of `N` rows.
#[inline(always)]
fn block<L: Lanes, E: Element, const N: usize, const T: usize>(
    matrix: &Dense,
    tile: usize,
    activations: &[f32],
    row: usize,
    target: &Target<'_>,
) {
    let cols = matrix.cols;
    let tile_bytes = cols * LANES * E::BYTES;
    let mut weights: [&[u8]; T] = [&[]; T];
    for t in 0..T {
        weights[t] = &matrix.tiles.bytes()[(tile + t) * tile_bytes..][..tile_bytes];
    }
    let mut x: [&[f32]; N] = [&[]; N];
    for i in 0..N {
        x[i] = &activations[(row + i) * cols..][..cols];
    }
    let mut sums = [[L::splat(0.0); T]; N];
    for column in 0..cols {
        let mut of_tile = [L::splat(0.0); T];
        for t in 0..T {
            of_tile[t] = E::load(&weights[t][column * LANES * E::BYTES..][..LANES * E::BYTES]);
        }
        for i in 0..N {
            let x = L::splat(x[i][column]);
            for t in 0..T {
                sums[i][t] = x.mul_add(of_tile[t], sums[i][t]);
            }
        }
    }
    for i in 0..N {
        for t in 0..T {
            let first = (tile + t) * LANES;
            target.put(row + i, first, LANES.min(matrix.rows - first), sums[i][t]);
        }
    }
}

#[cfg(test)]
mod tests;
