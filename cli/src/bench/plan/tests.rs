use super::*;

fn synthetic(pace: Pace, seed: u64, count: u64, deviation: u64) -> Vec<Planned> {
    let content = Content::Synthetic {
        input: Length { mean: 100, deviation },
        output: Length { mean: 20, deviation },
        shared_prefix_tokens: 8,
    };
    Plan::new(content, pace, seed, count).collect()
}

fn words(request: &Planned) -> usize {
    request.prompt.split(' ').count()
}

#[test]
fn equal_seeds_give_equal_requests() {
    let one = synthetic(Pace::Poisson(5.0), 3, 50, 10);
    assert_eq!(one, synthetic(Pace::Poisson(5.0), 3, 50, 10));
    assert_ne!(one, synthetic(Pace::Poisson(5.0), 4, 50, 10));
    let closed = synthetic(Pace::Closed, 3, 50, 10);
    let prompts =
        |requests: &[Planned]| -> Vec<String> { requests.iter().map(|one| one.prompt.clone()).collect() };
    assert_eq!(
        prompts(&one),
        prompts(&closed),
        "a rate does not change what is asked"
    );
}

#[test]
fn arrivals_have_their_rate() {
    let at = |request: &Planned| request.at.expect("a time").as_secs_f64();
    let constant = synthetic(Pace::Constant(4.0), 0, 9, 0);
    assert!((at(&constant[8]) - 2.0).abs() < 1e-9 && at(&constant[0]) == 0.0);
    let poisson = synthetic(Pace::Poisson(4.0), 1, 4000, 0);
    let mean = at(&poisson[3999]) / 4000.0;
    assert!((0.24..0.26).contains(&mean), "{mean}");
    let gaps: Vec<f64> = poisson
        .windows(2)
        .map(|pair| at(&pair[1]) - at(&pair[0]))
        .collect();
    let longer = gaps.iter().filter(|gap| **gap > 0.25).count() as f64 / gaps.len() as f64;
    assert!(
        (0.34..0.40).contains(&longer),
        "1/e of exponential gaps are above their mean: {longer}"
    );
    assert!(
        synthetic(Pace::Closed, 0, 3, 0)
            .iter()
            .all(|request| request.at.is_none())
    );
}

#[test]
fn lengths_have_their_mean_and_deviation() {
    let fixed = synthetic(Pace::Closed, 0, 10, 0);
    assert!(
        fixed
            .iter()
            .all(|one| words(one) == 100 && one.output_tokens == 20)
    );
    let spread = synthetic(Pace::Closed, 5, 3000, 30);
    let lengths: Vec<f64> = spread.iter().map(|one| words(one) as f64).collect();
    let mean = lengths.iter().sum::<f64>() / 3000.0;
    let deviation = (lengths.iter().map(|length| (length - mean).powi(2)).sum::<f64>() / 3000.0).sqrt();
    assert!(
        (98.0..102.0).contains(&mean) && (28.5..31.5).contains(&deviation),
        "{mean} {deviation}"
    );
    assert!(spread.iter().all(|one| one.output_tokens >= 1));
}

const TRACE: &str = "\
{\"timestamp\": 3000, \"input_length\": 1000, \"output_length\": 7, \"hash_ids\": [0, 2]}
{\"timestamp\": 1000, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [0, 1]}
";

fn traced(speed: f64, block_tokens: u64, output: Option<Length>) -> Vec<Planned> {
    let content = Content::Trace {
        requests: read_trace(TRACE).expect("a trace"),
        speed,
        block_tokens,
        output,
    };
    Plan::new(content, Pace::Closed, 0, REQUESTS_MAX).collect()
}

#[test]
fn a_trace_is_replayed_in_order_and_shares_its_prefixes() {
    let requests = traced(2.0, TRACE_BLOCK_TOKENS, None);
    let times: Vec<_> = requests.iter().map(|one| one.at.expect("a time")).collect();
    assert_eq!(times, [Duration::ZERO, Duration::from_secs(1)]);
    assert_eq!((words(&requests[0]), words(&requests[1])), (600, 1000));
    assert_eq!((requests[0].output_tokens, requests[1].output_tokens), (5, 7));
    let beginning = |request: &Planned, count| {
        request
            .prompt
            .split(' ')
            .take(count)
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(beginning(&requests[0], 512), beginning(&requests[1], 512));
    assert_ne!(beginning(&requests[0], 600), beginning(&requests[1], 600));
}

#[test]
fn a_trace_is_scaled_to_smaller_blocks() {
    let output = Length {
        mean: 3,
        deviation: 0,
    };
    let requests = traced(1.0, 32, Some(output));
    assert_eq!((words(&requests[0]), words(&requests[1])), (38, 63));
    assert!(requests.iter().all(|request| request.output_tokens == 3));
}

#[test]
fn lengths_out_of_range_are_refused() {
    for (mean, deviation) in [(0, 0), (TOKENS_MAX + 1, 0), (1, TOKENS_MAX + 1)] {
        let error = Length { mean, deviation }
            .check("input-tokens")
            .expect_err("refused");
        assert!(error.message.contains(&mean.to_string()), "{error}");
    }
}
