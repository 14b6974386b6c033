use futures::stream;
use rstest::rstest;
use types::BlockHash;

use types::ErrorCode;

use super::*;
use crate::Config;
use crate::testing::{BLOCK_TOKENS, Peer, assert_content, compute, tokens};

async fn peer(config: Config) -> Peer {
    Peer::start(16, config).await
}

fn cached(peer: &Peer, seed: u32, blocks: usize) -> Vec<BlockHash> {
    compute(&peer.store, "", &tokens(seed, blocks * BLOCK_TOKENS))
        .chain()
        .to_vec()
}

fn root(peer: &Peer) -> Vec<u8> {
    peer.store.common_root().0.to_vec()
}

fn pin(peer: &Peer, chain: &[BlockHash], ttl_ms: u64) -> v1::PinRequest {
    v1::PinRequest {
        kv_root: root(peer),
        chain: Some(convert::chain_to_wire(chain)),
        ttl_ms,
        replicas_min: 0,
        root: root(peer),
    }
}

fn code(status: &Status) -> ErrorCode {
    proto::status::from_status(status).code
}

#[tokio::test]
async fn a_pinned_prefix_stays_until_it_is_unpinned() {
    let peer = peer(Config::default()).await;
    let chain = cached(&peer, 1, 4);
    let mut client = peer.cache_client();
    let pinned = client.pin(pin(&peer, &chain, 0)).await.unwrap().into_inner();
    assert_eq!(pinned.pinned_blocks, 4);
    let evict_all = v1::EvictRequest {
        kv_root: root(&peer),
        chain: None,
        all: true,
    };
    let evicted = client.evict(evict_all.clone()).await.unwrap().into_inner();
    assert_eq!((evicted.evicted_blocks, evicted.kept_blocks), (0, 4));
    let listed = client
        .list_pins(v1::ListPinsRequest {})
        .await
        .unwrap()
        .into_inner()
        .pins;
    assert_eq!(
        (listed.len(), listed[0].pin_id, listed[0].blocks),
        (1, pinned.pin_id, 4)
    );
    assert_eq!(listed[0].hash, chain[3].0);
    let unpin = v1::UnpinRequest {
        pin_id: pinned.pin_id,
    };
    assert!(client.unpin(unpin).await.unwrap().into_inner().held);
    assert!(
        !client.unpin(unpin).await.unwrap().into_inner().held,
        "it ends once"
    );
    assert_eq!(
        client.evict(evict_all).await.unwrap().into_inner().evicted_blocks,
        4
    );
    peer.stop().await;
}

#[tokio::test]
async fn pins_are_bounded_by_number_and_by_share_of_the_pool() {
    let peer = peer(Config {
        pins_max: 2,
        ..Config::default()
    })
    .await;
    let chains: Vec<_> = (1..=3).map(|seed| cached(&peer, seed, 2)).collect();
    let long = cached(&peer, 9, 9);
    let mut client = peer.cache_client();
    let refused = client.pin(pin(&peer, &long, 0)).await.unwrap_err();
    assert_eq!(code(&refused), ErrorCode::Invalid, "more than half of the pool");
    for chain in &chains[..2] {
        client.pin(pin(&peer, chain, 0)).await.unwrap();
    }
    let refused = client.pin(pin(&peer, &chains[2], 0)).await.unwrap_err();
    assert!(refused.message().contains("unpin some first"), "{refused}");
    assert_eq!(
        client
            .pin(pin(&peer, &[BlockHash([9; 16])], 0))
            .await
            .unwrap()
            .into_inner()
            .pin_id,
        0,
        "a miss"
    );
    peer.stop().await;
}

#[tokio::test]
async fn a_pin_with_an_end_ends() {
    let peer = peer(Config::default()).await;
    let chain = cached(&peer, 1, 4);
    let mut client = peer.cache_client();
    client.pin(pin(&peer, &chain, 60_000)).await.unwrap();
    let now = Instant::now().into_std();
    peer.cache.pins().expire(now);
    assert_eq!(peer.store.stats().blocks.pinned, 4);
    peer.cache.pins().expire(now + Duration::from_secs(61));
    assert_eq!(peer.store.stats().blocks.pinned, 0);
    peer.stop().await;
}

#[tokio::test]
async fn locate_exists_and_top_say_what_is_there() {
    let peer = peer(Config::default()).await;
    let chain = cached(&peer, 1, 4);
    let _reader = compute(&peer.store, "", &tokens(1, 2 * BLOCK_TOKENS));
    let asked: Vec<BlockHash> = chain.iter().copied().chain([BlockHash([9; 16])]).collect();
    let mut client = peer.cache_client();
    let locate = v1::LocateRequest {
        kv_root: root(&peer),
        chain: Some(convert::chain_to_wire(&asked)),
    };
    let located = client.locate(locate).await.unwrap().into_inner();
    assert_eq!((located.held_blocks, located.used_blocks), (4, 2));
    let exists = v1::ExistsRequest {
        kv_root: root(&peer),
        hashes: Some(convert::chain_to_wire(&asked)),
    };
    assert_eq!(
        client.exists(exists).await.unwrap().into_inner().held,
        [1, 1, 1, 1, 0]
    );
    let top = client
        .top(v1::TopRequest {
            count: 3,
            coldest: false,
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(top.blocks.len(), 3);
    assert!(top.blocks.is_sorted_by(|a, b| a.worth >= b.worth));
    let coldest = client
        .top(v1::TopRequest {
            count: 9,
            coldest: true,
        })
        .await
        .unwrap()
        .into_inner()
        .blocks;
    assert_eq!(coldest.iter().map(|block| block.pins).sum::<u64>(), 2);
    assert_eq!(coldest.iter().map(|block| block.depth).max(), Some(4));
    peer.stop().await;
}

#[tokio::test]
async fn evicting_a_prompt_leaves_what_others_share_with_it() {
    let peer = peer(Config::default()).await;
    let long = tokens(1, 4 * BLOCK_TOKENS);
    let chain = compute(&peer.store, "", &long).chain().to_vec();
    let mut other = long[..2 * BLOCK_TOKENS].to_vec();
    other.extend(tokens(2, BLOCK_TOKENS));
    let other = compute(&peer.store, "", &other).chain().to_vec();
    let evict = |chain: &[BlockHash]| v1::EvictRequest {
        kv_root: root(&peer),
        chain: Some(convert::chain_to_wire(chain)),
        all: false,
    };
    let mut client = peer.cache_client();
    // Its third block goes with the fourth, which continues it.
    let evicted = client.evict(evict(&chain[..3])).await.unwrap().into_inner();
    assert_eq!((evicted.evicted_blocks, evicted.kept_blocks), (2, 2));
    assert_eq!(
        (peer.store.lookup_len(&chain), peer.store.lookup_len(&other)),
        (2, 3)
    );
    peer.stop().await;
}

#[tokio::test]
async fn another_space_is_a_conflict_and_a_torn_chain_invalid() {
    let peer = peer(Config::default()).await;
    let mut client = peer.cache_client();
    let other = v1::LocateRequest {
        kv_root: vec![1; 16],
        chain: None,
    };
    assert_eq!(
        code(&client.locate(other).await.unwrap_err()),
        ErrorCode::Conflict
    );
    let torn = v1::LocateRequest {
        kv_root: root(&peer),
        chain: Some(v1::BlockChain { hashes: vec![0; 17] }),
    };
    assert_eq!(code(&client.locate(torn).await.unwrap_err()), ErrorCode::Invalid);
    let many = v1::QuoteRequest {
        kv_root: root(&peer),
        node_id: String::new(),
        chains: vec![v1::BlockChain::default(); CHAINS_MAX + 1],
    };
    assert_eq!(code(&client.quote(many).await.unwrap_err()), ErrorCode::Invalid);
    peer.stop().await;
}

/// What `Export` says: the header, and all bytes.
async fn export(peer: &Peer, chain: &[BlockHash]) -> (v1::ExportHeader, Vec<u8>) {
    let request = v1::ExportRequest {
        kv_root: root(peer),
        chain: Some(convert::chain_to_wire(chain)),
    };
    let mut stream = peer.cache_client().export(request).await.unwrap().into_inner();
    let (mut header, mut bytes) = (None, Vec::new());
    while let Some(message) = stream.message().await.unwrap() {
        match message.part.unwrap() {
            v1::export_response::Part::Header(first) => header = Some(first),
            v1::export_response::Part::Data(data) => bytes.extend(data),
        }
    }
    (header.unwrap(), bytes)
}

async fn import(peer: &Peer, file: v1::ExportHeader, bytes: &[u8]) -> Result<v1::ImportResponse, Status> {
    use v1::import_request::Part;
    let header = v1::ImportHeader {
        kv_root: root(peer),
        file: Some(file),
    };
    // Pieces that fit no block.
    let data: Vec<Part> = bytes
        .chunks(300)
        .map(|piece| Part::Data(piece.to_vec()))
        .collect();
    let parts = [Part::Header(header)].into_iter().chain(data);
    let parts = parts.map(|part| v1::ImportRequest { part: Some(part) });
    let answer = peer
        .cache_client()
        .import(stream::iter(parts.collect::<Vec<_>>()))
        .await;
    answer.map(Response::into_inner)
}

#[tokio::test]
async fn exported_blocks_come_back_as_they_were() {
    let (from, to) = (peer(Config::default()).await, peer(Config::default()).await);
    let chain = cached(&from, 1, 4);
    cached(&to, 1, 1);
    let (header, bytes) = export(&from, &chain).await;
    assert_eq!(bytes.len(), 4 * 512);
    let imported = import(&to, header, &bytes).await.unwrap();
    assert_eq!((imported.imported_blocks, imported.held_blocks), (3, 1));
    let pins = to.store.match_prefix(&chain);
    assert_content(&to.store, &pins, &chain);
    drop(pins);
    from.stop().await;
    to.stop().await;
}

#[rstest]
#[case::a_changed_byte(|bytes: &mut Vec<u8>| bytes[700] ^= 1, ErrorCode::Corrupt, 1)]
#[case::a_short_file(|bytes: &mut Vec<u8>| bytes.truncate(600), ErrorCode::Invalid, 1)]
#[case::a_long_file(|bytes: &mut Vec<u8>| bytes.push(0), ErrorCode::Invalid, 4)]
#[tokio::test]
async fn a_file_that_is_not_what_it_says_is_refused(
    #[case] change: fn(&mut Vec<u8>),
    #[case] expected: ErrorCode,
    #[case] held: usize,
) {
    let (from, to) = (peer(Config::default()).await, peer(Config::default()).await);
    let chain = cached(&from, 1, 4);
    let (header, mut bytes) = export(&from, &chain).await;
    change(&mut bytes);
    let refused = import(&to, header, &bytes).await.unwrap_err();
    assert_eq!(code(&refused), expected, "{refused}");
    let pins = to.store.match_prefix(&chain);
    assert_eq!(pins.len(), held);
    assert_content(&to.store, &pins, &chain[..held]);
    drop(pins);
    let blocks = to.store.stats().blocks;
    assert_eq!((blocks.owned, blocks.pinned), (0, 0));
    from.stop().await;
    to.stop().await;
}

#[tokio::test]
async fn warming_fetches_what_a_node_lacks() {
    let (from, to) = (peer(Config::default()).await, peer(Config::default()).await);
    let chain = cached(&from, 1, 4);
    cached(&to, 1, 2);
    let warm = v1::WarmRequest {
        kv_root: root(&to),
        root: root(&to),
        chain: Some(convert::chain_to_wire(&chain)),
        source_grpc_endpoint: from.grpc_endpoint.clone(),
        timeout_ms: 20_000,
    };
    let warmed = to.cache_client().warm(warm).await.unwrap().into_inner();
    assert_eq!((warmed.held_blocks, warmed.fetched_bytes), (4, 2 * 512));
    from.stop().await;
    to.stop().await;
}
