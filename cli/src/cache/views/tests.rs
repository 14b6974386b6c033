use client::StoreStats;
use proto::v1;
use types::{BlockHash, Role};

use super::*;
use crate::node_admin::tests::node;
use crate::output::golden;
use crate::reach::Router;

fn reached(id: &str, role: Role) -> Reached {
    Router::with_tls("router:1", None, None).reached(node(id, role).record)
}

/// A pool of 100 blocks of 1 KiB.
fn pool(cached_blocks: u64) -> StoreStats {
    StoreStats {
        block_bytes: 1024,
        capacity_blocks: 100,
        free_blocks: 100 - cached_blocks,
        cached_blocks,
        hits: 3 * cached_blocks,
        misses: cached_blocks,
        ..StoreStats::default()
    }
}

#[test]
fn pools_are_shown_with_what_they_hold() {
    let with_bucket = StoreStats {
        object_tier: Some(v1::ObjectTierStats {
            usable: true,
            read_bytes: 2048,
            written_bytes: 4096,
            ..v1::ObjectTierStats::default()
        }),
        ..pool(40)
    };
    let answers = [
        (reached("decode-0", Role::Decode), with_bucket),
        (reached("store-0", Role::Store), pool(0)),
    ];
    golden::check("cache-stats", &stats(&answers));
}

#[test]
fn tenants_are_shown_beside_the_pools_where_anyone_names_them() {
    let shared = StoreStats {
        tenants: vec![
            v1::TenantStats {
                root: vec![1; 16],
                name: Some("acme".into()),
                cached_blocks: 30,
                blocks_max: Some(50),
                weight: 2,
            },
            v1::TenantStats {
                root: vec![2; 16],
                name: Some(String::new()),
                cached_blocks: 10,
                blocks_max: None,
                weight: 1,
            },
        ],
        ..pool(40)
    };
    let answers = [(reached("decode-0", Role::Decode), shared)];
    golden::check("cache-stats-tenants", &stats(&answers));
}

#[test]
fn the_worth_of_blocks_is_shown_with_who_holds_them() {
    let block = |last: u8, worth| RankedBlock {
        hash: BlockHash([last; 16]),
        depth: 3,
        pins: 1,
        children: 2,
        worth,
    };
    let (decode, store) = (NodeId::new("decode-0"), NodeId::new("store-0"));
    let (first, second) = (block(1, 2.5), block(2, 0.125));
    golden::check("cache-top", &top(&[(&decode, &first), (&store, &second)]));
}

#[test]
fn the_holders_of_a_prompt_are_its_names() {
    let prompt = Prompt {
        root: BlockHash([0; 16]),
        chain: vec![BlockHash([1; 16]), BlockHash([2; 16])],
        block_tokens: 32,
    };
    let located = |held_blocks, worth| Located {
        held_blocks,
        used_blocks: 0,
        worth,
    };
    let (decode, store) = (NodeId::new("decode-0"), NodeId::new("store-0"));
    let (some, none) = (located(2, 1.5), located(0, 0.0));
    golden::check(
        "cache-locate",
        &locate(&prompt, &[(&decode, &some), (&store, &none)]),
    );
}

#[test]
fn pins_are_shown_with_when_they_end() {
    let pin = |pin_id, ttl_ms| PinnedChain {
        pin_id,
        hash: vec![7; 16],
        blocks: 12,
        ttl_ms,
        replicas_min: 1,
    };
    let decode = NodeId::new("decode-0");
    golden::check(
        "cache-pins",
        &pins(&[(&decode, &vec![pin(1, 0), pin(2, 59_001)])]),
    );
}

#[test]
fn what_was_dropped_and_what_was_verified_is_told_per_node() {
    let decode = NodeId::new("decode-0");
    golden::check("cache-evict", &evicted(&[(&decode, &(12, 3))]));
    let found = Verification {
        verified_blocks: 40,
        total_blocks: 40,
        corrupt_blocks: 1,
        dropped_blocks: 1,
    };
    golden::check("cache-verify", &verified(&[(decode, found)]));
}

#[test]
fn what_was_done_with_a_prompts_blocks_is_a_line() {
    let (decode, store) = (NodeId::new("decode-0"), NodeId::new("store-0"));
    golden::check("cache-pin", &pinned(&decode, 7, 12, 16));
    golden::check("cache-unpin", &unpinned(&decode, 7));
    golden::check("cache-warm", &warmed((&decode, &store), 12, 16, 3 << 20));
    golden::check(
        "cache-export",
        &exported(&decode, Path::new("prompt.kv"), 12, 3 << 20),
    );
    golden::check("cache-import", &imported(&store, 10, 2));
}
