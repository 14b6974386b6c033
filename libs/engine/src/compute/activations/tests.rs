use super::*;
use crate::compute::isa::Isa;

fn quantise(isa: Isa, row: &[f32]) -> Vec<ActivationBlock> {
    let mut blocks = vec![ActivationBlock::default(); row.len() / BLOCK];
    quantise_row(isa, row, &mut blocks);
    blocks
}

fn codes(block: &ActivationBlock) -> Vec<i32> {
    let bytes = block.words.iter().flat_map(|word| word.to_le_bytes());
    bytes.map(|byte| i32::from(byte as i8)).collect()
}

#[test]
fn a_block_is_its_columns_rounded_to_the_amplitude_over_127() {
    let row: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 30.0) * 0.21).collect();
    for isa in Isa::available() {
        for (block, columns) in quantise(isa, &row).iter().zip(row.chunks(BLOCK)) {
            let amplitude = columns.iter().fold(0.0f32, |greatest, x| greatest.max(x.abs()));
            assert_eq!(block.scale, amplitude / 127.0);
            let codes = codes(block);
            for (code, x) in codes.iter().zip(columns) {
                assert!(
                    (*code as f32 * block.scale - x).abs() <= 0.5001 * block.scale,
                    "{code} for {x}"
                );
            }
            assert_eq!(codes.iter().map(|code| code.abs()).max(), Some(127));
            assert_eq!(block.sums[0], codes[..16].iter().sum::<i32>());
            assert_eq!(block.sums[1], codes[16..].iter().sum::<i32>());
            assert_eq!(block.scaled_sum, block.scale * codes.iter().sum::<i32>() as f32);
        }
    }
}

#[test]
fn a_block_of_almost_nothing_is_zero() {
    for isa in Isa::available() {
        assert_eq!(quantise(isa, &[1e-38; 32]), [ActivationBlock::default()]);
    }
}

#[test]
fn blocks_are_equal_on_every_instruction_set() {
    let row: Vec<f32> = (0..320)
        .map(|i| ((i * i * 7919 % 10007) as f32 / 1e4 - 0.5) * (1.0 + i as f32))
        .collect();
    let expected = quantise(Isa::SCALAR, &row);
    for isa in Isa::available() {
        assert_eq!(quantise(isa, &row), expected, "{isa:?}");
    }
}

#[test]
fn a_second_plane_holds_what_the_first_leaves() {
    let row: Vec<f32> = (0..96)
        .map(|i| ((i * 37 % 96) as f32 - 40.0) * 0.13 + (i as f32).sin())
        .collect();
    for isa in Isa::available() {
        let mut planes = vec![ActivationBlock::default(); 6];
        quantise_row(isa, &row, &mut planes);
        assert_eq!(planes[..3], quantise(isa, &row));
        for (block, columns) in row.chunks(BLOCK).enumerate() {
            let (first, second) = (&planes[block], &planes[3 + block]);
            assert_eq!(second.scale, first.scale / 254.0);
            for (i, x) in columns.iter().enumerate() {
                let value = codes(first)[i] as f32 * first.scale + codes(second)[i] as f32 * second.scale;
                assert!((value - x).abs() <= 0.51 * second.scale, "{value} for {x}");
            }
        }
    }
}
