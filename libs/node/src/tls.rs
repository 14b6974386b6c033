//! TLS between the processes of a cluster, and to its clients.
//!
//! A process has one certificate, its key, and the certificates of the authorities that sign for the cluster. With it, it serves and
//! it calls. An authority signs for this cluster alone: whoever shows a certificate of it is a member, and may do what members do.
//!
//! Invariant: every connection verifies what it is shown by what the files held at most [`crate::reload::RELOAD_INTERVAL`] ago: they
//! are read again when they change, and no session of an earlier connection is taken up again. Connections that exist go on.
//!
//! Elsewhere: connections to others (`connect.rs`), accepted ones (`serve/incoming.rs`), what is wrong with a certificate
//! (`judge.rs`, pure).

pub(crate) mod connect;
mod judge;

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use types::{Error, ErrorCode};

pub use judge::Flaw;

use crate::reload::{self, Contents};

/// What the keys of [`Config`] begin with.
const SECTION: &str = "tls.";
/// What gRPC is negotiated as.
const GRPC: &[u8] = b"h2";
/// What HTTP is negotiated as.
const HTTP: &[u8] = b"http/1.1";

/// Where a process's certificate lies. Nothing set is no TLS.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// PEM file of the certificate, followed by those between it and the authority.
    pub certificate: String,
    /// PEM file of its private key.
    pub key: String,
    /// PEM file of the authorities that sign the cluster's certificates.
    pub authority: String,
    /// Name that the certificates of all members bear; empty is the host under which each one is reached.
    pub name: String,
}

/// Whether who connects must show a certificate of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificates {
    /// Who shows none is refused in the handshake.
    Required,
    /// Who shows one is a member; what others may do is decided per call.
    Optional,
}

/// Why there can be no TLS.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TlsError {
    /// A file is missing in the settings.
    #[error("{section}{missing} is not set, but {section}{given} is")]
    Incomplete {
        /// What both keys begin with.
        section: &'static str,
        /// The key that is needed.
        missing: &'static str,
        /// The key that needs it.
        given: &'static str,
    },
    /// A file cannot be read.
    #[error("{0}")]
    Read(Error),
    /// A file holds something else.
    #[error("tls.{key} is {file}, which holds no {what} in PEM: {reason}")]
    Pem {
        /// The setting.
        key: &'static str,
        /// The file.
        file: String,
        /// What it should hold.
        what: &'static str,
        /// What the reader said.
        reason: String,
    },
    /// The name cannot be in a certificate.
    #[error("tls.name is {0:?}, which is no host name")]
    Name(String),
    /// The certificate cannot be used.
    #[error("the certificate {file} {flaw}")]
    Certificate {
        /// Its file.
        file: String,
        /// What is wrong with it.
        flaw: Flaw,
    },
    /// The library refuses the rest.
    #[error("TLS cannot be set up: {0}")]
    Library(String),
}

impl TlsError {
    /// The error of files that are set elsewhere: `section` is what their keys begin with.
    #[must_use]
    pub fn of(self, section: &'static str) -> Self {
        match self {
            Self::Incomplete { missing, given, .. } => Self::Incomplete {
                section,
                missing,
                given,
            },
            other => other,
        }
    }

    /// What the caller can do.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Read(error) => error.code,
            Self::Incomplete { .. } | Self::Pem { .. } | Self::Name(_) | Self::Certificate { .. } => {
                ErrorCode::Invalid
            }
            Self::Library(_) => ErrorCode::Internal,
        }
    }
}

impl From<TlsError> for Error {
    fn from(error: TlsError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

impl Config {
    /// Whether anything is set.
    pub fn is_on(&self) -> bool {
        [&self.certificate, &self.key, &self.authority]
            .into_iter()
            .any(|file| !file.is_empty())
    }

    /// Checks what can be told without the files. An authority alone is enough for a client without a certificate.
    ///
    /// # Errors
    ///
    /// A file is missing, or the name cannot be one.
    pub fn validate(&self) -> Result<(), TlsError> {
        let files = [
            ("certificate", "key", &self.certificate, &self.key),
            ("key", "certificate", &self.key, &self.certificate),
            ("certificate", "authority", &self.certificate, &self.authority),
        ];
        for (given, missing, first, second) in files {
            if !first.is_empty() && second.is_empty() {
                return Err(TlsError::Incomplete {
                    section: SECTION,
                    missing,
                    given,
                });
            }
        }
        self.server_name().map(|_| ())
    }

    /// As [`Config::validate`], for a process that serves.
    ///
    /// # Errors
    ///
    /// As there, or there is no certificate to serve with.
    pub fn validate_server(&self) -> Result<(), TlsError> {
        self.validate()?;
        if self.is_on() && self.certificate.is_empty() {
            return Err(TlsError::Incomplete {
                section: SECTION,
                missing: "certificate",
                given: "authority",
            });
        }
        Ok(())
    }

    fn server_name(&self) -> Result<Option<ServerName<'static>>, TlsError> {
        if self.name.is_empty() {
            return Ok(None);
        }
        let name = ServerName::try_from(self.name.clone());
        name.map(Some).map_err(|_| TlsError::Name(self.name.clone()))
    }

    /// The files that are given: the authority, the certificate, the key.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        let files = [&self.authority, &self.certificate, &self.key];
        let given = files.into_iter().filter(|file| !file.is_empty());
        given.map(PathBuf::from).collect()
    }
}

/// A process's certificate and whom it trusts, always as the files have it. Clones are one and the same.
#[derive(Clone)]
pub struct Tls {
    shared: Arc<Shared>,
}

struct Shared {
    config: Config,
    name: Option<ServerName<'static>>,
    /// What the files held when [`Tls::follow`] last accepted them.
    material: RwLock<(Contents, Material)>,
}

/// What connections are made of.
#[derive(Clone)]
struct Material {
    client: Arc<ClientConfig>,
    /// `None` for a client without a certificate.
    server: Option<Servers>,
    identity: Option<Identity>,
    roots: Arc<RootCertStore>,
}

#[derive(Clone)]
struct Servers {
    /// gRPC, from members alone.
    members: Arc<ServerConfig>,
    /// gRPC, from anyone.
    clients: Arc<ServerConfig>,
    /// HTTP, from anyone.
    http: Arc<ServerConfig>,
}

/// A certificate, and what leads from it to an authority.
#[derive(Clone)]
struct Identity {
    chain: Vec<CertificateDer<'static>>,
}

/// Shows where the key lies, and never the key.
impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tls").field(&self.shared.config).finish()
    }
}

impl Tls {
    /// Reads the files. Blocks for as long as that takes.
    ///
    /// # Errors
    ///
    /// A setting or file is missing or cannot be read, or the certificate cannot be used: it has expired, does not belong to the
    /// key, or is signed by another authority.
    pub fn load(config: &Config) -> Result<Self, TlsError> {
        config.validate()?;
        let contents = reload::read(&config.paths()).map_err(TlsError::Read)?;
        let material = Material::read(config, &contents)?;
        material.check(config, UnixTime::now())?;
        let shared = Shared {
            name: config.server_name()?,
            config: config.clone(),
            material: RwLock::new((contents, material)),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Reads the files again when they change, until `until`.
    pub async fn follow(self, until: CancellationToken) -> Result<(), std::convert::Infallible> {
        let known = self.lock().0.clone();
        let paths = self.shared.config.paths();
        reload::follow("certificates", paths, known, until, |contents| {
            let material = Material::read(&self.shared.config, contents)?;
            material.check(&self.shared.config, UnixTime::now())?;
            let mut current = self
                .shared
                .material
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            *current = (contents.clone(), material);
            Ok(())
        })
        .await
    }

    /// When the certificate expires; `None` without one, and for one that never does.
    pub fn expires(&self) -> Option<SystemTime> {
        let (_, material) = &*self.lock();
        let identity = material.identity.as_ref()?;
        judge::expiry(&identity.chain, &material.roots).map(to_system_time)
    }

    /// Connects to the process at `endpoint`, `host:port`, and says when the certificate that it shows expires.
    ///
    /// # Errors
    ///
    /// It cannot be reached, or shows none that is good.
    pub async fn peer_expires(&self, endpoint: &str) -> Result<Option<SystemTime>, Error> {
        let target = connect::Target::new(endpoint, Some(self))?;
        let connected = tokio::time::timeout(crate::channel::CONNECT_TIMEOUT, target.connect()).await;
        let stream = connected
            .map_err(|_| target.late())?
            .map_err(|error| target.failed(&error))?;
        let (_, session) = stream.get_ref();
        let chain = session.peer_certificates().unwrap_or_default();
        Ok(judge::expiry(chain, &self.lock().1.roots).map(to_system_time))
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        self.lock().1.client.clone()
    }

    /// Name that a peer's certificate must bear; `None` is the host under which it is reached.
    pub(crate) fn name(&self) -> Option<ServerName<'static>> {
        self.shared.name.clone()
    }

    /// Serves gRPC by what the files hold; `None` without a certificate.
    pub(crate) fn grpc_server(&self, clients: ClientCertificates) -> Option<Arc<ServerConfig>> {
        let servers = self.lock().1.server.clone()?;
        Some(match clients {
            ClientCertificates::Required => servers.members,
            ClientCertificates::Optional => servers.clients,
        })
    }

    /// As [`Tls::grpc_server`], for HTTP.
    pub(crate) fn http_server(&self) -> Option<Arc<ServerConfig>> {
        Some(self.lock().1.server.clone()?.http)
    }

    fn lock(&self) -> std::sync::RwLockReadGuard<'_, (Contents, Material)> {
        self.shared
            .material
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Material {
    fn read(config: &Config, contents: &Contents) -> Result<Self, TlsError> {
        let mut contents = contents.iter();
        let mut next = |file: &String| match file.is_empty() {
            true => None,
            false => contents.next(),
        };
        let roots = match next(&config.authority) {
            Some(pem) => roots(config, pem)?,
            // A client that names none trusts whom this machine trusts.
            None => system_roots(),
        };
        let roots = Arc::new(roots);
        let pair = match (next(&config.certificate), next(&config.key)) {
            (Some(certificate), Some(key)) => Some((
                certificates("certificate", &config.certificate, certificate)?,
                private_key(&config.key, key)?,
            )),
            (Some(_) | None, _) => None,
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let refuse = |error: rustls::Error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => TlsError::Certificate {
                file: config.certificate.clone(),
                flaw: Flaw::OtherKey(config.key.clone()),
            },
            other => TlsError::Library(other.to_string()),
        };
        let client = client(&provider, &roots, pair.as_ref()).map_err(refuse)?;
        let server = match &pair {
            Some((chain, key)) => {
                let make = |clients, protocol| {
                    server(&provider, &roots, chain, key, clients, protocol).map_err(refuse)
                };
                Some(Servers {
                    members: make(ClientCertificates::Required, GRPC)?,
                    clients: make(ClientCertificates::Optional, GRPC)?,
                    http: make(ClientCertificates::Optional, HTTP)?,
                })
            }
            None => None,
        };
        Ok(Self {
            client,
            server,
            identity: pair.map(|(chain, _)| Identity { chain }),
            roots,
        })
    }

    /// Peers would refuse what is refused here, later and less clearly.
    fn check(&self, config: &Config, now: UnixTime) -> Result<(), TlsError> {
        let Some(identity) = &self.identity else {
            return Ok(());
        };
        judge::judge(&identity.chain, &self.roots, config.server_name()?.as_ref(), now).map_err(|flaw| {
            TlsError::Certificate {
                file: config.certificate.clone(),
                flaw,
            }
        })
    }
}

fn to_system_time(time: UnixTime) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs())
}

fn certificates(key: &'static str, file: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let refuse = |reason: String| TlsError::Pem {
        key,
        file: file.to_owned(),
        what: "certificate",
        reason,
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| refuse(error.to_string()))?;
    match found.is_empty() {
        true => Err(refuse("there is none".to_owned())),
        false => Ok(found),
    }
}

fn private_key(file: &str, pem: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| TlsError::Pem {
        key: "key",
        file: file.to_owned(),
        what: "private key",
        reason: error.to_string(),
    })
}

fn roots(config: &Config, pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for authority in certificates("authority", &config.authority, pem)? {
        roots.add(authority).map_err(|error| TlsError::Pem {
            key: "authority",
            file: config.authority.clone(),
            what: "certificate",
            reason: error.to_string(),
        })?;
    }
    Ok(roots)
}

/// What cannot be read of them is no authority: a connection that needs it fails and says so.
fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

type Pair = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn client(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    pair: Option<&Pair>,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots.clone());
    let mut config = match pair {
        Some((chain, key)) => builder.with_client_auth_cert(chain.clone(), key.clone_key())?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![GRPC.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn server(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
    clients: ClientCertificates,
    protocol: &[u8],
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone());
    let verifier = match clients {
        ClientCertificates::Required => verifier,
        ClientCertificates::Optional => verifier.allow_unauthenticated(),
    };
    let verifier = verifier
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain.to_vec(), key.clone_key())?;
    config.alpn_protocols = vec![protocol.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests;
