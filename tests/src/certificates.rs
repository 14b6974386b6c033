//! Certificates for tests: an authority, and what it signs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

pub use rcgen::CertificateParams;
use rcgen::{BasicConstraints, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

const HOUR: Duration = Duration::from_secs(3600);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// Signs certificates, and puts them into a folder.
#[derive(Debug)]
pub struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// Files of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authority's certificate.
    pub authority: PathBuf,
}

impl Authority {
    /// A new one, whose own certificate is `authority.pem` in `folder`.
    ///
    /// # Panics
    ///
    /// If the folder cannot be written to.
    pub fn new(folder: &Path) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // What bears the name of its issuer counts as signed by itself.
        params
            .distinguished_name
            .push(DnType::CommonName, "authority of a test");
        let key = KeyPair::generate().expect("a key");
        let own = params.self_signed(&key).expect("signed");
        fs::write(folder.join("authority.pem"), own.pem()).expect("written");
        Self {
            folder: folder.to_owned(),
            issuer: Issuer::new(params, key),
        }
    }

    /// A certificate for a member that bears these names, good for a year. Replaces the one of the same `file`, as a secret that is
    /// mounted changes: at once.
    pub fn member(&self, file: &str, names: &[&str]) -> Files {
        self.issue(file, names, |_| {})
    }

    /// As [`Authority::member`], with something else about it.
    ///
    /// # Panics
    ///
    /// If it cannot be made.
    pub fn issue(&self, file: &str, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Files {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.not_before = (SystemTime::now() - HOUR).into();
        params.not_after = (SystemTime::now() + YEAR).into();
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let files = Files {
            certificate: self.folder.join(format!("{file}.pem")),
            key: self.folder.join(format!("{file}.key")),
            authority: self.folder.join("authority.pem"),
        };
        replace(&files.key, &key.serialize_pem());
        replace(&files.certificate, &certificate.pem());
        files
    }
}

/// Gives a certificate this much longer, from now on.
pub fn expires_in(params: &mut CertificateParams, time: Duration) {
    params.not_after = (SystemTime::now() + time).into();
}

/// Ends a certificate an hour ago.
pub fn expired(params: &mut CertificateParams) {
    params.not_before = (SystemTime::now() - HOUR * 48).into();
    params.not_after = (SystemTime::now() - HOUR).into();
}

impl Files {
    /// The settings of a process that serves and calls with them.
    pub fn settings(&self, name: &str) -> Vec<(String, String)> {
        let setting = |key: &str, value: String| (format!("PERIGEE_TLS__{key}"), value);
        vec![
            setting("CERTIFICATE", self.certificate.display().to_string()),
            setting("KEY", self.key.display().to_string()),
            setting("AUTHORITY", self.authority.display().to_string()),
            setting("NAME", name.to_owned()),
        ]
    }
}

/// Puts `text` into a file that others may be reading.
///
/// # Panics
///
/// If it cannot be written.
pub fn replace(path: &Path, text: &str) {
    let next = path.with_extension("next");
    fs::write(&next, text).expect("written");
    fs::rename(next, path).expect("renamed");
}
