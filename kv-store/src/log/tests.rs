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
