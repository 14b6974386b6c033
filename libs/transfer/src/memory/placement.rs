//! Where the pages of a pool lie: how large they are, and on which of the machine's memories.
//!
//! Both are wishes that the system may not grant. Nothing here fails, and nothing changes what the bytes are.

use std::fs;

use types::{Memory, MemoryKind};

/// What is asked for in [`super::HostMemory::allocate_on`] and [`place`].
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum HugePages {
    /// Transparent ones, where the system has them.
    #[default]
    Auto,
    /// Those of the system's reserve, and transparent ones if it has none left. Where a container's limit of reserved pages is zero,
    /// memory that was mapped so may kill the process when it is touched.
    Reserved,
    /// Whatever the system does by itself.
    Off,
}

/// What was had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// The system will use huge pages where it finds them.
    pub is_huge: bool,
    /// Over how many memories the pages are spread; 1 is where nothing is done.
    pub numa_nodes: usize,
}

/// Which memories of the machine there are.
const NODES_FILE: &str = "/sys/devices/system/node/has_memory";
/// Words of a set of nodes: 1024 nodes, which is the kernel's own bound.
const NODE_WORDS: usize = 16;

/// Asks for huge pages, and spreads the pages over the machine's memories if it has several: all cores and adapters use all of
/// a pool. Call it before the memory is touched.
pub fn place(memory: &dyn Memory, huge_pages: HugePages) -> Placement {
    let nodes = fs::read_to_string(NODES_FILE).unwrap_or_default();
    let nodes = parse_list(&nodes);
    let is_host = memory.kind() == MemoryKind::Host;
    let is_spread = is_host && nodes.len() > 1 && interleave(memory, &nodes);
    Placement {
        is_huge: is_host && huge_pages != HugePages::Off && advise_huge(memory),
        numa_nodes: if is_spread { nodes.len() } else { 1 },
    }
}

/// Reads `0-1,4`. What is no such list has no entries.
fn parse_list(list: &str) -> Vec<usize> {
    let number = |text: &str| text.trim().parse::<usize>().ok();
    let ranges = list.split(',').filter_map(|range| match range.split_once('-') {
        None => number(range).map(|one| one..=one),
        Some((first, last)) => Some(number(first)?..=number(last)?),
    });
    ranges
        .flatten()
        .take_while(|node| *node < NODE_WORDS * 64)
        .collect()
}

fn advise_huge(memory: &dyn Memory) -> bool {
    // SAFETY: the region is mapped (contract of `Memory`), and the advice changes no byte of it. A region that does not begin on a page
    // is refused.
    let advised = unsafe { libc::madvise(memory.base().as_ptr().cast(), memory.len(), libc::MADV_HUGEPAGE) };
    advised == 0
}

fn interleave(memory: &dyn Memory, nodes: &[usize]) -> bool {
    let mut set = [0_u64; NODE_WORDS];
    for node in nodes {
        set[node / 64] |= 1 << (node % 64);
    }
    // The kernel takes one bit less than it is told.
    let bits = NODE_WORDS * 64 + 1;
    // SAFETY: the region is mapped (contract of `Memory`), `set` has the bits that are named and outlives the call, and a policy
    // for pages changes no byte of them.
    let bound = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            memory.base().as_ptr(),
            memory.len(),
            libc::MPOL_INTERLEAVE,
            set.as_ptr(),
            bits,
            0,
        )
    };
    bound == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostMemory;
    use crate::memory::{copy_in, copy_out};

    #[test]
    fn lists_of_nodes_are_read() {
        assert_eq!(parse_list("0\n"), [0]);
        assert_eq!(parse_list("0-2,5\n"), [0, 1, 2, 5]);
        for nothing in ["", "\n", "x", "1-", "-", "0-x"] {
            assert_eq!(parse_list(nothing), [0; 0], "{nothing:?}");
        }
        assert!(parse_list("0-99999999").len() <= NODE_WORDS * 64);
    }

    #[test]
    fn placed_memory_is_memory() {
        for huge_pages in [HugePages::Auto, HugePages::Reserved, HugePages::Off] {
            let memory = HostMemory::allocate_on(8 << 20, huge_pages).expect("memory");
            let placement = place(&*memory, huge_pages);
            assert!(!(placement.is_huge && huge_pages == HugePages::Off));
            assert!(placement.numa_nodes >= 1);
            assert_eq!(memory.len(), 8 << 20);
            copy_in(&*memory, (8 << 20) - 7, b"perigee").expect("inside");
            assert_eq!(
                copy_out(&*memory, (8 << 20) - 8, 8).expect("inside"),
                b"\0perigee"
            );
        }
    }

    #[test]
    fn pages_can_be_spread_over_the_nodes_that_are_there() {
        let nodes = parse_list(&fs::read_to_string(NODES_FILE).unwrap_or_default());
        let memory = HostMemory::allocate(1 << 20).expect("memory");
        if nodes.is_empty() {
            return;
        }
        assert!(
            interleave(&*memory, &nodes),
            "{:?}",
            std::io::Error::last_os_error()
        );
        copy_in(&*memory, 0, b"perigee").expect("inside");
        assert!(
            !interleave(&*memory, &[NODE_WORDS * 64 - 1]),
            "there is no such node"
        );
    }
}
