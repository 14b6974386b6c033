//! What operators set for tenants: `perigee.v1.Tenants`. The registry keeps it, and the nodes do it.

use std::sync::Arc;

use node::registry::{Members, Registry};
use proto::status::to_status;
use proto::v1::tenants_server::{Tenants, TenantsServer};
use proto::{convert, v1};
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use types::{Error, TenantQuota};

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    registry: Arc<dyn Registry>,
    members: watch::Receiver<Arc<Members>>,
}

impl Service {
    pub(crate) fn server(registry: Arc<dyn Registry>) -> TenantsServer<Self> {
        let members = registry.watch();
        TenantsServer::new(Self { registry, members })
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    async fn set(&self, request: v1::SetQuotaRequest) -> Result<TenantQuota, Error> {
        let v1::SetQuotaRequest { tenant, quota, reset } = request;
        TenantQuota::check_name(&tenant)?;
        let asked = convert::quota(quota.as_ref())?;
        if asked.is_empty() && !reset {
            return Err(Error::invalid(
                "quota",
                "neither bytes_max nor weight is given, nor reset",
            ));
        }
        let before = match reset {
            true => TenantQuota::default(),
            false => self
                .members
                .borrow()
                .quotas
                .get(&tenant)
                .copied()
                .unwrap_or_default(),
        };
        let quota = TenantQuota {
            bytes_max: asked.bytes_max.or(before.bytes_max),
            weight: asked.weight.or(before.weight),
        };
        self.registry.put_quota(&tenant, quota).await?;
        tracing::info!(tenant, ?quota, "the quota of a tenant was set");
        Ok(quota)
    }
}

#[tonic::async_trait]
impl Tenants for Service {
    async fn set_quota(
        &self,
        request: Request<v1::SetQuotaRequest>,
    ) -> Result<Response<v1::SetQuotaResponse>, Status> {
        let quota = self.set(request.into_inner()).await;
        let quota = quota.map_err(|error| to_status(&error))?;
        Ok(Response::new(v1::SetQuotaResponse {
            quota: Some(convert::quota_to_wire(&quota)),
        }))
    }
}
