//! Checksums of what peers write to granted ranges, made while it lands.
//!
//! Invariant: a checksum that [`Landing::checksum`] gives is that of the bytes which the range holds once its grant is closed. Bytes
//! that came out of order, twice, or past this processor leave the range without one, and its owner hashes it later.
//!
//! Elsewhere: that nothing lands any more (`region.rs`), the copying (`tcp/link.rs`, `tcp/stream.rs`).

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use types::Checksum;

use crate::copy::{self, Stores};
use crate::digest::Unit;

/// One range, and what was seen of it.
pub(crate) struct Landing {
    range: Range<u64>,
    /// Its place among the ranges that were granted.
    place: usize,
    /// `None` once something did not come in order.
    seen: Mutex<Option<Unit>>,
}

/// Landings of ranges that do not overlap, by where they begin. Of others there are none.
pub(super) fn landings(ranges: &[Range<u64>]) -> Vec<Landing> {
    let landing = |(place, range): (usize, &Range<u64>)| Landing {
        range: range.clone(),
        place,
        seen: Mutex::new(Some(Unit::new(range.end - range.start))),
    };
    let mut landings: Vec<_> = ranges.iter().enumerate().map(landing).collect();
    // An empty range before the one that begins where it does, so that the last one that begins before a byte holds it.
    landings.sort_unstable_by_key(|landing| (landing.range.start, landing.range.end));
    let overlap = |pair: &[Landing]| pair[0].range.end > pair[1].range.start;
    if landings.windows(2).any(overlap) {
        landings.clear();
    }
    landings
}

/// The landing that holds `offset`.
pub(super) fn at(landings: &[Landing], offset: u64) -> Option<&Landing> {
    let after = landings.partition_point(|landing| landing.range.start <= offset);
    let landing = landings[..after].last()?;
    (offset < landing.range.end).then_some(landing)
}

impl Landing {
    /// Bytes from `offset` to the end of the range.
    pub(crate) fn left(&self, offset: u64) -> usize {
        usize::try_from(self.range.end - offset).unwrap_or(usize::MAX)
    }

    /// Copies bytes that belong at `offset`, or looks at them where they are already.
    ///
    /// # Safety
    ///
    /// As [`copy::stripes`], inside of the grant's gate; no more bytes than are [`left`](Self::left).
    pub(crate) unsafe fn take(
        &self,
        offset: u64,
        from: *const u8,
        to: *mut u8,
        bytes: usize,
        stores: Stores,
    ) {
        let mut seen = self.seen();
        let unit = seen
            .as_mut()
            .filter(|unit| self.range.end - unit.missing() == offset && bytes as u64 <= unit.missing());
        // SAFETY: the caller's promise.
        unsafe {
            match unit {
                Some(unit) => unit.take(from, to, bytes, stores),
                None => {
                    *seen = None;
                    drop(seen);
                    copy::plain(from, to, bytes, stores);
                }
            }
        }
    }

    /// Bytes land that nobody sees.
    pub(super) fn overwrite(&self) {
        *self.seen() = None;
    }

    /// The place of the range among those that were granted, and its checksum if all of it was seen.
    pub(super) fn checksum(&self) -> (usize, Option<Checksum>) {
        (self.place, self.seen().as_ref().and_then(Unit::finish))
    }

    fn seen(&self) -> MutexGuard<'_, Option<Unit>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
