use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use types::BlockEvent;

use types::LeaseId;

use super::*;
use crate::expiring::Full;

const CAPACITY: usize = 12;
const LEASES_MAX: usize = 3;
/// Blocks form a binary tree: the parent of `n` is `n / 2`, and that of 1 is the root.
const NODES: u8 = 40;

fn hash(node: u8) -> BlockHash {
    BlockHash([node; 16])
}

fn checksum(node: u8) -> Checksum {
    Checksum(u64::from(node) << 32)
}

fn parent(node: u8) -> Parent {
    match node / 2 {
        0 => Parent::Root(hash(0)),
        above => Parent::Block(hash(above)),
    }
}

/// The nodes from the top of the tree down to `node`.
fn path(node: u8) -> Vec<u8> {
    let mut path: Vec<u8> = std::iter::successors(Some(node), |node| Some(node / 2))
        .take_while(|node| *node > 0)
        .collect();
    path.reverse();
    path
}

fn hashes(nodes: &[u8]) -> Vec<BlockHash> {
    nodes.iter().map(|node| hash(*node)).collect()
}

fn table(capacity: usize, eviction: Eviction) -> BlockTable {
    BlockTable::new(TableLimits {
        capacity,
        log_entries_max: 1 << 20,
        leases_max: LEASES_MAX,
        first_lease: 100,
        eviction,
    })
}

/// The same promises, kept by looking at everything every time.
#[derive(Default)]
struct Model {
    held: BTreeMap<u8, Held>,
    owned: Vec<BlockId>,
    clock: u64,
    generations: HashMap<BlockId, Generation>,
}

struct Held {
    block: BlockId,
    pins: usize,
    last_use: u64,
}

impl Model {
    fn has_child(&self, node: u8) -> bool {
        self.held.keys().any(|other| other / 2 == node)
    }

    fn free(&self) -> usize {
        CAPACITY - self.owned.len() - self.held.len()
    }

    /// What can be had by evicting leaves until none is left.
    fn available(&self) -> usize {
        let mut kept: BTreeMap<u8, usize> = self.held.iter().map(|(node, held)| (*node, held.pins)).collect();
        let leaf = |kept: &BTreeMap<u8, usize>| {
            let is_leaf = |node: u8| !kept.keys().any(|other| other / 2 == node);
            kept.iter()
                .find(|(node, pins)| **pins == 0 && is_leaf(**node))
                .map(|(node, _)| *node)
        };
        while let Some(node) = leaf(&kept) {
            kept.remove(&node);
        }
        CAPACITY - self.owned.len() - kept.len()
    }

    /// Only what is least recently used is known in advance; of other policies' victims, that they may be taken.
    fn evict(&mut self, victim: u8, eviction: Eviction) {
        assert_eq!(self.held[&victim].pins, 0);
        assert!(!self.has_child(victim), "leaves go first");
        if eviction == Eviction::Lru {
            let leaves = self
                .held
                .iter()
                .filter(|(node, held)| held.pins == 0 && !self.has_child(**node));
            let oldest = leaves
                .min_by_key(|(_, held)| held.last_use)
                .map(|(node, _)| *node);
            assert_eq!(Some(victim), oldest);
        }
        self.held.remove(&victim);
    }

    fn pin(&mut self, node: u8) {
        self.clock += 1;
        let held = self.held.get_mut(&node).unwrap();
        held.pins += 1;
        held.last_use = self.clock;
    }

    fn unpin(&mut self, node: u8) {
        self.clock += 1;
        let held = self.held.get_mut(&node).unwrap();
        held.pins -= 1;
        if held.pins == 0 {
            held.last_use = self.clock;
        }
    }

    fn leading(&self, path: &[u8]) -> Vec<u8> {
        path.iter()
            .copied()
            .take_while(|node| self.held.contains_key(node))
            .collect()
    }
}

#[derive(Debug, Clone)]
enum Op {
    Allocate(usize),
    Free(usize),
    Commit(usize, u8),
    Match(u8),
    Unpin(usize),
    Lease(u8, u64),
    Release(usize),
    Wait(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..CAPACITY + 2).prop_map(Op::Allocate),
        1 => any::<usize>().prop_map(Op::Free),
        8 => (any::<usize>(), 1..NODES).prop_map(|(i, node)| Op::Commit(i, node)),
        3 => (1..NODES).prop_map(Op::Match),
        8 => any::<usize>().prop_map(Op::Unpin),
        2 => (1..NODES, 1..100u64).prop_map(|(node, ttl)| Op::Lease(node, ttl)),
        1 => any::<usize>().prop_map(Op::Release),
        2 => (1..60u64).prop_map(Op::Wait),
    ]
}

/// The table and the model side by side, with what a caller remembers.
struct Run {
    eviction: Eviction,
    table: BlockTable,
    model: Model,
    pins: Vec<u8>,
    leases: Vec<(LeaseId, u64, Vec<u8>)>,
    begun: Instant,
    elapsed_ms: u64,
    read_to: u64,
    followed: BTreeMap<BlockHash, BlockHash>,
}

impl Run {
    fn new(eviction: Eviction) -> Self {
        Self {
            eviction,
            table: table(CAPACITY, eviction),
            model: Model::default(),
            pins: Vec::new(),
            leases: Vec::new(),
            begun: Instant::now(),
            elapsed_ms: 0,
            read_to: 0,
            followed: BTreeMap::new(),
        }
    }

    fn now(&self) -> Instant {
        self.begun + Duration::from_millis(self.elapsed_ms)
    }

    /// Blocks that the table has evicted since its log was read.
    fn evicted(&self) -> Vec<u8> {
        let crate::log::Resume::Entries(entries) = self.table.log().since(self.read_to + 1, usize::MAX)
        else {
            panic!("the log is long enough for this test");
        };
        let removed = entries.into_iter().filter_map(|entry| match entry.event {
            BlockEvent::Removed { hash } => Some(hash.0[0]),
            BlockEvent::Stored { .. } | BlockEvent::Moved { .. } => None,
        });
        removed.collect()
    }

    fn step(&mut self, op: Op) {
        let now = self.now();
        match op {
            Op::Allocate(count) => self.allocate(count),
            Op::Free(i) => {
                if let Some(at) = pick(i, self.model.owned.len()) {
                    self.table.free(self.model.owned.swap_remove(at));
                }
            }
            Op::Commit(i, node) => self.commit(i, node),
            Op::Match(node) => {
                let found = self.table.match_prefix(&hashes(&path(node)), now);
                let expected = self.model.leading(&path(node));
                assert_eq!(
                    found.iter().map(|held| held.hash).collect::<Vec<_>>(),
                    hashes(&expected)
                );
                for (held, node) in found.iter().zip(&expected) {
                    assert_eq!(held.block, self.model.held[node].block);
                    assert_eq!(held.checksum, checksum(*node));
                    assert_eq!(held.generation, self.model.generations[&held.block]);
                    self.model.pin(*node);
                    self.pins.push(*node);
                }
            }
            Op::Unpin(i) => {
                if let Some(at) = pick(i, self.pins.len()) {
                    let node = self.pins.swap_remove(at);
                    self.table.unpin(self.model.held[&node].block, now);
                    self.model.unpin(node);
                }
            }
            Op::Lease(node, ttl) => self.lease(node, ttl),
            Op::Release(i) => {
                if let Some(at) = pick(i, self.leases.len()) {
                    let (lease, _, nodes) = self.leases.swap_remove(at);
                    assert!(self.table.release(lease, now));
                    assert!(!self.table.release(lease, now), "a lease ends once");
                    nodes.iter().rev().for_each(|node| self.model.unpin(*node));
                }
            }
            Op::Wait(ms) => {
                self.elapsed_ms += ms;
                let now = self.elapsed_ms;
                let due = |(_, expires, _): &mut (LeaseId, u64, Vec<u8>)| *expires <= now;
                let mut expired: Vec<_> = self.leases.extract_if(.., due).collect();
                expired.sort_by_key(|(lease, expires, _)| (*expires, *lease));
                assert_eq!(
                    self.table.expire_leases(self.begun + Duration::from_millis(now)),
                    expired.len()
                );
                for (_, _, nodes) in expired {
                    nodes.iter().rev().for_each(|node| self.model.unpin(*node));
                }
            }
        }
        self.compare();
    }

    fn allocate(&mut self, count: usize) {
        let available = self.model.available();
        assert_eq!(self.table.available(), available);
        match self.table.allocate(count, self.now()) {
            Ok(blocks) => {
                assert!(count <= available);
                assert_eq!(blocks.len(), count);
                let needed = count.saturating_sub(self.model.free());
                let evicted = self.evicted();
                assert_eq!(evicted.len(), needed);
                for victim in evicted {
                    self.model.evict(victim, self.eviction);
                }
                for block in blocks {
                    let generation = self.table.generation(block);
                    let before = self.model.generations.insert(block, generation);
                    assert!(
                        before.is_none_or(|before| before < generation),
                        "generations only grow"
                    );
                    self.model.owned.push(block);
                }
            }
            Err(error) => {
                assert!(count > available);
                assert_eq!(
                    (error.needed, error.available, error.capacity),
                    (count, available, CAPACITY)
                );
            }
        }
    }

    fn commit(&mut self, i: usize, node: u8) {
        let Some(at) = pick(i, self.model.owned.len()) else {
            return;
        };
        let block = self.model.owned[at];
        let now = self.now();
        match self
            .table
            .commit(block, parent(node), hash(node), checksum(node), now)
        {
            Committed::Stored(descriptor) => {
                assert!(node == 1 || self.model.held.contains_key(&(node / 2)));
                assert_eq!((descriptor.block, descriptor.hash), (block, hash(node)));
                self.model.owned.swap_remove(at);
                let held = Held {
                    block,
                    pins: 0,
                    last_use: 0,
                };
                assert!(self.model.held.insert(node, held).is_none());
            }
            Committed::Duplicate(descriptor) => {
                assert_eq!(descriptor.block, self.model.held[&node].block);
                assert_ne!(descriptor.block, block);
            }
            Committed::OverQuota => panic!("nobody has a quota"),
            Committed::Orphan => {
                assert!(node != 1 && !self.model.held.contains_key(&(node / 2)));
                return;
            }
        }
        self.model.pin(node);
        self.pins.push(node);
    }

    fn lease(&mut self, node: u8, ttl: u64) {
        let expires_ms = self.elapsed_ms + ttl;
        let expires = self.begun + Duration::from_millis(expires_ms);
        let leased = self
            .table
            .lease(&hashes(&path(node)), Purpose::Request, expires, self.now());
        if self.leases.len() == LEASES_MAX {
            assert_eq!(
                leased,
                Err(Full {
                    entries_max: LEASES_MAX
                })
            );
            return;
        }
        let expected = self.model.leading(&path(node));
        match leased.unwrap() {
            None => assert!(expected.is_empty()),
            Some((lease, blocks)) => {
                assert_eq!(
                    blocks.iter().map(|held| held.hash).collect::<Vec<_>>(),
                    hashes(&expected)
                );
                expected.iter().for_each(|node| self.model.pin(*node));
                self.leases.push((lease, expires_ms, expected));
            }
        }
    }

    fn compare(&mut self) {
        self.table.check_integrity();
        let counts = self.table.counts();
        let model = &self.model;
        assert_eq!(counts.free, model.free());
        assert_eq!(counts.owned, model.owned.len());
        assert_eq!(counts.cached, model.held.len());
        assert_eq!(
            counts.pinned,
            model.held.values().filter(|held| held.pins > 0).count()
        );
        assert_eq!(counts.leases, self.leases.len());
        for node in 1..NODES {
            let path = path(node);
            assert_eq!(self.table.match_len(&hashes(&path)), model.leading(&path).len());
        }
        let crate::log::Resume::Entries(entries) = self.table.log().since(self.read_to + 1, usize::MAX)
        else {
            panic!("the log is long enough for this test");
        };
        for entry in entries {
            self.read_to += 1;
            assert_eq!(entry.sequence, self.read_to);
            match entry.event {
                BlockEvent::Stored { hash, parent, .. } => {
                    assert!(parent == BlockHash([0; 16]) || self.followed.contains_key(&parent));
                    assert!(self.followed.insert(hash, parent).is_none());
                }
                BlockEvent::Removed { hash } => {
                    assert!(self.followed.remove(&hash).is_some());
                    assert!(
                        !self.followed.values().any(|parent| *parent == hash),
                        "leaves go first"
                    );
                }
                BlockEvent::Moved { .. } => panic!("nothing moves"),
            }
        }
        let held: Vec<BlockHash> = model.held.keys().map(|node| hash(*node)).collect();
        assert_eq!(self.followed.keys().copied().collect::<Vec<_>>(), held);
        let snapshot = self.table.snapshot().finish();
        assert_eq!(
            (snapshot.sequence, snapshot.blocks.len()),
            (self.read_to, held.len())
        );
        for (i, block) in snapshot.blocks.iter().enumerate() {
            let before = snapshot.blocks[..i].iter();
            assert!(
                block.parent == hash(0) || before.into_iter().any(|earlier| earlier.hash == block.parent)
            );
        }
    }
}

fn pick(i: usize, len: usize) -> Option<usize> {
    (len > 0).then(|| i % len)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_table_keeps_its_promises_as_a_naive_model_does(
        eviction in prop::sample::select(&Eviction::ALL),
        ops in prop::collection::vec(op(), 1..150),
    ) {
        let mut run = Run::new(eviction);
        for op in ops {
            run.step(op);
        }
    }
}

/// Commits the nodes one after the other, and unpins them in the same order.
fn filled(capacity: usize, nodes: &[u8]) -> BlockTable {
    let mut table = table(capacity, Eviction::Lru);
    for node in nodes {
        let block = table.allocate(1, Instant::now()).unwrap()[0];
        let committed = table.commit(block, parent(*node), hash(*node), checksum(*node), Instant::now());
        assert!(matches!(committed, Committed::Stored(_)));
    }
    for node in nodes {
        table.unpin(table.by_hash[&hash(*node)], Instant::now());
    }
    table
}

#[test]
fn a_parent_outlives_its_children_though_it_was_used_longer_ago() {
    let mut table = filled(3, &[1, 2, 3]);
    let block = table.allocate(1, Instant::now()).unwrap()[0];
    assert_eq!(
        table.match_len(&hashes(&[1, 2])),
        1,
        "2 was the least recently used leaf"
    );
    assert_eq!(table.match_len(&hashes(&[1, 3])), 2);
    table.free(block);
    table.allocate(2, Instant::now()).unwrap();
    assert_eq!(table.match_len(&hashes(&[1])), 1);
    table.check_integrity();
}

#[test]
fn allocation_is_all_or_nothing_and_evicts_nothing_in_vain() {
    let mut table = filled(4, &[1, 2, 4]);
    // Pinned through its child: a middle block that nobody pins is still not to be had.
    let pinned = table.match_prefix(&hashes(&[1, 2]), Instant::now());
    table.unpin(pinned[0].block, Instant::now());
    assert_eq!(table.available(), 2);
    let error = table.allocate(3, Instant::now()).unwrap_err();
    assert_eq!((error.needed, error.available, error.capacity), (3, 2, 4));
    assert_eq!(error.code(), ErrorCode::Overloaded);
    assert_eq!(table.counts().cached, 3, "a failed allocation evicts nothing");
    assert_eq!(
        table.allocate(5, Instant::now()).unwrap_err().code(),
        ErrorCode::Invalid
    );
    assert_eq!(table.allocate(2, Instant::now()).unwrap().len(), 2);
    assert_eq!(table.match_len(&hashes(&[1, 2])), 2);
}

#[test]
fn a_pool_of_one_block_works() {
    let mut table = filled(1, &[1]);
    let block = table.allocate(1, Instant::now()).unwrap()[0];
    assert_eq!(table.match_len(&hashes(&[1])), 0);
    assert_eq!(
        table.commit(block, parent(2), hash(2), checksum(2), Instant::now()),
        Committed::Orphan
    );
    assert!(matches!(
        table.commit(block, parent(1), hash(1), checksum(1), Instant::now()),
        Committed::Stored(_)
    ));
    assert_eq!(table.allocate(1, Instant::now()).unwrap_err().available, 0);
    table.check_integrity();
}

#[test]
fn lease_ids_of_two_incarnations_differ() {
    let mut table = filled(2, &[1]);
    let far = Instant::now() + Duration::from_secs(60);
    let (first, _) = table
        .lease(&hashes(&[1]), Purpose::Request, far, Instant::now())
        .unwrap()
        .unwrap();
    assert_eq!(first, LeaseId(100));
    assert!(!table.release(LeaseId(99), Instant::now()));
    assert_eq!(
        table.lease(&hashes(&[9]), Purpose::Request, far, Instant::now()),
        Ok(None),
        "a miss takes no lease"
    );
}

#[test]
#[should_panic(expected = "is not pinned")]
fn unpinning_what_nobody_pins_is_a_defect() {
    let mut table = filled(2, &[1]);
    table.unpin(table.by_hash[&hash(1)], Instant::now());
}

#[test]
#[should_panic(expected = "has no writer")]
fn freeing_twice_is_a_defect() {
    let mut table = table(2, Eviction::Lru);
    let block = table.allocate(1, Instant::now()).unwrap()[0];
    table.free(block);
    table.free(block);
}
