//! The rules, and how a registry is named. What both registries promise is tested in `tests/registry.rs`.

use rstest::rstest;
use types::{Epoch, KvDtype, KvLayout, KvSpace, Role};

use super::rules::admit;
use super::*;

pub(super) fn record(id: &str, epoch: u64, model: &str, block_tokens: usize) -> NodeRecord {
    NodeRecord {
        id: NodeId::new(id),
        epoch: Epoch(epoch),
        role: Role::Decode,
        grpc_endpoint: "127.0.0.1:1".to_owned(),
        http_endpoint: "127.0.0.1:2".to_owned(),
        transfer_endpoint: "tcp://127.0.0.1:3".to_owned(),
        model: model.to_owned(),
        kv_space: Some(KvSpace {
            model_digest: "d1".to_owned(),
            arithmetic: "fast/v1".to_owned(),
            layout: KvLayout {
                layers: 2,
                kv_heads: 1,
                head_dim: 8,
                block_tokens,
                dtype: KvDtype::F16,
            },
            adapter: None,
            tenant_salt: String::new(),
        }),
        capacity_blocks: 8,
        context_tokens_max: 128,
    }
}

fn members(records: impl IntoIterator<Item = NodeRecord>) -> BTreeMap<NodeId, NodeRecord> {
    records
        .into_iter()
        .map(|record| (record.id.clone(), record))
        .collect()
}

fn refused(members: &BTreeMap<NodeId, NodeRecord>, record: &NodeRecord) -> Error {
    admit(members, record).expect_err("must be refused").into()
}

#[test]
fn nodes_of_one_model_must_agree_and_those_of_others_need_not() {
    let members = members([record("decode-0", 1, "smollm2", 32)]);
    admit(&members, &record("decode-1", 1, "smollm2", 32)).expect("agrees");
    admit(&members, &record("decode-1", 1, "llama", 64)).expect("another model");
    let router = NodeRecord {
        kv_space: None,
        ..record("router-0", 1, "smollm2", 64)
    };
    admit(&members, &router).expect("a router has no blocks");
    let error = refused(&members, &record("decode-1", 1, "smollm2", 64));
    assert_eq!(error.code, ErrorCode::Conflict);
    for part in [
        "decode-0",
        "decode-1",
        "smollm2",
        "block_tokens is 32 there and 64 here",
    ] {
        assert!(error.message.contains(part), "{error}");
    }
    assert!(!error.message.contains("head_dim"), "{error}");
}

#[rstest]
#[case("model_digest is d1 there and d2 here", |space: &mut KvSpace| space.model_digest = "d2".to_owned())]
#[case("arithmetic is fast/v1 there and exact here", |space: &mut KvSpace| space.arithmetic = "exact".to_owned())]
#[case("layers is 2 there and 3 here", |space: &mut KvSpace| space.layout.layers = 3)]
#[case("kv_heads is 1 there and 3 here", |space: &mut KvSpace| space.layout.kv_heads = 3)]
#[case("head_dim is 8 there and 3 here", |space: &mut KvSpace| space.layout.head_dim = 3)]
#[case("dtype is F16 there and F32 here", |space: &mut KvSpace| space.layout.dtype = KvDtype::F32)]
#[case("adapter is none there and law here", |space: &mut KvSpace| space.adapter = Some("law".to_owned()))]
#[case("tenant_salt is \"\" there and \"x\" here", |space: &mut KvSpace| space.tenant_salt = "x".to_owned())]
fn every_setting_that_differs_is_a_conflict_and_named(#[case] says: &str, #[case] change: fn(&mut KvSpace)) {
    let members = members([record("decode-0", 1, "smollm2", 32)]);
    let mut other = record("decode-1", 1, "smollm2", 32);
    change(other.kv_space.as_mut().expect("has one"));
    let error = refused(&members, &other);
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.message.contains(says), "{error}");
}

#[test]
fn only_a_newer_incarnation_replaces_a_node_and_it_may_change_its_settings() {
    let members = members([record("decode-0", 5, "smollm2", 32)]);
    let error = refused(&members, &record("decode-0", 4, "smollm2", 32));
    assert_eq!(error.code, ErrorCode::Fenced);
    assert!(
        error.message.contains("epoch 4") && error.message.contains("epoch 5"),
        "{error}"
    );
    admit(&members, &record("decode-0", 5, "smollm2", 32)).expect("the same again, after a lost lease");
    admit(&members, &record("decode-0", 6, "smollm2", 64)).expect("nobody is left who could disagree");
}

#[test]
fn a_name_that_breaks_keys_is_refused() {
    let error = refused(&BTreeMap::new(), &record("../decode-0", 1, "smollm2", 32));
    assert_eq!(error.code, ErrorCode::Invalid);
}

#[rstest]
#[case("localhost:2379")]
#[case("consul://localhost:8500")]
#[case("etcd://")]
#[case("etcd://host:port")]
#[case("etcd://a:1,,b:2")]
#[case("perigee://")]
#[case("perigee://localhost")]
#[tokio::test]
async fn an_address_that_is_no_registry_is_refused(#[case] url: &str) {
    let result = connect(url, &Config::default(), CancellationToken::new()).await;
    let error = result.expect_err("must be refused");
    assert_eq!(error.code(), ErrorCode::Invalid, "{error}");
}

#[rstest]
#[case(Config { cluster: "a/b".to_owned(), ..Config::default() })]
#[case(Config { lease_ttl: Duration::ZERO, ..Config::default() })]
#[case(Config { lease_ttl: Duration::MAX, ..Config::default() })]
#[tokio::test]
async fn a_setting_that_makes_no_sense_is_refused(#[case] config: Config) {
    let result = connect("etcd://localhost", &config, CancellationToken::new()).await;
    let error = result.expect_err("must be refused");
    assert_eq!(error.code(), ErrorCode::Invalid, "{error}");
}
