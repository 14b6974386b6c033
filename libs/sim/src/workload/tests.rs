use super::*;

fn workload(kind: Kind) -> Workload {
    Workload {
        synthetic: Synthetic {
            kind,
            rate_per_s: 5.0,
            ..Synthetic::default()
        },
        requests: 2000,
        ..Workload::default()
    }
}

#[test]
fn a_synthetic_workload_is_a_function_of_its_seed_with_its_rate() {
    for kind in [
        Kind::Conversations,
        Kind::Agents,
        Kind::Documents,
        Kind::Scans,
        Kind::Phases,
        Kind::HotPrefix,
    ] {
        let requests = workload(kind).requests(None, 7);
        assert_eq!(requests, workload(kind).requests(None, 7));
        assert_ne!(requests, workload(kind).requests(None, 8));
        assert_eq!(requests.len(), 2000);
        assert!(requests.is_sorted_by_key(|request| request.at));
        let seconds = requests[1999].at.as_secs_f64();
        assert!((seconds / 400.0 - 1.0).abs() < 0.01, "{kind:?}: {seconds}");
        for request in &requests {
            assert_eq!(request.chain.len() as u64, request.prompt_tokens / 512);
        }
        let shared = |request: &Request| requests[0].chain[0] == request.chain[0];
        assert!(requests[1..].iter().any(shared), "{kind:?} shares no prefix");
    }
}

#[test]
fn bursts_keep_the_mean_rate_and_move_arrivals_into_their_part_of_the_period() {
    let burst = Burst {
        period_s: 40.0,
        share: 0.25,
        factor: 9.0,
    };
    let bursty = Workload {
        synthetic: Synthetic {
            burst: Some(burst),
            ..workload(Kind::Documents).synthetic
        },
        ..workload(Kind::Documents)
    };
    let requests = bursty.requests(None, 1);
    assert!(requests.is_sorted_by_key(|request| request.at));
    let in_burst = requests
        .iter()
        .filter(|request| request.at.as_secs_f64() % 40.0 < 10.0)
        .count();
    // 9 × 0.25 of 9 × 0.25 + 0.75.
    let share = in_burst as f64 / requests.len() as f64;
    assert!((share - 0.75).abs() < 0.05, "{share}");
    let seconds = requests[1999].at.as_secs_f64();
    assert!((seconds / 400.0 - 1.0).abs() < 0.1, "{seconds}");
}

#[test]
fn a_trace_is_cut_and_sped_up() {
    let text: String = (0..10)
        .map(|second| {
            format!(
                "{{\"timestamp\": {}, \"input_length\": 600, \"output_length\": 9, \"hash_ids\": [0, {second}]}}\n",
                1000 * second
            )
        })
        .collect();
    let trace = trace::parse(&text, 512).expect("a trace");
    let workload = Workload {
        requests: 5,
        speed: 2.0,
        output_tokens: Some(1),
        ..Workload::default()
    };
    let requests = workload.requests(Some(&trace), 1);
    assert_eq!(requests.len(), 5);
    assert_eq!(requests[4].at, Duration::from_secs(2));
    assert!(requests.iter().all(|request| request.output_tokens == 1));
}

#[test]
fn nonsense_is_refused_by_its_name() {
    let cases = [
        Workload {
            speed: 0.0,
            ..Workload::default()
        },
        Workload {
            block_tokens: 500,
            ..Workload::default()
        },
        Workload {
            synthetic: Synthetic {
                burst: Some(Burst {
                    period_s: 1.0,
                    share: 1.0,
                    factor: 2.0,
                }),
                ..Synthetic::default()
            },
            ..Workload::default()
        },
    ];
    let names = [
        "workload.speed",
        "workload.block_tokens",
        "workload.synthetic.burst.share",
    ];
    for (workload, name) in cases.iter().zip(names) {
        let error = workload.validate().expect_err(name);
        assert!(error.to_string().starts_with(name), "{error}");
    }
}
