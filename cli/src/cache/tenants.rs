//! The tenants of each node, as `perigee cache stats` shows them.

use client::StoreStats;
use serde_json::{Value, json};

use crate::output;
use crate::reach::Reached;

/// Tenants of a node that are shown as text. JSON has all of them.
const SHOWN_MAX: usize = 20;

/// For scripts.
pub(super) fn to_json(stats: &StoreStats) -> Value {
    let bytes = |blocks: u64| blocks * stats.block_bytes;
    let tenants = stats.tenants.iter().map(|tenant| {
        json!({
            "name": tenant.name,
            "root": proto::convert::hash("root", &tenant.root).ok(),
            "cached_blocks": tenant.cached_blocks,
            "cached_bytes": bytes(tenant.cached_blocks),
            "bytes_max": tenant.blocks_max.map(bytes),
            "weight": tenant.weight,
        })
    });
    tenants.collect()
}

/// For people: a second table, unless nobody names tenants.
pub(super) fn print(answers: &[(Reached, StoreStats)]) -> anyhow::Result<()> {
    let is_common = |name: &Option<String>| name.as_deref() == Some("");
    let tenants = || answers.iter().flat_map(|(_, stats)| &stats.tenants);
    if tenants().all(|tenant| is_common(&tenant.name) && tenant.blocks_max.is_none()) {
        return Ok(());
    }
    let mut table = output::table(&["NODE", "TENANT", "CACHED", "MOST", "WEIGHT"]);
    for (record, stats) in answers {
        for tenant in stats.tenants.iter().take(SHOWN_MAX) {
            let name = match (&tenant.name, proto::convert::hash("root", &tenant.root)) {
                (Some(name), _) if name.is_empty() => "(none)".to_owned(),
                (Some(name), _) => name.clone(),
                (None, Ok(root)) => format!("(root {root})"),
                (None, Err(_)) => "(others)".to_owned(),
            };
            table.add_row([
                record.id.to_string(),
                name,
                output::bytes(tenant.cached_blocks * stats.block_bytes),
                tenant.blocks_max.map_or_else(
                    || "-".to_owned(),
                    |blocks| output::bytes(blocks * stats.block_bytes),
                ),
                tenant.weight.to_string(),
            ]);
        }
        if let Some(more) = stats.tenants.len().checked_sub(SHOWN_MAX + 1) {
            let more = format!("{} more", more + 1);
            table.add_row([
                record.id.to_string(),
                more,
                String::new(),
                String::new(),
                String::new(),
            ]);
        }
    }
    println!();
    Ok(output::print_table(&table)?)
}
