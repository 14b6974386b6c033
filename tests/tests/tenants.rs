//! Tenants of one cluster: what they cannot read of each other, and what they may have. Over real processes.

#![allow(missing_docs)]

use std::process::Command;

use engine::fixture::{TinyModel, write_tiny_gguf};
use proto::v1;
use serde_json::Value;
use tests::{Cluster, Generated, generate, perigee, request, wait_for, wait_for_index};
use types::Token;

const BLOCK_TOKENS: u64 = 32;
/// Full blocks of every prompt here.
const BLOCKS: u64 = 6;
/// Blocks that the tenant with a quota may have on each node.
const QUOTA_BLOCKS: u64 = 4;

/// Different for every seed, and within the tiny model's vocabulary.
fn prompt(seed: u32) -> Vec<Token> {
    let tokens = BLOCKS * BLOCK_TOKENS + 5;
    (0..tokens as u32).map(|i| 3 + (i * 7 + seed * 13) % 60).collect()
}

async fn ask(cluster: &Cluster, tenant: &str, seed: u32) -> Generated {
    let sampling = v1::Sampling {
        max_tokens: Some(6),
        temperature: Some(0.0),
        ignore_eos: true,
        ..v1::Sampling::default()
    };
    let request = v1::GenerateRequest {
        tenant: tenant.to_owned(),
        ..request(&prompt(seed), sampling)
    };
    let mut client = cluster.client().await;
    generate(&mut client, request).await.expect("it is served")
}

/// What a node says of a tenant: cached bytes, and most that it may have.
fn tenant(cluster: &Cluster, node: &str, name: &str) -> Option<(u64, Option<u64>)> {
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let output = Command::new(perigee())
        .args(["cache", "stats", "-o", "json", "--router", router])
        .output()
        .expect("start");
    let stats: Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    let nodes = stats["nodes"].as_array().expect("nodes");
    let node = nodes
        .iter()
        .find(|found| found["id"] == node)
        .expect("it answers");
    let tenants = node["tenants"].as_array().expect("tenants");
    let found = tenants.iter().find(|found| found["name"] == name)?;
    Some((
        found["cached_bytes"].as_u64().expect("bytes"),
        found["bytes_max"].as_u64(),
    ))
}

fn block_bytes(cluster: &Cluster) -> u64 {
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let output = Command::new(perigee())
        .args(["cache", "stats", "-o", "json", "--router", router])
        .output()
        .expect("start");
    let stats: Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    stats["nodes"][0]["block_bytes"].as_u64().expect("bytes")
}

fn start(more: &[&str]) -> (Cluster, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("folder");
    let model = folder.path().join("tiny.gguf");
    write_tiny_gguf(&model, &TinyModel::default()).expect("write the model");
    let nodes = [
        "--prefill",
        "1",
        "--decode",
        "1",
        "--set",
        "router.local_prefill_tokens_max=0",
    ];
    (Cluster::start(&model, &[&nodes[..], more].concat()), folder)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_reads_nothing_of_anothers_and_gets_the_same_tokens() {
    let (cluster, _folder) = start(&[]);
    let first = ask(&cluster, "alpha", 1).await;
    assert_eq!(first.usage().cached_tokens, 0);
    wait_for_index(&mut cluster.client().await, BLOCKS).await;
    let again = ask(&cluster, "alpha", 1).await;
    assert_eq!(again.usage().cached_tokens, BLOCKS * BLOCK_TOKENS);
    for other in ["beta", ""] {
        let theirs = ask(&cluster, other, 1).await;
        assert_eq!(
            theirs.usage().cached_tokens,
            0,
            "{other:?} reads what alpha cached"
        );
        assert_eq!(theirs.report().fetched_bytes, 0);
        assert_eq!(theirs.tokens, first.tokens, "{other:?}");
    }
    assert_eq!(again.tokens, first.tokens);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_at_its_quota_is_served_and_displaces_nobody() {
    // The fixture's blocks are the same in every cluster of it.
    let (cluster, _folder) = start(&[]);
    let block_bytes = block_bytes(&cluster);
    drop(cluster);
    let quota = format!("store.tenants.small.bytes_max={}B", QUOTA_BLOCKS * block_bytes);
    let (cluster, _folder) = start(&["--set", &quota]);
    let quiet = ask(&cluster, "quiet", 1).await;
    wait_for_index(&mut cluster.client().await, BLOCKS).await;
    let unlimited = (BLOCKS * block_bytes, None);
    wait_for("the quiet tenant's blocks to be listed", || {
        (tenant(&cluster, "prefill-0", "quiet") == Some(unlimited)).then_some(())
    });
    for seed in 2..6 {
        let small = ask(&cluster, "small", seed).await;
        let same = ask(&cluster, "large", seed).await;
        assert_eq!(
            small.tokens, same.tokens,
            "no place in the cache changes no token"
        );
    }
    let quota = QUOTA_BLOCKS * block_bytes;
    for node in ["prefill-0", "decode-0"] {
        let (cached, bytes_max) = tenant(&cluster, node, "small").expect("it has a limit");
        assert_eq!(bytes_max, Some(quota));
        assert!(0 < cached && cached <= quota, "{node}: {cached} of {quota}");
    }
    let again = ask(&cluster, "quiet", 1).await;
    assert_eq!(
        again.usage().cached_tokens,
        BLOCKS * BLOCK_TOKENS,
        "it lost nothing"
    );
    assert_eq!(again.tokens, quiet.tokens);
}
