use types::{Epoch, NodeId, Role};

use super::*;
use crate::testing::{BLOCK_TOKENS, PATIENCE, compute, space, tokens};

fn identity() -> Identity {
    Identity {
        id: NodeId::new("store-0"),
        epoch: Epoch(3),
        role: Role::Store,
    }
}

async fn start(capacity_bytes: usize, shutdown: &CancellationToken) -> Result<StoreNode, StartError> {
    let config = Config {
        capacity_bytes,
        ..Config::default()
    };
    StoreNode::start(
        config,
        space(),
        &identity(),
        Channels::new(),
        &node::Metrics::new(),
        shutdown.clone(),
    )
    .await
}

#[tokio::test]
async fn a_store_node_says_what_it_is_and_ends_when_told() {
    let shutdown = CancellationToken::new();
    let node = start(4 * 512 + 100, &shutdown).await.unwrap();
    let record = node.record(&identity(), "tiny", "127.0.0.1:1", "127.0.0.1:2");
    assert_eq!((record.capacity_blocks, record.context_tokens_max), (4, 0));
    assert!(
        record.transfer_endpoint.starts_with("tcp://127.0.0.1:"),
        "{}",
        record.transfer_endpoint
    );
    assert_eq!(record.kv_space, Some(space()));

    let _held = compute(node.store(), "", &tokens(1, BLOCK_TOKENS));
    drop(compute(node.store(), "", &tokens(2, BLOCK_TOKENS)));
    let load = node.load();
    assert_eq!(
        (load.free_blocks, load.evictable_blocks, load.draining),
        (2, 1, false)
    );
    let running = tokio::spawn(node.clone().run());
    shutdown.cancel();
    tokio::time::timeout(PATIENCE, running)
        .await
        .expect("it ends")
        .unwrap();
    assert!(node.load().draining);
}

#[tokio::test]
async fn a_pool_without_room_for_a_block_does_not_start() {
    let shutdown = CancellationToken::new();
    let too_small = start(511, &shutdown).await.unwrap_err();
    assert!(
        matches!(too_small, StartError::Store(StoreError::TooSmall { .. })),
        "{too_small}"
    );
    assert_eq!(too_small.code(), ErrorCode::Invalid);
    assert!(matches!(
        start(0, &shutdown).await.unwrap_err(),
        StartError::Transport(TransferError::Memory(_))
    ));
    assert!(start(512, &shutdown).await.is_ok(), "one block is a store");
}
