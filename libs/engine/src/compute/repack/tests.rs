use proptest::prelude::*;

use super::*;
use crate::dequantise::dequantise_row;

/// What a code of the format stands for when nothing was measured.
fn zero(format: TensorFormat) -> f32 {
    match format {
        TensorFormat::Q4_0 => 8.0,
        TensorFormat::Q5_0 | TensorFormat::Q8_0 | TensorFormat::Q6K => 128.0,
        _ => 0.0,
    }
}

const QUANTISED: [TensorFormat; 8] = [
    TensorFormat::Q8_0,
    TensorFormat::Q4_0,
    TensorFormat::Q4_1,
    TensorFormat::Q5_0,
    TensorFormat::Q5_1,
    TensorFormat::Q4K,
    TensorFormat::Q5K,
    TensorFormat::Q6K,
];

proptest! {
    #[test]
    fn codes_scales_and_minima_give_the_decoded_weights(
        index in 0usize..QUANTISED.len(),
        bytes in prop::collection::vec(any::<u8>(), 2 * 210),
    ) {
        let format = QUANTISED[index];
        let blocks = 2;
        let cols = blocks * format.block_elements();
        let row = &bytes[..format.row_bytes(cols)];
        let mut decoded = vec![0.0; cols];
        dequantise_row(format, row, &mut decoded);
        for (block, expected) in decoded.chunks(BLOCK).enumerate() {
            let found = unpack(format, row, block).expect("a quantised format");
            for (i, expected) in expected.iter().enumerate() {
                let scale = found.scales[i / 16];
                let weight = scale * (f32::from(found.codes[i]) - zero(format)) + found.minimum;
                // Scales and minima of random bytes may be infinite or NaN.
                prop_assume!(expected.is_finite() && weight.is_finite());
                let magnitude = expected.abs().max(found.minimum.abs()).max(scale.abs());
                prop_assert!((weight - expected).abs() <= 1e-5 * magnitude, "{:?}: {} for {}", format, weight, expected);
            }
        }
    }
}

#[test]
fn plain_formats_have_no_codes() {
    for format in [TensorFormat::F32, TensorFormat::F16, TensorFormat::Bf16] {
        assert!(unpack(format, &[0; 128], 0).is_none());
    }
}
