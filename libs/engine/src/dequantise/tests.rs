use rstest::rstest;

use super::*;

/// Two blocks of each format, decoded by ggml's Python package; see `testdata/make_dequantise.py`.
const GOLDEN: &str = include_str!("../../testdata/dequantise.json");

fn half_bytes(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

#[test]
fn every_format_decodes_as_ggml_does_bit_for_bit() {
    let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
    for format in TensorFormat::ALL {
        if format == TensorFormat::F32 {
            continue;
        }
        let case = &golden[format.name()];
        let bytes = hex(case["bytes"].as_str().unwrap());
        let expected: Vec<u32> = hex(case["f32"].as_str().unwrap())
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        let mut out = vec![0.0; expected.len()];
        dequantise_row(format, &bytes, &mut out);
        let bits: Vec<u32> = out.iter().map(|value| value.to_bits()).collect();
        assert_eq!(bits, expected, "{}", format.name());
        assert!(
            out.iter().any(|value| *value != 0.0),
            "{} has values",
            format.name()
        );
    }
}

#[test]
fn plain_numbers_are_widened_exactly() {
    let values = [0.0f32, -0.0, 1.5, f32::MIN_POSITIVE / 2.0, f32::INFINITY];
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut out = [0.0; 5];
    dequantise_row(TensorFormat::F32, &bytes, &mut out);
    assert_eq!(out.map(f32::to_bits), values.map(f32::to_bits));
    let mut out = [0.0; 2];
    dequantise_row(TensorFormat::F16, &[0x01, 0x00, 0x00, 0xbc], &mut out);
    assert_eq!(out, [2f32.powi(-24), -1.0]);
    dequantise_row(TensorFormat::Bf16, &[0x80, 0x3f, 0x00, 0xc0], &mut out);
    assert_eq!(out, [1.0, -2.0]);
}

/// The position of every element, by setting one at a time to an otherwise impossible value.
#[rstest]
#[case(TensorFormat::Q4_0, 1, 2.0 * 7.0, 2.0 * -8.0)]
#[case(TensorFormat::Q4_1, 1, 2.0 * 15.0 - 3.0, -3.0)]
fn nibbles_lie_in_two_halves(
    #[case] format: TensorFormat,
    #[case] blocks: usize,
    #[case] full: f32,
    #[case] empty: f32,
) {
    for element in 0..32 {
        let mut block = Vec::from(half_bytes(2.0));
        if format == TensorFormat::Q4_1 {
            block.extend(half_bytes(-3.0));
        }
        let mut quants = [0u8; 16];
        quants[element % 16] = if element < 16 { 0x0f } else { 0xf0 };
        block.extend(quants);
        let mut out = vec![0.0; 32 * blocks];
        dequantise_row(format, &block, &mut out);
        for (i, value) in out.iter().enumerate() {
            assert_eq!(
                *value,
                if i == element { full } else { empty },
                "element {i} when {element} is full"
            );
        }
    }
}

#[test]
fn the_fifth_bit_of_an_element_is_its_bit() {
    for element in 0..32 {
        let mut block = Vec::from(half_bytes(0.5));
        block.extend((1u32 << element).to_le_bytes());
        block.extend([0; 16]);
        let mut out = [0.0; 32];
        dequantise_row(TensorFormat::Q5_0, &block, &mut out);
        for (i, value) in out.iter().enumerate() {
            assert_eq!(*value, if i == element { 0.0 } else { -8.0 });
        }
    }
}

#[test]
fn scales_of_k_quants_have_six_bits_each() {
    // Pairs of the form (8 sub-blocks) as ggml packs them: 4 scales, 4 minima, then 4 bytes of low nibbles.
    let scales: [u8; 8] = [1, 17, 33, 63, 2, 18, 34, 62];
    let mins: [u8; 8] = [5, 21, 37, 61, 6, 22, 38, 60];
    let mut packed = [0u8; 12];
    for i in 0..4 {
        packed[i] = scales[i] | (scales[i + 4] >> 4) << 6;
        packed[i + 4] = mins[i] | (mins[i + 4] >> 4) << 6;
        packed[i + 8] = scales[i + 4] & 0x0f | mins[i + 4] << 4;
    }
    for i in 0..8 {
        assert_eq!(k_scale_and_min(&packed, i), (scales[i], mins[i]));
    }
}

#[test]
#[should_panic(expected = "a row has its format's size")]
fn a_row_of_the_wrong_size_is_a_defect() {
    dequantise_row(TensorFormat::Q8_0, &[0; 33], &mut [0.0; 32]);
}

#[test]
fn fp8_decodes_by_its_definition() {
    for code in 0..=u8::MAX {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        let magnitude = match exponent {
            15 if code & 7 == 7 => f32::NAN,
            0 => mantissa / 8.0 * 2f32.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        };
        let expected = if code & 0x80 == 0 { magnitude } else { -magnitude };
        let mut out = [0.0];
        dequantise_row(TensorFormat::F8E4M3, &[code], &mut out);
        let same = out[0].to_bits() == expected.to_bits() || (out[0].is_nan() && expected.is_nan());
        assert!(same, "{code:#x} is {}, not {expected}", out[0]);
    }
}
