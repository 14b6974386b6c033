//! Matrices of quantised weights, and their product with quantised activations.
//!
//! Packed for sixteen outputs at a time: tile `t` holds outputs `16 t ..`, as one record per block of 32 columns. A record is the
//! codes (256 bytes of 4 bits or 512 of 8, order as [`Lanes::dot_nibbles`] and [`Lanes::dot_bytes`] want them), then sixteen
//! scales, sixteen more if halves have their own, and sixteen minima if the format has them. Lanes are outputs, so a
//! lane's sum is one sequence of operations, whatever the tile. A matrix is read front to back, once per batch of rows.

use std::io;
use std::ops::Range;

use half::f16;

use super::activations::ActivationBlock;
use super::lanes::{BLOCK, ByteCodes, LANES, Lanes, floats, halves};
use super::matrix::{Planes, Target};
use super::pages::Pages;
use super::repack::{WeightBlock, unpack};
use crate::tensor::{TensorFormat, TensorView};

/// How far ahead of the arithmetic weights are asked for: some hundred nanoseconds at the speed of memory.
const PREFETCH_BYTES: usize = 4096;

/// What a format's records look like. Decided at compile time, so that a kernel has no branches.
pub(crate) trait Record {
    /// 4-bit codes; else 8-bit.
    const NIBBLES: bool;
    /// Codes are offset: 4-bit ones by 8, 8-bit ones by 128.
    const OFFSET: bool;
    /// Scales and minima are binary16; else f32.
    const HALF_SCALES: bool;
    /// Each half of 16 columns has its scale.
    const SPLIT: bool;
    /// Weights have a minimum.
    const MINIMUM: bool;

    const CODE_BYTES: usize = if Self::NIBBLES { 256 } else { 512 };
    const SCALE_BYTES: usize = if Self::HALF_SCALES { 2 * LANES } else { 4 * LANES };
    const SCALES: usize = 1 + Self::SPLIT as usize + Self::MINIMUM as usize;
    const BYTES: usize = Self::CODE_BYTES + Self::SCALES * Self::SCALE_BYTES;
}

macro_rules! records {
    ($($name:ident: $nibbles:literal $offset:literal $half:literal $split:literal $minimum:literal;)*) => {
        $(
            pub(crate) struct $name;
            impl Record for $name {
                const NIBBLES: bool = $nibbles;
                const OFFSET: bool = $offset;
                const HALF_SCALES: bool = $half;
                const SPLIT: bool = $split;
                const MINIMUM: bool = $minimum;
            }
        )*
    };
}

records! {
    //         nibbles offset half  split minimum
    FourBit:     true  true  true  false false; // Q4_0
    FourBitMin:  true  false true  false true;  // Q4_1
    FourBitK:    true  false false false true;  // Q4_K
    EightBit:    false true  true  false false; // Q8_0, Q5_0
    FiveBitMin:  false false true  false true;  // Q5_1
    FiveBitK:    false false false false true;  // Q5_K
    SixBitK:     false true  false true  false; // Q6_K
}

/// Evaluates `$body` with `$record` bound to the record type of a quantised format.
macro_rules! with_record {
    ($format:expr, $record:ident => $body:expr, else $other:expr) => {
        match $format {
            TensorFormat::Q4_0 => {
                type $record = FourBit;
                $body
            }
            TensorFormat::Q4_1 => {
                type $record = FourBitMin;
                $body
            }
            TensorFormat::Q4K => {
                type $record = FourBitK;
                $body
            }
            TensorFormat::Q8_0 | TensorFormat::Q5_0 => {
                type $record = EightBit;
                $body
            }
            TensorFormat::Q5_1 => {
                type $record = FiveBitMin;
                $body
            }
            TensorFormat::Q5K => {
                type $record = FiveBitK;
                $body
            }
            TensorFormat::Q6K => {
                type $record = SixBitK;
                $body
            }
            TensorFormat::F32 | TensorFormat::F16 | TensorFormat::Bf16 | TensorFormat::F8E4M3 => $other,
        }
    };
}

/// A packed matrix `[rows, cols]`.
pub(crate) struct Quantised {
    format: TensorFormat,
    rows: usize,
    blocks: usize,
    records: Pages,
}

impl Quantised {
    /// Packs a matrix; `None` if its format is not a quantised one.
    pub(crate) fn pack(view: &TensorView<'_>) -> io::Result<Option<Self>> {
        let record_bytes = with_record!(view.format, R => R::BYTES, else return Ok(None));
        let blocks = view.cols / BLOCK;
        let tiles = view.rows.div_ceil(LANES);
        let mut records = Pages::zeroed(tiles * blocks * record_bytes)?;
        let row_bytes = view.format.row_bytes(view.cols);
        for (row, bytes) in view.bytes.chunks_exact(row_bytes).enumerate() {
            let (tile, lane) = (row / LANES, row % LANES);
            let tile = &mut records.bytes_mut()[tile * blocks * record_bytes..][..blocks * record_bytes];
            for (block, record) in tile.chunks_exact_mut(record_bytes).enumerate() {
                let Some(weights) = unpack(view.format, bytes, block) else {
                    return Ok(None);
                };
                with_record!(view.format, R => pack_lane::<R>(&weights, lane, record), else return Ok(None));
            }
        }
        Ok(Some(Self {
            format: view.format,
            rows: view.rows,
            blocks,
            records,
        }))
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.blocks * BLOCK
    }

    pub(crate) fn bytes(&self) -> usize {
        self.records.bytes().len()
    }
}

/// Writes one output's block into lane `lane` of a record.
fn pack_lane<R: Record>(weights: &WeightBlock, lane: usize, record: &mut [u8]) {
    let (codes, scales) = record.split_at_mut(R::CODE_BYTES);
    for group in 0..4 {
        for j in 0..4 {
            let at = 64 * group + 4 * lane + j;
            let (low, high) = (weights.codes[4 * group + j], weights.codes[16 + 4 * group + j]);
            if R::NIBBLES {
                codes[at] = low | (high << 4);
            } else {
                codes[at] = low;
                codes[256 + at] = high;
            }
        }
    }
    let second = if R::SPLIT {
        weights.scales[1]
    } else {
        weights.minimum
    };
    let values = [weights.scales[0], second];
    for (run, value) in scales.chunks_exact_mut(R::SCALE_BYTES).zip(values) {
        if R::HALF_SCALES {
            // Exact: these formats store binary16.
            run[2 * lane..][..2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
        } else {
            run[4 * lane..][..4].copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Tiles `tiles` of `matrix` times rows `rows` of `activations` into `target`.
#[inline(always)]
pub(crate) fn multiply<L: Lanes>(
    matrix: &Quantised,
    tiles: Range<usize>,
    activations: &[ActivationBlock],
    planes: Planes,
    rows: Range<usize>,
    target: &Target<'_>,
) {
    with_record!(
        matrix.format,
        R => multiply_records::<L, R>(matrix, tiles, activations, planes, rows, target),
        else unreachable!("only quantised formats are packed")
    );
}

#[inline(always)]
fn multiply_records<L: Lanes, R: Record>(
    matrix: &Quantised,
    tiles: Range<usize>,
    activations: &[ActivationBlock],
    planes: Planes,
    rows: Range<usize>,
    target: &Target<'_>,
) {
    let tile_bytes = matrix.blocks * R::BYTES;
    for tile in tiles {
        let records = &matrix.records.bytes()[tile * tile_bytes..][..tile_bytes];
        let lanes = LANES.min(matrix.rows - tile * LANES);
        // A row of two planes is two rows here, until their sums are added.
        let planes = planes as usize;
        let (mut row, end) = (rows.start * planes, rows.end * planes);
        macro_rules! run {
            ($count:literal) => {
                while end - row >= $count {
                    let sums = tile_sums::<L, R, $count>(records, activations, row, matrix.blocks);
                    for i in (0..$count).step_by(planes) {
                        let sum = if planes == 2 {
                            sums[i].add(sums[(i + 1).min($count - 1)])
                        } else {
                            sums[i]
                        };
                        target.put((row + i) / planes, tile * LANES, lanes, sum);
                    }
                    row += $count;
                }
            };
        }
        if L::TILE_ROWS >= 8 {
            run!(8);
        }
        if L::TILE_ROWS >= 4 {
            run!(4);
        }
        run!(2);
        if planes == 1 {
            run!(1);
        }
    }
}

/// Sixteen outputs of `N` rows, beginning with row `first`.
#[inline(always)]
fn tile_sums<L: Lanes, R: Record, const N: usize>(
    records: &[u8],
    activations: &[ActivationBlock],
    first: usize,
    blocks: usize,
) -> [L; N] {
    let mut sums = [L::splat(0.0); N];
    let mut of_row: [&[ActivationBlock]; N] = [&[]; N];
    for row in 0..N {
        of_row[row] = &activations[(first + row) * blocks..][..blocks];
    }
    for (block, record) in records.chunks_exact(R::BYTES).enumerate() {
        if N <= 2 {
            prefetch(record);
        }
        let mut x = [&of_row[0][block]; N];
        for row in 1..N {
            x[row] = &of_row[row][block];
        }
        if R::NIBBLES {
            add_nibbles::<L, R, N>(record, x, &mut sums);
        } else {
            add_bytes::<L, R, N>(record, x, &mut sums);
        }
        if R::MINIMUM {
            let minimum = lanes_at::<L, R>(record, 1);
            for row in 0..N {
                sums[row] = minimum.mul_add(L::splat(x[row].scaled_sum), sums[row]);
            }
        }
    }
    sums
}

/// Asks for what lies [`PREFETCH_BYTES`] beyond a record, be it in this tile or the next. With many rows per record there is time
/// enough without.
#[inline(always)]
fn prefetch(record: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..record.len()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let ahead = record.as_ptr().wrapping_add(line + PREFETCH_BYTES);
        // SAFETY: a prefetch is a hint and may be given any address; every x86-64 processor has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = record;
}

/// `sum += float(dot) * (scale * x_scale)`.
#[inline(always)]
fn add_dots<L: Lanes, const N: usize>(
    scale: L,
    x: [&ActivationBlock; N],
    dots: [L::Ints; N],
    sums: &mut [L; N],
) {
    for row in 0..N {
        let scale = scale.mul(L::splat(x[row].scale));
        sums[row] = L::from_ints(dots[row]).mul_add(scale, sums[row]);
    }
}

#[inline(always)]
fn add_nibbles<L: Lanes, R: Record, const N: usize>(
    record: &[u8],
    x: [&ActivationBlock; N],
    sums: &mut [L; N],
) {
    let mut words = [&x[0].words; N];
    let mut totals = [0; N];
    for row in 0..N {
        words[row] = &x[row].words;
        totals[row] = x[row].sums[0].wrapping_add(x[row].sums[1]);
    }
    let dots = L::dot_nibbles(&record.as_chunks::<256>().0[0], words, totals, R::OFFSET);
    add_dots(lanes_at::<L, R>(record, 0), x, dots, sums);
}

#[inline(always)]
fn add_bytes<L: Lanes, R: Record, const N: usize>(
    record: &[u8],
    x: [&ActivationBlock; N],
    sums: &mut [L; N],
) {
    let kind = if R::OFFSET {
        ByteCodes::Offset128
    } else {
        ByteCodes::Small
    };
    let (codes, _) = record.as_chunks::<256>();
    let mut dots = [L::ints(0); N];
    for half in 0..2 {
        let mut words = [&x[0].words.as_chunks::<4>().0[half]; N];
        let mut halves = [0; N];
        for row in 0..N {
            words[row] = &x[row].words.as_chunks::<4>().0[half];
            halves[row] = x[row].sums[half];
        }
        dots = L::dot_bytes(kind, &codes[half], words, halves, dots);
        if R::SPLIT {
            add_dots(lanes_at::<L, R>(record, half), x, dots, sums);
            dots = [L::ints(0); N];
        }
    }
    if !R::SPLIT {
        add_dots(lanes_at::<L, R>(record, 0), x, dots, sums);
    }
}

/// Run `index` of a record's scales and minima.
#[inline(always)]
fn lanes_at<L: Lanes, R: Record>(record: &[u8], index: usize) -> L {
    let run = &record[R::CODE_BYTES + index * R::SCALE_BYTES..][..R::SCALE_BYTES];
    if R::HALF_SCALES {
        L::from_f16(&halves(run))
    } else {
        L::load(&floats(run))
    }
}

#[cfg(test)]
mod tests;
