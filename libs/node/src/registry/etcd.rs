//! The registry in etcd.
//!
//! A node is one key, `/perigee/<cluster>/nodes/<id>`, with its record as JSON, under the node's lease. A tenant's quota is one,
//! `/perigee/<cluster>/quotas/<tenant>`, without a lease. There is no other key: what nodes must agree on is checked against the living members, in one transaction with the registration
//! ([`EtcdSession::register`]).
//!
//! After any failure the client is made anew, so that no state of a broken connection is carried on. Over TLS it reads its
//! certificate again then.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, Identity, KeyValue,
    LeaseKeepAliveStream, LeaseKeeper, PutOptions, TlsOptions, Txn, TxnOp, WatchOptions,
};
use types::{Error, NodeId, NodeRecord, TenantQuota};

use super::embedded::{known_quota, read_record};
use super::view::Change;
use super::{Alive, Backend, CALL_DEADLINE, Config, RegistryError, Session, rules};
use crate::channel::CONNECT_TIMEOUT;
use crate::{reload, task, tls};

/// How often a connection with an open stream is probed. etcd refuses clients that ask more often than every 5 s
/// (`--grpc-keepalive-min-time`).
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long a probe may go unanswered.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Where etcd listens if nothing else is said.
const PORT_DEFAULT: u16 = 2379;
/// The kind of the keys of tenants' quotas.
const QUOTAS: &str = "quotas";
/// Nodes that register in one instant disturb each other; each round lets at least one of them through.
const REGISTER_ROUNDS_MAX: usize = 32;

/// Where the cluster's keys are.
#[derive(Debug, Clone)]
pub(super) struct Etcd {
    address: Arc<str>,
    hosts: Arc<[String]>,
    /// Of all keys; ends in a slash.
    prefix: Arc<str>,
    /// Of the members' keys.
    nodes: Arc<str>,
    lease_ttl: Duration,
    tls: tls::Config,
}

impl Etcd {
    pub(super) fn new(hosts: &str, config: &Config) -> Result<Self, RegistryError> {
        let parsed: Result<Vec<_>, _> = hosts.split(',').map(host).collect();
        let tls = config.etcd_tls.clone();
        tls.validate()
            .map_err(|error| RegistryError::Config(error.of("registry.etcd_").to_string()))?;
        Ok(Self {
            address: format!("etcd://{hosts}").into(),
            hosts: parsed?.into(),
            prefix: format!("/perigee/{}/", config.cluster).into(),
            nodes: format!("/perigee/{}/nodes/", config.cluster).into(),
            lease_ttl: config.lease_ttl,
            tls,
        })
    }

    async fn client(&self) -> Result<Client, RegistryError> {
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT)
            // etcd takes probes without an open stream for an attack. Ours has one: the watch, or the keep-alive.
            .with_keep_alive_while_idle(false)
            // A member of etcd that lost its peers must say so rather than answer with what was true once.
            .with_require_leader(true);
        let options = match self.tls.is_on() {
            true => options.with_tls(self.tls_options().await?),
            false => options,
        };
        let client = Client::connect(&self.hosts[..], Some(options)).await;
        client.map_err(|error| self.failed(&error))
    }

    async fn tls_options(&self) -> Result<TlsOptions, RegistryError> {
        let paths = self.tls.paths();
        let files = task::blocking("etcd-tls", move || reload::read(&paths))
            .await
            .flatten();
        let mut files = files
            .map_err(|error| self.unreachable(error.message))?
            .into_iter();
        let authority = files.next().unwrap_or_default();
        let options = TlsOptions::new().ca_certificate(Certificate::from_pem(authority));
        Ok(match (files.next(), files.next()) {
            (Some(certificate), Some(key)) => options.identity(Identity::from_pem(certificate, key)),
            (Some(_) | None, _) => options,
        })
    }

    fn failed(&self, error: &etcd_client::Error) -> RegistryError {
        let reason = match error {
            etcd_client::Error::GRpcStatus(status) => status.message().to_owned(),
            other => other.to_string(),
        };
        self.unreachable(reason)
    }

    fn unreachable(&self, reason: impl Into<String>) -> RegistryError {
        RegistryError::Unreachable {
            registry: self.address.to_string(),
            reason: reason.into(),
        }
    }

    fn key(&self, id: &NodeId) -> String {
        format!("{}{id}", self.nodes)
    }

    /// All members, and etcd's revision at which they were.
    async fn members(&self, client: &mut Client) -> Result<(i64, Vec<NodeRecord>), RegistryError> {
        let all = GetOptions::new().with_prefix();
        let response = client.get(self.nodes.as_bytes(), Some(all)).await;
        let response = response.map_err(|error| self.failed(&error))?;
        let revision = response.header().map_or(0, |header| header.revision());
        let records = response.kvs().iter().filter_map(record_of).collect();
        Ok((revision, records))
    }

    /// All there is, and etcd's revision at which it was.
    async fn everything(&self, client: &mut Client) -> Result<(i64, Change), RegistryError> {
        let all = GetOptions::new().with_prefix();
        let response = client.get(self.prefix.as_bytes(), Some(all)).await;
        let response = response.map_err(|error| self.failed(&error))?;
        let revision = response.header().map_or(0, |header| header.revision());
        let (mut records, mut quotas) = (Vec::new(), BTreeMap::new());
        for kv in response.kvs() {
            match self.key_of(kv) {
                Some(Key::Node(_)) => records.extend(record_of(kv)),
                Some(Key::Quota(tenant)) => quotas.extend(known_quota(tenant, quota_of(kv))),
                None => {}
            }
        }
        let change = Change::All {
            revision: revision.unsigned_abs(),
            records,
            quotas,
        };
        Ok((revision, change))
    }

    /// What a key is of; `None` for another version's.
    fn key_of(&self, kv: &KeyValue) -> Option<Key> {
        let (kind, name) = kv.key_str().ok()?.strip_prefix(&*self.prefix)?.split_once('/')?;
        match kind {
            "nodes" => Some(Key::Node(NodeId::new(name))),
            QUOTAS => Some(Key::Quota(name.to_owned())),
            _ => None,
        }
    }

    /// Reads all there is, then watches from the very next revision: nothing falls between. A watch that broke, for
    /// whatever reason (compaction of that revision included), starts over here, so nothing has to be resumed.
    async fn follow_stream(&self, apply: &(dyn Fn(Change) + Sync)) -> Result<(), RegistryError> {
        let opened = async {
            let mut client = self.client().await?;
            let (revision, all) = self.everything(&mut client).await?;
            let options = WatchOptions::new()
                .with_prefix()
                .with_start_revision(revision + 1);
            let watch = client.watch(self.prefix.as_bytes(), Some(options)).await;
            let watch = watch.map_err(|error| self.failed(&error))?;
            Ok::<_, RegistryError>((all, watch))
        };
        let opened = tokio::time::timeout(CALL_DEADLINE, opened).await;
        let (all, mut watch) = opened.map_err(|_| self.unreachable("no answer to a watch"))??;
        apply(all);
        // No deadline: nothing happens until something changes. The connection's keep-alive finds a dead peer.
        while let Some(response) = watch.message().await.map_err(|error| self.failed(&error))? {
            if response.canceled() {
                return Err(self.unreachable(format!("it ended the watch: {}", response.cancel_reason())));
            }
            for event in response.events() {
                if let Some(change) = event.kv().and_then(|kv| self.change(event.event_type(), kv)) {
                    apply(change);
                }
            }
        }
        Ok(())
    }

    fn change(&self, kind: EventType, kv: &KeyValue) -> Option<Change> {
        let revision = kv.mod_revision().unsigned_abs();
        let is_put = matches!(kind, EventType::Put);
        match self.key_of(kv)? {
            Key::Node(id) => Some(match is_put.then(|| record_of(kv)).flatten() {
                Some(record) => Change::Joined {
                    revision,
                    record: Box::new(record),
                },
                None => Change::Left { revision, id },
            }),
            Key::Quota(tenant) => {
                let quota = if is_put {
                    quota_of(kv)
                } else {
                    Ok(TenantQuota::default())
                };
                let (tenant, quota) = known_quota(tenant, quota)?;
                Some(Change::Quota {
                    revision,
                    tenant,
                    quota,
                })
            }
        }
    }
}

/// What a key of ours is of.
enum Key {
    Node(NodeId),
    Quota(String),
}

fn quota_of(kv: &KeyValue) -> Result<TenantQuota, Error> {
    proto::convert::quota_from_json(kv.value_str().unwrap_or("a value that is not UTF-8"))
}

fn record_of(kv: &KeyValue) -> Option<NodeRecord> {
    read_record(kv.value_str().unwrap_or("a value that is not UTF-8"))
}

fn host(text: &str) -> Result<String, RegistryError> {
    let refuse = || RegistryError::Config(format!("registry host {text:?} is not host:port"));
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(text.to_owned()),
        None if !text.is_empty() => Ok(format!("{text}:{PORT_DEFAULT}")),
        Some(_) | None => Err(refuse()),
    }
}

impl Backend for Etcd {
    type Session = EtcdSession;

    fn address(&self) -> &str {
        &self.address
    }

    fn session(&self) -> EtcdSession {
        EtcdSession {
            etcd: self.clone(),
            connection: None,
        }
    }

    async fn put_quota(&self, tenant: &str, quota: TenantQuota) -> Result<(), RegistryError> {
        let put = async {
            let mut client = self.client().await?;
            let key = format!("{}{QUOTAS}/{tenant}", self.prefix);
            let done = match quota.is_empty() {
                true => client.delete(key, None).await.map(drop),
                false => client
                    .put(key, proto::convert::quota_to_json(&quota), None)
                    .await
                    .map(drop),
            };
            done.map_err(|error| self.failed(&error))
        };
        let put = tokio::time::timeout(CALL_DEADLINE, put).await;
        put.map_err(|_| self.unreachable("no answer to a quota"))?
    }

    async fn follow(&self, apply: &(dyn Fn(Change) + Sync)) -> RegistryError {
        match self.follow_stream(apply).await {
            Ok(()) => self.unreachable("it ended the watch"),
            Err(error) => error,
        }
    }
}

pub(super) struct EtcdSession {
    etcd: Etcd,
    /// Taken out during a call and put back after a success, so that a call that failed or was given up leaves nothing
    /// half done behind.
    connection: Option<Connection>,
}

struct Connection {
    client: Client,
    /// The open stream of keep-alives.
    keeping: Option<(LeaseKeeper, LeaseKeepAliveStream)>,
}

impl EtcdSession {
    async fn connection(&mut self) -> Result<Connection, RegistryError> {
        match self.connection.take() {
            Some(connection) => Ok(connection),
            None => Ok(Connection {
                client: self.etcd.client().await?,
                keeping: None,
            }),
        }
    }

    async fn grant(&self, client: &mut Client) -> Result<i64, RegistryError> {
        let seconds = self.etcd.lease_ttl.as_millis().div_ceil(1000);
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        let lease = client.lease_grant(seconds, None).await;
        Ok(lease.map_err(|error| self.etcd.failed(&error))?.id())
    }

    /// One round: `None` if somebody else registered since the members were read.
    async fn try_register(
        &self,
        client: &mut Client,
        record: &NodeRecord,
        lease: i64,
    ) -> Result<Option<()>, RegistryError> {
        let (revision, members) = self.etcd.members(client).await?;
        let members: BTreeMap<_, _> = members
            .into_iter()
            .map(|member| (member.id.clone(), member))
            .collect();
        rules::admit(&members, record).map_err(|refusal| RegistryError::Refused(Error::from(refusal)))?;
        let nobody_joined =
            Compare::mod_revision(&*self.etcd.nodes, CompareOp::Less, revision + 1).with_prefix();
        let put = TxnOp::put(
            self.etcd.key(&record.id),
            proto::convert::record_to_json(record),
            Some(PutOptions::new().with_lease(lease)),
        );
        let transaction = Txn::new().when([nobody_joined]).and_then([put]);
        let response = client.txn(transaction).await;
        let response = response.map_err(|error| self.etcd.failed(&error))?;
        Ok(response.succeeded().then_some(()))
    }
}

impl Session for EtcdSession {
    /// Judges by the members of one revision, and writes on the condition that nobody wrote since. So of two
    /// nodes that disagree, however close, one is refused; without locks, and without a key that outlives both.
    async fn register(&mut self, record: &NodeRecord) -> Result<u64, RegistryError> {
        let mut connection = self.connection().await?;
        connection.keeping = None;
        let client = &mut connection.client;
        let lease = self.grant(client).await?;
        for _ in 0..REGISTER_ROUNDS_MAX {
            match self.try_register(client, record, lease).await {
                Ok(Some(())) => {
                    self.connection = Some(connection);
                    return Ok(lease.unsigned_abs());
                }
                Ok(None) => {}
                Err(error) => {
                    // Best effort: a lease without a key ends by itself.
                    let _ = client.lease_revoke(lease).await;
                    return Err(error);
                }
            }
        }
        Err(self.etcd.unreachable("too many nodes register at once"))
    }

    async fn keep_alive(&mut self, record: &NodeRecord, lease: u64) -> Result<Alive, RegistryError> {
        let mut connection = self.connection().await?;
        let lease = i64::try_from(lease).unwrap_or(i64::MAX);
        let (mut keeper, mut answers) = match connection.keeping.take() {
            Some(keeping) => keeping,
            None => match connection.client.lease_keep_alive(lease).await {
                Ok(keeping) => keeping,
                // How the client says that the lease has ended.
                Err(etcd_client::Error::LeaseKeepAliveError(_)) => return Ok(Alive::Gone),
                Err(error) => return Err(self.etcd.failed(&error)),
            },
        };
        keeper
            .keep_alive()
            .await
            .map_err(|error| self.etcd.failed(&error))?;
        let answer = answers
            .message()
            .await
            .map_err(|error| self.etcd.failed(&error))?;
        let answer = answer.ok_or_else(|| self.etcd.unreachable("it ended the keep-alive"))?;
        if answer.ttl() <= 0 {
            return Ok(Alive::Gone);
        }
        // A lease may live on without the key: a newer incarnation took the key over, or an operator deleted it.
        let entry = connection.client.get(self.etcd.key(&record.id), None).await;
        let entry = entry.map_err(|error| self.etcd.failed(&error))?;
        let held = entry.kvs().first().is_some_and(|kv| kv.lease() == lease);
        connection.keeping = Some((keeper, answers));
        self.connection = Some(connection);
        Ok(if held { Alive::Yes } else { Alive::Gone })
    }

    async fn unregister(&mut self, lease: u64) -> Result<(), RegistryError> {
        let mut connection = self.connection().await?;
        let lease = i64::try_from(lease).unwrap_or(i64::MAX);
        let revoked = connection.client.lease_revoke(lease).await;
        match revoked {
            Ok(_) => Ok(()),
            // What was to be ended has ended.
            Err(etcd_client::Error::GRpcStatus(status)) if status.code() == tonic::Code::NotFound => Ok(()),
            Err(error) => Err(self.etcd.failed(&error)),
        }
    }
}
