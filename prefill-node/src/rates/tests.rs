use std::iter::once;

use proptest::prelude::*;

use super::*;

fn ms(a: f64, b: f64, chunks: &[Range<usize>]) -> f64 {
    chunks
        .iter()
        .map(|chunk| {
            let mean_context = (chunk.start + chunk.end) as f64 / 2.0;
            chunk.len() as f64 * (a + b * mean_context / 1000.0)
        })
        .sum()
}

proptest! {
    #[test]
    fn the_fit_recovers_the_rates(
        a in 0.01f64..10.0,
        b in 0.01f64..10.0,
        starts in prop::collection::vec(0usize..4000, 8..40),
    ) {
        prop_assume!(starts.iter().max() > starts.iter().min().map(|min| min + 1000).as_ref());
        let mut rate = StepRate::default();
        for start in starts {
            let chunks = [start..start + 512, 0..17];
            rate.observe(chunks.iter(), ms(a, b, &chunks));
        }
        let (fitted_a, fitted_b) = rate.coefficients();
        prop_assert!((fitted_a - a).abs() < 1e-3 * a.max(b), "{} is not {}", fitted_a, a);
        prop_assert!((fitted_b - b).abs() < 1e-3 * a.max(b), "{} is not {}", fitted_b, b);
    }

    #[test]
    fn no_measurement_makes_a_rate_negative_or_infinite(
        samples in prop::collection::vec((0usize..5000, 0usize..600, -1.0f64..1e6), 0..60),
    ) {
        let mut rate = StepRate::default();
        for (start, tokens, elapsed_ms) in samples {
            rate.observe(once(&(start..start + tokens)), elapsed_ms.max(0.0));
            let (a, b) = rate.coefficients();
            prop_assert!(a.is_finite() && a >= 0.0 && b.is_finite() && b >= 0.0);
        }
    }
}

#[test]
fn nothing_measured_is_zero() {
    assert_eq!(StepRate::default().coefficients(), (0.0, 0.0));
    assert_eq!(TransferRate::default().bytes_per_ms(), 0.0);
}

#[test]
fn one_context_gives_the_whole_time_to_the_tokens() {
    let mut rate = StepRate::default();
    for _ in 0..5 {
        rate.observe(once(&(0..100)), 200.0);
    }
    assert_eq!(rate.coefficients().1, 0.0);
    assert!((rate.coefficients().0 - 2.0).abs() < 1e-9);
}

#[test]
fn the_fit_follows_a_machine_that_slows_down() {
    let mut rate = StepRate::default();
    for (slowness, rounds) in [(1.0, 100), (3.0, 400)] {
        for round in 0..rounds {
            let chunk = round % 8 * 512..round % 8 * 512 + 512;
            rate.observe(
                once(&chunk),
                slowness * ms(1.0, 0.5, std::slice::from_ref(&chunk)),
            );
        }
    }
    assert!((rate.coefficients().0 - 3.0).abs() < 0.01);
}

#[test]
fn transfers_without_bytes_or_time_teach_nothing() {
    let mut rate = TransferRate::default();
    rate.observe(0, 5.0);
    rate.observe(5, 0.0);
    assert_eq!(rate.bytes_per_ms(), 0.0);
    rate.observe(1000, 5.0);
    assert_eq!(rate.bytes_per_ms(), 200.0);
}
