//! How many copies of hot prefixes a cluster holds, and what they cost it.

use super::*;

const NODES: usize = 10;
/// Prompts that conversations share, and the blocks of each.
const HOT_PROMPTS: u32 = 4;
const HOT_BLOCKS: usize = 10;
const COPIES_MAX: usize = 4;

fn limits(copies_max: usize) -> Limits {
    Limits { copies_max, ..LIMITS }
}

fn hot() -> Vec<Vec<BlockHash>> {
    let root = |prompt: u32| BlockHash::default().child(&[prompt]);
    (0..HOT_PROMPTS)
        .map(|prompt| root(prompt).chain(&[1; HOT_BLOCKS], 1))
        .collect()
}

fn served(routing: Routing, cooperation: Option<Limits>, prompts: &[Prompt]) -> Served {
    let pools = Pools {
        routing,
        ..pools(NODES, 0, 400, cooperation)
    };
    run(&pools, prompts)
}

#[test]
fn moves_copy_what_is_hot_no_further_than_they_may_and_copies_cost_the_pools_little() {
    let mut bounded_something = false;
    for seed in [1, 2, 3] {
        let prompts = conversations(seed, 4000, &hot());
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
