//! One register of 512 bits. Dot products use VNNI.

use std::arch::x86_64::*;

use super::{ByteCodes, LANES, Lanes, Words};

#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

// SAFETY of every block below: `Lanes` implementations are instantiated only below a function that has AVX-512F, BW, VL
// and VNNI enabled (see `kernel!`). Pointers come from references to arrays of the size that is accessed.
macro_rules! intrinsics {
    ($($body:tt)*) => {
        // SAFETY: see the note at the top of this file.
        unsafe { $($body)* }
    };
}

#[inline(always)]
fn zmm(from: &[u8; 64]) -> __m512i {
    intrinsics!(_mm512_loadu_si512(from.as_ptr().cast()))
}

/// The upper eight lanes.
#[inline(always)]
fn upper_half(lanes: __m512) -> __m256 {
    intrinsics!(_mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(
        lanes
    ))))
}

impl Lanes for Avx512 {
    type Ints = __m512i;

    const TILE_ROWS: usize = 8;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(intrinsics!(_mm512_set1_ps(value)))
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(intrinsics!(_mm512_loadu_ps(from.as_ptr())))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        intrinsics!(_mm512_storeu_ps(to.as_mut_ptr(), self.0))
    }

    #[inline(always)]
    fn from_f16(from: &[u16; LANES]) -> Self {
        Self(intrinsics!(_mm512_cvtph_ps(_mm256_loadu_si256(
            from.as_ptr().cast()
        ))))
    }

    #[inline(always)]
    fn from_i8(from: &[i8; LANES]) -> Self {
        Self(intrinsics!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
            _mm_loadu_si128(from.as_ptr().cast())
        ))))
    }

    #[inline(always)]
    fn from_bf16(from: &[u16; LANES]) -> Self {
        Self(intrinsics!({
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }))
    }

    #[inline(always)]
    fn to_f16(self, to: &mut [u16; LANES]) {
        intrinsics!({
            let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), halves);
        })
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(intrinsics!(_mm512_add_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(intrinsics!(_mm512_sub_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(intrinsics!(_mm512_mul_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(intrinsics!(_mm512_div_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(intrinsics!(_mm512_fmadd_ps(self.0, factor.0, addend.0)))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(intrinsics!(_mm512_max_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(intrinsics!(_mm512_min_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn abs(self) -> Self {
        Self(intrinsics!(_mm512_abs_ps(self.0)))
    }

    #[inline(always)]
    fn round(self) -> Self {
        Self(intrinsics!(_mm512_roundscale_ps::<
            { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
        >(self.0)))
    }

    #[inline(always)]
    fn scale_by_power_of_two(self, exponent: Self) -> Self {
        Self(intrinsics!({
            let biased = _mm512_add_epi32(_mm512_cvttps_epi32(exponent.0), _mm512_set1_epi32(127));
            _mm512_mul_ps(self.0, _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased)))
        }))
    }

    #[inline(always)]
    fn keep_first(self, count: usize, fill: f32) -> Self {
        let mask = if count >= LANES {
            u16::MAX
        } else {
            (1u16 << count) - 1
        };
        Self(intrinsics!(_mm512_mask_blend_ps(
            mask,
            _mm512_set1_ps(fill),
            self.0
        )))
    }

    #[inline(always)]
    fn zero_unless_greater(self, key: Self, bound: f32) -> Self {
        intrinsics!({
            let keep = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(key.0, _mm512_set1_ps(bound));
            Self(_mm512_maskz_mov_ps(keep, self.0))
        })
    }

    #[inline(always)]
    fn to_words(self) -> [i32; LANES / 4] {
        let mut words = [0; LANES / 4];
        intrinsics!({
            let packed = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(self.0));
            _mm_storeu_si128(words.as_mut_ptr().cast(), packed);
        });
        words
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        intrinsics!({
            let low = _mm512_castps512_ps256(self.0);
            let high = upper_half(self.0);
            super::avx2::sum_of_eight(_mm256_add_ps(low, high))
        })
    }

    #[inline(always)]
    fn greatest(self) -> f32 {
        intrinsics!({
            let low = _mm512_castps512_ps256(self.0);
            let high = upper_half(self.0);
            super::avx2::greatest_of_eight(_mm256_max_ps(high, low))
        })
    }

    #[inline(always)]
    fn from_ints(ints: __m512i) -> Self {
        Self(intrinsics!(_mm512_cvtepi32_ps(ints)))
    }

    #[inline(always)]
    fn dot_nibbles<const R: usize>(
        codes: &[u8; 256],
        rows: [&Words; R],
        sums: [i32; R],
        offset: bool,
    ) -> [__m512i; R] {
        let (packed, _) = codes.as_chunks::<64>();
        intrinsics!({
            let mask = _mm512_set1_epi8(15);
            let mut low = [mask; 4];
            let mut high = [mask; 4];
            for group in 0..4 {
                let packed = zmm(&packed[group]);
                low[group] = _mm512_and_si512(packed, mask);
                high[group] = _mm512_and_si512(_mm512_srli_epi16::<4>(packed), mask);
            }
            let mut dots = [_mm512_setzero_si512(); R];
            for row in 0..R {
                if offset {
                    let eightfold = _mm512_slli_epi32::<3>(_mm512_set1_epi32(sums[row]));
                    dots[row] = _mm512_sub_epi32(dots[row], eightfold);
                }
                for group in 0..4 {
                    dots[row] =
                        _mm512_dpbusd_epi32(dots[row], low[group], _mm512_set1_epi32(rows[row][group]));
                }
                for group in 0..4 {
                    dots[row] =
                        _mm512_dpbusd_epi32(dots[row], high[group], _mm512_set1_epi32(rows[row][group + 4]));
                }
            }
            dots
        })
    }

    #[inline(always)]
    fn dot_bytes<const R: usize>(
        kind: ByteCodes,
        codes: &[u8; 256],
        words: [&[i32; 4]; R],
        sums: [i32; R],
        init: [__m512i; R],
    ) -> [__m512i; R] {
        let (packed, _) = codes.as_chunks::<64>();
        let mut dots = init;
        intrinsics!({
            for row in 0..R {
                if kind == ByteCodes::Offset128 {
                    let excess = _mm512_slli_epi32::<7>(_mm512_set1_epi32(sums[row]));
                    dots[row] = _mm512_sub_epi32(dots[row], excess);
                }
                for group in 0..4 {
                    let column = _mm512_set1_epi32(words[row][group]);
                    dots[row] = _mm512_dpbusd_epi32(dots[row], zmm(&packed[group]), column);
                }
            }
        });
        dots
    }

    #[inline(always)]
    fn ints(value: i32) -> __m512i {
        intrinsics!(_mm512_set1_epi32(value))
    }
}
