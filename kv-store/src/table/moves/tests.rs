use std::time::Duration;

use proptest::prelude::*;
use types::{BlockEvent, Checksum};

use super::super::{Committed, Parent, Purpose, TableLimits};
use super::*;
use crate::log::Resume;
use crate::policy::Eviction;

const CAPACITY: usize = 12;
/// Blocks form a binary tree: the parent of `n` is `n / 2`, and that of 1 is the root.
const NODES: u8 = 40;

fn hash(node: u8) -> BlockHash {
    BlockHash([node; 16])
}

/// The nodes from the top of the tree down to `node`.
fn chain(node: u8) -> Vec<BlockHash> {
    let up = std::iter::successors(Some(node), |node| Some(node / 2)).take_while(|node| *node > 0);
    let mut chain: Vec<BlockHash> = up.map(hash).collect();
    chain.reverse();
    chain
}

fn table() -> BlockTable {
    BlockTable::new(TableLimits {
        capacity: CAPACITY,
        log_entries_max: 1 << 20,
        leases_max: 4,
        first_lease: 1,
        eviction: Eviction::Lru,
    })
}

/// Stores a node, if its parent is held, and keeps its pin.
fn store(table: &mut BlockTable, node: u8, now: Instant) -> Option<BlockId> {
    let block = table.allocate(1, now).ok()?[0];
    let parent = match node / 2 {
        0 => Parent::Root(hash(0)),
        above => Parent::Block(hash(above)),
    };
    match table.commit(block, parent, hash(node), Checksum(u64::from(node)), now) {
        Committed::Stored(held) => Some(held.block),
        Committed::Duplicate(held) => {
            table.free(block);
            Some(held.block)
        }
        Committed::OverQuota => panic!("nobody has a quota"),
        Committed::Orphan => {
            table.free(block);
            None
        }
    }
}

fn filled(nodes: &[u8], now: Instant) -> BlockTable {
    let mut table = table();
    for node in nodes {
        let block = store(&mut table, *node, now).expect("its parent is held");
        table.unpin(block, now);
    }
    table
}

#[derive(Debug, Clone)]
enum Op {
    Store(u8),
    Unpin(usize),
    Evict(u8),
    EvictChain(u8),
    Forget(u8),
    LowerWorth(u8, f32),
    MakeRoom(usize),
    Lease(u8, u64),
    Wait(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => (1..NODES).prop_map(Op::Store),
        8 => any::<usize>().prop_map(Op::Unpin),
        3 => (1..NODES).prop_map(Op::Evict),
        1 => (1..NODES).prop_map(Op::EvictChain),
        2 => (1..NODES).prop_map(Op::Forget),
        2 => (1..NODES, 0.0f32..1.0).prop_map(|(node, worth)| Op::LowerWorth(node, worth)),
        1 => (0..CAPACITY + 2).prop_map(Op::MakeRoom),
        2 => (1..NODES, 1..100u64).prop_map(|(node, ttl)| Op::Lease(node, ttl)),
        2 => (1..60u64).prop_map(Op::Wait),
    ]
}

/// What a follower of the log knows: every stored block with its parent.
fn followed(table: &BlockTable) -> Vec<BlockHash> {
    let Resume::Entries(entries) = table.log().since(1, usize::MAX) else {
        panic!("the log is long enough for this test");
    };
    let mut held: Vec<(BlockHash, BlockHash)> = Vec::new();
    for entry in entries {
        match entry.event {
            BlockEvent::Stored {
                hash: block, parent, ..
            } => {
                assert!(
                    parent == hash(0) || held.iter().any(|(other, _)| *other == parent),
                    "an orphan"
                );
                held.push((block, parent));
            }
            BlockEvent::Removed { hash } => {
                assert!(
                    !held.iter().any(|(_, parent)| *parent == hash),
                    "children leave first"
                );
                let at = held.iter().position(|(other, _)| *other == hash);
                held.remove(at.expect("only what was stored is removed"));
            }
            BlockEvent::Moved { .. } => panic!("nothing moves"),
        }
    }
    let mut held: Vec<BlockHash> = held.into_iter().map(|(hash, _)| hash).collect();
    held.sort_unstable();
    held
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn whatever_leaves_and_however_no_orphan_stays_and_no_slot_is_lost(ops in prop::collection::vec(op(), 1..120)) {
        let mut table = table();
        let begun = Instant::now();
        let mut elapsed = Duration::ZERO;
        let mut pins: Vec<BlockId> = Vec::new();
        for op in ops {
            let now = begun + elapsed;
            match op {
                Op::Store(node) => pins.extend(store(&mut table, node, now)),
                Op::Unpin(at) if !pins.is_empty() => table.unpin(pins.swap_remove(at % pins.len()), now),
                Op::Unpin(_) => {}
                Op::Evict(node) => {
                    let leaf = table.path(hash(node)).is_some_and(|path| path.tail > 0);
                    prop_assert_eq!(table.evict(hash(node), now), leaf);
                }
                Op::EvictChain(node) => {
                    let before = table.counts().cached;
                    let (evicted, _) = table.evict_chain(&chain(node), now);
                    prop_assert_eq!(table.counts().cached, before - evicted);
                }
                Op::Forget(node) => {
                    let held = table.holds(hash(node));
                    let gone = table.forget(hash(node), now);
                    prop_assert_eq!(gone.last().copied(), held.then_some(hash(node)));
                    prop_assert!(!table.holds(hash(node)), "also while it is in use");
                }
                Op::LowerWorth(node, worth) => table.lower_worth(hash(node), worth, now),
                Op::MakeRoom(slots) => {
                    let possible = slots.min(table.available());
                    table.make_room(slots, now);
                    prop_assert!(table.counts().free >= possible);
                }
                Op::Lease(node, ttl) => {
                    let _ = table.lease(&chain(node), Purpose::Request, now + Duration::from_millis(ttl), now);
                }
                Op::Wait(ms) => {
                    elapsed += Duration::from_millis(ms);
                    table.expire_leases(begun + elapsed);
                }
            }
            table.check_integrity();
            let mut held: Vec<BlockHash> = (1..NODES).map(hash).filter(|hash| table.holds(*hash)).collect();
            held.sort_unstable();
            prop_assert_eq!(followed(&table), held);
            let price = table.price(CAPACITY, 0, begun + elapsed);
            prop_assert!(price.len() <= table.available());
        }
        let now = begun + elapsed;
        pins.into_iter().for_each(|block| table.unpin(block, now));
        table.expire_leases(begun + elapsed + Duration::from_secs(1));
        table.make_room(CAPACITY, now);
        prop_assert_eq!(table.counts().free, CAPACITY, "every slot comes back");
    }
}

#[test]
fn a_tail_ends_where_another_chain_begins_or_someone_reads() {
    let now = Instant::now();
    let mut table = filled(&[1, 2, 4, 8, 9], now);
    assert_eq!(
        table.path(hash(8)).map(|path| (path.hashes, path.tail)),
        Some((chain(8), 1))
    );
    assert_eq!(
        table.path(hash(4)).map(|path| path.tail),
        Some(0),
        "it has children"
    );
    assert!(table.evict(hash(9), now));
    assert_eq!(table.path(hash(8)).map(|path| path.tail), Some(4));
    let pins = table.match_prefix(&chain(2), now);
    assert_eq!(table.path(hash(8)).map(|path| path.tail), Some(2));
    pins.iter().for_each(|pin| table.unpin(pin.block, now));
    assert_eq!(table.path(hash(5)), None);
}

#[test]
fn a_block_that_came_from_a_peer_goes_before_what_was_used_since() {
    let begun = Instant::now();
    let mut table = table();
    for (node, at) in [(1, 0), (2, 10), (3, 20)] {
        let now = begun + Duration::from_secs(at);
        let block = store(&mut table, node, now).unwrap();
        table.unpin(block, now);
    }
    let now = begun + Duration::from_secs(30);
    let coldest: Vec<BlockHash> = table.coldest(2, now).iter().map(|victim| victim.hash).collect();
    assert_eq!(coldest, [hash(2), hash(3)]);
    let worth = |seconds: f32| 1.0 / seconds;
    table.lower_worth(hash(3), worth(25.0), now);
    assert_eq!(table.coldest(1, now)[0].hash, hash(3));
    table.lower_worth(hash(3), worth(1.0), now);
    assert_eq!(table.coldest(1, now)[0].hash, hash(3), "it is never raised");
    let kept = table.worth(hash(2), now).unwrap();
    assert!((kept - worth(20.0)).abs() < 1e-4, "{kept}");
}

#[test]
fn the_price_of_room_counts_free_slots_that_are_no_reserve_then_whole_tails() {
    let now = Instant::now();
    let mut table = filled(&[1, 2, 4, 8], now);
    let price = table.price(CAPACITY, 5, now);
    assert_eq!(price.len(), 3 + 4);
    assert!(price[..3].iter().all(|free| *free == f32::NEG_INFINITY));
    assert!(price[3..].iter().all(|block| *block > f32::NEG_INFINITY));
    assert_eq!(table.price(2, 0, now), [f32::NEG_INFINITY; 2]);
}

#[test]
fn a_forgotten_block_that_is_read_is_freed_by_its_reader_alone() {
    let now = Instant::now();
    let mut table = filled(&[1, 2, 4], now);
    let pins = table.match_prefix(&chain(2), now);
    assert_eq!(table.forget(hash(2), now), [hash(4), hash(2)]);
    assert_eq!(table.match_len(&chain(4)), 1);
    let counts = table.counts();
    assert_eq!((counts.free, counts.owned, counts.cached), (CAPACITY - 2, 1, 1));
    table.unpin(pins[1].block, now);
    assert_eq!(table.counts().free, CAPACITY - 1);
    table.unpin(pins[0].block, now);
    table.check_integrity();
    assert_eq!(table.forget(hash(2), now), []);
}
