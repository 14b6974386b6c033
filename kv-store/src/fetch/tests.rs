mod bit_flips;

use rstest::rstest;
use transfer::MemNetwork;
use transfer::mem::Faults;
use types::Epoch;

use super::*;
use crate::Config;
use crate::testing::{
    BLOCK_TOKENS, PATIENCE, Peer, assert_content, channels, compute, content, eventually, lonely_store,
    store_on, tokens, write,
};

const BLOCKS: usize = 12;

/// One block in flight at a time, so that progress shows block by block.
fn block_by_block() -> Config {
    Config {
        fetch_batch_bytes: 1,
        ..Config::default()
    }
}

fn source(peer: &Peer, blocks: usize) -> Source {
    Source {
        node_id: "peer".to_owned(),
        grpc_endpoint: peer.grpc_endpoint.clone(),
        blocks,
    }
}

/// Computes a prompt at `peer`. Returns its chain.
fn prompt_at(peer: &Peer, blocks: usize) -> Vec<BlockHash> {
    compute(&peer.store, "", &tokens(1, blocks * BLOCK_TOKENS))
        .chain()
        .to_vec()
}

async fn fetch(store: &Store, chain: &[BlockHash], sources: &[Source], within: Duration) -> FetchOutcome {
    let fetch = Fetch {
        purpose: Purpose::Request,
        root: store.common_root(),
        chain,
        from: 0,
        sources,
        deadline: Instant::now() + within,
    };
    fetch_prefix(store, &channels(), fetch).await
}

/// No memory is held here, and no lease at the peer.
async fn assert_at_rest(store: &Store, peer: &Peer) {
    eventually("nothing is in flight", || {
        let (here, there) = (store.stats().blocks, peer.store.stats().blocks);
        (here.owned, here.pinned, there.leases, there.pinned) == (0, 0, 0, 0)
    })
    .await;
    store.table().check_integrity();
}

#[tokio::test]
async fn two_nodes_fetch_from_each_other() {
    let (a, b) = (
        Peer::start(32, Config::default()).await,
        Peer::start(32, block_by_block()).await,
    );
    let chain = prompt_at(&a, BLOCKS);
    let got = fetch(&b.store, &chain, &[source(&a, BLOCKS)], PATIENCE).await;
    assert_content(&b.store, &got.blocks, &chain);
    assert_eq!((got.bytes, got.transport), (12 * 512, "tcp"));
    assert_eq!(b.store.stats().fetched_bytes, 12 * 512);
    drop(got);
    let again = fetch(&b.store, &chain, &[source(&a, BLOCKS)], PATIENCE).await;
    assert_eq!(
        (again.blocks.len(), again.bytes, again.transport),
        (BLOCKS, 0, "none")
    );
    drop(again);

    let of_b = compute(&b.store, "tenant", &tokens(2, 3 * BLOCK_TOKENS));
    let (root, chain) = a.store.chain("tenant", &tokens(2, 3 * BLOCK_TOKENS));
    let sources = [source(&b, 3)];
    let first = Fetch {
        purpose: Purpose::Request,
        root,
        chain: &chain,
        from: 0,
        sources: &sources,
        deadline: Instant::now() + PATIENCE,
    };
    let got = fetch_prefix(
        &a.store,
        &channels(),
        Fetch {
            chain: &chain[..1],
            ..first
        },
    )
    .await;
    assert_content(&a.store, &got.blocks, &chain[..1]);
    let rest = fetch_prefix(&a.store, &channels(), Fetch { from: 1, ..first }).await;
    assert_content(&a.store, &rest.blocks, &chain[1..]);
    assert_eq!(a.store.lookup_len(of_b.chain()), 3);
    drop((got, rest, of_b));
    assert_at_rest(&b.store, &a).await;
    assert_at_rest(&a.store, &b).await;
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn bytes_that_changed_in_a_peers_memory_are_never_believed() {
    let (peer, spare) = (
        Peer::start(16, Config::default()).await,
        Peer::start(16, Config::default()).await,
    );
    let chain = prompt_at(&peer, BLOCKS);
    let sixth = peer.store.match_prefix(&chain)[5].block();
    let mut damaged = content(chain[5]);
    damaged[100] ^= 1;
    write(&peer.store, sixth, &damaged);

    let store = lonely_tcp(16, block_by_block()).await;
    let got = fetch(&store, &chain, &[source(&peer, BLOCKS)], PATIENCE).await;
    assert_content(&store, &got.blocks, &chain[..5]);
    assert_eq!(store.stats().corruptions, 1);
    drop(got);

    assert_eq!(prompt_at(&spare, BLOCKS), chain);
    let both = [source(&peer, BLOCKS), source(&spare, BLOCKS)];
    let got = fetch(&store, &chain, &both, PATIENCE).await;
    assert_content(&store, &got.blocks, &chain);
    assert_eq!(store.stats().corruptions, 2);
    drop(got);
    assert_at_rest(&store, &peer).await;
}

async fn lonely_tcp(blocks: usize, config: Config) -> Store {
    Peer::start(blocks, config).await.store
}

#[tokio::test]
async fn whoever_does_not_have_it_is_passed_over() {
    let empty = Peer::start(16, Config::default()).await;
    let half = Peer::start(16, Config::default()).await;
    let chain = prompt_at(&half, BLOCKS);
    half.store.allocate(16 - BLOCKS / 2).map(drop).unwrap();
    assert_eq!(half.store.lookup_len(&chain), BLOCKS / 2);
    let mut foreign = crate::testing::space();
    foreign.arithmetic = "other/1".into();
    let foreign = Store::new(
        Config::default(),
        foreign,
        Epoch(7),
        transfer::HostMemory::allocate(512).unwrap(),
        half.transport.clone(),
        &node::Metrics::new(),
    );
    let foreign = Peer::serve(foreign.unwrap()).await;
    let sources = [
        Source {
            node_id: "peer".to_owned(),
            grpc_endpoint: "not an endpoint".into(),
            blocks: BLOCKS,
        },
        Source {
            node_id: "peer".to_owned(),
            // Nobody listens there: port 1 is privileged and unused on 127.0.0.1.
            grpc_endpoint: "127.0.0.1:1".into(),
            blocks: BLOCKS,
        },
        source(&foreign, BLOCKS),
        source(&empty, BLOCKS),
        source(&half, BLOCKS),
    ];
    let store = lonely_tcp(16, Config::default()).await;
    let got = fetch(&store, &chain, &sources, PATIENCE).await;
    assert_content(&store, &got.blocks, &chain[..BLOCKS / 2]);
    assert_eq!(
        store.inner().metrics.fetch_failures.get(),
        3,
        "a miss is no failure"
    );
    drop(got);
    assert_at_rest(&store, &half).await;
    foreign.stop().await;
}

#[tokio::test]
async fn many_who_want_the_same_fetch_it_once() {
    let peer = Peer::start(16, Config::default()).await;
    let chain = prompt_at(&peer, BLOCKS);
    let store = lonely_tcp(16, block_by_block()).await;
    let sources = [source(&peer, BLOCKS)];
    let lengths = [BLOCKS, BLOCKS / 2, 1, BLOCKS, BLOCKS - 1, BLOCKS];
    let fetches = lengths.map(|len| fetch(&store, &chain[..len], &sources, PATIENCE));
    let got = futures::future::join_all(fetches).await;
    for (got, len) in got.iter().zip(lengths) {
        assert_content(&store, &got.blocks, &chain[..len]);
    }
    assert_eq!(got.iter().map(|got| got.bytes).sum::<u64>(), 12 * 512);
    assert_eq!(store.stats().fetched_bytes, 12 * 512);
    drop(got);
    assert_at_rest(&store, &peer).await;
}

#[tokio::test]
async fn a_full_pool_takes_what_fits() {
    let peer = Peer::start(16, Config::default()).await;
    let chain = prompt_at(&peer, BLOCKS);
    let store = lonely_tcp(5, Config::default()).await;
    let busy = store.allocate(2).unwrap();
    let got = fetch(&store, &chain, &[source(&peer, BLOCKS)], PATIENCE).await;
    assert_content(&store, &got.blocks, &chain[..3]);
    drop((got, busy));
    assert_at_rest(&store, &peer).await;

    let one = lonely_tcp(1, Config::default()).await;
    let got = fetch(&one, &chain, &[source(&peer, BLOCKS)], PATIENCE).await;
    assert_content(&one, &got.blocks, &chain[..1]);
    let none = fetch(&one, &chain[1..], &[source(&peer, BLOCKS)], PATIENCE).await;
    assert_eq!(none.blocks.len(), 0);
}

/// A peer whose memory is reached over a slow network: 50 ms per block.
async fn slow_peer() -> (MemNetwork, Peer, Store) {
    let block = Duration::from_millis(25);
    let network = MemNetwork::new(
        3,
        Faults {
            delay: block..block,
            ..Faults::default()
        },
    );
    let peer = store_on(64, Config::default(), Epoch(7), network.join("peer", Epoch(7)));
    let store = store_on(64, block_by_block(), Epoch(7), network.join("store", Epoch(7)));
    (network, Peer::serve(peer).await, store)
}

#[rstest]
#[case::killed(true)]
#[case::cut_off(false)]
#[tokio::test]
async fn a_peer_that_is_lost_half_way_ends_the_fetch_with_what_came(#[case] killed: bool) {
    let (network, peer, store) = slow_peer().await;
    let chain = prompt_at(&peer, 50);
    let fetching = store.clone();
    let sources = [source(&peer, 50)];
    let started = Instant::now();
    let within = Duration::from_secs(if killed { 20 } else { 2 });
    let wanted = chain.clone();
    let fetch = tokio::spawn(async move { fetch(&fetching, &wanted, &sources, within).await });
    eventually("some blocks came", || store.stats().fetched_bytes >= 3 * 512).await;
    if killed {
        network.kill(&peer.transport.endpoint());
    } else {
        network.partition(&peer.transport.endpoint(), &store.transport().endpoint());
    }
    let got = fetch.await.unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "far within the test's patience"
    );
    assert!((3..50).contains(&got.blocks.len()));
    assert_content(&store, &got.blocks, &chain[..got.blocks.len()]);
    drop(got);
    assert_at_rest(&store, &peer).await;
}

#[tokio::test]
async fn a_fetch_that_is_cancelled_holds_nothing_and_lets_the_next_one_go_on() {
    let (_network, peer, store) = slow_peer().await;
    let chain = prompt_at(&peer, 10);
    let fetching = store.clone();
    let sources = [source(&peer, 10)];
    let (wanted, from) = (chain.clone(), sources.clone());
    let first = tokio::spawn(async move { fetch(&fetching, &wanted, &from, PATIENCE).await });
    eventually("some blocks came", || store.stats().fetched_bytes >= 2 * 512).await;
    let mut second = Box::pin(fetch(&store, &chain, &sources, PATIENCE));
    assert!(futures::poll!(&mut second).is_pending());
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    let got = second.await;
    assert_content(&store, &got.blocks, &chain);
    assert_eq!(
        store.stats().fetched_bytes,
        10 * 512,
        "what the first one brought is kept"
    );
    drop(got);
    assert_at_rest(&store, &peer).await;
}

#[tokio::test]
async fn a_peer_that_accepts_and_never_answers_costs_half_the_time_and_no_more() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = Peer::start(16, Config::default()).await;
    let chain = prompt_at(&peer, BLOCKS);
    let sources = [
        Source {
            node_id: "peer".to_owned(),
            grpc_endpoint: silent.local_addr().unwrap().to_string(),
            blocks: BLOCKS,
        },
        source(&peer, BLOCKS),
    ];
    let store = lonely_tcp(16, Config::default()).await;
    let only_silent = fetch(&store, &chain, &sources[..1], Duration::from_millis(50)).await;
    assert_eq!(only_silent.blocks.len(), 0);
    let got = fetch(&store, &chain, &sources, Duration::from_secs(3)).await;
    assert_content(&store, &got.blocks, &chain);
}

#[tokio::test]
async fn without_sources_only_what_is_held_comes_back() {
    let store = lonely_store(4, Config::default());
    let chain = compute(&store, "", &tokens(1, 2 * BLOCK_TOKENS)).chain().to_vec();
    let got = fetch(&store, &chain, &[], PATIENCE).await;
    assert_eq!((got.blocks.len(), got.bytes), (2, 0));
    let beyond = Fetch {
        purpose: Purpose::Request,
        root: store.common_root(),
        chain: &chain,
        from: 5,
        sources: &[],
        deadline: Instant::now(),
    };
    assert_eq!(fetch_prefix(&store, &channels(), beyond).await.blocks.len(), 0);
}

#[rstest]
#[case::too_many(vec![1, 2, 3])]
#[case::another(vec![2])]
#[case::out_of_order(vec![2, 1])]
fn promises_that_were_not_asked_for_are_refused(#[case] promised: Vec<u8>) {
    let wanted = [BlockHash([1; 16]), BlockHash([2; 16])];
    let block = |byte: u8| v1::BlockDescriptor {
        hash: vec![byte; 16],
        ..v1::BlockDescriptor::default()
    };
    let blocks: Vec<_> = promised.into_iter().map(block).collect();
    assert!(matches!(
        read_promises(&wanted, &blocks),
        Err(FetchError::Answer(_))
    ));
}
