//! Who takes part in the cluster: nodes register under a lease and follow each other.
//!
//! The registry holds members, and the quotas of tenants that operators set, and nothing else: never a block, never a request. So its loss costs nothing but
//! news: everyone goes on with the last membership, keeps trying, and registers again if the lease was lost.
//! Nothing in here ends a process.
//!
//! Invariants:
//! - nodes that serve one model have one [`KvSpace`](types::KvSpace): a disagreeing node is refused when it
//!   registers, whatever races (`rules.rs`);
//! - a node is replaced by its own newer incarnation only;
//! - a member that is known stays known while the registry is unreachable, and for one lease after it came back
//!   (`view.rs`).
//!
//! Where things are: `rules.rs` (who may register), `view.rs` (what is known of the others), `table.rs` (the embedded
//! registry's state) are pure. `keeper.rs` holds a lease, `follower.rs` follows changes, both over the two
//! implementations `etcd.rs` and `embedded.rs`.

pub mod embedded;
mod etcd;
mod follower;
mod keeper;
mod rules;
mod table;
mod view;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use types::{Error, ErrorCode, NodeId, NodeRecord, TenantQuota};

pub use keeper::{Registration, State};
pub use table::{MemberTable, NODES_MAX};

use crate::channel::Connector;
use crate::{identity, tls};

/// Shortest lease: below, a process that a busy machine held up for a moment would be taken for dead.
pub const LEASE_TTL_MIN: Duration = Duration::from_millis(200);
/// Longest lease: the time for which a dead node's name and settings stay taken.
pub const LEASE_TTL_MAX: Duration = Duration::from_secs(3600);
/// No registry call takes longer: it is a key or two.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// Tenants that can have quotas: people set them. Every watcher is told all of them.
pub const QUOTAS_MAX: usize = 1024;
/// First wait before a registry that failed is tried again.
pub(crate) const RETRY_FIRST: Duration = Duration::from_millis(50);
/// Longest wait before that. Short, because a lease runs meanwhile.
pub(crate) const RETRY_LONGEST: Duration = Duration::from_secs(2);

/// How to take part.
#[derive(Debug, Clone)]
pub struct Config {
    /// Clusters that share one etcd are kept apart by their names.
    pub cluster: String,
    /// How long a node counts as living after it was last heard of. etcd rounds it up to seconds.
    pub lease_ttl: Duration,
    /// How long [`connect`] and [`Registry::register`] wait for a registry that does not answer.
    pub connect_deadline: Duration,
    /// Connects to the embedded registry.
    pub connector: Connector,
    /// Files for an etcd that is reached over TLS, which has an authority of its own.
    pub etcd_tls: tls::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cluster: "default".to_owned(),
            // Routers notice a dead node by its broken streams at once; the lease only cleans up.
            lease_ttl: Duration::from_secs(10),
            // An etcd that elects a leader answers within some seconds.
            connect_deadline: Duration::from_secs(15),
            connector: Connector::default(),
            etcd_tls: tls::Config::default(),
        }
    }
}

/// What is known of the cluster.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Members {
    /// The registry's own numbering of its changes.
    pub revision: u64,
    /// Every node that is registered, or was when the registry was last heard of.
    pub nodes: BTreeMap<NodeId, NodeRecord>,
    /// What operators have set for tenants, by name; the empty one is for requests without a tenant.
    pub quotas: BTreeMap<String, TenantQuota>,
    /// Whether changes are being followed now. If not, all else is the last that was known.
    pub connected: bool,
}

/// Why the registry cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RegistryError {
    /// The address or a setting makes no sense.
    #[error("{0}")]
    Config(String),
    /// It does not answer, or the connection broke. Nothing may be concluded about what it knows.
    #[error("registry {registry} cannot be reached: {reason}")]
    Unreachable {
        /// Its address.
        registry: String,
        /// What happened.
        reason: String,
    },
    /// It answered, and the answer is no.
    #[error("registration refused: {0}")]
    Refused(#[source] Error),
}

impl RegistryError {
    /// What the caller can do.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Config(_) => ErrorCode::Invalid,
            Self::Unreachable { .. } => ErrorCode::Unavailable,
            Self::Refused(error) => error.code,
        }
    }
}

impl From<RegistryError> for Error {
    fn from(error: RegistryError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// A cluster's membership, as one process takes part in it.
pub trait Registry: Send + Sync + fmt::Debug {
    /// Adds this node, and keeps it there for as long as the answer lives: through lost leases and lost registries.
    ///
    /// # Errors
    ///
    /// Refused: the record cannot be used (`invalid`), other nodes of the model have another KV space (`conflict`), or
    /// a newer incarnation of the node lives (`fenced`). Unreachable for longer than [`Config::connect_deadline`].
    fn register(&self, record: NodeRecord) -> BoxFuture<'_, Result<Registration, RegistryError>>;

    /// Replaces a tenant's quota, or removes it if `quota` is empty.
    ///
    /// # Errors
    ///
    /// Refused: the name cannot be used (`invalid`), or [`QUOTAS_MAX`] others have one (`overloaded`). Unreachable.
    fn put_quota(&self, tenant: &str, quota: TenantQuota) -> BoxFuture<'_, Result<(), RegistryError>>;

    /// Follows the members. The receiver holds the newest state at any time.
    fn watch(&self) -> watch::Receiver<Arc<Members>>;
}

/// Takes part in the cluster whose registry is at `url`: `etcd://host:port,host:port` or `perigee://host:port`. Members are
/// known when this returns. Following them ends at `shutdown`.
///
/// # Errors
///
/// The address or a setting makes no sense, or the registry did not answer within [`Config::connect_deadline`].
pub async fn connect(
    url: &str,
    config: &Config,
    shutdown: CancellationToken,
) -> Result<Arc<dyn Registry>, RegistryError> {
    check(config)?;
    let unknown = || {
        let usage = "etcd://host:port[,host:port…] or perigee://host:port";
        RegistryError::Config(format!("registry {url:?} is not {usage}"))
    };
    let (scheme, hosts) = url.split_once("://").ok_or_else(unknown)?;
    match scheme {
        "etcd" => {
            let backend = etcd::Etcd::new(hosts, config)?;
            Ok(follower::start(backend, config, shutdown).await?)
        }
        "perigee" => {
            let backend = embedded::Embedded::new(hosts, config)?;
            Ok(follower::start(backend, config, shutdown).await?)
        }
        _ => Err(unknown()),
    }
}

/// The table of quotas as one change more leaves it.
fn set_quota(
    quotas: &mut BTreeMap<String, TenantQuota>,
    tenant: &str,
    quota: TenantQuota,
) -> Result<(), Error> {
    TenantQuota::check_name(tenant)?;
    if quota.is_empty() {
        quotas.remove(tenant);
        return Ok(());
    }
    if quotas.len() >= QUOTAS_MAX && !quotas.contains_key(tenant) {
        let message = format!("{QUOTAS_MAX} tenants have quotas already: reset one first");
        return Err(Error::new(ErrorCode::Overloaded, message));
    }
    quotas.insert(tenant.to_owned(), quota);
    Ok(())
}

fn check(config: &Config) -> Result<(), RegistryError> {
    let Config {
        cluster,
        lease_ttl,
        connect_deadline: _,
        connector: _,
        etcd_tls: _,
    } = config;
    identity::node_id(cluster)
        .map_err(|_| RegistryError::Config(format!("cluster name {cluster:?} cannot be part of a key")))?;
    if !(LEASE_TTL_MIN..=LEASE_TTL_MAX).contains(lease_ttl) {
        return Err(RegistryError::Config(format!(
            "lease_ttl is {lease_ttl:?}, but must be between {LEASE_TTL_MIN:?} and {LEASE_TTL_MAX:?}"
        )));
    }
    Ok(())
}

/// What the two implementations have to offer; `keeper.rs` and `follower.rs` make a [`Registry`] of it.
trait Backend: Clone + Send + Sync + fmt::Debug + 'static {
    type Session: Session;

    /// The address, for errors and logs.
    fn address(&self) -> &str;

    /// A connection of its own for one registration.
    fn session(&self) -> Self::Session;

    /// Replaces or removes a tenant's quota, within [`CALL_DEADLINE`].
    fn put_quota(
        &self,
        tenant: &str,
        quota: TenantQuota,
    ) -> impl Future<Output = Result<(), RegistryError>> + Send;

    /// Tells `apply` what is there, and then every change, until the connection breaks; says why it broke. Answers in
    /// between come within [`CALL_DEADLINE`]. Cancel safe.
    fn follow(&self, apply: &(dyn Fn(view::Change) + Sync)) -> impl Future<Output = RegistryError> + Send;
}

/// One registration's calls. A call that is given up half way does no harm: a lease that nobody knows of ends.
trait Session: Send + 'static {
    /// Adds or replaces `record` under a new lease.
    fn register(&mut self, record: &NodeRecord) -> impl Future<Output = Result<u64, RegistryError>> + Send;

    /// Prolongs the lease.
    fn keep_alive(
        &mut self,
        record: &NodeRecord,
        lease: u64,
    ) -> impl Future<Output = Result<Alive, RegistryError>> + Send;

    /// Ends the lease, and with it the membership.
    fn unregister(&mut self, lease: u64) -> impl Future<Output = Result<(), RegistryError>> + Send;
}

/// The answer to a keep-alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alive {
    /// The node is a member for another lease.
    Yes,
    /// The lease has ended, or holds the node's entry no more: register again.
    Gone,
}

#[cfg(test)]
mod tests;
