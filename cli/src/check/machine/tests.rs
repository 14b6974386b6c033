use types::{KvDtype, KvLayout, Role};

use super::*;
use crate::check::{Level, merge, view};
use crate::node_admin::tests::node;
use crate::output::golden;

fn space(digest: &str, block_tokens: usize) -> KvSpace {
    KvSpace {
        model_digest: digest.repeat(32),
        arithmetic: "fast/1".into(),
        layout: KvLayout {
            layers: 2,
            kv_heads: 1,
            head_dim: 8,
            block_tokens,
            dtype: KvDtype::F16,
        },
        adapter: None,
        tenant_salt: String::new(),
    }
}

fn members() -> Vec<NodeRecord> {
    let mut record = node("decode-0", Role::Decode).record;
    record.kv_space = Some(space("ab", 32));
    vec![record]
}

fn registry(error: Option<&str>, members: Option<Result<usize, String>>) -> RegistryFacts {
    RegistryFacts {
        url: "etcd://10.0.0.1:2379,10.0.0.2:2379".into(),
        endpoints: vec![
            ("10.0.0.1:2379".into(), error.map(str::to_owned)),
            ("10.0.0.2:2379".into(), error.map(str::to_owned)),
        ],
        members,
    }
}

fn port(setting: &'static str, port: u16, endpoint: &str, state: PortState) -> PortFacts {
    PortFacts {
        setting,
        port,
        endpoint: endpoint.into(),
        state,
    }
}

fn disk(capacity: u64, free: Result<u64, String>) -> DiskFacts {
    DiskFacts {
        path: "/var/lib/perigee".into(),
        capacity,
        used: 1 << 20,
        free,
    }
}

fn limited() -> HostFacts {
    HostFacts {
        memlock_bytes: Some(65_536),
        ..HostFacts::default()
    }
}

#[test]
fn a_healthy_machine_is_told_so() {
    let mut findings = judge_registry(&registry(None, Some(Ok(3))));
    findings.push(judge_disk(&disk(4 << 20, Ok(8 << 20))));
    findings.extend(judge_memlock(&HostFacts::default(), Transport::Ucx, 1 << 30));
    let free = port("node.http_port", 8080, "a:8080", PortState::Free);
    let own = port("node.grpc_port", 1, "decode-0:1", PortState::Taken(None));
    findings.extend([free, own].iter().map(|port| judge_port(port, &members())));
    findings.extend(judge_model("m.gguf", "tiny", &Ok(space("ab", 32)), &members()));
    assert!(
        findings.iter().all(|finding| finding.level == Level::Passed),
        "{findings:?}"
    );
    golden::check("doctor-healthy", &view(&merge(findings)));
}

#[test]
fn each_mistake_is_told_with_its_remedy() {
    let mut findings = judge_registry(&registry(Some("connection refused"), None));
    findings.push(judge_disk(&disk(4 << 20, Ok(1 << 20))));
    findings.extend(judge_memlock(&limited(), Transport::Ucx, 1 << 30));
    let holder = Some("nginx (4711)".to_owned());
    let taken = port("node.http_port", 8080, "a:8080", PortState::Taken(holder));
    let refused = port(
        "node.grpc_port",
        80,
        "a:80",
        PortState::Refused("permission denied".into()),
    );
    findings.extend([taken, refused].iter().map(|port| judge_port(port, &members())));
    findings.extend(judge_model("m.gguf", "tiny", &Ok(space("cd", 32)), &members()));
    assert!(
        findings
            .iter()
            .all(|finding| finding.level == Level::Failed && !finding.hint.is_empty()),
        "{findings:?}"
    );
    golden::check("doctor-sick", &view(&merge(findings)));
}

#[test]
fn what_a_registry_says_decides_once_it_listens() {
    let levels = |facts| {
        judge_registry(&facts)
            .iter()
            .map(|finding| finding.level)
            .collect::<Vec<_>>()
    };
    assert_eq!(levels(RegistryFacts::default()), [Level::Passed]);
    assert_eq!(
        levels(registry(None, Some(Err("no leader".into())))),
        [Level::Failed]
    );
    let mut half = registry(None, Some(Ok(1)));
    half.endpoints[0].1 = Some("timed out".into());
    assert_eq!(levels(half), [Level::Warning, Level::Passed]);
}

#[test]
fn a_model_is_compared_with_nodes_of_its_name_alone() {
    let judged = |name: &str, own: &Result<KvSpace, String>| judge_model("m.gguf", name, own, &members());
    assert_eq!(judged("another", &Ok(space("cd", 32))), None);
    let blocks = judged("tiny", &Ok(space("ab", 64))).expect("judged");
    assert!(
        blocks.level == Level::Failed && blocks.message.contains("kv.block_tokens here is 64"),
        "{blocks:?}"
    );
    let unreadable = judged("another", &Err("it ends early".into())).expect("judged");
    assert_eq!(unreadable.level, Level::Failed);
}

#[test]
fn a_limit_counts_where_somebody_has_to_lock() {
    let level =
        |facts: &HostFacts, transport| judge_memlock(facts, transport, 1 << 30).map(|finding| finding.level);
    assert_eq!(level(&limited(), Transport::Ucx), Some(Level::Failed));
    assert_eq!(level(&limited(), Transport::Auto), Some(Level::Passed));
    assert_eq!(
        judge_disk(&disk(1, Err("no such folder".into()))).level,
        Level::Failed
    );
}
