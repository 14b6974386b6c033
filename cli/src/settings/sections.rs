//! The sections of the configuration, each with its conversion into what the role takes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::Path;

use engine::{Numerics, Precision};
use kv_store::disk;
use kv_store::disk::breaker::Limits;
use kv_store::object;
use node::config::{ByteSize, Duration};
use node::tls::TlsError;
use node::{Connector, telemetry};
use serde::{Deserialize, Serialize};
use transfer::memory::HugePages;
use types::{Error, KvDtype, NodeId};

use super::tenants::TenantSettings;

/// More threads than a disk has use for would only hold memory.
const DISK_THREADS_MAX: usize = 256;
/// Each one may hold a segment in memory.
const OBJECT_REQUESTS_MAX: usize = 256;

/// Logs.
pub(crate) type LogSettings = telemetry::Config;

/// Traces.
pub(crate) type TelemetrySettings = router::traces::Config;

/// Who this process is, and where it is reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct NodeSettings {
    pub(crate) id: String,
    pub(crate) listen: IpAddr,
    pub(crate) advertise: String,
    pub(crate) grpc_port: u16,
    pub(crate) http_port: u16,
    pub(crate) transfer_port: u16,
    pub(crate) drain_deadline: Duration,
}

impl Default for NodeSettings {
    fn default() -> Self {
        let serve = node::serve::Config::default();
        Self {
            id: String::new(),
            // Without certificates nothing authenticates callers: whoever opens a node to a network does so by hand.
            listen: IpAddr::from([127, 0, 0, 1]),
            advertise: String::new(),
            grpc_port: 0,
            http_port: 0,
            transfer_port: 0,
            drain_deadline: serve.drain_deadline,
        }
    }
}

impl NodeSettings {
    pub(super) fn validate(&self) -> Result<(), Error> {
        if !self.id.is_empty() {
            node::identity::node_id(&self.id)?;
        }
        if self.listen.is_unspecified() && self.advertise.is_empty() {
            return Err(Error::invalid(
                "node.advertise",
                format!(
                    "node.listen is {}, so node.advertise must say where others reach this node",
                    self.listen
                ),
            ));
        }
        Ok(())
    }

    /// `host:port` under which others reach `port` of this node.
    pub(crate) fn reached_at(&self, port: u16) -> String {
        if self.advertise.is_empty() {
            return std::net::SocketAddr::new(self.listen, port).to_string();
        }
        format!("{}:{port}", self.advertise)
    }

    pub(crate) fn serve(&self) -> node::serve::Config {
        let listen = |port| std::net::SocketAddr::new(self.listen, port).to_string();
        node::serve::Config {
            grpc_listen: listen(self.grpc_port),
            http_listen: listen(self.http_port),
            drain_deadline: self.drain_deadline,
        }
    }
}

/// Where the members of the cluster are found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RegistrySettings {
    pub(crate) url: String,
    pub(crate) cluster: String,
    pub(crate) lease_ttl: Duration,
    pub(crate) connect_deadline: Duration,
    pub(crate) etcd_authority: String,
    pub(crate) etcd_certificate: String,
    pub(crate) etcd_key: String,
}

impl Default for RegistrySettings {
    fn default() -> Self {
        let node::registry::Config {
            cluster,
            lease_ttl,
            connect_deadline,
            connector: _,
            etcd_tls,
        } = node::registry::Config::default();
        Self {
            url: String::new(),
            cluster,
            lease_ttl: lease_ttl.into(),
            connect_deadline: connect_deadline.into(),
            etcd_authority: etcd_tls.authority,
            etcd_certificate: etcd_tls.certificate,
            etcd_key: etcd_tls.key,
        }
    }
}

impl RegistrySettings {
    /// Files for an etcd that is reached over TLS. It has an authority of its own: whoever it signs for is no member.
    fn etcd_tls(&self) -> node::tls::Config {
        node::tls::Config {
            certificate: self.etcd_certificate.clone(),
            key: self.etcd_key.clone(),
            authority: self.etcd_authority.clone(),
            name: String::new(),
        }
    }

    pub(super) fn validate(&self) -> Result<(), Error> {
        let refuse = |error: TlsError| Error::from(error.of("registry.etcd_"));
        self.etcd_tls().validate().map_err(refuse)
    }

    pub(crate) fn config(&self, connector: Connector) -> node::registry::Config {
        node::registry::Config {
            cluster: self.cluster.clone(),
            lease_ttl: self.lease_ttl.into(),
            connect_deadline: self.connect_deadline.into(),
            connector,
            etcd_tls: self.etcd_tls(),
        }
    }
}

/// What is served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ModelSettings {
    pub(crate) path: String,
    pub(crate) name: String,
    pub(crate) precision: PrecisionName,
    pub(crate) kv_format: KvFormatName,
    pub(crate) threads: usize,
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self {
            path: String::new(),
            name: String::new(),
            precision: PrecisionName::Fast,
            kv_format: KvFormatName::Auto,
            threads: 0,
        }
    }
}

impl ModelSettings {
    /// How the engine computes, and in which form it keeps KV.
    pub(crate) fn numerics(&self) -> Numerics {
        let by_precision = Numerics::from(Precision::from(self.precision));
        Numerics {
            kv: self.kv_format.dtype().unwrap_or(by_precision.kv),
            ..by_precision
        }
    }

    /// What the engine takes: `None` is one per core.
    pub(crate) fn engine_threads(&self) -> Option<NonZeroUsize> {
        NonZeroUsize::new(self.threads)
    }
}

/// Arithmetic of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PrecisionName {
    Exact,
    Fast,
}

/// What KV is rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum KvFormatName {
    Auto,
    F32,
    F16,
    Bf16,
    Int8,
}

impl KvFormatName {
    fn dtype(self) -> Option<KvDtype> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(KvDtype::F32),
            Self::F16 => Some(KvDtype::F16),
            Self::Bf16 => Some(KvDtype::Bf16),
            Self::Int8 => Some(KvDtype::Int8),
        }
    }
}

impl From<PrecisionName> for Precision {
    fn from(name: PrecisionName) -> Self {
        match name {
            PrecisionName::Exact => Self::Exact,
            PrecisionName::Fast => Self::Fast,
        }
    }
}

/// On which pages the pool lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum HugePagesName {
    Auto,
    Reserved,
    Off,
}

impl From<HugePagesName> for HugePages {
    fn from(name: HugePagesName) -> Self {
        match name {
            HugePagesName::Auto => Self::Auto,
            HugePagesName::Reserved => Self::Reserved,
            HugePagesName::Off => Self::Off,
        }
    }
}

/// The pool of KV blocks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct KvSettings {
    pub(crate) memory: ByteSize,
    pub(crate) block_tokens: usize,
    pub(crate) huge_pages: HugePagesName,
    pub(crate) disk_path: String,
    pub(crate) disk_capacity: ByteSize,
    pub(crate) disk_write_rate: ByteSize,
    pub(crate) disk_threads: usize,
    pub(crate) disk_promote_timeout: Duration,
    pub(crate) disk_errors_max: u32,
    pub(crate) disk_stall_max: Duration,
    pub(crate) disk_rate_min: ByteSize,
    pub(crate) disk_bypass_min: Duration,
    pub(crate) disk_bypass_max: Duration,
    pub(crate) object_url: String,
    pub(crate) object_write_rate: ByteSize,
    pub(crate) object_requests: usize,
    pub(crate) object_timeout: Duration,
    pub(crate) object_uses_min: u32,
    pub(crate) object_missing_ttl: Duration,
    pub(crate) object_errors_max: u32,
    pub(crate) object_bypass_min: Duration,
    pub(crate) object_bypass_max: Duration,
}

impl Default for KvSettings {
    fn default() -> Self {
        let disk::Bounds {
            write_rate_max,
            threads,
            promote_timeout,
            limits:
                Limits {
                    errors_max,
                    stall_max,
                    rate_min,
                    bypass_min,
                    bypass_max,
                },
        } = disk::Bounds::default();
        let objects = object::Bounds::default();
        // 46 thousand tokens of the demo's model, and room on a small machine for several nodes.
        Self {
            memory: ByteSize(1 << 30),
            block_tokens: types::layout::BLOCK_TOKENS_DEFAULT,
            huge_pages: match transfer::tcp::Config::default().huge_pages {
                HugePages::Auto => HugePagesName::Auto,
                HugePages::Reserved => HugePagesName::Reserved,
                HugePages::Off => HugePagesName::Off,
            },
            // Which disk may be filled, only a deployment knows.
            disk_path: String::new(),
            disk_capacity: ByteSize(0),
            disk_write_rate: ByteSize(write_rate_max),
            disk_threads: threads,
            disk_promote_timeout: promote_timeout.into(),
            disk_errors_max: errors_max,
            disk_stall_max: stall_max.into(),
            disk_rate_min: ByteSize(rate_min),
            disk_bypass_min: bypass_min.into(),
            disk_bypass_max: bypass_max.into(),
            object_url: String::new(),
            object_write_rate: ByteSize(objects.write_rate_max),
            object_requests: objects.requests_max,
            object_timeout: objects.timeout.into(),
            object_uses_min: objects.uses_min,
            object_missing_ttl: objects.missing_ttl.into(),
            object_errors_max: objects.errors_max,
            object_bypass_min: objects.bypass_min.into(),
            object_bypass_max: objects.bypass_max.into(),
        }
    }
}

impl KvSettings {
    /// The disk tier of the node `id`, if one is set. Nodes of one machine share the path and have a folder each.
    pub(crate) fn disk_config(&self, id: &NodeId) -> Option<disk::Config> {
        (!self.disk_path.is_empty()).then(|| disk::Config {
            folder: Path::new(&self.disk_path).join(id.as_str()),
            capacity_bytes: self.disk_capacity.0,
            bounds: disk::Bounds {
                write_rate_max: self.disk_write_rate.0,
                threads: self.disk_threads,
                promote_timeout: self.disk_promote_timeout.get(),
                limits: Limits {
                    errors_max: self.disk_errors_max,
                    stall_max: self.disk_stall_max.get(),
                    rate_min: self.disk_rate_min.0,
                    bypass_min: self.disk_bypass_min.get(),
                    bypass_max: self.disk_bypass_max.get(),
                },
            },
        })
    }

    /// The object tier, if one is set. All nodes share it.
    pub(crate) fn object_config(&self) -> Option<object::Config> {
        (!self.object_url.is_empty()).then(|| object::Config {
            url: self.object_url.clone(),
            bounds: object::Bounds {
                write_rate_max: self.object_write_rate.0,
                requests_max: self.object_requests,
                timeout: self.object_timeout.get(),
                uses_min: self.object_uses_min,
                missing_ttl: self.object_missing_ttl.get(),
                errors_max: self.object_errors_max,
                bypass_min: self.object_bypass_min.get(),
                bypass_max: self.object_bypass_max.get(),
            },
        })
    }

    fn validate_objects(&self) -> Result<(), Error> {
        let Some(config) = self.object_config() else {
            return Ok(());
        };
        if !(1..=OBJECT_REQUESTS_MAX).contains(&config.bounds.requests_max) {
            return Err(Error::invalid(
                "kv.object_requests",
                format!(
                    "kv.object_requests is {}, but must be from 1 to {OBJECT_REQUESTS_MAX}",
                    config.bounds.requests_max
                ),
            ));
        }
        if config.bounds.timeout.is_zero() {
            return Err(Error::invalid(
                "kv.object_timeout",
                "kv.object_timeout is 0, but a bucket needs time to answer",
            ));
        }
        if config.bounds.bypass_min.is_zero() || config.bounds.bypass_min > config.bounds.bypass_max {
            return Err(Error::invalid(
                "kv.object_bypass_min",
                format!(
                    "kv.object_bypass_min is {}, but must be more than 0 and at most kv.object_bypass_max, which is {}",
                    self.object_bypass_min, self.object_bypass_max
                ),
            ));
        }
        Ok(config.check_url()?)
    }

    fn validate_disk(&self) -> Result<(), Error> {
        if self.disk_path.is_empty() {
            return Ok(());
        }
        if self.disk_capacity.0 == 0 {
            return Err(Error::invalid(
                "kv.disk_capacity",
                format!(
                    "kv.disk_path is {}, so kv.disk_capacity must say how much of it may be used",
                    self.disk_path
                ),
            ));
        }
        if !(2..=DISK_THREADS_MAX).contains(&self.disk_threads) {
            return Err(Error::invalid(
                "kv.disk_threads",
                format!(
                    "kv.disk_threads is {}, but must be from 2 to {DISK_THREADS_MAX}",
                    self.disk_threads
                ),
            ));
        }
        if self.disk_bypass_min.get().is_zero() || self.disk_bypass_min > self.disk_bypass_max {
            return Err(Error::invalid(
                "kv.disk_bypass_min",
                format!(
                    "kv.disk_bypass_min is {}, but must be more than 0 and at most kv.disk_bypass_max, which is {}",
                    self.disk_bypass_min, self.disk_bypass_max
                ),
            ));
        }
        Ok(())
    }

    pub(super) fn validate(&self) -> Result<(), Error> {
        self.validate_disk()?;
        self.validate_objects()?;
        if self.memory.0 == 0 {
            return Err(Error::invalid(
                "kv.memory",
                "kv.memory is 0, but a pool needs at least one block",
            ));
        }
        if !self.block_tokens.is_power_of_two() || !(8..=1024).contains(&self.block_tokens) {
            return Err(Error::invalid(
                "kv.block_tokens",
                format!(
                    "kv.block_tokens is {}, but must be a power of two from 8 to 1024",
                    self.block_tokens
                ),
            ));
        }
        Ok(())
    }
}

/// Defines a section with the fields of a role's `Config`, in the units of a configuration file. The patterns are exhaustive,
/// so that no setting of the role can be forgotten here.
macro_rules! section {
    (
        $(#[$doc:meta])*
        $name:ident of $config:path { $($field:ident: $kind:tt),* $(,)? }
        $(given { $($given:ident: $type:ty),* $(,)? })?
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default)]
        pub(crate) struct $name {
            $(pub(crate) $field: section!(@type $kind),)*
        }

        impl Default for $name {
            fn default() -> Self {
                use $config as Config;
                let Config { $($field,)* $($($given: _,)*)? } = Config::default();
                Self { $($field: section!(@raw $kind, $field),)* }
            }
        }

        impl $name {
            /// What the role takes.
            pub(crate) fn config(&self, $($($given: $type),*)?) -> $config {
                use $config as Config;
                Config { $($field: section!(@config $kind, self.$field),)* $($($given,)*)? }
            }
        }
    };
    (@type count) => { usize };
    (@type time) => { Duration };
    (@type size) => { ByteSize };
    (@type bytes) => { ByteSize };
    (@type policy) => { kv_store::Eviction };
    (@type tenants) => { BTreeMap<String, TenantSettings> };
    (@raw count, $value:expr) => { $value };
    (@raw time, $value:expr) => { Duration::from($value) };
    (@raw size, $value:expr) => { ByteSize($value) };
    (@raw policy, $value:expr) => { $value };
    (@raw tenants, $value:expr) => { TenantSettings::of_all($value) };
    (@raw bytes, $value:expr) => { ByteSize($value as u64) };
    (@config count, $value:expr) => { $value };
    (@config time, $value:expr) => { $value.get() };
    (@config size, $value:expr) => { $value.0 };
    (@config policy, $value:expr) => { $value };
    (@config tenants, $value:expr) => { TenantSettings::config_of_all(&$value) };
    (@config bytes, $value:expr) => { usize::try_from($value.0).unwrap_or(usize::MAX) };
}

section! {
    /// A prefill node alone.
    PrefillSettings of prefill_node::Config {
        step_tokens: count,
        step_sequences_max: count,
        queue_requests_max: count,
        queue_tokens_max: count,
        sessions_max: count,
        start_timeout: time,
        offer_timeout: time,
        heartbeat_interval: time,
        request_timeout_max: time,
        fetch_timeout: time,
        memory_retry_interval: time,
        write_timeout: time,
        quiesce_timeout: time,
        writes_in_flight_max: count,
        write_bytes_max: bytes,
        write_slices_max: count,
        drain_timeout: time,
    } given { threads: Option<NonZeroUsize> }
}

section! {
    /// A decode node alone.
    DecodeSettings of decode_node::Config {
        sequences_max: count,
        step_tokens: count,
        requests_max: count,
        request_timeout_max: time,
        allocate_timeout: time,
        stall_timeout: time,
        fence_timeout: time,
        blocks_poll: time,
        drain_timeout: time,
        messages_ahead_max: count,
    } given { threads: Option<NonZeroUsize> }
}

section! {
    /// The blocks of a node.
    StoreSettings of kv_store::Config {
        lease_ttl_max: time,
        leases_max: count,
        reservation_ttl_max: time,
        reservations_max: count,
        expiry_interval: time,
        hashes_max: count,
        log_entries_max: count,
        watch_buffer_events: count,
        watchers_max: count,
        fetches_max: count,
        fetch_batch_bytes: size,
        prefetches_max: count,
        acquire_timeout: time,
        eviction: policy,
        cooperation_bytes_per_second: size,
        copies_max: count,
        offer_timeout: time,
        handover_timeout: time,
        pins_max: count,
        scrub_bytes_per_second: size,
        tenant_bytes_max: size,
        tenants: tenants,
    }
}
