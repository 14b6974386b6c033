use client::{ClusterStatus, NodeInfo, NodeStatus, TransferDescription, TransferLink};
use types::{
    ErrorCode, HostFacts, KvDtype, KvLayout, KvSpace, LoadReport, NodeId, NodeRecord, RdmaDevice, RdmaGid,
    RdmaPort, Role,
};

use super::cluster::Answers;
use super::*;
use crate::nodes::{Answered, Clock, Described};
use crate::output::golden;

const POOL_BYTES: u64 = 1 << 30;

/// A host with one RoCE adapter that is set up well.
fn roce() -> HostFacts {
    let gid = |index, kind: &str| RdmaGid {
        index,
        gid: "fe80::1".into(),
        kind: kind.into(),
    };
    HostFacts {
        boot_id: "one".into(),
        ipc_namespace: Some(1),
        memlock_bytes: None,
        shm_mounted: true,
        shmmax_bytes: Some(u64::MAX),
        verbs_devices: vec!["rdma_cm".into(), "uverbs0".into()],
        rdma_devices: vec![RdmaDevice {
            name: "mlx5_0".into(),
            ports: vec![RdmaPort {
                number: 1,
                state: "ACTIVE".into(),
                link_layer: "Ethernet".into(),
                rate: "100 Gb/sec (4X EDR)".into(),
                interface: Some("eth2".into()),
                mtu_bytes: Some(9000),
                gids: vec![gid(0, "IB/RoCE v1"), gid(3, "RoCE v2")],
            }],
        }],
        ..HostFacts::default()
    }
}

fn ucx(usable: bool) -> Vec<TransferMover> {
    vec![TransferMover {
        name: "ucx".into(),
        usable,
        detail: if usable {
            "UCX 1.13.1"
        } else {
            "libucp.so.0 was not found"
        }
        .into(),
    }]
}

fn bad(findings: &[Finding]) -> Vec<(Level, &str)> {
    let bad = findings.iter().filter(|finding| finding.level != Level::Passed);
    bad.map(|finding| (finding.level, finding.message.as_str()))
        .collect()
}

/// The one thing that is wrong with the host.
fn only(facts: &HostFacts) -> (Level, String, String) {
    let findings = host::judge("p", facts, &ucx(true), POOL_BYTES);
    let bad: Vec<_> = findings
        .iter()
        .filter(|finding| finding.level != Level::Passed)
        .collect();
    assert_eq!(bad.len(), 1, "{findings:?}");
    (bad[0].level, bad[0].message.clone(), bad[0].hint.clone())
}

#[test]
fn a_host_that_is_set_up_well_passes() {
    assert_eq!(bad(&host::judge("p", &roce(), &ucx(true), POOL_BYTES)), []);
    let plain = HostFacts {
        memlock_bytes: Some(65_536),
        shm_mounted: true,
        ..HostFacts::default()
    };
    assert_eq!(
        bad(&host::judge("p", &plain, &ucx(true), POOL_BYTES)),
        [],
        "no adapter needs no memlock"
    );
    assert_eq!(bad(&host::judge("p", &HostFacts::default(), &[], POOL_BYTES)), []);
}

#[test]
fn each_mistake_around_an_adapter_is_found_with_its_remedy() {
    type Mistake = fn(&mut HostFacts);
    let cases: [(Mistake, Level, &str, &str); 9] = [
        (
            |facts| facts.memlock_bytes = Some(65_536),
            Level::Failed,
            "memlock limit of 64.0 KiB",
            "ulimit -l",
        ),
        (
            |facts| facts.verbs_devices = vec!["rdma_cm".into()],
            Level::Failed,
            "/dev/infiniband/uverbs",
            "--device",
        ),
        (
            |facts| facts.rdma_devices[0].ports[0].state = "DOWN".into(),
            Level::Failed,
            "mlx5_0:1 DOWN",
            "ibstat",
        ),
        (
            |facts| facts.rdma_devices[0].ports[0].gids.truncate(1),
            Level::Failed,
            "no RoCE v2 address",
            "cma_roce_mode",
        ),
        (
            |facts| facts.gid_index = Some(7),
            Level::Failed,
            "has no such address",
            "one of 3",
        ),
        (
            |facts| facts.gid_index = Some(0),
            Level::Failed,
            "which is IB/RoCE v1",
            "one of 3",
        ),
        (
            |facts| facts.rdma_devices[0].ports[0].mtu_bytes = Some(1500),
            Level::Warning,
            "an MTU of 1500",
            "ip link set eth2 mtu 9000",
        ),
        (
            |facts| {
                facts.shm_bytes = Some(64 << 20);
                facts.shmmax_bytes = Some(32 << 20);
            },
            Level::Warning,
            "kernel.shmmax is 32.0 MiB, and /dev/shm holds 64.0 MiB",
            "--shm-size",
        ),
        (
            |facts| {
                facts.shm_mounted = false;
                facts.shmmax_bytes = Some(32 << 20);
            },
            Level::Warning,
            "/dev/shm is not mounted",
            "sysctl",
        ),
    ];
    for (mistake, level, message, hint) in cases {
        let mut facts = roce();
        mistake(&mut facts);
        let found = only(&facts);
        assert_eq!(found.0, level, "{message}");
        assert!(found.1.contains(message) && found.2.contains(hint), "{found:?}");
    }
}

#[test]
fn what_lifts_a_limit_is_seen() {
    let mut facts = roce();
    facts.memlock_bytes = Some(65_536);
    facts.ipc_lock = true;
    assert_eq!(bad(&host::judge("p", &facts, &ucx(true), POOL_BYTES)), []);
    // A pool needs one kind of shared memory, not both.
    let mut facts = roce();
    facts.shm_bytes = Some(64 << 20);
    assert_eq!(bad(&host::judge("p", &facts, &ucx(true), POOL_BYTES)), []);
    // InfiniBand has neither versions of addresses nor an MTU of ours.
    let mut facts = roce();
    facts.rdma_devices[0].ports[0] = RdmaPort {
        number: 1,
        state: "ACTIVE".into(),
        link_layer: "InfiniBand".into(),
        ..RdmaPort::default()
    };
    assert_eq!(bad(&host::judge("p", &facts, &ucx(true), POOL_BYTES)), []);
}

#[test]
fn a_missing_library_is_a_warning() {
    let findings = host::judge("p", &HostFacts::default(), &ucx(false), POOL_BYTES);
    assert_eq!(
        bad(&findings),
        [(Level::Warning, "ucx cannot be used: libucp.so.0 was not found")]
    );
}

fn record(id: &str, role: Role) -> NodeRecord {
    NodeRecord {
        id: NodeId::new(id),
        epoch: Epoch(5),
        role,
        grpc_endpoint: format!("{id}:1"),
        http_endpoint: format!("{id}:2"),
        transfer_endpoint: format!("tcp://{id}:3"),
        model: "tiny".into(),
        kv_space: Some(KvSpace {
            model_digest: "00".into(),
            arithmetic: "fast/1".into(),
            layout: KvLayout {
                layers: 2,
                kv_heads: 1,
                head_dim: 8,
                block_tokens: 8,
                dtype: KvDtype::F16,
            },
            adapter: None,
            tenant_salt: String::new(),
        }),
        capacity_blocks: 16,
        context_tokens_max: 64,
    }
}

/// A prefill and a decode node on two hosts, in order.
fn answers() -> Answers {
    let records = [record("p", Role::Prefill), record("d", Role::Decode)];
    let status = |record: &NodeRecord| NodeStatus {
        record: record.clone(),
        load: Some(LoadReport::default()),
        connected: true,
        indexed_blocks: 0,
    };
    let answered = |record: &NodeRecord| Answered {
        record: record.clone(),
        info: Ok(NodeInfo {
            record: record.clone(),
            version: "0.1.0".into(),
            unix_time_ms: None,
        }),
        serving: Ok(true),
        clock: Some(Clock {
            ahead_ms: 3,
            error_ms: 2,
        }),
    };
    let described = |record: &NodeRecord| Described {
        said: Ok(TransferDescription {
            endpoint: record.transfer_endpoint.clone(),
            movers: ucx(true),
            links: Vec::new(),
            host: HostFacts {
                boot_id: record.id.to_string(),
                ..roce()
            },
        }),
        record: record.clone(),
    };
    Answers {
        router: "127.0.0.1:50051".into(),
        status: Ok(ClusterStatus {
            nodes: records.iter().map(status).collect(),
            requests_running: 0,
            requests_waiting: 0,
        }),
        took: std::time::Duration::from_millis(3),
        nodes: records.iter().map(answered).collect(),
        transfers: records.iter().map(described).collect(),
    }
}

fn said(answers: &mut Answers, node: usize) -> &mut TransferDescription {
    answers.transfers[node].said.as_mut().expect("it answers")
}

#[test]
fn a_healthy_cluster_passes() {
    assert_eq!(bad(&cluster::judge(&answers())), []);
}

#[test]
fn each_trouble_of_a_cluster_is_found() {
    type Trouble = fn(&mut Answers);
    let cases: [(Trouble, Level, &str); 13] = [
        (
            |all| all.status = Err(Error::unavailable("refused")),
            Level::Failed,
            "127.0.0.1:50051 does not answer",
        ),
        (
            |all| drop(all.status.as_mut().expect("ok").nodes.pop()),
            Level::Failed,
            "without a decode node",
        ),
        (
            |all| all.status.as_mut().expect("ok").nodes[0].connected = false,
            Level::Failed,
            "no connection to it",
        ),
        (
            |all| {
                let load = LoadReport {
                    draining: true,
                    ..LoadReport::default()
                };
                all.status.as_mut().expect("ok").nodes[1].load = Some(load);
            },
            Level::Warning,
            "draining",
        ),
        (
            |all| all.nodes[1].info = Err(Error::unavailable("gone")),
            Level::Failed,
            "d:1 does not answer",
        ),
        (
            |all| all.nodes[1].record.epoch = Epoch(4),
            Level::Failed,
            "a member at epoch",
        ),
        (
            |all| all.nodes[0].serving = Ok(false),
            Level::Failed,
            "takes no requests",
        ),
        (
            |all| all.nodes[0].info.as_mut().expect("ok").version = "0.2.0".into(),
            Level::Failed,
            "0.1.0 on d; 0.2.0 on p",
        ),
        (
            |all| {
                all.nodes[1].clock = Some(Clock {
                    ahead_ms: -61_000,
                    error_ms: 2,
                });
            },
            Level::Failed,
            "its clock is 61.0 s behind this machine's",
        ),
        (
            |all| all.nodes[1].record.kv_space.as_mut().expect("some").model_digest = "11".into(),
            Level::Failed,
            "d and p serve tiny with blocks of different kinds",
        ),
        (
            |all| all.transfers[0].said = Err(Error::new(ErrorCode::Timeout, "late")),
            Level::Failed,
            "does not say how it moves blocks",
        ),
        (
            |all| {
                let other = said(all, 0).host.boot_id.clone();
                said(all, 1).host.boot_id = other;
                said(all, 1).host.ipc_namespace = Some(2);
            },
            Level::Warning,
            "different IPC namespaces",
        ),
        (
            |all| said(all, 1).host.rdma_devices[0].ports[0].mtu_bytes = Some(4200),
            Level::Failed,
            "MTUs of 9000 and 4200 bytes",
        ),
    ];
    for (trouble, level, message) in cases {
        let mut answers = answers();
        trouble(&mut answers);
        let findings = cluster::judge(&answers);
        let bad = bad(&findings);
        assert_eq!(bad.len(), 1, "{message}: {findings:?}");
        assert!(
            bad[0].0 == level && bad[0].1.contains(message),
            "{message}: {bad:?}"
        );
    }
}

/// Both nodes use TCP to each other, and so does one to a peer that has left.
fn with_obstacles() -> Answers {
    let mut answers = answers();
    for (node, peer) in [(0, "d"), (1, "p"), (0, "left-long-ago")] {
        said(&mut answers, node).links.push(TransferLink {
            endpoint: format!("tcp://{peer}:3"),
            mover: "tcp".into(),
            obstacle: "UCX has nothing but TCP".into(),
            ..TransferLink::default()
        });
    }
    answers
}

#[test]
fn the_obstacle_of_a_pair_is_told_once_for_all_that_have_it() {
    let merged = merge(cluster::judge(&with_obstacles()));
    let warnings: Vec<_> = merged
        .iter()
        .filter(|finding| finding.level == Level::Warning)
        .collect();
    assert_eq!(warnings.len(), 1, "{merged:?}");
    assert_eq!(warnings[0].subjects, ["p -> d", "d -> p"]);
    assert_eq!(warnings[0].message, "uses tcp: UCX has nothing but TCP");
}

#[test]
fn an_obstacle_is_no_warning_where_nothing_better_could_be() {
    let mut without_adapters = with_obstacles();
    for node in [0, 1] {
        said(&mut without_adapters, node).host.rdma_devices.clear();
    }
    assert_eq!(bad(&cluster::judge(&without_adapters)), []);
    // That a node lacks UCX is said of the node, and once.
    let mut without_ucx = with_obstacles();
    said(&mut without_ucx, 1).movers = ucx(false);
    let found = cluster::judge(&without_ucx);
    assert_eq!(
        bad(&found),
        [(Level::Warning, "ucx cannot be used: libucp.so.0 was not found")]
    );
}

#[test]
fn what_a_pair_uses_is_told() {
    let mut answers = answers();
    said(&mut answers, 0).links.push(TransferLink {
        endpoint: "tcp://d:3".into(),
        mover: "ucx".into(),
        lanes: vec!["rc_mlx5".into(), "self".into()],
        ..TransferLink::default()
    });
    let found = cluster::judge(&answers);
    let told = found
        .iter()
        .find(|finding| finding.subjects == ["p -> d"])
        .expect("the pair is told");
    assert_eq!(
        (told.level, told.message.as_str()),
        (Level::Passed, "uses ucx over rc_mlx5, self")
    );
}

#[test]
fn findings_are_shown_by_group_with_what_to_do() {
    let findings = [
        Finding::passed("nodes", "p", "is ready"),
        Finding::warning("nodes", "d", "is draining", "perigee node resume d"),
        Finding::failed("transfers", "", "no port is active", "check the cable"),
    ];
    golden::check("check", &view(&findings));
}

#[test]
fn many_subjects_are_counted() {
    let names: Vec<String> = (0..8).map(|index| format!("n{index}")).collect();
    assert_eq!(subjects(&names), "n0, n1, n2, n3, n4, n5 and 2 more: ");
    assert_eq!(subjects(&names[..2]), "n0, n1: ");
    assert_eq!(subjects(&[]), "");
}
