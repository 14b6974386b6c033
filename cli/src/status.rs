//! `perigee status` and `perigee node list`: the cluster as a router sees it.

use client::{ClusterStatus, NodeStatus};
use serde_json::json;

use crate::output::{Columns, Format, Tone, View, Watch, paint};
use crate::reach::Router;

/// Prints the nodes' load and the router's queue.
pub(crate) async fn cluster(watch: Watch, router: &Router, format: Format) -> anyhow::Result<()> {
    let look = async || Ok(cluster_view(&router.inference()?.cluster_status().await?));
    watch.show(format, look).await
}

/// Prints who the nodes are and where they are reached.
pub(crate) async fn nodes(watch: Watch, router: &Router, format: Format) -> anyhow::Result<()> {
    let look = async || Ok(node_view(&router.inference()?.cluster_status().await?.nodes));
    watch.show(format, look).await
}

/// The nodes' load and the router's queue.
pub(crate) fn cluster_view(status: &ClusterStatus) -> View {
    let ClusterStatus {
        nodes,
        requests_running,
        requests_waiting,
    } = status;
    let document = json!({
        "nodes": nodes.iter().map(to_json).collect::<Vec<_>>(),
        "requests_running": requests_running,
        "requests_waiting": requests_waiting,
    });
    let view = View::new(document, |wide| {
        format!(
            "{}{requests_running} requests running, {requests_waiting} waiting\n",
            load_table(nodes, wide)
        )
    });
    view.named(ids(nodes))
}

fn load_table(nodes: &[NodeStatus], wide: bool) -> String {
    let columns = [
        ("NODE", false),
        ("ROLE", false),
        ("STATE", false),
        ("RUNNING", false),
        ("QUEUED", false),
        ("KV USED", false),
        ("CACHED BLOCKS", false),
        ("PREFILL", false),
        ("STEP", false),
        ("EPOCH", true),
        ("GRPC", true),
        ("MODEL", true),
    ];
    let mut table = Columns::new(wide, &columns);
    for node in nodes {
        let record = &node.record;
        let load = node.load.unwrap_or_default();
        let used = load.used_blocks(record.capacity_blocks);
        table.row([
            record.id.to_string(),
            record.role.to_string(),
            painted(state(node)),
            load.running_sequences.to_string(),
            load.queued_requests.to_string(),
            format!("{used}/{}", record.capacity_blocks),
            node.indexed_blocks.to_string(),
            rate(load.prefill_ms_per_token, |ms| {
                format!("{:.0} tok/s", 1000.0 / ms)
            }),
            rate(load.decode_step_ms, |ms| format!("{ms:.1} ms")),
            record.epoch.to_string(),
            record.grpc_endpoint.clone(),
            record.model.clone(),
        ]);
    }
    table.text()
}

/// Who the nodes are and where they are reached.
pub(crate) fn node_view(nodes: &[NodeStatus]) -> View {
    let document = nodes.iter().map(to_json).collect();
    let view = View::new(document, |wide| node_table(nodes, wide));
    view.named(ids(nodes))
}

fn node_table(nodes: &[NodeStatus], wide: bool) -> String {
    let columns = [
        ("NODE", false),
        ("ROLE", false),
        ("STATE", false),
        ("EPOCH", true),
        ("GRPC", false),
        ("HTTP", true),
        ("TRANSFER", true),
        ("MODEL", false),
    ];
    let mut table = Columns::new(wide, &columns);
    for node in nodes {
        let record = &node.record;
        table.row([
            record.id.to_string(),
            record.role.to_string(),
            painted(state(node)),
            record.epoch.to_string(),
            record.grpc_endpoint.clone(),
            record.http_endpoint.clone(),
            record.transfer_endpoint.clone(),
            record.model.clone(),
        ]);
    }
    table.text()
}

fn ids(nodes: &[NodeStatus]) -> impl Iterator<Item = &types::NodeId> {
    nodes.iter().map(|node| &node.record.id)
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

/// What a node's state means.
pub(crate) fn tone(state: &str) -> Tone {
    match state {
        "ready" => Tone::Good,
        "lost" => Tone::Bad,
        _ => Tone::Warning,
    }
}

/// A node's state in its colour.
pub(crate) fn painted(state: &str) -> String {
    paint(tone(state), state)
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
    use crate::output::golden;

    /// A node in each state.
    fn nodes() -> Vec<NodeStatus> {
        let mut nodes = vec![
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
        nodes[0].load = Some(LoadReport {
            running_sequences: 3,
            queued_requests: 1,
            free_blocks: 50,
            evictable_blocks: 30,
            prefill_ms_per_token: 0.25,
            decode_step_ms: 12.25,
            ..LoadReport::default()
        });
        nodes
    }

    #[test]
    fn nodes_are_listed_with_their_state() {
        golden::check("node-list", &node_view(&nodes()));
    }

    #[test]
    fn the_cluster_is_shown_with_the_nodes_load_and_the_routers_queue() {
        let status = ClusterStatus {
            nodes: nodes(),
            requests_running: 3,
            requests_waiting: 1,
        };
        golden::check("status", &cluster_view(&status));
    }
}
