use proptest::prelude::*;

use super::*;

/// Where each byte of the run lies, one by one.
fn places(blocks: Blocks<'_>, bytes: u64) -> Vec<u64> {
    (0..bytes)
        .map(|at| blocks.offsets[(at / blocks.block_bytes) as usize] + at % blocks.block_bytes)
        .collect()
}

proptest! {
    #[test]
    fn slices_move_every_byte_to_its_place_once(
        bytes in 0_u64..200,
        local_block in 1_u64..40,
        remote_block in 1_u64..40,
        order in any::<u64>(),
    ) {
        // Blocks of a pool lie anywhere in it, and do not overlap.
        let offsets = |block: u64, turn: u64| -> Vec<u64> {
            let count = bytes.div_ceil(block);
            (0..count).map(|index| (index + turn) % count.max(1) * block).collect()
        };
        let (local, remote) = (offsets(local_block, order % 7), offsets(remote_block, order % 5));
        let local = Blocks { offsets: &local, block_bytes: local_block };
        let remote = Blocks { offsets: &remote, block_bytes: remote_block };
        let slices = slices(bytes, local, remote).expect("both sides hold the run");
        let moved: Vec<(u64, u64)> = slices
            .iter()
            .flat_map(|slice| (0..slice.len).map(|at| (slice.local_offset + at, slice.remote_offset + at)))
            .collect();
        let wanted: Vec<_> = places(local, bytes).into_iter().zip(places(remote, bytes)).collect();
        prop_assert_eq!(moved, wanted);
    }

    #[test]
    fn what_a_peer_says_of_its_memory_never_overflows(offsets in prop::collection::vec(any::<u64>(), 0..4), block in any::<u64>()) {
        let local = [0, 4096, 8192];
        let local = Blocks { offsets: &local, block_bytes: 4096 };
        for slice in slices(4096, local, Blocks { offsets: &offsets, block_bytes: block }).unwrap_or_default() {
            prop_assert!(slice.remote_offset.checked_add(slice.len).is_some());
        }
    }
}

#[test]
fn a_side_that_is_too_small_gives_no_slices() {
    let large = Blocks {
        offsets: &[0, 64],
        block_bytes: 64,
    };
    let small = Blocks {
        offsets: &[0],
        block_bytes: 64,
    };
    let none = Blocks {
        offsets: &[0],
        block_bytes: 0,
    };
    assert!(slices(65, large, small).is_none());
    assert!(slices(65, small, large).is_none());
    assert!(slices(1, large, none).is_none());
    assert!(slices(64, small, large).is_some());
}

#[test]
fn neighbouring_blocks_move_as_one_run() {
    let blocks = Blocks {
        offsets: &[128, 192, 0],
        block_bytes: 64,
    };
    let moved = slices(192, blocks, blocks).expect("fits");
    let lens: Vec<u64> = moved.iter().map(|slice| slice.len).collect();
    assert_eq!(lens, [128, 64]);
}

#[test]
fn a_test_measures_each_size_up_to_its_bound() {
    let both = [Direction::Write, Direction::Read];
    assert_eq!(steps(u64::MAX, &both).len(), SIZES.len() * 2);
    let small = steps(20_000, &[Direction::Read]);
    let sizes: Vec<u64> = small.iter().map(|step| step.bytes).collect();
    assert_eq!(sizes, [4096, 16_384]);
    assert_eq!(steps(1, &both).len(), 2, "the smallest size in any case");
}

#[test]
fn a_pattern_is_its_seeds_own() {
    let bytes = |seed| {
        let mut bytes = [0; 61];
        Pattern::new(seed).fill(&mut bytes);
        bytes
    };
    assert_eq!(bytes(1), bytes(1));
    assert_ne!(bytes(1), bytes(2));
    // The first output of SplitMix64 for the seed 0.
    assert_eq!(bytes(0)[..8], 0xe220_a839_7b1d_cdaf_u64.to_le_bytes());
}

#[test]
fn percentiles_are_samples() {
    let took = (1..=200).rev().map(Duration::from_millis).collect();
    let found = figures(1000, took).expect("samples");
    assert_eq!(
        (found.p50, found.p99),
        (Duration::from_millis(100), Duration::from_millis(198))
    );
    assert_eq!(found.transfers, 200);
    // 200 kB in 20.1 s.
    assert!(
        (found.bytes_per_second - 200_000.0 / 20.1).abs() < 1e-6,
        "{found:?}"
    );
    assert_eq!(figures(1000, Vec::new()), None);
}
