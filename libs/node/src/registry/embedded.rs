//! The registry that `perigee up` serves to its children in place of etcd, and the client of it.
//!
//! It keeps all in memory only. After a restart it is empty, and every node registers again within a third of its
//! lease; whoever follows keeps the old members for one lease meanwhile. Quotas of tenants are gone then.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use proto::v1;
use proto::v1::registry_client::RegistryClient;
use proto::v1::registry_server::{Registry, RegistryServer};
use tokio::sync::{Notify, watch};
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};
use types::{Epoch, Error, LeaseId, NodeRecord, TenantQuota};

use super::table::MemberTable;
use super::view::Change;
use super::{Alive, Backend, CALL_DEADLINE, Config, RegistryError, Session};
use crate::channel::Channel;

/// The service. Clones are one and the same.
#[derive(Debug, Clone)]
pub struct Service {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    table: Mutex<MemberTable>,
    /// The newest state. A slow watcher skips states rather than making them wait.
    members: watch::Sender<v1::Members>,
    /// Wakes the clock when leases change.
    changed: Notify,
    /// Ends the watchers' streams.
    shutdown: CancellationToken,
}

impl Service {
    /// An empty registry. `epoch` is this start's; leases are numbered from it, so that none is given twice. Watchers'
    /// streams end at `shutdown`, or nothing could drain.
    pub fn new(epoch: Epoch, shutdown: CancellationToken) -> Self {
        let table = MemberTable::new(epoch.0);
        Self {
            shared: Arc::new(Shared {
                members: watch::Sender::new(to_wire(&table)),
                table: Mutex::new(table),
                changed: Notify::new(),
                shutdown,
            }),
        }
    }

    /// The service in the form that a server takes.
    pub fn server(&self) -> RegistryServer<Self> {
        RegistryServer::new(self.clone()).max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    /// Ends leases when their time is over, until shutdown.
    pub async fn run(self) {
        let shutdown = self.shared.shutdown.clone();
        shutdown.run_until_cancelled(self.expire_in_time()).await;
    }

    async fn expire_in_time(&self) {
        loop {
            let at = self.lock().next_expiry();
            let due = async {
                match at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => self.change(|table, now| table.expire(now)),
                () = self.shared.changed.notified() => false,
            };
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, MemberTable> {
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut MemberTable, Instant) -> T) -> T {
        let mut table = self.lock();
        let result = change(&mut table, Instant::now());
        // Sent under the lock, so that a newer state is never replaced by an older one.
        self.shared.members.send_if_modified(|members| {
            let changed = members.revision != table.revision();
            if changed {
                *members = to_wire(&table);
            }
            changed
        });
        drop(table);
        self.shared.changed.notify_one();
        result
    }
}

fn to_wire(table: &MemberTable) -> v1::Members {
    v1::Members {
        revision: table.revision(),
        records_json: table
            .members()
            .values()
            .map(proto::convert::record_to_json)
            .collect(),
        quotas: table
            .quotas()
            .iter()
            .map(|(tenant, quota)| (tenant.clone(), proto::convert::quota_to_wire(quota)))
            .collect(),
    }
}

fn lease_ended(lease: u64) -> Status {
    Status::not_found(format!("lease {lease} has ended"))
}

#[tonic::async_trait]
impl Registry for Service {
    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterResponse>, Status> {
        let v1::RegisterRequest {
            record_json,
            lease_ttl_ms,
        } = request.into_inner();
        let record =
            proto::convert::record(&record_json).map_err(|error| proto::status::to_status(&error))?;
        let ttl = Duration::from_millis(lease_ttl_ms);
        let lease = self
            .change(|table, now| table.register(record, ttl, now))
            .map_err(|error| proto::status::to_status(&error))?;
        Ok(Response::new(v1::RegisterResponse { lease_id: lease.0 }))
    }

    async fn keep_alive(
        &self,
        request: Request<v1::KeepAliveRequest>,
    ) -> Result<Response<v1::KeepAliveResponse>, Status> {
        let lease = request.get_ref().lease_id;
        match self.change(|table, now| table.keep_alive(LeaseId(lease), now)) {
            true => Ok(Response::new(v1::KeepAliveResponse {})),
            false => Err(lease_ended(lease)),
        }
    }

    async fn unregister(
        &self,
        request: Request<v1::UnregisterRequest>,
    ) -> Result<Response<v1::UnregisterResponse>, Status> {
        let lease = request.get_ref().lease_id;
        match self.change(|table, _| table.unregister(LeaseId(lease))) {
            true => Ok(Response::new(v1::UnregisterResponse {})),
            false => Err(lease_ended(lease)),
        }
    }

    async fn put_quota(
        &self,
        request: Request<v1::PutQuotaRequest>,
    ) -> Result<Response<v1::PutQuotaResponse>, Status> {
        let v1::PutQuotaRequest { tenant, quota } = request.into_inner();
        let put = proto::convert::quota(quota.as_ref())
            .and_then(|quota| self.change(|table, _| table.put_quota(&tenant, quota)));
        put.map_err(|error| proto::status::to_status(&error))?;
        Ok(Response::new(v1::PutQuotaResponse {}))
    }

    type WatchMembersStream = Pin<Box<dyn Stream<Item = Result<v1::Members, Status>> + Send>>;

    async fn watch_members(
        &self,
        _: Request<v1::WatchMembersRequest>,
    ) -> Result<Response<Self::WatchMembersStream>, Status> {
        let states = WatchStream::new(self.shared.members.subscribe()).map(Ok);
        let ended = self.shared.shutdown.clone().cancelled_owned();
        Ok(Response::new(Box::pin(states.take_until(ended))))
    }
}

/// The client.
#[derive(Debug, Clone)]
pub(super) struct Embedded {
    address: Arc<str>,
    channel: Channel,
    lease_ttl: Duration,
}

impl Embedded {
    pub(super) fn new(host: &str, config: &Config) -> Result<Self, RegistryError> {
        let channel = config.connector.channel(host);
        let channel = channel.map_err(|error| RegistryError::Config(error.message))?;
        Ok(Self {
            address: format!("perigee://{host}").into(),
            channel,
            lease_ttl: config.lease_ttl,
        })
    }

    fn client(&self) -> RegistryClient<Channel> {
        RegistryClient::new(self.channel.clone()).max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    fn failed(&self, status: &Status) -> RegistryError {
        let error = proto::status::from_status(status);
        // Only an answer of the registry itself has details; anything else is the connection's.
        if status.details().is_empty() {
            return self.unreachable(error.message);
        }
        RegistryError::Refused(error)
    }

    fn unreachable(&self, reason: impl Into<String>) -> RegistryError {
        RegistryError::Unreachable {
            registry: self.address.to_string(),
            reason: reason.into(),
        }
    }

    async fn follow_stream(&self, apply: &(dyn Fn(Change) + Sync)) -> Result<(), RegistryError> {
        let mut client = self.client();
        let opened = async {
            let stream = client.watch_members(v1::WatchMembersRequest {}).await;
            let mut stream = stream.map_err(|status| self.failed(&status))?.into_inner();
            let first = stream.message().await.map_err(|status| self.failed(&status))?;
            Ok::<_, RegistryError>((stream, first))
        };
        let opened = tokio::time::timeout(CALL_DEADLINE, opened).await;
        let (mut stream, mut next) = opened.map_err(|_| self.unreachable("no answer to a watch"))??;
        while let Some(v1::Members {
            revision,
            records_json,
            quotas,
        }) = next
        {
            apply(Change::All {
                revision,
                records: records_json.iter().filter_map(|json| read_record(json)).collect(),
                quotas: quotas
                    .into_iter()
                    .filter_map(|(tenant, quota)| known_quota(tenant, proto::convert::quota(Some(&quota))))
                    .collect(),
            });
            // No deadline: nothing happens until something changes. The channel's keep-alive finds a dead peer.
            next = stream.message().await.map_err(|status| self.failed(&status))?;
        }
        Ok(())
    }
}

/// A record that this version cannot read is another version's node: better without it than without all others.
pub(super) fn read_record(json: &str) -> Option<NodeRecord> {
    match proto::convert::record(json) {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::warn!(%error, "a member's record is ignored");
            None
        }
    }
}

/// A quota that this version cannot read is as good as none.
pub(super) fn known_quota(
    tenant: String,
    quota: Result<TenantQuota, Error>,
) -> Option<(String, TenantQuota)> {
    match quota {
        Ok(quota) => Some((tenant, quota)),
        Err(error) => {
            tracing::warn!(%error, "a tenant's quota is ignored");
            None
        }
    }
}

impl Backend for Embedded {
    type Session = Self;

    fn address(&self) -> &str {
        &self.address
    }

    fn session(&self) -> Self {
        self.clone()
    }

    async fn put_quota(&self, tenant: &str, quota: TenantQuota) -> Result<(), RegistryError> {
        let mut client = self.client();
        let put = client.put_quota(v1::PutQuotaRequest {
            tenant: tenant.to_owned(),
            quota: Some(proto::convert::quota_to_wire(&quota)),
        });
        let answer = tokio::time::timeout(CALL_DEADLINE, put).await;
        let answer = answer.map_err(|_| self.unreachable("no answer to a quota"))?;
        answer.map(drop).map_err(|status| self.failed(&status))
    }

    async fn follow(&self, apply: &(dyn Fn(Change) + Sync)) -> RegistryError {
        match self.follow_stream(apply).await {
            Ok(()) => self.unreachable("it ended the watch"),
            Err(error) => error,
        }
    }
}

impl Session for Embedded {
    async fn register(&mut self, record: &NodeRecord) -> Result<u64, RegistryError> {
        let request = v1::RegisterRequest {
            record_json: proto::convert::record_to_json(record),
            lease_ttl_ms: u64::try_from(self.lease_ttl.as_millis()).unwrap_or(u64::MAX),
        };
        let response = self.client().register(request).await;
        let response = response.map_err(|status| self.failed(&status))?;
        Ok(response.into_inner().lease_id)
    }

    async fn keep_alive(&mut self, _: &NodeRecord, lease: u64) -> Result<Alive, RegistryError> {
        match self
            .client()
            .keep_alive(v1::KeepAliveRequest { lease_id: lease })
            .await
        {
            Ok(_) => Ok(Alive::Yes),
            Err(status) if status.code() == Code::NotFound => Ok(Alive::Gone),
            Err(status) => Err(self.failed(&status)),
        }
    }

    async fn unregister(&mut self, lease: u64) -> Result<(), RegistryError> {
        match self
            .client()
            .unregister(v1::UnregisterRequest { lease_id: lease })
            .await
        {
            Ok(_) => Ok(()),
            // What was to be ended has ended.
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(self.failed(&status)),
        }
    }
}
