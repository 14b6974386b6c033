use client::PlacementTimeline;

use super::*;
use crate::node_admin::tests::node;

const NOW: u64 = 1_000_000;

fn request(id: &str, state: &str, ended_before_ms: u64) -> RequestTimeline {
    RequestTimeline {
        request_id: id.repeat(8),
        arrived_unix_ms: NOW - ended_before_ms - 500,
        state: state.to_owned(),
        age_ms: 500.0,
        prompt_tokens: 100,
        cached_tokens: 25,
        output_tokens: 30,
        output_tokens_max: 64,
        ttft_ms: 120.0,
        tbt_mean_ms: 8.0,
        ..RequestTimeline::default()
    }
}

/// A small cluster with two requests that run.
pub(in crate::top) fn snapshot() -> Snapshot {
    let mut nodes = vec![
        node("prefill-0", Role::Prefill),
        node("decode-0", Role::Decode),
        node("decode-1", Role::Decode),
        node("router-0", Role::Router),
    ];
    for (node, running, free) in [(0, 0, 50), (1, 2, 25), (2, 0, 100)] {
        nodes[node].record.capacity_blocks = 100;
        nodes[node].load = Some(LoadReport {
            running_sequences: running,
            queued_requests: 3 * u64::from(node == 0),
            queued_prefill_tokens: 300 * u64::from(node == 0),
            free_blocks: free,
            prefill_ms_per_token: 2.0,
            decode_step_ms: 8.0,
            draining: node == 2,
            ..LoadReport::default()
        });
    }
    let status = ClusterStatus {
        nodes,
        requests_running: 2,
        requests_waiting: 1,
    };
    let placement = |prefill: &str| PlacementTimeline {
        prefill_node: prefill.to_owned(),
        decode_node: "decode-0".to_owned(),
        ..PlacementTimeline::default()
    };
    let requests = [
        RequestTimeline {
            placements: vec![placement("prefill-0")],
            ..request("1a", "prefilling", 0)
        },
        RequestTimeline {
            placements: vec![placement("")],
            age_ms: 2500.0,
            tenant: "blue".to_owned(),
            ..request("2b", "decoding", 0)
        },
        request("3c", "finished", 1_000),
        RequestTimeline {
            ttft_ms: 300.0,
            tbt_mean_ms: 12.0,
            ..request("4d", "finished", 59_000)
        },
        request("5e", "overloaded", 2_000),
        request("6f", "unavailable", 2_000),
        request("70", "cancelled", 2_000),
        request("81", "finished", 90_000),
    ];
    Snapshot::of("127.0.0.1:50051", &status, &requests, NOW)
}

#[test]
fn figures_are_of_the_last_minute() {
    let Snapshot { cluster, .. } = snapshot();
    assert_eq!((cluster.running, cluster.waiting), (2, 1));
    assert_eq!((cluster.rejected, cluster.failed), (1, 1));
    assert_eq!(
        (cluster.requests_per_s, cluster.output_tokens_per_s),
        (2.0 / 60.0, 1.0)
    );
    assert_eq!(
        (cluster.ttft_ms.p50, cluster.ttft_ms.p99, cluster.tbt_ms.p99),
        (120.0, 300.0, 12.0)
    );
    assert_eq!(cluster.hit_ratio, 0.25);
}

#[test]
fn rates_are_of_what_the_router_keeps_where_it_forgets() {
    let requests: Vec<RequestTimeline> = (0..200)
        .map(|number| request("aa", "finished", 50 * number))
        .collect();
    let figures = figures(&requests.iter().collect::<Vec<_>>(), NOW);
    assert!((figures.requests_per_s - 20.0).abs() < 0.2, "{figures:?}");
}

#[test]
fn nodes_and_requests_are_told_as_they_are() {
    let Snapshot { nodes, requests, .. } = snapshot();
    let used: Vec<f64> = nodes.iter().map(|node| node.kv_used).collect();
    assert_eq!(used, [0.5, 0.75, 0.0, 0.0]);
    let rates: Vec<f64> = nodes.iter().map(|node| node.tokens_per_s).collect();
    assert_eq!(rates, [500.0, 250.0, 0.0, 0.0]);
    assert_eq!(nodes[2].state, "draining");
    let places: Vec<&str> = requests.iter().map(|request| request.nodes.as_str()).collect();
    assert_eq!(places, ["prefill-0 → decode-0", "decode-0"]);
}
