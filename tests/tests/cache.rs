//! `perigee cache` and what nodes hold for each other, over real processes.

#![allow(missing_docs)]

use std::path::PathBuf;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use tests::{Cluster, perigee, tiny, wait_for};
use types::ErrorCode;

/// A cluster whose prompts are all prefilled apart, its model, and the folder that this is in.
fn cluster() -> (Cluster, PathBuf, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let nodes = ["--prefill", "1", "--decode", "1", "--store", "1"];
    let apart = ["--set", "router.local_prefill_tokens_max=0"];
    let cluster = Cluster::start(&model, &[&nodes[..], &apart].concat());
    (cluster, model, folder)
}

/// The exit code and what was printed, as JSON where it is.
fn perigee_cache(cluster: &Cluster, arguments: &[&str]) -> (i32, Value) {
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let output = Command::new(perigee())
        .arg("cache")
        .args(arguments)
        .args(["-o", "json", "--router", router])
        .output()
        .expect("start");
    let code = output.status.code().expect("no signal ended it");
    let printed = String::from_utf8(output.stdout).expect("UTF-8");
    let said = serde_json::from_str(&printed)
        .unwrap_or_else(|_| Value::String(format!("{printed}{}", String::from_utf8_lossy(&output.stderr))));
    (code, said)
}

fn done(cluster: &Cluster, arguments: &[&str]) -> Value {
    let (code, said) = perigee_cache(cluster, arguments);
    assert_eq!(code, 0, "{arguments:?}: {said}");
    said
}

fn generate(cluster: &Cluster, prompt: &str) {
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let output = Command::new(perigee())
        .args([
            "generate",
            "--max-tokens",
            "2",
            "--ignore-eos",
            "--router",
            router,
            prompt,
        ])
        .output()
        .expect("start");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Blocks of the prompt that each node holds, by its name.
fn held(cluster: &Cluster, prompt: &[&str], node: &str) -> u64 {
    let located = done(cluster, &[&["locate"], prompt].concat());
    let mut nodes = located["nodes"].as_array().expect("nodes").iter();
    let found = nodes.find(|found| found["id"] == node);
    found.map_or(0, |found| found["held_blocks"].as_u64().expect("a number"))
}

/// Waits until the prompt is at the node that prefilled it. Returns its blocks.
fn cached(cluster: &Cluster, prompt: &[&str]) -> u64 {
    wait_for("the prompt to be cached", || {
        match held(cluster, prompt, "prefill-0") {
            0 => None,
            blocks => Some(blocks),
        }
    })
}

#[test]
fn prompts_can_be_found_kept_moved_dropped_and_carried_in_files() {
    let (cluster, model, folder) = cluster();
    let text = "a b c d ".repeat(60);
    generate(&cluster, &text);
    let model = model.display().to_string();
    let prompt = ["--text", &text, "--model", &model];
    let blocks = cached(&cluster, &prompt);
    let located = done(&cluster, &[&["locate"], &prompt[..]].concat());
    let hashes: Vec<&str> = located["hashes"]
        .as_array()
        .expect("hashes")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    assert!(hashes.len() as u64 >= blocks);
    let hashes = hashes.join(",");
    let by_hashes = ["--hashes", &hashes];
    assert_eq!(held(&cluster, &by_hashes, "prefill-0"), blocks);

    let stats = done(&cluster, &["stats"]);
    assert_eq!(stats["nodes"].as_array().expect("nodes").len(), 3, "{stats}");
    let top = done(&cluster, &["top", "-n", "5", "--node", "prefill-0"]);
    assert!(!top["blocks"].as_array().expect("blocks").is_empty(), "{top}");

    let pinned = done(
        &cluster,
        &[&["pin", "--node", "prefill-0", "--ttl", "1h"], &by_hashes[..]].concat(),
    );
    assert_eq!(pinned["pinned_blocks"], blocks);
    let evict = [&["evict", "--yes", "--node", "prefill-0"], &by_hashes[..]].concat();
    assert_eq!(done(&cluster, &evict)["nodes"][0]["kept_blocks"], blocks);
    let pins = done(&cluster, &["pins"]);
    assert_eq!(pins["pins"][0]["blocks"], blocks, "{pins}");

    let warmed = done(
        &cluster,
        &[
            &["warm", "--to", "store-0", "--from", "prefill-0"],
            &by_hashes[..],
        ]
        .concat(),
    );
    assert_eq!(warmed["held_blocks"], blocks, "{warmed}");
    assert_eq!(held(&cluster, &by_hashes, "store-0"), blocks);
    let verified = done(&cluster, &["verify"]);
    assert_eq!(verified["nodes"][2]["corrupt_blocks"], 0, "{verified}");

    let file = folder.path().join("prompt.kv").display().to_string();
    let exported = done(
        &cluster,
        &[&["export", &file, "--node", "store-0"], &by_hashes[..]].concat(),
    );
    assert_eq!(exported["blocks"], blocks, "{exported}");
    let (code, _) = perigee_cache(&cluster, &[&["export", &file], &by_hashes[..]].concat());
    assert_eq!(
        code,
        i32::from(ErrorCode::Conflict.exit()),
        "no file is overwritten"
    );
    let all = ["evict", "--all", "--yes", "--node", "store-0"];
    done(&cluster, &all);
    assert_eq!(held(&cluster, &by_hashes, "store-0"), 0);
    let imported = done(&cluster, &["import", &file, "--node", "store-0"]);
    assert_eq!(imported["imported_blocks"], blocks, "{imported}");
    let mut bytes = std::fs::read(&file).expect("read");
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(&file, bytes).expect("write");
    done(&cluster, &all);
    let (code, said) = perigee_cache(&cluster, &["import", &file, "--node", "store-0"]);
    assert_eq!(code, i32::from(ErrorCode::Corrupt.exit()), "{said}");

    let pin_id = pinned["pin_id"].to_string();
    done(&cluster, &["unpin", &pin_id, "--node", "prefill-0"]);
    assert_eq!(done(&cluster, &evict)["nodes"][0]["kept_blocks"], 0);
    let (code, _) = perigee_cache(&cluster, &["evict", "--all"]);
    assert_eq!(code, i32::from(ErrorCode::Invalid.exit()), "nobody confirmed");
}

#[test]
fn a_node_that_is_told_to_end_leaves_its_blocks_with_its_peers() {
    let (cluster, model, _folder) = cluster();
    let text = "e f g h ".repeat(60);
    generate(&cluster, &text);
    let model = model.display().to_string();
    let prompt = ["--text", &text, "--model", &model];
    let blocks = cached(&cluster, &prompt);
    // Only the node that ends shall have it.
    done(
        &cluster,
        &[&["evict", "--yes", "--node", "decode-0"], &prompt[..]].concat(),
    );
    assert_eq!(
        held(&cluster, &prompt, "decode-0") + held(&cluster, &prompt, "store-0"),
        0
    );
    kill(cluster.pids("prefill")[0], Signal::SIGTERM).expect("it lives");
    wait_for("a peer to hold the prompt", || {
        let most = held(&cluster, &prompt, "decode-0").max(held(&cluster, &prompt, "store-0"));
        (most == blocks).then_some(())
    });
}
