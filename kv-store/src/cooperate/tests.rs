use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    blocks_per_second: 1000.0,
    run_blocks_max: 64,
    recirculations_max: 2,
    copies_max: 3,
    ramp: Duration::from_secs(60),
    confirmation_ttl: Duration::from_secs(5),
};

fn hash(number: u32) -> BlockHash {
    BlockHash(u128::from(number).to_be_bytes())
}

/// A chain of `len` blocks, of which the last `tail` are nobody else's.
fn candidate(number: u32, len: usize, tail: usize, worth: f32) -> Candidate {
    Candidate {
        path: Path {
            root: hash(0),
            hashes: (0..len as u32).map(|i| hash(number * 1000 + i + 1)).collect(),
            tail,
        },
        worth,
    }
}

fn report(peer: &str, held: &[usize], price: &[(f32, usize)]) -> Report {
    let price = price
        .iter()
        .flat_map(|(worth, blocks)| std::iter::repeat_n(*worth, *blocks));
    Report {
        peer: NodeId::new(peer),
        held: held.to_vec(),
        price: price.collect(),
    }
}

fn giver(now: Instant) -> Giver {
    Giver::new(NodeId::new("b"), LIMITS, now)
}

#[test]
fn a_duplicate_is_dropped_before_a_colder_last_copy() {
    let now = Instant::now();
    let candidates = [candidate(1, 4, 4, -100.0), candidate(2, 4, 3, -50.0)];
    let reports = [report("c", &[0, 4], &[])];
    let fates = giver(now).decide(&candidates, &reports, 3, now);
    let dropped = Fate::Drop {
        blocks: 3,
        why: Reason::Duplicate,
    };
    assert_eq!(fates, [Fate::Keep, dropped]);
}

#[test]
fn a_last_copy_goes_where_it_displaces_what_is_worth_least() {
    let now = Instant::now();
    let candidates = [candidate(1, 4, 4, -10.0)];
    let reports = [
        report("a", &[0], &[(-20.0, 64)]),
        report("c", &[0], &[(-90.0, 64)]),
        report("d", &[0], &[(-8.0, 64)]),
    ];
    let fates = giver(now).decide(&candidates, &reports, 4, now);
    assert_eq!(
        fates,
        [Fate::Offer {
            report: 1,
            from: 0,
            blocks: 4
        }]
    );
}

#[test]
fn what_enough_nodes_hold_is_copied_no_further_and_its_ends_go_to_those_that_hold_it() {
    let now = Instant::now();
    // Ten blocks, of which the last five are the giver's alone.
    let candidates = [candidate(1, 10, 5, -10.0)];
    let cold = |peer| report(peer, &[0], &[(-90.0, 64)]);
    let holder = |peer| report(peer, &[5], &[(-20.0, 64)]);
    let fate = |reports: &[Report]| giver(now).decide(&candidates, reports, 5, now)[0];
    let offer = |report, from| Fate::Offer {
        report,
        from,
        blocks: 5,
    };
    // With the giver two nodes hold it: one more may.
    assert_eq!(fate(&[cold("c"), report("d", &[5], &[])]), offer(0, 0));
    let none = Fate::Drop {
        blocks: 5,
        why: Reason::NoTaker,
    };
    assert_eq!(
        fate(&[cold("c"), report("d", &[5], &[]), report("e", &[5], &[])]),
        none
    );
    assert_eq!(
        fate(&[cold("c"), holder("d"), holder("e")]),
        offer(1, 5),
        "it needs no copy"
    );
    // Nothing is copied of what leaves as a whole.
    let alone = [candidate(1, 5, 5, -10.0)];
    let fates = giver(now).decide(
        &alone,
        &[cold("c"), report("d", &[1], &[]), report("e", &[1], &[])],
        5,
        now,
    );
    assert_eq!(fates, [offer(0, 0)]);
}

#[test]
fn only_what_the_taker_lacks_is_moved() {
    let now = Instant::now();
    let candidates = [candidate(1, 10, 4, -10.0)];
    let prefix_held = report("c", &[6], &[(-90.0, 64)]);
    let fates = giver(now).decide(&candidates, &[prefix_held], 4, now);
    assert_eq!(
        fates,
        [Fate::Offer {
            report: 0,
            from: 6,
            blocks: 4
        }]
    );
    // Moving the other six would make six copies for the sake of four blocks.
    let nothing_held = report("c", &[0], &[(-90.0, 64)]);
    let fates = giver(now).decide(&candidates, &[nothing_held], 4, now);
    assert_eq!(
        fates,
        [Fate::Drop {
            blocks: 4,
            why: Reason::NoTaker
        }]
    );
}

#[test]
fn equally_cold_nodes_swap_nothing() {
    let now = Instant::now();
    for (mine, theirs) in [(-10.0, -10.0), (-10.0, -12.0), (-10.0, -9.0), (5.0, 4.0)] {
        let fates = giver(now).decide(
            &[candidate(1, 2, 2, mine)],
            &[report("c", &[0], &[(theirs, 64)])],
            2,
            now,
        );
        assert_eq!(
            fates,
            [Fate::Drop {
                blocks: 2,
                why: Reason::NoTaker
            }],
            "{mine} for {theirs}"
        );
    }
}

#[test]
fn one_round_places_at_a_peer_no_more_than_its_price_covers() {
    let now = Instant::now();
    let candidates = [
        candidate(1, 3, 3, -10.0),
        candidate(2, 3, 3, -10.0),
        candidate(3, 3, 3, -10.0),
    ];
    let reports = [report("c", &[0, 0, 0], &[(-90.0, 6), (-1.0, 64)])];
    let fates = giver(now).decide(&candidates, &reports, 9, now);
    let offers = fates
        .iter()
        .filter(|fate| matches!(fate, Fate::Offer { .. }))
        .count();
    assert_eq!(offers, 2, "{fates:?}");
}

#[test]
fn a_block_that_moved_often_enough_is_dropped() {
    let now = Instant::now();
    let mut giver = giver(now);
    let candidates = [candidate(1, 1, 1, -10.0)];
    let reports = [report("c", &[0], &[(-90.0, 64)])];
    let leaf = candidates[0].path.hashes[0];
    giver.received(leaf, 0);
    assert!(matches!(
        giver.decide(&candidates, &reports, 1, now)[0],
        Fate::Offer { .. }
    ));
    giver.received(leaf, 1);
    let exhausted = Fate::Drop {
        blocks: 1,
        why: Reason::Exhausted,
    };
    assert_eq!(giver.decide(&candidates, &reports, 1, now), [exhausted]);
    giver.forget(leaf);
    assert!(matches!(
        giver.decide(&candidates, &reports, 1, now)[0],
        Fate::Offer { .. }
    ));
}

#[test]
fn two_nodes_that_ask_each_other_do_not_both_drop() {
    let now = Instant::now();
    let candidates = [candidate(1, 2, 2, -10.0)];
    let leaf = candidates[0].path.hashes[1];
    let (a, b) = (NodeId::new("a"), NodeId::new("b"));
    let mut of_a = Giver::new(a.clone(), LIMITS, now);
    let mut of_b = Giver::new(b.clone(), LIMITS, now);
    of_a.confirm(&b, &[leaf], now);
    of_b.confirm(&a, &[leaf], now);
    let kept = of_a.decide(&candidates, &[report("b", &[2], &[])], 2, now);
    let dropped = of_b.decide(&candidates, &[report("a", &[2], &[])], 2, now);
    assert_eq!(kept, [Fate::Keep]);
    assert_eq!(
        dropped,
        [Fate::Drop {
            blocks: 2,
            why: Reason::Duplicate
        }]
    );
    // The promise ends by itself.
    let later = now + LIMITS.confirmation_ttl;
    let fates = of_a.decide(&candidates, &[report("b", &[2], &[])], 2, later);
    assert_eq!(fates, dropped);
}

#[test]
fn a_burst_is_cut_to_the_rate() {
    let now = Instant::now();
    let mut giver = giver(now);
    let peers: Vec<String> = (0..20).map(|peer| format!("peer-{peer}")).collect();
    let mut given = 0;
    for round in 0..100 {
        let candidates = [candidate(round, 50, 50, -10.0)];
        let reports: Vec<Report> = peers
            .iter()
            .map(|peer| report(peer, &[0], &[(-90.0, 64)]))
            .collect();
        if let [Fate::Offer { .. }] = giver.decide(&candidates, &reports, 50, now)[..] {
            given += 50;
        }
    }
    assert_eq!(given, 1000, "what one second brings");
}

#[test]
fn no_peer_gets_more_than_twice_its_fair_share() {
    let begun = Instant::now();
    let mut giver = giver(begun);
    let mut given: BTreeMap<String, usize> = BTreeMap::new();
    for round in 0..2000 {
        let now = begun + Duration::from_millis(u64::from(round) * 100);
        let candidates = [candidate(round, 20, 20, -10.0)];
        // The newcomer is empty, all others are merely colder.
        let mut reports = vec![report("newcomer", &[0], &[(f32::NEG_INFINITY, 512)])];
        reports.extend((0..9).map(|peer| report(&format!("peer-{peer}"), &[0], &[(-20.0, 512)])));
        if let [Fate::Offer { report, .. }] = giver.decide(&candidates, &reports, 20, now)[..] {
            *given.entry(reports[report].peer.to_string()).or_default() += 20;
        }
    }
    let total: usize = given.values().sum();
    assert_eq!(total, 2000 * 20, "nothing is lost for it");
    let newcomer = given["newcomer"];
    assert!(
        newcomer > total / 10 && newcomer < total / 10 * 5 / 2,
        "{newcomer} of {total}"
    );
}

#[test]
fn a_new_node_takes_little_at_first() {
    let begun = Instant::now();
    let mut taker = Taker::new(LIMITS, begun);
    assert_eq!(taker.room(begun), 62, "a sixteenth of 1000");
    assert_eq!(taker.room(begun + Duration::from_secs(30)), 500);
    assert_eq!(taker.room(begun + Duration::from_secs(3600)), 1000);
}

#[test]
fn a_taker_takes_whole_runs_that_hang_on_something_and_are_worth_it() {
    let begun = Instant::now();
    let now = begun + LIMITS.ramp;
    let run = |blocks, worth, attached| Offered {
        blocks,
        worth,
        attached,
    };
    let price = [f32::NEG_INFINITY, f32::NEG_INFINITY, -50.0, -50.0, -50.0];
    let mut taker = Taker::new(LIMITS, begun);
    let runs = [
        run(2, -60.0, true),
        run(1, -60.0, true),
        run(2, -10.0, false),
        run(2, -10.0, true),
        run(2, -10.0, true),
    ];
    assert_eq!(taker.take(&runs, &price, now), [true, false, false, true, false]);
    assert_eq!(
        taker.take(&[run(0, 1.0, true)], &price, now),
        [false],
        "nothing is no run"
    );
}

proptest! {
    #[test]
    fn whatever_peers_say_decisions_stay_within_the_chains_and_the_reports(
        chains in prop::collection::vec((1..40usize, 0..50usize, -100.0f32..100.0), 0..12),
        said in prop::collection::vec((prop::collection::vec(0..60usize, 0..14), prop::collection::vec(prop::num::f32::ANY, 0..100)), 0..5),
        blocks in 0..200usize,
    ) {
        let now = Instant::now();
        let candidates: Vec<Candidate> = chains
            .iter()
            .enumerate()
            .map(|(i, (len, tail, worth))| candidate(i as u32, *len, (*tail).min(*len), *worth))
            .collect();
        let reports: Vec<Report> = said
            .into_iter()
            .enumerate()
            .map(|(i, (held, price))| Report { peer: NodeId::new(format!("p{i}")), held, price })
            .collect();
        let fates = giver(now).decide(&candidates, &reports, blocks, now);
        prop_assert_eq!(fates.len(), candidates.len());
        let mut moved = vec![0; reports.len()];
        for (candidate, fate) in candidates.iter().zip(fates) {
            let len = candidate.path.hashes.len();
            match fate {
                Fate::Keep => {}
                Fate::Drop { blocks, .. } => prop_assert!(blocks <= candidate.path.tail),
                Fate::Offer { report, from, blocks } => {
                    prop_assert!(from < len && len - from <= LIMITS.run_blocks_max);
                    prop_assert_eq!(blocks, candidate.path.tail);
                    moved[report] += len - from;
                }
            }
        }
        for (report, moved) in reports.iter().zip(moved) {
            prop_assert!(moved <= report.price.len());
        }
    }
}
