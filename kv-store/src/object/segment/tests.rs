//! What the format promises, over damaged objects.

use proptest::prelude::*;

use super::*;

const BLOCK_BYTES: usize = 64;

fn grid() -> Grid {
    Grid::new(BlockHash([7; 16]), BLOCK_BYTES)
}

fn hashes() -> Vec<BlockHash> {
    grid().root().chain(&(0..16).collect::<Vec<_>>(), 1)
}

/// An object, and what its blocks must sum up to.
fn object() -> (Vec<u8>, Vec<Checksum>) {
    let blocks: Vec<Vec<u8>> = (0..16_u8).map(|i| vec![i; BLOCK_BYTES]).collect();
    let sums: Vec<Checksum> = blocks.iter().map(|block| Checksum::of(block)).collect();
    let entries: Vec<_> = hashes().into_iter().zip(sums.iter().copied()).collect();
    let mut bytes = grid().encode_header(&entries);
    bytes.extend(blocks.concat());
    (bytes, sums)
}

#[test]
fn what_was_encoded_is_decoded() {
    let (bytes, sums) = object();
    assert_eq!(bytes.len() as u64, grid().object_bytes());
    assert_eq!(grid().decode(&bytes, &hashes()), Ok(sums.clone()));
    for (index, sum) in sums.iter().enumerate() {
        assert_eq!(Checksum::of(&bytes[grid().block_range(index)]), *sum);
    }
}

#[test]
fn a_segment_weighs_some_mebibytes_and_is_short_against_a_prompt() {
    let blocks = |block_bytes| Grid::new(BlockHash([0; 16]), block_bytes).blocks();
    assert_eq!(blocks(512), 16);
    assert_eq!(blocks(720 << 10), 5);
    assert_eq!(blocks(4 << 20), 1);
    assert_eq!(blocks(64 << 20), 1, "a block is never cut");
}

#[test]
fn chains_are_cut_at_the_same_places_wherever_one_begins() {
    let cut = |from, len| grid().segments(from, len).collect::<Vec<_>>();
    let none: Vec<Range<usize>> = Vec::new();
    assert_eq!(cut(0, 15), none);
    assert_eq!(cut(0, 40), vec![0..16, 16..32]);
    assert_eq!(cut(15, 40), vec![0..16, 16..32]);
    assert_eq!(cut(16, 40), vec![16..32]);
    assert_eq!(cut(33, 40), none);
    assert_eq!(cut(50, 40), none);
}

#[test]
fn another_version_space_or_chain_is_refused() {
    let (bytes, _) = object();
    let other_space = Grid::new(BlockHash([8; 16]), BLOCK_BYTES);
    let found = grid().root();
    assert_eq!(
        other_space.decode(&bytes, &hashes()),
        Err(SegmentError::Space { found })
    );
    let mut other_chain = hashes();
    other_chain[3] = BlockHash([1; 16]);
    let found = hashes()[3];
    let refused = grid().decode(&bytes, &other_chain);
    assert_eq!(refused, Err(SegmentError::Block { index: 3, found }));
    let mut newer = bytes.clone();
    newer[8] = 2;
    assert_eq!(
        grid().decode(&newer, &hashes()),
        Err(SegmentError::Version { found: 2 })
    );
    assert_eq!(
        grid().decode(&vec![0; bytes.len()], &hashes()),
        Err(SegmentError::Foreign)
    );
}

proptest! {
    /// Whatever single byte changes, some block is not taken for what it was.
    #[test]
    fn a_changed_byte_is_found(at in 0..grid().object_bytes() as usize, change in 1_u8..) {
        let (mut bytes, _) = object();
        bytes[at] ^= change;
        if let Ok(sums) = grid().decode(&bytes, &hashes()) {
            let intact = |(index, sum): (usize, &Checksum)| Checksum::of(&bytes[grid().block_range(index)]) == *sum;
            prop_assert!(!sums.iter().enumerate().all(intact));
        }
    }

    #[test]
    fn bytes_that_are_cut_off_are_no_segment(len in 0..grid().object_bytes() as usize) {
        let (bytes, _) = object();
        prop_assert!(grid().decode(&bytes[..len], &hashes()).is_err());
    }
}
