//! Who is let in, over real processes: certificates of members, keys of clients, and what is said to everybody else.

#![allow(missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use node::{Connector, Tls, tls};
use proto::v1;
use proto::v1::node_client::NodeClient;
use serde_json::Value;
use tests::certificates::{Authority, Files, expired, expires_in, replace};
use tests::etcd::Etcd;
use tests::{Cluster, PATIENCE, Process, free_port, perigee, root, tiny, wait_for};

const NAME: &str = "members.test";
const NAMES: [&str; 3] = [NAME, "127.0.0.1", "localhost"];
const DAY: Duration = Duration::from_secs(24 * 3600);
const PROMPT: &str =
    "It was the best of times, it was the worst of times, it was the age of wisdom, and then it was not";

/// What a command printed, and how it ended.
struct Ended {
    code: i32,
    printed: String,
    complained: String,
}

impl Ended {
    fn json(&self) -> Value {
        let text = &self.printed;
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}{}", self.complained))
    }
}

fn run(arguments: &[&str], environment: &[(String, String)]) -> Ended {
    let output = Command::new(perigee())
        .args(arguments)
        .envs(environment.iter().cloned())
        .output()
        .expect("start");
    Ended {
        code: output.status.code().expect("no signal ended it"),
        printed: String::from_utf8(output.stdout).expect("UTF-8"),
        complained: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

fn curl(arguments: &[&str]) -> (i32, String) {
    let output = Command::new("curl")
        .args(["-s", "--max-time", "30"])
        .args(arguments)
        .output()
        .expect("curl");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code().expect("no signal ended it"), printed)
}

fn with(environment: &[(String, String)]) -> Vec<(&str, &str)> {
    environment
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect()
}

/// A client that trusts the cluster and is no member.
fn stranger(files: &Files) -> Vec<(String, String)> {
    let all = files.settings(NAME);
    all.into_iter()
        .filter(|(key, _)| key.ends_with("AUTHORITY") || key.ends_with("NAME"))
        .collect()
}

fn tls_of(files: &Files, member: bool) -> Tls {
    let path = |path: &Path| path.display().to_string();
    let (certificate, key) = match member {
        true => (path(&files.certificate), path(&files.key)),
        false => (String::new(), String::new()),
    };
    let config = tls::Config {
        certificate,
        key,
        authority: path(&files.authority),
        name: NAME.to_owned(),
    };
    Tls::load(&config).expect("good files")
}

/// A cluster that prefills apart from decoding, whatever the prompt's length.
fn start(folder: &Path, more: &[&str], environment: &[(String, String)]) -> Cluster {
    let arguments = [
        &[
            "--prefill",
            "1",
            "--decode",
            "1",
            "--set",
            "router.local_prefill_tokens_max=0",
        ],
        more,
    ]
    .concat();
    Cluster::start_with(&tiny(folder), &arguments, &with(environment))
}

/// The tokens of an answer, and the bytes of KV that moved for it.
fn generate(cluster: &Cluster, environment: &[(String, String)]) -> (Value, u64) {
    let router = cluster.ready.grpc.split_once("://").expect("a URL").1.to_owned();
    let arguments = [
        "generate",
        PROMPT,
        "--max-tokens",
        "8",
        "--ignore-eos",
        "-o",
        "json",
    ];
    let ended = run(&[&arguments[..], &["--router", &router]].concat(), environment);
    assert_eq!(ended.code, 0, "{}", ended.complained);
    let answer = ended.json();
    let bytes = answer["report"]["handoff_bytes"].as_u64().expect("a number");
    (answer["tokens"].clone(), bytes)
}

fn router_of(cluster: &Cluster) -> String {
    cluster.ready.grpc.split_once("://").expect("a URL").1.to_owned()
}

/// gRPC addresses of the nodes by role, as a member is told them.
fn endpoints(cluster: &Cluster, environment: &[(String, String)]) -> Vec<(String, String)> {
    let ended = run(
        &["node", "list", "-o", "json", "--router", &router_of(cluster)],
        environment,
    );
    assert_eq!(ended.code, 0, "{}", ended.complained);
    let nodes = ended.json();
    let nodes = nodes
        .as_array()
        .or_else(|| nodes["nodes"].as_array())
        .expect("a list")
        .clone();
    let text = |node: &Value, key: &str| {
        let found = [&node[key], &node["record"][key]];
        found
            .into_iter()
            .find_map(Value::as_str)
            .expect("text")
            .to_owned()
    };
    nodes
        .iter()
        .map(|node| (text(node, "role"), text(node, "grpc_endpoint")))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_over_mtls_answers_as_a_plain_one_does_and_lets_no_stranger_in() {
    let folder = tempfile::tempdir().expect("folder");
    let authority = Authority::new(folder.path());
    let files = authority.member("member", &NAMES);
    let (member, stranger) = (files.settings(NAME), stranger(&files));
    let plain = start(folder.path(), &[], &[]);
    let expected = generate(&plain, &[]);
    assert!(expected.1 > 0, "KV moved between two nodes");
    drop(plain);
    let cluster = start(folder.path(), &["--store", "1"], &member);
    assert!(cluster.ready.http.starts_with("https://"), "{:?}", cluster.ready);

    // A client needs no certificate.
    for environment in [&member, &stranger] {
        let (tokens, bytes) = generate(&cluster, environment);
        assert_eq!((&tokens, bytes > 0), (&expected.0, true));
    }
    let ca = files.authority.display().to_string();
    for (path, says) in [
        ("/v1/models", "\"tiny\""),
        ("/readyz", "true"),
        ("/metrics", "perigee_"),
    ] {
        let url = format!("{}{path}", cluster.ready.http);
        let (code, printed) = curl(&["-f", "--cacert", &ca, &url]);
        assert!(code == 0 && printed.contains(says), "{path}: {code} {printed}");
        let (code, _) = curl(&["-f", &url.replace("https", "http")]);
        assert_ne!(code, 0, "{path} is served without TLS");
    }

    // What shows or changes the cluster does.
    let router = router_of(&cluster);
    for arguments in [
        &["status"][..],
        &["route", "list"],
        &["cache", "stats"],
        &["node", "list"],
    ] {
        let arguments = [arguments, &["--router", &router]].concat();
        assert_eq!(run(&arguments, &member).code, 0, "{arguments:?}");
        let refused = run(&arguments, &stranger);
        assert_eq!(refused.code, 77, "{arguments:?}: {}", refused.complained);
        assert!(
            refused
                .complained
                .contains("a certificate of the cluster is needed"),
            "{}",
            refused.complained
        );
    }
    // Nodes serve nothing to a stranger.
    let endpoints = endpoints(&cluster, &member);
    let roles: Vec<&str> = endpoints.iter().map(|(role, _)| role.as_str()).collect();
    for role in ["prefill", "decode", "store"] {
        assert!(roles.contains(&role), "{roles:?}");
    }
    for (role, endpoint) in endpoints.iter().filter(|(role, _)| role != "router") {
        for (is_member, says) in [
            (true, None),
            (false, Some("demands a certificate of the cluster")),
        ] {
            let connector = Connector::new(Some(tls_of(&files, is_member)));
            let mut client = NodeClient::new(connector.channel(endpoint).expect("an address"));
            let refused = client.info(v1::InfoRequest {}).await.err();
            match says {
                None => assert!(refused.is_none(), "{role}: {refused:?}"),
                Some(says) => assert!(refused.expect("refused").message().contains(says), "{role}"),
            }
        }
    }
    let check = run(&["check", "-o", "json", "--router", &router], &member);
    assert_eq!(check.code, 0, "{}{}", check.printed, check.complained);
    assert!(
        check.printed.contains("is good for 364 days"),
        "{}",
        check.printed
    );
    let chat = [
        "check",
        "--router",
        &router,
        "--chat",
        &cluster.ready.http,
        "--chat-tokens",
        "8",
    ];
    let chat = run(&chat, &without_name(&member));
    assert_eq!(chat.code, 0, "{}{}", chat.printed, chat.complained);
    a_context_has_the_certificates(folder.path(), &router, &files);
}

/// What needs a certificate of the cluster over gRPC and over HTTP goes with a context alone.
fn a_context_has_the_certificates(folder: &Path, router: &str, files: &Files) {
    let path = |path: &Path| path.display().to_string();
    let environment = [("PERIGEE_CONTEXTS".to_owned(), path(&folder.join("contexts.toml")))];
    let (authority, certificate, key) = (path(&files.authority), path(&files.certificate), path(&files.key));
    let set = [
        &["context", "set", "members", "--router", router, "--use"][..],
        &["--tls-authority", &authority, "--tls-certificate", &certificate],
        &["--tls-key", &key, "--tls-name", NAME],
    ];
    let set = run(&set.concat(), &environment);
    assert_eq!(set.code, 0, "{}", set.complained);
    let to = path(&folder.join("bundle.tar.gz"));
    let bundle = run(&["debug", "bundle", "--to", &to, "-o", "json"], &environment);
    assert_eq!(
        bundle.json()["failed"],
        0,
        "{}{}",
        bundle.printed,
        bundle.complained
    );
}

/// The same, but for the name: addresses are borne, too.
fn without_name(environment: &[(String, String)]) -> Vec<(String, String)> {
    let named = environment.iter().filter(|(key, _)| !key.ends_with("NAME"));
    named.cloned().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn new_certificates_are_taken_up_by_every_process_without_a_restart() {
    let folder = tempfile::tempdir().expect("folder");
    let authority = Authority::new(folder.path());
    let until = |days| move |params: &mut _| expires_in(params, DAY * days);
    let files = authority.issue("member", &NAMES, until(20));
    let member = files.settings(NAME);
    let cluster = start(folder.path(), &[], &member);
    let expected = generate(&cluster, &member).0;
    let endpoints = endpoints(&cluster, &member);
    let operator = authority.member("operator", &NAMES);
    let shown = async |endpoint: &str| {
        let tls = tls_of(&operator, true);
        let expires = tls.peer_expires(endpoint).await.expect("a good certificate");
        let left = expires
            .expect("a date")
            .duration_since(SystemTime::now())
            .expect("not over");
        left.as_secs() / DAY.as_secs()
    };
    for (_, endpoint) in &endpoints {
        assert_eq!(shown(endpoint).await, 19, "{endpoint}");
    }
    authority.issue("member", &NAMES, until(90));
    let start = Instant::now();
    for (_, endpoint) in &endpoints {
        while shown(endpoint).await != 89 {
            assert!(start.elapsed() < PATIENCE, "{endpoint} shows the old certificate");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert_eq!(generate(&cluster, &member).0, expected);
}

#[test]
fn what_is_wrong_with_a_certificate_is_named_before_anything_serves() {
    let folder = tempfile::tempdir().expect("folder");
    let (elsewhere, model) = (tempfile::tempdir().expect("folder"), tiny(folder.path()));
    let authority = Authority::new(folder.path());
    let good = authority.member("good", &NAMES);
    let other_key = Files {
        key: authority.member("other", &NAMES).key,
        ..good.clone()
    };
    let other_authority = Files {
        authority: Authority::new(elsewhere.path()).member("x", &NAMES).authority,
        ..good.clone()
    };
    for (files, says, hint) in [
        (authority.issue("old", &NAMES, expired), "expired 1h", "renew it"),
        (other_key, "does not belong to the key", "made together"),
        (
            other_authority,
            "is not signed by tls.authority",
            "have it signed",
        ),
    ] {
        let settings = files.settings(NAME);
        let check = run(&["check", "--pre", "-o", "json"], &settings);
        assert_eq!(check.code, 10, "{}", check.complained);
        let findings = check.json()["findings"].clone();
        let findings = findings.as_array().expect("a list").iter();
        let found = findings
            .clone()
            .find(|finding| finding["group"] == "certificates")
            .expect("a finding");
        assert_eq!(found["level"], "failed");
        assert!(found["message"].as_str().expect("text").contains(says), "{found}");
        assert!(found["hint"].as_str().expect("text").contains(hint), "{found}");
        // Nothing starts with it.
        let model = model.display().to_string();
        let role = ["decode", "--model", &model, "--registry", "perigee://127.0.0.1:1"];
        let ended = run(&role, &settings);
        assert_eq!(ended.code, 64, "{}", ended.complained);
        assert!(ended.complained.contains(says), "{}", ended.complained);
    }
    let soon = authority.issue("soon", &NAMES, |params| expires_in(params, DAY * 14));
    let check = run(&["check", "--pre"], &soon.settings(NAME));
    assert_eq!(check.code, 0, "{}{}", check.printed, check.complained);
    assert!(check.printed.contains("expires in 13 days"), "{}", check.printed);
}

struct Keys {
    file: PathBuf,
}

impl Keys {
    /// Makes keys and lets them in: one of tenant `a`, and an administrator's.
    fn new(folder: &Path) -> (Self, String, String) {
        let (client, client_line) = made(&["--tenant", "a"]);
        let (admin, admin_line) = made(&["--admin"]);
        let file = folder.join("keys.toml");
        replace(&file, &format!("{client_line}\n{admin_line}\n"));
        (Self { file }, client, admin)
    }

    fn setting(&self) -> String {
        format!("router.api_keys_file={}", self.file.display())
    }
}

fn made(arguments: &[&str]) -> (String, String) {
    let ended = run(&[&["key", "new", "-o", "json"], arguments].concat(), &[]);
    assert_eq!(ended.code, 0, "{}", ended.complained);
    let made = ended.json();
    let text = |key: &str| made[key].as_str().expect("text").to_owned();
    (text("key"), text("line"))
}

#[test]
fn a_key_is_printed_once_with_the_line_that_lets_it_in() {
    let ended = run(&["key", "new", "--tenant", "a", "--expires-in", "90d"], &[]);
    assert_eq!(ended.code, 0, "{}", ended.complained);
    let lines: Vec<&str> = ended.printed.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(
        lines[0].starts_with("perigee-") && lines[0].len() == 72,
        "{}",
        lines[0]
    );
    assert!(lines[1].contains("tenant = \"a\", expires = 2"), "{}", lines[1]);
    assert!(!lines[1].contains(lines[0]));
    let (first, second) = (made(&["--tenant", "a"]), made(&["--tenant", "a"]));
    assert_ne!(first, second);
    assert_eq!(run(&["key", "new"], &[]).code, 64, "neither a tenant nor --admin");
}

#[test]
fn keys_decide_who_calls_and_as_which_tenant() {
    let folder = tempfile::tempdir().expect("folder");
    let (keys, client, admin) = Keys::new(folder.path());
    let mut cluster = start(folder.path(), &["--set", &keys.setting()], &[]);
    let router = router_of(&cluster);

    let script = root().join("tests/python/openai_keys.py");
    let output = Command::new(root().join(".venv/bin/python"))
        .arg(script)
        .args([&cluster.ready.http, &client])
        .output()
        .expect("start python");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let seen: Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    for own in ["own", "own_tenant"] {
        assert!(seen[own]["tokens"].as_u64() > Some(0), "{seen}");
    }
    assert_eq!(seen["other_tenant"]["error"], "PermissionDeniedError", "{seen}");
    assert_eq!(seen["wrong"]["error"], "AuthenticationError", "{seen}");
    assert_eq!(seen["wrong"]["code"], "invalid_api_key", "{seen}");

    let call = |arguments: &[&str], key: Option<&str>| {
        let key: Vec<(String, String)> = key
            .map(|key| ("PERIGEE_API_KEY".to_owned(), key.to_owned()))
            .into_iter()
            .collect();
        let ended = run(&[arguments, &["--router", &router]].concat(), &key);
        (ended.code, ended.complained)
    };
    let generate = ["generate", PROMPT, "--max-tokens", "2"];
    let of_b = ["generate", PROMPT, "--max-tokens", "2", "--tenant", "b"];
    for (arguments, key, code, says) in [
        (&generate[..], None, 77, "no API key was given"),
        (&generate, Some(&client), 0, ""),
        (&of_b, Some(&client), 77, "the API key is of tenant \"a\""),
        (&of_b, Some(&admin), 0, ""),
        (&["status"], None, 77, "an administrator's API key"),
        (&["status"], Some(&client), 77, "needs an administrator's"),
        (&["status"], Some(&admin), 0, ""),
        (&["route", "list"], Some(&client), 77, "needs an administrator's"),
        (
            &["node", "drain", "router"],
            Some(&client),
            77,
            "needs an administrator's",
        ),
        (&["check"], Some(&admin), 0, ""),
    ] {
        let (ended, complained) = call(arguments, key.map(String::as_str));
        assert_eq!(ended, code, "{arguments:?}: {complained}");
        assert!(complained.contains(says), "{arguments:?}: {complained}");
    }

    // A key that is taken out of the file counts no more, and one that is put in does, without a restart.
    let (new, line) = made(&["--tenant", "c"]);
    replace(&keys.file, &line);
    wait_for("the new key to count and the old one not to", || {
        let counts = |key: &str| call(&generate, Some(key)).0 == 0;
        (counts(&new) && !counts(&client)).then_some(())
    });
    // A file that cannot be read leaves the keys as they are.
    replace(&keys.file, "sk-in-the-clear = { tenant = \"a\" }");
    wait_for("the router to complain", || {
        cluster.up.log().contains("cannot be read again").then_some(())
    });
    assert_eq!(call(&generate, Some(&new)).0, 0);
    let log = cluster.up.log();
    for secret in [&client, &admin, &new, "sk-in-the-clear"] {
        assert!(!log.contains(secret), "a key is in the log");
    }
    assert!(cluster.up.alive());
}

#[test]
fn a_bad_file_of_keys_keeps_a_router_from_starting() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path()).display().to_string();
    let file = folder.path().join("keys.toml");
    fs::write(&file, "\nsk-in-the-clear = { tenant = \"a\" }").expect("written");
    let setting = format!("router.api_keys_file={}", file.display());
    let arguments = ["router", "--model", &model, "--set", &setting, "--check-config"];
    let ended = run(&arguments, &[]);
    assert_eq!(ended.code, 64, "{}", ended.complained);
    assert!(
        ended.complained.contains("line 2: what stands before ="),
        "{}",
        ended.complained
    );
    assert!(
        !ended.complained.contains("sk-in-the-clear"),
        "{}",
        ended.complained
    );
    let check = run(&["check", "--pre", "--set", &setting], &[]);
    assert_eq!(check.code, 10);
    assert!(check.printed.contains("perigee key new"), "{}", check.printed);
}

#[test]
fn members_of_an_etcd_over_tls_find_each_other() {
    let folder = tempfile::tempdir().expect("folder");
    let authority = Authority::new(folder.path());
    let files = authority.member("etcd", &["127.0.0.1", "localhost"]);
    let etcd = Etcd::start_over_tls(&files);
    let model = tiny(folder.path());
    let path = |path: &Path| path.display().to_string();
    let settings = [
        ("PERIGEE_REGISTRY__ETCD_AUTHORITY", path(&files.authority)),
        ("PERIGEE_REGISTRY__ETCD_CERTIFICATE", path(&files.certificate)),
        ("PERIGEE_REGISTRY__ETCD_KEY", path(&files.key)),
    ]
    .map(|(key, value)| (key.to_owned(), value));
    let url = etcd.url();
    let cluster = start(folder.path(), &["--registry", &url], &settings);
    assert!(generate(&cluster, &[]).1 > 0);

    // Whoever shows no certificate is told so, and does not hang.
    let port = free_port().to_string();
    let model = path(&model);
    let mut command = Command::new(perigee());
    command
        .args([
            "store",
            "--model",
            &model,
            "--registry",
            &url,
            "--grpc-port",
            &port,
        ])
        .args(["--set", "registry.connect_deadline=1s"])
        .envs(settings.iter().take(1).cloned());
    let mut stranger = Process::start(&mut command, folder.path(), "stranger");
    assert_eq!(stranger.wait(), Some(69), "{}", stranger.log());
    assert!(stranger.log().contains("cannot be reached"), "{}", stranger.log());
}
