//! How long to wait before trying again: doubling, bounded, and spread so that a whole cluster that lost the
//! same peer does not return to it in one instant.
//!
//! Pure: the randomness is a seed that the caller passes, and nothing here sleeps.

use std::time::Duration;

/// A sequence of waiting times.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
    random: u64,
}

impl Backoff {
    /// Waits of about `first`, then twice that, and so on up to `longest`.
    pub fn new(first: Duration, longest: Duration, seed: u64) -> Self {
        Self {
            first,
            longest,
            next: first.min(longest),
            random: seed,
        }
    }

    /// How long to wait now: between half of the current step and all of it.
    pub fn next_wait(&mut self) -> Duration {
        let step = self.next;
        self.next = step.saturating_mul(2).min(self.longest);
        step.mul_f64(0.5 + 0.5 * self.draw())
    }

    /// The next failure is the first one again. Call it after a success.
    pub fn reset(&mut self) {
        self.next = self.first.min(self.longest);
    }

    /// A number in [0, 1), by SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators").
    fn draw(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.random;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        (bits >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// A seed from a name: processes with different names spread their waits differently.
pub fn seed(name: &str) -> u64 {
    // FNV-1a: spreading is all that is asked of it.
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_longest_and_start_again_after_a_success() {
        let first = Duration::from_millis(100);
        let longest = Duration::from_secs(2);
        let mut backoff = Backoff::new(first, longest, seed("decode-0"));
        let mut step = first;
        for _ in 0..20 {
            let wait = backoff.next_wait();
            assert!(
                wait >= step / 2 && wait <= step,
                "{wait:?} is not within {step:?}"
            );
            step = (step * 2).min(longest);
        }
        backoff.reset();
        assert!(backoff.next_wait() <= first);
    }

    #[test]
    fn nodes_spread_their_waits() {
        let wait =
            |name| Backoff::new(Duration::from_secs(1), Duration::from_secs(1), seed(name)).next_wait();
        assert_ne!(wait("decode-0"), wait("decode-1"));
    }
}
