//! `perigee tenant`: what each tenant has of the nodes' pools, and what it may have.
//!
//! Quotas and weights are settings of the nodes (`[store.tenants.NAME]`). What is set here comes before them, and stays in the
//! registry.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use clap::{Args, Subcommand};
use client::{StoreStats, Tenants};
use node::config::ByteSize;
use serde_json::{Value, json};
use types::{BlockHash, NodeId, TenantQuota};

use crate::cache;
use crate::output::{self, Format, View, Watch};
use crate::reach::Router;

/// Tenants of a node that are shown as text. JSON has all of them.
const SHOWN_MAX: usize = 20;

/// `perigee tenant`.
#[derive(Debug, Subcommand)]
pub(crate) enum TenantCommand {
    /// List the tenants with what they have of all pools together, largest first
    List(Watch),
    /// Show what each tenant has on each node, and the most that it may have there
    Usage {
        /// This tenant only.
        tenant: Option<String>,
        #[command(flatten)]
        watch: Watch,
    },
    /// Set what a tenant may have of each node's pool, before what the nodes' settings say
    SetQuota(SetQuotaArgs),
}

/// Flags of `tenant set-quota`.
#[derive(Debug, Args)]
#[group(id = "change", required = true, multiple = true, args = ["bytes_max", "weight", "reset"])]
pub(crate) struct SetQuotaArgs {
    /// The tenant; '' is for requests without one.
    tenant: String,
    /// Most that it may have of each pool, such as 2GiB; 0B is no bound. What it has beyond is evicted.
    #[arg(long, value_name = "SIZE")]
    bytes_max: Option<ByteSize>,
    /// Its part of a pool when memory is short; 1 for all others.
    #[arg(long)]
    weight: Option<NonZeroU32>,
    /// Forget what was set before, so that the nodes' settings hold in all that is not given here.
    #[arg(long)]
    reset: bool,
}

/// Runs one of the commands.
pub(crate) async fn run(command: TenantCommand, router: &Router, format: Format) -> anyhow::Result<()> {
    let (watch, only) = match command {
        TenantCommand::List(watch) => (watch, None),
        TenantCommand::Usage { tenant, watch } => (watch, Some(tenant)),
        TenantCommand::SetQuota(flags) => return set_quota(&flags, router, format).await,
    };
    let members = cache::members(router).await?;
    let look = async || {
        let answers = cache::store_stats(&members).await;
        let said: Vec<(&NodeId, &StoreStats)> = answers
            .iter()
            .map(|(record, stats)| (&record.id, stats))
            .collect();
        Ok(match &only {
            None => list_view(&said),
            Some(tenant) => usage_view(&said, tenant.as_deref()),
        })
    };
    watch.show(format, look).await
}

async fn set_quota(flags: &SetQuotaArgs, router: &Router, format: Format) -> anyhow::Result<()> {
    let quota = TenantQuota {
        bytes_max: flags.bytes_max.map(|bytes| bytes.0),
        weight: flags.weight,
    };
    let tenants = Tenants::new(router.channel()?);
    let holds = tenants.set_quota(&flags.tenant, quota, flags.reset).await?;
    format.print(&quota_view(&flags.tenant, holds))
}

fn quota_view(tenant: &str, quota: TenantQuota) -> View {
    let document = json!({ "tenant": tenant, "bytes_max": quota.bytes_max, "weight": quota.weight });
    View::line(document, quota_text(tenant, quota)).named([tenant])
}

fn quota_text(tenant: &str, quota: TenantQuota) -> String {
    let bytes = match quota.bytes_max {
        None => "what the settings say".to_owned(),
        Some(0) => "all".to_owned(),
        Some(bytes) => format!("at most {}", output::bytes(bytes)),
    };
    let weight = match quota.weight {
        None => "the weight of the settings".to_owned(),
        Some(weight) => format!("weight {weight}"),
    };
    format!(
        "{} may have {bytes} of each pool, with {weight}",
        shown(Some(tenant), None)
    )
}

/// Whether anybody names a tenant, or one has a limit.
pub(crate) fn are_told_apart(said: &[(&NodeId, &StoreStats)]) -> bool {
    let mut tenants = said.iter().flat_map(|(_, stats)| &stats.tenants);
    tenants.any(|tenant| tenant.name.as_deref() != Some("") || tenant.blocks_max.is_some())
}

/// The tenants of a node, for programs.
pub(crate) fn of_node_json(stats: &StoreStats) -> Value {
    let bytes = |blocks: u64| blocks * stats.block_bytes;
    let tenants = stats.tenants.iter().map(|tenant| {
        json!({
            "name": tenant.name,
            "root": root(&tenant.root),
            "cached_blocks": tenant.cached_blocks,
            "cached_bytes": bytes(tenant.cached_blocks),
            "bytes_max": tenant.blocks_max.map(bytes),
            "weight": tenant.weight,
        })
    });
    tenants.collect()
}

/// The tenants of each node, for people.
pub(crate) fn usage_table(said: &[(&NodeId, &StoreStats)]) -> String {
    let mut table = output::table(&["NODE", "TENANT", "CACHED", "MOST", "WEIGHT"]);
    for (id, stats) in said {
        for tenant in stats.tenants.iter().take(SHOWN_MAX) {
            table.add_row([
                id.to_string(),
                shown(tenant.name.as_deref(), root(&tenant.root)),
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
            table.add_row([id.to_string(), more, String::new(), String::new(), String::new()]);
        }
    }
    output::table_text(&table)
}

/// Tenants of one name, or of that name alone.
fn usage_view(said: &[(&NodeId, &StoreStats)], only: Option<&str>) -> View {
    let kept: Vec<(&NodeId, StoreStats)> = said
        .iter()
        .map(|(id, stats)| {
            let mut stats = (*stats).clone();
            stats
                .tenants
                .retain(|tenant| only.is_none_or(|only| tenant.name.as_deref() == Some(only)));
            (*id, stats)
        })
        .collect();
    let kept: Vec<(&NodeId, &StoreStats)> = kept.iter().map(|(id, stats)| (*id, stats)).collect();
    let nodes = kept
        .iter()
        .map(|(id, stats)| json!({ "id": id, "tenants": of_node_json(stats) }));
    View::new(json!({ "nodes": nodes.collect::<Vec<_>>() }), |_| {
        usage_table(&kept)
    })
}

/// What one tenant has on all nodes.
#[derive(Debug, Default)]
struct Total {
    nodes: u64,
    cached_bytes: u64,
    /// `None` where a node knows no bound.
    bytes_max: Option<u64>,
    weight: u32,
}

/// A tenant by its name, or by its root where no node knows the name; neither stands for the rest together.
type Who = (Option<String>, Option<BlockHash>);

fn totals(said: &[(&NodeId, &StoreStats)]) -> Vec<(Who, Total)> {
    let mut totals: BTreeMap<Who, Total> = BTreeMap::new();
    for (_, stats) in said {
        for tenant in &stats.tenants {
            let unnamed = tenant.name.is_none().then(|| root(&tenant.root)).flatten();
            let total = totals.entry((tenant.name.clone(), unnamed)).or_default();
            let bytes_max = tenant.blocks_max.map(|blocks| blocks * stats.block_bytes);
            total.bytes_max = match total.nodes {
                0 => bytes_max,
                _ => total.bytes_max.zip(bytes_max).map(|(sum, more)| sum + more),
            };
            total.nodes += 1;
            total.cached_bytes += tenant.cached_blocks * stats.block_bytes;
            total.weight = total.weight.max(tenant.weight);
        }
    }
    let mut totals: Vec<(Who, Total)> = totals.into_iter().collect();
    totals.sort_by_key(|(_, total)| std::cmp::Reverse(total.cached_bytes));
    totals
}

fn list_view(said: &[(&NodeId, &StoreStats)]) -> View {
    let totals = totals(said);
    let documents = totals.iter().map(|((name, root), total)| {
        json!({
            "name": name,
            "root": root,
            "nodes": total.nodes,
            "cached_bytes": total.cached_bytes,
            "bytes_max": total.bytes_max,
            "weight": total.weight,
        })
    });
    let view = View::new(json!({ "tenants": documents.collect::<Vec<_>>() }), |_| {
        let mut table = output::table(&["TENANT", "NODES", "CACHED", "MOST", "WEIGHT"]);
        for ((name, root), total) in &totals {
            table.add_row([
                shown(name.as_deref(), *root),
                total.nodes.to_string(),
                output::bytes(total.cached_bytes),
                total.bytes_max.map_or_else(|| "-".to_owned(), output::bytes),
                total.weight.to_string(),
            ]);
        }
        output::table_text(&table)
    });
    let names = totals.iter().filter_map(|((name, _), _)| name.as_ref());
    view.named(names.filter(|name| !name.is_empty()))
}

fn root(bytes: &[u8]) -> Option<BlockHash> {
    proto::convert::hash("root", bytes).ok()
}

fn shown(name: Option<&str>, root: Option<BlockHash>) -> String {
    match (name, root) {
        (Some(""), _) => "(none)".to_owned(),
        (Some(name), _) => name.to_owned(),
        (None, Some(root)) => format!("(root {root})"),
        (None, None) => "(others)".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proto::v1;

    use super::*;
    use crate::output::golden;

    fn stats(tenants: &[(Option<&str>, u64, Option<u64>)]) -> StoreStats {
        let tenants = tenants
            .iter()
            .map(|(name, cached_blocks, blocks_max)| v1::TenantStats {
                root: vec![9; 16],
                name: name.map(str::to_owned),
                cached_blocks: *cached_blocks,
                blocks_max: *blocks_max,
                weight: 1,
            });
        StoreStats {
            block_bytes: 1024,
            tenants: tenants.collect(),
            ..StoreStats::default()
        }
    }

    #[test]
    fn tenants_are_shown_per_node_and_all_together() {
        let (a, b) = (NodeId::new("decode-0"), NodeId::new("store-0"));
        let first = stats(&[(Some("acme"), 30, Some(50)), (Some(""), 10, None)]);
        let second = stats(&[(Some("acme"), 5, Some(50)), (None, 70, None)]);
        let said = [(&a, &first), (&b, &second)];
        golden::check("tenant-list", &list_view(&said));
        golden::check("tenant-usage", &usage_view(&said, None));
        let only = usage_view(&said, Some("acme"));
        assert_eq!(only.documents()[0]["nodes"][1]["tenants"][0]["cached_blocks"], 5);
        assert_eq!(only.documents()[0]["nodes"][0]["tenants"][1], Value::Null);
    }

    #[test]
    fn a_quota_is_told_as_it_holds() {
        let quota = |bytes_max, weight| TenantQuota {
            bytes_max,
            weight: NonZeroU32::new(weight),
        };
        golden::check("tenant-set-quota", &quota_view("acme", quota(Some(3 << 29), 2)));
        let all = quota_text("", quota(Some(0), 0));
        assert_eq!(
            all,
            "(none) may have all of each pool, with the weight of the settings"
        );
        let weight = quota_text("", quota(None, 5));
        assert_eq!(
            weight,
            "(none) may have what the settings say of each pool, with weight 5"
        );
    }

    #[test]
    fn a_bound_of_some_nodes_is_none_of_all() {
        let (a, b) = (NodeId::new("decode-0"), NodeId::new("store-0"));
        let (bounded, unbounded) = (stats(&[(Some("x"), 1, Some(2))]), stats(&[(Some("x"), 1, None)]));
        let total = |said: &[(&NodeId, &StoreStats)]| totals(said)[0].1.bytes_max;
        assert_eq!(total(&[(&a, &bounded), (&b, &bounded)]), Some(4096));
        assert_eq!(total(&[(&a, &bounded), (&b, &unbounded)]), None);
        assert_eq!(total(&[(&b, &unbounded), (&a, &bounded)]), None);
    }

    #[test]
    fn tenants_without_names_or_limits_are_not_told_apart() {
        let id = NodeId::new("decode-0");
        assert!(!are_told_apart(&[(&id, &stats(&[(Some(""), 3, None)]))]));
        assert!(are_told_apart(&[(&id, &stats(&[(Some(""), 3, Some(9))]))]));
        assert!(are_told_apart(&[(&id, &stats(&[(None, 3, None)]))]));
    }
}
