//! What a host's facts mean for transfers: the usual mistakes around RDMA and shared memory. Pure.
//!
//! A host without adapters has nothing to get wrong about them. One that has adapters which this process cannot use was
//! meant to use them, so that is a failure and no mere lack of speed.

use client::TransferMover;
use types::{HostFacts, RdmaPort};

use super::Finding;

/// The group of these findings.
pub(super) const GROUP: &str = "transfers";
/// RoCE carries the largest power of two below the MTU of its interface: 4096 bytes need this much.
const ROCE_MTU_BYTES: u32 = 4200;
const ROCE_V2: &str = "RoCE v2";

/// Judges one host. `pool_bytes` is the memory that peers write to and read; `subject` is the node, or empty.
pub(super) fn judge(
    subject: &str,
    facts: &HostFacts,
    movers: &[TransferMover],
    pool_bytes: u64,
) -> Vec<Finding> {
    let mut findings: Vec<Finding> = movers.iter().map(|mover| judge_mover(subject, mover)).collect();
    if movers.is_empty() {
        findings.push(Finding::passed(GROUP, subject, "built-in TCP"));
    }
    if facts.rdma_devices.is_empty() {
        findings.push(Finding::passed(
            GROUP,
            subject,
            "no RDMA adapter, so nothing to set up for one",
        ));
    } else {
        findings.extend(judge_rdma(subject, facts, pool_bytes));
    }
    if movers.iter().any(|mover| mover.name == "ucx" && mover.usable) {
        findings.push(judge_shared_memory(subject, facts, pool_bytes));
    }
    findings
}

fn judge_mover(subject: &str, mover: &TransferMover) -> Finding {
    let TransferMover { name, usable, detail } = mover;
    if *usable {
        return Finding::passed(GROUP, subject, format!("{name}: {detail}"));
    }
    Finding::warning(
        GROUP,
        subject,
        format!("{name} cannot be used: {detail}"),
        "install UCX 1.13 or newer (Debian's libucx0, PyPI's libucx-cu12) or name its file in transfer.ucx_library; \
        transfer.transport=tcp does without",
    )
}

fn judge_rdma(subject: &str, facts: &HostFacts, pool_bytes: u64) -> Vec<Finding> {
    let failed = |message: String, hint: &str| Finding::failed(GROUP, subject, message, hint);
    let names: Vec<&str> = facts
        .rdma_devices
        .iter()
        .map(|device| device.name.as_str())
        .collect();
    let names = names.join(", ");
    let mut findings = Vec::new();
    if !facts.verbs_devices.iter().any(|name| name.starts_with("uverbs")) {
        findings.push(failed(
            format!("the host has RDMA adapters ({names}), but no /dev/infiniband/uverbs device"),
            "give the container its devices (--device /dev/infiniband, or an rdma/… resource), or load ib_uverbs",
        ));
    }
    if !facts.can_lock(pool_bytes) {
        let limit = facts.memlock_bytes.unwrap_or(u64::MAX);
        findings.push(failed(
            format!(
                "the memlock limit of {} is below the pool of {}, which RDMA has to lock",
                bytes(limit),
                bytes(pool_bytes)
            ),
            "ulimit -l unlimited, LimitMEMLOCK=infinity of a systemd unit, or the capability IPC_LOCK",
        ));
    }
    let active: Vec<(&str, &RdmaPort)> = facts.active_ports().collect();
    if active.is_empty() {
        let states = facts.rdma_devices.iter().flat_map(|device| {
            let ports = device.ports.iter();
            ports.map(move |port| format!("{}:{} {}", device.name, port.number, port.state))
        });
        findings.push(failed(
            format!("no port of an RDMA adapter is active: {}", states.collect::<Vec<_>>().join(", ")),
            "check the cable, ip link set … up for RoCE, and a subnet manager for InfiniBand; ibstat shows the state",
        ));
    }
    for (device, port) in &active {
        findings.extend(judge_port(subject, device, port, facts.gid_index));
    }
    if findings.is_empty() {
        findings.push(Finding::passed(
            GROUP,
            subject,
            format!("RDMA adapters can be used: {names}"),
        ));
    }
    findings
}

/// RoCE alone has addresses to choose among, and an MTU that somebody sets by hand.
fn judge_port(subject: &str, device: &str, port: &RdmaPort, gid_index: Option<u32>) -> Vec<Finding> {
    if !port.is_roce() {
        return Vec::new();
    }
    let name = format!("{device}:{}", port.number);
    let mut findings = Vec::new();
    let of_version_2: Vec<String> = port
        .gids
        .iter()
        .filter(|gid| gid.kind == ROCE_V2)
        .map(|gid| gid.index.to_string())
        .collect();
    let chosen = gid_index.map(|index| (index, port.gids.iter().find(|gid| gid.index == index)));
    match chosen {
        _ if of_version_2.is_empty() => findings.push(Finding::failed(
            GROUP,
            subject,
            format!("RoCE port {name} has no RoCE v2 address, which routed networks need"),
            "give its interface an IP address, and cma_roce_mode -d … -m 2",
        )),
        Some((index, None)) => findings.push(Finding::failed(
            GROUP,
            subject,
            format!("UCX_IB_GID_INDEX is {index}, but port {name} has no such address"),
            format!(
                "one of {}, or auto: show_gids lists them",
                of_version_2.join(", ")
            ),
        )),
        Some((index, Some(gid))) if gid.kind != ROCE_V2 => findings.push(Finding::failed(
            GROUP,
            subject,
            format!(
                "UCX_IB_GID_INDEX is {index}, which is {} on port {name}",
                gid.kind
            ),
            format!(
                "one of {}, or auto: show_gids lists them",
                of_version_2.join(", ")
            ),
        )),
        Some((_, Some(_))) | None => {}
    }
    if let Some(mtu) = port.mtu_bytes.filter(|mtu| *mtu < ROCE_MTU_BYTES) {
        let interface = port.interface.as_deref().unwrap_or("…");
        findings.push(Finding::warning(
            GROUP,
            subject,
            format!("RoCE port {name} runs over {interface} with an MTU of {mtu}, too small for packets of 4096 bytes"),
            format!("ip link set {interface} mtu 9000, on the switch and on every node alike"),
        ));
    }
    findings
}

/// Peers on this host map a pool that is a System V segment, or else a file in `/dev/shm`: one of them must hold it.
fn judge_shared_memory(subject: &str, facts: &HostFacts, pool_bytes: u64) -> Finding {
    let holds = |limit: Option<u64>| limit.is_none_or(|limit| limit >= pool_bytes);
    let in_segment = holds(facts.shmmax_bytes);
    let in_file = facts.shm_mounted && holds(facts.shm_bytes);
    if in_segment || in_file {
        return Finding::passed(GROUP, subject, "shared memory can hold the pool");
    }
    let segment = bytes(facts.shmmax_bytes.unwrap_or(u64::MAX));
    let file = match (facts.shm_mounted, facts.shm_bytes) {
        (true, Some(limit)) => format!("/dev/shm holds {}", bytes(limit)),
        (true, None) | (false, _) => "/dev/shm is not mounted".to_owned(),
    };
    Finding::warning(
        GROUP,
        subject,
        format!(
            "no shared memory can hold the pool of {}: kernel.shmmax is {segment}, and {file}",
            bytes(pool_bytes)
        ),
        "sysctl -w kernel.shmmax=18446744073692774399; or --shm-size of the container, or an emptyDir of medium Memory on \
        /dev/shm",
    )
}

fn bytes(value: u64) -> String {
    crate::output::bytes(value)
}
