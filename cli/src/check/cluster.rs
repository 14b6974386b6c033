//! What the answers of the router and the nodes mean. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use client::{ClusterStatus, TransferDescription, TransferLink};
use types::{Error, HostFacts, KvSpace, NodeRecord, Role};

use super::{Finding, host};
use crate::nodes::{Answered, Described};

/// Machines that keep time by the network differ by milliseconds.
const CLOCK_SKEW_MAX_MS: i64 = 1_000;

/// All that was asked for.
pub(super) struct Answers {
    /// The address that was asked.
    pub(super) router: String,
    pub(super) status: Result<ClusterStatus, Error>,
    /// What the router's answer took.
    pub(super) took: Duration,
    pub(super) nodes: Vec<Answered>,
    pub(super) transfers: Vec<Described>,
}

/// Judges a cluster. Nothing else is known where the router does not answer.
pub(super) fn judge(answers: &Answers) -> Vec<Finding> {
    let router = &answers.router;
    let status = match &answers.status {
        Ok(status) => status,
        Err(error) => {
            return vec![Finding::failed(
                "router",
                "",
                format!("{router} does not answer: {error}"),
                "--router or PERIGEE_ROUTER names its gRPC address; perigee check --pre checks this machine alone",
            )];
        }
    };
    let took = answers.took.as_secs_f64() * 1000.0;
    let mut findings = vec![Finding::passed(
        "router",
        "",
        format!("{router} answers in {took:.1} ms"),
    )];
    findings.extend(judge_members(status));
    findings.extend(answers.nodes.iter().map(judge_node));
    findings.extend(judge_clocks(&answers.nodes));
    findings.push(judge_versions(&answers.nodes));
    findings.extend(judge_spaces(&answers.nodes));
    for node in &answers.transfers {
        findings.extend(judge_transfers(node));
    }
    findings.extend(judge_pairs(&answers.transfers));
    findings
}

fn judge_members(status: &ClusterStatus) -> Vec<Finding> {
    const GROUP: &str = "members";
    let of = |role| {
        status
            .nodes
            .iter()
            .filter(|node| node.record.role == role)
            .count()
    };
    let (prefill, decode, store) = (of(Role::Prefill), of(Role::Decode), of(Role::Store));
    let counted = format!("{prefill} prefill, {decode} decode, {store} store");
    let mut findings = vec![match decode {
        0 => Finding::failed(
            GROUP,
            "",
            format!("{counted}: no request can be served without a decode node"),
            "start one with the cluster's registry: perigee decode --registry …",
        ),
        _ => Finding::passed(GROUP, "", counted),
    }];
    for node in status
        .nodes
        .iter()
        .filter(|node| node.record.role != Role::Router)
    {
        let id = node.record.id.as_str();
        if !node.connected {
            findings.push(Finding::failed(
                GROUP,
                id,
                "a member, but the router has no connection to it",
                "is the process alive, and does the router's machine reach the address that perigee node list shows?",
            ));
        } else if let Some(load) = node.load
            && !load.takes_requests()
        {
            let what = format!("{}: takes no new requests", load.state());
            findings.push(Finding::warning(GROUP, id, what, ""));
        }
    }
    findings
}

fn judge_node(node: &Answered) -> Finding {
    const GROUP: &str = "nodes";
    let id = node.record.id.as_str();
    let info = match &node.info {
        Ok(info) => info,
        Err(error) => {
            return Finding::failed(
                GROUP,
                id,
                format!("{} does not answer: {error}", node.record.grpc_endpoint),
                "node.advertise must be an address that other machines reach, and its ports must be open",
            );
        }
    };
    if info.record.id != node.record.id || info.record.epoch != node.record.epoch {
        return Finding::failed(
            GROUP,
            id,
            format!(
                "a member at epoch {}, but {} is {} at epoch {}",
                node.record.epoch, node.record.grpc_endpoint, info.record.id, info.record.epoch
            ),
            "the process was started again, or another one took its port: its old entry ends with its lease",
        );
    }
    match &node.serving {
        Ok(true) => Finding::passed(GROUP, id, "alive, and takes requests"),
        Ok(false) => Finding::failed(
            GROUP,
            id,
            "alive, but takes no requests: it starts, ends or was drained",
            "its /readyz says what it waits for",
        ),
        Err(error) => Finding::failed(
            GROUP,
            id,
            format!("its health is not told: {error}"),
            "see its log",
        ),
    }
}

/// Members are compared with this machine, which is as good as any other: where it is the one that is wrong, all of them are told.
fn judge_clocks(nodes: &[Answered]) -> Vec<Finding> {
    const GROUP: &str = "clocks";
    let clocks = || {
        nodes
            .iter()
            .filter_map(|node| Some((node.record.id.as_str(), node.clock?)))
    };
    let mut findings: Vec<Finding> = clocks()
        .filter(|(_, clock)| clock.ahead_ms.abs() > CLOCK_SKEW_MAX_MS + clock.error_ms)
        .map(|(id, clock)| {
            let (seconds, side) = match clock.ahead_ms {
                ahead if ahead > 0 => (ahead as f64 / 1e3, "ahead of"),
                behind => (-behind as f64 / 1e3, "behind"),
            };
            Finding::failed(
                GROUP,
                id,
                format!("its clock is {seconds:.1} s {side} this machine's"),
                "run chrony or systemd-timesyncd on all machines: a node that starts again with an earlier time is refused as an old \
                incarnation, and certificates count as expired or not yet valid",
            )
        })
        .collect();
    if findings.is_empty()
        && let Some(widest) = clocks().map(|(_, clock)| clock.ahead_ms.abs()).max()
    {
        let message = format!("all clocks are within {} ms of this machine's", widest.max(1));
        findings.push(Finding::passed(GROUP, "", message));
    }
    findings
}

fn judge_versions(nodes: &[Answered]) -> Finding {
    const GROUP: &str = "versions";
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in nodes {
        if let Ok(info) = &node.info {
            versions
                .entry(&info.version)
                .or_default()
                .push(node.record.id.as_str());
        }
    }
    let said = versions
        .iter()
        .map(|(version, ids)| format!("{version} on {}", ids.join(", ")));
    let said = said.collect::<Vec<_>>().join("; ");
    match versions.len() {
        0 | 1 => Finding::passed(
            GROUP,
            "",
            format!(
                "all run {}",
                versions.keys().next().unwrap_or(&env!("CARGO_PKG_VERSION"))
            ),
        ),
        _ => Finding::failed(
            GROUP,
            "",
            format!("processes of different versions: {said}"),
            "finish the upgrade: versions are meant to meet during one only",
        ),
    }
}

/// Nodes of one model that disagree about what a block is never share one.
fn judge_spaces(nodes: &[Answered]) -> Vec<Finding> {
    const GROUP: &str = "blocks";
    let mut models: BTreeMap<&str, Vec<(&KvSpace, &str)>> = BTreeMap::new();
    for record in nodes.iter().map(|node| &node.record) {
        if let Some(space) = &record.kv_space {
            models
                .entry(&record.model)
                .or_default()
                .push((space, record.id.as_str()));
        }
    }
    let judged = models.into_iter().map(|(model, spaces)| {
        let (first, _) = spaces[0];
        let other = spaces.iter().find(|(space, _)| *space != first);
        match other {
            None => Finding::passed(GROUP, "", format!("all nodes of {model} have blocks of one kind")),
            Some((_, id)) => Finding::failed(
                GROUP,
                "",
                format!(
                    "{id} and {} serve {model} with blocks of different kinds",
                    spaces[0].1
                ),
                "give all nodes the same model file, model.precision, model.kv_format and kv.block_tokens",
            ),
        }
    });
    judged.collect()
}

fn judge_transfers(node: &Described) -> Vec<Finding> {
    let id = node.record.id.as_str();
    match &node.said {
        Ok(said) => host::judge(id, &said.host, &said.movers, pool_bytes(&node.record)),
        Err(error) => vec![Finding::failed(
            host::GROUP,
            id,
            format!("does not say how it moves blocks: {error}"),
            "see its log; a node of an older version does not know the question",
        )],
    }
}

/// What only shows between two nodes.
fn judge_pairs(nodes: &[Described]) -> Vec<Finding> {
    let answered: Vec<(&NodeRecord, &TransferDescription)> = nodes
        .iter()
        .filter_map(|node| Some((&node.record, node.said.as_ref().ok()?)))
        .collect();
    let mut findings = Vec::new();
    for (index, (from, one)) in answered.iter().enumerate() {
        for (to, other) in &answered[index + 1..] {
            findings.extend(judge_hosts(
                &format!("{} and {}", from.id, to.id),
                &one.host,
                &other.host,
            ));
        }
    }
    for (from, said) in &answered {
        for link in &said.links {
            // A peer that has left the cluster is nobody's trouble any more.
            let to = answered
                .iter()
                .find(|(to, _)| to.transfer_endpoint == link.endpoint);
            if let Some((to, other)) = to {
                findings.push(judge_link(
                    &format!("{} -> {}", from.id, to.id),
                    link,
                    said,
                    other,
                ));
            }
        }
    }
    findings
}

/// An obstacle is worth a warning where something better ought to be: on one host, or between two with adapters, if both
/// nodes have UCX. That one of them lacks it is said of the node.
fn judge_link(
    pair: &str,
    link: &TransferLink,
    from: &TransferDescription,
    to: &TransferDescription,
) -> Finding {
    let used = match link.lanes.as_slice() {
        [] => format!("uses {}", link.mover),
        lanes => format!("uses {} over {}", link.mover, lanes.join(", ")),
    };
    if link.obstacle.is_empty() {
        return Finding::passed(host::GROUP, pair, used);
    }
    let message = format!("{used}: {}", link.obstacle);
    let has_ucx = |node: &TransferDescription| {
        node.movers
            .iter()
            .any(|mover| mover.name == "ucx" && mover.usable)
    };
    let has_adapter = |node: &TransferDescription| !node.host.rdma_devices.is_empty();
    let better = same_host(&from.host, &to.host) || (has_adapter(from) && has_adapter(to));
    if better && has_ucx(from) && has_ucx(to) {
        return Finding::warning(host::GROUP, pair, message, "");
    }
    Finding::passed(host::GROUP, pair, message)
}

fn same_host(one: &HostFacts, other: &HostFacts) -> bool {
    !one.boot_id.is_empty() && one.boot_id == other.boot_id
}

fn judge_hosts(pair: &str, one: &HostFacts, other: &HostFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    if same_host(one, other) && one.ipc_namespace != other.ipc_namespace {
        findings.push(Finding::warning(
            host::GROUP,
            pair,
            "on one host, but in different IPC namespaces: System V memory is not shared",
            "--ipc=host or --ipc=container:…, or hostIPC of the pods",
        ));
    }
    let mtu = |facts: &HostFacts| {
        let ports = facts.active_ports().filter(|(_, port)| port.is_roce());
        ports.filter_map(|(_, port)| port.mtu_bytes).max()
    };
    if let (Some(one), Some(other)) = (mtu(one), mtu(other))
        && one != other
    {
        findings.push(Finding::failed(
            host::GROUP,
            pair,
            format!("their RoCE interfaces have MTUs of {one} and {other} bytes: large transfers hang"),
            "the same MTU on all nodes and on the switch between them",
        ));
    }
    findings
}

fn pool_bytes(record: &NodeRecord) -> u64 {
    let block_bytes = record
        .kv_space
        .as_ref()
        .map_or(0, |space| space.layout.block_bytes() as u64);
    record.capacity_blocks.saturating_mul(block_bytes)
}
