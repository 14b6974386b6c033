mod reads;

use std::ptr::NonNull;
use std::time::Duration;

use rstest::rstest;
use tokio::time::Instant;
use transfer::mem::Faults;
use transfer::{HostMemory, MemNetwork, Slice, TransferBatch};

use super::*;
use crate::testing::{
    BLOCK_TOKENS, PATIENCE, compute, content, eventually, lonely_store, read, space, store_on, tokens, write,
};

/// The block after the root whose tokens are `seed`'s.
fn first_hash(store: &Store, seed: u32) -> (BlockHash, BlockHash) {
    let (root, chain) = store.chain("", &tokens(seed, BLOCK_TOKENS));
    (root, chain[0])
}

fn one_block(store: &Store) -> OwnedBlock {
    store.allocate(1).unwrap().pop().unwrap()
}

struct Accelerator(Arc<HostMemory>);

#[allow(unsafe_code)]
// SAFETY: the memory is the host's, so all of the contract holds; that it says it is a device's makes users
// refuse it.
unsafe impl Memory for Accelerator {
    fn base(&self) -> NonNull<u8> {
        self.0.base()
    }
    fn len(&self) -> usize {
        self.0.len()
    }
    fn kind(&self) -> MemoryKind {
        MemoryKind::Device(0)
    }
}

#[test]
fn a_pool_that_cannot_be_one_is_refused() {
    let open = |space: KvSpace, memory: Arc<dyn Memory>| {
        let transport = MemNetwork::new(0, Faults::default()).join("a", Epoch(1));
        Store::new(
            Config::default(),
            space,
            Epoch(1),
            memory,
            transport,
            &node::Metrics::new(),
        )
        .unwrap_err()
    };
    let memory = HostMemory::allocate(511).unwrap();
    let error = open(space(), memory.clone());
    assert_eq!(
        error,
        StoreError::TooSmall {
            memory_bytes: 511,
            block_bytes: 512
        }
    );
    assert_eq!(error.code(), ErrorCode::Invalid);
    let mut odd = space();
    odd.layout.block_tokens = 9;
    assert_eq!(open(odd, memory), StoreError::Layout(LayoutError::BlockTokens(9)));
    let device = Accelerator(HostMemory::allocate(4096).unwrap());
    let kind = MemoryKind::Device(0);
    assert_eq!(open(space(), Arc::new(device)), StoreError::NotHost { kind });
}

#[test]
fn a_block_is_found_once_it_is_committed_and_until_it_is_evicted() {
    let store = lonely_store(2, Config::default());
    let (root, hash) = first_hash(&store, 1);
    let block = one_block(&store);
    write(&store, block.block(), &content(hash));
    assert_eq!(store.lookup_len(&[hash]), 0);
    let pin = store.commit(block, root, hash);
    assert!(!pin.is_private());
    assert_eq!(pin.checksum(), Checksum::of(&content(hash)));
    assert_eq!(store.lookup_len(&[hash]), 1);
    assert_eq!(store.allocate(2).unwrap_err().available, 1);
    let generation = pin.generation();
    drop(pin);
    let both = store.allocate(2).unwrap();
    assert_eq!(store.lookup_len(&[hash]), 0);
    assert_eq!(store.stats().evictions, 1);
    drop(both);
    let again = store.commit(one_block(&store), root, hash);
    assert!(again.generation() > generation);
}

#[test]
fn committing_what_is_held_gives_the_block_that_is_held() {
    let store = lonely_store(3, Config::default());
    let (root, hash) = first_hash(&store, 1);
    let first = store.commit(one_block(&store), root, hash);
    let second = store.commit(one_block(&store), root, hash);
    assert_eq!(first.block(), second.block());
    let blocks = store.stats().blocks;
    assert_eq!((blocks.cached, blocks.owned, blocks.free), (1, 0, 2));
    drop(first);
    assert_eq!(store.stats().blocks.pinned, 1, "each pin counts");
}

#[test]
fn a_block_without_its_parent_is_private_and_so_is_what_follows() {
    let store = lonely_store(4, Config::default());
    let (_, chain) = store.chain("", &tokens(1, 3 * BLOCK_TOKENS));
    let second = store.commit(one_block(&store), chain[0], chain[1]);
    let third = store.commit(one_block(&store), chain[1], chain[2]);
    assert!(second.is_private() && third.is_private());
    assert_eq!(store.match_prefix(&chain[1..]).len(), 0);
    assert_eq!(store.stats().log_sequence, 0, "nobody is told of it");
    drop((second, third));
    assert_eq!(store.stats().blocks.free, 4);
}

/// Nodes of different builds compare checksums, so these are the values that the hash's authors publish for the first
/// bytes of their test pattern.
#[rstest]
#[case(512, 0x617e_4959_9013_cb6b)]
#[case(2048, 0xdd59_e2c3_a5f0_38e0)]
fn checksums_are_those_of_the_reference_implementation(#[case] bytes: usize, #[case] expected: u64) {
    let state = |state: &u64| Some(state.wrapping_mul(0x9e37_79b1_85eb_ca8d));
    let pattern = std::iter::successors(Some(0x9e37_79b1), state).map(|state| (state >> 56) as u8);
    let mut space = space();
    space.layout.block_tokens = BLOCK_TOKENS * bytes / space.layout.block_bytes();
    let transport = MemNetwork::new(0, Faults::default()).join("lonely", Epoch(1));
    let memory = HostMemory::allocate(bytes).unwrap();
    let store = Store::new(
        Config::default(),
        space,
        Epoch(1),
        memory,
        transport,
        &node::Metrics::new(),
    )
    .unwrap();
    let block = one_block(&store);
    write(&store, block.block(), &pattern.take(bytes).collect::<Vec<_>>());
    assert_eq!(store.checksum(block.block()), Checksum(expected));
}

#[test]
fn damaged_bytes_are_not_adopted() {
    let store = lonely_store(1, Config::default());
    let (root, hash) = first_hash(&store, 1);
    let block = one_block(&store);
    write(&store, block.block(), &content(hash));
    let promised = store.checksum(block.block());
    let mut damaged = content(hash);
    damaged[511] ^= 0x80;
    write(&store, block.block(), &damaged);
    let error = store.adopt(block, root, hash, promised).unwrap_err();
    assert_eq!((error.hash, error.expected), (hash, promised));
    assert_eq!(types::Error::from(error).code, ErrorCode::Corrupt);
    let stats = store.stats();
    assert_eq!(
        (stats.corruptions, stats.blocks.free, stats.blocks.cached),
        (1, 1, 0)
    );
}

/// A store and a peer that writes into it.
struct Pair {
    store: Store,
    writer: Arc<dyn Transport>,
    source: RegionId,
}

fn pair(faults: Faults) -> Pair {
    let network = MemNetwork::new(1, faults);
    let writer = network.join("writer", Epoch(1));
    let memory = HostMemory::allocate(4096).unwrap();
    transfer::memory::copy_in(memory.as_ref(), 0, &[0xee; 4096]).unwrap();
    Pair {
        store: store_on(4, Config::default(), Epoch(1), network.join("store", Epoch(1))),
        source: writer.register(memory).unwrap(),
        writer,
    }
}

impl Pair {
    fn write_to(&self, grant: &Grant) -> impl Future<Output = Result<(), TransferError>> + use<> {
        let slice = |offset: &u64| Slice {
            local_offset: 0,
            remote_offset: *offset,
            len: 512,
        };
        let batch = TransferBatch {
            region: self.source,
            remote: grant.region().clone(),
            slices: grant.block_offsets().iter().map(slice).collect(),
            keep: transfer::Keep::default(),
        };
        let written = self.writer.write(batch, Instant::now() + PATIENCE);
        async move { written.await.map(drop) }
    }
}

#[tokio::test(start_paused = true)]
async fn a_fence_gives_back_what_the_peer_wrote() {
    let pair = pair(Faults::default());
    let grant = pair.store.grant(pair.store.allocate(3).unwrap()).unwrap();
    let ids = grant.blocks().to_vec();
    pair.write_to(&grant).await.unwrap();
    let late = pair.write_to(&grant);
    let landed = grant.fence().await.into_iter();
    let blocks: Vec<_> = landed.map(Landed::into_block).collect();
    assert_eq!(blocks.iter().map(OwnedBlock::block).collect::<Vec<_>>(), ids);
    for block in &blocks {
        assert_eq!(read(&pair.store, block.block()), [0xee; 512]);
        write(&pair.store, block.block(), &[1; 512]);
    }
    assert_eq!(late.await.unwrap_err().code(), ErrorCode::NotFound);
    for block in &blocks {
        assert_eq!(read(&pair.store, block.block()), [1; 512]);
    }
    drop(blocks);
    assert_eq!(pair.store.stats().blocks.free, 4);
}

#[rstest]
#[case::dropped(false)]
#[case::cancelled_in_the_fence(true)]
#[tokio::test(start_paused = true)]
async fn however_a_grant_ends_its_blocks_are_free_only_after_the_fence(#[case] cancelled: bool) {
    let second = Duration::from_secs(1);
    let pair = pair(Faults {
        delay: second..2 * second,
        ..Faults::default()
    });
    let store = pair.store.clone();
    let grant = store.grant(store.allocate(4).unwrap()).unwrap();
    let writing = tokio::spawn(pair.write_to(&grant));
    tokio::time::sleep(second / 2).await;
    if cancelled {
        let mut fencing = Box::pin(grant.fence());
        let _ = futures::poll!(&mut fencing);
        drop(fencing);
    } else {
        drop(grant);
    }
    assert!(
        store.allocate(1).is_err() || cancelled,
        "the fence has not even begun"
    );
    eventually("the fence has ended and the blocks are free", || {
        store.stats().blocks.free == 4
    })
    .await;
    let blocks = store.allocate(4).unwrap();
    for block in &blocks {
        write(&store, block.block(), &[1; 512]);
    }
    assert!(writing.await.unwrap().is_err());
    tokio::time::sleep(10 * second).await;
    for block in &blocks {
        assert_eq!(read(&store, block.block()), [1; 512]);
    }
}

#[test]
fn a_grant_that_cannot_be_fenced_is_never_used_again() {
    let store = lonely_store(2, Config::default());
    let grant = store.grant(store.allocate(1).unwrap()).unwrap();
    drop(grant);
    let blocks = store.stats().blocks;
    assert_eq!(
        (blocks.owned, blocks.free),
        (1, 1),
        "without a runtime nothing can be awaited"
    );
}

#[test]
fn lookups_count_hits_and_misses_and_move_no_log() {
    let store = lonely_store(4, Config::default());
    drop(compute(&store, "", &tokens(1, 2 * BLOCK_TOKENS)));
    let before = store.stats();
    let (_, chain) = store.chain("", &tokens(1, 3 * BLOCK_TOKENS));
    assert_eq!(store.match_prefix(&chain).len(), 2);
    let after = store.stats();
    assert_eq!(chain.len(), 2 + 1);
    assert_eq!((after.hits - before.hits, after.misses - before.misses), (2, 1));
    assert_eq!(after.log_sequence, 2);
}
