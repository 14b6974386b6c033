use super::*;
use workloads::Workload;

fn request(at_ms: u64, blocks: &[u64]) -> Request {
    Request {
        at_ms,
        blocks: blocks.to_vec(),
    }
}

#[test]
fn only_the_contiguous_prefix_that_is_held_counts() {
    let requests = [
        request(0, &[1, 2, 3]),
        request(1, &[1, 2, 4]),
        request(2, &[1, 2, 3, 5]),
    ];
    for eviction in Eviction::ALL {
        let hits = replay(&requests, 10, eviction);
        assert_eq!((hits.held, hits.asked), (2 + 3, 10), "{eviction}");
    }
    assert_eq!(optimum::belady(&requests, 10).held, 5);
    // Four slots: the third request still finds 1, 2 and 3.
    assert_eq!(optimum::belady(&requests, 4).held, 5);
    // Two slots: 3 finds no place, so that the last request finds what the second one left.
    assert_eq!(optimum::belady(&requests, 2).held, 4);
}

#[test]
fn a_workload_is_a_function_of_its_seed() {
    for workload in Workload::ALL {
        let requests = workload.requests(7, 300);
        assert_eq!(requests, workload.requests(7, 300));
        assert_ne!(requests, workload.requests(8, 300));
        assert!(requests.len() >= 300, "{}", workload.name());
        assert!(requests.is_sorted_by_key(|request| request.at_ms));
    }
}

/// Requests enough for the model to learn from, and few enough to replay in a test.
const REQUESTS: usize = 6_000;

#[test]
fn the_default_policy_is_never_much_worse_than_the_best_other_one_nor_better_than_the_optimum() {
    for workload in Workload::ALL {
        let requests = workload.requests(1, REQUESTS);
        for capacity in [1_000, 2_000, 6_000, 20_000] {
            let ratio = |eviction| replay(&requests, capacity, eviction).ratio();
            let others = [Eviction::Lru, Eviction::Lfu, Eviction::S3Fifo].map(ratio);
            let best = others.into_iter().fold(0.0, f64::max);
            let ours = ratio(Eviction::default());
            let optimum = optimum::belady(&requests, capacity).ratio();
            let at = format!("{} at {capacity}: {others:.4?}, ours {ours:.4}", workload.name());
            assert!(ours >= 0.99 * best, "{at}");
            assert!(ours <= optimum + 1e-9, "{at}, optimum {optimum:.4}");
        }
    }
}

#[test]
fn what_requests_teach_beats_every_other_policy_where_memory_is_short() {
    for (workload, capacity, gain) in [
        (Workload::Conversations, 500, 1.17),
        (Workload::Conversations, 1_000, 1.18),
        (Workload::Conversations, 2_000, 1.12),
        (Workload::Documents, 1_000, 1.01),
        (Workload::Documents, 2_000, 1.01),
    ] {
        let requests = workload.requests(1, REQUESTS);
        let ratio = |eviction| replay(&requests, capacity, eviction).ratio();
        let others = [Eviction::Lru, Eviction::Lfu, Eviction::S3Fifo].map(ratio);
        let best = others.into_iter().fold(0.0, f64::max);
        let ours = ratio(Eviction::default());
        let at = format!("{} at {capacity}: {others:.4?}, ours {ours:.4}", workload.name());
        assert!(ours >= gain * best, "{at}");
    }
}
