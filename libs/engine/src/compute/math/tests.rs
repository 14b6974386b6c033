use super::*;
use crate::compute::isa::Isa;

kernel! {
    fn exp_of(x: &[f32; LANES], out: &mut [f32; LANES]) = exp_of_lanes
}

#[inline(always)]
fn exp_of_lanes<L: Lanes>(x: &[f32; LANES], out: &mut [f32; LANES]) {
    exp(L::load(x)).store(out);
}

#[test]
fn exp_is_within_two_units_in_the_last_place_and_equal_everywhere() {
    for step in 0..10_970 {
        let x: [f32; LANES] = std::array::from_fn(|lane| -87.29 + (step * LANES + lane) as f32 * 1e-3);
        let mut expected = [0.0; LANES];
        exp_of(Isa::SCALAR, &x, &mut expected);
        for (x, y) in x.iter().zip(expected) {
            let exact = f64::from(*x).exp();
            let unit = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            assert!(
                (f64::from(y) - exact).abs() <= 2.0 * unit,
                "exp({x}) = {y}, not {exact}"
            );
        }
        for isa in Isa::available() {
            let mut found = [0.0; LANES];
            exp_of(isa, &x, &mut found);
            assert_eq!(found.map(f32::to_bits), expected.map(f32::to_bits), "{isa:?}");
        }
    }
}

#[test]
fn exp_ends_in_zero_below_and_stays_finite_above() {
    let mut x = [0.0; LANES];
    x[..4].copy_from_slice(&[f32::NEG_INFINITY, -88.0, 1000.0, f32::NAN]);
    for isa in Isa::available() {
        let mut y = [0.0; LANES];
        exp_of(isa, &x, &mut y);
        assert_eq!(y[..2], [0.0, 0.0]);
        assert!(y[2] > 1e38 && y[2].is_finite());
        assert!(y[3].is_nan());
        assert_eq!(y[4], 1.0);
    }
}

#[test]
fn rms_norm_follows_its_formula_for_any_width() {
    for width in [1, 15, 16, 17, 64, 100, 576] {
        let x: Vec<f32> = (0..width).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let weight: Vec<f32> = (0..width).map(|i| 1.0 + (i as f32).cos() * 0.1).collect();
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
        let mut expected = vec![0.0; width];
        rms_norm(Isa::SCALAR, &x, &weight, 1e-5, &mut expected);
        for i in 0..width {
            let exact = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
            assert!(
                (f64::from(expected[i]) - exact).abs() < 1e-5,
                "width {width}, column {i}"
            );
        }
        for isa in Isa::available() {
            let mut out = vec![0.0; width];
            rms_norm(isa, &x, &weight, 1e-5, &mut out);
            assert_eq!(out, expected, "{isa:?}, width {width}");
        }
    }
}

#[test]
fn rows_of_any_width_are_added_and_halved() {
    for width in [1, 16, 19, 40] {
        let y: Vec<f32> = (0..width).map(|i| i as f32 + 0.3).collect();
        for isa in Isa::available() {
            let mut x = vec![1.5; width];
            add_assign(isa, &mut x, &y);
            assert!(
                x.iter().zip(&y).all(|(x, y)| *x == 1.5 + y),
                "{isa:?}, width {width}"
            );
            let mut halves = vec![0; width];
            to_f16(isa, &y, &mut halves);
            let expected: Vec<u16> = y.iter().map(|y| half::f16::from_f32(*y).to_bits()).collect();
            assert_eq!(halves, expected, "{isa:?}, width {width}");
        }
    }
}

#[test]
fn a_soft_cap_follows_its_formula_for_any_width() {
    for width in [1, 16, 21, 64] {
        let x: Vec<f32> = (0..width).map(|i| (i as f32 - 20.0) * 1.7).collect();
        let mut expected = x.clone();
        soft_cap_row(Isa::SCALAR, &mut expected, 5.0);
        for (x, y) in x.iter().zip(&expected) {
            let exact = 5.0 * (f64::from(*x) / 5.0).tanh();
            assert!(
                (f64::from(*y) - exact).abs() < 2e-6,
                "{x} became {y}, not {exact}"
            );
        }
        for isa in Isa::available() {
            let mut out = x.clone();
            soft_cap_row(isa, &mut out, 5.0);
            assert_eq!(out, expected, "{isa:?}, width {width}");
        }
    }
}

#[test]
fn softmax_follows_its_formula_for_any_width() {
    for width in [1, 8, 16, 60, 128] {
        let x: Vec<f32> = (0..width).map(|i| (i as f32 * 0.9).sin() * 6.0).collect();
        let total: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
        let mut expected = x.clone();
        softmax_row(Isa::SCALAR, &mut expected);
        for (x, y) in x.iter().zip(&expected) {
            assert!((f64::from(*y) - f64::from(*x).exp() / total).abs() < 1e-6);
        }
        for isa in Isa::available() {
            let mut out = x.clone();
            softmax_row(isa, &mut out);
            assert_eq!(out, expected, "{isa:?}, width {width}");
        }
    }
}

#[test]
fn weighted_rows_are_added_by_fused_multiply_adds() {
    for width in [1, 16, 19, 40] {
        let x: Vec<f32> = (0..width).map(|i| i as f32 / 3.0).collect();
        for isa in Isa::available() {
            let mut sum = vec![0.7; width];
            add_weighted(isa, &mut sum, 0.3, &x);
            let expected: Vec<f32> = x.iter().map(|x| 0.3f32.mul_add(*x, 0.7)).collect();
            assert_eq!(sum, expected, "{isa:?}, width {width}");
        }
    }
}
