use std::ptr;

use proptest::prelude::*;

use super::*;

/// Whether whatever is stored is what came.
fn taken(
    bytes: &[u8],
    pieces: &[usize],
    unit_bytes: u64,
    stores: Stores,
    shift: usize,
) -> (Vec<Checksum>, Vec<u8>) {
    let mut digest = Digest::new(NonZeroU64::new(unit_bytes).expect("some"));
    // At a place of any alignment.
    let mut written = vec![0; bytes.len() + shift + 64];
    let start = written.as_ptr().align_offset(64) + shift % 64;
    let mut done = 0;
    let mut pieces = pieces.iter().cycle();
    while done < bytes.len() {
        let piece = pieces.next().expect("pieces repeat");
        let piece = (*piece).min(bytes.len() - done);
        let to = if stores == Stores::None {
            ptr::null_mut()
        } else {
            written[start + done..].as_mut_ptr()
        };
        // SAFETY: both have as many bytes from `done` on.
        unsafe { digest.take(bytes[done..].as_ptr(), to, piece, stores) };
        done += piece;
    }
    (digest.finish(), written[start..start + bytes.len()].to_vec())
}

proptest! {
    #[test]
    fn checksums_are_those_of_the_units_and_bytes_are_copied_however_they_come(
        seed in any::<u64>(),
        bytes in 1_usize..20_000,
        unit_bytes in prop_oneof![1_u64..300, 200_u64..5_000, Just(1024), Just(2048), Just(4096), Just(64 * 16 + 1)],
        pieces in prop::collection::vec(prop_oneof![1_usize..100, 1_usize..5_000, Just(64), Just(1024)], 1..6),
        stores in prop_oneof![Just(Stores::None), Just(Stores::Cached), Just(Stores::Streamed)],
        shift in prop_oneof![Just(0_usize), 0_usize..64],
    ) {
        let bytes: Vec<u8> = (0..bytes as u64).map(|at| (seed.wrapping_add(at).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect();
        let whole: Vec<_> = bytes.chunks_exact(unit_bytes as usize).map(Checksum::of).collect();
        let (seen, written) = taken(&bytes, &pieces, unit_bytes, stores, shift);
        prop_assert_eq!(seen, whole);
        if stores != Stores::None {
            prop_assert_eq!(written, bytes);
        }
    }
}

#[test]
fn the_portable_loop_hashes_and_copies_as_the_one_of_the_processor() {
    let bytes: Vec<u8> = (0..64_u32 * 40).map(|at| ((at * at) >> 5) as u8).collect();
    for index in 0..xxh3::STRIPES_PER_BLOCK {
        let start = [7; 8];
        let [mut portable, mut chosen] = [start; 2];
        let [mut to_portable, mut to_chosen] = [vec![0; bytes.len()], vec![0; bytes.len()]];
        // SAFETY: all have as many bytes.
        unsafe {
            copy::portable(
                bytes.as_ptr(),
                to_portable.as_mut_ptr(),
                40,
                Stores::Cached,
                Some((&mut portable, index)),
            );
            copy::stripes(
                bytes.as_ptr(),
                to_chosen.as_mut_ptr(),
                40,
                Stores::Streamed,
                Some((&mut chosen, index)),
            );
        }
        assert_eq!(portable, chosen, "from stripe {index} on");
        assert_ne!(portable, start);
        assert!(to_portable == bytes && to_chosen == bytes);
    }
}

#[test]
fn a_unit_that_lacks_bytes_has_no_checksum() {
    for bytes in [100_u64, 1_000] {
        let mut unit = Unit::new(bytes);
        let source = vec![5; bytes as usize];
        // SAFETY: nothing is stored, and the source has the bytes.
        unsafe { unit.take(source.as_ptr(), ptr::null_mut(), bytes as usize - 1, Stores::None) };
        assert_eq!((unit.finish(), unit.missing()), (None, 1));
        // SAFETY: as above.
        unsafe { unit.take(source.as_ptr(), ptr::null_mut(), 1, Stores::None) };
        assert_eq!(unit.finish(), Some(Checksum::of(&source)));
    }
}
