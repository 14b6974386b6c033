use std::fs;
use std::path::{Path, PathBuf};

use proto::v1;
use proto::v1::node_client::NodeClient;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, date_time_ymd,
};
use rstest::rstest;
use tempfile::TempDir;
use tokio::time::Instant;

use super::*;
use crate::Connector;
use crate::service::tests::{IdleNode, idle_node_over};

/// Longer than anything here takes; a test that waits for it has failed.
const PATIENCE: Duration = Duration::from_secs(60);
const NAME: &str = "members.test";

/// Signs certificates, and keeps them in a folder.
struct Authority {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let folder = tempfile::tempdir().expect("a folder");
        let own = params.self_signed(&key).expect("signed");
        fs::write(folder.path().join("authority.pem"), own.pem()).expect("written");
        Self {
            folder,
            issuer: Issuer::new(params, key),
        }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// Makes `NAME.pem` and `NAME.key`, and settings of them.
    fn issue(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Config {
        let names = vec![NAME.to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).expect("names");
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2120, 1, 1);
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        replace(&self.path(&format!("{name}.key")), &key.serialize_pem());
        replace(&self.path(&format!("{name}.pem")), &certificate.pem());
        let path = |file: &str| self.path(file).display().to_string();
        Config {
            certificate: path(&format!("{name}.pem")),
            key: path(&format!("{name}.key")),
            authority: path("authority.pem"),
            name: String::new(),
        }
    }

    fn member(&self, name: &str) -> Config {
        self.issue(name, |_| {})
    }
}

/// As a secret that is mounted changes: at once.
fn replace(path: &Path, text: &str) {
    let next = path.with_extension("next");
    fs::write(&next, text).expect("written");
    fs::rename(next, path).expect("renamed");
}

/// A node that reads its files again, until it is dropped.
async fn serve(tls: Option<Tls>, clients: ClientCertificates) -> IdleNode {
    let node = idle_node_over(tls.clone(), clients).await;
    if let Some(tls) = tls {
        tokio::spawn(tls.follow(node.shutdown.clone()));
    }
    node
}

async fn ask(node: &IdleNode, tls: Option<Tls>) -> Result<(), Error> {
    ask_at(&node.address.to_string(), tls).await
}

async fn ask_at(endpoint: &str, tls: Option<Tls>) -> Result<(), Error> {
    let channel = Connector::new(tls).channel(endpoint).expect("an address");
    let mut client = NodeClient::new(channel);
    let answer = tokio::time::timeout(PATIENCE, client.info(v1::InfoRequest {})).await;
    let answer = answer.expect("an answer in time");
    answer
        .map(|_| ())
        .map_err(|status| proto::status::from_status(&status))
}

async fn shown(tls: &Tls, node: &IdleNode) -> Result<Option<SystemTime>, Error> {
    tls.peer_expires(&node.address.to_string()).await
}

fn load(config: &Config) -> Tls {
    Tls::load(config).unwrap_or_else(|error| panic!("{error}"))
}

/// Without the checks that keep a process with such a certificate from starting.
fn load_anyway(config: &Config) -> Tls {
    let contents = reload::read(&config.paths()).expect("readable");
    let material = Material::read(config, &contents).expect("fits together");
    Tls {
        shared: Arc::new(Shared {
            name: config.server_name().expect("a name"),
            config: config.clone(),
            material: RwLock::new((contents, material)),
        }),
    }
}

#[rstest]
#[case(ClientCertificates::Required)]
#[case(ClientCertificates::Optional)]
#[tokio::test]
async fn members_reach_each_other(#[case] clients: ClientCertificates) {
    let authority = Authority::new();
    let served = serve(Some(load(&authority.member("one"))), clients).await;
    ask(&served, Some(load(&authority.member("two"))))
        .await
        .expect("answered");
}

#[tokio::test]
async fn who_shows_no_certificate_is_refused_and_told_what_to_do() {
    let authority = Authority::new();
    let stranger = Config {
        authority: authority.path("authority.pem").display().to_string(),
        ..Config::default()
    };
    let demanding = serve(Some(load(&authority.member("one"))), ClientCertificates::Required).await;
    let error = ask(&demanding, Some(load(&stranger))).await.expect_err("refused");
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(
        error.message.contains("demands a certificate of the cluster"),
        "{error}"
    );
    let open = serve(Some(load(&authority.member("two"))), ClientCertificates::Optional).await;
    ask(&open, Some(load(&stranger))).await.expect("answered");
}

#[tokio::test]
async fn what_another_authority_signed_is_refused_on_both_sides() {
    let (authority, other) = (Authority::new(), Authority::new());
    let served = serve(Some(load(&authority.member("one"))), ClientCertificates::Optional).await;
    let error = ask(&served, Some(load(&other.member("two")))).await;
    let error = error.expect_err("the server is a stranger");
    assert!(
        error.message.contains("is not signed by tls.authority"),
        "{error}"
    );
    // One that trusts the server, and shows what the server does not trust.
    let mixed = Config {
        authority: authority.path("authority.pem").display().to_string(),
        ..other.member("three")
    };
    let error = ask(&served, Some(load_anyway(&mixed))).await;
    let error = error.expect_err("the client is a stranger");
    assert!(error.message.contains("does not trust the authority"), "{error}");
}

#[tokio::test]
async fn a_server_whose_certificate_has_expired_is_refused_by_name() {
    let authority = Authority::new();
    let expired = authority.issue("old", |params| params.not_after = date_time_ymd(2021, 1, 1));
    let served = serve(Some(load_anyway(&expired)), ClientCertificates::Required).await;
    let tls = load(&authority.member("two"));
    let error = ask(&served, Some(tls.clone())).await.expect_err("refused");
    assert!(error.message.contains("has expired"), "{error}");
    let error = shown(&tls, &served).await.expect_err("refused");
    assert!(error.message.contains("has expired"), "{error}");
}

#[tokio::test]
async fn a_name_of_all_members_stands_for_their_addresses() {
    let authority = Authority::new();
    let nowhere = |params: &mut CertificateParams| {
        params.subject_alt_names = vec![rcgen::SanType::DnsName(NAME.try_into().expect("ASCII"))];
    };
    let one = authority.issue("one", nowhere);
    let served = serve(Some(load(&one)), ClientCertificates::Required).await;
    let error = ask(&served, Some(load(&one))).await.expect_err("by address");
    assert!(
        error.message.contains("does not bear the name 127.0.0.1"),
        "{error}"
    );
    let named = Config {
        name: NAME.to_owned(),
        ..one
    };
    ask(&served, Some(load(&named))).await.expect("by name");
}

#[tokio::test]
async fn who_has_tls_and_who_has_none_are_told_apart() {
    let authority = Authority::new();
    let tls = load(&authority.member("one"));
    let plain = serve(None, ClientCertificates::Required).await;
    let error = ask(&plain, Some(tls.clone())).await.expect_err("no TLS there");
    assert!(error.message.contains("does not speak TLS"), "{error}");
    let served = serve(Some(tls.clone()), ClientCertificates::Required).await;
    ask(&served, None).await.expect_err("no TLS here");
    let downgrade = Connector::new(Some(tls)).channel(&format!("http://{}", served.address));
    assert_eq!(
        downgrade.map(|_| ()).expect_err("refused").code,
        ErrorCode::Invalid
    );
}

#[tokio::test]
async fn a_client_that_never_finishes_its_handshake_holds_up_nobody() {
    let authority = Authority::new();
    let tls = load(&authority.member("one"));
    let served = serve(Some(tls.clone()), ClientCertificates::Required).await;
    let mut silent = Vec::new();
    for _ in 0..32 {
        silent.push(
            tokio::net::TcpStream::connect(served.address)
                .await
                .expect("accepted"),
        );
    }
    ask(&served, Some(tls)).await.expect("answered");
}

#[tokio::test]
async fn a_new_certificate_is_taken_up_without_a_restart_and_a_bad_one_is_not() {
    let authority = Authority::new();
    let until = |year| move |params: &mut CertificateParams| params.not_after = date_time_ymd(year, 1, 1);
    let config = authority.issue("one", until(2100));
    let served = serve(Some(load(&config)), ClientCertificates::Required).await;
    let client = load(&authority.member("client"));
    let before = shown(&client, &served).await.expect("good");
    assert_eq!(before, load(&config).expires());

    // What does not fit together is not taken up, so that every connection meets the old one or the new one.
    let stray = KeyPair::generate().expect("a key").serialize_pem();
    replace(&authority.path("one.key"), &stray);
    let renewed = load(&authority.issue("one", until(2110))).expires();
    assert_ne!(renewed, before);
    let start = Instant::now();
    loop {
        let now = shown(&client, &served).await.expect("good");
        if now == renewed {
            break;
        }
        assert_eq!(now, before);
        assert!(start.elapsed() < PATIENCE, "the new certificate is not shown");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[test]
fn each_flaw_of_a_certificate_is_named_before_anything_starts() {
    let (authority, other) = (Authority::new(), Authority::new());
    let flawed = |name: &str, change: fn(&mut CertificateParams)| authority.issue(name, change);
    let good = authority.member("good");
    let cases = [
        (
            Config {
                key: flawed("other", |_| {}).key,
                ..good.clone()
            },
            "does not belong to the key",
        ),
        (
            flawed("expired", |params| params.not_after = date_time_ymd(2021, 1, 1)),
            "expired ",
        ),
        (
            flawed("early", |params| params.not_before = date_time_ymd(2110, 1, 1)),
            "is not valid yet",
        ),
        (
            Config {
                authority: other.path("authority.pem").display().to_string(),
                ..good.clone()
            },
            "is not signed by tls.authority",
        ),
        (
            Config {
                name: "others.test".to_owned(),
                ..good.clone()
            },
            "does not bear the name others.test",
        ),
        (
            flawed("server", |params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            }),
            "is not for both",
        ),
    ];
    for (config, says) in cases {
        let error = Tls::load(&config).expect_err(says);
        assert_eq!(error.code(), ErrorCode::Invalid);
        assert!(error.to_string().contains(says), "{error}");
    }
    load(&good);
}

#[test]
fn files_that_are_missing_or_hold_something_else_are_named() {
    let authority = Authority::new();
    let good = authority.member("good");
    let with = |change: fn(&mut Config)| {
        let mut config = good.clone();
        change(&mut config);
        config
    };
    let cases = [
        (
            with(|config| config.key.clear()),
            "tls.key is not set, but tls.certificate is",
        ),
        (
            with(|config| config.certificate.clear()),
            "tls.certificate is not set, but tls.key is",
        ),
        (
            with(|config| config.authority.clear()),
            "tls.authority is not set, but tls.certificate is",
        ),
        (
            with(|config| config.key = "/nowhere".to_owned()),
            "cannot read /nowhere",
        ),
        (
            with(|config| config.certificate.clone_from(&config.key)),
            "holds no certificate in PEM",
        ),
        (
            with(|config| config.key.clone_from(&config.authority)),
            "holds no private key in PEM",
        ),
        (
            with(|config| config.name = "no name".to_owned()),
            "which is no host name",
        ),
    ];
    for (config, says) in cases {
        let error = Tls::load(&config).expect_err(says);
        assert!(error.to_string().contains(says), "{error}");
    }
    let client = with(|config| {
        config.certificate.clear();
        config.key.clear();
    });
    client.validate().expect("enough for a client");
    client
        .validate_server()
        .expect_err("a server needs a certificate");
    assert!(!Config::default().is_on());
}

#[tokio::test]
async fn the_machines_own_authorities_do_not_vouch_for_a_cluster() {
    let authority = Authority::new();
    let served = serve(Some(load(&authority.member("one"))), ClientCertificates::Optional).await;
    let error = ask_at(&format!("https://{}", served.address), None).await;
    let error = error.expect_err("unknown");
    assert!(error.message.contains("is not signed by"), "{error}");
}
