//! The admin commands over a real cluster that asks for keys: forms of output, contexts, watching, and what a debug bundle holds.

#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::Command;

use flate2::read::GzDecoder;
use nix::sys::signal::Signal;
use rstest::rstest;
use serde_json::Value;
use tests::{Cluster, Process, perigee, tiny, wait_for};

const TENANT: &str = "acme-of-the-test";
const PROMPT: &str = "It was the best of times, it was the worst of times, it was the age of wisdom";

/// Commands with contexts of their own.
struct Client {
    folder: tempfile::TempDir,
}

impl Client {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("folder"),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(perigee());
        command
            .args(arguments)
            .env("PERIGEE_CONTEXTS", self.folder.path().join("contexts.toml"))
            .env_remove("PERIGEE_ROUTER")
            .env_remove("PERIGEE_API_KEY");
        command
    }

    /// The exit code, and what was printed and complained of.
    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = self.command(arguments).output().expect("start");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        let code = output.status.code().expect("no signal ended it");
        (code, text(output.stdout), text(output.stderr))
    }

    fn print(&self, arguments: &[&str]) -> String {
        let (code, printed, complained) = self.run(arguments);
        assert_eq!(code, 0, "{arguments:?}: {complained}");
        printed
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let printed = self.print(&[arguments, &["-o", "json"]].concat());
        serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"))
    }
}

/// A cluster that asks for keys, the client whose current context reaches it as an administrator, and the administrator's key.
fn cluster(model: &Path) -> (Cluster, Client, String) {
    let client = Client::new();
    let folder = client.folder.path();
    let made = client.json(&["key", "new", "--admin"]);
    let key = made["key"].as_str().expect("a key").to_owned();
    let keys = folder.join("keys.toml");
    fs::write(&keys, made["line"].as_str().expect("a line")).expect("written");
    fs::write(folder.join("admin.key"), format!("{key}\n")).expect("written");
    let setting = format!("router.api_keys_file={}", keys.display());
    let arguments = ["--prefill", "1", "--decode", "1", "--set", &setting];
    let cluster = Cluster::start_with(model, &arguments, &[("PERIGEE_API_KEY", &key)]);
    let router = cluster.ready.grpc.trim_start_matches("http://").to_owned();
    let key_file = folder.join("admin.key").display().to_string();
    client.print(&[
        "context",
        "set",
        "here",
        "--router",
        &router,
        "--api-key-file",
        &key_file,
        "--use",
    ]);
    (cluster, client, key)
}

#[test]
fn a_context_reaches_a_cluster_that_asks_for_keys_and_every_form_says_the_same() {
    let folder = tempfile::tempdir().expect("folder");
    let (cluster, client, key) = cluster(&tiny(folder.path()));
    let contexts = client.print(&["context", "list", "-o", "wide"]);
    assert!(
        contexts.contains("admin.key") && !contexts.contains(&key),
        "{contexts}"
    );
    client.print(&["generate", PROMPT, "--tenant", TENANT, "--max-tokens", "3"]);

    let names = client.print(&["node", "list", "-o", "name"]);
    let mut names: Vec<&str> = names.lines().collect();
    names.retain(|name| *name != "router");
    names.sort_unstable();
    assert_eq!(names, ["decode-0", "prefill-0"]);
    let text = client.print(&["node", "list", "-o", "table"]);
    let wide = client.print(&["node", "list", "-o", "wide"]);
    assert!(
        wide.contains("TRANSFER") && !text.contains("TRANSFER"),
        "{wide}{text}"
    );
    assert!(!wide.contains('\x1b'), "colours are for terminals: {wide:?}");
    let yaml = client.print(&["node", "show", "decode-0", "-o", "yaml"]);
    assert!(yaml.starts_with("record:\n  id: decode-0\n"), "{yaml}");

    let models = client.json(&["model", "list"]);
    assert_eq!(
        models["served"][0]["nodes"].as_array().map(Vec::len),
        Some(2),
        "{models}"
    );
    assert!(models["served"][0]["block_tokens"].as_u64() > Some(0), "{models}");
    let tenants = client.print(&["tenant", "list", "-o", "name"]);
    assert_eq!(tenants, format!("{TENANT}\n"));
    let usage = client.json(&["tenant", "usage", TENANT]);
    assert!(usage.to_string().contains("cached_bytes"), "{usage}");

    // A router that is named is another cluster: it is not shown the current context's key.
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let (code, _, complained) = client.run(&["status", "--router", router]);
    assert_eq!(code, 77, "{complained}");
    client.print(&["status", "--router", router, "--context", "here"]);
    client.print(&["context", "delete", "here"]);
    let (code, _, complained) = client.run(&["status", "--context", "here"]);
    assert_eq!(code, 66, "{complained}");

    watched(&client, router, &key);
}

#[test]
fn a_quota_that_is_set_holds_on_every_node_and_takes_what_is_beyond() {
    let folder = tempfile::tempdir().expect("folder");
    let (_cluster, client, _) = cluster(&tiny(folder.path()));
    let prompt = "many words ".repeat(60);
    client.print(&["generate", &prompt, "--tenant", TENANT, "--max-tokens", "3"]);
    // What each node says: its bound, and what is cached there.
    let said = || {
        let usage = client.json(&["tenant", "usage", TENANT]);
        let nodes = usage["nodes"].as_array().expect("nodes").clone();
        let of = |node: &Value| {
            let tenant = &node["tenants"][0];
            (
                tenant["bytes_max"].as_u64(),
                tenant["cached_bytes"].as_u64().unwrap_or(0),
            )
        };
        nodes.iter().map(of).collect::<Vec<_>>()
    };
    let before = said();
    assert_eq!(before.len(), 2);
    assert!(before.iter().all(|(max, _)| max.is_none()), "{before:?}");
    let most = before.iter().map(|(_, cached)| *cached).max().expect("two");
    assert!(most > 64 << 10, "{before:?}");

    let set = client.json(&[
        "tenant",
        "set-quota",
        TENANT,
        "--bytes-max",
        "64KiB",
        "--weight",
        "3",
    ]);
    assert_eq!((&set["bytes_max"], &set["weight"]), (&65536.into(), &3.into()));
    wait_for("every node to do as it is told", || {
        let bounded =
            |(max, cached): &(Option<u64>, u64)| max.is_some_and(|max| max <= 64 << 10 && *cached <= max);
        said().iter().all(bounded).then_some(())
    });
    let set = client.json(&["tenant", "set-quota", TENANT, "--weight", "2"]);
    assert_eq!(set["bytes_max"], 65536, "what is not named stays");
    client.print(&["tenant", "set-quota", TENANT, "--reset"]);
    wait_for("the settings to hold again", || {
        said().iter().all(|(max, _)| max.is_none()).then_some(())
    });
    let (code, _, complained) = client.run(&["tenant", "set-quota", TENANT]);
    assert_eq!(code, 64, "there is nothing to do: {complained}");
}

/// Ends at Ctrl-C without a failure, after a document per tick.
fn watched(client: &Client, router: &str, key: &str) {
    let arguments = ["status", "-o", "json", "--watch", "100ms", "--router", router];
    let mut command = client.command(&arguments);
    let mut process = Process::start(command.env("PERIGEE_API_KEY", key), client.folder.path(), "watch");
    for _ in 0..2 {
        let line = process.line();
        let status: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(status["nodes"].is_array(), "{status}");
    }
    process.signal(Signal::SIGINT);
    assert_eq!(process.wait(), Some(0), "{}", process.log());
}

/// The files of an archive.
fn unpacked(path: &Path) -> BTreeMap<String, String> {
    let mut archive = tar::Archive::new(GzDecoder::new(File::open(path).expect("the bundle")));
    let entries = archive.entries().expect("entries");
    let read = entries.map(|entry| {
        let mut entry = entry.expect("an entry");
        let name = entry.path().expect("a name").display().to_string();
        let mut text = String::new();
        entry.read_to_string(&mut text).expect("text");
        (name.trim_start_matches("perigee-debug/").to_owned(), text)
    });
    read.collect()
}

#[test]
fn a_debug_bundle_has_all_parts_and_neither_keys_nor_prompts_nor_tenants() {
    let folder = tempfile::tempdir().expect("folder");
    let (mut cluster, client, key) = cluster(&tiny(folder.path()));
    client.print(&["generate", PROMPT, "--tenant", TENANT, "--max-tokens", "3"]);
    let file = folder.path().join("bundle.tar.gz");
    let to = file.display().to_string();
    let bundled = client.json(&["debug", "bundle", "--to", &to]);
    let files = unpacked(&file);
    assert_eq!(bundled["failed"], 0, "{:?}", files.get("errors.txt"));
    for name in [
        "version.txt",
        "config.json",
        "check.json",
        "status.json",
        "requests.json",
        "route-explain.json",
        "transfers.json",
        "cache-stats.json",
        "nodes/decode-0.json",
        "nodes/prefill-0.json",
        "metrics/decode-0.txt",
        "metrics/prefill-0.txt",
    ] {
        assert!(files.contains_key(name), "{name} is missing: {:?}", files.keys());
    }
    for (name, text) in &files {
        for secret in [key.as_str(), TENANT, "best of times"] {
            assert!(!text.contains(secret), "{name} has {secret}: {text}");
        }
    }
    assert!(
        files["requests.json"].contains("\"tenant\": \"tenant-"),
        "{}",
        files["requests.json"]
    );
    assert!(files["metrics/decode-0.txt"].contains("perigee_decode_"));
    let (code, _, complained) = client.run(&["debug", "bundle", "--to", &to]);
    assert_eq!(code, 73, "a file that is there is kept: {complained}");

    let kept = folder.path().join("kept.tar.gz");
    client.print(&[
        "debug",
        "bundle",
        "--keep-tenants",
        "--to",
        &kept.display().to_string(),
    ]);
    assert!(unpacked(&kept)["requests.json"].contains(TENANT));

    // What is left of a cluster that is gone is written, too.
    cluster.up.signal(Signal::SIGTERM);
    cluster.up.wait();
    let gone = folder.path().join("gone.tar.gz");
    let bundled = client.json(&["debug", "bundle", "--to", &gone.display().to_string()]);
    assert!(bundled["failed"].as_u64() > Some(0), "{bundled}");
    let files = unpacked(&gone);
    assert!(
        files["errors.txt"].contains("status.json: "),
        "{}",
        files["errors.txt"]
    );
    assert!(files.contains_key("config.json"), "{:?}", files.keys());
    assert!(!files["errors.txt"].contains(&key));
}

#[rstest]
#[case::names_of_what_has_none(&["config", "-o", "name"], 64)]
#[case::unknown_form(&["status", "-o", "xml"], 64)]
#[case::watched_too_often(&["status", "--watch", "99ms"], 64)]
#[case::nothing_to_watch(&["key", "new", "--admin", "--watch"], 64)]
#[case::unknown_context(&["status", "--context", "nowhere"], 66)]
#[case::unnameable_context(&["context", "set", "a b"], 64)]
#[case::unknown_shell(&["completions", "tcsh"], 64)]
#[case::missing_file(&["config", "diff", "--other", "/nonexistent.toml"], 66)]
fn a_bad_admin_command_ends_with_a_code_that_says_so(#[case] arguments: &[&str], #[case] expected: i32) {
    let (code, printed, complained) = Client::new().run(arguments);
    assert_eq!((code, printed.as_str()), (expected, ""), "{complained}");
    assert!(!complained.is_empty());
}

#[test]
fn a_file_of_contexts_with_an_unknown_key_is_refused_by_its_name() {
    let client = Client::new();
    fs::write(
        client.folder.path().join("contexts.toml"),
        "[contexts.a]\nruoter = \"x\"\n",
    )
    .expect("written");
    let (code, _, complained) = client.run(&["context", "list"]);
    assert!(
        code == 64 && complained.contains("ruoter"),
        "{code}: {complained}"
    );
}

#[test]
fn settings_are_compared_with_the_defaults_and_with_a_file() {
    let client = Client::new();
    let file = client.folder.path().join("perigee.toml");
    fs::write(&file, "[kv]\nblock_tokens = 64\n").expect("written");
    let file = file.display().to_string();
    assert_eq!(client.print(&["config"]), client.print(&["config", "view"]));
    assert_eq!(client.print(&["config", "diff", "-o", "name"]), "");
    let set = ["config", "diff", "--block-tokens", "64", "-o", "name"];
    assert_eq!(client.print(&set), "kv.block_tokens\n");
    assert_eq!(client.print(&[&set[..], &["--other", &file]].concat()), "");
    let differences = client.json(&["config", "diff", "--config", &file]);
    let difference = &differences["differences"][0];
    assert_eq!(
        (&difference["theirs"], &difference["ours"]),
        (&32.into(), &64.into())
    );
    assert!(
        difference["source"]
            .as_str()
            .expect("text")
            .ends_with("perigee.toml")
    );
}
