use rstest::rstest;

use super::*;
use crate::follower::{Applied, Follower, Gap};

fn hash(number: u64) -> BlockHash {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    BlockHash(bytes)
}

fn removed(number: u64) -> BlockEvent {
    BlockEvent::Removed { hash: hash(number) }
}

fn log_of(entries: u64, entries_max: usize) -> Log {
    let mut log = Log::new(entries_max);
    for number in 1..=entries {
        assert_eq!(log.append(removed(number)), number);
    }
    log
}

fn snapshot_of(blocks: u64, sequence: u64) -> Snapshot {
    let block = |number| SnapshotBlock {
        hash: hash(number),
        parent: hash(number - 1),
        tier: Tier::Host,
    };
    Snapshot {
        sequence,
        blocks: (1..=blocks).map(block).collect(),
    }
}

fn entries(epoch: u64, numbers: std::ops::RangeInclusive<u64>) -> Batch {
    Batch {
        epoch: Epoch(epoch),
        sequence: *numbers.end(),
        kind: BatchKind::Entries,
        events: numbers.map(removed).collect(),
    }
}

#[rstest]
#[case::all_of_a_short_log(3, 1, Some(vec![1, 2, 3]))]
#[case::the_end(10, 10, Some(vec![10]))]
#[case::nothing_new(10, 11, Some(vec![]))]
#[case::nothing_ever(0, 1, Some(vec![]))]
#[case::the_oldest_that_is_left(10, 6, Some(vec![6, 7, 8, 9, 10]))]
#[case::just_gone(10, 5, None)]
#[case::never_been(10, 12, None)]
#[case::no_entry_is_number_0(0, 0, None)]
#[case::overflow(10, u64::MAX, None)]
fn a_reader_resumes_where_the_log_still_reaches(
    #[case] written: u64,
    #[case] from: u64,
    #[case] expected: Option<Vec<u64>>,
) {
    let log = log_of(written, 5);
    let found = match log.since(from, 100) {
        Resume::SnapshotNeeded => None,
        Resume::Entries(entries) => Some(entries),
    };
    assert_eq!(
        found
            .as_ref()
            .map(|entries| entries.iter().map(|entry| entry.sequence).collect()),
        expected
    );
    for entry in found.unwrap_or_default() {
        assert_eq!(entry.event, removed(entry.sequence));
    }
}

#[test]
fn an_answer_has_a_bound() {
    let Resume::Entries(entries) = log_of(10, 10).since(2, 3) else {
        panic!("nothing is gone");
    };
    assert_eq!(
        entries.iter().map(|entry| entry.sequence).collect::<Vec<_>>(),
        [2, 3, 4]
    );
}

#[rstest]
#[case(0, 3, 1)]
#[case(3, 3, 1)]
#[case(4, 3, 2)]
#[case(7, 1, 7)]
fn snapshots_are_cut_and_survive_the_wire(
    #[case] blocks: u64,
    #[case] events_max: usize,
    #[case] parts: usize,
) {
    let snapshot = snapshot_of(blocks, 42);
    let batches: Vec<Batch> = snapshot.clone().into_batches(Epoch(3), events_max).collect();
    assert_eq!(batches.len(), parts);
    let mut follower = Follower::new();
    let mut events = Vec::new();
    for (i, batch) in batches.iter().enumerate() {
        assert!(batch.events.len() <= events_max);
        let carried = Batch::from_wire(&batch.to_wire()).unwrap();
        assert_eq!(&carried, batch);
        assert_eq!(follower.sequence(), None);
        let applied = follower.apply(carried).unwrap();
        assert_eq!(
            applied.reset,
            i == 0,
            "the first part replaces what was known, and no other"
        );
        events.extend(applied.events);
    }
    assert_eq!(
        events,
        snapshot
            .blocks
            .iter()
            .map(SnapshotBlock::event)
            .collect::<Vec<_>>()
    );
    assert_eq!(
        (follower.epoch(), follower.sequence()),
        (Some(Epoch(3)), Some(42))
    );
    assert_eq!(follower.resume(), (Epoch(3), 43));
}

fn follower_at(epoch: u64, sequence: u64) -> Follower {
    let mut follower = Follower::new();
    for batch in snapshot_of(0, sequence).into_batches(Epoch(epoch), 10) {
        follower.apply(batch).unwrap();
    }
    follower
}

#[rstest]
#[case::hole(entries(3, 12..=13), Gap::Sequence { expected: 11, found: 12 })]
#[case::again(entries(3, 10..=13), Gap::Sequence { expected: 11, found: 10 })]
#[case::other_incarnation(entries(4, 11..=13), Gap::Epoch { expected: Epoch(3), found: Epoch(4) })]
#[case::impossible_number(
    Batch { sequence: 1, ..entries(3, 11..=13) },
    Gap::Sequence { expected: 11, found: 0 }
)]
fn what_does_not_continue_is_refused_and_changes_nothing(#[case] batch: Batch, #[case] gap: Gap) {
    let mut follower = follower_at(3, 10);
    assert_eq!(follower.apply(batch), Err(gap));
    assert_eq!(follower.resume(), (Epoch(3), 11));
    let next = entries(3, 11..=12);
    let events = next.events.clone();
    assert_eq!(follower.apply(next), Ok(Applied { reset: false, events }));
    assert_eq!(follower.sequence(), Some(12));
    follower.reset();
    assert_eq!(follower.resume(), (Epoch(0), 0));
}

#[test]
fn half_a_snapshot_is_worth_nothing_to_the_next_stream() {
    let mut follower = follower_at(3, 10);
    let parts: Vec<Batch> = snapshot_of(4, 20).into_batches(Epoch(3), 2).collect();
    assert!(follower.apply(parts[0].clone()).unwrap().reset);
    assert_eq!(follower.apply(entries(3, 21..=21)), Err(Gap::NoSnapshot));
    assert_eq!(follower.resume(), (Epoch(0), 0));
    // Were it counted as a continuation, the first half would be missing.
    assert!(follower.apply(parts[0].clone()).unwrap().reset);
    assert!(!follower.apply(parts[1].clone()).unwrap().reset);
    assert_eq!(follower.sequence(), Some(20));
}

#[test]
fn entries_are_nothing_without_a_snapshot_before_them() {
    assert_eq!(Follower::new().apply(entries(3, 1..=1)), Err(Gap::NoSnapshot));
}

#[test]
fn an_event_without_content_is_refused() {
    let mut wire = entries(3, 1..=1).to_wire();
    wire.events[0].event = None;
    assert_eq!(
        Batch::from_wire(&wire).unwrap_err().code,
        types::ErrorCode::Invalid
    );
}

mod delivery {
    //! A reader behind a connection that loses, repeats and reorders what it delivers, of a node that restarts.

    use std::collections::{BTreeMap, VecDeque};

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Op {
        /// The node stores or removes a block.
        Change(u64),
        /// It starts anew, with an empty pool.
        Restart,
        /// It sends what the reader lacks, in batches of at most so many events.
        Send(usize),
        /// The connection delivers the oldest batch, or the one at this place, or loses or repeats it.
        Deliver,
        Reorder(usize),
        Lose,
        Repeat(usize),
        /// The connection breaks: what is on its way is gone, and the reader asks again.
        Break,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            12 => (1..30u64).prop_map(Op::Change),
            1 => Just(Op::Restart),
            6 => (1..6usize).prop_map(Op::Send),
            8 => Just(Op::Deliver),
            1 => any::<usize>().prop_map(Op::Reorder),
            1 => Just(Op::Lose),
            1 => any::<usize>().prop_map(Op::Repeat),
            1 => Just(Op::Break),
        ]
    }

    /// Continues no other block.
    const ALONE: u64 = 1000;

    fn parent(block: u64) -> u64 {
        if block == ALONE { 0 } else { block / 2 }
    }

    /// A node, whose blocks form a binary tree: the parent of `n` is `n / 2`.
    struct Node {
        epoch: Epoch,
        log: Log,
        held: BTreeMap<u64, u64>,
        stored: u64,
    }

    impl Node {
        fn new(epoch: u64) -> Self {
            Self {
                epoch: Epoch(epoch),
                log: Log::new(8),
                held: BTreeMap::new(),
                stored: 0,
            }
        }

        fn change(&mut self, block: u64) {
            let parent = parent(block);
            if self.held.contains_key(&block) {
                if !self.held.contains_key(&(2 * block)) && !self.held.contains_key(&(2 * block + 1)) {
                    self.held.remove(&block);
                    self.log.append(removed(block));
                }
            } else if parent == 0 || self.held.contains_key(&parent) {
                self.stored += 1;
                self.held.insert(block, self.stored);
                self.log.append(BlockEvent::Stored {
                    hash: hash(block),
                    parent: hash(parent),
                    tier: Tier::Host,
                });
            }
        }

        /// What a watcher that knows `next - 1` entries of `epoch` is sent, as `service/watch.rs` does it.
        fn send(&self, epoch: Epoch, next: u64, events_max: usize) -> Vec<Batch> {
            let next = if epoch == self.epoch { next } else { 0 };
            match self.log.since(next, events_max) {
                Resume::Entries(entries) => Batch::of_entries(self.epoch, &entries).into_iter().collect(),
                Resume::SnapshotNeeded => {
                    let mut blocks: Vec<_> = self
                        .held
                        .iter()
                        .map(|(block, stored)| (*stored, *block))
                        .collect();
                    blocks.sort_unstable();
                    let blocks = blocks.into_iter().map(|(_, block)| SnapshotBlock {
                        hash: hash(block),
                        parent: hash(parent(block)),
                        tier: Tier::Host,
                    });
                    let snapshot = Snapshot {
                        sequence: self.log.last(),
                        blocks: blocks.collect(),
                    };
                    snapshot.into_batches(self.epoch, events_max).collect()
                }
            }
        }

        fn hashes(&self) -> Vec<BlockHash> {
            let mut held: Vec<BlockHash> = self.held.keys().map(|block| hash(*block)).collect();
            held.sort_unstable();
            held
        }
    }

    /// A reader with the index that it builds, and what is on its way to it.
    struct Reader {
        follower: Follower,
        index: BTreeMap<BlockHash, BlockHash>,
        wire: VecDeque<Batch>,
        /// What the node believes the reader to have been sent: its epoch, and the next entry.
        sent: (Epoch, u64),
    }

    impl Reader {
        fn subscribe(&mut self) {
            self.wire.clear();
            self.sent = self.follower.resume();
        }

        fn receive(&mut self, batch: Batch) {
            let batch = Batch::from_wire(&batch.to_wire()).expect("it was written by us");
            match self.follower.apply(batch) {
                Err(_) => {
                    self.follower.reset();
                    self.subscribe();
                }
                Ok(Applied { reset, events }) => {
                    if reset {
                        self.index.clear();
                    }
                    for event in events {
                        match event {
                            BlockEvent::Stored { hash, parent, .. } => drop(self.index.insert(hash, parent)),
                            BlockEvent::Removed { hash } => drop(self.index.remove(&hash)),
                            BlockEvent::Moved { .. } => {}
                        }
                    }
                }
            }
        }
    }

    fn send(node: &Node, reader: &mut Reader, events_max: usize) {
        let (epoch, next) = reader.sent;
        for batch in node.send(epoch, next, events_max) {
            reader.sent = (batch.epoch, batch.sequence + 1);
            reader.wire.push_back(batch);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// Parts of a snapshot are not numbered, so they are delivered in order and whole, as a stream does it; entries may be lost,
        /// repeated and reordered at will.
        #[test]
        fn loss_repetition_and_reordering_are_noticed_and_healed(ops in prop::collection::vec(op(), 1..200)) {
            let mut node = Node::new(1);
            let mut reader = Reader {
                follower: Follower::new(),
                index: BTreeMap::new(),
                wire: VecDeque::new(),
                sent: (Epoch(0), 0),
            };
            for op in ops {
                let entries = |batch: &Batch| batch.kind == BatchKind::Entries;
                let only_entries = reader.wire.iter().all(entries);
                match op {
                    Op::Change(block) => node.change(block),
                    Op::Restart => {
                        node = Node::new(node.epoch.0 + 1);
                        reader.subscribe();
                    }
                    Op::Send(events_max) => send(&node, &mut reader, events_max),
                    Op::Deliver => {
                        if let Some(batch) = reader.wire.pop_front() {
                            reader.receive(batch);
                        }
                    }
                    Op::Reorder(at) if only_entries && !reader.wire.is_empty() => {
                        let at = at % reader.wire.len();
                        reader.wire.swap(0, at);
                    }
                    Op::Lose if only_entries => drop(reader.wire.pop_front()),
                    Op::Repeat(at) if only_entries && !reader.wire.is_empty() => {
                        let batch = reader.wire[at % reader.wire.len()].clone();
                        reader.wire.push_back(batch);
                    }
                    Op::Reorder(_) | Op::Lose | Op::Repeat(_) => {}
                    Op::Break => reader.subscribe(),
                }
                // Whatever the reader takes for complete is what the node held at that number.
                if reader.follower.epoch() == Some(node.epoch) && reader.follower.sequence() == Some(node.log.last()) {
                    prop_assert_eq!(reader.index.keys().copied().collect::<Vec<_>>(), node.hashes());
                }
            }
            // A quiet connection brings the reader to the node's state: by what is sent, or by asking once more.
            for _ in 0..4 {
                // News make a reader notice that it missed something.
                node.change(ALONE);
                send(&node, &mut reader, usize::MAX);
                while let Some(batch) = reader.wire.pop_front() {
                    reader.receive(batch);
                }
            }
            prop_assert_eq!(reader.index.keys().copied().collect::<Vec<_>>(), node.hashes());
            for parent in reader.index.values() {
                prop_assert!(*parent == hash(0) || reader.index.contains_key(parent));
            }
        }
    }
}
