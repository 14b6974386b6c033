//! Connections to others over TLS.
//!
//! Each one is made of what the files hold when it is made, so a channel that connects again shows a new certificate.

use std::io;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use rustls::CertificateError;
use rustls::pki_types::ServerName;
use tokio::io::AsyncBufReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use types::Error;

use super::Tls;
use crate::channel::{self, CONNECT_TIMEOUT};

/// How long a new connection is held back to hear whether the peer takes the certificate. A peer of ours speaks at once; one that waits
/// for us to speak first is none that refuses.
const REFUSAL_WAIT: std::time::Duration = std::time::Duration::from_millis(200);

/// Somebody to connect to.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// As it was given, for errors.
    endpoint: Arc<str>,
    host: Arc<str>,
    port: u16,
    name: ServerName<'static>,
    tls: Tls,
}

impl Target {
    /// A target that is reached with `tls`; without one, with what this machine trusts.
    pub(crate) fn new(endpoint: &str, tls: Option<&Tls>) -> Result<Self, Error> {
        let (host, port) = channel::host_and_port(endpoint)?;
        let tls = match tls {
            Some(tls) => tls.clone(),
            None => Tls::load(&super::Config::default())?,
        };
        let name = match tls.name() {
            Some(name) => name,
            None => ServerName::try_from(host.clone()).map_err(|_| {
                let message = format!("endpoint {endpoint:?} has a host that no certificate can bear");
                Error::invalid("endpoint", message)
            })?,
        };
        Ok(Self {
            endpoint: endpoint.into(),
            host: host.into(),
            port,
            name,
            tls,
        })
    }

    pub(crate) async fn connect(&self) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect((&*self.host, self.port)).await?;
        stream.set_nodelay(true)?;
        let connector = TlsConnector::from(self.tls.client());
        let mut stream = connector.connect(self.name.clone(), stream).await?;
        // Over TLS 1.3 a server judges our certificate after we have done our part. Waiting for its first words turns a refusal
        // into the error of this connection, with its reason, rather than of some call that breaks off.
        if let Ok(heard) = timeout(REFUSAL_WAIT, stream.fill_buf()).await {
            heard?;
        }
        Ok(stream)
    }

    /// A connection in the form that a channel takes.
    pub(crate) async fn connect_for_channel(self) -> Result<TokioIo<TlsStream<TcpStream>>, Refused> {
        let stream = self.connect().await;
        stream
            .map(TokioIo::new)
            .map_err(|error| Refused(self.failed(&error).message))
    }

    pub(crate) fn late(&self) -> Error {
        Error::unavailable(format!(
            "{} did not connect within {CONNECT_TIMEOUT:?}",
            self.endpoint
        ))
    }

    /// Why there is no connection, and what to do about it.
    pub(crate) fn failed(&self, error: &io::Error) -> Error {
        let endpoint = &self.endpoint;
        let inner = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let message = match inner {
            Some(rustls::Error::InvalidCertificate(refused)) => match refused {
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                    format!("the certificate of {endpoint} has expired")
                }
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    format!("the certificate of {endpoint} is not signed by tls.authority")
                }
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                    format!(
                        "the certificate of {endpoint} does not bear the name {}: tls.name says which name to expect",
                        self.name.to_str()
                    )
                }
                other => format!("the certificate of {endpoint} cannot be accepted: {other}"),
            },
            Some(rustls::Error::AlertReceived(alert)) => {
                use rustls::AlertDescription as Alert;
                match alert {
                    Alert::CertificateRequired | Alert::HandshakeFailure => format!(
                        "{endpoint} demands a certificate of the cluster: set tls.certificate, tls.key and tls.authority"
                    ),
                    Alert::UnknownCA | Alert::DecryptError => {
                        format!("{endpoint} does not trust the authority that signed tls.certificate")
                    }
                    Alert::CertificateExpired => format!("{endpoint} says that tls.certificate has expired"),
                    other => format!("{endpoint} refused the connection: {other:?}"),
                }
            }
            Some(rustls::Error::InvalidMessage(_)) => format!("{endpoint} does not speak TLS"),
            Some(other) => format!("no TLS connection to {endpoint}: {other}"),
            None => format!("cannot connect to {endpoint}: {error}"),
        };
        Error::unavailable(message)
    }
}

/// Why a channel has no connection.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(String);
