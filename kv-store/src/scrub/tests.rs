use super::*;
use crate::Config;
use crate::testing::{BLOCK_TOKENS, Peer, compute, lonely_store, tokens, write};

fn corrupt(store: &Store, seed: u32, at: usize) {
    let sequence = compute(store, "", &tokens(seed, 4 * BLOCK_TOKENS));
    write(store, sequence.block_ids()[at], &[0xee; 512]);
}

async fn pass(store: &Store) -> v1::VerifyResponse {
    let mut pass = Pass::new(store.clone());
    while pass.part().await {}
    pass.progress()
}

#[tokio::test]
async fn a_corrupt_block_goes_with_what_continues_it_and_the_rest_stays() {
    let store = lonely_store(16, Config::default());
    corrupt(&store, 1, 1);
    let good = compute(&store, "", &tokens(2, 4 * BLOCK_TOKENS)).chain().to_vec();
    let bad = store.chain("", &tokens(1, 4 * BLOCK_TOKENS)).1;
    let found = pass(&store).await;
    assert_eq!(
        (found.total_blocks, found.corrupt_blocks, found.dropped_blocks),
        (8, 1, 3)
    );
    assert_eq!((store.lookup_len(&bad), store.lookup_len(&good)), (1, 4));
    assert_eq!(store.stats().corruptions, 1);
    assert_eq!(pass(&store).await.corrupt_blocks, 0);
    store.table().check_integrity();
}

#[tokio::test]
async fn whoever_reads_a_corrupt_block_is_the_last_one_to_find_it() {
    let store = lonely_store(8, Config::default());
    let reader = compute(&store, "", &tokens(1, 4 * BLOCK_TOKENS));
    write(&store, reader.block_ids()[0], &[0xee; 512]);
    assert_eq!(pass(&store).await.dropped_blocks, 4);
    assert_eq!(store.lookup_len(reader.chain()), 0);
    assert_eq!(store.stats().blocks.free, 4, "its slots are still the reader's");
    drop(reader);
    assert_eq!(store.stats().blocks.free, 8);
    store.table().check_integrity();
}

#[tokio::test]
async fn looking_at_a_block_is_no_use_of_it() {
    let store = lonely_store(8, Config::default());
    let oldest = compute(&store, "", &tokens(1, BLOCK_TOKENS)).chain().to_vec();
    for seed in 2..=8 {
        drop(compute(&store, "", &tokens(seed, BLOCK_TOKENS)));
    }
    let now = tokio::time::Instant::now().into_std();
    let before = store.table().coldest(8, now).first().map(|victim| victim.hash);
    assert_eq!(before, oldest.first().copied());
    pass(&store).await;
    let after = store.table().coldest(8, now).first().map(|victim| victim.hash);
    assert_eq!(after, before);
}

#[tokio::test]
async fn a_node_that_corrupts_again_and_again_neither_caches_nor_gives() {
    let peer = Peer::start(32, Config::default()).await;
    let store = &peer.store;
    let good = compute(store, "", &tokens(9, 4 * BLOCK_TOKENS)).chain().to_vec();
    for seed in 1..=3 {
        assert!(!store.is_quarantined());
        corrupt(store, seed, 3);
        assert_eq!(pass(store).await.corrupt_blocks, 1);
    }
    assert!(store.is_quarantined());
    let acquire = v1::AcquireRequest {
        kv_root: store.common_root().0.to_vec(),
        hashes: proto::convert::hashes_to_wire(&good),
        moved: false,
        lease_ttl_ms: 1000,
    };
    let answer = peer.client().acquire(acquire).await.unwrap().into_inner();
    assert_eq!(answer.blocks, [], "peers get nothing");
    let quote = v1::QuoteRequest {
        kv_root: store.common_root().0.to_vec(),
        node_id: "other".into(),
        chains: vec![proto::convert::chain_to_wire(&good)],
    };
    let quote = peer.cache_client().quote(quote).await.unwrap().into_inner();
    assert_eq!(
        (quote.held, quote.price),
        (vec![0], vec![]),
        "and are offered nothing"
    );
    let cached = store.stats().blocks.cached;
    drop(compute(store, "", &tokens(10, 4 * BLOCK_TOKENS)));
    assert_eq!(store.stats().blocks.cached, cached, "nothing new is cached");
    peer.stop().await;
}

#[test]
fn a_flipped_bit_now_and_then_is_no_reason() {
    let begun = Instant::now();
    let mut health = Health::default();
    for hour in 0..100 {
        let now = begun + Duration::from_secs(hour * 3600);
        assert!(!health.corrupt(now), "two in a window at most");
    }
    let now = begun + Duration::from_secs(100 * 3600);
    assert!(!health.corrupt(now + Duration::from_secs(3600)));
    assert!(!health.corrupt(now + Duration::from_secs(3601)));
    assert!(health.corrupt(now + Duration::from_secs(3602)));
}
