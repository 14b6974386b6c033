//! The HTTP side of routers and nodes, and what is shown there.

use std::fs;
use std::time::Duration;

use node::{ApiKey, tls};
use ureq::Agent;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

/// What is shown at the door.
pub(crate) struct Door {
    tls: tls::Config,
    authorization: Option<String>,
}

impl Door {
    /// With the certificate that `tls` names, and with this key.
    pub(crate) fn new(tls: tls::Config, key: Option<&ApiKey>) -> Self {
        Self {
            tls,
            authorization: key.map(|key| format!("Bearer {}", key.secret())),
        }
    }

    /// What says who asks.
    pub(crate) fn authorization(&self) -> Option<&str> {
        self.authorization.as_deref()
    }

    /// `https` where there are certificates.
    pub(crate) fn scheme(&self) -> &'static str {
        if self.tls.is_on() { "https" } else { "http" }
    }

    /// A client whose requests end within `deadline`, and give their status and no error whatever it is.
    pub(crate) fn agent(&self, deadline: Duration) -> Result<Agent, String> {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(deadline))
            .tls_config(self.tls_config()?);
        Ok(config.build().into())
    }

    /// Trusts the authority of `[tls]` where there is one, and shows its certificate.
    fn tls_config(&self) -> Result<TlsConfig, String> {
        let read = |file: &str| fs::read(file).map_err(|error| format!("cannot read {file}: {error}"));
        let builder = TlsConfig::builder();
        if !self.tls.is_on() {
            return Ok(builder.build());
        }
        let builder = builder.root_certs(RootCerts::new_with_certs(&certificates(&read(
            &self.tls.authority,
        )?)?));
        if self.tls.certificate.is_empty() {
            return Ok(builder.build());
        }
        let chain = certificates(&read(&self.tls.certificate)?)?;
        let key = PrivateKey::from_pem(&read(&self.tls.key)?).map_err(|error| error.to_string())?;
        let own = ClientCert::new_with_certs(&chain, key);
        Ok(builder.client_cert(Some(own)).build())
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<Certificate<'static>>, String> {
    let items: Result<Vec<PemItem<'static>>, ureq::Error> = parse_pem(pem).collect();
    let items = items.map_err(|error| error.to_string())?;
    let certificates = items.into_iter().filter_map(|item| match item {
        PemItem::Certificate(certificate) => Some(certificate),
        _ => None,
    });
    Ok(certificates.collect())
}
