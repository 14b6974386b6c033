//! What `perigee store` runs: a pool and its service, without an engine.
//!
//! Its blocks come from writers (`Reserve`/`Commit`), and go to whoever acquires them. Listening and registering
//! are the process's own, as for every role.

use std::net::SocketAddr;
use std::sync::Arc;

use node::registry::Members;
use node::{Channels, Identity, LoadSource, task};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use transfer::{TcpTransport, TransferError, Transport};
use types::{ErrorCode, KvSpace, LoadReport, NodeRecord};

use crate::cache::Cache;
use crate::disk::{self, OpenError};
use crate::exchange::Exchange;
use crate::object::{self, Objects};
use crate::service::Service;
use crate::store::{Store, StoreError};
use crate::transfers::{self, HostReader};

/// What can be set of a store node.
#[derive(Debug, Clone)]
pub struct Config {
    /// Memory for blocks; what is left of the last block is not used.
    pub capacity_bytes: usize,
    /// Where the transport listens. Port 0 takes a free one.
    pub transfer_listen: SocketAddr,
    /// Bounds and times of the transport.
    pub transfer: transfer::tcp::Config,
    /// Bounds and times of the store.
    pub store: crate::Config,
    /// The disk below the pool, if there is one.
    pub disk: Option<disk::Config>,
    /// The bucket below, if there is one.
    pub objects: Option<object::Config>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            // Enough to be useful beside other nodes on a laptop; a deployment sets it.
            capacity_bytes: 1 << 30,
            // Several nodes share a machine under `perigee up`.
            transfer_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            transfer: transfer::tcp::Config::default(),
            store: crate::Config::default(),
            // A folder and a size that only a deployment knows.
            disk: None,
            // As the disk; and it may cost money.
            objects: None,
        }
    }
}

/// Why a store node cannot start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// The transport cannot listen, or has no memory for the pool.
    #[error("{0}")]
    Transport(#[from] TransferError),
    /// The pool cannot become a store.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// The disk tier cannot be used.
    #[error("{0}")]
    Disk(#[from] OpenError),
    /// The object tier cannot be used.
    #[error("{0}")]
    Objects(#[from] object::OpenError),
}

impl StartError {
    /// What the caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Transport(error) => error.code(),
            Self::Store(error) => error.code(),
            Self::Disk(error) => error.code(),
            Self::Objects(error) => error.code(),
        }
    }
}

impl From<StartError> for types::Error {
    fn from(error: StartError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// A store without an engine.
#[derive(Debug, Clone)]
pub struct StoreNode {
    store: Store,
    service: Service,
    transfers: transfers::Service,
    cache: Cache,
    shutdown: CancellationToken,
}

impl StoreNode {
    /// Maps the pool and opens the transport. Serves nothing yet. Peers are called over `channels`.
    pub async fn start(
        config: Config,
        space: KvSpace,
        identity: &Identity,
        channels: Channels,
        metrics: &node::Metrics,
        shutdown: CancellationToken,
    ) -> Result<Self, StartError> {
        let Config {
            capacity_bytes,
            transfer_listen,
            transfer,
            store,
            disk,
            objects,
        } = config;
        let host = HostReader::new("/".into(), &transfer.ucx.settings);
        let transport: Arc<dyn Transport> =
            TcpTransport::bind(transfer_listen, identity.epoch, transfer).await?;
        transfers::register_metrics(metrics, &transport);
        let memory = transport.allocate(capacity_bytes)?;
        let store = Store::new(store, space, identity.epoch, memory, transport, metrics)?;
        if let Some(disk) = disk {
            open_disk(&store, disk).await?;
        }
        if let Some(config) = objects {
            let opened = Objects::open(&config, store.common_root(), store.layout().block_bytes())?;
            tracing::info!(
                url = config.url,
                blocks = opened.grid().blocks(),
                "object tier opened"
            );
            store.mount_objects(opened);
        }
        Ok(Self {
            service: Service::new(store.clone(), shutdown.clone()),
            cache: Cache::new(
                store.clone(),
                identity.id.clone(),
                channels.clone(),
                shutdown.clone(),
            ),
            transfers: transfers::Service::new(store.clone(), channels, host, shutdown.clone()),
            store,
            shutdown,
        })
    }

    /// Its blocks.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The gRPC services of the role.
    pub fn grpc(&self) -> Routes {
        Routes::new(self.service.server())
            .add_service(self.transfers.server())
            .add_service(self.cache.server())
    }

    /// What the node does with its peers, once they are known. `grpc_endpoint` (`host:port`) is where they reach it.
    pub fn exchange(&self, members: watch::Receiver<Arc<Members>>, grpc_endpoint: String) -> Exchange {
        Exchange::new(self.cache.clone(), members, grpc_endpoint)
    }

    /// The node's entry in the registry, for a process that is reached at these endpoints (`host:port`).
    pub fn record(
        &self,
        identity: &Identity,
        model: &str,
        grpc_endpoint: &str,
        http_endpoint: &str,
    ) -> NodeRecord {
        NodeRecord {
            id: identity.id.clone(),
            epoch: identity.epoch,
            role: identity.role,
            grpc_endpoint: grpc_endpoint.to_owned(),
            http_endpoint: http_endpoint.to_owned(),
            transfer_endpoint: self.store.transport().endpoint(),
            model: model.to_owned(),
            kv_space: Some(self.store.space().clone()),
            capacity_blocks: self.store.capacity() as u64,
            context_tokens_max: 0,
        }
    }

    /// Does what goes on in the background until shutdown.
    pub async fn run(self) {
        tokio::join!(
            self.service.run(),
            self.transfers.run(),
            self.store.run_tiers(self.shutdown.clone())
        );
    }
}

/// Reads the whole index, which takes a while for a large disk.
async fn open_disk(store: &Store, config: disk::Config) -> Result<(), OpenError> {
    let (store, path) = (store.clone(), config.folder.clone());
    let opened = task::blocking("disk-open", move || store.open_disk(&config)).await;
    opened.map_err(|error| OpenError::File {
        path,
        reason: error.to_string(),
    })?
}

impl LoadSource for StoreNode {
    fn load(&self) -> LoadReport {
        let blocks = self.store.stats().blocks;
        let (disk_blocks, disk_capacity_blocks) = self.store.disk_blocks();
        LoadReport {
            free_blocks: blocks.free as u64,
            evictable_blocks: blocks.reclaimable as u64,
            disk_bytes_per_ms: self.store.disk_bytes_per_ms(),
            draining: self.shutdown.is_cancelled() || self.store.is_draining() || self.store.is_quarantined(),
            disk_blocks,
            disk_capacity_blocks,
            ..LoadReport::default()
        }
    }
}

#[cfg(test)]
mod tests;
