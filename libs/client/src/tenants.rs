//! What tenants may have of the pools.

use std::time::Duration;

use node::Channel;
use proto::v1::tenants_client::TenantsClient;
use proto::{convert, v1};
use types::{Error, TenantQuota};

use crate::call::{self, UNARY_DEADLINE};

/// Client of `perigee.v1.Tenants`. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Tenants {
    client: TenantsClient<Channel>,
    deadline: Duration,
}

impl Tenants {
    /// Calls over `channel`.
    pub fn new(channel: Channel) -> Self {
        Self {
            client: TenantsClient::new(channel),
            deadline: UNARY_DEADLINE,
        }
    }

    /// Gives calls another deadline.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Sets those parts of a tenant's quota that are there, and gives what holds then. With `reset`, what was set before is forgotten
    /// first; the empty tenant is that of requests without one.
    ///
    /// # Errors
    ///
    /// `invalid` for a name that cannot be used, or where there is nothing to do; `overloaded` where too many tenants have quotas;
    /// the router, or its registry, cannot be reached in time.
    pub async fn set_quota(
        &self,
        tenant: &str,
        quota: TenantQuota,
        reset: bool,
    ) -> Result<TenantQuota, Error> {
        let mut client = self.client.clone();
        let wire = v1::SetQuotaRequest {
            tenant: tenant.to_owned(),
            quota: Some(convert::quota_to_wire(&quota)),
            reset,
        };
        let request = call::request(wire, self.deadline);
        let response = call::unary("Tenants/SetQuota", self.deadline, client.set_quota(request)).await?;
        convert::quota(response.quota.as_ref())
    }
}
