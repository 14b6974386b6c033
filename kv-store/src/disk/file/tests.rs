use std::collections::HashMap;
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;
use types::Checksum;

use super::*;

const BLOCK_BYTES: usize = 4096;
const CAPACITY: u32 = 16;
const ROOT: BlockHash = BlockHash([1; 16]);

fn open(folder: &TempDir) -> (BlockFiles, Recovered) {
    BlockFiles::open(folder.path(), BLOCK_BYTES, ROOT, CAPACITY).unwrap()
}

fn record(slot: u32) -> Record {
    Record {
        hash: BlockHash([slot as u8 + 10; 16]),
        parent: ROOT,
        follows_root: true,
        checksum: Checksum(u64::from(slot)),
        sequence: u64::from(slot) + 1,
    }
}

/// Stores blocks in the first slots, as a process that is killed leaves them.
fn fill(folder: &TempDir, slots: u32) {
    let (files, _) = open(folder);
    let memory = HostMemory::allocate(BLOCK_BYTES).unwrap();
    for slot in 0..slots {
        memory::copy_in(&*memory, 0, &[slot as u8; BLOCK_BYTES]).unwrap();
        files.write(SlotId(slot), &*memory, 0).unwrap();
        files.write_record(SlotId(slot), Some(&record(slot))).unwrap();
    }
}

fn index(folder: &TempDir) -> PathBuf {
    folder.path().join("index")
}

#[test]
fn what_was_written_is_found_again() {
    let folder = tempfile::tempdir().unwrap();
    fill(&folder, 5);
    let (files, recovered) = open(&folder);
    assert_eq!(recovered.dropped, None);
    assert_eq!(
        recovered.records,
        (0..5)
            .map(|slot| (SlotId(slot), record(slot)))
            .collect::<Vec<_>>()
    );
    let memory = HostMemory::allocate(3 * BLOCK_BYTES).unwrap();
    files.read(SlotId(3), &*memory, BLOCK_BYTES).unwrap();
    let bytes = memory::copy_out(&*memory, 0, 3 * BLOCK_BYTES).unwrap();
    assert!(bytes[..BLOCK_BYTES].iter().all(|byte| *byte == 0));
    assert!(bytes[BLOCK_BYTES..2 * BLOCK_BYTES].iter().all(|byte| *byte == 3));
    assert!(bytes[2 * BLOCK_BYTES..].iter().all(|byte| *byte == 0));

    files.write_record(SlotId(2), None).unwrap();
    drop(files);
    let (_, recovered) = open(&folder);
    assert_eq!(recovered.records.len(), 4);
}

#[test]
fn blocks_of_another_space_or_size_are_dropped_and_never_come_back() {
    let folder = tempfile::tempdir().unwrap();
    fill(&folder, 5);
    let other = BlockFiles::open(folder.path(), BLOCK_BYTES, BlockHash([2; 16]), CAPACITY);
    let (_, recovered) = other.unwrap();
    assert!(recovered.records.is_empty());
    let reason = recovered.dropped.unwrap();
    assert!(reason.contains(&ROOT.to_string()), "{reason}");
    let (_, recovered) = open(&folder);
    assert!(recovered.records.is_empty(), "they were dropped for good");

    fill(&folder, 5);
    let other = BlockFiles::open(folder.path(), 2 * BLOCK_BYTES, ROOT, CAPACITY);
    assert_eq!(
        other.unwrap().1.dropped.unwrap(),
        "its blocks have 4096 bytes, not 8192"
    );
}

#[test]
fn a_smaller_capacity_keeps_what_still_fits() {
    let folder = tempfile::tempdir().unwrap();
    fill(&folder, 5);
    let (_, recovered) = BlockFiles::open(folder.path(), BLOCK_BYTES, ROOT, 3).unwrap();
    assert_eq!(recovered.records.len(), 3);
}

#[test]
fn somebody_elses_file_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    for text in ["[package]\n".to_owned(), "x".repeat(10_000)] {
        fs::write(index(&folder), &text).unwrap();
        let refused = BlockFiles::open(folder.path(), BLOCK_BYTES, ROOT, CAPACITY).unwrap_err();
        assert_eq!(refused, OpenError::Foreign { path: index(&folder) });
        assert_eq!(fs::read_to_string(index(&folder)).unwrap(), text);
    }
}

#[test]
fn two_processes_never_share_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let (files, _) = open(&folder);
    let refused = BlockFiles::open(folder.path(), BLOCK_BYTES, ROOT, CAPACITY).unwrap_err();
    assert_eq!(refused, OpenError::InUse { path: index(&folder) });
    drop(files);
    open(&folder);
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let refused = BlockFiles::open(&file.path().join("kv"), BLOCK_BYTES, ROOT, CAPACITY).unwrap_err();
    assert!(
        matches!(&refused, OpenError::File { path, .. } if path.ends_with("kv")),
        "{refused}"
    );
}

#[derive(Debug, Clone)]
enum Damage {
    Flip {
        at: usize,
        bit: u8,
    },
    Truncate {
        at: usize,
    },
    Overwrite {
        at: usize,
        bytes: Vec<u8>,
    },
    /// A run of the file lands somewhere else.
    Move {
        from: usize,
        to: usize,
        len: usize,
    },
}

fn damage() -> impl Strategy<Value = Damage> {
    const FILE: usize = HEADER_BYTES + CAPACITY as usize * RECORD_BYTES;
    let records = || HEADER_BYTES..FILE;
    prop_oneof![
        (0..FILE, 0..8u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        (records(), 0..8u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        (0..FILE).prop_map(|at| Damage::Truncate { at }),
        (records(), prop::collection::vec(any::<u8>(), 1..200))
            .prop_map(|(at, bytes)| Damage::Overwrite { at, bytes }),
        (records(), records(), 1..300usize).prop_map(|(from, to, len)| Damage::Move { from, to, len }),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    match damage {
        Damage::Flip { at, bit } => {
            if let Some(byte) = bytes.get_mut(*at) {
                *byte ^= 1 << bit;
            }
        }
        Damage::Truncate { at } => bytes.truncate(*at),
        Damage::Overwrite { at, bytes: new } => {
            for (byte, new) in bytes.iter_mut().skip(*at).zip(new) {
                *byte = *new;
            }
        }
        Damage::Move { from, to, len } => {
            let moved: Vec<u8> = bytes.iter().skip(*from).take(*len).copied().collect();
            for (byte, new) in bytes.iter_mut().skip(*to).zip(moved) {
                *byte = new;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn a_damaged_index_names_no_block_that_is_not_there(damages in prop::collection::vec(damage(), 1..6)) {
        let folder = tempfile::tempdir().unwrap();
        fill(&folder, CAPACITY);
        let mut bytes = fs::read(index(&folder)).unwrap();
        for damage in &damages {
            apply(&mut bytes, damage);
        }
        fs::write(index(&folder), &bytes).unwrap();
        match BlockFiles::open(folder.path(), BLOCK_BYTES, ROOT, CAPACITY) {
            Ok((_, recovered)) => {
                let written: HashMap<SlotId, Record> =
                    (0..CAPACITY).map(|slot| (SlotId(slot), record(slot))).collect();
                for (slot, record) in &recovered.records {
                    prop_assert_eq!(written.get(slot), Some(record));
                }
            }
            // A flip in its first bytes makes it look like somebody else's.
            Err(error) => prop_assert!(matches!(error, OpenError::Foreign { .. }), "{error}"),
        }
    }
}
