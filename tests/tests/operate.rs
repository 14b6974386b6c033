//! What an operator sees: status, nodes, metrics, health.

#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use engine::fixture::{TinyModel, write_tiny_gguf};
use serde_json::Value;
use tests::{Cluster, perigee, root};

fn tiny(folder: &Path) -> PathBuf {
    let path = folder.join("tiny.gguf");
    write_tiny_gguf(&path, &TinyModel::default()).expect("write the model");
    path
}

fn run(arguments: &[&str]) -> String {
    let output = Command::new(perigee()).args(arguments).output().expect("start");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn get(url: &str) -> String {
    let output = Command::new("curl").args(["-sf", url]).output().expect("curl");
    assert!(output.status.success(), "{url}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn the_cluster_can_be_looked_at_as_text_and_as_json() {
    let folder = tempfile::tempdir().expect("folder");
    // Metrics by label only show once they have been counted, so a handoff must happen.
    let arguments = [
        "--prefill",
        "1",
        "--decode",
        "2",
        "--store",
        "1",
        "--set",
        "router.local_prefill_tokens_max=0",
    ];
    let cluster = Cluster::start(&tiny(folder.path()), &arguments);
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let generated: Value = serde_json::from_str(&run(&[
        "generate",
        "hello there",
        "--max-tokens",
        "5",
        "-o",
        "json",
        "--router",
        router,
    ]))
    .expect("JSON");
    assert!(generated["usage"]["completion_tokens"].as_u64().expect("count") >= 1);
    assert!(
        generated["report"]["decode_node"]
            .as_str()
            .expect("name")
            .starts_with("decode-")
    );

    let status: Value =
        serde_json::from_str(&run(&["status", "-o", "json", "--router", router])).expect("JSON");
    let nodes = status["nodes"].as_array().expect("nodes");
    let roles = |role: &str| nodes.iter().filter(|node| node["record"]["role"] == role).count();
    assert_eq!(
        (roles("prefill"), roles("decode"), roles("store")),
        (1, 2, 1),
        "{status}"
    );
    for text in [
        run(&["status", "--router", router]),
        run(&["node", "list", "--router", router]),
    ] {
        for id in ["prefill-0", "decode-0", "decode-1", "store-0"] {
            assert!(text.contains(id), "{text}");
        }
        assert!(text.contains("ready"), "{text}");
    }

    for node in nodes {
        let http = node["record"]["http_endpoint"].as_str().expect("endpoint");
        assert_eq!(get(&format!("http://{http}/livez")), "ok\n");
        let ready: Value = serde_json::from_str(&get(&format!("http://{http}/readyz"))).expect("JSON");
        assert_eq!(ready["ready"], true, "{ready}");
    }
    let pages = nodes.iter().map(|node| {
        node["record"]["http_endpoint"]
            .as_str()
            .expect("endpoint")
            .to_owned()
    });
    let pages = pages.chain([cluster.ready.http.trim_start_matches("http://").to_owned()]);
    let pages: Vec<String> = pages.map(|http| get(&format!("http://{http}/metrics"))).collect();
    documented(&pages);
}

/// `docs/metrics.md` is the list of what the roles really show. Refresh it with `PERIGEE_UPDATE_GOLDEN=1`.
fn documented(pages: &[String]) {
    let mut metrics: BTreeMap<String, (String, String)> = BTreeMap::new();
    for line in pages.iter().flat_map(|page| page.lines()) {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            metrics.entry(name.to_owned()).or_default().1 = help.trim_end_matches('.').to_owned();
        }
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            metrics.entry(name.to_owned()).or_default().0 = kind.to_owned();
        }
    }
    for role in ["router", "prefill", "decode", "kvstore"] {
        assert!(
            metrics
                .keys()
                .any(|name| name.starts_with(&format!("perigee_{role}_"))),
            "{role} shows nothing"
        );
    }
    let mut page = String::from(
        "# Metrics\n\nEvery process shows its own at `/metrics` in the OpenMetrics text format. Counters end in `_total` there.\n\n\
        | metric | kind | what it says |\n|---|---|---|\n",
    );
    for (name, (kind, help)) in metrics {
        writeln!(page, "| `{name}` | {kind} | {help} |").expect("write");
    }
    let path = root().join("docs/metrics.md");
    if std::env::var_os("PERIGEE_UPDATE_GOLDEN").is_some() {
        fs::write(&path, &page).expect("write");
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == page,
        "docs/metrics.md is not what the roles show: PERIGEE_UPDATE_GOLDEN=1\n{page}"
    );
}
