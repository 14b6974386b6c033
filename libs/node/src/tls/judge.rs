//! What is wrong with a certificate, before a peer finds out. Pure.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, Error, RootCertStore};

use crate::config;

/// The end of the year 9999, which is as late as a certificate can say.
const END_OF_TIME: UnixTime = UnixTime::since_unix_epoch(Duration::from_secs(253_402_300_799));

/// What is wrong with a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Flaw {
    /// It was made for another key than the one in this file.
    OtherKey(String),
    /// Its time is over.
    Expired {
        /// Seconds since it was.
        since_s: u64,
    },
    /// Its time has not begun.
    NotYetValid,
    /// The authority did not sign it.
    UnknownAuthority,
    /// It does not bear the name of the cluster's members.
    OtherName(String),
    /// It may not be used for this.
    Purpose,
    /// Anything else.
    Other(String),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherKey(key) => write!(f, "does not belong to the key {key}"),
            Self::Expired { since_s } => write!(f, "expired {} ago", config::Duration::from_secs(*since_s)),
            Self::NotYetValid => f.write_str("is not valid yet: is this machine's clock right?"),
            Self::UnknownAuthority => f.write_str("is not signed by tls.authority"),
            Self::OtherName(name) => write!(f, "does not bear the name {name}, which is tls.name"),
            Self::Purpose => f.write_str(
                "is not for both servers and clients (extended key usage serverAuth and clientAuth)",
            ),
            Self::Other(reason) => write!(f, "cannot be used: {reason}"),
        }
    }
}

/// What is wrong with a member's own certificate, which comes first in `chain`: peers verify it both where they call it and where it
/// calls them.
pub(super) fn judge(
    chain: &[CertificateDer<'_>],
    roots: &Arc<RootCertStore>,
    name: Option<&ServerName<'_>>,
    now: UnixTime,
) -> Result<(), Flaw> {
    let flaw = |error: Error| flaw(&error, now);
    as_server(chain, roots, now).map_err(flaw)?;
    as_client(chain, roots, now).map_err(flaw)?;
    let (Some(name), Some(own)) = (name, chain.first()) else {
        return Ok(());
    };
    let own = ParsedCertificate::try_from(own).map_err(flaw)?;
    verify_server_name(&own, name).map_err(|_| Flaw::OtherName(name.to_str().into_owned()))
}

/// When a certificate expires; `None` if that cannot be told.
pub(super) fn expiry(chain: &[CertificateDer<'_>], roots: &RootCertStore) -> Option<UnixTime> {
    // The time is verified first, so the end of all times tells that of the certificate.
    match as_server(chain, roots, END_OF_TIME) {
        Err(Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. })) => Some(not_after),
        Ok(()) | Err(_) => None,
    }
}

fn as_server(chain: &[CertificateDer<'_>], roots: &RootCertStore, now: UnixTime) -> Result<(), Error> {
    let (own, between) = split(chain)?;
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
    let own = ParsedCertificate::try_from(own)?;
    verify_server_cert_signed_by_trust_anchor(&own, roots, between, now, algorithms.all)
}

fn as_client(chain: &[CertificateDer<'_>], roots: &Arc<RootCertStore>, now: UnixTime) -> Result<(), Error> {
    let (own, between) = split(chain)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider).build();
    let verifier = verifier.map_err(|error| Error::General(error.to_string()))?;
    verifier.verify_client_cert(own, between, now).map(|_| ())
}

fn split<'a, 'c>(
    chain: &'a [CertificateDer<'c>],
) -> Result<(&'a CertificateDer<'c>, &'a [CertificateDer<'c>]), Error> {
    chain.split_first().ok_or(Error::NoCertificatesPresented)
}

fn flaw(error: &Error, now: UnixTime) -> Flaw {
    let Error::InvalidCertificate(error) = error else {
        return Flaw::Other(error.to_string());
    };
    match error {
        CertificateError::Expired => Flaw::Expired { since_s: 0 },
        CertificateError::ExpiredContext { not_after, .. } => Flaw::Expired {
            since_s: now.as_secs().saturating_sub(not_after.as_secs()),
        },
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Flaw::NotYetValid,
        // What another authority of the same name signed has a bad signature.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Flaw::UnknownAuthority,
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => Flaw::Purpose,
        other => Flaw::Other(other.to_string()),
    }
}
