use super::*;
use crate::workload::{Synthetic, Workload};

#[test]
fn a_sweep_names_every_split_of_its_nodes() {
    let sweep = Sweep {
        nodes: 4,
        pool_tokens: vec![1_000_000, 3_000_000],
        attainment: 0.9,
    };
    let points = sweep.points();
    assert_eq!(points.len(), 6);
    assert!(
        points
            .iter()
            .all(|point| point.prefill_nodes + point.decode_nodes == 4 && point.decode_nodes > 0)
    );
}

#[test]
fn more_nodes_sustain_more_and_what_is_sustained_meets_the_limits() {
    let profile = Profile::parse(Profile::built_in("llama-3-70b-8xa800").expect("built in")).expect("valid");
    let scenario = Scenario {
        workload: Workload {
            requests: 150,
            synthetic: Synthetic::default(),
            ..Workload::default()
        },
        ..Scenario::default()
    };
    let sustained = |prefill_nodes: usize| {
        let point = Point {
            prefill_nodes,
            decode_nodes: 2,
            pool_tokens: 1_000_000,
        };
        sustained(&scenario, &profile, None, point, 0.9)
    };
    let (one, three) = (sustained(1), sustained(3));
    for each in [&one, &three] {
        assert!(each.report.attainment >= 0.9, "{each:?}");
    }
    let speed = |of: &Sustained| of.speed.expect("some speed is sustained");
    assert!(speed(&three) > 1.5 * speed(&one), "{one:?}, {three:?}");
}
