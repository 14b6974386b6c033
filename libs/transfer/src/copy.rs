//! Copies of raw memory, hashed on their way or not, past the caches or through them.
//!
//! A batch that is larger than the nearest caches finds neither its source nor its destination there, and whoever uses it
//! does so later. [`Stores::Streamed`] writes it past the caches: no line is fetched only to be overwritten, and what others
//! work on stays. A loop of our own asks for its source early, and hashes each stripe between its load and its store:
//! where memory is the limit that costs next to nothing, whereas to hash a block later is to read it once more.
//! `docs/performance.md` has what was measured.
//!
//! Elsewhere: the hash (`digest/xxh3.rs`), which bytes may be written, and when (`region.rs`, `tcp/link.rs`).

#[cfg(target_arch = "x86_64")]
mod avx2;

use crate::digest::xxh3::{Accumulators, STRIPE_BYTES, STRIPES_PER_BLOCK, accumulate_in_block};

/// What is copied at once from here on is larger than the nearest caches, with its destination.
const STREAMED_BYTES_MIN: u64 = 2 << 20;
/// How far ahead of the loads memory is asked for. Below a page memory is waited for; much above it, lines are lost again.
const AHEAD_BYTES: usize = 6 << 10;
/// As above, where most lines are in a cache.
const AHEAD_CACHED_BYTES: usize = 4 << 10;
/// Stores past the caches go to multiples of their width.
const STREAMED_ALIGNMENT: usize = 32;

/// How what is read is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stores {
    /// Not at all: it is where it belongs.
    None,
    /// Into the caches.
    Cached,
    /// Past the caches.
    Streamed,
}

impl Stores {
    /// For one run of a copy that touches `bytes` different bytes in all.
    pub(crate) fn of_copy(bytes: u64) -> Self {
        if bytes >= STREAMED_BYTES_MIN {
            Self::Streamed
        } else {
            Self::Cached
        }
    }
}

/// Copies bytes.
///
/// # Safety
///
/// `bytes` bytes are readable at `from` and writable at `to`, do not overlap, and those at `to` are used by nobody else. Those
/// at `from` may change meanwhile.
pub(crate) unsafe fn plain(from: *const u8, to: *mut u8, bytes: usize, stores: Stores) {
    let whole = match stores {
        Stores::None => return,
        Stores::Cached => 0,
        Stores::Streamed => bytes / STRIPE_BYTES,
    };
    let walked = whole * STRIPE_BYTES;
    // SAFETY: the caller's bytes, in two parts. They are plain memory to a foreign function.
    unsafe {
        stripes(from, to, whole, stores, None);
        libc::memcpy(to.add(walked).cast(), from.add(walked).cast(), bytes - walked);
    }
}

/// Copies stripes, and shows them to the accumulators of a hash, if any: the first of them is the one at the given index of its
/// block. What is hashed is what is written, also if the source changes meanwhile.
///
/// # Safety
///
/// `stripes` stripes are readable at `from`; unless nothing is stored they are writable at `to`, do not overlap with those at
/// `from`, and are used by nobody else. Those at `from` may change meanwhile.
pub(crate) unsafe fn stripes(
    from: *const u8,
    to: *mut u8,
    stripes: usize,
    stores: Stores,
    hash: Option<(&mut Accumulators, usize)>,
) {
    let stores = match stores {
        Stores::Streamed if to.align_offset(STREAMED_ALIGNMENT) != 0 => Stores::Cached,
        stores => stores,
    };
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2; the rest is the caller's promise, and streamed stores are aligned.
        return unsafe { avx2::stripes(from, to, stripes, stores, hash) };
    }
    // SAFETY: the caller's promise.
    unsafe { portable(from, to, stripes, stores, hash) }
}

/// # Safety
///
/// As [`stripes`].
pub(crate) unsafe fn portable(
    from: *const u8,
    to: *mut u8,
    stripes: usize,
    stores: Stores,
    mut hash: Option<(&mut Accumulators, usize)>,
) {
    let mut stripe = [0_u8; STRIPE_BYTES];
    for at in (0..stripes).map(|stripe| stripe * STRIPE_BYTES) {
        // SAFETY: one stripe of the caller's.
        unsafe {
            from.add(at)
                .copy_to_nonoverlapping(stripe.as_mut_ptr(), STRIPE_BYTES);
            if stores != Stores::None {
                stripe.as_ptr().copy_to_nonoverlapping(to.add(at), STRIPE_BYTES);
            }
        }
        if let Some((accumulators, index)) = &mut hash {
            accumulate_in_block(accumulators, &stripe, *index);
            *index = (*index + 1) % STRIPES_PER_BLOCK;
        }
    }
}
