//! A bound on bytes per second: what is written to a disk wears it out.
//!
//! Pure: callers pass `now`, and wait as long as they are told.

use std::time::{Duration, Instant};

/// Bytes that may go at once after a pause, as time of the rate.
const BURST: Duration = Duration::from_secs(1);

/// A budget of bytes that fills at a rate.
#[derive(Debug)]
pub struct Throttle {
    /// Bytes per second; 0 is no bound.
    rate: u64,
    /// When all that was taken is paid for.
    paid_at: Option<Instant>,
}

impl Throttle {
    /// A full budget of `rate` bytes per second; 0 is no bound.
    pub fn new(rate: u64) -> Self {
        Self { rate, paid_at: None }
    }

    /// Takes `bytes`, and says how long to wait before they are used.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        if self.rate == 0 {
            return Duration::ZERO;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        // A pause saves up one burst and no more.
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let paid_at = self.paid_at.map_or(earliest, |paid_at| paid_at.max(earliest)) + cost;
        self.paid_at = Some(paid_at);
        paid_at.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_at_once_and_the_rest_at_the_rate() {
        let start = Instant::now();
        let mut throttle = Throttle::new(1000);
        assert_eq!(throttle.take(1000, start), Duration::ZERO);
        assert_eq!(throttle.take(500, start), Duration::from_millis(500));
        assert_eq!(throttle.take(500, start), Duration::from_millis(1000));
        let later = start + Duration::from_secs(1);
        assert_eq!(throttle.take(250, later), Duration::from_millis(250));
    }

    #[test]
    fn a_long_pause_saves_up_one_burst() {
        let start = Instant::now();
        let mut throttle = Throttle::new(1000);
        throttle.take(1000, start);
        let later = start + Duration::from_secs(3600);
        assert_eq!(throttle.take(1000, later), Duration::ZERO);
        assert_eq!(throttle.take(1000, later), Duration::from_secs(1));
    }

    #[test]
    fn no_rate_is_no_bound() {
        let mut throttle = Throttle::new(0);
        assert_eq!(throttle.take(u64::MAX, Instant::now()), Duration::ZERO);
    }
}
