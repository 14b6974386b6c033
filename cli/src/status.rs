//! `perigee status` and `perigee node list`: the cluster as a router sees it.

use client::{ClusterStatus, NodeStatus};
use comfy_table::Table;
use serde_json::json;

use crate::output::{self, Format};
use crate::reach::Router;

/// Prints the nodes' load and the router's queue.
pub(crate) async fn cluster(router: &Router, format: Format) -> anyhow::Result<()> {
    let ClusterStatus {
        nodes,
        requests_running,
        requests_waiting,
    } = router.inference()?.cluster_status().await?;
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
pub(crate) async fn nodes(router: &Router, format: Format) -> anyhow::Result<()> {
    let nodes = router.inference()?.cluster_status().await?.nodes;
    if format == Format::Json {
        return output::print_json(&nodes.iter().map(to_json).collect::<Vec<_>>());
    }
    Ok(output::print_table(&node_table(&nodes))?)
}

fn node_table(nodes: &[NodeStatus]) -> Table {
    let mut table = output::table(&[
        "NODE", "ROLE", "STATE", "EPOCH", "GRPC", "HTTP", "TRANSFER", "MODEL",
    ]);
    for node in nodes {
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
    table
}

pub(crate) fn state(node: &NodeStatus) -> &'static str {
    match node.load {
        // The router that answers has no stream from itself.
        _ if node.record.role == types::Role::Router => "ready",
        _ if !node.connected => "lost",
        Some(load) => load.state(),
        None => "starting",
    }
}

pub(crate) fn rate(value: f64, show: impl Fn(f64) -> String) -> String {
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

#[cfg(test)]
mod tests {
    use types::{LoadReport, Role};

    use super::*;
    use crate::node_admin::tests::node;

    #[test]
    fn nodes_are_listed_with_their_state() {
        let mut nodes = [
            node("decode-0", Role::Decode),
            node("decode-1", Role::Decode),
            node("prefill-0", Role::Prefill),
            node("store-0", Role::Store),
            node("router-0", Role::Router),
        ];
        nodes[1].load = Some(LoadReport {
            draining: true,
            ..LoadReport::default()
        });
        nodes[2].connected = false;
        nodes[3].load = None;
        let expected = "
 NODE       ROLE     STATE     EPOCH  GRPC         HTTP         TRANSFER           MODEL
 decode-0   decode   ready     7      decode-0:1   decode-0:2   tcp://decode-0:3   tiny
 decode-1   decode   draining  7      decode-1:1   decode-1:2   tcp://decode-1:3   tiny
 prefill-0  prefill  lost      7      prefill-0:1  prefill-0:2  tcp://prefill-0:3  tiny
 store-0    store    starting  7      store-0:1    store-0:2    tcp://store-0:3    tiny
 router-0   router   ready     7      router-0:1   router-0:2   tcp://router-0:3   tiny
";
        assert_eq!(format!("\n{}", output::table_text(&node_table(&nodes))), expected);
    }
}
