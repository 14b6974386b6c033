use std::collections::BTreeMap;

use futures::FutureExt;
use transfer::MemNetwork;
use transfer::mem::Faults;
use types::{Epoch, NodeId};

use super::*;
use crate::Config;
use crate::testing::{
    BLOCK_TOKENS, PATIENCE, Peer, assert_content, compute, eventually, store_on, tokens, write,
};

/// Two slots of it are the margin.
const BLOCKS: usize = 128;

/// Nodes over one network, which know each other.
struct Cluster {
    network: MemNetwork,
    peers: Vec<Peer>,
    members: watch::Sender<Arc<Members>>,
}

impl Cluster {
    async fn start(nodes: usize, faults: Faults, config: Config) -> Self {
        let network = MemNetwork::new(3, faults);
        let mut peers = Vec::new();
        for node in 0..nodes {
            let transport = network.join(&format!("node-{node}"), Epoch(7));
            peers.push(Peer::serve(store_on(BLOCKS, config.clone(), Epoch(7), transport)).await);
        }
        let records = peers
            .iter()
            .map(|peer| (NodeId::new(peer.grpc_endpoint.as_str()), peer.record()));
        let members = Members {
            nodes: records.collect::<BTreeMap<_, _>>(),
            ..Members::default()
        };
        Self {
            network,
            peers,
            members: watch::Sender::new(Arc::new(members)),
        }
    }

    fn exchange(&self, node: usize) -> Exchange {
        let peer = &self.peers[node];
        Exchange::new(
            peer.cache.clone(),
            self.members.subscribe(),
            peer.grpc_endpoint.clone(),
        )
    }

    async fn stop(self) {
        for peer in self.peers {
            peer.store.table().check_integrity();
            peer.stop().await;
        }
    }
}

/// Caches a conversation of `blocks` blocks. Returns its chain.
fn cached(peer: &Peer, seed: u32, blocks: usize) -> Vec<BlockHash> {
    compute(&peer.store, "", &tokens(seed, blocks * BLOCK_TOKENS))
        .chain()
        .to_vec()
}

/// Fills the pool with conversations of 8 blocks, oldest first.
fn fill(peer: &Peer) -> Vec<Vec<BlockHash>> {
    (0..BLOCKS as u32 / 8)
        .map(|seed| cached(peer, seed + 1, 8))
        .collect()
}

fn held(peer: &Peer, chain: &[BlockHash]) -> usize {
    peer.store.lookup_len(chain)
}

fn margin_is_free(peer: &Peer) -> bool {
    peer.store.stats().blocks.free >= peer.cache.margin()
}

/// Runs rounds until the margin is free again.
async fn restore(cluster: &Cluster, node: usize) {
    let exchange = cluster.exchange(node);
    for _ in 0..ROUNDS_MAX {
        let missing = exchange
            .cache
            .margin()
            .saturating_sub(exchange.cache.store().table().counts().free);
        if missing == 0 || !exchange.round(missing).await {
            break;
        }
    }
}

#[tokio::test]
async fn what_memory_is_too_short_for_is_at_a_peer_with_room_and_not_lost() {
    let cluster = Cluster::start(2, Faults::default(), Config::default()).await;
    let chains = fill(&cluster.peers[0]);
    restore(&cluster, 0).await;
    assert!(margin_is_free(&cluster.peers[0]));
    assert_eq!(held(&cluster.peers[0], &chains[0]), 0, "the oldest left");
    assert_eq!(held(&cluster.peers[1], &chains[0]), 8);
    let pins = cluster.peers[1].store.match_prefix(&chains[0]);
    assert_content(&cluster.peers[1].store, &pins, &chains[0]);
    drop(pins);
    assert!(
        chains[1..]
            .iter()
            .all(|chain| held(&cluster.peers[0], chain) == 8)
    );
    cluster.stop().await;
}

#[tokio::test]
async fn the_background_task_keeps_the_margin() {
    let cluster = Cluster::start(2, Faults::default(), Config::default()).await;
    let end = CancellationToken::new();
    let running = tokio::spawn(cluster.exchange(0).run(end.clone()));
    fill(&cluster.peers[0]);
    eventually("the margin is free", || margin_is_free(&cluster.peers[0])).await;
    end.cancel();
    timeout(PATIENCE, running).await.expect("it ends").unwrap();
    cluster.stop().await;
}

#[tokio::test]
async fn a_duplicate_goes_first_and_moves_nothing() {
    let cluster = Cluster::start(2, Faults::default(), Config::default()).await;
    let chains = fill(&cluster.peers[0]);
    assert_eq!(cached(&cluster.peers[1], 3, 8), chains[2]);
    restore(&cluster, 0).await;
    assert_eq!(held(&cluster.peers[0], &chains[2]), 6, "two blocks were enough");
    assert_eq!(held(&cluster.peers[0], &chains[0]), 8, "though it is older");
    assert_eq!(cluster.peers[1].store.stats().blocks.cached, 8, "nothing came");
    cluster.stop().await;
}

#[tokio::test]
async fn a_node_without_peers_gives_up_nothing_before_it_must() {
    let cluster = Cluster::start(1, Faults::default(), Config::default()).await;
    let chains = fill(&cluster.peers[0]);
    restore(&cluster, 0).await;
    assert!(chains.iter().all(|chain| held(&cluster.peers[0], chain) == 8));
    assert_eq!(cluster.exchange(0).hand_over().now_or_never(), Some(0));
    cluster.stop().await;
}

#[tokio::test]
async fn two_full_nodes_of_one_age_pass_nothing_back_and_forth() {
    let cluster = Cluster::start(2, Faults::default(), Config::default()).await;
    fill(&cluster.peers[0]);
    (0..BLOCKS as u32 / 8).for_each(|seed| {
        cached(&cluster.peers[1], seed + 100, 8);
    });
    for node in [0, 1, 0, 1] {
        restore(&cluster, node).await;
    }
    let fetched: u64 = cluster
        .peers
        .iter()
        .map(|peer| peer.store.stats().fetched_bytes)
        .sum();
    let block_bytes = cluster.peers[0].store.stats().block_bytes as u64;
    // The second node may find room in the first one's margin, but never more.
    assert!(fetched <= 16 * block_bytes, "{fetched} bytes moved");
    assert!(cluster.peers.iter().all(margin_is_free));
    cluster.stop().await;
}

#[tokio::test]
async fn a_peer_that_is_gone_costs_time_and_nothing_else() {
    let config = Config {
        offer_timeout: Duration::from_millis(300),
        ..Config::default()
    };
    let cluster = Cluster::start(3, Faults::default(), config).await;
    let chains = fill(&cluster.peers[0]);
    // Its gRPC answers, but nobody can read from the giver, nor it from anybody.
    cluster.network.kill(&cluster.peers[0].transport.endpoint());
    restore(&cluster, 0).await;
    assert!(
        margin_is_free(&cluster.peers[0]),
        "the blocks are dropped instead"
    );
    for peer in &cluster.peers[1..] {
        assert!(chains.iter().all(|chain| held(peer, chain) == 0));
        eventually("nothing is held for it", || {
            let blocks = peer.store.stats().blocks;
            (blocks.owned, blocks.pinned) == (0, 0)
        })
        .await;
    }
    cluster.stop().await;
}

#[tokio::test]
async fn broken_transfers_and_flipped_bits_never_reach_a_cache() {
    let faults = Faults {
        break_probability: 0.3,
        flip_probability: 0.2,
        chunk_bytes: 128.try_into().unwrap(),
        ..Faults::default()
    };
    let cluster = Cluster::start(2, faults, Config::default()).await;
    let chains = fill(&cluster.peers[0]);
    for seed in 0..10 {
        restore(&cluster, 0).await;
        assert!(margin_is_free(&cluster.peers[0]));
        cached(&cluster.peers[0], 200 + seed, 8);
    }
    let taker = &cluster.peers[1].store;
    let moved: usize = chains
        .iter()
        .map(|chain| {
            let pins = taker.match_prefix(chain);
            assert_content(taker, &pins, &chain[..pins.len()]);
            pins.len()
        })
        .sum();
    assert!(moved > 0, "some got through");
    cluster.stop().await;
}

#[tokio::test]
async fn a_node_that_ends_leaves_its_blocks_with_its_peers() {
    let cluster = Cluster::start(3, Faults::default(), Config::default()).await;
    let chains: Vec<_> = (1..=4).map(|seed| cached(&cluster.peers[0], seed, 8)).collect();
    let exchange = cluster.exchange(0);
    let mut left = Vec::new();
    let given = {
        let mut giving = std::pin::pin!(exchange.hand_over());
        std::future::poll_fn(|context| {
            let polled = giving.as_mut().poll(context);
            left.push(exchange.handover_left());
            polled
        })
        .await
    };
    assert_eq!(given, 4 * 8);
    assert_eq!(
        (left.first(), left.last()),
        (Some(&(4 * 8)), Some(&0)),
        "{left:?}"
    );
    assert!(left.is_sorted_by(|before, after| before >= after), "{left:?}");
    for chain in &chains {
        let held = cluster.peers[1..].iter().map(|peer| held(peer, chain)).max();
        assert_eq!(held, Some(8));
    }
    cluster.stop().await;
}

#[tokio::test]
async fn nodes_that_all_end_keep_each_other_no_longer_than_a_question() {
    let cluster = Cluster::start(2, Faults::default(), Config::default()).await;
    fill(&cluster.peers[0]);
    let exchange = cluster.exchange(0);
    let Cluster { mut peers, .. } = cluster;
    peers.pop().expect("two nodes").stop().await;
    let given = timeout(PATIENCE, exchange.hand_over()).await;
    assert_eq!(given, Ok(0));
    peers.pop().expect("one node").stop().await;
}

#[tokio::test]
async fn a_pinned_prefix_gets_as_many_replicas_as_were_asked_for() {
    let cluster = Cluster::start(3, Faults::default(), Config::default()).await;
    let chain = cached(&cluster.peers[0], 1, 8);
    let wanted = Wanted {
        root: cluster.peers[0].store.common_root(),
        chain: chain.clone(),
        peers_min: 1,
    };
    cluster.exchange(0).replicate(&wanted).await;
    let replicas = || {
        cluster.peers[1..]
            .iter()
            .filter(|peer| held(peer, &chain) == 8)
            .count()
    };
    assert_eq!(replicas(), 1);
    cluster.exchange(0).replicate(&wanted).await;
    assert_eq!(replicas(), 1, "enough is enough");
    cluster
        .exchange(0)
        .replicate(&Wanted {
            peers_min: 2,
            ..wanted
        })
        .await;
    assert_eq!(replicas(), 2);
    cluster.stop().await;
}

#[tokio::test]
async fn a_corrupt_block_is_fetched_again_from_a_peer_that_has_it() {
    let config = Config {
        scrub_bytes_per_second: 1 << 30,
        ..Config::default()
    };
    let cluster = Cluster::start(2, Faults::default(), config).await;
    let chain = cached(&cluster.peers[0], 1, 8);
    assert_eq!(cached(&cluster.peers[1], 1, 8), chain);
    let store = &cluster.peers[0].store;
    let block = store.match_prefix(&chain)[3].block();
    write(store, block, &[0; 512]);
    let end = CancellationToken::new();
    let running = tokio::spawn(cluster.exchange(0).run(end.clone()));
    eventually("the block was found corrupt", || store.stats().corruptions == 1).await;
    eventually("all of the chain is there again", || {
        held(&cluster.peers[0], &chain) == 8
    })
    .await;
    let pins = store.match_prefix(&chain);
    assert_content(store, &pins, &chain);
    drop(pins);
    end.cancel();
    timeout(PATIENCE, running).await.expect("it ends").unwrap();
    cluster.stop().await;
}

#[tokio::test]
async fn a_tenants_blocks_move_too_and_are_found_by_the_tenant_alone() {
    let cluster = Cluster::start(2, Faults::default(), Config::default()).await;
    let tokens = tokens(1, 8 * BLOCK_TOKENS);
    let chain = compute(&cluster.peers[0].store, "tenant", &tokens)
        .chain()
        .to_vec();
    assert_eq!(cluster.exchange(0).hand_over().await, 8);
    let taker = &cluster.peers[1].store;
    assert_eq!(taker.chain("tenant", &tokens).1, chain);
    assert_eq!(taker.lookup_len(&chain), 8);
    assert_eq!(taker.lookup_len(&taker.chain("", &tokens).1), 0);
    cluster.stop().await;
}
