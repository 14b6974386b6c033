//! How many copies of hot prefixes a cluster holds, and what they cost it.

#![allow(missing_docs)]

use std::time::Duration;

use kv_store::Eviction;
use kv_store::cooperate::Limits;
use sim::cooperation::{Pools, Prompt, Routing, Served, run};
use types::BlockHash;

const NODES: usize = 10;
const REQUESTS: u32 = 4000;
/// Conversations that are alive at a time.
const OPEN: usize = 60;
/// Prompts that conversations share, and the blocks of each.
const HOT_PROMPTS: usize = 4;
const HOT_BLOCKS: usize = 10;
const COPIES_MAX: usize = 4;

fn limits(copies_max: usize) -> Limits {
    Limits {
        blocks_per_second: 10_000.0,
        run_blocks_max: 512,
        recirculations_max: 4,
        copies_max,
        ramp: Duration::ZERO,
        confirmation_ttl: Duration::from_secs(2),
    }
}

/// Conversations of a few turns, each behind one of the hot prompts.
fn prompts(seed: u64) -> Vec<Prompt> {
    let mut state = seed;
    let mut draw = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let root = |prompt: usize| BlockHash::default().child(&[u32::try_from(prompt).unwrap_or_default()]);
    let hot: Vec<Vec<BlockHash>> = (0..HOT_PROMPTS)
        .map(|prompt| root(prompt).chain(&[1; HOT_BLOCKS], 1))
        .collect();
    let mut open: Vec<(u32, Vec<BlockHash>)> = Vec::new();
    let mut prompts = Vec::new();
    for request in 0..REQUESTS {
        if open.len() < OPEN || draw(3) == 0 {
            open.push((request, hot[draw(HOT_PROMPTS)].clone()));
        }
        let turn = draw(open.len());
        let (conversation, chain) = &mut open[turn];
        for _ in 0..2 + draw(8) {
            let last = chain.last().copied().unwrap_or_default();
            chain.push(last.child(&[*conversation]));
        }
        prompts.push(Prompt {
            at: Duration::from_millis(u64::from(request) * 250),
            chain: chain.clone(),
        });
        if chain.len() > 40 + HOT_BLOCKS {
            open.swap_remove(turn);
        }
    }
    prompts
}

fn served(routing: Routing, cooperation: Option<Limits>, prompts: &[Prompt]) -> Served {
    let pools = Pools {
        serving: NODES,
        stores: 0,
        blocks_per_node: 400,
        eviction: Eviction::Lru,
        routing,
        cooperation,
    };
    run(&pools, prompts)
}

#[test]
fn moves_copy_what_is_hot_no_further_than_they_may_and_copies_cost_the_pools_little() {
    let mut bounded_something = false;
    for seed in [1, 2, 3] {
        let prompts = prompts(seed);
        for routing in [Routing::Affinity { load_max: 1.1 }, Routing::RoundRobin] {
            let [alone, unbounded, bounded] = [None, Some(limits(usize::MAX)), Some(limits(COPIES_MAX))]
                .map(|cooperation| served(routing, cooperation, &prompts));
            for (what, served) in [("alone", alone), ("unbounded", unbounded), ("bounded", bounded)] {
                println!(
                    "seed {seed}, {routing:?}, {what}: {} copies of one block, {:.1} % of slots, hit ratio {:.3}",
                    served.copies.most,
                    100.0 * served.copies.share(),
                    served.hit_ratio()
                );
            }
            let at = format!("seed {seed}, {routing:?}: {unbounded:?}, {bounded:?}");
            assert!(bounded.copies.most <= NODES, "{at}");
            assert!(bounded.copies.share() <= unbounded.copies.share(), "{at}");
            if routing != Routing::RoundRobin {
                // Here few requests make copies, so that those that moves make are seen.
                assert!(bounded.copies.most <= COPIES_MAX + 1, "{at}");
                bounded_something |= unbounded.copies.most > bounded.copies.most;
            }
            assert!(bounded.hit_ratio() >= 0.98 * unbounded.hit_ratio(), "{at}");
        }
    }
    assert!(
        bounded_something,
        "the ceiling was never reached: the test proves nothing"
    );
}
