//! Time as policies keep it: milliseconds since the first event.

use std::time::Instant;

/// Turns instants into milliseconds that never go back.
#[derive(Debug, Default)]
pub(super) struct Clock {
    first: Option<Instant>,
    latest_ms: u64,
}

impl Clock {
    /// Advances to `now`, unless it lies before what was seen already.
    pub(super) fn advance(&mut self, now: Instant) -> u64 {
        self.first.get_or_insert(now);
        self.latest_ms = self.at(now);
        self.latest_ms
    }

    /// As [`Clock::advance`], for looking only.
    pub(super) fn at(&self, now: Instant) -> u64 {
        let elapsed = self.first.map_or(0, |first| {
            u64::try_from(now.saturating_duration_since(first).as_millis()).unwrap_or(u64::MAX)
        });
        elapsed.max(self.latest_ms)
    }
}
