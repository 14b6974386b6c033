//! How client commands reach a cluster: the router's address, certificates as `[tls]` has them, and the caller's key.

use std::fmt;
use std::ops::Deref;
use std::path::PathBuf;

use client::{Inference, Node};
use node::{ApiKey, Channel, Connector, Tls, tls};
use serde::{Deserialize, Serialize};
use types::{Error, NodeRecord, Role};

/// The file of settings, as every role and `--config` know it.
const CONFIG_VARIABLE: &str = "PERIGEE_CONFIG";

/// A router, and what to show to it and to its nodes.
#[derive(Debug, Clone)]
pub(crate) struct Router {
    address: String,
    connector: Connector,
    key: Option<ApiKey>,
    /// Model that is meant where a command names none. Empty: the router's.
    model: String,
}

/// What client commands read of the settings. Other sections are the roles' business.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct ClientSettings {
    tls: tls::Config,
}

/// `[tls]` of the file that the environment names, and of the environment itself.
///
/// # Errors
///
/// The file cannot be read, or the section makes no sense.
pub(crate) fn tls_settings() -> anyhow::Result<tls::Config> {
    let file = std::env::var_os(CONFIG_VARIABLE).map(PathBuf::from);
    let loaded = node::config::load::<ClientSettings>(file.as_deref(), Vec::new())?;
    Ok(loaded.value.tls)
}

/// What `[tls]` says, if it says anything.
pub(crate) fn load_tls(settings: &tls::Config) -> Result<Option<Tls>, Error> {
    match settings.is_on() {
        true => Ok(Some(Tls::load(settings)?)),
        false => Ok(None),
    }
}

impl Router {
    /// The router at `address`, with these certificates and this key.
    pub(crate) fn with_tls(address: &str, tls: Option<Tls>, key: Option<&ApiKey>) -> Self {
        Self {
            address: address.to_owned(),
            connector: Connector::new(tls),
            key: key.cloned(),
            model: String::new(),
        }
    }

    /// Means this model where a command names none.
    pub(crate) fn with_model(self, model: &str) -> Self {
        Self {
            model: model.to_owned(),
            ..self
        }
    }

    /// `model`, or the one that is meant where that is empty.
    pub(crate) fn model_or_own(&self, model: &str) -> String {
        match model {
            "" => self.model.clone(),
            model => model.to_owned(),
        }
    }

    /// Another router of the same cluster.
    pub(crate) fn at(&self, address: &str) -> Self {
        Self {
            address: address.to_owned(),
            ..self.clone()
        }
    }

    /// What is connected with.
    pub(crate) fn tls(&self) -> Option<&Tls> {
        self.connector.tls()
    }

    /// The key to show to routers.
    pub(crate) fn key(&self) -> Option<&ApiKey> {
        self.key.as_ref()
    }

    /// A connection to the router.
    pub(crate) fn channel(&self) -> Result<Channel, Error> {
        self.channel_with_key(&self.address)
    }

    /// Its front door.
    pub(crate) fn inference(&self) -> Result<Inference, Error> {
        Ok(Inference::new(self.channel()?))
    }

    /// A connection to a member. Routers alone know keys, so they alone are shown one.
    pub(crate) fn channel_to(&self, record: &NodeRecord) -> Result<Channel, Error> {
        match record.role {
            Role::Router => self.channel_with_key(&record.grpc_endpoint),
            Role::Prefill | Role::Decode | Role::Store => self.connector.channel(&record.grpc_endpoint),
        }
    }

    /// The `Node` service of the process at `endpoint`, whatever its role.
    pub(crate) fn node_at(&self, endpoint: &str) -> Result<Node, Error> {
        Ok(Node::new(self.channel_with_key(endpoint)?))
    }

    /// The node of this record, together with the way to it.
    pub(crate) fn reached(&self, record: NodeRecord) -> Reached {
        Reached {
            record,
            router: self.clone(),
        }
    }

    fn channel_with_key(&self, endpoint: &str) -> Result<Channel, Error> {
        match &self.key {
            Some(key) => self.connector.clone().with_key(key).channel(endpoint),
            None => self.connector.channel(endpoint),
        }
    }
}

impl fmt::Display for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)
    }
}

/// A member's record, and the way to it.
#[derive(Debug, Clone)]
pub(crate) struct Reached {
    record: NodeRecord,
    router: Router,
}

impl Reached {
    /// A connection to it.
    pub(crate) fn channel(&self) -> Result<Channel, Error> {
        self.router.channel_to(&self.record)
    }
}

impl Deref for Reached {
    type Target = NodeRecord;

    fn deref(&self) -> &NodeRecord {
        &self.record
    }
}
