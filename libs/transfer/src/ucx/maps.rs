//! What the kernel says is mapped into this process, and having it look up pages before they are read.

use std::fs;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages are looked up so many bytes at a time. The owner commits pages as it writes them; what is looked up without need
/// is at most this much beside each read.
const CHUNK_BYTES: u64 = 2 << 20;

/// Which parts of a mapping have been looked up. A page of memory that another process has written costs this one a fault when it is first
/// read: microseconds each, where looking up many at once takes a fifth of one for each.
pub(super) struct LookedUp {
    start: usize,
    bytes: u64,
    chunks: Vec<AtomicU64>,
}

impl LookedUp {
    /// Nothing yet of the `bytes` bytes that are mapped at `start`.
    pub(super) fn none_of(start: usize, bytes: u64) -> Self {
        let words = bytes.div_ceil(CHUNK_BYTES).div_ceil(64);
        Self {
            start,
            bytes,
            chunks: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Where the mapping begins.
    pub(super) fn start(&self) -> usize {
        self.start
    }

    /// Looks up what was not yet of `bytes` bytes at `offset`, which are inside. Where the kernel cannot do so (before Linux 5.14),
    /// pages are looked up one by one as they are read.
    pub(super) fn look_up(&self, offset: u64, bytes: u64) {
        for chunk in offset / CHUNK_BYTES..(offset + bytes).div_ceil(CHUNK_BYTES) {
            let (word, bit) = (&self.chunks[(chunk / 64) as usize], 1 << (chunk % 64));
            if word.load(Ordering::Relaxed) & bit == 0 {
                let from = chunk * CHUNK_BYTES;
                let length = CHUNK_BYTES.min(self.bytes - from);
                let at = ptr::with_exposed_provenance_mut::<libc::c_void>(self.start + from as usize);
                // SAFETY: a part of a mapping that lives as long as its window, and the advice changes no byte of it. A refusal costs
                // time only.
                unsafe { libc::madvise(at, length as usize, libc::MADV_POPULATE_READ) };
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }
}

/// Whether all `bytes` bytes from `start` on are mapped and readable. False where the kernel does not say.
pub(super) fn covers(start: usize, bytes: u64) -> bool {
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else {
        return false;
    };
    (start as u64)
        .checked_add(bytes)
        .is_some_and(|end| covered(&maps, start as u64, end))
}

/// `maps` is in the form of `proc_pid_maps(5)`, in ascending order.
fn covered(maps: &str, start: u64, end: u64) -> bool {
    let mut reached = start;
    for line in maps.lines() {
        if reached >= end {
            break;
        }
        let Some((from, to, readable)) = parse(line) else {
            return false;
        };
        if readable && from <= reached && reached < to {
            reached = to;
        }
    }
    reached >= end
}

fn parse(line: &str) -> Option<(u64, u64, bool)> {
    let mut words = line.split_ascii_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let readable = words.next()?.starts_with('r');
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(from)?, number(to)?, readable))
}

#[cfg(test)]
mod tests;
