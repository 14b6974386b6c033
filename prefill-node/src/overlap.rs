//! How much of a handoff hid behind the computation.
//!
//! Pure: callers pass `now`.

use std::time::Duration;

use tokio::time::Instant;

/// When writes were on their way.
#[derive(Debug, Default)]
pub struct Overlap {
    in_flight: usize,
    busy_since: Option<Instant>,
    /// Time with a write in flight until the computation ended, and after that.
    hidden: Duration,
    after: Duration,
    computed_at: Option<Instant>,
    first_begin: Option<Instant>,
    last_end: Option<Instant>,
}

impl Overlap {
    /// A write began.
    pub fn begin(&mut self, now: Instant) {
        self.first_begin.get_or_insert(now);
        if self.in_flight == 0 {
            self.busy_since = Some(now);
        }
        self.in_flight += 1;
    }

    /// A write ended.
    pub fn end(&mut self, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.last_end = Some(now);
        if self.in_flight == 0 {
            self.settle(now);
        }
    }

    /// The computation ended.
    pub fn computed(&mut self, now: Instant) {
        let busy = self.busy_since.is_some();
        self.settle(now);
        self.computed_at = Some(now);
        if busy {
            self.busy_since = Some(now);
        }
    }

    /// Time in which KV was on its way while the engine computed.
    pub fn hidden(&self) -> Duration {
        self.hidden
    }

    /// From the end of the computation to the last acknowledgement.
    pub fn exposed(&self) -> Duration {
        match (self.computed_at, self.last_end) {
            (Some(computed), Some(end)) => end.saturating_duration_since(computed),
            (Some(_) | None, None) | (None, Some(_)) => Duration::ZERO,
        }
    }

    /// Time with a write in flight.
    pub fn busy(&self) -> Duration {
        self.hidden + self.after
    }

    /// From the first write's beginning to the last one's end; `None` if there was none.
    pub fn extent(&self) -> Option<(Instant, Instant)> {
        self.first_begin.zip(self.last_end)
    }

    fn settle(&mut self, now: Instant) {
        let Some(since) = self.busy_since.take() else {
            return;
        };
        let sum = match self.computed_at {
            None => &mut self.hidden,
            Some(_) => &mut self.after,
        };
        *sum += now.saturating_duration_since(since);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_split_where_the_computation_ends() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut overlap = Overlap::default();
        overlap.begin(at(10));
        overlap.begin(at(20));
        overlap.end(at(30));
        overlap.end(at(40));
        // Nothing was on its way for 10 ms.
        overlap.begin(at(50));
        overlap.computed(at(60));
        overlap.end(at(75));
        assert_eq!(overlap.hidden(), Duration::from_millis(40));
        assert_eq!(overlap.exposed(), Duration::from_millis(15));
        assert_eq!(overlap.busy(), Duration::from_millis(55));
        assert_eq!(overlap.extent(), Some((at(10), at(75))));
    }

    #[test]
    fn a_late_offer_is_exposed_from_the_end_of_the_computation() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut overlap = Overlap::default();
        overlap.computed(at(100));
        overlap.begin(at(150));
        overlap.end(at(160));
        assert_eq!(overlap.hidden(), Duration::ZERO);
        assert_eq!(overlap.exposed(), Duration::from_millis(60));
        assert_eq!(overlap.busy(), Duration::from_millis(10));
    }

    #[test]
    fn nothing_to_push_is_neither() {
        let mut overlap = Overlap::default();
        overlap.computed(Instant::now());
        assert_eq!(
            (overlap.hidden(), overlap.exposed()),
            (Duration::ZERO, Duration::ZERO)
        );
    }
}
