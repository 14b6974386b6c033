//! Tenants as people know them: limits in bytes, and names.
//!
//! What an operator sets while the cluster runs ([`TenantQuota`]) comes before the settings, part by part.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use node::registry::Members;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use types::{BlockHash, KvSpace, TenantQuota};

use super::{Store, now};
use crate::Config;
use crate::table::{TenantLimit, TenantLimits};

/// Blocks that are given up at a time where a quota became smaller: the table's lock is held for as long.
const EXCESS_AT_A_TIME: usize = 256;
/// Steps of that many: a pool of some million blocks. What one that is larger has beyond goes as its tenant stores other blocks.
const EXCESS_STEPS_MAX: usize = 1 << 16;

/// A tenant's part of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Root of its blocks; `None` for all those together that came when there was no account left for them.
    pub root: Option<BlockHash>,
    /// Its name, where the settings or a request have told it: a root that a peer named says nothing. Empty for what has no
    /// tenant.
    pub name: Option<String>,
    /// Blocks that it has cached.
    pub cached_blocks: usize,
    /// Most that it may have; `None` is no bound.
    pub blocks_max: Option<usize>,
    /// Its weight when memory is short.
    pub weight: u32,
}

impl Store {
    /// The tenants that hold blocks or have limits of their own, largest first.
    pub fn tenants(&self) -> Vec<Tenant> {
        let usage = self.table().tenants();
        let set = self.quotas();
        let named = self.config().tenants.keys().chain(set.keys());
        let mut names: HashMap<BlockHash, String> = named
            .map(|name| (root(self.space(), name), name.clone()))
            .collect();
        drop(set);
        names.insert(self.common_root(), String::new());
        let seen = self.roots();
        names.extend(seen.tenants().map(|(name, root)| (root, name.to_owned())));
        drop(seen);
        let mut tenants: Vec<Tenant> = usage
            .into_iter()
            .map(|usage| Tenant {
                root: usage.root,
                name: usage.root.and_then(|root| names.remove(&root)),
                cached_blocks: usage.cached,
                blocks_max: usage.limit.blocks_max,
                weight: usage.limit.weight.get(),
            })
            .collect();
        tenants.sort_by(|a, b| b.cached_blocks.cmp(&a.cached_blocks).then(a.root.cmp(&b.root)));
        tenants
    }

    /// Does as the registry says what tenants may have, until `end`.
    pub async fn follow_quotas(&self, mut members: watch::Receiver<Arc<Members>>, end: CancellationToken) {
        loop {
            let quotas = members.borrow_and_update().quotas.clone();
            self.set_quotas(quotas).await;
            match end.run_until_cancelled(members.changed()).await {
                Some(Ok(())) => {}
                Some(Err(_)) | None => return,
            }
        }
    }

    /// Replaces what operators have set, and has tenants give what they have beyond.
    pub async fn set_quotas(&self, quotas: BTreeMap<String, TenantQuota>) {
        if *self.quotas() == quotas {
            return;
        }
        tracing::info!(tenants = quotas.len(), "quotas of tenants have changed");
        let limits = limits(self.config(), &quotas, self.space());
        *self.quotas() = quotas;
        self.with_table(|table| table.limit_tenants(limits));
        for _ in 0..EXCESS_STEPS_MAX {
            if self.with_table(|table| table.give_excess(EXCESS_AT_A_TIME, now())) {
                return;
            }
            // Others need the table, too.
            tokio::task::yield_now().await;
        }
    }
}

/// What the settings and operators allow, in blocks.
pub(super) fn limits(
    config: &Config,
    quotas: &BTreeMap<String, TenantQuota>,
    space: &KvSpace,
) -> TenantLimits {
    let block_bytes = space.layout.block_bytes() as u64;
    let limit = |bytes_max: u64, weight| TenantLimit {
        // What is less than a block holds none.
        blocks_max: (bytes_max > 0).then(|| usize::try_from(bytes_max / block_bytes).unwrap_or(usize::MAX)),
        weight,
    };
    let names: BTreeSet<&String> = config.tenants.keys().chain(quotas.keys()).collect();
    let of_root = names.into_iter().map(|name| {
        let (settings, quota) = (config.tenants.get(name), quotas.get(name));
        let of_settings = settings.and_then(|settings| settings.bytes_max);
        let bytes_max = quota.and_then(|quota| quota.bytes_max).or(of_settings);
        let weight = quota.and_then(|quota| quota.weight);
        let weight = weight.or(settings.map(|settings| settings.weight));
        let limit = limit(
            bytes_max.unwrap_or(config.tenant_bytes_max),
            weight.unwrap_or(TenantLimit::default().weight),
        );
        (root(space, name), limit)
    });
    TenantLimits {
        of_root: of_root.collect(),
        default: limit(config.tenant_bytes_max, TenantLimit::default().weight),
    }
}

/// The root of a tenant's space; the empty name means `space` as it is.
fn root(space: &KvSpace, tenant: &str) -> BlockHash {
    match tenant {
        "" => space.root(),
        tenant => space.with_tenant(tenant).root(),
    }
}

#[cfg(test)]
mod tests;
