use proptest::prelude::*;

use super::*;
use crate::Config;
use crate::testing::{BLOCK_TOKENS, assert_content, compute, content, lonely_store, read, tokens, write};

#[test]
fn a_prefix_that_was_computed_once_is_shared_by_all_that_follow() {
    let store = lonely_store(8, Config::default());
    let prompt = tokens(1, 3 * BLOCK_TOKENS + 5);
    let first = compute(&store, "", &prompt);
    assert_eq!(first.cached_tokens(), 0);
    let mut second = SequenceBlocks::begin(&store, "", &prompt);
    assert_eq!(second.cached_tokens(), 3 * BLOCK_TOKENS);
    assert_eq!(second.block_ids(), &first.block_ids()[..3]);
    assert_content(&store, second.shared(), first.chain());
    second.grow_to(prompt.len()).unwrap();
    assert_eq!(
        (second.writable_from(), second.capacity_tokens()),
        (3 * BLOCK_TOKENS, 4 * BLOCK_TOKENS)
    );
    let stats = store.stats();
    assert_eq!((stats.hits, stats.misses), (3, 3));
    drop((first, second));
    let blocks = store.stats().blocks;
    assert_eq!(
        (blocks.owned, blocks.pinned, blocks.cached, blocks.free),
        (0, 0, 3, 5)
    );
}

#[test]
fn tenants_do_not_see_each_other() {
    let store = lonely_store(8, Config::default());
    let prompt = tokens(1, 2 * BLOCK_TOKENS);
    let _first = compute(&store, "a", &prompt);
    assert_eq!(SequenceBlocks::begin(&store, "b", &prompt).cached_tokens(), 0);
    assert_eq!(SequenceBlocks::begin(&store, "", &prompt).cached_tokens(), 0);
    assert_eq!(
        SequenceBlocks::begin(&store, "a", &prompt).cached_tokens(),
        2 * BLOCK_TOKENS
    );
}

#[test]
fn of_two_that_compute_the_same_one_is_kept_and_the_other_stays_readable_until_told() {
    let store = lonely_store(8, Config::default());
    let prompt = tokens(1, 2 * BLOCK_TOKENS);
    let mut slow = SequenceBlocks::begin(&store, "", &prompt);
    slow.grow_to(prompt.len()).unwrap();
    let before = slow.block_ids().to_vec();
    for (index, block) in before.iter().enumerate() {
        write(&store, *block, &content(slow.chain()[index]));
    }
    let fast = compute(&store, "", &prompt);
    slow.commit_full(&prompt, prompt.len());
    assert_eq!(slow.block_ids(), fast.block_ids());
    assert_eq!(store.stats().blocks.owned, 2, "a transfer may still read them");
    assert_eq!(read(&store, before[0]), content(slow.chain()[0]));
    slow.free_displaced();
    assert_eq!(store.stats().blocks.owned, 0);
}

#[test]
fn a_chain_goes_on_into_what_is_generated() {
    let store = lonely_store(8, Config::default());
    let all = tokens(1, 3 * BLOCK_TOKENS);
    let prompt = &all[..BLOCK_TOKENS + 3];
    let mut sequence = SequenceBlocks::begin(&store, "", prompt);
    for computed in 0..=all.len() {
        sequence.grow_to(computed).unwrap();
        sequence.commit_full(&all[..computed], computed);
        assert_eq!(sequence.shared_blocks(), computed / BLOCK_TOKENS);
    }
    drop(sequence);
    let next_turn = SequenceBlocks::begin(&store, "", &all);
    assert_eq!(next_turn.cached_tokens(), all.len());
}

#[test]
fn what_a_peer_wrote_is_adopted_whole_or_not_at_all() {
    let store = lonely_store(8, Config::default());
    let prompt = tokens(1, 2 * BLOCK_TOKENS + 3);
    let mut sequence = SequenceBlocks::begin(&store, "", &prompt);
    let mut receive = |damaged: Option<usize>| {
        let blocks = store.allocate(3).unwrap();
        let mut checksums = Vec::new();
        for (index, block) in blocks.iter().enumerate() {
            write(
                &store,
                block.block(),
                &vec![index as u8; content(sequence.root()).len()],
            );
            checksums.push(store.checksum(block.block()));
            if damaged == Some(index) {
                checksums[index].0 ^= 1;
            }
        }
        let landed = blocks.into_iter().map(|block| Landed::new(block, None));
        sequence.adopt(landed.collect(), &checksums)
    };
    for damaged in 0..3 {
        assert!(receive(Some(damaged)).is_err());
        let stats = store.stats();
        assert_eq!((stats.blocks.free, stats.corruptions), (8, damaged as u64 + 1));
    }
    receive(None).unwrap();
    assert_eq!((sequence.shared_blocks(), sequence.block_ids().len()), (2, 3));
    assert_eq!(sequence.writable_from(), 2 * BLOCK_TOKENS);
    assert_eq!(store.lookup_len(sequence.chain()), 2);
    let blocks = store.stats().blocks;
    assert_eq!((blocks.owned, blocks.pinned), (1, 2));
}

#[test]
fn a_pool_that_is_too_small_says_so_and_keeps_what_the_sequence_has() {
    let store = lonely_store(1, Config::default());
    let prompt = tokens(1, 2 * BLOCK_TOKENS);
    let mut sequence = SequenceBlocks::begin(&store, "", &prompt);
    sequence.grow_to(BLOCK_TOKENS).unwrap();
    let error = sequence.grow_to(prompt.len()).unwrap_err();
    assert_eq!((error.needed, error.available, error.capacity), (1, 0, 1));
    assert_eq!(sequence.capacity_tokens(), BLOCK_TOKENS);
    sequence.commit_full(&prompt, BLOCK_TOKENS);
    sequence.release();
    assert_eq!(
        SequenceBlocks::begin(&store, "", &prompt).cached_tokens(),
        BLOCK_TOKENS
    );
}

/// A few conversations that share prefixes, so that blocks are shared, doubled and evicted.
fn conversation(which: u8, len: usize) -> Vec<Token> {
    let mut all = tokens(u32::from(which % 2), 2 * BLOCK_TOKENS);
    all.extend(tokens(10 + u32::from(which), 100));
    all.truncate(len);
    all
}

#[derive(Debug, Clone)]
enum Op {
    Begin(u8, usize),
    Compute(usize, usize),
    FreeDisplaced(usize),
    Release(usize),
}

struct Running {
    blocks: SequenceBlocks,
    tokens: Vec<Token>,
    computed: usize,
}

impl Running {
    /// The bytes of block `index` once its tokens up to `computed` are.
    fn expected(&self, index: usize) -> Vec<u8> {
        let mut parent = self.blocks.root();
        for block in self.tokens.chunks(BLOCK_TOKENS).take(index) {
            parent = parent.child(block);
        }
        let end = self.computed.min((index + 1) * BLOCK_TOKENS);
        content(parent.child(&self.tokens[index * BLOCK_TOKENS..end]))
    }

    fn check(&self, store: &Store) {
        for index in 0..self.computed.div_ceil(BLOCK_TOKENS) {
            let found = read(store, self.blocks.block_ids()[index]);
            assert_eq!(found, self.expected(index), "block {index} was overwritten");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whoever_comes_and_goes_every_sequence_finds_its_own_bytes(
        ops in prop::collection::vec(
            prop_oneof![
                2 => (any::<u8>().prop_map(|which| which % 6), 1..50usize).prop_map(|(which, len)| Op::Begin(which, len)),
                6 => (any::<usize>(), 1..12usize).prop_map(|(i, count)| Op::Compute(i, count)),
                1 => any::<usize>().prop_map(Op::FreeDisplaced),
                1 => any::<usize>().prop_map(Op::Release),
            ],
            1..80,
        ),
    ) {
        let store = lonely_store(14, Config::default());
        let mut running: Vec<Running> = Vec::new();
        for op in ops {
            match op {
                Op::Begin(which, len) => {
                    let tokens = conversation(which, len);
                    let blocks = SequenceBlocks::begin(&store, "", &tokens);
                    let computed = blocks.cached_tokens();
                    running.push(Running { blocks, tokens, computed });
                }
                Op::Compute(i, count) if !running.is_empty() => {
                    let at = i % running.len();
                    let one = &mut running[at];
                    let target = (one.computed + count).min(one.tokens.len());
                    if one.blocks.grow_to(target).is_ok() {
                        let from = one.computed.max(one.blocks.writable_from());
                        one.computed = target;
                        for index in from / BLOCK_TOKENS..target.div_ceil(BLOCK_TOKENS) {
                            assert!(index >= one.blocks.shared_blocks());
                            write(&store, one.blocks.block_ids()[index], &one.expected(index));
                        }
                        one.blocks.commit_full(&one.tokens, one.computed);
                    }
                }
                Op::FreeDisplaced(i) if !running.is_empty() => {
                    let at = i % running.len();
                    running[at].blocks.free_displaced();
                }
                Op::Release(i) if !running.is_empty() => {
                    let at = i % running.len();
                    running.swap_remove(at).blocks.release();
                }
                Op::Compute(..) | Op::FreeDisplaced(_) | Op::Release(_) => {}
            }
            running.iter().for_each(|one| one.check(&store));
            store.table().check_integrity();
        }
        drop(running);
        let blocks = store.stats().blocks;
        prop_assert_eq!((blocks.owned, blocks.pinned), (0, 0));
    }
}
