//! How long answers are, as far as earlier ones tell.
//!
//! Per tenant, a histogram in which old answers fade. Whoever has no history borrows that of all tenants; where nobody
//! has any, nothing is known and answers are taken to go on.
//!
//! Pure. Elsewhere: what it is for (`residents.rs`).

use std::collections::HashMap;

/// Buckets per doubling of the length: lengths are told apart to a fifth.
const BUCKETS_PER_OCTAVE: f64 = 4.0;
/// Covers answers of up to 2^20 tokens; longer ones count as that.
const BUCKETS: usize = 81;
/// What is kept of a histogram when an answer is added: some two hundred answers count.
const KEPT: f64 = 0.995;
/// Answers before a histogram is believed.
const ANSWERS_MIN: f64 = 8.0;
/// Tenants with a histogram of their own. Those that come then are taken to be like all.
const TENANTS_MAX: usize = 1_024;

/// The lengths of answers, by tenant.
#[derive(Debug, Default)]
pub struct Lengths {
    of_tenant: HashMap<String, Histogram>,
    of_all: Histogram,
}

#[derive(Debug)]
struct Histogram {
    weights: [f64; BUCKETS],
    /// Sum of the weights from each bucket on.
    from: [f64; BUCKETS + 1],
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            weights: [0.0; BUCKETS],
            from: [0.0; BUCKETS + 1],
        }
    }
}

/// The answers that one answer is compared with.
#[derive(Debug, Clone, Copy)]
pub struct Alike<'a>(Option<&'a Histogram>);

impl Lengths {
    /// An answer ended by itself or at its limit after so many tokens.
    pub fn learn(&mut self, tenant: &str, tokens: u64) {
        self.of_all.learn(tokens);
        if let Some(own) = self.of_tenant.get_mut(tenant) {
            own.learn(tokens);
        } else if self.of_tenant.len() < TENANTS_MAX {
            self.of_tenant.entry(tenant.to_owned()).or_default().learn(tokens);
        }
    }

    /// What a tenant's answers are like.
    pub fn of(&self, tenant: &str) -> Alike<'_> {
        let own = self.of_tenant.get(tenant).filter(|own| own.is_believed());
        Alike(own.or_else(|| Some(&self.of_all).filter(|all| all.is_believed())))
    }
}

impl Alike<'_> {
    /// The part of the answers with `tokens` that go on for `more`.
    pub fn go_on(self, tokens: u64, more: u64) -> f64 {
        let Some(histogram) = self.0 else {
            return 1.0;
        };
        let alive = histogram.at_least(tokens);
        // Nobody was ever longer: nothing is known of such answers but that they do not end.
        if alive <= 0.0 {
            return 1.0;
        }
        histogram.at_least(tokens.saturating_add(more)) / alive
    }
}

impl Histogram {
    fn learn(&mut self, tokens: u64) {
        for weight in &mut self.weights {
            *weight *= KEPT;
        }
        self.weights[place(tokens) as usize] += 1.0;
        for bucket in (0..BUCKETS).rev() {
            self.from[bucket] = self.from[bucket + 1] + self.weights[bucket];
        }
    }

    fn is_believed(&self) -> bool {
        self.from[0] >= ANSWERS_MIN
    }

    /// Weight of the answers with so many tokens or more; within a bucket, lengths are spread evenly over its logarithm.
    fn at_least(&self, tokens: u64) -> f64 {
        let place = place(tokens);
        let bucket = place as usize;
        let part = place.fract();
        self.from[bucket + 1] + self.weights[bucket] * (1.0 - part)
    }
}

/// A length as a bucket and how far into it.
fn place(tokens: u64) -> f64 {
    let place = (tokens.max(1) as f64).log2() * BUCKETS_PER_OCTAVE;
    place.min((BUCKETS - 1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_known_until_some_answers_ended() {
        let mut lengths = Lengths::default();
        for _ in 0..7 {
            lengths.learn("a", 10);
        }
        assert!((lengths.of("a").go_on(0, 1_000) - 1.0).abs() < 1e-9);
        for _ in 0..3 {
            lengths.learn("a", 10);
        }
        assert!(lengths.of("a").go_on(0, 1_000) < 1e-9);
    }

    #[test]
    fn tenants_differ_and_a_new_one_is_like_all() {
        let mut lengths = Lengths::default();
        for _ in 0..100 {
            lengths.learn("short", 16);
            lengths.learn("long", 1_024);
        }
        assert!(lengths.of("short").go_on(0, 64) < 1e-9);
        assert!((lengths.of("long").go_on(0, 64) - 1.0).abs() < 1e-9);
        let of_new = lengths.of("new").go_on(0, 64);
        assert!((of_new - 0.5).abs() < 0.01, "{of_new}");
        // Whoever has passed the short ones is a long one.
        assert!((lengths.of("new").go_on(64, 64) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn old_answers_fade() {
        let mut lengths = Lengths::default();
        for _ in 0..1_000 {
            lengths.learn("a", 1_000);
        }
        for _ in 0..1_000 {
            lengths.learn("a", 10);
        }
        assert!(lengths.of("a").go_on(0, 100) < 0.01);
    }

    #[test]
    fn what_is_longer_than_ever_goes_on() {
        let mut lengths = Lengths::default();
        for _ in 0..100 {
            lengths.learn("a", 10);
        }
        assert!((lengths.of("a").go_on(100, 100) - 1.0).abs() < 1e-9);
        for tokens in [0, 1, u64::MAX] {
            lengths.learn("a", tokens);
            assert!((0.0..=1.0).contains(&lengths.of("a").go_on(tokens, 1)));
        }
    }

    #[test]
    fn tenants_beyond_the_bound_share_what_is_known_of_all() {
        let mut lengths = Lengths::default();
        for tenant in 0..2 * TENANTS_MAX {
            for _ in 0..9 {
                lengths.learn(&tenant.to_string(), 10);
            }
        }
        assert_eq!(lengths.of_tenant.len(), TENANTS_MAX);
        assert!(lengths.of("2000").go_on(0, 100) < 1e-9);
    }
}
