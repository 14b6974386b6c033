//! The definition of every operation, in plain Rust.

use half::{bf16, f16};

use super::{ByteCodes, LANES, Lanes, Words};

/// On x86-64 this is only the fallback of old processors, so the larger methods are calls: inlined sixteenfold, they
/// would be most of the binary. Elsewhere the compiler vectorises them.
#[derive(Clone, Copy)]
pub(crate) struct Scalar([f32; LANES]);

impl Scalar {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|lane| f(self.0[lane], other.0[lane])))
    }
}

/// The four `i8` of a word.
#[inline(always)]
fn bytes_of(word: i32) -> [i32; 4] {
    word.to_le_bytes().map(|byte| i32::from(byte as i8))
}

impl Lanes for Scalar {
    type Ints = [i32; LANES];

    const TILE_ROWS: usize = 1;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(*from)
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn from_f16(from: &[u16; LANES]) -> Self {
        Self(from.map(|bits| f16::from_bits(bits).to_f32()))
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn from_bf16(from: &[u16; LANES]) -> Self {
        Self(from.map(|bits| bf16::from_bits(bits).to_f32()))
    }

    #[inline(always)]
    fn from_i8(from: &[i8; LANES]) -> Self {
        Self(from.map(f32::from))
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn to_f16(self, to: &mut [u16; LANES]) {
        *to = self.0.map(|value| f16::from_f32(value).to_bits());
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|lane| {
            self.0[lane].mul_add(factor.0[lane], addend.0[lane])
        }))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn abs(self) -> Self {
        Self(self.0.map(f32::abs))
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn scale_by_power_of_two(self, exponent: Self) -> Self {
        self.zip(exponent, |value, exponent| {
            value * f32::from_bits(((exponent as i32).wrapping_add(127) << 23) as u32)
        })
    }

    #[inline(always)]
    fn keep_first(self, count: usize, fill: f32) -> Self {
        Self(std::array::from_fn(|lane| {
            if lane < count { self.0[lane] } else { fill }
        }))
    }

    #[inline(always)]
    fn zero_unless_greater(self, key: Self, bound: f32) -> Self {
        self.zip(key, |value, key| if key <= bound { 0.0 } else { value })
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn to_words(self) -> [i32; LANES / 4] {
        let bytes = self.0.map(|value| value as i8 as u8);
        std::array::from_fn(|word| i32::from_le_bytes(std::array::from_fn(|j| bytes[4 * word + j])))
    }

    #[inline(always)]
    fn from_ints(ints: [i32; LANES]) -> Self {
        Self(ints.map(|value| value as f32))
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn dot_nibbles<const R: usize>(
        codes: &[u8; 256],
        rows: [&Words; R],
        sums: [i32; R],
        offset: bool,
    ) -> [Self::Ints; R] {
        let zero = if offset { 8 } else { 0 };
        std::array::from_fn(|row| {
            std::array::from_fn(|lane| {
                let mut sum = -zero * sums[row];
                for group in 0..4 {
                    let low = bytes_of(rows[row][group]);
                    let high = bytes_of(rows[row][group + 4]);
                    for j in 0..4 {
                        let code = i32::from(codes[64 * group + 4 * lane + j]);
                        sum += (code & 15) * low[j] + (code >> 4) * high[j];
                    }
                }
                sum
            })
        })
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn dot_bytes<const R: usize>(
        kind: ByteCodes,
        codes: &[u8; 256],
        words: [&[i32; 4]; R],
        sums: [i32; R],
        init: [Self::Ints; R],
    ) -> [Self::Ints; R] {
        let zero = if kind == ByteCodes::Offset128 { 128 } else { 0 };
        std::array::from_fn(|row| {
            std::array::from_fn(|lane| {
                let mut sum = init[row][lane] - zero * sums[row];
                for group in 0..4 {
                    let columns = bytes_of(words[row][group]);
                    for j in 0..4 {
                        sum += i32::from(codes[64 * group + 4 * lane + j]) * columns[j];
                    }
                }
                sum
            })
        })
    }

    #[inline(always)]
    fn ints(value: i32) -> [i32; LANES] {
        [value; LANES]
    }
}
