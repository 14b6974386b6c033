//! When tokens came. Pure: callers pass `now`.

use std::time::Instant;

use types::Millis;

/// The times of one request, as the router sees them.
#[derive(Debug, Clone)]
pub(super) struct Latency {
    received: Instant,
    first: Option<Instant>,
    last: Instant,
    tokens: u64,
    longest_gap: Millis,
}

/// What an arrival of tokens tells.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Arrival {
    /// The first ones, this long after the request.
    First(Millis),
    /// Later ones, this long after those before.
    Later(Millis),
}

impl Latency {
    pub(super) fn new(received: Instant) -> Self {
        Self {
            received,
            first: None,
            last: received,
            tokens: 0,
            longest_gap: Millis(0.0),
        }
    }

    /// `count` tokens came.
    pub(super) fn tokens(&mut self, count: u64, now: Instant) -> Arrival {
        let gap = millis(self.last, now);
        self.tokens += count;
        self.last = now;
        if self.first.is_none() {
            self.first = Some(now);
            return Arrival::First(gap);
        }
        if gap > self.longest_gap {
            self.longest_gap = gap;
        }
        Arrival::Later(gap)
    }

    /// When the first one came.
    pub(super) fn first(&self) -> Option<Instant> {
        self.first
    }

    /// Arrival of the request to first token; 0 before there is one.
    pub(super) fn ttft(&self) -> Millis {
        self.first
            .map_or(Millis(0.0), |first| millis(self.received, first))
    }

    /// Mean gap between tokens; 0 with fewer than two.
    pub(super) fn tbt_mean(&self) -> Millis {
        match self.first {
            Some(first) if self.tokens > 1 => Millis(millis(first, self.last).0 / (self.tokens - 1) as f64),
            Some(_) | None => Millis(0.0),
        }
    }

    /// Longest gap between tokens.
    pub(super) fn tbt_max(&self) -> Millis {
        self.longest_gap
    }
}

/// The time between two instants.
pub(super) fn millis(from: Instant, to: Instant) -> Millis {
    Millis(to.saturating_duration_since(from).as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn gaps_are_between_tokens_and_not_before_the_first() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut latency = Latency::new(start);
        assert_eq!(latency.tbt_mean(), Millis(0.0));
        assert_eq!(latency.tokens(1, at(100)), Arrival::First(Millis(100.0)));
        assert_eq!(latency.tokens(1, at(110)), Arrival::Later(Millis(10.0)));
        assert_eq!(latency.tokens(2, at(140)), Arrival::Later(Millis(30.0)));
        assert_eq!(latency.ttft(), Millis(100.0));
        assert_eq!(latency.tbt_max(), Millis(30.0));
        assert!((latency.tbt_mean().0 - 40.0 / 3.0).abs() < 1e-9);
    }
}
