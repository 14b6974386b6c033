//! What a node needs to know of a block, in bytes of memory. Alone in its process, since it looks at all of that.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used)] // A test.

use std::time::Instant;

use kv_store::Eviction;
use kv_store::table::{BlockTable, Committed, Parent, TableLimits};
use types::{BlockHash, Checksum};

const BLOCKS: usize = 1_000_000;
/// Blocks of a conversation.
const CHAIN: usize = 40;
/// Of a block, whatever is counted in: slot, index, policy and its history.
const BYTES_MAX: usize = 200;

/// Resident bytes of this process.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    let kibibytes: usize = line.trim().trim_end_matches(" kB").parse().unwrap();
    kibibytes << 10
}

/// Fills a table twice over, so that what the policy remembers of evicted blocks counts too.
fn filled(eviction: Eviction) -> BlockTable {
    let mut table = BlockTable::new(TableLimits {
        capacity: BLOCKS,
        log_entries_max: 1024,
        leases_max: 16,
        first_lease: 1,
        eviction,
    });
    let root = BlockHash::default();
    let now = Instant::now();
    for conversation in 0..(2 * BLOCKS / CHAIN) as u32 {
        let mut parent = Parent::Root(root);
        for hash in root.chain(&[conversation; CHAIN], 1) {
            let block = table.allocate(1, now).unwrap()[0];
            let Committed::Stored(stored) = table.commit(block, parent, hash, Checksum(1), now) else {
                panic!("it is new and follows what is held");
            };
            table.unpin(stored.block, now);
            parent = Parent::Block(hash);
        }
    }
    assert_eq!(table.counts().cached, BLOCKS);
    table
}

#[test]
fn a_block_costs_at_most_two_hundred_bytes() {
    let before = resident();
    let table = filled(Eviction::default());
    let bytes = (resident() - before) / BLOCKS;
    assert_eq!(table.counts().capacity, BLOCKS);
    println!("{bytes} bytes per block");
    assert!(bytes <= BYTES_MAX, "{bytes} bytes per block");
}
