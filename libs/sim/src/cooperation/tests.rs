use super::*;

mod copies;

const LIMITS: Limits = Limits {
    blocks_per_second: 10_000.0,
    run_blocks_max: 512,
    recirculations_max: 4,
    copies_max: 64,
    ramp: Duration::ZERO,
    confirmation_ttl: Duration::from_secs(2),
};

/// Conversations of a few turns each, of which some are alive at a time: the later ones make the pools forget the earlier ones.
/// Each begins with one of `beginnings`.
fn conversations(seed: u64, requests: u32, beginnings: &[Vec<BlockHash>]) -> Vec<Prompt> {
    let mut state = seed;
    let mut draw = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut open: Vec<(u32, Vec<BlockHash>, usize)> = Vec::new();
    let mut prompts = Vec::new();
    for request in 0..requests {
        if open.len() < 60 || draw(3) == 0 {
            let beginning = beginnings[draw(beginnings.len())].clone();
            let most = 40 + beginning.len();
            open.push((request, beginning, most));
        }
        let turn = draw(open.len());
        let (conversation, chain, most) = &mut open[turn];
        for _ in 0..2 + draw(8) {
            let last = *chain.last().expect("it begins with something");
            chain.push(last.child(&[*conversation]));
        }
        prompts.push(Prompt {
            at: Duration::from_millis(u64::from(request) * 250),
            chain: chain.clone(),
        });
        if chain.len() > *most {
            open.swap_remove(turn);
        }
    }
    prompts
}

/// The system prompt that all conversations begin with.
fn system() -> Vec<Vec<BlockHash>> {
    vec![vec![BlockHash::default().child(&[1])]]
}

fn pools(serving: usize, stores: usize, blocks: usize, cooperation: Option<Limits>) -> Pools {
    Pools {
        serving,
        stores,
        blocks_per_node: blocks,
        // So few requests reach each of these small pools that what a policy learns from them would be what is tested.
        eviction: Eviction::Lru,
        routing: Routing::Affinity { load_max: 1.1 },
        cooperation,
    }
}

#[test]
fn ten_pools_serve_nearly_as_well_as_one_of_their_size() {
    for seed in [1, 2, 3] {
        let prompts = conversations(seed, 4000, &system());
        let one = run(&pools(1, 0, 4000, None), &prompts).hit_ratio();
        let ten = run(&pools(10, 0, 400, Some(LIMITS)), &prompts);
        assert!(ten.hit_ratio() >= 0.95 * one, "seed {seed}: {ten:?} beside {one}");
        assert!(ten.load_max < 1.3, "seed {seed}: the router is fair: {ten:?}");
    }
}

#[test]
fn pools_that_serve_nothing_hold_what_the_others_cannot() {
    for seed in [1, 2, 3] {
        let prompts = conversations(seed, 4000, &system());
        let one = run(&pools(1, 0, 4000, None), &prompts).hit_ratio();
        let alone = run(&pools(4, 6, 400, None), &prompts).hit_ratio();
        let together = run(&pools(4, 6, 400, Some(LIMITS)), &prompts);
        assert!(
            alone < 0.9 * one,
            "seed {seed}: four pools are not enough: {alone} of {one}"
        );
        assert!(
            // Prompts are large beside the margin of so small pools, and what passes it by is lost.
            together.hit_ratio() >= 0.85 * one,
            "seed {seed}: {together:?} beside {one} and {alone}"
        );
    }
}

/// The published conversation trace, where `PERIGEE_TRACE` says that it is.
#[test]
fn ten_nodes_of_three_million_tokens_hit_as_one_pool_of_thirty() {
    let Some(path) = std::env::var_os("PERIGEE_TRACE") else {
        eprintln!("skipped: PERIGEE_TRACE names no trace");
        return;
    };
    let text = std::fs::read_to_string(path).expect("the trace can be read");
    let prompts = prompts_of_trace(&text).expect("it is a trace");
    let default = |serving, stores, blocks, cooperation| Pools {
        eviction: Eviction::default(),
        ..pools(serving, stores, blocks, cooperation)
    };
    let one = run(&default(1, 0, 58_590, None), &prompts).hit_ratio();
    let round_robin = Pools {
        routing: Routing::RoundRobin,
        ..default(10, 0, 5_859, Some(LIMITS))
    };
    for pools in [
        default(10, 0, 5_859, Some(LIMITS)),
        default(4, 6, 5_859, Some(LIMITS)),
        round_robin,
    ] {
        let served = run(&pools, &prompts);
        assert!(
            served.hit_ratio() >= 0.95 * one,
            "{pools:?}: {served:?} beside {one}"
        );
    }
}

#[test]
fn a_line_that_is_no_request_is_noticed() {
    let line = r#"{"timestamp": 27, "input_length": 900, "output_length": 5, "hash_ids": [0, 46]}"#;
    let prompts = prompts_of_trace(line).expect("a trace");
    assert_eq!((prompts.len(), prompts[0].at), (1, Duration::from_millis(27)));
    assert_eq!(prompts[0].chain.len(), 2);
    assert!(prompts_of_trace(&line.replace("46", "x")).is_err());
    assert!(prompts_of_trace(&line.replace("hash_ids", "ids")).is_err());
}

#[test]
fn equal_inputs_give_equal_outcomes() {
    let prompts = conversations(7, 500, &system());
    let pools = pools(4, 2, 300, Some(LIMITS));
    assert_eq!(run(&pools, &prompts), run(&pools, &prompts));
}
