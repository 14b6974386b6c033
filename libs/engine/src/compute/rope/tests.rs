use rstest::rstest;

use super::*;
use crate::compute::isa::Isa;

fn config(scaling: RopeScaling) -> RopeConfig {
    RopeConfig {
        theta: 10_000.0,
        dims: 8,
        style: RopeStyle::HalfSplit,
        scaling,
    }
}

fn of(scaling: RopeScaling) -> (Vec<f64>, f64) {
    frequencies(&config(scaling))
}

fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found / expected - 1.0).abs() < 1e-6, "{found}, not {expected}");
    }
}

/// Expectations are the formulas of `transformers.modeling_rope_utils`, worked out by hand for theta 10000 and 8 dims.
#[test]
fn frequencies_follow_each_scaling() {
    let plain = [1.0, 0.1, 0.01, 0.001];
    close(&of(RopeScaling::None).0, &plain);
    close(
        &of(RopeScaling::Linear { factor: 4.0 }).0,
        &[0.25, 0.025, 0.0025, 0.00025],
    );
    let base: f64 = 10_000.0 * 3f64.powf(8.0 / 6.0);
    let dynamic: Vec<f64> = (0..4).map(|pair| base.powf(-f64::from(pair) / 4.0)).collect();
    close(&of(RopeScaling::Dynamic { factor: 2.0 }).0, &dynamic);
    let divisors = vec![1.0, 2.0, 4.0, 8.0];
    let (found, amplitude) = of(RopeScaling::Factors {
        divisors,
        attention_factor: 1.25,
    });
    close(&found, &[1.0, 0.05, 0.0025, 0.000_125]);
    assert_eq!(amplitude, 1.25);
}

#[test]
fn llama3_keeps_short_wavelengths_and_divides_long_ones() {
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 1024,
    };
    // Rotations in 1024 positions: 163, 16.3, 1.63, 0.163; between 1 and 4 it blends.
    let kept = (1024.0 * 0.01 / (2.0 * PI) - 1.0) / 3.0;
    let blended = 0.01 * (kept + (1.0 - kept) / 8.0);
    close(&of(scaling).0, &[1.0, 0.1, blended, 0.000_125]);
}

#[test]
fn yarn_blends_between_its_two_rotations_and_amplifies() {
    let scaling = RopeScaling::Yarn {
        factor: 4.0,
        original_context: 1024,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
    };
    let (found, amplitude) = of(scaling);
    // Pairs 0.7 and 2.2, widened to 0 and 3.
    let blend = |plain: f64, scaled: f64| plain * (scaled / 4.0 + 1.0 - scaled);
    close(
        &found,
        &[1.0, blend(0.1, 1.0 / 3.0), blend(0.01, 2.0 / 3.0), 0.000_25],
    );
    assert!((amplitude - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
}

#[rstest]
#[case(RopeStyle::Interleaved)]
#[case(RopeStyle::HalfSplit)]
fn pairs_turn_and_the_rest_passes(#[case] style: RopeStyle) {
    let rope = RopeConfig {
        style,
        ..config(RopeScaling::None)
    };
    let mut table = RopeTable::new(&rope);
    table.grow(3);
    table.grow(12);
    let head: Vec<f32> = (1..=20).map(|i| i as f32).collect();
    for isa in Isa::available() {
        let mut heads = head.clone();
        rotate(isa, &mut heads, 10, style, table.at(11), 0.5);
        for (head, turned) in head.chunks(10).zip(heads.chunks(10)) {
            for pair in 0..4 {
                let (i, j) = match style {
                    RopeStyle::Interleaved => (2 * pair, 2 * pair + 1),
                    RopeStyle::HalfSplit => (pair, pair + 4),
                };
                let (sine, cosine) = (11.0 * 0.1f64.powi(pair as i32)).sin_cos();
                let (a, b) = (f64::from(head[i]), f64::from(head[j]));
                assert!((f64::from(turned[i]) - 0.5 * (a * cosine - b * sine)).abs() < 1e-4);
                assert!((f64::from(turned[j]) - 0.5 * (a * sine + b * cosine)).abs() < 1e-4);
            }
            assert_eq!(turned[8..], [0.5 * head[8], 0.5 * head[9]]);
        }
    }
}
