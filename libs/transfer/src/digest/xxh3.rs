//! XXH3-64 of bytes in raw memory that come in order, made while they are copied.
//!
//! The hash of [`types::Checksum`] for inputs above 240 bytes (the long variant of the specification, seed 0, default secret):
//! eight accumulators take one stripe of 64 bytes after the other, are scrambled after every 16, and the last 64 bytes are
//! taken once more with a secret of their own. Source: the XXH3 section of xxHash's `doc/xxhash_spec.md`.
//!
//! Elsewhere: the loop over stripes (`copy.rs`), units and short inputs (`digest.rs`).

use types::Checksum;

use crate::copy::{self, Stores};

pub(crate) const STRIPE_BYTES: usize = 64;
/// Stripes between two scramblings: as many as the secret has places for.
pub(crate) const STRIPES_PER_BLOCK: usize = (SECRET_BYTES - STRIPE_BYTES) / 8;
/// Shorter inputs are hashed in other ways.
pub(crate) const SHORT_BYTES_MAX: u64 = 240;

const SECRET_BYTES: usize = 192;
/// Where the secrets of the last stripe and of the merging begin.
const LAST_STRIPE_SECRET: usize = SECRET_BYTES - STRIPE_BYTES - 7;
const MERGE_SECRET: usize = 11;

const PRIME32_1: u64 = 0x9E37_79B1;
const PRIME32_2: u64 = 0x85EB_CA77;
const PRIME32_3: u64 = 0xC2B2_AE3D;
const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
const PRIME64_2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const PRIME64_3: u64 = 0x1656_67B1_9E37_79F9;
const PRIME64_4: u64 = 0x85EB_CA77_C2B2_AE63;
const PRIME64_5: u64 = 0x27D4_EB2F_1656_67C5;
const PRIME_MX1: u64 = 0x1656_6791_9E37_79F9;

/// The default secret of the specification.
#[rustfmt::skip]
pub(crate) const SECRET: [u8; SECRET_BYTES] = [
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
];

pub(crate) type Accumulators = [u64; 8];

const START: Accumulators = [
    PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1,
];

/// The hash of a known number of bytes, more than [`SHORT_BYTES_MAX`], as far as they have come.
#[derive(Clone)]
pub(crate) struct Xxh3 {
    accumulators: Accumulators,
    total: u64,
    taken: u64,
    /// The latest bytes, the last one last: what of a stripe has come, and in the end the last stripe.
    recent: [u8; STRIPE_BYTES],
}

impl Xxh3 {
    pub(crate) fn new(total: u64) -> Self {
        debug_assert!(total > SHORT_BYTES_MAX);
        Self {
            accumulators: START,
            total,
            taken: 0,
            recent: [0; STRIPE_BYTES],
        }
    }

    /// Takes the next `bytes` bytes, which lie at `from`, and copies them to `to` as `stores` says.
    ///
    /// # Safety
    ///
    /// As [`copy::stripes`]; and no more bytes than are missing.
    pub(crate) unsafe fn take(&mut self, from: *const u8, to: *mut u8, bytes: usize, stores: Stores) {
        let open = self.open_bytes();
        let first = if open == 0 {
            0
        } else {
            (STRIPE_BYTES - open).min(bytes)
        };
        // SAFETY: the first of the caller's bytes.
        unsafe { self.take_few(from, to, first, stores) };
        let mut done = first;
        let ordinary = self
            .ordinary_stripes()
            .saturating_sub(self.taken / STRIPE_BYTES as u64);
        let stripes = usize::try_from(ordinary)
            .unwrap_or(usize::MAX)
            .min((bytes - done) / STRIPE_BYTES);
        if stripes > 0 {
            let index = (self.taken / STRIPE_BYTES as u64) as usize % STRIPES_PER_BLOCK;
            let walked = stripes * STRIPE_BYTES;
            // SAFETY: the next of the caller's bytes. What was just written, or looked at where nothing is written, is read
            // once more, since later bytes may belong to one stripe with the last of these.
            unsafe {
                copy::stripes(
                    from.add(done),
                    to.wrapping_add(done),
                    stripes,
                    stores,
                    Some((&mut self.accumulators, index)),
                );
                let seen = if stores == Stores::None {
                    from
                } else {
                    to.cast_const()
                };
                let last = seen.add(done + walked - STRIPE_BYTES);
                last.copy_to_nonoverlapping(self.recent.as_mut_ptr(), STRIPE_BYTES);
            }
            self.taken += walked as u64;
            done += walked;
        }
        // SAFETY: the rest of the caller's bytes: of one stripe, which is not complete or the last one.
        unsafe {
            self.take_few(
                from.wrapping_add(done),
                to.wrapping_add(done),
                bytes - done,
                stores,
            )
        };
    }

    /// The checksum, if all bytes have come.
    pub(crate) fn finish(&self) -> Option<Checksum> {
        if self.taken != self.total {
            return None;
        }
        let mut accumulators = self.accumulators;
        accumulate(&mut accumulators, &self.recent, LAST_STRIPE_SECRET);
        let folded = (0..4).map(|pair| {
            let word = |index: usize| {
                accumulators[2 * pair + index] ^ secret_word(MERGE_SECRET + 16 * pair + 8 * index)
            };
            let product = u128::from(word(0)) * u128::from(word(1));
            product as u64 ^ (product >> 64) as u64
        });
        let merged = folded.fold(self.total.wrapping_mul(PRIME64_1), u64::wrapping_add);
        let mixed = (merged ^ (merged >> 37)).wrapping_mul(PRIME_MX1);
        Some(Checksum(mixed ^ (mixed >> 32)))
    }

    /// Takes bytes that do not leave the stripe that is open.
    ///
    /// # Safety
    ///
    /// As [`Xxh3::take`].
    unsafe fn take_few(&mut self, from: *const u8, to: *mut u8, bytes: usize, stores: Stores) {
        if bytes == 0 {
            return;
        }
        let mut few = [0; STRIPE_BYTES];
        // SAFETY: the caller's bytes, at most a stripe of them. They are read once, so that what is hashed is what is written.
        unsafe {
            from.copy_to_nonoverlapping(few.as_mut_ptr(), bytes);
            if stores != Stores::None {
                few.as_ptr().copy_to_nonoverlapping(to, bytes);
            }
        }
        self.recent.rotate_left(bytes);
        self.recent[STRIPE_BYTES - bytes..].copy_from_slice(&few[..bytes]);
        self.taken += bytes as u64;
        let stripes = self.taken / STRIPE_BYTES as u64;
        if self.open_bytes() == 0 && stripes <= self.ordinary_stripes() {
            accumulate_in_block(
                &mut self.accumulators,
                &self.recent,
                (stripes - 1) as usize % STRIPES_PER_BLOCK,
            );
        }
    }

    fn open_bytes(&self) -> usize {
        (self.taken % STRIPE_BYTES as u64) as usize
    }

    /// Stripes that are not the last one. Where the input is no multiple of a stripe, the last one overlaps with them.
    fn ordinary_stripes(&self) -> u64 {
        (self.total - 1) / STRIPE_BYTES as u64
    }
}

/// Takes the stripe at this place of its block, and scrambles after the last one.
pub(crate) fn accumulate_in_block(
    accumulators: &mut Accumulators,
    stripe: &[u8; STRIPE_BYTES],
    index: usize,
) {
    accumulate(accumulators, stripe, index * 8);
    if index + 1 == STRIPES_PER_BLOCK {
        for (lane, accumulator) in accumulators.iter_mut().enumerate() {
            let key = secret_word(SECRET_BYTES - STRIPE_BYTES + 8 * lane);
            *accumulator = (*accumulator ^ (*accumulator >> 47) ^ key).wrapping_mul(PRIME32_1);
        }
    }
}

fn accumulate(accumulators: &mut Accumulators, stripe: &[u8; STRIPE_BYTES], secret_at: usize) {
    for lane in 0..accumulators.len() {
        let value = word_at(stripe, 8 * lane);
        let keyed = value ^ secret_word(secret_at + 8 * lane);
        accumulators[lane ^ 1] = accumulators[lane ^ 1].wrapping_add(value);
        let product = (keyed & 0xFFFF_FFFF) * (keyed >> 32);
        accumulators[lane] = accumulators[lane].wrapping_add(product);
    }
}

fn secret_word(at: usize) -> u64 {
    word_at(&SECRET, at)
}

fn word_at(bytes: &[u8], at: usize) -> u64 {
    let word = bytes[at..at + 8].try_into().expect("eight bytes");
    u64::from_le_bytes(word)
}
