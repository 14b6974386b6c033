//! A handoff ends well whatever happens: both real state machines in every interleaving of what the world may do.

#![allow(missing_docs)]

mod explore;
mod world;

use std::collections::BTreeSet;

use explore::{explore, walk};
use rstest::rstest;
use tests::cases::Random;
use world::{Mutation, Rules};

const SMALLEST: Rules = Rules {
    blocks: 1,
    held_blocks: 0,
    layers: 1,
    writes_max: 1,
    faults_max: 3,
    mutation: Mutation::None,
};

#[rstest]
#[case::one_piece_and_four_faults(Rules { faults_max: 4, ..SMALLEST })]
#[case::two_layers(Rules { layers: 2, writes_max: 2, faults_max: 2, ..SMALLEST })]
#[case::two_layers_one_write_at_a_time(Rules { layers: 2, faults_max: 2, ..SMALLEST })]
#[case::two_blocks(Rules { blocks: 2, writes_max: 2, faults_max: 2, ..SMALLEST })]
#[case::a_block_that_is_held(Rules { blocks: 2, held_blocks: 1, ..SMALLEST })]
#[case::two_blocks_of_two_layers(Rules { blocks: 2, layers: 2, writes_max: 2, faults_max: 2, ..SMALLEST })]
fn every_interleaving_ends_well(#[case] rules: Rules) {
    let explored = explore(&rules).unwrap_or_else(|found| panic!("{rules:?}: {found}"));
    println!(
        "{rules:?}: {} states, {} steps, ends {:?}",
        explored.states, explored.steps, explored.outcomes
    );
    // A model in which something never happens proves nothing about it.
    let outcomes: BTreeSet<&str> = explored.outcomes.keys().copied().collect();
    let expected = [
        "adopted",
        "cancelled",
        "corrupt",
        "died",
        "failed",
        "short",
        "timed_out",
    ];
    assert_eq!(outcomes, BTreeSet::from(expected));
    assert_eq!(explored.kinds.len(), 34, "{:?}", explored.kinds);
}

#[test]
fn without_faults_every_interleaving_lands() {
    for (blocks, layers, writes_max) in [(1, 1, 1), (1, 2, 2), (2, 2, 2), (3, 2, 2), (2, 3, 3)] {
        let rules = Rules {
            blocks,
            layers,
            writes_max,
            faults_max: 0,
            ..SMALLEST
        };
        let explored = explore(&rules).unwrap_or_else(|found| panic!("{rules:?}: {found}"));
        let outcomes: Vec<&str> = explored.outcomes.keys().copied().collect();
        assert_eq!(outcomes, ["adopted"], "{rules:?}");
    }
}

/// The model can fail: each of these mistakes is found.
#[rstest]
#[case(
    Mutation::FencedTooEarly,
    "a write lands in memory that belongs to somebody else"
)]
#[case(
    Mutation::SlowFenceFrees,
    "a write lands in memory that belongs to somebody else"
)]
#[case(
    Mutation::EpochIgnored,
    "a write lands in memory that belongs to somebody else"
)]
#[case(Mutation::Unverified, "wrong bytes are adopted")]
#[case(Mutation::LostIsSettled, "quiesced while a write is under way")]
fn a_mistake_is_found(#[case] mutation: Mutation, #[case] violation: &str) {
    let rules = Rules { mutation, ..SMALLEST };
    let found = explore(&rules).expect_err("the mistake must be found");
    println!("{mutation:?}: {found}");
    assert_eq!(found.violation, violation, "{found}");
}

#[test]
fn random_walks_through_larger_handoffs_end_well() {
    const WALKS: u64 = 60_000;
    let mut adopted = 0;
    for seed in 0..WALKS {
        let mut random = Random::new(seed);
        let mut number = |low: u64, high: u64| usize::try_from(random.between(low, high)).expect("small");
        let blocks = number(1, 5);
        let rules = Rules {
            blocks,
            held_blocks: number(0, blocks as u64 - 1),
            layers: number(1, 4),
            writes_max: number(1, 4),
            faults_max: u8::try_from(number(0, 6)).expect("small"),
            mutation: Mutation::None,
        };
        let outcome =
            walk(&rules, &mut random, 12).unwrap_or_else(|found| panic!("seed {seed}, {rules:?}: {found}"));
        adopted += u64::from(outcome == "adopted");
    }
    println!("{adopted} of {WALKS} handoffs were adopted");
    assert!(
        (WALKS / 10..WALKS).contains(&adopted),
        "walks must go both ways, but {adopted} of {WALKS} were adopted"
    );
}
