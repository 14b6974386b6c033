use proptest::prelude::*;

use super::*;

const PINNED: &str = "03030303030303030303030303030303fcfcfcfcfcfcfcfcfcfcfcfcfcfcfcfc\
    877dc0e587dcf508030000000000000000000000000000005948395b0c4ff423";

fn header() -> Header {
    Header {
        block_bytes: 393_216,
        root: BlockHash([7; 16]),
        instance: 0x0123_4567_89ab_cdef,
    }
}

fn record(seed: u64) -> Record {
    Record {
        hash: BlockHash([seed as u8; 16]),
        parent: BlockHash([seed as u8 ^ 0xff; 16]),
        follows_root: seed.is_multiple_of(2),
        checksum: Checksum(seed.wrapping_mul(0x5851_f42d_4c95_7f2d)),
        sequence: seed,
    }
}

/// The bytes are what other processes find: a change here is a new version.
#[test]
fn the_bytes_of_a_record_are_pinned() {
    let bytes = record(3).encode(SlotId(5), 11);
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(text, PINNED);
}

#[test]
fn a_header_survives_a_round_trip_and_damage_shows() {
    let bytes = header().encode();
    assert_eq!(Header::decode(&bytes), Ok(header()));
    for at in 0..HEADER_BODY + 8 {
        let mut damaged = bytes;
        damaged[at] ^= 1;
        let expected = match at {
            0..8 => HeaderError::Foreign,
            8 => HeaderError::Version { found: 0 },
            9 => HeaderError::Version { found: 0x101 },
            10 => HeaderError::Version { found: 0x1_0001 },
            11 => HeaderError::Version { found: 0x100_0001 },
            _ => HeaderError::Damaged,
        };
        assert_eq!(Header::decode(&damaged), Err(expected), "byte {at}");
    }
}

#[test]
fn a_cleared_record_is_none() {
    for slot in [0, 1, u32::MAX - 1] {
        assert_eq!(Record::decode(&[0; RECORD_BYTES], SlotId(slot), 0), None);
        assert_eq!(Record::decode(&[0; RECORD_BYTES], SlotId(slot), 9), None);
    }
}

proptest! {
    #[test]
    fn a_record_is_one_only_whole_and_in_its_place(
        seed: u64,
        slot in 0..1_000_000u32,
        instance: u64,
        at in 0..RECORD_BYTES * 8,
        kept in 0..RECORD_BYTES,
    ) {
        let record = record(seed);
        let bytes = record.encode(SlotId(slot), instance);
        prop_assert_eq!(Record::decode(&bytes, SlotId(slot), instance), Some(record));
        prop_assert_eq!(Record::decode(&bytes, SlotId(slot + 1), instance), None);
        prop_assert_eq!(Record::decode(&bytes, SlotId(slot), instance ^ 1), None);

        let mut flipped = bytes;
        flipped[at / 8] ^= 1 << (at % 8);
        prop_assert_eq!(Record::decode(&flipped, SlotId(slot), instance), None);

        // Torn: the end is that of another record.
        let other = self::record(seed.wrapping_add(1)).encode(SlotId(slot), instance);
        let mut torn = bytes;
        torn[kept..].copy_from_slice(&other[kept..]);
        let read = Record::decode(&torn, SlotId(slot), instance);
        prop_assert!(read.is_none() || torn == other || torn == bytes);
    }
}
