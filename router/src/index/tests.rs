use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use types::Tier;

use super::*;

const ROOT: BlockHash = BlockHash([7; 16]);
const NODES: usize = 131;

fn stored(hash: BlockHash, parent: BlockHash) -> BlockEvent {
    BlockEvent::Stored {
        hash,
        parent,
        tier: Tier::Host,
    }
}

fn node(number: usize) -> NodeId {
    NodeId::new(format!("node-{number:03}"))
}

/// A chain that branches off another one: conversation `family` shares its first `shared` blocks with every
/// other of its family.
fn chain(family: u32, variant: u32, shared: usize, blocks: usize) -> Vec<BlockHash> {
    let mut parent = ROOT;
    (0..blocks)
        .map(|index| {
            let variant = if index < shared { 0 } else { variant };
            parent = parent.child(&[family, variant, index as u32]);
            parent
        })
        .collect()
}

/// What a node holds, as a prefix length per chain: the invariant by construction.
#[derive(Debug, Default)]
struct Naive {
    held: BTreeMap<NodeId, Vec<BlockHash>>,
    on_disk: BTreeSet<(NodeId, BlockHash)>,
}

impl Naive {
    fn match_prefix(&self, hashes: &[BlockHash]) -> Vec<Match<'_>> {
        let matches = self
            .held
            .iter()
            .map(|(node, held)| {
                let held = || hashes.iter().take_while(|hash| held.contains(hash));
                let on_disk = |hash: &BlockHash| self.on_disk.contains(&(node.clone(), *hash));
                Match {
                    node,
                    blocks: held().count(),
                    in_memory: held().take_while(|hash| !on_disk(hash)).count(),
                }
            })
            .filter(|found| found.blocks > 0);
        matches.collect()
    }
}

/// What the index says, in the order of nodes.
fn match_prefix<'a>(index: &'a PrefixIndex, hashes: &[BlockHash]) -> Vec<Match<'a>> {
    let mut matches = index.match_prefix(hashes);
    matches.sort_by_key(|found| found.node);
    matches
}

#[derive(Debug, Clone)]
enum Op {
    Store {
        node: usize,
        chain: usize,
        blocks: usize,
    },
    DropTail {
        node: usize,
        chain: usize,
        keep: usize,
    },
    /// What is in memory of the chain beyond `keep` blocks goes to disk.
    Offload {
        node: usize,
        chain: usize,
        keep: usize,
    },
    Reset {
        node: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let node = prop_oneof![0usize..4, 62usize..67, 127usize..131];
    prop_oneof![
        4 => (node.clone(), 0usize..6, 1usize..40).prop_map(|(node, chain, blocks)| Op::Store { node, chain, blocks }),
        2 => (node.clone(), 0usize..6, 0usize..40).prop_map(|(node, chain, keep)| Op::DropTail { node, chain, keep }),
        2 => (node.clone(), 0usize..6, 0usize..40).prop_map(|(node, chain, keep)| Op::Offload { node, chain, keep }),
        1 => node.prop_map(|node| Op::Reset { node }),
    ]
}

/// Plays `ops` on both; the naive one is told everything, the index has room for `entries_max`.
fn play(ops: &[Op], chains: &[Vec<BlockHash>], entries_max: usize) -> (PrefixIndex, Naive) {
    let (mut index, mut naive) = (PrefixIndex::new(entries_max), Naive::default());
    for number in 0..NODES {
        // Node 130 occupies slot 130.
        index.nodes.slot_or_new(&node(number));
    }
    for op in ops {
        match op {
            Op::Store {
                node: n,
                chain,
                blocks,
            } => {
                let held = naive.held.entry(node(*n)).or_default();
                let mut parent = ROOT;
                for hash in chains[*chain].iter().take(*blocks) {
                    if !held.contains(hash) {
                        held.push(*hash);
                    }
                    naive.on_disk.remove(&(node(*n), *hash));
                    index.apply(&node(*n), &stored(*hash, parent));
                    parent = *hash;
                }
            }
            Op::DropTail { node: n, chain, keep } => {
                let held = naive.held.entry(node(*n)).or_default();
                for hash in chains[*chain].iter().skip(*keep).rev() {
                    if goes_on(chains, hash, |child| held.contains(child)) {
                        break;
                    }
                    held.retain(|block| block != hash);
                    naive.on_disk.remove(&(node(*n), *hash));
                    index.apply(&node(*n), &BlockEvent::Removed { hash: *hash });
                }
            }
            Op::Offload { node: n, chain, keep } => {
                let held = naive.held.entry(node(*n)).or_default();
                for hash in chains[*chain].iter().skip(*keep).rev() {
                    let in_memory =
                        |hash: &BlockHash| held.contains(hash) && !naive.on_disk.contains(&(node(*n), *hash));
                    if goes_on(chains, hash, in_memory) {
                        break;
                    }
                    if held.contains(hash) {
                        naive.on_disk.insert((node(*n), *hash));
                    }
                    let (hash, tier) = (*hash, Tier::Disk);
                    index.apply(&node(*n), &BlockEvent::Moved { hash, tier });
                }
            }
            Op::Reset { node: n } => {
                naive.held.remove(&node(*n));
                naive.on_disk.retain(|(holder, _)| *holder != node(*n));
                index.reset(&node(*n));
            }
        }
        index.check_integrity();
    }
    (index, naive)
}

/// Whether some chain has a block after `hash` that `is_there`.
fn goes_on(chains: &[Vec<BlockHash>], hash: &BlockHash, is_there: impl Fn(&BlockHash) -> bool) -> bool {
    chains.iter().any(|blocks| {
        let position = blocks.iter().position(|block| block == hash);
        position.is_some_and(|at| blocks.get(at + 1).is_some_and(&is_there))
    })
}

fn chains() -> Vec<Vec<BlockHash>> {
    (0..6)
        .map(|number| chain(number / 3, number % 3, 7, 40))
        .collect()
}

proptest! {
    #[test]
    fn matches_equal_a_scan_of_every_node(ops in prop::collection::vec(op(), 0..60)) {
        let chains = chains();
        let (index, naive) = play(&ops, &chains, usize::MAX);
        for chain in &chains {
            for length in [0, 1, 2, 3, 7, 8, 31, 40] {
                prop_assert_eq!(match_prefix(&index, &chain[..length]), naive.match_prefix(&chain[..length]));
            }
        }
    }

    #[test]
    fn a_full_index_says_less_and_never_more(
        ops in prop::collection::vec(op(), 0..60),
        entries_max in 0usize..200,
    ) {
        let chains = chains();
        let (index, naive) = play(&ops, &chains, entries_max);
        for chain in &chains {
            let truth = naive.match_prefix(chain);
            for found in index.match_prefix(chain) {
                let held = truth.iter().find(|held| held.node == found.node).map_or(0, |held| held.blocks);
                prop_assert!(found.blocks <= held, "{found:?} of {held}");
            }
        }
    }
}

#[test]
fn a_block_stored_twice_counts_once() {
    let mut index = PrefixIndex::new(10);
    let hash = ROOT.child(&[1]);
    for _ in 0..2 {
        index.apply(&node(0), &stored(hash, ROOT));
    }
    assert_eq!((index.len(), index.blocks(&node(0))), (1, 1));
    index.apply(&node(0), &BlockEvent::Removed { hash });
    assert!(index.is_empty());
    assert!(index.match_prefix(&[hash]).is_empty());
}

#[test]
fn unknown_nodes_and_blocks_are_ignored() {
    let mut index = PrefixIndex::new(10);
    index.apply(&node(0), &BlockEvent::Removed { hash: ROOT });
    index.reset(&node(1));
    index.check_integrity();
    assert_eq!(index.blocks(&node(0)), 0);
}

/// Stores a chain as its node's log tells it.
fn store(index: &mut PrefixIndex, holder: &NodeId, chain: &[BlockHash]) {
    let parents = std::iter::once(&ROOT).chain(chain);
    let events: Vec<BlockEvent> = chain
        .iter()
        .zip(parents)
        .map(|(hash, parent)| stored(*hash, *parent))
        .collect();
    index.apply_all(holder, &events);
    index.check_integrity();
}

fn held(index: &PrefixIndex, chain: &[BlockHash]) -> Vec<usize> {
    let matches = match_prefix(index, chain);
    let mut blocks: Vec<usize> = matches.iter().map(|found| found.blocks).collect();
    blocks.sort_unstable_by_key(|blocks| std::cmp::Reverse(*blocks));
    blocks
}

#[test]
fn of_a_chain_longer_than_the_bound_the_beginning_is_kept() {
    let mut index = PrefixIndex::new(3);
    let chain = chain(0, 0, 0, 8);
    store(&mut index, &node(0), &chain);
    assert_eq!((index.refused(), index.len()), (5, 3));
    assert_eq!(held(&index, &chain), [3]);
}

#[test]
fn a_full_index_forgets_the_oldest_chain_from_its_end() {
    let mut index = PrefixIndex::new(1000);
    let chains: Vec<_> = (0..12).map(|family| chain(family, 0, 0, 100)).collect();
    for chain in &chains {
        store(&mut index, &node(0), chain);
    }
    assert!(index.len() > 980, "{} kept", index.len());
    assert_eq!(index.refused() as usize + index.len(), 1200);
    // What was stored last is there to its end, and what is left of an older chain is its beginning.
    assert_eq!(held(&index, &chains[11]), [100]);
    let known = |hash: &BlockHash| index.table.get(key_of(hash)).is_some();
    for chain in &chains {
        let kept = chain.iter().take_while(|hash| known(hash)).count();
        assert!(!chain[kept..].iter().any(known));
    }
    let kept: usize = chains[..4]
        .iter()
        .map(|chain| held(&index, chain).iter().sum::<usize>())
        .sum();
    assert!(kept < 300, "{kept} blocks of the oldest four chains");
}

#[test]
fn a_prefix_that_comes_back_outlives_chains_stored_after_it() {
    let mut index = PrefixIndex::new(1000);
    let shared = chain(0, 0, 100, 100);
    for family in 1..40 {
        store(&mut index, &node(0), &shared);
        store(&mut index, &node(0), &chain(family, 0, 0, 50));
    }
    assert_eq!(held(&index, &shared), [100]);
}

#[test]
fn the_same_events_leave_the_same_index() {
    let play = || {
        let mut index = PrefixIndex::new(500);
        for family in 0..30 {
            store(
                &mut index,
                &node(family as usize % 3),
                &chain(family % 20, family, 10, 60),
            );
        }
        let segments = index.segments.iter();
        segments
            .map(|(number, segment)| (number, segment.keys.clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(play(), play());
}

#[test]
fn a_forgotten_node_is_swept_while_others_keep_what_they_share_with_it() {
    let mut index = PrefixIndex::new(usize::MAX);
    let shared = chain(0, 0, 50, 50);
    for holder in 0..4 {
        store(&mut index, &node(holder), &shared);
    }
    index.reset(&node(1));
    assert_eq!((index.len(), index.blocks(&node(1)), index.stale), (150, 0, 50));
    assert_eq!(held(&index, &shared), [50, 50, 50]);
    // Its blocks of before do not come back with it.
    store(&mut index, &node(1), &shared[..2]);
    assert_eq!(held(&index, &shared), [50, 50, 50, 2]);
    assert_eq!(index.nodes.slot(&node(1)), Some(4), "a stale slot was given away");
    store(&mut index, &node(0), &chain(1, 0, 0, 50));
    assert_eq!(index.stale, 0);
    store(&mut index, &node(9), &shared[..1]);
    assert_eq!(index.nodes.slot(&node(9)), Some(1), "a swept slot is used again");
    assert_eq!(held(&index, &shared), [50, 50, 50, 2, 1]);
}

#[test]
fn nodes_that_come_and_go_take_bounded_room() {
    let mut index = PrefixIndex::new(usize::MAX);
    let shared = chain(0, 0, 50, 50);
    for life in 0..300 {
        index.reset(&node(life % 7));
        store(&mut index, &node(life % 7), &shared[..1 + life % 50]);
    }
    assert!(index.nodes.len() <= STALE_MAX + 8, "{} slots", index.nodes.len());
}

#[test]
fn a_chain_that_leaves_another_one_is_followed_from_the_block_before_it() {
    let mut index = PrefixIndex::new(usize::MAX);
    let (long, branch) = (chain(0, 0, 7, 40), chain(0, 1, 7, 40));
    store(&mut index, &node(0), &long);
    store(&mut index, &node(1), &branch[..20]);
    // It has none of the blocks before the branch, whatever it says of those after it.
    let after: Vec<BlockEvent> = (7..20).map(|at| stored(branch[at], branch[at - 1])).collect();
    index.apply_all(&node(2), &after);
    index.check_integrity();
    assert_eq!(held(&index, &long), [40, 7]);
    assert_eq!(held(&index, &branch), [20, 7]);
    // Once it has, they count.
    store(&mut index, &node(2), &branch[..7]);
    assert_eq!(held(&index, &branch), [20, 20, 7]);
}

#[test]
fn a_branch_whose_beginning_was_gone_is_followed_again() {
    let mut index = PrefixIndex::new(usize::MAX);
    let (long, branch) = (chain(0, 0, 7, 40), chain(0, 1, 7, 20));
    store(&mut index, &node(0), &long);
    store(&mut index, &node(1), &branch);
    for hash in long.iter().rev() {
        index.apply(&node(0), &BlockEvent::Removed { hash: *hash });
        index.check_integrity();
    }
    assert_eq!(held(&index, &branch), [20]);
    // No node does this, since it drops what follows a block before it.
    for hash in branch[..7].iter().rev() {
        index.apply(&node(1), &BlockEvent::Removed { hash: *hash });
        index.check_integrity();
    }
    assert!(held(&index, &branch).is_empty());
    store(&mut index, &node(1), &branch[..7]);
    assert!(held(&index, &branch).iter().all(|blocks| *blocks <= 20));
    store(&mut index, &node(1), &branch);
    assert_eq!(held(&index, &branch), [20]);
}

#[test]
fn what_follows_a_gap_is_left_out() {
    let mut index = PrefixIndex::new(usize::MAX);
    let chain = chain(0, 0, 0, 30);
    store(&mut index, &node(0), &chain[..20]);
    store(&mut index, &node(1), &chain[..5]);
    let after: Vec<BlockEvent> = (10..30).map(|at| stored(chain[at], chain[at - 1])).collect();
    index.apply_all(&node(1), &after);
    index.check_integrity();
    assert_eq!((held(&index, &chain), index.refused()), (vec![20, 5], 20));
}

#[test]
fn keys_with_a_common_beginning_take_bounded_time() {
    let mut index = PrefixIndex::new(usize::MAX);
    for number in 0u32..2000 {
        let mut hash = [9; 16];
        hash[4..8].copy_from_slice(&number.to_be_bytes());
        index.apply(&node(0), &stored(BlockHash(hash), ROOT));
    }
    assert_eq!((index.len(), index.refused()), (1024, 976));
    index.check_integrity();
}

#[test]
fn entries_of_the_table_are_found_whatever_goes() {
    let mut index = PrefixIndex::new(usize::MAX);
    // All in one shard, around its end, so that they displace each other.
    let hash = |number: u32| {
        let mut hash = [0xff; 16];
        hash[1..5].copy_from_slice(&(number.wrapping_mul(0x9e37_79b9) | 0x8000_0000).to_be_bytes());
        BlockHash(hash)
    };
    let mut naive = BTreeSet::new();
    for step in 0u32..4000 {
        let number = step.wrapping_mul(2_654_435_761) % 97;
        let event = if naive.remove(&number) {
            BlockEvent::Removed { hash: hash(number) }
        } else {
            naive.insert(number);
            stored(hash(number), ROOT)
        };
        index.apply(&node(0), &event);
        index.check_integrity();
        assert_eq!(index.len(), naive.len());
    }
}
