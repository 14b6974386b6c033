use types::{Epoch, LoadReport, Role};

use super::*;
use crate::output::golden;

/// A node that is ready.
pub(crate) fn node(id: &str, role: Role) -> NodeStatus {
    NodeStatus {
        record: NodeRecord {
            id: NodeId::new(id),
            epoch: Epoch(7),
            role,
            grpc_endpoint: format!("{id}:1"),
            http_endpoint: format!("{id}:2"),
            transfer_endpoint: format!("tcp://{id}:3"),
            model: "tiny".into(),
            kv_space: None,
            capacity_blocks: 100,
            context_tokens_max: 0,
        },
        load: Some(LoadReport::default()),
        connected: true,
        indexed_blocks: 40,
    }
}

#[test]
fn a_node_finds_itself_by_what_it_listens_on() {
    let at = |listen: &str, grpc_port| {
        let settings = NodeSettings {
            listen: listen.parse().expect("an address"),
            grpc_port,
            // Where others reach it need not be reachable from itself.
            advertise: "pod.example".into(),
            ..NodeSettings::default()
        };
        own_address(&settings).map(|address| address.to_string())
    };
    assert_eq!(at("0.0.0.0", 50051), Ok("127.0.0.1:50051".into()));
    assert_eq!(at("::", 50051), Ok("[::1]:50051".into()));
    assert_eq!(at("10.0.0.7", 9), Ok("10.0.0.7:9".into()));
    assert_eq!(at("127.0.0.1", 0).expect_err("unknown").code, ErrorCode::Invalid);
}

#[test]
fn an_unknown_node_is_answered_with_those_there_are() {
    let members = [node("a", Role::Store), node("b", Role::Router)];
    assert_eq!(find(&members, "b").expect("there").record.id.as_str(), "b");
    let error = find(&members, "d").expect_err("not there");
    assert_eq!(
        (error.code, error.message.as_str()),
        (ErrorCode::NotFound, "no node is named d; there are: a, b")
    );
}

#[test]
fn a_node_that_is_cordoned_is_told() {
    golden::check("node-cordon", &cordoned(&NodeId::new("decode-0")));
}

#[test]
fn a_node_that_takes_requests_again_is_told() {
    golden::check("node-resume", &resumed(&NodeId::new("decode-0")));
}
