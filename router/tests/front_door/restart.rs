//! A router has nothing of its own that it could lose: one that starts anew learns all from the nodes.

use std::time::Instant;

use types::{BlockEvent, BlockHash, Role, Tier};

use crate::harness::{FakeNode, Fixture, PATIENCE, Router, config, greeting};

const NODES: u64 = 10;
const CHAINS: u64 = 400;
const CHAIN_BLOCKS: u64 = 250;

/// What a node holds that serves conversations nobody else has.
fn blocks(node: u64, root: BlockHash) -> Vec<BlockEvent> {
    let hash = |chain: u64, block: u64| {
        let number = (node * CHAINS + chain) * CHAIN_BLOCKS + block + 1;
        BlockHash((u128::from(number) << 64 | u128::from(number)).to_le_bytes())
    };
    let places = (0..CHAINS).flat_map(|chain| (0..CHAIN_BLOCKS).map(move |block| (chain, block)));
    let stored = |(chain, block)| BlockEvent::Stored {
        hash: hash(chain, block),
        parent: if block == 0 { root } else { hash(chain, block - 1) },
        tier: Tier::Host,
    };
    places.map(stored).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_starts_anew_knows_a_million_blocks_by_the_time_it_serves() {
    let fixture = Fixture::new();
    let nodes: Vec<FakeNode> = (0..NODES)
        .map(|node| {
            let blocks = blocks(node, fixture.space.root());
            let id = format!("d{node}");
            FakeNode::with_blocks(&fixture.space, &id, Role::Decode, blocks, |_| greeting())
        })
        .collect();
    let nodes: Vec<&FakeNode> = nodes.iter().collect();
    for start in ["first", "second"] {
        let began = Instant::now();
        let router = Router::start(&fixture, config(), &nodes).await;
        let served = router
            .post("/v1/completions", r#"{"model": "tiny", "prompt": "Hi"}"#)
            .await;
        assert_eq!(served.status, 200, "{}", served.body);
        let served = began.elapsed();
        let indexed = || router.handle.dispatcher.cluster().lock().index().len();
        while indexed() < (NODES * CHAINS * CHAIN_BLOCKS) as usize {
            assert!(began.elapsed() < PATIENCE, "{} blocks are known", indexed());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        eprintln!(
            "{start} start: served after {served:?}, {} blocks known after {:?}",
            indexed(),
            began.elapsed()
        );
        router.stop().await;
    }
}
