use super::*;
use crate::profile::Profile;
use crate::report::Report;
use crate::scenario::Scenario;
use crate::sweep;

fn report(reference: Reference) -> Report {
    let profile = Profile::parse(Profile::built_in("llama-3-70b-8xa800").expect("built in")).expect("valid");
    let mut scenario = Scenario {
        reference: Some(reference),
        ..Scenario::default()
    };
    scenario.cluster.prefill_nodes = 3;
    scenario.cluster.decode_nodes = 3;
    scenario.workload.requests = 600;
    scenario.workload.synthetic.rate_per_s = 2.0;
    sweep::report(&scenario, &profile, None)
}

#[test]
fn algorithm_1_fetches_where_the_best_holder_has_much_more() {
    assert!(Reference::KvCentric.fetches(0, 1) && Reference::KvCentric.fetches(10, 14));
    assert!(!Reference::KvCentric.fetches(10, 12) && !Reference::KvCentric.fetches(0, 0));
    assert!(!Reference::Dynamo.fetches(0, 100));
}

#[test]
fn schedulers_rank_as_in_the_paper() {
    let each = [
        Reference::KvCentric,
        Reference::LocalCacheAware,
        Reference::LeastLoaded,
        Reference::Random,
    ];
    let reports = each.map(report);
    let means = reports.each_ref().map(|report| report.ttft_ms.mean);
    assert!(means.is_sorted(), "{means:?}");
    assert!(reports[0].fetched_ratio > 0.0, "{:?}", reports[0]);
    assert!(reports[1..].iter().all(|report| report.fetched_ratio == 0.0));
}
