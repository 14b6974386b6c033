//! `perigee status` and `perigee node list`: the cluster as a router sees it.

use client::{ClusterStatus, NodeStatus};
use serde_json::json;

use crate::generate::inference;
use crate::output::{self, Format};

/// Prints the nodes' load and the router's queue.
pub(crate) async fn cluster(router: &str, format: Format) -> anyhow::Result<()> {
    let ClusterStatus {
        nodes,
        requests_running,
        requests_waiting,
    } = inference(router)?.cluster_status().await?;
    if format == Format::Json {
        return output::print_json(&json!({
            "nodes": nodes.iter().map(to_json).collect::<Vec<_>>(),
            "requests_running": requests_running,
            "requests_waiting": requests_waiting,
        }));
    }
    let mut table = output::table(&[
        "NODE",
        "ROLE",
        "STATE",
        "RUNNING",
        "QUEUED",
        "KV USED",
        "CACHED BLOCKS",
        "PREFILL",
        "STEP",
    ]);
    for node in &nodes {
        let load = node.load.unwrap_or_default();
        let used = node
            .record
            .capacity_blocks
            .saturating_sub(load.free_blocks + load.evictable_blocks);
        table.add_row([
            node.record.id.to_string(),
            node.record.role.to_string(),
            state(node).to_owned(),
            load.running_sequences.to_string(),
            load.queued_requests.to_string(),
            format!("{used}/{}", node.record.capacity_blocks),
            node.indexed_blocks.to_string(),
            rate(load.prefill_ms_per_token, |ms| {
                format!("{:.0} tok/s", 1000.0 / ms)
            }),
            rate(load.decode_step_ms, |ms| format!("{ms:.1} ms")),
        ]);
    }
    output::print_table(&table)?;
    println!("{requests_running} requests running, {requests_waiting} waiting");
    Ok(())
}

/// Prints who the nodes are and where they are reached.
pub(crate) async fn nodes(router: &str, format: Format) -> anyhow::Result<()> {
    let nodes = inference(router)?.cluster_status().await?.nodes;
    if format == Format::Json {
        return output::print_json(&nodes.iter().map(to_json).collect::<Vec<_>>());
    }
    let mut table = output::table(&[
        "NODE", "ROLE", "STATE", "EPOCH", "GRPC", "HTTP", "TRANSFER", "MODEL",
    ]);
    for node in &nodes {
        let record = &node.record;
        table.add_row([
            record.id.to_string(),
            record.role.to_string(),
            state(node).to_owned(),
            record.epoch.to_string(),
            record.grpc_endpoint.clone(),
            record.http_endpoint.clone(),
            record.transfer_endpoint.clone(),
            record.model.clone(),
        ]);
    }
    Ok(output::print_table(&table)?)
}

fn state(node: &NodeStatus) -> &'static str {
    match node.load {
        // The router that answers has no stream from itself.
        _ if node.record.role == types::Role::Router => "ready",
        _ if !node.connected => "lost",
        Some(load) if load.draining => "draining",
        Some(_) => "ready",
        None => "starting",
    }
}

fn rate(value: f64, show: impl Fn(f64) -> String) -> String {
    if value > 0.0 { show(value) } else { "-".to_owned() }
}

fn to_json(node: &NodeStatus) -> serde_json::Value {
    json!({
        "record": node.record,
        "load": node.load,
        "state": state(node),
        "indexed_blocks": node.indexed_blocks,
    })
}
