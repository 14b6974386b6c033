//! Matrices of plain floating-point weights, and their product with `f32` activations.
//!
//! Packed for sixteen outputs at a time: `[tile][column][16]`. A lane's sum is one chain of fused multiply-adds over the
//! columns in order. FP8 weights have scales: their chain is over 128 columns, and the chains' sums are one of scaled multiply-adds.

use std::io;
use std::ops::Range;

use super::lanes::{LANES, Lanes, floats, halves};
use super::matrix::Target;
use super::pages::Pages;
use crate::dequantise::{F8_E4M3_UNIT, dequantise_row, f8_e4m3, f8_e4m3_as_f16};
use crate::file::SCALE_BLOCK;
use crate::tensor::{TensorFormat, TensorView};

/// How a packed weight is stored.
pub(crate) trait Element {
    const BYTES: usize;
    /// Whether the matrix has scales.
    const SCALED: bool = false;
    /// Column of a tile, widened exactly.
    fn load<L: Lanes>(column: &[u8]) -> L;
}

pub(crate) struct Single;
pub(crate) struct Half;
pub(crate) struct Brain;
pub(crate) struct Byte;

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

impl Element for Byte {
    const BYTES: usize = 1;
    const SCALED: bool = true;
    #[inline(always)]
    fn load<L: Lanes>(column: &[u8]) -> L {
        let mut halves = [0; LANES];
        for (half, byte) in halves.iter_mut().zip(column) {
            *half = f8_e4m3_as_f16(*byte);
        }
        L::from_f16(&halves)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Storage {
    Single,
    Half,
    Brain,
    Byte,
}

/// A packed matrix `[rows, cols]`.
pub(crate) struct Dense {
    storage: Storage,
    rows: usize,
    cols: usize,
    tiles: Pages,
    /// Of [`Storage::Byte`], `[tile][column / 128]`: what the lanes' sums are multiplied by.
    scales: Vec<[f32; LANES]>,
}

/// The scale of a row's block of columns; see [`Dense::pack_scaled`].
fn scale_at(scales: &TensorView<'_>, values: &[f32], weight_rows: usize, row: usize, block: usize) -> f32 {
    match (scales.rows, scales.cols) {
        (1, 1) => values[0],
        (rows, 1) if rows == weight_rows => values[row],
        (_, blocks) => values[row / SCALE_BLOCK * blocks + block],
    }
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
            scales: Vec::new(),
        })
    }

    /// Packs a matrix of FP8 numbers with their scales, which are `[1, 1]`, `[rows, 1]` or `[rows / 128, cols / 128]`, rounded up.
    /// They keep their 8 bits if `compact`; else every weight becomes `f32`, rounded once.
    pub(crate) fn pack_scaled(
        view: &TensorView<'_>,
        scales: &TensorView<'_>,
        compact: bool,
    ) -> io::Result<Self> {
        let (rows, cols) = (view.rows, view.cols);
        let values = scales.to_f32();
        let blocks = cols.div_ceil(SCALE_BLOCK);
        let storage = if compact { Storage::Byte } else { Storage::Single };
        let bytes = if compact { 1 } else { 4 };
        let tile_bytes = cols * LANES * bytes;
        let mut tiles = Pages::zeroed(rows.div_ceil(LANES) * tile_bytes)?;
        let mut of_lanes = vec![[0.0; LANES]; if compact { rows.div_ceil(LANES) * blocks } else { 0 }];
        for (row, encoded) in view.bytes.chunks_exact(cols).enumerate() {
            let (tile, lane) = (row / LANES, row % LANES);
            let packed = &mut tiles.bytes_mut()[tile * tile_bytes..][..tile_bytes];
            let places = packed[lane * bytes..].chunks_mut(LANES * bytes);
            if compact {
                for block in 0..blocks {
                    let scale = scale_at(scales, &values, rows, row, block);
                    of_lanes[tile * blocks + block][lane] = scale * F8_E4M3_UNIT;
                }
                for (place, byte) in places.zip(encoded) {
                    place[0] = *byte;
                }
            } else {
                for (column, (place, byte)) in places.zip(encoded).enumerate() {
                    let scale = scale_at(scales, &values, rows, row, column / SCALE_BLOCK);
                    place[..4].copy_from_slice(&(f8_e4m3(*byte) * scale).to_le_bytes());
                }
            }
        }
        Ok(Self {
            storage,
            rows,
            cols,
            tiles,
            scales: of_lanes,
        })
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn bytes(&self) -> usize {
        self.tiles.bytes().len() + size_of_val(self.scales.as_slice())
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
        Storage::Byte => multiply_elements::<L, Byte>(matrix, tiles, activations, rows, target),
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
    if E::SCALED {
        let blocks = cols.div_ceil(SCALE_BLOCK);
        for block in 0..blocks {
            let columns = block * SCALE_BLOCK..cols.min((block + 1) * SCALE_BLOCK);
            let mut of_block = [[L::splat(0.0); T]; N];
            add_columns::<L, E, N, T>(weights, x, columns, &mut of_block);
            for t in 0..T {
                let scale = L::load(&matrix.scales[(tile + t) * blocks + block]);
                for i in 0..N {
                    sums[i][t] = scale.mul_add(of_block[i][t], sums[i][t]);
                }
            }
        }
    } else {
        add_columns::<L, E, N, T>(weights, x, 0..cols, &mut sums);
    }
    for i in 0..N {
        for t in 0..T {
            let first = (tile + t) * LANES;
            target.put(row + i, first, LANES.min(matrix.rows - first), sums[i][t]);
        }
    }
}

/// Adds the products of some columns to the sums, column by column.
#[inline(always)]
fn add_columns<L: Lanes, E: Element, const N: usize, const T: usize>(
    weights: [&[u8]; T],
    x: [&[f32]; N],
    columns: Range<usize>,
    sums: &mut [[L; T]; N],
) {
    for column in columns {
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
}

#[cfg(test)]
mod tests;
