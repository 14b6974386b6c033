//! What a transfer test moves, between which places, and what its figures are.
//!
//! A test moves runs of bytes that are laid over blocks of two pools, whose blocks may differ in size. Pure.
//!
//! Elsewhere: moving and timing (`transfers.rs`).

use std::time::Duration;

use transfer::Slice;

/// The sizes of a test: from what costs a round trip to what costs bandwidth.
pub const SIZES: [u64; 7] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20];

/// Which way a measurement moves bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the peer.
    Write,
    /// From the peer.
    Read,
}

/// One measurement of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Which way.
    pub direction: Direction,
    /// Of each transfer.
    pub bytes: u64,
}

/// The measurements of a test: each size up to `bytes_max`, the smallest one in any case, in each direction.
pub fn steps(bytes_max: u64, directions: &[Direction]) -> Vec<Step> {
    let sizes = SIZES
        .into_iter()
        .enumerate()
        .filter(|(index, bytes)| *index == 0 || *bytes <= bytes_max);
    sizes
        .flat_map(|(_, bytes)| {
            directions.iter().map(move |direction| Step {
                direction: *direction,
                bytes,
            })
        })
        .collect()
}

/// Blocks that hold a run of bytes, one after the other.
#[derive(Debug, Clone, Copy)]
pub struct Blocks<'a> {
    /// Where each one starts in its memory.
    pub offsets: &'a [u64],
    /// Size of each; not 0.
    pub block_bytes: u64,
}

impl Blocks<'_> {
    fn capacity(&self) -> u64 {
        (self.offsets.len() as u64).saturating_mul(self.block_bytes)
    }

    /// Where byte `at` of the run lies, and how many bytes follow it in its block. `None` where the memory would end beyond
    /// 64 bits.
    fn place(&self, at: u64) -> Option<(u64, u64)> {
        let block = self.offsets.get(usize::try_from(at / self.block_bytes).ok()?)?;
        let within = at % self.block_bytes;
        Some((block.checked_add(within)?, self.block_bytes - within))
    }
}

/// The slices that move `bytes` bytes between two runs, cut where a block of either side ends. `None` if a side is too
/// small, or no memory could be like this.
pub fn slices(bytes: u64, local: Blocks<'_>, remote: Blocks<'_>) -> Option<Vec<Slice>> {
    if local.block_bytes == 0 || remote.block_bytes == 0 {
        return None;
    }
    if local.capacity() < bytes || remote.capacity() < bytes {
        return None;
    }
    let mut slices: Vec<Slice> = Vec::new();
    let mut at = 0;
    while at < bytes {
        let (local_offset, local_rest) = local.place(at)?;
        let (remote_offset, remote_rest) = remote.place(at)?;
        let len = local_rest.min(remote_rest).min(bytes - at);
        remote_offset.checked_add(len)?;
        at += len;
        match slices.last_mut() {
            // Neighbours on both sides are one run, as in a handoff.
            Some(last)
                if last.local_offset + last.len == local_offset
                    && last.remote_offset + last.len == remote_offset =>
            {
                last.len += len;
            }
            Some(_) | None => slices.push(Slice {
                local_offset,
                remote_offset,
                len,
            }),
        }
    }
    Some(slices)
}

/// Bytes that look random and are the same for the same seed (SplitMix64).
#[derive(Debug, Clone)]
pub struct Pattern {
    state: u64,
}

impl Pattern {
    /// The pattern of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next bytes. Lengths that are no multiple of 8 skip the rest of a word.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.state;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^= word >> 31;
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// What a measurement found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// Transfers, one after the other.
    pub transfers: u64,
    /// Bytes per second while they ran.
    pub bytes_per_second: f64,
    /// Half of the transfers took no longer.
    pub p50: Duration,
    /// 99 of a hundred took no longer.
    pub p99: Duration,
}

/// The figures of transfers of `bytes` bytes each, by what each one took. `None` without any.
pub fn figures(bytes: u64, mut took: Vec<Duration>) -> Option<Figures> {
    took.sort_unstable();
    let count = took.len();
    // The smallest sample that at least this share of all does not exceed.
    let at = |percent: usize| {
        took.get((count * percent).div_ceil(100).saturating_sub(1))
            .copied()
    };
    let total: Duration = took.iter().sum();
    let moved = bytes as f64 * count as f64;
    Some(Figures {
        transfers: count as u64,
        // A clock that does not advance over a transfer says nothing about bandwidth.
        bytes_per_second: moved / total.as_secs_f64().max(1e-9),
        p50: at(50)?,
        p99: at(99)?,
    })
}

#[cfg(test)]
mod tests;
