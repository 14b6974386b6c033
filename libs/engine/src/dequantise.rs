//! Exact decoding of weights to `f32`.
//!
//! Layouts and arithmetic are those of ggml's reference decoders (`ggml-quants.c`, `dequantize_row_*`): every
//! product and sum is one rounded `f32` operation in ggml's order, so the values are the ones that other
//! programs see in the same file. This is the definition that the kernels are tested against; it is not itself fast.

use half::{bf16, f16};

use crate::tensor::TensorFormat;

/// Decodes one row of `out.len()` elements.
///
/// # Panics
///
/// When `bytes` is not exactly the row's encoding, that is `format.row_bytes(out.len())` bytes of whole blocks.
pub fn dequantise_row(format: TensorFormat, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(out.len() % format.block_elements(), 0, "a row is whole blocks");
    assert_eq!(
        bytes.len(),
        format.row_bytes(out.len()),
        "a row has its format's size"
    );
    let decode: fn(&[u8], &mut [f32]) = match format {
        TensorFormat::F32 => |block, out| {
            out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        },
        TensorFormat::F16 => |block, out| out[0] = half_at(block, 0),
        TensorFormat::Bf16 => |block, out| {
            out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32();
        },
        TensorFormat::F8E4M3 => |block, out| out[0] = f8_e4m3(block[0]),
        TensorFormat::Q8_0 => q8_0,
        TensorFormat::Q4_0 => q4_0,
        TensorFormat::Q4_1 => q4_1,
        TensorFormat::Q5_0 => q5_0,
        TensorFormat::Q5_1 => q5_1,
        TensorFormat::Q4K => q4_k,
        TensorFormat::Q5K => q5_k,
        TensorFormat::Q6K => q6_k,
    };
    let blocks = bytes.chunks_exact(format.block_bytes());
    for (block, out) in blocks.zip(out.chunks_exact_mut(format.block_elements())) {
        decode(block, out);
    }
}

/// Scale and minimum of sub-block `index` (0 to 7) of a `Q4_K` or `Q5_K` block, as integers of 6 bits.
///
/// The 12 bytes hold eight pairs: the first four in the low 6 bits of bytes 0..4 (scales) and 4..8 (minima); of
/// the last four, the low 4 bits are in bytes 8..12 and the high 2 bits on top of the first eight bytes.
pub fn k_scale_and_min(scales: &[u8], index: usize) -> (u8, u8) {
    if index < 4 {
        return (scales[index] & 63, scales[index + 4] & 63);
    }
    let low = scales[index + 4];
    let scale = (low & 0x0f) | (scales[index - 4] >> 6) << 4;
    let min = (low >> 4) | (scales[index] >> 6) << 4;
    (scale, min)
}

/// A number of 8 bits, before its scale.
pub(crate) fn f8_e4m3(byte: u8) -> f32 {
    if is_f8_nan(byte) {
        return f32::NAN;
    }
    f16::from_bits(f8_e4m3_as_f16(byte)).to_f32() * F8_E4M3_UNIT
}

/// Whether a number of 8 bits is none.
pub(crate) fn is_f8_nan(byte: u8) -> bool {
    byte & 0x7f == 0x7f
}

/// What [`f8_e4m3_as_f16`] is short of: the difference of the exponents' biases, 15 and 7.
pub(crate) const F8_E4M3_UNIT: f32 = 256.0;

/// The same bits in the places of binary16, whose value is 256 times less; subnormal numbers come out right as well.
#[inline(always)]
pub(crate) fn f8_e4m3_as_f16(byte: u8) -> u16 {
    (u16::from(byte & 0x80) << 8) | (u16::from(byte & 0x7f) << 7)
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// `{ f16 d; i8 q[32] }`: `d * q`.
fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(q.cast_signed()) * d;
    }
}

/// `{ f16 d; u8 q[16] }`: `d * (q - 8)`; low nibbles are elements 0 to 15, high nibbles 16 to 31.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, q) in block[2..].iter().enumerate() {
        out[i] = f32::from((q & 0x0f) as i8 - 8) * d;
        out[i + 16] = f32::from((q >> 4) as i8 - 8) * d;
    }
}

/// `{ f16 d; f16 m; u8 q[16] }`: `d * q + m`, nibbles as in `Q4_0`.
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, q) in block[4..].iter().enumerate() {
        out[i] = f32::from(q & 0x0f) * d + m;
        out[i + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The 5-bit values of a block: four low bits in nibbles as in `Q4_0`, the fifth bit of element `i` in bit `i` of `high`.
fn five_bits(high: &[u8], low: &[u8]) -> [u8; 32] {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    std::array::from_fn(|i| {
        let nibble = if i < 16 { low[i] & 0x0f } else { low[i - 16] >> 4 };
        nibble | ((high >> i & 1) as u8) << 4
    })
}

/// `{ f16 d; u8 high[4]; u8 q[16] }`: `d * (q - 16)`.
fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, q) in out.iter_mut().zip(five_bits(&block[2..6], &block[6..])) {
        *out = f32::from(q as i8 - 16) * d;
    }
}

/// `{ f16 d; f16 m; u8 high[4]; u8 q[16] }`: `d * q + m`.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (out, q) in out.iter_mut().zip(five_bits(&block[4..8], &block[8..])) {
        *out = f32::from(q) * d + m;
    }
}

/// `{ f16 d; f16 dmin; u8 scales[12]; u8 q[128] }`: eight sub-blocks of 32 with `d * scale * q - dmin * min`. Each 32
/// bytes of `q` hold two sub-blocks: the low nibbles, then the high ones.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin, scales, low) = (half_at(block, 0), half_at(block, 2), &block[4..16], &block[16..]);
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = k_scale_and_min(scales, sub);
        let (d, m) = (d * f32::from(scale), dmin * f32::from(min));
        for (out, q) in out.iter_mut().zip(&low[sub / 2 * 32..]) {
            *out = d * f32::from(q >> (sub % 2 * 4) & 0x0f) - m;
        }
    }
}

/// `{ f16 d; f16 dmin; u8 scales[12]; u8 high[32]; u8 q[128] }`: as `Q4_K`, with the fifth bit of element `i` of
/// sub-block `s` in bit `s` of `high[i]`.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin, scales) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
    let (high, low) = (&block[16..48], &block[48..]);
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = k_scale_and_min(scales, sub);
        let (d, m) = (d * f32::from(scale), dmin * f32::from(min));
        for (i, out) in out.iter_mut().enumerate() {
            let q = (low[sub / 2 * 32 + i] >> (sub % 2 * 4) & 0x0f) | (high[i] >> sub & 1) << 4;
            *out = d * f32::from(q) - m;
        }
    }
}

/// `{ u8 low[128]; u8 high[64]; i8 scales[16]; f16 d }`: sixteen sub-blocks of 16 with `d * scale * (q - 32)`. Each
/// half of the block holds 128 elements; element `e` of a half has its low nibble in `low[e % 64]` (high nibble from 64
/// on) and two high bits in `high[e % 32]`, at bit `2 * (e / 32)`.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales, d) = (
        &block[..128],
        &block[128..192],
        &block[192..208],
        half_at(block, 208),
    );
    for (i, out) in out.iter_mut().enumerate() {
        let (half, e) = (i / 128, i % 128);
        let nibble = low[half * 64 + e % 64] >> (e / 64 * 4) & 0x0f;
        let top = high[half * 32 + e % 32] >> (e / 32 * 2) & 3;
        let q = (nibble | top << 4) as i8 - 32;
        *out = d * f32::from(scales[i / 16].cast_signed()) * f32::from(q);
    }
}

#[cfg(test)]
mod tests;
