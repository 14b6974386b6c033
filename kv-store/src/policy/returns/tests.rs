use std::time::Duration;

use super::*;

const GAP_MS: u64 = 40_000;

/// One request of a chain, none of which is held; slots are numbered by depth.
fn store(policy: &mut Returns, chain: &[u8], now: Instant) {
    for (depth, hash) in chain.iter().enumerate() {
        let depth = u32::try_from(depth).unwrap();
        let stored = Stored {
            block: BlockId(depth),
            hash: BlockHash([*hash; 16]),
            parent: depth.checked_sub(1).map(BlockId),
            depth,
        };
        policy.stored(stored, now);
    }
}

fn evict(policy: &mut Returns, chain: &[u8], now: Instant) {
    for (depth, hash) in chain.iter().enumerate().rev() {
        let block = BlockId(u32::try_from(depth).unwrap());
        policy.evictable(block, now);
        policy.evicted(block, BlockHash([*hash; 16]), now);
    }
}

fn traits(policy: &Returns, depth: u32) -> Traits {
    policy.runs.get(policy.past(BlockId(depth)).run).unwrap().traits
}

#[test]
fn a_conversation_that_returns_after_its_eviction_is_a_turn_older() {
    let mut policy = Returns::new(8);
    let begun = Instant::now();
    store(&mut policy, &[1, 2, 3], begun);
    evict(&mut policy, &[1, 2, 3], begun);
    let then = begun + Duration::from_millis(GAP_MS);
    store(&mut policy, &[1, 2, 4, 5], then);
    let own = traits(&policy, 2);
    assert_eq!(own.kind, UseKind::Own);
    assert_eq!((own.turns(), own.gap_ms), (1, Some(GAP_MS)));
    assert_eq!((own.returned, own.blocks), (2, 4));
}

#[test]
fn a_document_that_many_ask_for_is_shared_even_if_it_was_evicted_each_time() {
    let mut policy = Returns::new(8);
    let begun = Instant::now();
    for question in 10..14u8 {
        let now = begun + Duration::from_millis(GAP_MS * u64::from(question));
        let chain = [1, 2, 3, question, question + 100];
        store(&mut policy, &chain, now);
        evict(&mut policy, &chain, now);
    }
    let now = begun + Duration::from_millis(GAP_MS * 14);
    store(&mut policy, &[1, 2, 3, 14, 114], now);
    // The fifth use is in the octave of four.
    assert_eq!(traits(&policy, 2).kind, UseKind::Shared(1));
    assert_eq!(traits(&policy, 3).kind, UseKind::Own);
}
