use router::policy::{Perigee, PolicyName};

use super::*;

fn cluster() -> Cluster {
    Cluster {
        prefill_nodes: 2,
        decode_nodes: 2,
        blocks_per_node: 4_000,
        eviction: Eviction::default(),
        context_tokens_max: 32_768,
        rates: Rates {
            prefill_ms_per_token: 0.5,
            prefill_ms_per_token_kilocontext: 0.05,
            decode_step_ms: 8.0,
            transfer_bytes_per_ms: 1e6,
            disk_bytes_per_ms: 1e6,
        },
        shape: KvShape {
            block_tokens: 32,
            token_bytes: 20_000,
            layers: 30,
        },
    }
}

/// Conversations of several turns, each of which extends the one before.
fn conversations(count: usize, turns: usize) -> Vec<Arrival> {
    let mut arrivals = Vec::new();
    for turn in 0..turns {
        for conversation in 0..count {
            let blocks = 20 * (turn + 1);
            let tokens: Vec<u32> = (0..blocks * 32)
                .map(|token| (token * count + conversation) as u32)
                .collect();
            arrivals.push(Arrival {
                at_ms: (turn * count + conversation) as f64 * 250.0,
                chain: BlockHash::default().chain(&tokens, 32),
                prompt_tokens: tokens.len() as u64 + 7,
                output_tokens: 50,
            });
        }
    }
    arrivals
}

fn served(outcomes: &[Outcome]) -> Vec<&Served> {
    let each = outcomes.iter().filter_map(|outcome| match outcome {
        Outcome::Served(served) => Some(served),
        Outcome::Rejected => None,
    });
    each.collect()
}

#[test]
fn equal_inputs_give_equal_outcomes() {
    let arrivals = conversations(8, 4);
    assert_eq!(
        run(&cluster(), &arrivals, &mut Perigee),
        run(&cluster(), &arrivals, &mut Perigee)
    );
}

#[test]
fn later_turns_hit_what_earlier_ones_left() {
    let outcomes = run(&cluster(), &conversations(4, 3), &mut Perigee);
    let served = served(&outcomes);
    assert_eq!(served.len(), 12);
    assert!(served[..4].iter().all(|one| one.cached_tokens == 0));
    assert!(
        served[4..8].iter().all(|one| one.cached_tokens == 20 * 32),
        "{served:?}"
    );
    assert!(
        served[8..].iter().all(|one| one.cached_tokens == 40 * 32),
        "{served:?}"
    );
}

#[test]
fn predicting_beats_chance_where_queues_form() {
    let arrivals = conversations(12, 6);
    let mean = |name: PolicyName| {
        let outcomes = run(&cluster(), &arrivals, &mut *name.build());
        let served = served(&outcomes);
        served.iter().map(|one| one.ttft.0).sum::<f64>() / served.len() as f64
    };
    let (perigee, random) = (mean(PolicyName::Perigee), mean(PolicyName::Random));
    assert!(
        perigee < 0.95 * random,
        "perigee {perigee:.1} ms, random {random:.1} ms"
    );
}

#[test]
fn an_idle_cluster_is_predicted_exactly() {
    let arrivals = &conversations(1, 1);
    let outcomes = run(&cluster(), arrivals, &mut Perigee);
    let [one] = served(&outcomes)[..] else {
        panic!("one request")
    };
    assert!((one.ttft.0 - one.ttft_predicted.0).abs() < 0.01, "{one:?}");
}

#[test]
fn a_prompt_beyond_every_context_is_rejected() {
    let mut arrivals = conversations(1, 1);
    arrivals[0].prompt_tokens = 1 << 40;
    assert_eq!(run(&cluster(), &arrivals, &mut Perigee), [Outcome::Rejected]);
}
