//! Quantised weights of a model file, taken apart into unsigned codes, scales and minima.
//!
//! A weight is `scale * (code - zero) + minimum`. Formats are ggml's, blocks of 32 or super-blocks of 256 columns.

use half::f16;

use super::lanes::BLOCK;
use crate::tensor::TensorFormat;

/// 32 columns of one output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WeightBlock {
    /// In `0..16` for 4-bit formats; in `0..64` or offset by 128 for the others (see `quantised`).
    pub(crate) codes: [u8; BLOCK],
    /// Of each half; equal unless the format has blocks of 16.
    pub(crate) scales: [f32; 2],
    /// Added to every weight.
    pub(crate) minimum: f32,
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Column `i` and column `16 + i` share byte `i`.
fn nibbles(bytes: &[u8]) -> [u8; BLOCK] {
    std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 })
}

/// The fifth bits of 32 columns, column 0 in the lowest.
fn with_fifth_bits(low: [u8; BLOCK], bits: &[u8]) -> [u8; BLOCK] {
    let bits = u32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]);
    std::array::from_fn(|i| low[i] | (((bits >> i) as u8 & 1) << 4))
}

/// Scale and minimum `index` of the eight 6-bit pairs in a k-quant's 12 bytes.
fn six_bit_pair(packed: &[u8], index: usize) -> (f32, f32) {
    let (scale, minimum) = if index < 4 {
        (packed[index] & 63, packed[index + 4] & 63)
    } else {
        let low = packed[index + 4];
        (
            (low & 15) | ((packed[index - 4] >> 6) << 4),
            (low >> 4) | ((packed[index] >> 6) << 4),
        )
    };
    (f32::from(scale), f32::from(minimum))
}

/// The 4 bits of 32 columns of a k-quant: sub-blocks 2 j and 2 j + 1 share 32 bytes.
fn k_nibbles(bytes: &[u8], index: usize) -> [u8; BLOCK] {
    let bytes = &bytes[index / 2 * BLOCK..][..BLOCK];
    std::array::from_fn(|i| {
        if index.is_multiple_of(2) {
            bytes[i] & 15
        } else {
            bytes[i] >> 4
        }
    })
}

/// Takes apart block `block` (32 columns) of a row. `None` for formats that are not quantised.
pub(crate) fn unpack(format: TensorFormat, row: &[u8], block: usize) -> Option<WeightBlock> {
    let uniform = |codes, scale: f32, minimum| WeightBlock {
        codes,
        scales: [scale; 2],
        minimum,
    };
    Some(match format {
        TensorFormat::Q4_0 => {
            let bytes = &row[block * 18..][..18];
            uniform(nibbles(&bytes[2..]), half_at(bytes, 0), 0.0)
        }
        TensorFormat::Q4_1 => {
            let bytes = &row[block * 20..][..20];
            uniform(nibbles(&bytes[4..]), half_at(bytes, 0), half_at(bytes, 2))
        }
        TensorFormat::Q5_0 => {
            let bytes = &row[block * 22..][..22];
            let codes = with_fifth_bits(nibbles(&bytes[6..]), &bytes[2..]);
            uniform(codes.map(|code| code + (128 - 16)), half_at(bytes, 0), 0.0)
        }
        TensorFormat::Q5_1 => {
            let bytes = &row[block * 24..][..24];
            let codes = with_fifth_bits(nibbles(&bytes[8..]), &bytes[4..]);
            uniform(codes, half_at(bytes, 0), half_at(bytes, 2))
        }
        TensorFormat::Q8_0 => {
            let bytes = &row[block * 34..][..34];
            uniform(
                std::array::from_fn(|i| bytes[2 + i] ^ 0x80),
                half_at(bytes, 0),
                0.0,
            )
        }
        TensorFormat::Q4K => {
            let (bytes, index) = (&row[block / 8 * 144..][..144], block % 8);
            let (scale, minimum) = six_bit_pair(&bytes[4..], index);
            let codes = k_nibbles(&bytes[16..], index);
            uniform(codes, half_at(bytes, 0) * scale, -(half_at(bytes, 2) * minimum))
        }
        TensorFormat::Q5K => {
            let (bytes, index) = (&row[block / 8 * 176..][..176], block % 8);
            let (scale, minimum) = six_bit_pair(&bytes[4..], index);
            let (low, high) = (k_nibbles(&bytes[48..], index), &bytes[16..48]);
            let codes = std::array::from_fn(|i| low[i] | (((high[i] >> index) & 1) << 4));
            uniform(codes, half_at(bytes, 0) * scale, -(half_at(bytes, 2) * minimum))
        }
        TensorFormat::Q6K => six_bit_block(&row[block / 8 * 210..][..210], block % 8),
        TensorFormat::F32 | TensorFormat::F16 | TensorFormat::Bf16 | TensorFormat::F8E4M3 => return None,
    })
}

/// Q6_K: 128 bytes of low nibbles, 64 of high bit pairs, 16 signed scales, one f16. Each half of 128 columns has four
/// runs of 32, whose low nibbles share 64 bytes and whose bit pairs share 32.
fn six_bit_block(bytes: &[u8], index: usize) -> WeightBlock {
    let (half, run) = (index / 4, index % 4);
    let low = &bytes[64 * half + 32 * (run % 2)..][..BLOCK];
    let high = &bytes[128 + 32 * half..][..BLOCK];
    let scale = half_at(bytes, 208);
    let of_half = |i: usize| scale * f32::from(bytes[192 + 2 * index + i] as i8);
    WeightBlock {
        codes: std::array::from_fn(|i| {
            let nibble = if run < 2 { low[i] & 15 } else { low[i] >> 4 };
            (nibble | (((high[i] >> (2 * run)) & 3) << 4)) + (128 - 32)
        }),
        scales: [of_half(0), of_half(1)],
        minimum: 0.0,
    }
}

#[cfg(test)]
mod tests;
