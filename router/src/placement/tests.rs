use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::cost::{Priors, StepTime};
use crate::lengths::Lengths;
use crate::policy::{Perigee, PolicyName};
use crate::residents::Residents;

const SHAPE: KvShape = KvShape {
    block_tokens: 32,
    token_bytes: 23_040,
    layers: 30,
};

fn rates() -> Rates {
    Rates {
        prefill_ms_per_token: 2.0,
        prefill_ms_per_token_kilocontext: 0.5,
        step: StepTime::assumed(10.0),
        transfer_bytes_per_ms: 1e6,
        disk_bytes_per_ms: 1e6,
    }
}

fn node(name: &str, role: Role) -> NodeView {
    NodeView {
        id: name.into(),
        role,
        reachable: true,
        readable: true,
        draining: false,
        cordoned: false,
        context_tokens_max: 8192,
        rates: rates(),
        pressure: Pressure {
            available_blocks: 1000,
            ..Pressure::default()
        },
        context_factor: 1.0,
    }
}

/// Two prefill and two decode nodes, idle.
fn cluster() -> Vec<NodeView> {
    vec![
        node("p0", Role::Prefill),
        node("p1", Role::Prefill),
        node("d0", Role::Decode),
        node("d1", Role::Decode),
    ]
}

/// A request with everything else at its defaults.
#[derive(Default)]
struct Case {
    prompt_tokens: u64,
    matches: Vec<(&'static str, usize)>,
    /// Holders have no more blocks than these in memory, and the rest on disk.
    in_memory_max: Option<usize>,
    excluded: Vec<&'static str>,
    slo: Slo,
    key: u8,
    settings: Settings,
}

impl Case {
    fn of(prompt_tokens: u64) -> Self {
        Self {
            prompt_tokens,
            ..Self::default()
        }
    }

    fn place(&self, nodes: &[NodeView], policy: &mut dyn Policy) -> Result<Explanation, NoPlacement> {
        let holder = |(node, blocks): &(&'static str, usize)| (NodeId::from(*node), *blocks);
        let held: Vec<_> = self.matches.iter().map(holder).collect();
        let matches: Vec<Match<'_>> = held
            .iter()
            .map(|(node, blocks)| Match {
                node,
                blocks: *blocks,
                in_memory: (*blocks).min(self.in_memory_max.unwrap_or(usize::MAX)),
            })
            .collect();
        let excluded = self.excluded.iter().map(|name| NodeId::from(*name)).collect();
        let problem = Problem {
            key: BlockHash([self.key; 16]),
            prompt_tokens: self.prompt_tokens,
            matches: &matches,
            nodes,
            excluded: &excluded,
            shape: SHAPE,
            slo: self.slo,
            draw: u64::from(self.key),
            outlook: Outlook {
                residents: &Residents::default(),
                lengths: &Lengths::default(),
                now: Instant::now(),
            },
            costs: &CostModel::new(Priors::default()),
            settings: &self.settings,
        };
        place(&problem, policy)
    }

    fn choice(&self, nodes: &[NodeView]) -> Candidate {
        let explanation = self.place(nodes, &mut Perigee).expect("nodes are free");
        explanation.choice().clone()
    }
}

fn names(choice: &Candidate) -> (Option<&str>, &str) {
    (
        choice.prefill.as_ref().map(NodeId::as_str),
        choice.decode.as_str(),
    )
}

#[test]
fn a_long_new_prompt_goes_to_an_idle_prefill_node() {
    for tokens in [257, 1000, 8000] {
        let choice = Case::of(tokens).choice(&cluster());
        assert!(choice.prefill.is_some(), "{tokens} tokens: {choice:?}");
        assert_eq!(choice.objection, None);
    }
}

#[test]
fn a_short_extension_is_prefilled_where_it_decodes() {
    let mut case = Case::of(40 * 32 + 100);
    case.matches = vec![("d1", 40)];
    let choice = case.choice(&cluster());
    assert_eq!(names(&choice), (None, "d1"));
    assert_eq!(choice.new_tokens, 100);
    assert!(choice.sources.is_empty());
}

#[test]
fn running_decodes_push_even_a_short_prompt_to_a_prefill_node() {
    let mut nodes = cluster();
    for decode in &mut nodes[2..] {
        decode.pressure.running_sequences = 8;
    }
    let choice = Case::of(200).choice(&nodes);
    assert!(choice.prefill.is_some(), "{choice:?}");
}

#[test]
fn a_decode_node_prefills_any_prompt_that_leaves_its_gaps_within_the_limit() {
    let mut nodes = cluster();
    for prefill in &mut nodes[..2] {
        prefill.pressure.queued_prefill_tokens = 100_000;
    }
    nodes[2].pressure.running_sequences = 8;
    nodes[3].pressure.running_sequences = 9;
    let limited = |tbt: f64| Case {
        slo: Slo {
            ttft: None,
            tbt: Some(Millis(tbt)),
        },
        ..Case::of(2000)
    };
    // A chunk of 256 tokens takes some hundred milliseconds and more.
    assert!(names(&limited(10_000.0).choice(&nodes)).0.is_none());
    assert!(names(&limited(50.0).choice(&nodes)).0.is_some());
    let mut never = limited(10_000.0);
    never.settings.local_prefill_tokens_max = 0;
    assert!(names(&never.choice(&nodes)).0.is_some());
    // Without a limit nobody knows what running sequences may wait.
    assert!(names(&Case::of(2000).choice(&nodes)).0.is_some());
}

#[test]
fn what_queues_takes_as_long_as_its_context_makes_it() {
    let mut nodes = cluster();
    nodes[0].pressure.queued_prefill_tokens = 1000;
    nodes[1].pressure.queued_prefill_tokens = 1000;
    nodes[0].context_factor = 3.0;
    let explanation = Case::of(2000)
        .place(&nodes, &mut Perigee)
        .expect("nodes are free");
    let queue = |prefill: &str| {
        let of = |one: &&Candidate| one.prefill.as_ref().is_some_and(|id| id.as_str() == prefill);
        let found = explanation.candidates.iter().find(of);
        found.expect("every pair is a candidate").prediction.queue.0
    };
    assert!((queue("p0") - 3.0 * queue("p1")).abs() < 1e-9);
}

#[test]
fn without_prefill_nodes_a_decode_node_prefills_anything() {
    let choice = Case::of(8000).choice(&cluster()[2..]);
    assert_eq!(choice.prefill, None);
    assert_eq!(choice.objection, None);
}

#[test]
fn a_prefix_is_fetched_where_that_beats_computing_it() {
    let mut case = Case::of(2000);
    case.matches = vec![("d0", 40), ("p1", 10)];
    let mut nodes = cluster();
    // Busy, so that its prefix is wanted elsewhere.
    nodes[2].pressure.running_sequences = 200;
    let choice = case.choice(&nodes);
    assert_eq!(choice.new_tokens, 2000 - 40 * 32);
    assert_eq!(choice.sources[0].node, "d0".into());
    assert!(choice.prediction.fetch > Millis(0.0));

    // Over a wire this slow, recomputing is quicker, and a placement says so by naming no source.
    for node in &mut nodes {
        node.rates.transfer_bytes_per_ms = 1_000.0;
    }
    nodes[2].draining = true;
    case.matches = vec![("d0", 40)];
    let choice = case.choice(&nodes);
    assert!(choice.sources.is_empty(), "{choice:?}");
    assert_eq!(choice.new_tokens, 2000);
}

#[test]
fn a_prefix_on_disk_costs_its_reading() {
    let mut case = Case::of(2000);
    case.matches = vec![("p0", 40), ("p1", 40)];
    let mut nodes = cluster();
    let fast = case.choice(&nodes);
    assert_eq!(fast.prediction.promote, Millis(0.0));

    // 30 blocks of 32 tokens of 23,040 bytes each, at 10,000 bytes per millisecond.
    case.in_memory_max = Some(10);
    for node in &mut nodes {
        node.rates.disk_bytes_per_ms = 10_000.0;
    }
    let slow = case.choice(&nodes);
    assert_eq!(slow.prediction.promote, Millis(30.0 * 32.0 * 23_040.0 / 10_000.0));
    assert_eq!(slow.prediction.fetch, Millis(0.0), "both hold the same");
    let longer = slow.prediction.total.0 - fast.prediction.total.0;
    assert!((longer - slow.prediction.promote.0).abs() < 1e-6, "{longer}");

    // A peer's disk is waited for like one's own, and only for what the engine lacks.
    case.matches = vec![("d0", 40), ("p0", 20), ("p1", 20)];
    case.in_memory_max = Some(20);
    for node in &mut nodes {
        node.rates.disk_bytes_per_ms = 1e6;
    }
    let peer = case.choice(&nodes);
    assert_eq!(peer.sources[0].node, "d0".into());
    assert_eq!(peer.prediction.promote, Millis(20.0 * 32.0 * 23_040.0 / 1e6));
}

#[test]
fn a_queue_at_one_prefill_node_sends_the_next_request_to_the_other() {
    let mut nodes = cluster();
    for key in 0..8 {
        let mut case = Case::of(1000);
        case.key = key;
        nodes[0].pressure.queued_prefill_tokens = 500;
        nodes[1].pressure.queued_prefill_tokens = 0;
        assert_eq!(names(&case.choice(&nodes)).0, Some("p1"));
    }
}

#[test]
fn a_fully_cached_prompt_still_computes_its_last_token() {
    let mut case = Case::of(64);
    case.matches = vec![("d0", 2)];
    let choice = case.choice(&cluster());
    assert_eq!((choice.new_tokens, choice.decode_blocks), (1, 0));
}

#[test]
fn the_first_token_limit_outranks_the_score() {
    let mut nodes = cluster();
    nodes[3].pressure.available_blocks = 0;
    let choice = Case::of(1000).choice(&nodes);
    assert_eq!(choice.decode, "d0".into());

    let mut case = Case::of(1000);
    case.slo.ttft = Some(Millis(1.0));
    let choice = case.choice(&nodes);
    assert_eq!(choice.objection, Some(Objection::MissesTtft));
}

#[test]
fn a_limit_on_gaps_keeps_a_request_off_a_crowded_decode_node() {
    let mut nodes = cluster();
    nodes[2].rates.step = StepTime::assumed(60.0);
    let mut case = Case::of(1000);
    // It holds the prefix, but is too slow for this request.
    case.matches = vec![("d0", 31)];
    case.slo.tbt = Some(Millis(50.0));
    assert_eq!(case.choice(&nodes).decode, "d1".into());
}

#[test]
fn failed_draining_and_unreachable_nodes_are_in_no_candidate() {
    let mut nodes = cluster();
    nodes[0].draining = true;
    nodes[1].reachable = false;
    let mut case = Case::of(1000);
    case.excluded = vec!["d0"];
    let explanation = case.place(&nodes, &mut Perigee).expect("d1 is free");
    assert_eq!(names(explanation.choice()), (None, "d1"));
    assert_eq!(
        explanation.excluded,
        vec![
            ("p0".into(), Exclusion::Draining),
            ("p1".into(), Exclusion::Unreachable),
            ("d0".into(), Exclusion::FailedBefore),
        ]
    );
    case.excluded.push("d1");
    let error = case.place(&nodes, &mut Perigee).expect_err("nobody is left");
    assert!(error.to_string().contains("d1 failed this request"), "{error}");
}

#[test]
fn nothing_is_placed_on_a_cordoned_node_which_is_read_from_all_the_same() {
    let mut nodes = cluster();
    nodes[2].cordoned = true;
    let mut case = Case::of(2000);
    case.matches = vec![("d0", 40)];
    let explanation = case.place(&nodes, &mut Perigee).expect("d1 is free");
    let choice = explanation.choice();
    assert_eq!(
        (choice.decode.as_str(), choice.sources[0].node.as_str()),
        ("d1", "d0")
    );
    assert_eq!(explanation.excluded, vec![("d0".into(), Exclusion::Cordoned)]);
}

#[test]
fn a_node_whose_log_is_not_followed_is_no_source() {
    let mut nodes = cluster();
    nodes[2].readable = false;
    nodes[2].draining = true;
    let mut case = Case::of(2000);
    case.matches = vec![("d0", 40)];
    assert!(case.choice(&nodes).sources.is_empty());
}

#[test]
fn round_robin_serves_the_second_turn_on_other_nodes_and_fetches_the_prefix() {
    let nodes = cluster();
    let mut policy = PolicyName::RoundRobin.build();
    let first = Case::of(64).place(&nodes, policy.as_mut()).expect("free");
    let first = first.choice().clone();
    let mut case = Case::of(200);
    case.matches = vec![("d0", 2), ("p0", 2)];
    let second = case.place(&nodes, policy.as_mut()).expect("free");
    let second = second.choice();
    assert_eq!(
        (names(&first), names(second)),
        ((Some("p0"), "d0"), (Some("p1"), "d1"))
    );
    assert_eq!(second.sources.len(), 2);
    assert_eq!(second.new_tokens, 200 - 64);
}

/// The prefill node of a request of which `p0` holds 40 blocks and `p1` 10, where `p0` has a queue of so many tokens.
fn prefill_of(name: PolicyName, queued_prefill_tokens: u64) -> (String, usize, u64) {
    let mut nodes = cluster();
    nodes[0].pressure.queued_prefill_tokens = queued_prefill_tokens;
    let mut case = Case::of(60 * 32);
    case.matches = vec![("p0", 40), ("p1", 10)];
    let placed = case.place(&nodes, name.build().as_mut()).expect("free");
    let choice = placed.choice();
    let prefill = choice.prefill.as_ref().expect("a node for prefill is there");
    (prefill.to_string(), choice.sources.len(), choice.new_tokens)
}

#[test]
fn the_policies_of_the_paper_differ_in_what_they_make_of_load_and_prefixes() {
    use PolicyName::{Dynamo, KvCentric, LeastLoaded, LocalCacheAware};
    let at = |node: &str, sources, new_blocks: u64| (node.to_owned(), sources, new_blocks * 32);
    for idle in [KvCentric, LocalCacheAware, Dynamo] {
        assert_eq!(
            prefill_of(idle, 0),
            at("p0", 0, 20),
            "{idle:?} goes where the prefix is"
        );
    }
    // Busier than the prefix is worth.
    for queued in [40 * 32, 100_000] {
        assert_eq!(
            prefill_of(KvCentric, queued),
            at("p1", 1, 20),
            "fetched, and so spread"
        );
        assert_eq!(prefill_of(LocalCacheAware, queued), at("p1", 0, 50));
        assert_eq!(prefill_of(Dynamo, queued), at("p1", 0, 50));
    }
    assert_eq!(prefill_of(LeastLoaded, 1), at("p1", 0, 50), "whatever it holds");
}

#[test]
fn a_prefix_that_is_not_much_longer_is_not_fetched_by_the_policy_of_the_paper() {
    let mut nodes = cluster();
    nodes[0].pressure.queued_prefill_tokens = 100_000;
    for (own, fetched) in [(10, true), (35, false)] {
        let mut case = Case::of(60 * 32);
        case.matches = vec![("p0", 40), ("p1", own)];
        let placed = case.place(&nodes, PolicyName::KvCentric.build().as_mut());
        assert_eq!(
            !placed.expect("free").choice().sources.is_empty(),
            fetched,
            "{own} blocks"
        );
    }
}

#[test]
fn dynamo_decodes_where_most_blocks_are_free() {
    let mut nodes = cluster();
    nodes[2].pressure.available_blocks = 500;
    let placed = Case::of(1000).place(&nodes, PolicyName::Dynamo.build().as_mut());
    assert_eq!(placed.expect("free").choice().decode.as_str(), "d1");
}

#[test]
fn equal_requests_meet_and_different_ones_spread() {
    let nodes = cluster();
    let chosen = |key: u8| {
        let mut case = Case::of(1000);
        case.key = key;
        let choice = case.choice(&nodes);
        (choice.prefill, choice.decode)
    };
    assert_eq!(chosen(3), chosen(3));
    let distinct: BTreeSet<_> = (0..64).map(chosen).collect();
    assert_eq!(distinct.len(), 4);
}

fn random_node(number: usize) -> impl Strategy<Value = NodeView> {
    let role = prop_oneof![
        2 => Just(Role::Prefill),
        2 => Just(Role::Decode),
        1 => Just(Role::Store),
    ];
    (
        role,
        any::<[bool; 3]>(),
        1.0f64..20.0,
        0u64..2000,
        0u64..32,
        0u64..200,
    )
        .prop_map(
            move |(role, [up, log, drain], rate, queued, running, available)| NodeView {
                reachable: up || log,
                readable: log,
                draining: drain && up,
                rates: Rates {
                    prefill_ms_per_token: rate,
                    step: StepTime::assumed(rate * 3.0),
                    ..rates()
                },
                pressure: Pressure {
                    queued_prefill_tokens: queued,
                    running_sequences: running,
                    placed_sequences: running / 4,
                    available_blocks: available,
                },
                ..node(&format!("n{number:02}"), role)
            },
        )
}

fn random_cluster() -> impl Strategy<Value = Vec<NodeView>> {
    (0usize..12).prop_flat_map(|count| (0..count).map(random_node).collect::<Vec<_>>())
}

proptest! {
    #[test]
    fn every_policy_picks_a_live_eligible_candidate(
        nodes in random_cluster(),
        prompt_tokens in 1u64..6000,
        key: u8,
        name in prop::sample::select(PolicyName::ALL.to_vec()),
    ) {
        let mut case = Case::of(prompt_tokens);
        case.key = key;
        case.matches = vec![("n00", 3), ("n01", 50), ("n05", 1)];
        case.matches.retain(|(_, blocks)| (*blocks as u64) * 32 <= prompt_tokens);
        let live = |node: &&NodeView| node.reachable && !node.draining;
        let decodes = nodes.iter().filter(live).filter(|node| node.role == Role::Decode).count();
        let prefills = nodes.iter().filter(live).filter(|node| node.role == Role::Prefill).count();
        match case.place(&nodes, name.build().as_mut()) {
            Err(_) => prop_assert_eq!(decodes, 0),
            Ok(explanation) => {
                prop_assert_eq!(explanation.candidates.len(), decodes * (prefills + 1));
                let choice = explanation.choice();
                prop_assert!(choice.eligible());
                let find = |id: &NodeId| nodes.iter().find(|node| node.id == *id).expect("known");
                prop_assert!(live(&find(&choice.decode)));
                prop_assert!(choice.prefill.as_ref().is_none_or(|id| live(&find(id))));
                prop_assert!(choice.sources.iter().all(|source| find(&source.node).readable));
                let terms = choice.prediction;
                let sum = terms.queue + terms.fetch + terms.compute + terms.handoff;
                prop_assert!((terms.total.0 - sum.0).abs() < 1e-9 && terms.total.0.is_finite());
                prop_assert!((1..=prompt_tokens).contains(&choice.new_tokens));
            }
        }
    }

    #[test]
    fn the_choice_is_never_beaten_by_more_than_the_tie(nodes in random_cluster(), prompt_tokens in 1u64..6000) {
        if let Ok(explanation) = Case::of(prompt_tokens).place(&nodes, &mut Perigee) {
            let choice = explanation.choice();
            for other in explanation.candidates.iter().filter(|other| other.eligible()) {
                prop_assert!(other.objection >= choice.objection);
                if other.objection == choice.objection {
                    prop_assert!(choice.score.0 <= other.score.0 + Settings::default().tie.0);
                }
            }
        }
    }

    #[test]
    fn a_lost_node_moves_only_the_requests_it_had(key: u8, lost in 0usize..8) {
        let mut nodes: Vec<NodeView> = (0..4).map(|n| node(&format!("p{n}"), Role::Prefill)).collect();
        nodes.extend((0..4).map(|n| node(&format!("d{n}"), Role::Decode)));
        let mut case = Case::of(1000);
        case.key = key;
        let before = case.choice(&nodes);
        let lost = nodes.remove(lost).id;
        let after = case.choice(&nodes);
        if before.decode != lost && before.prefill.as_ref() != Some(&lost) {
            prop_assert_eq!(names(&before), names(&after));
        }
    }
}
