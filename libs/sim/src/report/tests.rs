use super::*;

#[test]
fn percentiles_are_values_that_occurred() {
    let summary = Summary::of((1..=200).rev().map(f64::from).collect());
    assert_eq!(
        summary,
        Summary {
            mean: 100.5,
            p50: 100.0,
            p90: 180.0,
            p95: 190.0,
            p99: 198.0,
            max: 200.0
        }
    );
    assert_eq!(Summary::of(vec![7.0]).p99, 7.0);
    assert_eq!(Summary::of(Vec::new()), Summary::default());
}

#[test]
fn balance_is_one_where_all_do_the_same() {
    assert_eq!(balance(&[3.0, 3.0]), 1.0);
    assert_eq!(balance(&[0.0, 6.0, 0.0]), 3.0);
    assert_eq!(balance(&[]), 1.0);
}

#[test]
fn load_is_that_of_the_time_when_requests_came() {
    let sample = |at_s: f64, decode_load: f64| Sample {
        at_s,
        queued_prefill_tokens: 0,
        running_sequences: 0,
        decode_load,
    };
    let samples = [
        sample(0.5, 9.0),
        sample(2.0, 0.2),
        sample(8.0, 0.4),
        sample(20.0, 9.0),
    ];
    let load = Load::of(&samples, 10.0);
    assert!((load.mean - 0.3).abs() < 1e-12 && (load.deviation - 0.1).abs() < 1e-12);
}
