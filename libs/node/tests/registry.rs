//! What a registry promises, of both implementations alike.

#[path = "registry/embedded.rs"]
mod embedded;
#[path = "registry/etcd.rs"]
mod etcd;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use node::registry::{Config, Members, Registration, Registry, RegistryError, State, connect};
use rstest::rstest;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use types::{Epoch, ErrorCode, KvDtype, KvLayout, KvSpace, NodeId, NodeRecord, Role, TenantQuota};

/// Longer than anything here takes; a test that waits for it has failed.
const DEADLINE: Duration = Duration::from_secs(60);
/// Short enough to wait for its end, long enough to be kept alive on a machine with more work than cores.
const LEASE_TTL: Duration = Duration::from_secs(3);
/// Never ends within a test.
const LONG_LEASE_TTL: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy)]
enum Kind {
    Etcd,
    Embedded,
}

enum Server {
    Etcd(etcd::Etcd),
    Embedded(embedded::Embedded),
}

impl Server {
    fn start(kind: Kind) -> Self {
        match kind {
            Kind::Etcd => Self::Etcd(etcd::Etcd::start()),
            Kind::Embedded => Self::Embedded(embedded::Embedded::start()),
        }
    }

    fn url(&self) -> String {
        match self {
            Self::Etcd(etcd) => etcd.url(),
            Self::Embedded(embedded) => embedded.url(),
        }
    }

    fn kill(&mut self) {
        match self {
            Self::Etcd(etcd) => etcd.kill(),
            Self::Embedded(embedded) => embedded.kill(),
        }
    }

    fn resume(&mut self) {
        match self {
            Self::Etcd(etcd) => etcd.resume(),
            Self::Embedded(embedded) => embedded.resume(),
        }
    }

    async fn client(&self) -> Client {
        self.client_with(LEASE_TTL).await
    }

    async fn client_with(&self, lease_ttl: Duration) -> Client {
        let config = Config {
            lease_ttl,
            connect_deadline: DEADLINE,
            ..Config::default()
        };
        let shutdown = CancellationToken::new();
        let registry = connect(&self.url(), &config, shutdown.clone())
            .await
            .expect("connects");
        Client {
            members: registry.watch(),
            registry,
            _shutdown: shutdown.drop_guard(),
        }
    }
}

/// What one process of a cluster has.
struct Client {
    registry: Arc<dyn Registry>,
    members: watch::Receiver<Arc<Members>>,
    _shutdown: DropGuard,
}

impl Client {
    async fn register(&self, record: NodeRecord) -> Registration {
        self.registry.register(record).await.expect("is admitted")
    }

    async fn refusal(&self, record: NodeRecord) -> RegistryError {
        self.registry.register(record).await.expect_err("must be refused")
    }

    /// Waits until the members are exactly these.
    async fn sees(&self, ids: &[&str]) {
        let expected: Vec<_> = ids.iter().map(|id| NodeId::new(*id)).collect();
        self.until(|members| members.connected && members.nodes.keys().eq(&expected))
            .await;
    }

    async fn until(&self, holds: impl Fn(&Members) -> bool) -> Arc<Members> {
        let mut members = self.members.clone();
        let reached = members.wait_for(|members| holds(members));
        match tokio::time::timeout(DEADLINE, reached).await {
            Ok(members) => Arc::clone(&members.expect("followed")),
            Err(_) => panic!("never reached; the last state is {:?}", self.members.borrow()),
        }
    }
}

async fn reaches(registration: &Registration, holds: impl Fn(&State) -> bool) -> State {
    let mut state = registration.state();
    let reached = state.wait_for(|state| holds(state));
    let reached = tokio::time::timeout(DEADLINE, reached).await;
    reached.expect("is reached").expect("is kept").clone()
}

fn record(id: &str, epoch: u64, block_tokens: usize) -> NodeRecord {
    NodeRecord {
        id: NodeId::new(id),
        epoch: Epoch(epoch),
        role: Role::Decode,
        grpc_endpoint: "127.0.0.1:1".to_owned(),
        http_endpoint: "127.0.0.1:2".to_owned(),
        transfer_endpoint: "tcp://127.0.0.1:3".to_owned(),
        model: "smollm2".to_owned(),
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

#[rstest]
#[case(Kind::Etcd)]
#[case(Kind::Embedded)]
#[tokio::test]
async fn members_are_seen_by_all_and_leave_when_they_say_so(#[case] kind: Kind) {
    let server = Server::start(kind);
    let here = server.client_with(LONG_LEASE_TTL).await;
    let first = here.register(record("decode-0", 1, 32)).await;
    let there = server.client().await;
    there.sees(&["decode-0"]).await;
    let _second = there.register(record("decode-1", 1, 32)).await;
    let members = here.until(|members| members.nodes.len() == 2).await;
    assert_eq!(members.nodes[&NodeId::new("decode-1")], record("decode-1", 1, 32));

    first.unregister().await.expect("answers");
    there.sees(&["decode-1"]).await;
}

#[rstest]
#[case(Kind::Etcd)]
#[case(Kind::Embedded)]
#[tokio::test]
async fn what_is_set_for_tenants_is_seen_by_all_and_by_those_who_come_later(#[case] kind: Kind) {
    let server = Server::start(kind);
    let (here, there) = (server.client().await, server.client().await);
    let quota = |bytes_max, weight| TenantQuota {
        bytes_max,
        weight: NonZeroU32::new(weight),
    };
    let set = async |tenant: &str, quota| here.registry.put_quota(tenant, quota).await;
    set("acme/sub", quota(Some(1 << 30), 2)).await.expect("is set");
    set("", quota(Some(0), 0)).await.expect("is set");
    let both = [
        (String::new(), quota(Some(0), 0)),
        ("acme/sub".to_owned(), quota(Some(1 << 30), 2)),
    ];
    there
        .until(|members| members.quotas == BTreeMap::from(both.clone()))
        .await;
    set("", TenantQuota::default()).await.expect("is removed");
    there
        .until(|members| members.quotas == BTreeMap::from([both[1].clone()]))
        .await;
    let late = server.client().await;
    assert_eq!(late.members.borrow().quotas, BTreeMap::from([both[1].clone()]));
    assert!(late.members.borrow().nodes.is_empty(), "a quota is no member");
    let refused = set("a\nb", quota(Some(1), 1)).await.expect_err("must be refused");
    assert_eq!(refused.code(), ErrorCode::Invalid);
}

#[rstest]
#[case(Kind::Etcd)]
#[case(Kind::Embedded)]
#[tokio::test]
async fn a_member_that_dies_leaves_with_its_lease(#[case] kind: Kind) {
    let server = Server::start(kind);
    let client = server.client().await;
    let lives = client.register(record("decode-0", 1, 32)).await;
    let dies = client.register(record("decode-1", 1, 32)).await;
    client.sees(&["decode-0", "decode-1"]).await;
    drop(dies);
    client.sees(&["decode-0"]).await;
    assert_eq!(*lives.state().borrow(), State::Registered);
}

#[rstest]
#[case(Kind::Etcd)]
#[case(Kind::Embedded)]
#[tokio::test]
async fn a_disagreeing_node_is_refused_until_the_others_have_left(#[case] kind: Kind) {
    let server = Server::start(kind);
    let client = server.client_with(LONG_LEASE_TTL).await;
    let first = client.register(record("decode-0", 1, 32)).await;
    let refusal = client.refusal(record("decode-1", 1, 64)).await;
    assert_eq!(refusal.code(), ErrorCode::Conflict);
    let text = refusal.to_string();
    assert!(
        text.contains("decode-0") && text.contains("block_tokens is 32 there and 64 here"),
        "{text}"
    );
    first.unregister().await.expect("answers");
    client.register(record("decode-1", 1, 64)).await;
}

#[rstest]
#[case(Kind::Etcd)]
#[case(Kind::Embedded)]
#[tokio::test]
async fn of_disagreeing_nodes_that_race_only_one_side_gets_in(#[case] kind: Kind) {
    let server = Server::start(kind);
    let clients = join_all((0..4).map(|_| server.client())).await;
    let tries = (0..16).map(|index| {
        let record = record(
            &format!("decode-{index:02}"),
            1,
            if index % 2 == 0 { 32 } else { 64 },
        );
        clients[index % clients.len()].registry.register(record)
    });
    let results = join_all(tries).await;
    for result in &results {
        if let Err(error) = result {
            assert_eq!(error.code(), ErrorCode::Conflict, "{error}");
        }
    }
    let admitted: Vec<_> = results
        .iter()
        .enumerate()
        .filter(|(_, result)| result.is_ok())
        .collect();
    assert_eq!(admitted.len(), 8, "all who agree with the first one are members");
    let sides: Vec<_> = admitted.iter().map(|(index, _)| index % 2).collect();
    assert!(
        sides.windows(2).all(|pair| pair[0] == pair[1]),
        "both sides got in: {sides:?}"
    );
}

#[rstest]
#[case(Kind::Etcd)]
#[case(Kind::Embedded)]
#[tokio::test]
async fn a_newer_incarnation_takes_over_and_the_older_one_is_fenced(#[case] kind: Kind) {
    let server = Server::start(kind);
    let client = server.client().await;
    let old = client.register(record("decode-0", 5, 32)).await;
    let refusal = client.refusal(record("decode-0", 4, 32)).await;
    assert_eq!(refusal.code(), ErrorCode::Fenced);
    let new = client.register(record("decode-0", 6, 32)).await;
    let state = reaches(&old, |state| matches!(state, State::Refused(_))).await;
    let State::Refused(error) = state else {
        panic!("{state:?}");
    };
    assert_eq!(error.code(), ErrorCode::Fenced);
    // What the old one gives back is no more its own.
    old.unregister().await.expect("has nothing to end");
    let epoch = |members: &Members| members.nodes.get(&NodeId::new("decode-0")).map(|node| node.epoch);
    client.until(|members| epoch(members) == Some(Epoch(6))).await;
    assert_eq!(*new.state().borrow(), State::Registered);
}

#[rstest]
#[case(Kind::Etcd)]
#[case(Kind::Embedded)]
#[tokio::test]
async fn a_registration_survives_a_restart_of_the_registry_and_members_are_kept_meanwhile(
    #[case] kind: Kind,
) {
    let mut server = Server::start(kind);
    let client = server.client().await;
    let registration = client.register(record("decode-0", 1, 32)).await;
    client.sees(&["decode-0"]).await;

    server.kill();
    let members = client.until(|members| !members.connected).await;
    assert!(members.nodes.contains_key(&NodeId::new("decode-0")));
    reaches(&registration, |state| matches!(state, State::Retrying(_))).await;
    assert_eq!(
        client.members.borrow().nodes.len(),
        1,
        "the last members are kept"
    );

    server.resume();
    let lost = |members: &Members| !members.nodes.contains_key(&NodeId::new("decode-0"));
    let members = client.until(|members| members.connected || lost(members)).await;
    assert!(
        !lost(&members),
        "a member was dropped although it was about to come back"
    );
    reaches(&registration, |state| *state == State::Registered).await;
    // Somebody who never knew it sees it, and goes on seeing it for longer than an unattended lease would last.
    let newcomer = server.client().await;
    newcomer.sees(&["decode-0"]).await;
    let mut members = newcomer.members.clone();
    let vanishes = members.wait_for(|members| lost(members));
    let vanishes = tokio::time::timeout(LEASE_TTL * 3, vanishes).await;
    assert!(vanishes.is_err(), "nobody keeps the new lease alive");
    registration.unregister().await.expect("answers");
    newcomer.sees(&[]).await;
}

#[rstest]
#[case(Kind::Etcd)]
#[case(Kind::Embedded)]
#[tokio::test]
async fn a_member_that_dies_while_the_registry_is_away_leaves_after_it_came_back(#[case] kind: Kind) {
    let mut server = Server::start(kind);
    let client = server.client().await;
    let _lives = client.register(record("decode-0", 1, 32)).await;
    let dies = client.register(record("decode-1", 1, 32)).await;
    client.sees(&["decode-0", "decode-1"]).await;
    server.kill();
    client.until(|members| !members.connected).await;
    drop(dies);
    server.resume();
    client.sees(&["decode-0"]).await;
}

#[rstest]
#[case("etcd")]
#[case("perigee")]
#[tokio::test]
async fn a_registry_that_does_not_answer_is_an_error_in_time(#[case] scheme: &str) {
    // Bound and never accepted from: the connection opens, and nothing comes.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = silent.local_addr().expect("bound");
    let config = Config {
        connect_deadline: Duration::from_millis(300),
        ..Config::default()
    };
    let url = format!("{scheme}://{address}");
    let result = connect(&url, &config, CancellationToken::new());
    let result = tokio::time::timeout(DEADLINE, result)
        .await
        .expect("ends in time");
    let error = result.expect_err("nobody answers");
    assert_eq!(error.code(), ErrorCode::Unavailable, "{error}");
    assert!(error.to_string().contains(&url), "{error}");
}
