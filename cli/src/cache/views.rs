//! What the nodes said of their caches, as it is printed. Pure.

use std::path::Path;
use std::time::Duration;

use client::{Located, PinnedChain, RankedBlock, StoreStats, Verification};
use serde_json::{Value, json};
use types::NodeId;

use super::prompt::Prompt;
use crate::output::{self, Columns, View};
use crate::reach::Reached;
use crate::tenants;

/// Each node's pool in numbers, and the tenants of each unless nobody names any.
pub(crate) fn stats(answers: &[(Reached, StoreStats)]) -> View {
    let nodes: Vec<Value> = answers.iter().map(stats_json).collect();
    let view = View::new(json!({ "nodes": nodes }), |wide| {
        let said: Vec<(&NodeId, &StoreStats)> = answers
            .iter()
            .map(|(record, stats)| (&record.id, stats))
            .collect();
        let tenants = match tenants::are_told_apart(&said) {
            true => format!("\n{}", tenants::usage_table(&said)),
            false => String::new(),
        };
        format!("{}{tenants}", stats_table(answers, wide))
    });
    view.named(answers.iter().map(|(record, _)| &record.id))
}

fn stats_json((record, stats): &(Reached, StoreStats)) -> Value {
    json!({
        "id": record.id,
        "role": record.role,
        "block_bytes": stats.block_bytes,
        "capacity_blocks": stats.capacity_blocks,
        "free_blocks": stats.free_blocks,
        "cached_blocks": stats.cached_blocks,
        "pinned_blocks": stats.pinned_blocks,
        "hits": stats.hits,
        "misses": stats.misses,
        "evictions": stats.evictions,
        "corruptions": stats.corruptions,
        "object_tier": stats.object_tier.as_ref().map(|tier| json!({
            "usable": tier.usable,
            "read_bytes": tier.read_bytes,
            "written_bytes": tier.written_bytes,
            "missed_segments": tier.missed_segments,
            "errors": tier.errors,
            "corruptions": tier.corruptions,
        })),
        "tenants": tenants::of_node_json(stats),
    })
}

fn stats_table(answers: &[(Reached, StoreStats)], wide: bool) -> String {
    let columns = [
        ("NODE", false),
        ("ROLE", false),
        ("POOL", false),
        ("CACHED", false),
        ("IN USE", false),
        ("FREE", false),
        ("HITS", false),
        ("MISSES", false),
        ("HIT RATIO", false),
        ("EVICTED", false),
        ("CORRUPT", false),
        ("BUCKET", false),
        ("BLOCKS", true),
        ("BLOCK SIZE", true),
        ("GRPC", true),
    ];
    let mut table = Columns::new(wide, &columns);
    for (record, stats) in answers {
        let asked = stats.hits + stats.misses;
        table.row([
            record.id.to_string(),
            record.role.to_string(),
            output::bytes(stats.capacity_blocks * stats.block_bytes),
            output::bytes(stats.cached_blocks * stats.block_bytes),
            output::bytes(stats.pinned_blocks * stats.block_bytes),
            output::bytes(stats.free_blocks * stats.block_bytes),
            stats.hits.to_string(),
            stats.misses.to_string(),
            match asked {
                0 => "-".to_owned(),
                asked => format!("{:.1} %", 100.0 * stats.hits as f64 / asked as f64),
            },
            stats.evictions.to_string(),
            stats.corruptions.to_string(),
            match &stats.object_tier {
                None => "-".to_owned(),
                Some(tier) if !tier.usable => "bypassed".to_owned(),
                Some(tier) => format!(
                    "{} in, {} out",
                    output::bytes(tier.written_bytes),
                    output::bytes(tier.read_bytes)
                ),
            },
            stats.capacity_blocks.to_string(),
            output::bytes(stats.block_bytes),
            record.grpc_endpoint.clone(),
        ]);
    }
    table.text()
}

/// Blocks by what they are worth.
pub(super) fn top(blocks: &[(&NodeId, &RankedBlock)]) -> View {
    let documents = blocks.iter().map(|(node, block)| {
        json!({
            "node": node,
            "hash": block.hash,
            "depth": block.depth,
            "pins": block.pins,
            "children": block.children,
            "worth": block.worth,
        })
    });
    let documents: Vec<Value> = documents.collect();
    let view = View::new(json!({ "blocks": documents }), |_| {
        let mut table = output::table(&["NODE", "BLOCK", "DEPTH", "HELD BY", "CONTINUED BY", "WORTH"]);
        for (node, block) in blocks {
            table.add_row([
                node.to_string(),
                block.hash.to_string(),
                block.depth.to_string(),
                block.pins.to_string(),
                block.children.to_string(),
                format!("{:.3}", block.worth),
            ]);
        }
        output::table_text(&table)
    });
    view.named(blocks.iter().map(|(_, block)| block.hash))
}

/// Who holds how much of a prompt.
pub(super) fn locate(prompt: &Prompt, answers: &[(&NodeId, &Located)]) -> View {
    let nodes = answers.iter().map(|(id, located)| {
        json!({
            "id": id,
            "held_blocks": located.held_blocks,
            "held_tokens": located.held_blocks * prompt.block_tokens,
            "used_blocks": located.used_blocks,
            "worth": located.worth,
        })
    });
    let document = json!({
        "blocks": prompt.chain.len(),
        "hashes": prompt.chain,
        "nodes": nodes.collect::<Vec<_>>(),
    });
    let view = View::new(document, |_| {
        let mut table = output::table(&["NODE", "HELD BLOCKS", "HELD TOKENS", "IN USE", "WORTH"]);
        for (id, located) in answers {
            table.add_row([
                id.to_string(),
                format!("{}/{}", located.held_blocks, prompt.chain.len()),
                (located.held_blocks * prompt.block_tokens).to_string(),
                located.used_blocks.to_string(),
                match located.held_blocks {
                    0 => "-".to_owned(),
                    _ => format!("{:.3}", located.worth),
                },
            ]);
        }
        output::table_text(&table)
    });
    let holders = answers.iter().filter(|(_, located)| located.held_blocks > 0);
    view.named(holders.map(|(id, _)| id))
}

/// The pins of all nodes. Their numbers count on their own node alone, so they are no names.
pub(super) fn pins(answers: &[(&NodeId, &Vec<PinnedChain>)]) -> View {
    let pins: Vec<(&NodeId, &PinnedChain)> = answers
        .iter()
        .flat_map(|(id, pins)| pins.iter().map(move |pin| (*id, pin)))
        .collect();
    let last = |pin: &PinnedChain| proto::convert::hash("hash", &pin.hash).unwrap_or_default();
    let documents = pins.iter().map(|(id, pin)| {
        json!({
            "node": id,
            "pin_id": pin.pin_id,
            "hash": last(pin),
            "blocks": pin.blocks,
            "ttl_ms": (pin.ttl_ms > 0).then_some(pin.ttl_ms),
            "replicas_min": pin.replicas_min,
        })
    });
    View::new(json!({ "pins": documents.collect::<Vec<_>>() }), |_| {
        let mut table = output::table(&["NODE", "PIN", "LAST BLOCK", "BLOCKS", "REPLICAS", "ENDS IN"]);
        for (id, pin) in &pins {
            table.add_row([
                id.to_string(),
                pin.pin_id.to_string(),
                last(pin).to_string(),
                pin.blocks.to_string(),
                pin.replicas_min.to_string(),
                match pin.ttl_ms {
                    0 => "-".to_owned(),
                    ttl => humantime::format_duration(Duration::from_secs(ttl.div_ceil(1000))).to_string(),
                },
            ]);
        }
        output::table_text(&table)
    })
}

/// What a pin keeps of a prompt, and how to end it.
pub(super) fn pinned(node: &NodeId, pin_id: u64, blocks: u64, of_blocks: usize) -> View {
    let document = json!({ "node": node, "pin_id": pin_id, "pinned_blocks": blocks });
    let line = format!(
        "{node} keeps {blocks} of {of_blocks} blocks: unpin with perigee cache unpin --node {node} {pin_id}"
    );
    View::line(document, line).named([pin_id])
}

/// A pin that ended.
pub(super) fn unpinned(node: &NodeId, pin_id: u64) -> View {
    let document = json!({ "node": node, "pin_id": pin_id, "unpinned": true });
    View::line(document, format!("unpinned {pin_id} of {node}")).named([pin_id])
}

/// What a node holds now of a prompt, and what came from another one for it.
pub(super) fn warmed((from, to): (&NodeId, &NodeId), held: u64, of_blocks: usize, bytes: u64) -> View {
    let document = json!({ "from": from, "to": to, "held_blocks": held, "fetched_bytes": bytes });
    let fetched = output::bytes(bytes);
    let line = format!("{to} holds {held} of {of_blocks} blocks, {fetched} fetched from {from}");
    View::line(document, line).named([to])
}

/// A file of blocks that was written.
pub(super) fn exported(node: &NodeId, file: &Path, blocks: usize, bytes: u64) -> View {
    let document = json!({ "node": node, "file": file, "blocks": blocks, "bytes": bytes });
    let line = format!("{blocks} blocks of {node} are in {}", file.display());
    View::line(document, line).named([file.display()])
}

/// What a node took of a file of blocks.
pub(super) fn imported(node: &NodeId, imported: u64, held: u64) -> View {
    let document = json!({ "node": node, "imported_blocks": imported, "held_blocks": held });
    let line = format!("{node} took {imported} blocks and held {held} already");
    View::line(document, line).named([node])
}

/// What each node dropped, and what it kept.
pub(super) fn evicted(answers: &[(&NodeId, &(u64, u64))]) -> View {
    let nodes = answers
        .iter()
        .map(|(id, (evicted, kept))| json!({ "id": id, "evicted_blocks": evicted, "kept_blocks": kept }));
    let view = View::new(json!({ "nodes": nodes.collect::<Vec<_>>() }), |_| {
        let mut table = output::table(&["NODE", "EVICTED", "KEPT"]);
        for (id, (evicted, kept)) in answers {
            table.add_row([id.to_string(), evicted.to_string(), kept.to_string()]);
        }
        output::table_text(&table)
    });
    view.named(answers.iter().map(|(id, _)| id))
}

/// What each node found in its blocks.
pub(super) fn verified(nodes: &[(NodeId, Verification)]) -> View {
    let documents = nodes.iter().map(|(id, found)| {
        json!({
            "id": id,
            "verified_blocks": found.verified_blocks,
            "corrupt_blocks": found.corrupt_blocks,
            "dropped_blocks": found.dropped_blocks,
        })
    });
    let view = View::new(json!({ "nodes": documents.collect::<Vec<_>>() }), |_| {
        let mut table = output::table(&["NODE", "VERIFIED", "CORRUPT", "DROPPED"]);
        for (id, found) in nodes {
            table.add_row([
                id.to_string(),
                found.verified_blocks.to_string(),
                found.corrupt_blocks.to_string(),
                found.dropped_blocks.to_string(),
            ]);
        }
        output::table_text(&table)
    });
    view.named(nodes.iter().map(|(id, _)| id))
}

#[cfg(test)]
mod tests;
