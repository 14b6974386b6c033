//! The loop over stripes for processors with AVX2.

use std::arch::x86_64::{
    __m256i, _MM_HINT_ET0, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch, _mm_sfence, _mm256_add_epi64,
    _mm256_loadu_si256, _mm256_mul_epu32, _mm256_set1_epi64x, _mm256_shuffle_epi32, _mm256_slli_epi64,
    _mm256_srli_epi64, _mm256_storeu_si256, _mm256_stream_si256, _mm256_xor_si256,
};

use super::{AHEAD_BYTES, AHEAD_CACHED_BYTES, Stores};
use crate::digest::xxh3::{Accumulators, SECRET, STRIPE_BYTES, STRIPES_PER_BLOCK};

const NONE: u8 = 0;
const CACHED: u8 = 1;
const STREAMED: u8 = 2;

/// # Safety
///
/// As [`super::stripes`]; the processor has AVX2, and streamed stores go to multiples of 32 bytes.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn stripes(
    from: *const u8,
    to: *mut u8,
    stripes: usize,
    stores: Stores,
    hash: Option<(&mut Accumulators, usize)>,
) {
    let mut nowhere = [0; 8];
    // SAFETY: the caller's promise.
    unsafe {
        match (stores, hash) {
            (Stores::None, None) => {}
            (Stores::None, Some((hash, index))) => walk::<NONE, true>(from, to, stripes, hash, index),
            (Stores::Cached, None) => walk::<CACHED, false>(from, to, stripes, &mut nowhere, 0),
            (Stores::Cached, Some((hash, index))) => walk::<CACHED, true>(from, to, stripes, hash, index),
            (Stores::Streamed, None) => walk::<STREAMED, false>(from, to, stripes, &mut nowhere, 0),
            (Stores::Streamed, Some((hash, index))) => walk::<STREAMED, true>(from, to, stripes, hash, index),
        }
    }
}

/// # Safety
///
/// As [`stripes`].
#[target_feature(enable = "avx2")]
unsafe fn walk<const STORES: u8, const HASH: bool>(
    from: *const u8,
    to: *mut u8,
    stripes: usize,
    accumulators: &mut Accumulators,
    mut index: usize,
) {
    let halves = accumulators.as_mut_ptr().cast::<__m256i>();
    // SAFETY: both halves of the accumulators, and the secret of the scrambling, which is the last stripe of all.
    let (mut low, mut high, scramble_low, scramble_high) = unsafe {
        let scramble = SECRET.as_ptr().add(SECRET.len() - STRIPE_BYTES).cast::<__m256i>();
        (
            _mm256_loadu_si256(halves),
            _mm256_loadu_si256(halves.add(1)),
            _mm256_loadu_si256(scramble),
            _mm256_loadu_si256(scramble.add(1)),
        )
    };
    for at in (0..stripes).map(|stripe| stripe * STRIPE_BYTES) {
        // SAFETY: one stripe of the caller's. Asking for memory ahead touches none, wherever it is.
        let (first, second) = unsafe {
            ask_ahead::<STORES>(from.wrapping_add(at), to.wrapping_add(at));
            let source = from.add(at).cast::<__m256i>();
            let loaded = (_mm256_loadu_si256(source), _mm256_loadu_si256(source.add(1)));
            let target = to.wrapping_add(at).cast::<__m256i>();
            match STORES {
                CACHED => {
                    _mm256_storeu_si256(target, loaded.0);
                    _mm256_storeu_si256(target.add(1), loaded.1);
                }
                STREAMED => {
                    _mm256_stream_si256(target, loaded.0);
                    _mm256_stream_si256(target.add(1), loaded.1);
                }
                _ => {}
            }
            loaded
        };
        if HASH {
            // SAFETY: the secret of a stripe begins at eight times its index, which is below 16.
            unsafe {
                let secret = SECRET.as_ptr().add(index * 8).cast::<__m256i>();
                low = accumulate(low, first, _mm256_loadu_si256(secret));
                high = accumulate(high, second, _mm256_loadu_si256(secret.add(1)));
            }
            index += 1;
            if index == STRIPES_PER_BLOCK {
                index = 0;
                low = scramble(low, scramble_low);
                high = scramble(high, scramble_high);
            }
        }
    }
    // SAFETY: both halves of the accumulators.
    unsafe {
        _mm256_storeu_si256(halves, low);
        _mm256_storeu_si256(halves.add(1), high);
    }
    if STORES == STREAMED {
        // Stores past the caches are in no order with others, such as the one that says that they are done.
        _mm_sfence();
    }
}

#[target_feature(enable = "avx2")]
fn ask_ahead<const STORES: u8>(from: *const u8, to: *mut u8) {
    if STORES == STREAMED {
        _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(AHEAD_BYTES).cast());
    } else {
        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD_CACHED_BYTES).cast());
    }
    if STORES == CACHED {
        _mm_prefetch::<_MM_HINT_ET0>(to.wrapping_add(AHEAD_CACHED_BYTES).cast_const().cast());
    }
}

#[target_feature(enable = "avx2")]
fn accumulate(accumulators: __m256i, data: __m256i, secret: __m256i) -> __m256i {
    let keyed = _mm256_xor_si256(data, secret);
    let product = _mm256_mul_epu32(keyed, _mm256_srli_epi64::<32>(keyed));
    // The neighbouring lane takes the bytes as they are.
    let swapped = _mm256_shuffle_epi32::<0b01_00_11_10>(data);
    _mm256_add_epi64(_mm256_add_epi64(accumulators, swapped), product)
}

#[target_feature(enable = "avx2")]
fn scramble(accumulators: __m256i, secret: __m256i) -> __m256i {
    let prime = _mm256_set1_epi64x(0x9E37_79B1);
    let mixed = _mm256_xor_si256(accumulators, _mm256_srli_epi64::<47>(accumulators));
    let keyed = _mm256_xor_si256(mixed, secret);
    let low = _mm256_mul_epu32(keyed, prime);
    let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(keyed), prime);
    _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high))
}
