#![allow(clippy::single_range_in_vec_init)] // A grant of one range is what is meant.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use proptest::prelude::*;

use super::*;
use crate::HostMemory;

const BYTES: u64 = 4096;

fn table_with_region() -> (RegionTable, RegionId) {
    let table = RegionTable::new(Keys::Counted);
    let memory = HostMemory::allocate(BYTES as usize).unwrap();
    let region = table.register(memory).unwrap();
    (table, region)
}

proptest! {
    #[test]
    fn a_write_is_admitted_exactly_where_every_byte_is_granted(
        ranges in prop::collection::vec((0..200_u64, 0..30_u64), 0..12),
        offset in 0..240_u64,
        len in 1..40_u64,
    ) {
        let (table, region) = table_with_region();
        let ranges: Vec<_> = ranges.into_iter().map(|(start, len)| start..start + len).collect();
        let granted: HashSet<u64> = ranges.iter().cloned().flatten().collect();
        let key = table.grant_write(region, ranges, false).unwrap();
        let admitted = table.lookup(key).unwrap().admit(Direction::Write, [(offset, len)]);
        prop_assert_eq!(admitted.is_ok(), (offset..offset + len).all(|byte| granted.contains(&byte)));
    }
}

#[test]
fn ranges_outside_the_region_are_not_granted() {
    let (table, region) = table_with_region();
    #[allow(clippy::reversed_empty_ranges)] // That it is reversed is what is tested.
    for range in [0..BYTES + 1, BYTES + 1..BYTES + 1, 5..4, 0..u64::MAX] {
        let granted = table.grant_write(region, vec![range], false);
        assert!(matches!(granted, Err(TransferError::OutOfBounds { .. })));
    }
    let unknown = RegionId(99);
    assert_eq!(
        table.grant_write(unknown, vec![], false),
        Err(TransferError::UnknownRegion { region: unknown })
    );
}

#[test]
fn a_slice_whose_end_overflows_is_refused() {
    let (table, region) = table_with_region();
    let write = table.grant_write(region, vec![0..BYTES], false).unwrap();
    let read = table.expose_read(region).unwrap();
    for (key, direction) in [(write, Direction::Write), (read, Direction::Read)] {
        let grant = table.lookup(key).unwrap();
        let refused = grant.admit(direction, [(0, BYTES), (u64::MAX, 2)]);
        assert_eq!(refused, Err(Refused::OutOfRange { slice: 1 }));
    }
}

#[test]
fn a_grant_is_for_one_direction() {
    let (table, region) = table_with_region();
    let write = table.grant_write(region, vec![0..BYTES], false).unwrap();
    let read = table.expose_read(region).unwrap();
    let admit = |key, direction| table.lookup(key).unwrap().admit(direction, [(0, 1)]);
    assert_eq!(admit(write, Direction::Read), Err(Refused::Denied));
    assert_eq!(admit(read, Direction::Write), Err(Refused::Denied));
}

#[test]
fn exposing_twice_gives_one_right_until_it_is_revoked() {
    let (table, region) = table_with_region();
    let first = table.expose_read(region).unwrap();
    assert_eq!(table.expose_read(region), Ok(first));
    drop(table.revoke(first));
    assert!(table.lookup(first).is_none());
    assert_ne!(table.expose_read(region), Ok(first));
}

#[test]
fn unregistering_closes_the_grants_of_that_region_only() {
    let (table, region) = table_with_region();
    let other = table.register(HostMemory::allocate(64).unwrap()).unwrap();
    let gone = table
        .lookup(table.grant_write(region, vec![0..9], false).unwrap())
        .unwrap();
    let kept = table
        .lookup(table.grant_write(other, vec![0..9], false).unwrap())
        .unwrap();
    drop(table.unregister(region));
    assert!(gone.touch(|| ()).is_none());
    assert!(kept.touch(|| ()).is_some());
    assert!(table.memory(region).is_err());
    table.close();
    assert!(kept.touch(|| ()).is_none());
    assert_eq!(table.memory(other).err(), Some(TransferError::Closed));
}

#[test]
fn secret_keys_do_not_repeat_and_do_not_count() {
    let keys = Keys::Secret(RandomState::new());
    let made: HashSet<u64> = (1..=100_000).map(|count| keys.key(count)).collect();
    assert_eq!(made.len(), 100_000);
    assert!((1..1000).all(|count| keys.key(count + 1) != keys.key(count).wrapping_add(1)));
}

#[test]
fn nothing_touches_memory_once_a_revocation_returned() {
    let (table, region) = table_with_region();
    for _ in 0..60 {
        let key = table.grant_write(region, vec![0..BYTES], false).unwrap();
        let grant = table.lookup(key).unwrap();
        let touches = AtomicU64::new(0);
        let revoked = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while let Some(()) = grant.touch(|| {
                        assert!(!revoked.load(SeqCst));
                        touches.fetch_add(1, SeqCst);
                        assert!(!revoked.load(SeqCst));
                    }) {}
                });
            }
            while touches.load(SeqCst) < 20 {
                std::thread::yield_now();
            }
            drop(table.revoke(key));
            revoked.store(true, SeqCst);
        });
    }
}
