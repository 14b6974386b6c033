#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::cost::{CostModel, Priors};

const MIB: u64 = 1 << 20;

fn foretold(new_tokens: u64, compute_ms: f64) -> Foretold {
    let none = Millis(0.0);
    Foretold {
        prefill: Some("p".into()),
        decode: "d".into(),
        source: None,
        new_tokens,
        prompt_tokens: new_tokens,
        prediction: Prediction::of(none, none, none, Millis(compute_ms), none),
        pace: 1.0,
    }
}

fn moved(bytes: u64, ms: f64) -> Moved {
    Moved {
        bytes,
        took: Millis(ms),
    }
}

fn link_ms(learned: &Learned, from: &str, to: &str, bytes: u64, ends: f64) -> f64 {
    let inbound = learned.inbound(&to.into());
    inbound.map_or(ends, |links| links.transfer(&from.into(), bytes, Millis(ends)).0)
}

#[test]
fn a_link_becomes_what_it_was_measured_to_be_and_others_stay_as_their_ends() {
    let mut learned = Learned::default();
    for _ in 0..200 {
        // By its ends 1 MiB takes a millisecond; it takes two.
        learned.moved(&"a".into(), &"b".into(), moved(8 * MIB, 16.0), Millis(8.0));
    }
    let known = link_ms(&learned, "a", "b", MIB, 1.0);
    assert!((1.9..=2.0).contains(&known), "{known}");
    assert_eq!(link_ms(&learned, "b", "a", MIB, 1.0), 1.0);
    assert_eq!(link_ms(&learned, "c", "b", MIB, 1.0), 1.0);
}

#[test]
fn one_stalled_transfer_counts_as_four_times_what_was_expected() {
    let mut learned = Learned::default();
    learned.moved(&"a".into(), &"b".into(), moved(4 * MIB, 60_000.0), Millis(4.0));
    let known = link_ms(&learned, "a", "b", MIB, 1.0);
    assert!((known - 2.5).abs() < 1e-9, "{known}");
}

#[test]
fn a_pace_follows_long_prompts_and_hardly_short_ones() {
    let mut learned = Learned::default();
    let node: NodeId = "p".into();
    for _ in 0..20 {
        learned.computed(&node, &foretold(8, 10.0), Millis(15.0));
    }
    assert!(learned.pace(&node) < 1.01, "{}", learned.pace(&node));
    for _ in 0..200 {
        learned.computed(&node, &foretold(4096, 10.0), Millis(15.0));
    }
    assert!(
        (learned.pace(&node) - 1.5).abs() < 0.01,
        "{}",
        learned.pace(&node)
    );
    assert_eq!(learned.pace(&"other".into()), 1.0);
}

#[test]
fn a_pace_in_the_prediction_is_not_learnt_twice() {
    let mut learned = Learned::default();
    let node: NodeId = "p".into();
    for _ in 0..500 {
        let pace = learned.pace(&node);
        let foretold = Foretold {
            pace,
            ..foretold(4096, 10.0 * pace)
        };
        learned.computed(&node, &foretold, Millis(13.0));
    }
    assert!(
        (learned.pace(&node) - 1.3).abs() < 0.01,
        "{}",
        learned.pace(&node)
    );
}

#[test]
fn the_cost_model_learns_what_a_handoff_costs_where_nothing_else_is_waited_for() {
    let mut costs = CostModel::new(Priors::default());
    assert_eq!(costs.handoff_fixed(), Millis(2.0));
    let idle = foretold(1024, 100.0);
    let queued = Foretold {
        prediction: Prediction {
            queue: Millis(50.0),
            ..idle.prediction
        },
        ..idle.clone()
    };
    let measured = Measured {
        compute: Millis(100.0),
        exposed: Millis(1.0),
        ttft: Millis(107.0),
        ..Measured::default()
    };
    for _ in 0..400 {
        costs.completed(
            &queued,
            &Measured {
                ttft: Millis(400.0),
                ..measured
            },
        );
    }
    assert_eq!(costs.handoff_fixed(), Millis(2.0));
    for _ in 0..400 {
        costs.completed(&idle, &measured);
    }
    let fixed = costs.handoff_fixed().0;
    assert!((fixed - 6.0).abs() < 0.1, "{fixed}");
}

#[test]
fn a_prefix_that_was_gone_teaches_nothing_of_the_node() {
    let mut costs = CostModel::new(Priors::default());
    let hoped = Foretold {
        new_tokens: 1_000,
        ..foretold(2_000, 100.0)
    };
    // All was computed, and took twice as long.
    let measured = Measured {
        compute: Millis(200.0),
        ttft: Millis(210.0),
        ..Measured::default()
    };
    costs.completed(
        &Foretold {
            prompt_tokens: 2_000,
            ..hoped
        },
        &measured,
    );
    assert_eq!(costs.pace(&"p".into()), 1.0);
    assert_eq!(costs.handoff_fixed(), Millis(2.0));
}

#[test]
fn a_node_that_left_is_forgotten_at_both_ends() {
    let mut learned = Learned::default();
    for (from, to) in [("a", "b"), ("b", "a"), ("c", "b")] {
        learned.moved(&from.into(), &to.into(), moved(MIB, 9.0), Millis(1.0));
    }
    learned.computed(&"b".into(), &foretold(4096, 10.0), Millis(15.0));
    learned.forget(&"b".into());
    assert_eq!(learned.links_known, 0);
    assert_eq!(learned.pace(&"b".into()), 1.0);
}

proptest! {
    #[test]
    fn nothing_that_nodes_say_makes_a_prediction_infinite_or_negative(
        said in proptest::collection::vec((any::<u64>(), any::<f64>(), any::<f64>(), any::<f64>()), 0..60),
    ) {
        let mut costs = CostModel::new(Priors::default());
        for (bytes, ms, compute, ttft) in said {
            let measured = Measured {
                fetch: moved(bytes, ms),
                handoff: moved(bytes, compute),
                compute: Millis(compute),
                exposed: Millis(ms),
                ttft: Millis(ttft),
                ..Measured::default()
            };
            let foretold = Foretold { source: Some("s".into()), ..foretold(4096, 10.0) };
            costs.completed(&foretold, &measured);
        }
        for (from, to) in [("p", "d"), ("s", "p")] {
            let ms = costs.inbound(&to.into()).map_or(1.0, |links| links.transfer(&from.into(), MIB, Millis(1.0)).0);
            prop_assert!(ms.is_finite() && ms > 0.0, "{ms}");
        }
        let (pace, fixed) = (costs.pace(&"p".into()), costs.handoff_fixed().0);
        prop_assert!((PACE_MIN..=1.0 / PACE_MIN).contains(&pace), "{pace}");
        prop_assert!(fixed.is_finite() && fixed >= 0.0, "{fixed}");
    }
}
