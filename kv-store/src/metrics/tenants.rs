//! What the limits of tenants do: `perigee_kvstore_tenant_…`. No label names a tenant, since tenants are without number.

use node::Metrics;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use super::ReasonLabel;
use crate::table::TenantEvents;

#[derive(Debug)]
pub(crate) struct TenantMetrics {
    by_share: Counter,
    by_quota: Counter,
    refused: Counter,
}

impl TenantMetrics {
    pub(super) fn register(metrics: &Metrics) -> Self {
        let evicted = metrics.register(
            "perigee_kvstore_tenant_evicted_blocks",
            "Evicted blocks that tenants gave since they were furthest above their share, or at their quota",
            Family::<ReasonLabel, Counter>::default(),
        );
        let of = |reason| evicted.get_or_create_owned(&ReasonLabel { reason });
        Self {
            by_share: of("share"),
            by_quota: of("quota"),
            refused: metrics.register(
                "perigee_kvstore_tenant_refused_blocks",
                "Blocks not cached since their tenant used all of its quota",
                Counter::default(),
            ),
        }
    }

    /// Counts what happened between two looks at a table.
    pub(crate) fn add(&self, before: TenantEvents, after: TenantEvents) {
        let TenantEvents {
            evicted_by_share,
            evicted_by_quota,
            refused,
        } = after;
        self.by_share.inc_by(evicted_by_share - before.evicted_by_share);
        self.by_quota.inc_by(evicted_by_quota - before.evicted_by_quota);
        self.refused.inc_by(refused - before.refused);
    }
}
