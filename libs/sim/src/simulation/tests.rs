use router::policy::PolicyName;

use super::*;
use crate::report::Report;
use crate::scenario::{Failure, Limits, Shape};
use crate::trace;
use crate::workload::{Kind as Prompts, Synthetic, Workload};

fn profile() -> Profile {
    Profile::parse(Profile::built_in("llama-3-70b-8xa800").expect("built in")).expect("valid")
}

fn scenario(policy: PolicyName, prompts: Prompts, requests: usize, rate_per_s: f64) -> Scenario {
    Scenario {
        seed: 11,
        cluster: Shape {
            prefill_nodes: 3,
            decode_nodes: 3,
            prefill_pool_tokens: 500_000,
            ..Shape::default()
        },
        router: router::Config {
            policy,
            ..router::Config::default()
        },
        workload: Workload {
            synthetic: Synthetic {
                kind: prompts,
                rate_per_s,
                ..Synthetic::default()
            },
            requests,
            ..Workload::default()
        },
        ..Scenario::default()
    }
}

fn simulate(scenario: &Scenario) -> (Vec<Request>, Outcomes) {
    let profile = profile();
    scenario.validate(&profile).expect("valid");
    let requests = scenario.workload.requests(None, scenario.seed);
    let outcomes = run(scenario, &profile, &requests);
    (requests, outcomes)
}

fn report(scenario: &Scenario) -> Report {
    let (requests, outcomes) = simulate(scenario);
    Report::of(scenario, &requests, outcomes)
}

fn served(outcomes: &Outcomes) -> Vec<&Served> {
    let each = outcomes.requests.iter().map(|outcome| match outcome {
        Outcome::Served(served) => served,
        Outcome::Rejected | Outcome::Failed => panic!("all are served: {outcome:?}"),
    });
    each.collect()
}

fn request(at_s: f64, blocks: std::ops::Range<u64>, rest: u64, output_tokens: u64) -> Request {
    let chain: Vec<_> = blocks.map(trace::hash).collect();
    Request {
        at: Duration::from_secs_f64(at_s),
        key: chain.first().copied().unwrap_or_default(),
        prompt_tokens: chain.len() as u64 * 512 + rest,
        chain,
        output_tokens,
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_one_gives_others() {
    for policy in [PolicyName::Perigee, PolicyName::Random] {
        let scenario = Scenario {
            failures: vec![Failure {
                node: "prefill-1".to_owned(),
                at_s: 20.0,
                for_s: 20.0,
            }],
            ..scenario(policy, Prompts::Conversations, 400, 3.0)
        };
        let text = |scenario: &Scenario| serde_json::to_string(&report(scenario)).expect("data");
        assert_eq!(text(&scenario), text(&scenario));
        let other = Scenario {
            seed: 12,
            ..scenario.clone()
        };
        assert_ne!(text(&scenario), text(&other));
    }
}

#[test]
fn a_lone_request_takes_what_the_profile_says_and_the_router_predicts() {
    let scenario = scenario(PolicyName::Perigee, Prompts::Documents, 1, 1.0);
    let profile = profile();
    // The first ones teach how fast links are.
    let warm = (0..6).map(|index| request(index as f64 * 10.0, 1000 + 8 * index..1008 + 8 * index, 0, 2));
    let requests: Vec<_> = warm.chain([request(100.0, 0..20, 100, 11)]).collect();
    let outcomes = run(&scenario, &profile, &requests);
    let one = served(&outcomes)[6];
    let compute_ms = profile.prefill_ms(20 * 512 + 100, 0);
    assert!((one.compute_ms - compute_ms).abs() < 1e-3, "{one:?}");
    // The last layer of 40 blocks' worth of KV, and the fixed cost of a handoff.
    assert!((one.ttft_ms - compute_ms - 2.0).abs() < 2.0, "{one:?}");
    assert!((one.ttft_ms - one.ttft_predicted_ms).abs() < 20.0, "{one:?}");
    let gaps_ms = &outcomes.gaps_ms[outcomes.gaps_ms.len() - 10..];
    let step_ms = profile.step_ms(1, 20 * 512 + 101);
    assert!((f64::from(gaps_ms[0]) - step_ms).abs() < 0.01);
}

#[test]
fn a_prefix_is_found_where_it_was_left_and_fetched_from_there() {
    let scenario = scenario(PolicyName::RoundRobin, Prompts::Documents, 1, 1.0);
    let requests = [
        request(0.0, 0..20, 5, 2),
        // Another node in turn: it fetches.
        request(20.0, 0..30, 0, 2),
    ];
    let outcomes = run(&scenario, &profile(), &requests);
    let each = served(&outcomes);
    assert_ne!(each[0].prefill, each[1].prefill);
    assert_eq!(each[0].cached_tokens, 0);
    assert_eq!(
        (each[1].cached_tokens, each[1].fetched_tokens),
        (20 * 512, 20 * 512)
    );
    let compute_ms = profile().prefill_ms(30 * 512, 20 * 512);
    assert!((each[1].compute_ms - compute_ms).abs() < 1e-3);
}

#[test]
fn prompts_queue_and_sequences_share_steps() {
    let mut scenario = scenario(PolicyName::RoundRobin, Prompts::Documents, 1, 1.0);
    scenario.cluster.prefill_nodes = 1;
    scenario.cluster.decode_nodes = 1;
    let requests = [request(0.0, 0..16, 0, 400), request(0.0, 100..116, 0, 400)];
    let outcomes = run(&scenario, &profile(), &requests);
    let each = served(&outcomes);
    let alone_ms = profile().prefill_ms(16 * 512, 0);
    assert!((each[0].ttft_ms - alone_ms).abs() < 5.0);
    assert!((each[1].ttft_ms - 2.0 * alone_ms).abs() < 5.0);
    let together_ms = profile().step_ms(2, 2 * 16 * 512);
    assert!(each[0].tbt_tail_ms >= together_ms, "{each:?}");
}

#[test]
fn without_prefill_nodes_decode_nodes_prefill_by_themselves() {
    let mut scenario = scenario(PolicyName::Perigee, Prompts::Conversations, 100, 1.0);
    scenario.cluster.prefill_nodes = 0;
    let (requests, outcomes) = simulate(&scenario);
    let each = served(&outcomes);
    assert!(each.iter().all(|one| one.prefill == one.decode));
    let tokens: u64 = requests.iter().map(|request| request.output_tokens - 1).sum();
    assert_eq!(outcomes.gaps_ms.len() as u64, tokens);
}

#[test]
fn every_request_ends_well_though_nodes_die_and_return() {
    let failure = |node: &str, at_s: f64| Failure {
        node: node.to_owned(),
        at_s,
        for_s: 15.0,
    };
    for policy in [PolicyName::Perigee, PolicyName::RoundRobin] {
        let scenario = Scenario {
            failures: vec![failure("prefill-0", 20.0), failure("decode-2", 40.0)],
            ..scenario(policy, Prompts::Conversations, 300, 3.0)
        };
        let (requests, outcomes) = simulate(&scenario);
        let each = served(&outcomes);
        assert!(each.iter().any(|one| one.placements > 1), "nobody was hit");
        // No token is lost, and none comes twice.
        let gaps: u64 = requests.iter().map(|request| request.output_tokens - 1).sum();
        assert_eq!(outcomes.gaps_ms.len() as u64, gaps);
    }
}

#[test]
fn what_cannot_meet_its_limit_is_turned_away_where_it_asks_for_it() {
    let mut scenario = scenario(PolicyName::Perigee, Prompts::Documents, 300, 20.0);
    scenario.slo = Limits {
        ttft_ms: 5_000.0,
        tbt_ms: 200.0,
        asked: true,
        at_decode: false,
    };
    let asked = report(&scenario);
    assert!(asked.rejected > 0 && asked.served > 0, "{asked:?}");
    scenario.slo.asked = false;
    // Nobody is turned away for a full queue either.
    scenario.router.node_queue_max = Duration::from_secs(3_600).into();
    let not_asked = report(&scenario);
    assert_eq!(not_asked.rejected, 0);
    assert!(asked.met > not_asked.met, "{} and {}", asked.met, not_asked.met);
}

#[test]
fn a_prompt_beyond_every_context_is_rejected() {
    let scenario = scenario(PolicyName::Perigee, Prompts::Documents, 1, 1.0);
    let requests = [request(0.0, 0..1000, 0, 5)];
    let outcomes = run(&scenario, &profile(), &requests);
    assert_eq!(outcomes.requests, [Outcome::Rejected]);
}

#[test]
fn predicting_beats_chance_where_queues_form() {
    let mean = |policy| {
        report(&scenario(policy, Prompts::Conversations, 600, 1.8))
            .ttft_ms
            .mean
    };
    let (perigee, random) = (mean(PolicyName::Perigee), mean(PolicyName::Random));
    assert!(
        perigee < 0.8 * random,
        "perigee {perigee:.1} ms, random {random:.1} ms"
    );
}

#[test]
fn two_routers_find_nearly_what_one_does() {
    let hit_ratio = |routers| {
        let mut scenario = scenario(PolicyName::Perigee, Prompts::Conversations, 600, 1.5);
        scenario.cluster.routers = routers;
        report(&scenario).hit_ratio
    };
    let (one, two) = (hit_ratio(1), hit_ratio(2));
    assert!((one - two).abs() < 0.05, "one {one:.3}, two {two:.3}");
}
