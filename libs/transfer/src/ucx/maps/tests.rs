use types::Memory as _;

use super::*;

const MAPS: &str = "\
7000-8000 r--p 00000000 08:01 1 /bin/x
8000-9000 rw-s 00000000 00:01 2 /SYSV00000000 (deleted)
9000-a000 ---p 00000000 00:00 0
b000-c000 rw-p 00000000 00:00 0 [heap]
";

#[test]
fn a_range_is_covered_if_every_byte_of_it_is_mapped_and_readable() {
    for (start, end, expected) in [
        (0x8000, 0x9000, true),
        (0x7000, 0x9000, true),
        (0x8123, 0x8124, true),
        (0x8fff, 0x9001, false),
        (0x9000, 0x9001, false),
        (0xa000, 0xb001, false),
        (0xb000, 0xc000, true),
        (0xb000, 0xc001, false),
        (0x6fff, 0x7001, false),
        (0x5000, 0x5000, true),
    ] {
        assert_eq!(covered(MAPS, start, end), expected, "{start:x}-{end:x}");
    }
    assert!(!covered("nonsense", 0x8000, 0x8001));
}

#[test]
fn memory_of_this_process_is_covered_and_the_first_page_is_not() {
    let bytes = vec![0_u8; 4096];
    assert!(covers(bytes.as_ptr().addr(), 4096));
    assert!(!covers(16, 16));
    assert!(!covers(bytes.as_ptr().addr(), u64::MAX));
}

#[test]
fn what_is_read_is_looked_up_once_and_stays_as_it_is() {
    const MIB: u64 = 1 << 20;
    let memory = crate::memory::HostMemory::allocate(5 * MIB as usize).expect("memory");
    crate::memory::copy_in(&*memory, 4 * MIB as usize, &[7; 100]).expect("inside");
    let mapping = LookedUp::none_of(memory.base().as_ptr().expose_provenance(), 5 * MIB);
    let seen = || mapping.chunks[0].load(Ordering::Relaxed);
    mapping.look_up(3 * MIB, MIB);
    assert_eq!(seen(), 0b010);
    // The last part is shorter than the others.
    mapping.look_up(4 * MIB - 1, MIB + 1);
    assert_eq!(seen(), 0b110);
    mapping.look_up(0, 0);
    assert_eq!(seen(), 0b110);
    mapping.look_up(0, 5 * MIB);
    assert_eq!(seen(), 0b111);
    let bytes = crate::memory::copy_out(&*memory, 4 * MIB as usize, 101).expect("inside");
    assert_eq!((bytes[99], bytes[100]), (7, 0));
}
