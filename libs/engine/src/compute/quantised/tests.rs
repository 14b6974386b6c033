// A list of one range is what is meant: the tiles of one worker.
#![allow(clippy::single_range_in_vec_init)]

use super::*;
use crate::compute::activations::quantise_row;
use crate::compute::isa::Isa;
use crate::compute::matrix::{Activations, Epilogue, Matrix, Planes, Target, multiply};
use crate::compute::shared::Shared;
use crate::dequantise::dequantise_row;

const FORMATS: [TensorFormat; 8] = [
    TensorFormat::Q8_0,
    TensorFormat::Q4_0,
    TensorFormat::Q4_1,
    TensorFormat::Q5_0,
    TensorFormat::Q5_1,
    TensorFormat::Q4K,
    TensorFormat::Q5K,
    TensorFormat::Q6K,
];
const OUTPUTS: usize = 37;
const COLS: usize = 512;
const ROWS: usize = 11;

/// Random blocks whose binary16 scales are small and positive.
fn random_weights(format: TensorFormat) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes: Vec<u8> = (0..OUTPUTS * format.row_bytes(COLS))
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect();
    let halves: &[usize] = match format {
        TensorFormat::Q4_1 | TensorFormat::Q5_1 | TensorFormat::Q4K | TensorFormat::Q5K => &[0, 2],
        TensorFormat::Q6K => &[208],
        _ => &[0],
    };
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for at in halves {
            let scale = f16::from_f32(0.001 + f32::from(block[at + 1]) / 1e5);
            block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    bytes
}

fn random_rows() -> Vec<f32> {
    (0..ROWS * COLS)
        .map(|i| ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * (1.0 + (i % 5) as f32))
        .collect()
}

fn product(isa: Isa, matrix: &Matrix, planes: Planes, rows: &[f32], ranges: &[Range<usize>]) -> Vec<f32> {
    let of_row = planes as usize * COLS / BLOCK;
    let mut blocks = vec![ActivationBlock::default(); ROWS * of_row];
    for (row, blocks) in rows.chunks_exact(COLS).zip(blocks.chunks_exact_mut(of_row)) {
        quantise_row(isa, row, blocks);
    }
    let x = Activations::Quantised {
        blocks: &blocks,
        planes,
    };
    let mut out = vec![f32::NAN; ROWS * OUTPUTS];
    let shared = Shared::new(&mut out);
    let target = Target {
        out: &shared,
        stride: OUTPUTS,
        first_column: 0,
        epilogue: Epilogue::Store,
    };
    for range in ranges {
        multiply(isa, matrix, 0..1, x, range.clone(), &target);
        multiply(isa, matrix, 1..3, x, range.clone(), &target);
    }
    out
}

#[test]
fn products_are_those_of_the_decoded_weights_up_to_the_rounding_of_activations() {
    let rows = random_rows();
    for format in FORMATS {
        let bytes = random_weights(format);
        let view = TensorView {
            format,
            rows: OUTPUTS,
            cols: COLS,
            bytes: &bytes,
        };
        let matrix = Matrix::pack(&view, false).expect("memory");
        assert!(matrix.quantised() && matrix.rows() == OUTPUTS && matrix.cols() == COLS);
        for (planes, ratio) in [(Planes::One, 1.0), (Planes::Two, 254.0)] {
            let found = product(Isa::detect(), &matrix, planes, &rows, &[0..ROWS]);
            for (output, encoded) in bytes.chunks_exact(format.row_bytes(COLS)).enumerate() {
                let mut weights = vec![0.0; COLS];
                dequantise_row(format, encoded, &mut weights);
                for (row, x) in rows.chunks_exact(COLS).enumerate() {
                    let exact: f64 = x
                        .iter()
                        .zip(&weights)
                        .map(|(x, w)| f64::from(*x) * f64::from(*w))
                        .sum();
                    // Each column is off by at most half a unit of its block, whose amplitude is at most 5.
                    let bound: f64 =
                        weights.iter().map(|w| f64::from(w.abs())).sum::<f64>() * 0.51 * 5.0 / 127.0 / ratio;
                    let error = (f64::from(found[row * OUTPUTS + output]) - exact).abs();
                    assert!(
                        error <= bound,
                        "{format:?}, row {row}, output {output}: off by {error}, not {bound}"
                    );
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_tiling_or_the_instruction_set() {
    let rows = random_rows();
    for format in FORMATS {
        let bytes = random_weights(format);
        let view = TensorView {
            format,
            rows: OUTPUTS,
            cols: COLS,
            bytes: &bytes,
        };
        let matrix = Matrix::pack(&view, false).expect("memory");
        for planes in [Planes::One, Planes::Two] {
            let expected = product(Isa::SCALAR, &matrix, planes, &rows, &[0..ROWS]);
            let single: Vec<Range<usize>> = (0..ROWS).map(|row| row..row + 1).collect();
            for isa in Isa::available() {
                for ranges in [vec![0..ROWS], single.clone(), vec![0..3, 3..ROWS]] {
                    let found = product(isa, &matrix, planes, &rows, &ranges);
                    let equal = found
                        .iter()
                        .zip(&expected)
                        .all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(equal, "{format:?}, {planes:?}, {isa:?}, {ranges:?}");
                }
            }
        }
    }
}
