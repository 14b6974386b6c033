//! Sixteen lanes of arithmetic, the unit in which all kernels compute.
//!
//! Invariant: every implementation of [`Lanes`] gives the same bits for the same finite input. Each method is one IEEE
//! operation per lane, or exact; nothing is reassociated. So a kernel that is written over `Lanes` gives the
//! same bits on every instruction set, and the [`Scalar`] implementation says what they are.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use scalar::Scalar;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Columns over which activations share a scale, and over which a quantised dot product is exact.
pub(crate) const BLOCK: usize = 32;

/// A quantised row's 32 columns: eight words of four little-endian `i8` in `-127..=127`.
pub(crate) type Words = [i32; BLOCK / 4];

/// How the codes of an 8-bit tile are to be read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum ByteCodes {
    /// At most 63, so that two products fit 16 bits.
    Small,
    /// All of `0..=255`, standing for the code less 128.
    Offset128,
}

/// Sixteen `f32` lanes and the integer dot products that go with them.
///
/// Implementations other than [`Scalar`] use instructions that the processor may lack. They are instantiated only by
/// [`kernel!`](super::isa::kernel), below a function that has the instructions enabled.
pub(crate) trait Lanes: Copy {
    /// Sixteen `i32` lanes.
    type Ints: Copy;

    /// Rows that share each load of weights, at most 8: as many as there are registers for.
    const TILE_ROWS: usize;

    fn splat(value: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    /// Widens IEEE binary16, exactly.
    fn from_f16(from: &[u16; LANES]) -> Self;
    /// Widens bfloat16, exactly.
    fn from_bf16(from: &[u16; LANES]) -> Self;
    /// Widens bytes, exactly.
    fn from_i8(from: &[i8; LANES]) -> Self;
    /// Rounds to binary16, ties to even.
    fn to_f16(self, to: &mut [u16; LANES]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self * factor + addend`, rounded once.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// `if self > other { self } else { other }`, so a NaN in `other` stays.
    fn max(self, other: Self) -> Self;
    /// `if self < other { self } else { other }`, so a NaN in `other` stays.
    fn min(self, other: Self) -> Self;
    fn abs(self) -> Self;
    /// To the nearest integer, ties to even.
    fn round(self) -> Self;
    /// `self * 2^exponent` for integral exponents in `-126..=127`; exact where the result is normal.
    fn scale_by_power_of_two(self, exponent: Self) -> Self;
    /// Lanes below `count` as they are, the others `fill`.
    fn keep_first(self, count: usize, fill: f32) -> Self;
    /// The lanes whose `key` is greater than `bound`, or NaN, as they are; the others 0.
    fn zero_unless_greater(self, key: Self, bound: f32) -> Self;
    /// Integral lanes in `-127..=127` as bytes, four to a little-endian word.
    fn to_words(self) -> [i32; LANES / 4];
    /// Rounds to the nearest, ties to even.
    fn from_ints(ints: Self::Ints) -> Self;

    /// Dot products of sixteen outputs' 4-bit codes, less 8 if `offset`, with the 32 columns of `R` rows, exact.
    ///
    /// Byte `64 g + 4 n + j` of `codes` holds output `n`'s code of column `4 g + j` in its low and of column
    /// `16 + 4 g + j` in its high half. `sums` are the rows' sums of columns.
    fn dot_nibbles<const R: usize>(
        codes: &[u8; 256],
        rows: [&Words; R],
        sums: [i32; R],
        offset: bool,
    ) -> [Self::Ints; R];

    /// Dot products of sixteen outputs' 8-bit codes with 16 columns of `R` rows, added to `init`, exact.
    ///
    /// Byte `64 g + 4 n + j` of `codes` is output `n`'s code of column `4 g + j`. `words` are the four words of the columns.
    /// With [`ByteCodes::Small`] the codes count as they are; with [`ByteCodes::Offset128`] less 128, `sums` being the
    /// rows' sums of these columns.
    fn dot_bytes<const R: usize>(
        kind: ByteCodes,
        codes: &[u8; 256],
        words: [&[i32; 4]; R],
        sums: [i32; R],
        init: [Self::Ints; R],
    ) -> [Self::Ints; R];

    fn ints(value: i32) -> Self::Ints;

    /// Sum of the lanes by a fixed tree: halves are added until one lane is left.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// The greatest lane, by a like tree.
    #[inline(always)]
    fn greatest(self) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                if lanes[lane + width] > lanes[lane] {
                    lanes[lane] = lanes[lane + width];
                }
            }
            width /= 2;
        }
        lanes[0]
    }

    /// The first lanes from a slice shorter than a vector; the others are `fill`.
    #[inline(always)]
    fn load_partial(from: &[f32], fill: f32) -> Self {
        let mut lanes = [fill; LANES];
        lanes[..from.len()].copy_from_slice(from);
        Self::load(&lanes)
    }

    /// Stores the first lanes to a slice shorter than a vector.
    #[inline(always)]
    fn store_partial(self, to: &mut [f32]) {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        let count = to.len();
        to.copy_from_slice(&lanes[..count]);
    }
}

/// Sixteen little-endian `f32`.
#[inline(always)]
pub(crate) fn floats(bytes: &[u8]) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    for (lane, bytes) in lanes.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *lane = f32::from_le_bytes(*bytes);
    }
    lanes
}

/// Sixteen little-endian words of 16 bits.
#[inline(always)]
pub(crate) fn halves(bytes: &[u8]) -> [u16; LANES] {
    let mut lanes = [0; LANES];
    for (lane, bytes) in lanes.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *lane = u16::from_le_bytes(*bytes);
    }
    lanes
}

#[cfg(test)]
mod tests;
