use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn the_fit_finds_the_rates_that_made_the_steps(
        base in 0.01..10.0_f64,
        slope in 0.0..5.0_f64,
        steps in prop::collection::vec((1..512_u32, 0..8000_u32), 2..200),
    ) {
        let mut rate = PrefillRate::default();
        let contexts: std::collections::BTreeSet<_> = steps.iter().map(|(_, context)| context / 100).collect();
        for (tokens, context) in &steps {
            let (tokens, kilocontext) = (f64::from(*tokens), f64::from(*context) / 1000.0);
            rate.observe(tokens, tokens * kilocontext, tokens * (base + slope * kilocontext));
        }
        let (a, b) = rate.get();
        prop_assert!(a >= 0.0 && b >= 0.0);
        // Two contexts that are far enough apart determine the line.
        if contexts.len() > 10 {
            prop_assert!((a - base).abs() < 1e-3 * base + 1e-4, "{a} for {base}");
            prop_assert!((b - slope).abs() < 1e-3 * slope + 1e-3, "{b} for {slope}");
        }
    }

    #[test]
    fn no_measurement_gives_a_rate_that_is_no_number(
        steps in prop::collection::vec((any::<f64>(), any::<f64>(), any::<f64>()), 0..20),
    ) {
        let mut rate = PrefillRate::default();
        let mut mean = Smoothed::default();
        for (tokens, context, ms) in steps {
            rate.observe(tokens % 1e6, context % 1e6, ms % 1e9);
            mean.observe(ms % 1e9);
        }
        let (a, b) = rate.get();
        prop_assert!(a.is_finite() && b.is_finite() && a >= 0.0 && b >= 0.0, "{a} {b}");
        prop_assert!(mean.get().is_finite());
    }
}

#[test]
fn nothing_measured_is_zero() {
    assert_eq!(PrefillRate::default().get(), (0.0, 0.0));
    assert_eq!(Smoothed::default().get(), 0.0);
}

#[test]
fn a_mean_follows_a_change() {
    let mut mean = Smoothed::default();
    mean.observe(10.0);
    assert_eq!(mean.get(), 10.0);
    (0..200).for_each(|_| mean.observe(20.0));
    assert!((mean.get() - 20.0).abs() < 0.01);
}

#[test]
fn tokens_that_seem_to_cost_only_their_context_still_cost_something() {
    let mut rate = PrefillRate::default();
    rate.observe(10.0, 10.0, 1.0);
    rate.observe(10.0, 20.0, 30.0);
    let (base, slope) = rate.get();
    assert!(base > 0.0 && slope == 0.0, "{base} {slope}");
}
