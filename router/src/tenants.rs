//! What tenants may ask of a router: their part of it, how much their requests may matter, and limits where they name none.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use node::config::Duration;
use serde::{Deserialize, Serialize};
use types::{Millis, Priority, Slo};

/// Tenants that can have settings of their own: people write them down.
pub const TENANTS_MAX: usize = 1_024;

/// One tenant's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TenantSettings {
    /// Its part of the places, beside those of other tenants that wait.
    pub weight: NonZeroU32,
    /// The most that its requests may matter. What asks for more gets this.
    pub priority_max: Priority,
    /// Time to first token of its requests that name none; 0 takes the router's.
    pub ttft_slo: Duration,
    /// Time between tokens of its requests that name none; 0 takes the router's.
    pub tbt_slo: Duration,
}

impl Default for TenantSettings {
    fn default() -> Self {
        Self {
            weight: NonZeroU32::MIN,
            priority_max: Priority::High,
            ttft_slo: Duration::from_secs(0),
            tbt_slo: Duration::from_secs(0),
        }
    }
}

/// What holds for a request of a tenant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    /// The tenant's part.
    pub weight: NonZeroU32,
    /// How much the request matters.
    pub priority: Priority,
    /// The latencies that it is held to.
    pub slo: Slo,
}

/// The terms for what a tenant's request asks, where the router's own limits are `of_all`.
pub fn terms(
    tenants: &BTreeMap<String, TenantSettings>,
    of_all: Slo,
    tenant: &str,
    priority: Priority,
    asked: Slo,
) -> Terms {
    let named = tenants.get(tenant);
    let own = Slo {
        ttft: named.and_then(|settings| limit(settings.ttft_slo)),
        tbt: named.and_then(|settings| limit(settings.tbt_slo)),
    };
    Terms {
        weight: named.map_or(NonZeroU32::MIN, |settings| settings.weight),
        priority: named.map_or(priority, |settings| priority.min(settings.priority_max)),
        slo: Slo {
            ttft: asked.ttft.or(own.ttft).or(of_all.ttft),
            tbt: asked.tbt.or(own.tbt).or(of_all.tbt),
        },
    }
}

/// A setting as a limit: 0 is none.
pub fn limit(setting: Duration) -> Option<Millis> {
    let ms = setting.get().as_secs_f64() * 1e3;
    (ms > 0.0).then_some(Millis(ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slo(ttft: Option<f64>, tbt: Option<f64>) -> Slo {
        Slo {
            ttft: ttft.map(Millis),
            tbt: tbt.map(Millis),
        }
    }

    #[test]
    fn what_a_request_asks_holds_before_its_tenants_and_the_routers_limits() {
        let acme = TenantSettings {
            ttft_slo: Duration::from_secs(2),
            ..TenantSettings::default()
        };
        let tenants = BTreeMap::from([("acme".to_owned(), acme)]);
        let of_all = slo(Some(9_000.0), Some(90.0));
        let terms = |tenant, asked| terms(&tenants, of_all, tenant, Priority::Normal, asked).slo;
        assert_eq!(
            terms("acme", slo(Some(100.0), None)),
            slo(Some(100.0), Some(90.0))
        );
        assert_eq!(terms("acme", Slo::default()), slo(Some(2_000.0), Some(90.0)));
        assert_eq!(terms("", Slo::default()), of_all);
    }

    #[test]
    fn nobody_matters_more_than_the_tenant_may() {
        let batch = TenantSettings {
            priority_max: Priority::Low,
            weight: NonZeroU32::new(3).expect("not 0"),
            ..TenantSettings::default()
        };
        let tenants = BTreeMap::from([("batch".to_owned(), batch)]);
        let terms = |tenant, priority| terms(&tenants, Slo::default(), tenant, priority, Slo::default());
        assert_eq!(terms("batch", Priority::High).priority, Priority::Low);
        assert_eq!(terms("batch", Priority::High).weight.get(), 3);
        assert_eq!(terms("other", Priority::High).priority, Priority::High);
        assert_eq!(terms("other", Priority::Low).weight.get(), 1);
    }
}
