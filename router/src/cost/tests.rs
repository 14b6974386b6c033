use proptest::prelude::*;

use super::*;

fn placed(prefill: &str, tokens: u64, decode: &str) -> Placed {
    Placed {
        prefill: prefill.into(),
        prefill_tokens: tokens,
        decode: decode.into(),
        decode_blocks: 3,
    }
}

fn report(queued: u64) -> LoadReport {
    LoadReport {
        queued_prefill_tokens: queued,
        free_blocks: 10,
        ..LoadReport::default()
    }
}

fn pressure(costs: &CostModel, node: &str) -> Pressure {
    costs
        .pressures()
        .get(&NodeId::from(node))
        .copied()
        .unwrap_or_default()
}

#[test]
fn compute_grows_with_the_context_of_every_new_token() {
    let rates = Rates {
        prefill_ms_per_token: 2.0,
        prefill_ms_per_token_kilocontext: 4.0,
        step: StepTime::assumed(1.0),
        transfer_bytes_per_ms: 1.0,
        disk_bytes_per_ms: 1.0,
    };
    assert_eq!(rates.compute(100, 0), Millis(200.0 + 4.0 * 100.0 * 0.05));
    assert_eq!(rates.compute(100, 1000), Millis(200.0 + 4.0 * 100.0 * 1.05));
}

#[test]
fn what_is_not_measured_is_borrowed_before_it_is_assumed() {
    let now = Instant::now();
    let mut costs = CostModel::new(Priors::default());
    assert_eq!(
        costs.rates(&"a".into()).prefill_ms_per_token,
        Priors::default().prefill_ms_per_token
    );
    for (name, rate) in [("b", 4.0), ("c", 8.0)] {
        let report = LoadReport {
            prefill_ms_per_token: rate,
            ..report(0)
        };
        costs.report(&name.into(), report, now);
    }
    assert_eq!(costs.rates(&"a".into()).prefill_ms_per_token, 6.0);
    assert_eq!(costs.rates(&"b".into()).prefill_ms_per_token, 4.0);
    costs.forget(&"b".into());
    assert_eq!(costs.rates(&"a".into()).prefill_ms_per_token, 8.0);
}

#[test]
fn a_report_takes_over_what_was_placed_before_it() {
    let start = Instant::now();
    let mut costs = CostModel::new(Priors::default());
    costs.report(&"p".into(), report(100), start);
    costs.report(&"d".into(), report(0), start);
    costs.place(placed("p", 40, "d"), start);
    assert_eq!(pressure(&costs, "p").queued_prefill_tokens, 140);
    assert_eq!(pressure(&costs, "d").placed_sequences, 1);
    assert_eq!(pressure(&costs, "d").available_blocks, 7);

    // Sent before the placement can have arrived.
    costs.report(&"p".into(), report(90), start + REPORT_LAG / 2);
    assert_eq!(pressure(&costs, "p").queued_prefill_tokens, 130);

    costs.report(&"p".into(), report(130), start + REPORT_LAG);
    assert_eq!(pressure(&costs, "p").queued_prefill_tokens, 130);
    assert_eq!(pressure(&costs, "d").placed_sequences, 1);

    costs.report(&"d".into(), report(0), start + REPORT_LAG);
    assert!(costs.ledger.is_empty());
}

#[test]
fn recent_prompts_tell_what_context_makes_of_a_queued_token() {
    let mut costs = CostModel::new(Priors::default());
    assert_eq!(costs.context_factor(), 1.0);
    let node = NodeId::from("p0");
    let rates = costs.rates(&node);
    for _ in 0..1000 {
        costs.learn_context(&node, 4000, rates.compute(4000, 6000));
    }
    let expected = rates.compute(4000, 6000).0 / (4000.0 * rates.prefill_ms_per_token);
    assert!((costs.context_factor() - expected).abs() < 1e-9);
    for _ in 0..1000 {
        costs.learn_context(&node, 10, Millis(10.0 * rates.prefill_ms_per_token));
    }
    assert!(costs.context_factor() < 1.1, "{}", costs.context_factor());
}

#[test]
fn a_first_token_ends_the_wait_of_its_prompt() {
    let now = Instant::now();
    let mut costs = CostModel::new(Priors::default());
    let id = costs.place(placed("p", 40, "d"), now);
    costs.prefilled(id);
    assert_eq!(pressure(&costs, "p").queued_prefill_tokens, 0);
    assert_eq!(pressure(&costs, "d").placed_sequences, 1);
    costs.ended(id);
    assert_eq!(pressure(&costs, "d").placed_sequences, 0);
}

#[derive(Debug, Clone)]
enum Op {
    Place { prefill: u8, decode: u8, tokens: u64 },
    Report { node: u8 },
    Prefilled { nth: usize },
    Ended { nth: usize },
    Forget { node: u8 },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0u8..3, 0u8..3, 1u64..500).prop_map(|(prefill, decode, tokens)| Op::Place { prefill, decode, tokens }),
        2 => (0u8..3).prop_map(|node| Op::Report { node }),
        1 => any::<usize>().prop_map(|nth| Op::Prefilled { nth }),
        1 => any::<usize>().prop_map(|nth| Op::Ended { nth }),
        1 => (0u8..3).prop_map(|node| Op::Forget { node }),
    ]
}

proptest! {
    #[test]
    fn the_ledger_forgets_everything_within_a_report_interval(ops in prop::collection::vec(op(), 0..80)) {
        let mut now = Instant::now();
        let mut costs = CostModel::new(Priors::default());
        let mut ids = Vec::new();
        let name = |node: u8| NodeId::new(format!("node-{node}"));
        for op in ops {
            now += Duration::from_millis(5);
            match op {
                Op::Place { prefill, decode, tokens } => {
                    ids.push(costs.place(placed(name(prefill).as_str(), tokens, name(decode).as_str()), now));
                }
                Op::Report { node } => costs.report(&name(node), report(0), now),
                Op::Prefilled { nth } if !ids.is_empty() => costs.prefilled(ids[nth % ids.len()]),
                Op::Ended { nth } if !ids.is_empty() => costs.ended(ids[nth % ids.len()]),
                Op::Forget { node } => costs.forget(&name(node)),
                Op::Prefilled { .. } | Op::Ended { .. } => {}
            }
        }
        now += REPORT_LAG;
        for node in 0..3 {
            costs.report(&name(node), report(0), now);
        }
        prop_assert!(costs.ledger.is_empty());
        for node in 0..3 {
            prop_assert_eq!(pressure(&costs, name(node).as_str()).queued_prefill_tokens, 0);
        }
    }
}

#[test]
fn an_idle_nodes_step_is_that_of_an_empty_batch() {
    let now = Instant::now();
    let mut costs = CostModel::new(Priors::default());
    let mut report = |node: &str, running_sequences, decode_step_ms| {
        let report = LoadReport {
            running_sequences,
            decode_step_ms,
            ..report(0)
        };
        costs.report(&node.into(), report, now);
    };
    // What it reports once it is idle is of the batch that it had.
    for (running, step) in [(1, 30.0), (10, 57.0), (30, 117.0), (0, 117.0)] {
        for _ in 0..50 {
            report("a", running, step);
        }
    }
    for node in ["a", "another one"] {
        let step = costs.rates(&node.into()).step.of(1.0).0;
        assert!((step - 30.0).abs() < 1.0, "{node}: {step}");
    }
}
