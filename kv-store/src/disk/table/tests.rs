use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const CAPACITY: u32 = 6;
/// Blocks form a binary tree: the parent of `n` is `n / 2`, and that of 1 is the root.
const NODES: u8 = 30;

fn hash(node: u8) -> BlockHash {
    BlockHash([node; 16])
}

fn node(hash: &BlockHash) -> u8 {
    hash.0[0]
}

fn new(node: u8) -> NewBlock {
    NewBlock {
        hash: hash(node),
        parent: hash(node / 2),
        follows_root: node == 1,
        checksum: Checksum(u64::from(node)),
    }
}

/// The blocks from the root to this one.
fn path(node: u8) -> Vec<BlockHash> {
    let mut nodes: Vec<u8> = std::iter::successors(Some(node), |node| Some(node / 2))
        .take_while(|node| *node > 0)
        .collect();
    nodes.reverse();
    nodes.into_iter().map(hash).collect()
}

#[derive(Debug, Clone)]
enum Step {
    Reserve(u8),
    Commit(usize),
    Abort(usize),
    Pin(u8),
    Unpin(usize),
    Remove(u8),
    Clear,
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let node = || 1..NODES;
    let step = prop_oneof![
        8 => node().prop_map(Step::Reserve),
        8 => any::<usize>().prop_map(Step::Commit),
        1 => any::<usize>().prop_map(Step::Abort),
        3 => node().prop_map(Step::Pin),
        3 => any::<usize>().prop_map(Step::Unpin),
        1 => node().prop_map(Step::Remove),
        2 => Just(Step::Clear),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..200)
}

/// The table, what it should hold, and what the disk's records say.
struct Bench {
    table: DiskTable,
    stored: BTreeSet<u8>,
    writing: Vec<Reserved>,
    pins: Vec<Located>,
    records: BTreeMap<SlotId, Record>,
    announced: u64,
}

impl Bench {
    fn new() -> Self {
        Self {
            table: DiskTable::new(CAPACITY),
            stored: BTreeSet::new(),
            writing: Vec::new(),
            pins: Vec::new(),
            records: BTreeMap::new(),
            announced: 0,
        }
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Reserve(node) => self.reserve(*node),
            Step::Commit(at) if !self.writing.is_empty() => {
                let Reserved { slot, record, .. } = self.writing.swap_remove(at % self.writing.len());
                self.records.insert(slot, record);
                let parent = node(&record.parent);
                let expected = parent == 0 || self.stored.contains(&parent);
                let announced = &mut self.announced;
                let committed = self.table.commit(slot, |_| {
                    *announced += 1;
                    *announced
                });
                // A parent that was dropped and came back in another slot is not the one that was written under.
                assert!(!committed || expected);
                if committed {
                    self.stored.insert(node(&record.hash));
                }
            }
            Step::Abort(at) if !self.writing.is_empty() => {
                let reserved = self.writing.swap_remove(at % self.writing.len());
                self.table.abort(reserved.slot);
            }
            Step::Pin(node) => {
                let path = path(*node);
                let run = self.table.pin_run(&path);
                let expected = path
                    .iter()
                    .take_while(|hash| self.stored.contains(&self::node(hash)));
                assert_eq!(run.len(), expected.count());
                for (located, hash) in run.iter().zip(&path) {
                    assert_eq!(located.record.hash, *hash);
                    assert_eq!(self.records.get(&located.slot), Some(&located.record));
                }
                self.pins.extend(run);
            }
            Step::Unpin(at) if !self.pins.is_empty() => {
                let located = self.pins.swap_remove(at % self.pins.len());
                self.table.unpin(located.slot);
            }
            Step::Remove(node) => {
                let removed = self.table.remove(&hash(*node));
                for hash in removed {
                    let gone = self::node(&hash);
                    assert!(self.stored.remove(&gone));
                    let orphans = self.stored.iter().filter(|node| *node / 2 == gone);
                    assert_eq!(orphans.count(), 0, "children go before their parents");
                }
                assert!(!self.stored.contains(node));
            }
            Step::Clear => {
                for slot in self.table.take_unclear(3) {
                    self.records.remove(&slot);
                    self.table.cleared(slot);
                }
            }
            Step::Restart => self.restart(),
            Step::Commit(_) | Step::Abort(_) | Step::Unpin(_) => {}
        }
        self.check();
    }

    fn reserve(&mut self, node: u8) {
        let Some(reserved) = self
            .table
            .reserve(new(node), |hash| self::node(hash).is_multiple_of(3))
        else {
            return;
        };
        assert!(!self.stored.contains(&node));
        assert!(node == 1 || self.stored.contains(&(node / 2)));
        assert!(
            self.pins.iter().all(|located| located.slot != reserved.slot),
            "it is being read"
        );
        if let Some(evicted) = reserved.evicted {
            let evicted = self::node(&evicted);
            assert!(self.stored.remove(&evicted));
            assert!(
                self.stored.iter().all(|node| node / 2 != evicted),
                "leaves go first"
            );
        }
        // As its writer does before anything else.
        self.records.remove(&reserved.slot);
        self.writing.push(reserved);
    }

    /// The process is killed: what is on the disk is what the next one finds.
    fn restart(&mut self) {
        let records = self.records.clone();
        let before = std::mem::replace(self, Self::new());
        self.records = records.clone();
        let (announced, stored) = (&mut self.announced, &mut self.stored);
        self.table.restore(records.into_iter().collect(), |record| {
            *announced += 1;
            let parent = node(&record.parent);
            assert!(
                parent == 0 || stored.contains(&parent),
                "parents are announced first"
            );
            assert!(stored.insert(node(&record.hash)), "once each");
            *announced
        });
        assert!(
            before.stored.is_subset(&self.stored),
            "what was stored is there again"
        );
        let kept = self.table.slots.iter().zip(0..);
        let kept: BTreeSet<SlotId> = kept
            .filter(|(slot, _)| matches!(slot, Slot::Stored(_)))
            .map(|(_, id)| SlotId(id))
            .collect();
        self.records.retain(|slot, _| kept.contains(slot));
    }

    fn check(&self) {
        self.table.check_integrity();
        let held: BTreeSet<u8> = self
            .table
            .blocks()
            .map(|(_, record)| node(&record.hash))
            .collect();
        assert_eq!(held, self.stored);
        for node in 1..NODES {
            let path = path(node);
            let leading = path
                .iter()
                .take_while(|hash| self.stored.contains(&self::node(hash)));
            assert_eq!(self.table.match_len(&path), leading.count());
        }
        assert_eq!(self.table.counts().stored, self.stored.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn every_reachable_state_is_ancestor_closed_and_leaks_nothing(steps in steps()) {
        let mut bench = Bench::new();
        for step in &steps {
            bench.run(step);
        }
        // Whatever happened, every slot comes back.
        for reserved in std::mem::take(&mut bench.writing) {
            bench.table.abort(reserved.slot);
        }
        for located in std::mem::take(&mut bench.pins) {
            bench.table.unpin(located.slot);
        }
        bench.table.remove(&hash(1));
        for slot in bench.table.take_unclear(usize::MAX) {
            bench.table.cleared(slot);
        }
        bench.table.check_integrity();
        prop_assert_eq!(bench.table.counts().free, CAPACITY as usize);
    }
}

fn write(table: &mut DiskTable, node: u8, in_memory: impl Fn(&BlockHash) -> bool) -> Option<BlockHash> {
    let reserved = table.reserve(new(node), in_memory).expect("there is room");
    assert!(table.commit(reserved.slot, |record| u64::from(self::node(&record.hash))));
    table.check_integrity();
    reserved.evicted
}

#[test]
fn the_least_recently_used_leaf_makes_room() {
    let mut table = DiskTable::new(4);
    for node in [1, 2, 3, 4] {
        assert_eq!(write(&mut table, node, |_| false), None);
    }
    for located in table.pin_run(&path(3)) {
        table.unpin(located.slot);
    }
    // 4 is older than 3, which was read since; 1 and 2 have children.
    assert_eq!(write(&mut table, 5, |_| false), Some(hash(4)));
    assert_eq!(table.evictions(), 1);
}

#[test]
fn what_is_in_memory_too_is_passed_over() {
    for (in_memory, evicted) in [(0, 2), (2, 3)] {
        let mut table = DiskTable::new(3);
        for node in [1, 2, 3] {
            write(&mut table, node, |_| false);
        }
        // Under 1, which has to stay whatever is evicted.
        let mut block = new(7);
        block.parent = hash(1);
        let reserved = table
            .reserve(block, |hash| node(hash) == in_memory)
            .expect("there is room");
        assert_eq!(reserved.evicted, Some(hash(evicted)));
    }
}

#[test]
fn a_block_that_is_dropped_while_it_is_read_keeps_its_slot_until_then() {
    let mut table = DiskTable::new(2);
    write(&mut table, 1, |_| false);
    write(&mut table, 2, |_| false);
    let read = table.pin_run(&path(2));
    assert_eq!(table.remove(&hash(1)), [hash(2), hash(1)]);
    assert!(!table.contains(&hash(1)) && !table.contains(&hash(2)));
    assert_eq!(table.take_unclear(9), []);
    table.unpin(read[1].slot);
    assert_eq!(table.take_unclear(9), [read[1].slot]);
    table.cleared(read[1].slot);
    table.check_integrity();
    assert_eq!(table.counts().free, 1);
    table.unpin(read[0].slot);
    assert_eq!(table.take_unclear(9), [read[0].slot]);
}

#[test]
fn ancestors_are_listed_from_the_nearest_one_above() {
    let mut table = DiskTable::new(8);
    for node in [1, 2, 4, 8] {
        write(&mut table, node, |_| false);
    }
    assert_eq!(
        table.ancestors_after(&hash(8), |_| false),
        [hash(1), hash(2), hash(4)]
    );
    assert_eq!(
        table.ancestors_after(&hash(8), |above| node(above) == 2),
        [hash(4)]
    );
    assert_eq!(table.ancestors_after(&hash(8), |above| node(above) == 4), []);
    assert_eq!(table.ancestors_after(&hash(9), |_| false), []);
}
