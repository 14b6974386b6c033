//! How long a decode step takes with a batch of any size.
//!
//! A node reports how long its steps took lately, and how many sequences they had. The two are fitted as `fixed + per sequence ·
//! batch` by least squares in which old reports fade, so that a step can be foretold for a batch that the node does not have now: one
//! that is idle, or will be fuller. A report alone says little of the slope; where batches hardly vary, the fit leans on
//! [`HALF_FIXED_BATCH`].
//!
//! Pure.

use types::Millis;

/// The batch at which half of a step is the fixed cost of streaming the weights, where nothing else is known.
const HALF_FIXED_BATCH: f64 = 8.0;
/// What is kept of the sums with each report: reports come 20 times a second, and some two minutes of them count.
const KEPT: f64 = 0.9996;
/// How much the assumption weighs, in reports: little beside a few seconds in which the batch varied by one.
const ASSUMPTION_WEIGHT: f64 = 1.0;

/// A decode step as a function of its batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTime {
    /// Milliseconds of a step without sequences.
    pub fixed_ms: f64,
    /// Milliseconds that each one adds.
    pub per_sequence_ms: f64,
}

impl StepTime {
    /// A step that takes so long with one sequence, and grows as is assumed.
    pub fn assumed(with_one_ms: f64) -> Self {
        let per_sequence_ms = with_one_ms / (HALF_FIXED_BATCH + 1.0);
        Self {
            fixed_ms: per_sequence_ms * HALF_FIXED_BATCH,
            per_sequence_ms,
        }
    }

    /// With a batch, which may be an expected one.
    pub fn of(&self, batch: f64) -> Millis {
        Millis(self.fixed_ms + self.per_sequence_ms * batch)
    }
}

/// The sums of a least-squares fit of steps on batches.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Steps {
    weight: f64,
    batch: f64,
    batch_squared: f64,
    ms: f64,
    batch_ms: f64,
}

impl Steps {
    /// Steps with `batch` sequences took so long lately.
    pub(super) fn observe(&mut self, batch: u64, ms: f64) {
        let batch = batch as f64;
        let add = |sum: &mut f64, value: f64| *sum = *sum * KEPT + value;
        add(&mut self.weight, 1.0);
        add(&mut self.batch, batch);
        add(&mut self.batch_squared, batch * batch);
        add(&mut self.ms, ms);
        add(&mut self.batch_ms, batch * ms);
    }

    /// These reports and those.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            weight: self.weight + other.weight,
            batch: self.batch + other.batch,
            batch_squared: self.batch_squared + other.batch_squared,
            ms: self.ms + other.ms,
            batch_ms: self.batch_ms + other.batch_ms,
        }
    }

    /// The fit, if there was anything to fit.
    pub(super) fn fit(&self) -> Option<StepTime> {
        if self.weight <= 0.0 {
            return None;
        }
        // One more observation, of `fixed - HALF_FIXED_BATCH · per sequence = 0`.
        let (weight, half) = (ASSUMPTION_WEIGHT, HALF_FIXED_BATCH);
        let (aa, ab, bb) = (
            self.weight + weight,
            self.batch - weight * half,
            self.batch_squared + weight * half * half,
        );
        let determinant = aa * bb - ab * ab;
        if determinant <= 0.0 {
            return None;
        }
        let fixed_ms = (bb * self.ms - ab * self.batch_ms) / determinant;
        let per_sequence_ms = (aa * self.batch_ms - ab * self.ms) / determinant;
        // Noise must not make a fuller batch quicker, nor an empty step take less than no time.
        let fitted = if per_sequence_ms < 0.0 {
            StepTime {
                fixed_ms: self.ms / self.weight,
                per_sequence_ms: 0.0,
            }
        } else if fixed_ms < 0.0 {
            StepTime {
                fixed_ms: 0.0,
                per_sequence_ms: self.batch_ms / self.batch_squared,
            }
        } else {
            StepTime {
                fixed_ms,
                per_sequence_ms,
            }
        };
        (fitted.fixed_ms + fitted.per_sequence_ms > 0.0).then_some(fitted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(reports: &[(u64, f64)]) -> StepTime {
        let mut steps = Steps::default();
        for _ in 0..100 {
            for (batch, ms) in reports {
                steps.observe(*batch, *ms);
            }
        }
        steps.fit().expect("there are reports")
    }

    fn near(value: Millis, expected: f64) -> bool {
        (value.0 - expected).abs() < 0.02 * expected
    }

    #[test]
    fn one_batch_tells_its_step_and_the_slope_is_assumed() {
        let fitted = fit(&[(8, 32.0)]);
        assert!(near(fitted.of(8.0), 32.0), "{fitted:?}");
        assert!(near(fitted.of(0.0), 16.0), "{fitted:?}");
        assert_eq!(StepTime::assumed(9.0).of(1.0), Millis(9.0));
    }

    #[test]
    fn batches_that_vary_tell_the_slope() {
        let fitted = fit(&[(1, 30.0), (10, 57.0), (30, 117.0)]);
        assert!(near(fitted.of(0.0), 27.0), "{fitted:?}");
        assert!(near(fitted.of(20.0), 87.0), "{fitted:?}");
    }

    #[test]
    fn a_fuller_batch_is_never_quicker() {
        let fitted = fit(&[(1, 30.0), (10, 10.0)]);
        assert!(fitted.of(20.0) >= fitted.of(1.0), "{fitted:?}");
        let fitted = fit(&[(10, 1.0), (20, 30.0)]);
        assert!(fitted.of(0.0).0 >= 0.0, "{fitted:?}");
    }

    #[test]
    fn old_reports_fade() {
        let mut steps = Steps::default();
        for _ in 0..20_000 {
            steps.observe(4, 100.0);
        }
        for _ in 0..20_000 {
            steps.observe(4, 10.0);
        }
        let fitted = steps.fit().expect("there are reports");
        assert!(near(fitted.of(4.0), 10.0), "{fitted:?}");
    }
}
