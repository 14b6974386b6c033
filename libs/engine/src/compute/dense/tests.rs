use super::*;
use crate::compute::isa::Isa;
use crate::compute::matrix::{Activations, Epilogue, Matrix, multiply};
use crate::compute::shared::Shared;

const OUTPUTS: usize = 85;
const COLS: usize = 70;
const ROWS: usize = 15;

fn weight(output: usize, col: usize) -> f32 {
    (((output * 131 + col * 17) % 257) as f32 - 128.0) / 64.0
}

fn x(row: usize, col: usize) -> f32 {
    ((row * 97 + col * 31) % 101) as f32 / 37.0 - 1.3
}

fn encode(format: TensorFormat) -> Vec<u8> {
    let weights = (0..OUTPUTS).flat_map(|output| (0..COLS).map(move |col| weight(output, col)));
    match format {
        TensorFormat::F16 => weights
            .flat_map(|w| half::f16::from_f32(w).to_le_bytes())
            .collect(),
        TensorFormat::Bf16 => weights
            .flat_map(|w| half::bf16::from_f32(w).to_le_bytes())
            .collect(),
        _ => weights.flat_map(f32::to_le_bytes).collect(),
    }
}

/// The chain of fused multiply-adds that defines a product; weights of these tests are exact in every format.
fn chain(row: usize, output: usize) -> f32 {
    (0..COLS).fold(0.0, |sum, col| x(row, col).mul_add(weight(output, col), sum))
}

#[test]
fn products_are_chains_over_the_columns_in_every_format_tiling_and_instruction_set() {
    let rows: Vec<f32> = (0..ROWS)
        .flat_map(|row| (0..COLS).map(move |col| x(row, col)))
        .collect();
    for format in [TensorFormat::F32, TensorFormat::F16, TensorFormat::Bf16] {
        let bytes = encode(format);
        let view = TensorView {
            format,
            rows: OUTPUTS,
            cols: COLS,
            bytes: &bytes,
        };
        for (exact, isa) in [false, true]
            .into_iter()
            .flat_map(|exact| Isa::available().into_iter().map(move |isa| (exact, isa)))
        {
            let matrix = Matrix::pack(&view, exact).expect("memory");
            for cut in [ROWS, 1, 3, 9] {
                let mut out = vec![f32::NAN; ROWS * OUTPUTS];
                let shared = Shared::new(&mut out);
                let target = Target {
                    out: &shared,
                    stride: OUTPUTS,
                    first_column: 0,
                    epilogue: Epilogue::Store,
                };
                for range in [0..cut, cut..ROWS] {
                    multiply(
                        isa,
                        &matrix,
                        0..5,
                        Activations::Dense(&rows),
                        range.clone(),
                        &target,
                    );
                    multiply(isa, &matrix, 5..6, Activations::Dense(&rows), range, &target);
                }
                for row in 0..ROWS {
                    for output in 0..OUTPUTS {
                        let found = out[row * OUTPUTS + output];
                        assert_eq!(
                            found.to_bits(),
                            chain(row, output).to_bits(),
                            "{format:?}, {isa:?}, cut {cut}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn epilogues_add_and_gate() {
    let bytes = encode(TensorFormat::F32);
    let view = TensorView {
        format: TensorFormat::F32,
        rows: OUTPUTS,
        cols: COLS,
        bytes: &bytes,
    };
    let matrix = Matrix::pack(&view, true).expect("memory");
    let row: Vec<f32> = (0..COLS).map(|col| x(0, col)).collect();
    for isa in Isa::available() {
        for (epilogue, old) in [
            (Epilogue::Add, 0.75f32),
            (Epilogue::SiluGate, -1.5),
            (Epilogue::GeluGate, -0.5),
        ] {
            let mut out = vec![old; OUTPUTS];
            let shared = Shared::new(&mut out);
            let target = Target {
                out: &shared,
                stride: OUTPUTS,
                first_column: 0,
                epilogue,
            };
            multiply(isa, &matrix, 0..6, Activations::Dense(&row), 0..1, &target);
            for (output, found) in out.iter().enumerate() {
                let product = chain(0, output);
                let expected = match epilogue {
                    Epilogue::Add => old + product,
                    // gelu(-0.5) by its definition in double precision.
                    Epilogue::GeluGate => -0.154_286 * product,
                    _ => old / (1.0 + (-old).exp()) * product,
                };
                assert!(
                    (found - expected).abs() <= 1e-4 * expected.abs().max(1.0),
                    "{isa:?}: {found}, not {expected}"
                );
            }
        }
    }
}

/// Every code that is a number, with columns and rows that are no whole blocks.
fn scaled_weight(output: usize, col: usize) -> u8 {
    let code = ((output * 131 + col * 17) % 0x7f) as u8;
    code | ((output + col) as u8 & 1) << 7
}

const SCALED_OUTPUTS: usize = 150;
const SCALED_COLS: usize = 270;

fn scale_of(shape: [usize; 2], output: usize, block: usize) -> f32 {
    let scale = |index: usize| 0.01 + 0.003 * index as f32;
    match shape {
        [1, 1] => scale(0),
        [_, 1] => scale(output),
        [_, blocks] => scale(output / SCALE_BLOCK * blocks + block),
    }
}

/// The definition: a chain over 128 columns, and a chain of the scaled sums; or, widened, one chain over the scaled weights.
fn scaled_chain(shape: [usize; 2], output: usize, exact: bool) -> f32 {
    let mut sum = 0.0f32;
    for block in 0..SCALED_COLS.div_ceil(SCALE_BLOCK) {
        let scale = scale_of(shape, output, block);
        let mut of_block = 0.0f32;
        for col in block * SCALE_BLOCK..SCALED_COLS.min((block + 1) * SCALE_BLOCK) {
            let weight = f8_e4m3(scaled_weight(output, col));
            if exact {
                sum = x(3, col).mul_add(weight * scale, sum);
            } else {
                of_block = x(3, col).mul_add(weight / F8_E4M3_UNIT, of_block);
            }
        }
        if !exact {
            sum = (scale * F8_E4M3_UNIT).mul_add(of_block, sum);
        }
    }
    sum
}

#[rstest::rstest]
#[case([1, 1])]
#[case([SCALED_OUTPUTS, 1])]
#[case([2, 3])]
fn fp8_weights_have_the_scales_of_their_matrix_row_or_block(#[case] shape: [usize; 2]) {
    let codes: Vec<u8> = (0..SCALED_OUTPUTS)
        .flat_map(|output| (0..SCALED_COLS).map(move |col| scaled_weight(output, col)))
        .collect();
    let view = TensorView {
        format: TensorFormat::F8E4M3,
        rows: SCALED_OUTPUTS,
        cols: SCALED_COLS,
        bytes: &codes,
    };
    let count = shape[0] * shape[1];
    let scales: Vec<u8> = (0..count)
        .flat_map(|index| (0.01 + 0.003 * index as f32).to_le_bytes())
        .collect();
    let scales = TensorView {
        format: TensorFormat::F32,
        rows: shape[0],
        cols: shape[1],
        bytes: &scales,
    };
    let row: Vec<f32> = (0..SCALED_COLS).map(|col| x(3, col)).collect();
    for (exact, isa) in [false, true]
        .into_iter()
        .flat_map(|exact| Isa::available().into_iter().map(move |isa| (exact, isa)))
    {
        let matrix = Matrix::pack_scaled(&view, &scales, exact).expect("memory");
        let mut out = vec![f32::NAN; SCALED_OUTPUTS];
        let shared = Shared::new(&mut out);
        let target = Target {
            out: &shared,
            stride: SCALED_OUTPUTS,
            first_column: 0,
            epilogue: Epilogue::Store,
        };
        multiply(isa, &matrix, 0..10, Activations::Dense(&row), 0..1, &target);
        for (output, found) in out.iter().enumerate() {
            let expected = scaled_chain(shape, output, exact);
            assert_eq!(
                found.to_bits(),
                expected.to_bits(),
                "{shape:?}, {isa:?}, output {output}"
            );
        }
    }
}
