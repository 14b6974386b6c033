use std::collections::BTreeMap;
use std::num::NonZeroU32;

use proto::v1;
use types::ErrorCode;

use super::*;
use crate::TenantConfig;
use crate::testing::{BLOCK_TOKENS, Peer, assert_content, compute, lonely_store, space, tokens};

const BLOCK_BYTES: u64 = 512;

/// Four blocks for "small", five (and a bit) for all that are not named, no bound for "large".
fn config() -> Config {
    let tenant = |bytes_max, weight| TenantConfig {
        bytes_max: Some(bytes_max),
        weight: NonZeroU32::new(weight).unwrap(),
    };
    Config {
        tenant_bytes_max: 5 * BLOCK_BYTES + 100,
        tenants: BTreeMap::from([
            ("small".to_owned(), tenant(4 * BLOCK_BYTES, 1)),
            ("large".to_owned(), tenant(0, 3)),
        ]),
        ..Config::default()
    }
}

fn cached(store: &Store, name: &str) -> usize {
    let tenants = store.tenants().into_iter();
    let mut found = tenants.filter(|tenant| tenant.name.as_deref() == Some(name));
    found.next().map_or(0, |tenant| tenant.cached_blocks)
}

#[test]
fn tenants_are_known_by_name_with_their_limits() {
    let store = lonely_store(16, config());
    drop(compute(&store, "someone", &tokens(1, 2 * BLOCK_TOKENS)));
    drop(compute(&store, "", &tokens(1, BLOCK_TOKENS)));
    let of_peer = space().with_tenant("a peer's").root();
    store.learn_root(of_peer);
    let block = store.allocate(1).unwrap().pop().unwrap();
    drop(store.commit(block, of_peer, of_peer.child(&[1])));
    let told: Vec<_> = store
        .tenants()
        .into_iter()
        .map(|tenant| {
            (
                tenant.name,
                tenant.cached_blocks,
                tenant.blocks_max,
                tenant.weight,
            )
        })
        .collect();
    let named = |name: &str| Some(name.to_owned());
    assert_eq!(told[0], (named("someone"), 2, Some(5), 1), "largest first");
    for expected in [
        (named(""), 1, Some(5), 1),
        (None, 1, Some(5), 1),
        (named("small"), 0, Some(4), 1),
        (named("large"), 0, None, 3),
    ] {
        assert!(told.contains(&expected), "{expected:?} in {told:?}");
    }
    assert_eq!(told.len(), 5);
}

#[tokio::test]
async fn what_operators_set_comes_before_the_settings_part_by_part() {
    let store = lonely_store(16, config());
    drop(compute(&store, "large", &tokens(9, 8 * BLOCK_TOKENS)));
    let quota = |bytes_max: Option<u64>, weight| TenantQuota {
        bytes_max,
        weight: NonZeroU32::new(weight),
    };
    let quotas = [
        ("small", quota(None, 7)),
        ("large", quota(Some(3 * BLOCK_BYTES), 0)),
        ("new", quota(Some(0), 2)),
    ];
    let quotas: BTreeMap<_, _> = quotas.map(|(name, quota)| (name.to_owned(), quota)).into();
    store.set_quotas(quotas).await;
    let of = |name: &str| {
        let tenants = store.tenants();
        let found = tenants
            .into_iter()
            .find(|tenant| tenant.name.as_deref() == Some(name));
        found.map(|tenant| (tenant.cached_blocks, tenant.blocks_max, tenant.weight))
    };
    assert_eq!(of("small"), Some((0, Some(4), 7)));
    assert_eq!(of("large"), Some((3, Some(3), 3)), "what it had beyond was given");
    assert_eq!(of("new"), Some((0, None, 2)));
    store.set_quotas(BTreeMap::new()).await;
    assert_eq!(of("large"), Some((3, None, 3)));
    assert_eq!(of("new"), None);
    store.table().check_integrity();
}

#[tokio::test]
async fn what_the_registry_says_of_quotas_is_done_until_the_end() {
    let store = lonely_store(16, config());
    let (said, members) = watch::channel(Arc::new(Members::default()));
    let end = CancellationToken::new();
    let follows = tokio::spawn({
        let (store, end) = (store.clone(), end.clone());
        async move { store.follow_quotas(members, end).await }
    });
    let quota = TenantQuota {
        bytes_max: Some(2 * BLOCK_BYTES),
        weight: None,
    };
    said.send_replace(Arc::new(Members {
        quotas: BTreeMap::from([("x".to_owned(), quota)]),
        ..Members::default()
    }));
    let limited = || store.tenants().iter().any(|tenant| tenant.blocks_max == Some(2));
    tokio::time::timeout(std::time::Duration::from_secs(20), async {
        while !limited() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("it is done");
    end.cancel();
    follows.await.expect("it ends");
}

#[test]
fn a_prompt_beyond_its_tenants_quota_is_served_and_cached_as_far_as_that_goes() {
    let store = lonely_store(16, config());
    let other = compute(&store, "large", &tokens(9, 4 * BLOCK_TOKENS));
    let prompt = tokens(1, 7 * BLOCK_TOKENS);
    let sequence = compute(&store, "small", &prompt);
    assert_content(&store, sequence.shared(), sequence.chain());
    let private = sequence.shared().iter().map(|pin| pin.is_private());
    assert_eq!(
        private.collect::<Vec<_>>(),
        [false, false, false, false, true, true, true]
    );
    assert_eq!(cached(&store, "small"), 4);
    drop(sequence);
    // Another prompt of the tenant displaces this one, and nobody else's.
    let next = compute(&store, "small", &tokens(2, 3 * BLOCK_TOKENS));
    assert!(next.shared().iter().all(|pin| !pin.is_private()));
    assert_eq!((cached(&store, "small"), cached(&store, "large")), (4, 4));
    drop((next, other));
    assert_eq!(
        store.lookup_len(&store.chain("small", &prompt).1),
        1,
        "the end goes first"
    );
    store.table().check_integrity();
}

#[test]
fn what_limits_did_is_counted() {
    let metrics = node::Metrics::new();
    let network = transfer::MemNetwork::new(0, transfer::mem::Faults::default());
    let memory = transfer::HostMemory::allocate(16 * 512).unwrap();
    let transport = network.join("counted", types::Epoch(7));
    let store = Store::new(config(), space(), types::Epoch(7), memory, transport, &metrics).unwrap();
    drop(compute(&store, "small", &tokens(1, 4 * BLOCK_TOKENS)));
    drop(compute(&store, "small", &tokens(2, 6 * BLOCK_TOKENS)));
    // The small one has 4 blocks at weight 1, the large one 8 at weight 3, and 4 are free for 8 more.
    drop(compute(&store, "large", &tokens(3, 8 * BLOCK_TOKENS)));
    drop(compute(&store, "large", &tokens(4, 8 * BLOCK_TOKENS)));
    let text = metrics.encode();
    for line in [
        "perigee_kvstore_tenant_evicted_blocks_total{reason=\"quota\"} 4",
        "perigee_kvstore_tenant_evicted_blocks_total{reason=\"share\"} 4",
        "perigee_kvstore_tenant_refused_blocks_total 1",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "{line} is missing in\n{text}"
        );
    }
    assert!(!text.contains("small"), "no label names a tenant");
}

#[tokio::test]
async fn a_put_for_which_the_quota_has_no_room_fails_and_says_so() {
    let peer = Peer::start(16, config()).await;
    let used = compute(&peer.store, "small", &tokens(1, 3 * BLOCK_TOKENS));
    let (root, chain) = peer.store.chain("small", &tokens(2, 2 * BLOCK_TOKENS));
    let mut client = peer.client();
    let mut put = async || {
        let request = v1::ReserveRequest {
            kv_root: peer.store.common_root().0.to_vec(),
            parent: root.0.to_vec(),
            hashes: proto::convert::hashes_to_wire(&chain),
            lease_ttl_ms: 10_000,
        };
        let reserved = client.reserve(request).await.unwrap().into_inner();
        let checksum = |offset: &u64| {
            let block = u32::try_from(offset / BLOCK_BYTES).unwrap();
            peer.store.checksum(types::BlockId(block)).0
        };
        let request = v1::CommitRequest {
            reservation_id: reserved.reservation_id,
            checksums: reserved.block_offsets.iter().map(checksum).collect(),
        };
        let committed = client.commit(request).await;
        committed.map_err(|status| proto::status::from_status(&status))
    };
    let error = put().await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Overloaded);
    assert!(error.message.contains("1 of 2 blocks"), "{}", error.message);
    assert_eq!(
        (cached(&peer.store, "small"), peer.store.stats().blocks.owned),
        (4, 0)
    );
    drop(used);
    put().await.unwrap();
    assert_eq!(peer.store.lookup_len(&chain), 2);
    peer.store.table().check_integrity();
    peer.stop().await;
}
