//! Prefixes outlive all nodes in a folder or a bucket, and a bucket that is not well costs time and never tokens.

#![allow(missing_docs)]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use engine::fixture::{TinyModel, write_tiny_gguf};
use rstest::rstest;
use serde_json::Value;
use tests::{Cluster, perigee, wait_for};

/// Tokens of a segment: 16 blocks of 8.
const SEGMENT_TOKENS: u64 = 128;
const BUCKET: &str = "blocks";

/// As much of S3 as an object tier speaks: objects by path, whole.
#[derive(Default)]
struct Bucket {
    objects: Mutex<HashMap<String, Bytes>>,
    /// Every request ends in 503.
    fails: AtomicBool,
}

impl Bucket {
    /// Serves on a free port of this machine until the test's runtime ends. Gives the endpoint.
    async fn serve(self: &Arc<Self>) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let router = Router::new().fallback(answer).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        endpoint
    }

    fn change_all(&self, change: impl Fn(&mut Vec<u8>)) {
        for object in self.objects.lock().expect("nobody panics").values_mut() {
            let mut bytes = object.to_vec();
            change(&mut bytes);
            *object = bytes.into();
        }
    }
}

async fn answer(State(bucket): State<Arc<Bucket>>, request: Request) -> Response {
    if bucket.fails.load(Relaxed) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let signature = request.headers().get(header::AUTHORIZATION);
    let signature = signature
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    if !signature.starts_with("AWS4-HMAC-SHA256 Credential=AKIDTEST/") {
        return StatusCode::FORBIDDEN.into_response();
    }
    let path = request.uri().path().to_owned();
    assert!(path.starts_with(&format!("/{BUCKET}/prefix/")), "{path}");
    let method = request.method().clone();
    if method == Method::PUT {
        let body = to_bytes(request.into_body(), 64 << 20).await.expect("a body");
        bucket.objects.lock().expect("nobody panics").insert(path, body);
        return ([(header::ETAG, "\"1\"")], StatusCode::OK).into_response();
    }
    let found = bucket.objects.lock().expect("nobody panics").get(&path).cloned();
    let Some(object) = found else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let length = object.len().to_string();
    let body = if method == Method::HEAD {
        Body::empty()
    } else {
        object.into()
    };
    let headers = [
        (header::ETAG, "\"1\""),
        (header::LAST_MODIFIED, "Mon, 23 Nov 2026 10:00:00 GMT"),
        (header::CONTENT_LENGTH, length.as_str()),
    ];
    (headers, body).into_response()
}

/// Where objects are kept, and how tests get at them behind the cluster's back.
enum Place {
    Folder(tempfile::TempDir),
    Bucket { bucket: Arc<Bucket>, endpoint: String },
}

impl Place {
    async fn new(kind: &str) -> Self {
        if kind == "folder" {
            return Self::Folder(tempfile::tempdir().expect("folder"));
        }
        let bucket = Arc::new(Bucket::default());
        let endpoint = bucket.serve().await;
        Self::Bucket { bucket, endpoint }
    }

    fn change_all(&self, change: impl Fn(&mut Vec<u8>)) {
        match self {
            Self::Bucket { bucket, .. } => bucket.change_all(change),
            Self::Folder(folder) => {
                for path in files(folder.path()) {
                    let mut bytes = fs::read(&path).expect("read");
                    change(&mut bytes);
                    fs::write(&path, bytes).expect("write");
                }
            }
        }
    }

    /// A cluster over it, without anything in memory.
    fn cluster(&self, model: &Path) -> Cluster {
        let url = match self {
            Self::Folder(folder) => format!("file://{}", folder.path().display()),
            Self::Bucket { .. } => format!("s3://{BUCKET}/prefix"),
        };
        let url = format!("kv.object_url={url}");
        let arguments = [
            &[
                "--prefill",
                "1",
                "--decode",
                "1",
                "--kv-memory",
                "16MiB",
                "--block-tokens",
                "8",
            ][..],
            &["--set", &url, "--set", "kv.object_bypass_min=200ms"],
            // This is no test of the machine's speed.
            &["--set", "kv.object_timeout=20s"],
        ];
        let arguments = arguments.concat();
        match self {
            Self::Folder(_) => Cluster::start(model, &arguments),
            Self::Bucket { endpoint, .. } => {
                let environment = [
                    ("AWS_ENDPOINT", endpoint.as_str()),
                    ("AWS_ALLOW_HTTP", "true"),
                    ("AWS_REGION", "eu-central-1"),
                    ("AWS_ACCESS_KEY_ID", "AKIDTEST"),
                    ("AWS_SECRET_ACCESS_KEY", "secret"),
                ];
                Cluster::start_with(model, &arguments, &environment)
            }
        }
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder)
        .expect("readable")
        .map(|entry| entry.expect("entry").path());
    entries
        .flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] })
        .collect()
}

fn run(arguments: &[&str]) -> Value {
    let output = Command::new(perigee()).args(arguments).output().expect("start");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn generate(cluster: &Cluster, prompt: &str) -> Value {
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let arguments = [
        "generate",
        "--max-tokens",
        "8",
        "--ignore-eos",
        "-o",
        "json",
        "--router",
        router,
    ];
    run(&[&arguments[..], &[prompt]].concat())
}

fn cached(generated: &Value) -> u64 {
    generated["usage"]["cached_tokens"].as_u64().expect("a number")
}

/// What all nodes say of the bucket.
fn tiers(cluster: &Cluster) -> Vec<Value> {
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let stats = run(&["cache", "stats", "-o", "json", "--router", router]);
    let nodes = stats["nodes"].as_array().expect("nodes");
    nodes.iter().map(|node| node["object_tier"].clone()).collect()
}

/// One figure, over all nodes.
fn sum(cluster: &Cluster, figure: &str) -> u64 {
    tiers(cluster)
        .iter()
        .map(|tier| tier[figure].as_u64().expect("a number"))
        .sum()
}

fn model(folder: &Path) -> PathBuf {
    let path = folder.join("tiny.gguf");
    write_tiny_gguf(&path, &TinyModel::default()).expect("write the model");
    path
}

/// A few hundred tokens.
fn prompt(name: &str) -> String {
    (0..200).map(|i| format!("{name} {i} ")).collect()
}

/// Has the prompt served twice, and waits until a part of it is in the bucket.
fn keep(cluster: &Cluster, prompt: &str) -> Value {
    let written = sum(cluster, "written_bytes");
    let first = generate(cluster, prompt);
    assert_eq!(generate(cluster, prompt)["tokens"], first["tokens"]);
    wait_for("segments in the bucket", || {
        (sum(cluster, "written_bytes") > written).then_some(())
    });
    first
}

#[rstest]
#[case::folder("folder")]
#[case::bucket("bucket")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_outlives_every_node_that_held_it(#[case] kind: &str) {
    let folder = tempfile::tempdir().expect("folder");
    let (model, place) = (model(folder.path()), Place::new(kind).await);
    let prompt = prompt("word");
    let expected = tokio::task::block_in_place(|| {
        let cluster = place.cluster(&model);
        let expected = keep(&cluster, &prompt);
        assert_eq!(cached(&expected), 0);
        expected
    });
    // Other nodes with empty memory: the prompt's beginning comes from the bucket, and counts as reuse.
    tokio::task::block_in_place(|| {
        let cluster = place.cluster(&model);
        let again = generate(&cluster, &prompt);
        assert_eq!(again["tokens"], expected["tokens"]);
        assert!(cached(&again) >= SEGMENT_TOKENS, "{again}");
        assert!(sum(&cluster, "read_bytes") > 0);
        assert_eq!((sum(&cluster, "errors"), sum(&cluster, "corruptions")), (0, 0));
    });
    // Bytes that changed where they lay are found, and computed again.
    place.change_all(|object| {
        let last = object.len() - 1;
        object[last] ^= 1;
    });
    tokio::task::block_in_place(|| {
        let cluster = place.cluster(&model);
        let computed = generate(&cluster, &prompt);
        assert_eq!(computed["tokens"], expected["tokens"]);
        assert!(cached(&computed) < SEGMENT_TOKENS, "{computed}");
        assert!(sum(&cluster, "corruptions") > 0);
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serving_goes_on_while_the_bucket_fails_and_says_so() {
    let folder = tempfile::tempdir().expect("folder");
    let (model, place) = (model(folder.path()), Place::new("bucket").await);
    let Place::Bucket { bucket, .. } = &place else {
        panic!("it is a bucket");
    };
    tokio::task::block_in_place(|| {
        let cluster = place.cluster(&model);
        let expected = keep(&cluster, &prompt("kept"));
        bucket.fails.store(true, Relaxed);
        let usable = |cluster: &Cluster| tiers(cluster).iter().all(|tier| tier["usable"] == true);
        let mut served = 0;
        wait_for("the bucket to be bypassed", || {
            served += 1;
            generate(&cluster, &prompt(&format!("other {served}")));
            (!usable(&cluster)).then_some(())
        });
        assert!(sum(&cluster, "errors") > 0);
        assert!(
            cluster.up.log().contains("object tier bypassed"),
            "{}",
            cluster.up.log()
        );
        assert_eq!(generate(&cluster, &prompt("kept"))["tokens"], expected["tokens"]);
        bucket.fails.store(false, Relaxed);
        wait_for("the bucket to be used again", || usable(&cluster).then_some(()));
    });
}
