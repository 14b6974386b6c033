use std::slice;

use kv_store::follower::Applied;
use proptest::prelude::*;
use types::{BlockEvent, KvDtype, KvLayout, Tier};

use super::*;
use crate::policy::PolicyName;

fn space() -> KvSpace {
    KvSpace {
        model_digest: "d".into(),
        arithmetic: "fast-1".into(),
        layout: KvLayout {
            layers: 2,
            kv_heads: 1,
            head_dim: 8,
            block_tokens: 8,
            dtype: KvDtype::F16,
        },
        adapter: None,
        tenant_salt: String::new(),
    }
}

fn record(id: &str, role: Role, epoch: u64) -> NodeRecord {
    NodeRecord {
        id: id.into(),
        epoch: Epoch(epoch),
        role,
        grpc_endpoint: "127.0.0.1:1".into(),
        http_endpoint: String::new(),
        transfer_endpoint: String::new(),
        model: "m".into(),
        kv_space: (role != Role::Router).then(space),
        capacity_blocks: 10,
        context_tokens_max: 100,
    }
}

fn members(records: &[NodeRecord]) -> BTreeMap<NodeId, NodeRecord> {
    records
        .iter()
        .map(|record| (record.id.clone(), record.clone()))
        .collect()
}

fn cluster() -> Cluster {
    let policy = PolicyName::Perigee.build();
    Cluster::new("m", "d", 1000, Priors::default(), policy, Settings::default())
}

fn stored(tokens: &[u32]) -> Applied {
    let parent = space().root();
    Applied {
        reset: false,
        events: vec![BlockEvent::Stored {
            hash: parent.child(tokens),
            parent,
            tier: Tier::Host,
        }],
    }
}

fn report() -> LoadReport {
    LoadReport {
        free_blocks: 100,
        ..LoadReport::default()
    }
}

fn place(cluster: &mut Cluster, failed: &BTreeMap<NodeId, Epoch>) -> Result<Assignment, NoPlacement> {
    with_query(failed, |query| cluster.place(&space(), query, Instant::now()))
}

fn with_query<T>(failed: &BTreeMap<NodeId, Epoch>, ask: impl FnOnce(&Query<'_>) -> T) -> T {
    ask(&Query {
        hashes: &[],
        key: BlockHash::default(),
        prompt_tokens: 5,
        failed,
        slo: Slo::default(),
        answer: &Answer {
            tenant: String::new(),
            tokens: 0,
            tokens_max: 100,
        },
        draw: 0,
    })
}

#[test]
fn a_member_takes_requests_from_its_first_report_until_its_stream_breaks() {
    let mut cluster = cluster();
    let node = record("d0", Role::Decode, 1);
    assert_eq!(
        cluster.registry(&members(slice::from_ref(&node))),
        vec![Change::Follow(Box::new(node.clone()))]
    );
    assert!(cluster.registry(&members(slice::from_ref(&node))).is_empty());
    assert!(place(&mut cluster, &BTreeMap::new()).is_err());
    cluster.reported(&node.id, Epoch(1), report(), Instant::now());
    let assignment = place(&mut cluster, &BTreeMap::new()).expect("it reports");
    assert_eq!((assignment.decode, assignment.prefill), (node.clone(), None));
    assert!(
        cluster.report_stream_ended(&node.id, Epoch(1)),
        "it is still a member"
    );
    assert!(place(&mut cluster, &BTreeMap::new()).is_err());
}

#[test]
fn an_explanation_is_of_the_next_placement_and_changes_nothing() {
    for name in PolicyName::ALL {
        let mut cluster = Cluster::new(
            "m",
            "d",
            1000,
            Priors::default(),
            name.build(),
            Settings::default(),
        );
        let nodes = [
            record("d0", Role::Decode, 1),
            record("d1", Role::Decode, 1),
            record("p0", Role::Prefill, 1),
            record("p1", Role::Prefill, 1),
            record("p2", Role::Prefill, 1),
        ];
        cluster.registry(&members(&nodes));
        let now = Instant::now();
        for node in &nodes {
            cluster.reported(&node.id, Epoch(1), report(), now);
        }
        let nobody = BTreeMap::new();
        for turn in 0..7 {
            let explained = with_query(&nobody, |query| {
                [(); 3].map(|()| cluster.explain(&space(), query, now).expect("it reports"))
            });
            let placed =
                with_query(&nobody, |query| cluster.place(&space(), query, now)).expect("it reports");
            for explained in &explained {
                assert_eq!(*explained, placed.explanation, "{name:?}, placement {turn}");
            }
        }
    }
}

#[test]
fn a_member_that_left_the_registry_stays_while_it_talks() {
    let mut cluster = cluster();
    let node = record("d0", Role::Decode, 1);
    cluster.registry(&members(slice::from_ref(&node)));
    cluster.reported(&node.id, Epoch(1), report(), Instant::now());
    cluster.logged(&node.id, Epoch(1), &stored(&[1]));
    assert!(cluster.registry(&members(&[])).is_empty());
    assert!(place(&mut cluster, &BTreeMap::new()).is_ok());
    assert!(cluster.log_stream_ended(&node.id, Epoch(1)));
    assert!(!cluster.report_stream_ended(&node.id, Epoch(1)));
    assert!(cluster.status().is_empty());
    assert!(cluster.index().is_empty());
}

#[test]
fn a_member_that_is_silent_and_leaves_is_gone() {
    let mut cluster = cluster();
    let node = record("d0", Role::Decode, 1);
    cluster.registry(&members(slice::from_ref(&node)));
    assert_eq!(cluster.registry(&members(&[])), vec![Change::Unfollow(node.id)]);
    assert!(cluster.status().is_empty());
}

#[test]
fn a_new_incarnation_starts_from_nothing() {
    let mut cluster = cluster();
    let old = record("d0", Role::Decode, 1);
    cluster.registry(&members(slice::from_ref(&old)));
    cluster.reported(&old.id, Epoch(1), report(), Instant::now());
    cluster.logged(&old.id, Epoch(1), &stored(&[1]));
    let failed = BTreeMap::from([(old.id.clone(), Epoch(1))]);
    assert!(place(&mut cluster, &failed).is_err());

    let new = record("d0", Role::Decode, 2);
    assert_eq!(
        cluster.registry(&members(slice::from_ref(&new))),
        vec![Change::Follow(Box::new(new.clone()))]
    );
    assert!(cluster.index().is_empty());
    // What the old one's streams still deliver is of no interest.
    cluster.logged(&old.id, Epoch(1), &stored(&[1]));
    cluster.reported(&old.id, Epoch(1), report(), Instant::now());
    assert!(cluster.index().is_empty());
    assert!(!cluster.report_stream_ended(&old.id, Epoch(1)));
    assert!(place(&mut cluster, &BTreeMap::new()).is_err());
    // The failure was the old one's.
    cluster.reported(&new.id, Epoch(2), report(), Instant::now());
    assert!(place(&mut cluster, &failed).is_ok());
    // A registry that lags does not bring the old one back.
    assert!(cluster.registry(&members(&[old])).is_empty());
    assert_eq!(cluster.status()[0].record, new);
}

#[test]
fn other_weights_under_the_model_s_name_get_nothing() {
    let mut cluster = cluster();
    let mut node = record("d0", Role::Decode, 1);
    node.kv_space = Some(KvSpace {
        model_digest: "other".into(),
        ..space()
    });
    cluster.registry(&members(slice::from_ref(&node)));
    cluster.reported(&node.id, Epoch(1), report(), Instant::now());
    assert_eq!(cluster.kv_space(), None);
    assert_eq!(cluster.strangers().count(), 1);
    assert!(place(&mut cluster, &BTreeMap::new()).is_err());
}

#[test]
fn routers_are_known_and_not_followed() {
    let mut cluster = cluster();
    assert!(
        cluster
            .registry(&members(&[record("r1", Role::Router, 1)]))
            .is_empty()
    );
    assert!(cluster.status()[0].connected);
}

#[test]
fn a_log_that_goes_on_without_news_is_followed() {
    let mut cluster = cluster();
    let node = record("d0", Role::Decode, 1);
    cluster.registry(&members(slice::from_ref(&node)));
    cluster.reported(&node.id, Epoch(1), report(), Instant::now());
    cluster.logged(&node.id, Epoch(1), &stored(&[1]));
    cluster.log_stream_ended(&node.id, Epoch(1));
    assert!(!cluster.status()[0].connected);
    cluster.log_resumed(&node.id, Epoch(1));
    assert!(cluster.status()[0].connected);
    assert_eq!(cluster.status()[0].indexed_blocks, 1);
}

#[derive(Debug, Clone)]
enum Op {
    Registry(Vec<(u8, u64)>),
    Reported(u8, u64),
    Logged(u8, u64, u32, bool),
    ReportsEnded(u8, u64),
    LogEnded(u8, u64),
    Place(Vec<(u8, u64)>),
}

fn op() -> impl Strategy<Value = Op> {
    let node = || (0u8..4, 1u64..4);
    prop_oneof![
        prop::collection::vec(node(), 0..5).prop_map(Op::Registry),
        node().prop_map(|(n, e)| Op::Reported(n, e)),
        (node(), 0u32..20, any::<bool>()).prop_map(|((n, e), token, reset)| Op::Logged(n, e, token, reset)),
        node().prop_map(|(n, e)| Op::ReportsEnded(n, e)),
        node().prop_map(|(n, e)| Op::LogEnded(n, e)),
        prop::collection::vec(node(), 0..3).prop_map(Op::Place),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_the_state_is_sound(ops in prop::collection::vec(op(), 0..80)) {
        let mut cluster = cluster();
        let id = |n: u8| NodeId::new(format!("n{n}"));
        let role = |n: u8| [Role::Decode, Role::Prefill, Role::Store, Role::Router][usize::from(n)];
        for op in ops {
            match op {
                Op::Registry(nodes) => {
                    let records: Vec<_> =
                        nodes.iter().map(|(n, e)| record(id(*n).as_str(), role(*n), *e)).collect();
                    cluster.registry(&members(&records));
                }
                Op::Reported(n, e) => cluster.reported(&id(n), Epoch(e), report(), Instant::now()),
                Op::Logged(n, e, token, reset) => {
                    cluster.logged(&id(n), Epoch(e), &Applied { reset, ..stored(&[token]) });
                }
                Op::ReportsEnded(n, e) => {
                    cluster.report_stream_ended(&id(n), Epoch(e));
                }
                Op::LogEnded(n, e) => {
                    cluster.log_stream_ended(&id(n), Epoch(e));
                }
                Op::Place(failed) => {
                    let failed: BTreeMap<_, _> = failed.into_iter().map(|(n, e)| (id(n), Epoch(e))).collect();
                    if let Ok(assignment) = place(&mut cluster, &failed) {
                        let decode = assignment.decode;
                        prop_assert_ne!(failed.get(&decode.id), Some(&decode.epoch));
                        let status = cluster.status();
                        let known = status.iter().find(|member| member.record == decode);
                        prop_assert!(known.is_some_and(|member| member.load.is_some()));
                    }
                }
            }
            cluster.check_integrity();
        }
    }
}

#[test]
fn room_is_what_may_queue_at_the_nodes_that_prefill() {
    let now = Instant::now();
    let mut cluster = cluster();
    // A node that cannot be reached takes nothing, but who has nowhere to go must learn that.
    assert_eq!(cluster.room(), Room::UNBOUNDED);
    let prefill = record("p", Role::Prefill, 1);
    let decode = record("d", Role::Decode, 1);
    cluster.registry(&members(&[prefill.clone(), decode.clone()]));
    let report = |queued_prefill_tokens| LoadReport {
        queued_prefill_tokens,
        prefill_ms_per_token: 2.0,
        ..LoadReport::default()
    };
    cluster.reported(&decode.id, decode.epoch, report(0), now);
    assert_eq!(
        cluster.room().prompt_tokens,
        1_000,
        "two seconds of the decode node"
    );
    cluster.reported(&prefill.id, prefill.epoch, report(400), now);
    assert_eq!(cluster.room().prompt_tokens, 600);
    cluster.reported(&prefill.id, prefill.epoch, report(4_000), now);
    assert_eq!(cluster.room().prompt_tokens, 0);
}
