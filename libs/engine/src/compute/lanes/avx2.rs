//! Two registers of 256 bits. Dot products use `vpmaddubsw`, within the bounds where it cannot saturate.

use std::arch::x86_64::*;

use super::{ByteCodes, LANES, Lanes, Words};

#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

// SAFETY of every block below: `Lanes` implementations are instantiated only below a function that has AVX2, FMA and
// F16C enabled (see `kernel!`). Pointers come from references to arrays of the size that is accessed.
macro_rules! intrinsics {
    ($($body:tt)*) => {
        // SAFETY: see the note at the top of this file.
        unsafe { $($body)* }
    };
}

#[inline(always)]
fn halves<T>(of: &[T; LANES]) -> (&[T; 8], &[T; 8]) {
    let (halves, _) = of.as_chunks::<8>();
    (&halves[0], &halves[1])
}

#[inline(always)]
fn ymm(from: &[u8; 32]) -> __m256i {
    intrinsics!(_mm256_loadu_si256(from.as_ptr().cast()))
}

impl Lanes for Avx2 {
    type Ints = (__m256i, __m256i);

    const TILE_ROWS: usize = 4;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        let lanes = intrinsics!(_mm256_set1_ps(value));
        Self(lanes, lanes)
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        let (low, high) = halves(from);
        intrinsics!(Self(
            _mm256_loadu_ps(low.as_ptr()),
            _mm256_loadu_ps(high.as_ptr())
        ))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        let (to, _) = to.as_chunks_mut::<8>();
        intrinsics!({
            _mm256_storeu_ps(to[0].as_mut_ptr(), self.0);
            _mm256_storeu_ps(to[1].as_mut_ptr(), self.1);
        })
    }

    #[inline(always)]
    fn from_f16(from: &[u16; LANES]) -> Self {
        let (low, high) = halves(from);
        intrinsics!(Self(
            _mm256_cvtph_ps(_mm_loadu_si128(low.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(high.as_ptr().cast())),
        ))
    }

    #[inline(always)]
    fn from_i8(from: &[i8; LANES]) -> Self {
        intrinsics!({
            let bytes = _mm_loadu_si128(from.as_ptr().cast());
            let (low, high) = (
                _mm256_cvtepi8_epi32(bytes),
                _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes)),
            );
            Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        })
    }

    #[inline(always)]
    fn from_bf16(from: &[u16; LANES]) -> Self {
        let (low, high) = halves(from);
        intrinsics!({
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(low.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(high.as_ptr().cast()));
            Self(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        })
    }

    #[inline(always)]
    fn to_f16(self, to: &mut [u16; LANES]) {
        let (to, _) = to.as_chunks_mut::<8>();
        intrinsics!({
            let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1);
            _mm_storeu_si128(to[0].as_mut_ptr().cast(), low);
            _mm_storeu_si128(to[1].as_mut_ptr().cast(), high);
        })
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        intrinsics!(Self(
            _mm256_add_ps(self.0, other.0),
            _mm256_add_ps(self.1, other.1)
        ))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        intrinsics!(Self(
            _mm256_sub_ps(self.0, other.0),
            _mm256_sub_ps(self.1, other.1)
        ))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        intrinsics!(Self(
            _mm256_mul_ps(self.0, other.0),
            _mm256_mul_ps(self.1, other.1)
        ))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        intrinsics!(Self(
            _mm256_div_ps(self.0, other.0),
            _mm256_div_ps(self.1, other.1)
        ))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        intrinsics!(Self(
            _mm256_fmadd_ps(self.0, factor.0, addend.0),
            _mm256_fmadd_ps(self.1, factor.1, addend.1),
        ))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        intrinsics!(Self(
            _mm256_max_ps(self.0, other.0),
            _mm256_max_ps(self.1, other.1)
        ))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        intrinsics!(Self(
            _mm256_min_ps(self.0, other.0),
            _mm256_min_ps(self.1, other.1)
        ))
    }

    #[inline(always)]
    fn abs(self) -> Self {
        intrinsics!({
            let sign = _mm256_set1_ps(-0.0);
            Self(_mm256_andnot_ps(sign, self.0), _mm256_andnot_ps(sign, self.1))
        })
    }

    #[inline(always)]
    fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        intrinsics!(Self(
            _mm256_round_ps::<NEAREST>(self.0),
            _mm256_round_ps::<NEAREST>(self.1)
        ))
    }

    #[inline(always)]
    fn scale_by_power_of_two(self, exponent: Self) -> Self {
        intrinsics!({
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvttps_epi32(exponent.0), bias));
            let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvttps_epi32(exponent.1), bias));
            Self(
                _mm256_mul_ps(self.0, _mm256_castsi256_ps(low)),
                _mm256_mul_ps(self.1, _mm256_castsi256_ps(high)),
            )
        })
    }

    #[inline(always)]
    fn keep_first(self, count: usize, fill: f32) -> Self {
        let count = count.min(LANES) as i32;
        intrinsics!({
            let (count, fill) = (_mm256_set1_epi32(count), _mm256_set1_ps(fill));
            let low = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            let high = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
            Self(
                _mm256_blendv_ps(fill, self.0, _mm256_castsi256_ps(low)),
                _mm256_blendv_ps(fill, self.1, _mm256_castsi256_ps(high)),
            )
        })
    }

    #[inline(always)]
    fn zero_unless_greater(self, key: Self, bound: f32) -> Self {
        intrinsics!({
            let bound = _mm256_set1_ps(bound);
            Self(
                _mm256_and_ps(self.0, _mm256_cmp_ps::<_CMP_NLE_UQ>(key.0, bound)),
                _mm256_and_ps(self.1, _mm256_cmp_ps::<_CMP_NLE_UQ>(key.1, bound)),
            )
        })
    }

    #[inline(always)]
    fn to_words(self) -> [i32; LANES / 4] {
        let mut words = [0; LANES / 4];
        intrinsics!({
            let (low, high) = (_mm256_cvttps_epi32(self.0), _mm256_cvttps_epi32(self.1));
            // The pack works within halves of 128 bits; the permutation restores the order.
            let wide = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
            let packed = _mm_packs_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256::<1>(wide));
            _mm_storeu_si128(words.as_mut_ptr().cast(), packed);
        });
        words
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        intrinsics!(sum_of_eight(_mm256_add_ps(self.0, self.1)))
    }

    #[inline(always)]
    fn greatest(self) -> f32 {
        intrinsics!(greatest_of_eight(_mm256_max_ps(self.1, self.0)))
    }

    #[inline(always)]
    fn from_ints(ints: Self::Ints) -> Self {
        intrinsics!(Self(_mm256_cvtepi32_ps(ints.0), _mm256_cvtepi32_ps(ints.1)))
    }

    #[inline(always)]
    fn dot_nibbles<const R: usize>(
        codes: &[u8; 256],
        rows: [&Words; R],
        sums: [i32; R],
        offset: bool,
    ) -> [Self::Ints; R] {
        let mut dots = [Self::ints(0); R];
        let low = half_nibbles(codes, 0);
        for row in 0..R {
            dots[row].0 = half_dot(&low, rows[row], sums[row], offset);
        }
        let high = half_nibbles(codes, 1);
        for row in 0..R {
            dots[row].1 = half_dot(&high, rows[row], sums[row], offset);
        }
        dots
    }

    #[inline(always)]
    fn dot_bytes<const R: usize>(
        kind: ByteCodes,
        codes: &[u8; 256],
        words: [&[i32; 4]; R],
        _sums: [i32; R],
        init: [Self::Ints; R],
    ) -> [Self::Ints; R] {
        let (packed, _) = codes.as_chunks::<32>();
        let mut dots = init;
        match kind {
            ByteCodes::Small => {
                for group in [0, 2] {
                    for row in 0..R {
                        let columns = [words[row][group], words[row][group + 1]];
                        dots[row].0 =
                            add_small(dots[row].0, &packed[2 * group], &packed[2 * group + 2], columns);
                        dots[row].1 = add_small(
                            dots[row].1,
                            &packed[2 * group + 1],
                            &packed[2 * group + 3],
                            columns,
                        );
                    }
                }
            }
            ByteCodes::Offset128 => {
                for group in 0..4 {
                    let low = magnitude_and_sign(&packed[2 * group]);
                    let high = magnitude_and_sign(&packed[2 * group + 1]);
                    for row in 0..R {
                        dots[row].0 = add_signed(dots[row].0, low, words[row][group]);
                        dots[row].1 = add_signed(dots[row].1, high, words[row][group]);
                    }
                }
            }
        }
        dots
    }

    #[inline(always)]
    fn ints(value: i32) -> Self::Ints {
        let lanes = intrinsics!(_mm256_set1_epi32(value));
        (lanes, lanes)
    }
}

/// The rest of the tree of [`Lanes::sum`], from eight lanes on.
#[inline(always)]
pub(super) fn sum_of_eight(lanes: __m256) -> f32 {
    intrinsics!({
        let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    })
}

/// The rest of the tree of [`Lanes::greatest`], from eight lanes on.
#[inline(always)]
pub(super) fn greatest_of_eight(lanes: __m256) -> f32 {
    intrinsics!({
        let four = _mm_max_ps(_mm256_extractf128_ps::<1>(lanes), _mm256_castps256_ps128(lanes));
        let two = _mm_max_ps(_mm_movehl_ps(four, four), four);
        _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(two), two))
    })
}

/// The 4-bit codes of eight outputs: four registers of the first 16 columns, then four of the last.
#[inline(always)]
fn half_nibbles(codes: &[u8; 256], side: usize) -> [__m256i; 8] {
    let (packed, _) = codes.as_chunks::<32>();
    intrinsics!({
        let mask = _mm256_set1_epi8(15);
        let mut nibbles = [mask; 8];
        for group in 0..4 {
            let packed = ymm(&packed[2 * group + side]);
            nibbles[group] = _mm256_and_si256(packed, mask);
            nibbles[group + 4] = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask);
        }
        nibbles
    })
}

/// Eight pairs of products of a code up to 15 and a column up to 127 sum to at most 8 * 2 * 15 * 127 = 30480 per 16-bit lane, so
/// they are widened once.
#[inline(always)]
fn half_dot(nibbles: &[__m256i; 8], row: &Words, sum: i32, offset: bool) -> __m256i {
    intrinsics!({
        let mut products = _mm256_maddubs_epi16(nibbles[0], _mm256_set1_epi32(row[0]));
        for group in 1..8 {
            let more = _mm256_maddubs_epi16(nibbles[group], _mm256_set1_epi32(row[group]));
            products = _mm256_add_epi16(products, more);
        }
        let dot = _mm256_madd_epi16(products, _mm256_set1_epi16(1));
        if offset {
            _mm256_sub_epi32(dot, _mm256_slli_epi32::<3>(_mm256_set1_epi32(sum)))
        } else {
            dot
        }
    })
}

/// Two pairs of products of a code up to 63 and a column up to 127 sum to at most 2 * 2 * 63 * 127 = 32004 per 16-bit lane.
#[inline(always)]
fn add_small(sum: __m256i, first: &[u8; 32], second: &[u8; 32], columns: [i32; 2]) -> __m256i {
    intrinsics!({
        let products = _mm256_add_epi16(
            _mm256_maddubs_epi16(ymm(first), _mm256_set1_epi32(columns[0])),
            _mm256_maddubs_epi16(ymm(second), _mm256_set1_epi32(columns[1])),
        );
        _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)))
    })
}

/// Codes less 128, as magnitudes and as signed values.
#[inline(always)]
fn magnitude_and_sign(codes: &[u8; 32]) -> (__m256i, __m256i) {
    intrinsics!({
        let signed = _mm256_xor_si256(ymm(codes), _mm256_set1_epi8(-128));
        (_mm256_abs_epi8(signed), signed)
    })
}

/// A pair of products of a magnitude up to 128 and a column up to 127 sums to at most 2 * 128 * 127 = 32512 per 16-bit lane.
#[inline(always)]
fn add_signed(sum: __m256i, (magnitude, signed): (__m256i, __m256i), column: i32) -> __m256i {
    intrinsics!({
        let columns = _mm256_sign_epi8(_mm256_set1_epi32(column), signed);
        let products = _mm256_maddubs_epi16(magnitude, columns);
        _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)))
    })
}
