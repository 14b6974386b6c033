use std::ptr;

use proptest::prelude::*;

use super::*;

const BYTES: usize = 4_000;

/// What a write of a peer does.
#[derive(Debug, Clone)]
enum Write {
    /// Copied here, or received and then looked at.
    Seen { copied: bool },
    /// Moved past this processor.
    Unseen,
}

/// Lets bytes land, as a link or a connection does.
fn land(landings: &[Landing], memory: &mut [u8], bytes: Range<usize>, value: u8, write: &Write) {
    let mut offset = bytes.start;
    while offset < bytes.end {
        let landing = at(landings, offset as u64);
        let part = landing.map_or(1, |landing| landing.left(offset as u64).min(bytes.end - offset));
        let source: Vec<u8> = (0..part).map(|index| value ^ (offset + index) as u8).collect();
        let to = memory[offset..].as_mut_ptr();
        match (landing, write) {
            (None, _) => memory[offset..offset + part].copy_from_slice(&source),
            // SAFETY: both have as many bytes.
            (Some(landing), Write::Seen { copied: true }) => unsafe {
                landing.take(offset as u64, source.as_ptr(), to, part, Stores::Cached);
            },
            (Some(landing), Write::Seen { copied: false }) => {
                memory[offset..offset + part].copy_from_slice(&source);
                let from = memory[offset..].as_ptr();
                // SAFETY: nothing is stored.
                unsafe { landing.take(offset as u64, from, ptr::null_mut(), part, Stores::None) };
            }
            (Some(landing), Write::Unseen) => {
                memory[offset..offset + part].copy_from_slice(&source);
                landing.overwrite();
            }
        }
        offset += part;
    }
}

fn write() -> impl Strategy<Value = Write> {
    prop_oneof![
        8 => any::<bool>().prop_map(|copied| Write::Seen { copied }),
        1 => Just(Write::Unseen),
    ]
}

proptest! {
    /// A checksum is of the bytes that are there, whatever was written in which order; and it is there if all came in order.
    #[test]
    fn a_checksum_is_that_of_what_the_range_holds(
        sizes in prop::collection::vec((0_u64..700, prop_oneof![Just(0_u64), 0_u64..20]), 1..6),
        writes in prop::collection::vec((0..BYTES, 1..900_usize, any::<u8>(), write()), 0..12),
        in_order in prop::collection::vec((1_usize..900, any::<u8>(), any::<bool>()), 1..4),
    ) {
        let mut end = 0;
        let ranges: Vec<Range<u64>> = sizes
            .into_iter()
            .map(|(bytes, gap)| {
                let start = end + gap;
                end = start + bytes;
                start..end
            })
            .collect();
        for whole_first in [true, false] {
            let landings = landings(&ranges);
            let mut memory = vec![0; BYTES];
            if whole_first {
                let mut done = 0;
                for (bytes, value, copied) in in_order.iter().cycle() {
                    let part = done..(done + bytes).min(end as usize);
                    done = part.end;
                    land(&landings, &mut memory, part, *value, &Write::Seen { copied: *copied });
                    if done == end as usize {
                        break;
                    }
                }
                for landing in &landings {
                    let (place, checksum) = landing.checksum();
                    let range = ranges[place].start as usize..ranges[place].end as usize;
                    prop_assert_eq!(checksum, Some(Checksum::of(&memory[range])));
                }
            }
            for (start, bytes, value, write) in &writes {
                let part = *start..(start + bytes).min(BYTES);
                land(&landings, &mut memory, part, *value, write);
            }
            for landing in &landings {
                let (place, checksum) = landing.checksum();
                let range = ranges[place].start as usize..ranges[place].end as usize;
                if let Some(checksum) = checksum {
                    prop_assert_eq!(checksum, Checksum::of(&memory[range]));
                }
            }
        }
    }
}

#[test]
fn ranges_that_overlap_are_not_seen() {
    assert!(landings(&[0..10, 20..30, 9..12]).is_empty());
    assert_eq!(
        landings(&[10..20, 0..10, 5..5, 10..10]).len(),
        0,
        "inside of another one"
    );
    assert_eq!(landings(&[10..20, 0..10, 10..10]).len(), 3);
}
