//! One bit is wrong in one of a hundred blocks on their way: every one of them is noticed, and none is believed.

use std::collections::BTreeSet;

use transfer::mem::What;

use super::*;
use crate::SequenceBlocks;
use crate::testing::{read, space};

const BLOCKS_MOVED: usize = 100_000;

/// A network on which every block travels as one chunk.
fn flipping(seed: u64) -> MemNetwork {
    let faults = Faults {
        chunk_bytes: space().layout.block_bytes().try_into().unwrap(),
        flip_probability: 0.01,
        ..Faults::default()
    };
    MemNetwork::new(seed, faults)
}

/// The transfers of which a bit changed, once per bit.
fn flips(network: &MemNetwork) -> Vec<u64> {
    let events = network.events();
    let of_event = |event: &transfer::mem::Event| match event.what {
        What::Flipped { transfer, .. } => Some(transfer),
        _ => None,
    };
    events.iter().filter_map(of_event).collect()
}

#[tokio::test]
async fn every_bit_that_changes_in_a_fetch_is_caught_counted_and_its_block_computed() {
    const CHAIN: usize = 10_000;
    let (mut flipped, mut caught) = (0, 0);
    for round in 0..BLOCKS_MOVED / CHAIN {
        let network = flipping(round as u64);
        let store_at = |name| {
            let transport = network.join(name, Epoch(7));
            store_on(CHAIN, block_by_block(), Epoch(7), transport)
        };
        let (peer, store) = (Peer::serve(store_at("peer")).await, store_at("store"));
        let chain = prompt_at(&peer, CHAIN);
        let prompt = tokens(1, CHAIN * BLOCK_TOKENS);
        let mut sequence = SequenceBlocks::begin(&store, "", &prompt);
        let (sources, channels) = ([source(&peer, CHAIN)], channels());
        loop {
            let fetch = Fetch {
                purpose: Purpose::Request,
                root: store.common_root(),
                chain: &chain,
                from: sequence.shared_blocks(),
                sources: &sources,
                deadline: Instant::now() + PATIENCE,
            };
            sequence.extend_cached(fetch_prefix(&store, &channels, fetch).await.blocks);
            let next = sequence.shared_blocks();
            if next == CHAIN {
                break;
            }
            sequence.grow_to((next + 1) * BLOCK_TOKENS).unwrap();
            write(&store, sequence.block_ids()[next], &content(chain[next]));
            sequence.commit_full(&prompt, (next + 1) * BLOCK_TOKENS);
        }
        assert_content(&store, sequence.shared(), &chain);
        flipped += flips(&network).len();
        caught += store.stats().corruptions as usize;
        peer.stop().await;
    }
    println!("{flipped} of {BLOCKS_MOVED} blocks had a wrong bit, {caught} were caught");
    assert_eq!(caught, flipped);
    assert!(
        (800..1200).contains(&flipped),
        "about one in a hundred, but {flipped}"
    );
}

#[tokio::test]
async fn every_bit_that_changes_in_a_handoff_is_caught_and_the_handoff_repeated() {
    /// Four full blocks and a partial one.
    const PROMPT_TOKENS: usize = 4 * BLOCK_TOKENS + 3;
    const BLOCKS: usize = 5;
    let network = flipping(7);
    let store_at = |name| store_on(64, Config::default(), Epoch(7), network.join(name, Epoch(7)));
    let (near, far) = (store_at("near"), store_at("far"));
    let mut refused = BTreeSet::new();
    let mut transfers = 0;
    for handoff in 0..BLOCKS_MOVED / BLOCKS {
        let prompt = tokens(handoff as u32, PROMPT_TOKENS);
        let mut source = SequenceBlocks::begin(&near, "", &prompt);
        source.grow_to(PROMPT_TOKENS).unwrap();
        let bytes: Vec<Vec<u8>> = (0..BLOCKS)
            .map(|block| content(*source.chain().get(block).unwrap_or(&source.root())))
            .collect();
        for (block, bytes) in source.block_ids().iter().zip(&bytes) {
            write(&near, *block, bytes);
        }
        let checksums: Vec<Checksum> = source
            .block_ids()
            .iter()
            .map(|block| near.checksum(*block))
            .collect();
        let mut received = SequenceBlocks::begin(&far, "", &prompt);
        loop {
            transfers += 1;
            let grant = far.grant(far.allocate(BLOCKS).unwrap()).unwrap();
            let slice = |(block, remote_offset): (&types::BlockId, u64)| Slice {
                local_offset: near.byte_range(*block).start,
                remote_offset,
                len: space().layout.block_bytes() as u64,
            };
            let batch = TransferBatch {
                region: near.region(),
                remote: grant.region().clone(),
                slices: source
                    .block_ids()
                    .iter()
                    .zip(grant.block_offsets())
                    .map(slice)
                    .collect(),
                keep: Keep::default(),
            };
            let transport = near.transport();
            transport.write(batch, Instant::now() + PATIENCE).await.unwrap();
            match received.adopt(grant.fence().await, &checksums) {
                Ok(()) => break,
                Err(_) => refused.insert(transfers),
            };
        }
        for (block, bytes) in received.block_ids().iter().zip(&bytes) {
            assert_eq!(&read(&far, *block), bytes, "of handoff {handoff}");
        }
    }
    let flipped: BTreeSet<u64> = flips(&network).into_iter().collect();
    println!(
        "{} of {transfers} handoffs had a wrong bit, {} were refused",
        flipped.len(),
        refused.len()
    );
    assert_eq!(refused, flipped);
    assert_eq!(far.stats().corruptions, refused.len() as u64);
    assert!((700..1300).contains(&flipped.len()));
    assert_eq!(far.stats().blocks.owned, 0);
}
