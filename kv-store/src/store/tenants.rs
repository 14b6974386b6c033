//! Tenants as people know them: limits in bytes, and names.

use std::collections::HashMap;

use types::{BlockHash, KvSpace};

use super::Store;
use crate::Config;
use crate::table::{TenantLimit, TenantLimits};

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
        let config = self.config();
        let mut names: HashMap<BlockHash, String> = config
            .tenants
            .keys()
            .map(|name| (root(self.space(), name), name.clone()))
            .collect();
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
}

/// What the settings allow, in blocks.
pub(super) fn limits(config: &Config, space: &KvSpace) -> TenantLimits {
    let block_bytes = space.layout.block_bytes() as u64;
    let limit = |bytes_max: u64, weight| TenantLimit {
        // What is less than a block holds none.
        blocks_max: (bytes_max > 0).then(|| usize::try_from(bytes_max / block_bytes).unwrap_or(usize::MAX)),
        weight,
    };
    let of_root = config.tenants.iter().map(|(name, tenant)| {
        let bytes_max = tenant.bytes_max.unwrap_or(config.tenant_bytes_max);
        (root(space, name), limit(bytes_max, tenant.weight))
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
