//! What dies costs time, never a request and never a token.

#![allow(missing_docs)]

use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::v1;
use proto::v1::inference_client::InferenceClient;
use tests::cases::{Case, Random, token};
use tests::etcd::Etcd;
use tests::load::expected;
use tests::{Cluster, Process, client, free_port, generate, heard, perigee, tiny, wait_for, wait_for_status};
use tokio::task::JoinSet;
use tonic::Streaming;
use tonic::transport::Channel;
use types::Token;

const VOCABULARY: u32 = 256;

/// Long outputs from short prompts, so that whatever dies dies in the middle of many.
fn cases(seed: u64, count: usize) -> Vec<Case> {
    let mut random = Random::new(seed);
    let document: Vec<Token> = (0..400).map(|_| token(&mut random, VOCABULARY)).collect();
    (0..count)
        .map(|_| {
            let mut case = Case::random(&mut random, std::slice::from_ref(&document), VOCABULARY, 1);
            case.sampling.max_tokens = 200;
            case.sampling.ignore_eos = true;
            case
        })
        .collect()
}

/// Runs all cases at once and `harm` once some tokens have come; every case must end with its expected tokens.
async fn survive(
    grpc: &str,
    cases: &[Case],
    expected: &[Vec<Token>],
    harm: impl AsyncFnOnce(),
) -> Vec<v1::Finished> {
    let mut first = client(grpc)
        .await
        .generate(cases[0].request())
        .await
        .expect("placed")
        .into_inner();
    let mut tasks = JoinSet::new();
    for (index, case) in cases.iter().enumerate() {
        let (grpc, request) = (grpc.to_owned(), case.request());
        tasks.spawn(async move {
            let mut client = client(&grpc).await;
            (index, generate(&mut client, request).await)
        });
    }
    // The extra request shows that tokens are flowing.
    let mut seen = 0;
    while seen < 20
        && let Some(response) = first.message().await.expect("tokens")
    {
        if let Some(v1::generate_response::Event::Tokens(chunk)) = response.event {
            seen += chunk.ids.len();
        }
    }
    harm().await;
    drop(first);
    let mut finished = Vec::new();
    while let Some(joined) = tasks.join_next().await {
        let (index, generated) = joined.expect("no panic");
        let generated = generated.unwrap_or_else(|status| panic!("case {index} failed: {status}"));
        assert_eq!(
            generated.tokens, expected[index],
            "case {index}: {:?}",
            generated.finished
        );
        finished.push(generated.finished);
    }
    finished
}

/// The answers to all cases, each after its first event.
async fn open(client: &mut InferenceClient<Channel>, cases: &[Case]) -> Vec<Streaming<v1::GenerateResponse>> {
    let mut streams = Vec::new();
    for case in cases {
        let mut stream = client
            .generate(case.request())
            .await
            .expect("placed")
            .into_inner();
        stream.message().await.expect("the first event");
        streams.push(stream);
    }
    streams
}

fn placed_again(finished: &[v1::Finished]) -> usize {
    finished
        .iter()
        .filter(|one| one.report.as_ref().is_some_and(|report| report.placements > 1))
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_a_killed_decode_node_continue_byte_for_byte() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let cases = cases(11, 24);
    let expected = expected(&model, &cases);
    let cluster = Cluster::start(
        &model,
        &[
            "--prefill",
            "1",
            "--decode",
            "2",
            "--set",
            "router.policy=round_robin",
        ],
    );
    let victim = cluster.pids("decode")[0];
    let finished = survive(&cluster.ready.grpc, &cases, &expected, async || {
        kill(victim, Signal::SIGKILL).expect("the node lived");
    })
    .await;
    assert!(
        placed_again(&finished) > 0,
        "the kill hit nobody: the test proves little"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_a_killed_prefill_node_are_placed_elsewhere() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let cases = cases(12, 24);
    let expected = expected(&model, &cases);
    let cluster = Cluster::start(
        &model,
        &[
            "--prefill",
            "2",
            "--decode",
            "1",
            "--set",
            "router.policy=round_robin",
        ],
    );
    let victim = cluster.pids("prefill")[0];
    survive(&cluster.ready.grpc, &cases, &expected, async || {
        kill(victim, Signal::SIGKILL).expect("the node lived");
    })
    .await;
    // The supervisor starts it again, and it serves again.
    let mut client = cluster.client().await;
    let again = generate(&mut client, cases[0].request()).await.expect("served");
    assert_eq!(again.tokens, expected[0]);
}

/// The roles alone, met in an etcd.
struct Deployment {
    processes: Vec<Process>,
    grpc: String,
    etcd: Etcd,
    _folder: tempfile::TempDir,
}

impl Deployment {
    fn start(model: &std::path::Path) -> Self {
        let etcd = Etcd::start();
        let folder = tempfile::tempdir().expect("folder");
        let port = free_port().to_string();
        let url = etcd.url();
        let start = |role: &str, id: &str, extra: &[&str]| {
            let mut command = Command::new(perigee());
            command
                .args([role, "--registry", &url, "--id", id, "--model"])
                .arg(model);
            command
                .args(["--kv-memory", "64MiB", "--set", "registry.lease_ttl=2s"])
                .args(extra);
            Process::start(&mut command, folder.path(), id)
        };
        let processes = vec![
            start("prefill", "prefill-a", &[]),
            start("decode", "decode-a", &[]),
            start("router", "router-a", &["--grpc-port", &port]),
        ];
        Self {
            processes,
            grpc: format!("http://127.0.0.1:{port}"),
            etcd,
            _folder: folder,
        }
    }

    /// Waits until the router hears of `nodes` nodes beside itself.
    async fn ready(&self, nodes: usize) {
        let connect = || std::net::TcpStream::connect(self.grpc.trim_start_matches("http://")).ok();
        wait_for("the router to listen", connect);
        let mut client = client(&self.grpc).await;
        wait_for_status(&mut client, |status| {
            let heard = heard(&status).count();
            if heard >= nodes {
                return Ok(());
            }
            Err(format!("the router has heard of {heard} nodes, not of {nodes}"))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_cluster_runs_on_etcd_and_outlives_its_restart_under_load() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let cases = cases(13, 16);
    let expected = expected(&model, &cases);
    let mut deployment = Deployment::start(&model);
    deployment.ready(2).await;
    let grpc = deployment.grpc.clone();

    let listed = Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .args([
            "--endpoints",
            &deployment.etcd.endpoint(),
            "get",
            "--prefix",
            "/perigee/",
            "--keys-only",
        ])
        .output()
        .expect("etcdctl");
    let keys = String::from_utf8_lossy(&listed.stdout).into_owned();
    for id in ["prefill-a", "decode-a", "router-a"] {
        assert!(keys.contains(id), "{keys}");
    }

    // Without etcd everything is served.
    survive(&grpc, &cases, &expected, async || deployment.etcd.kill()).await;
    let down = survive(&grpc, &cases, &expected, async || {}).await;
    assert_eq!(down.len(), cases.len());
    // Longer than a lease, so that every registration is gone or forgotten.
    tokio::time::sleep(Duration::from_secs(3)).await;
    survive(&grpc, &cases, &expected, async || deployment.etcd.resume()).await;
    for process in &mut deployment.processes {
        assert!(process.alive(), "{}", process.log());
    }
    deployment.ready(2).await;
    survive(&grpc, &cases, &expected, async || {}).await;

    for process in &mut deployment.processes {
        process.signal(Signal::SIGTERM);
    }
    for process in &mut deployment.processes {
        assert_eq!(process.wait(), Some(0), "{}", process.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_router_ends_only_what_streamed_through_it() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let cases = cases(15, 16);
    let expected = expected(&model, &cases);
    let cluster = Cluster::start(&model, &["--prefill", "1", "--decode", "2"]);
    let port = free_port().to_string();
    let start = || {
        let mut command = Command::new(perigee());
        command
            .args([
                "router",
                "--registry",
                &cluster.ready.registry,
                "--id",
                "router-two",
            ])
            .args(["--grpc-port", &port, "--model"])
            .arg(&model);
        Process::start(&mut command, folder.path(), "router-two")
    };
    let url = format!("http://127.0.0.1:{port}");
    let serves = async || {
        let address = url.trim_start_matches("http://");
        wait_for("the router to listen", || {
            std::net::TcpStream::connect(address).ok()
        });
        wait_for_status(&mut client(&url).await, |status| match heard(&status).count() {
            3.. => Ok(()),
            nodes => Err(format!("the router has heard of {nodes} nodes, not of 3")),
        })
        .await;
    };
    let mut second = start();
    serves().await;
    // All of them are in the middle of their answers when it dies.
    let cut = open(&mut client(&url).await, &cases).await;
    let finished = survive(&cluster.ready.grpc, &cases, &expected, async || second.kill()).await;
    assert_eq!(placed_again(&finished), 0, "a router is nobody's node");
    for mut stream in cut {
        let mut finished = false;
        let end = loop {
            match stream.message().await {
                Ok(Some(response)) => {
                    finished |= matches!(response.event, Some(v1::generate_response::Event::Finished(_)));
                }
                Ok(None) => break None,
                Err(status) => break Some(status),
            }
        };
        assert!(finished || end.is_some(), "a cut stream looked like a whole one");
    }
    // One that starts anew under the old name has all it needs from the nodes.
    let _second = start();
    serves().await;
    for (case, expected) in cases.iter().zip(&expected) {
        let again = generate(&mut client(&url).await, case.request())
            .await
            .expect("served");
        assert_eq!(again.tokens, *expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_with_other_blocks_are_refused_at_registration() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let cluster = Cluster::start(&model, &["--prefill", "0", "--decode", "1"]);
    let mut command = Command::new(perigee());
    command
        .args([
            "decode",
            "--registry",
            &cluster.ready.registry,
            "--id",
            "other",
            "--block-tokens",
            "16",
            "--model",
        ])
        .arg(&model);
    let mut other = Process::start(&mut command, folder.path(), "other");
    assert_eq!(
        other.wait(),
        Some(i32::from(types::ErrorCode::Conflict.exit())),
        "{}",
        other.log()
    );
    assert!(other.log().contains("block_tokens"), "{}", other.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupting_up_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let mut cluster = Cluster::start(&model, &["--prefill", "1", "--decode", "2", "--store", "1"]);
        let pids: Vec<Pid> = cluster
            .ready
            .nodes
            .iter()
            .map(|node| Pid::from_raw(node.pid))
            .collect();
        assert_eq!(pids.len(), 5);
        cluster.up.signal(signal);
        let code = cluster.up.wait();
        if signal == Signal::SIGINT {
            assert_eq!(code, Some(0), "{}", cluster.up.log());
        }
        wait_for("the children to end", || {
            pids.iter().all(|pid| kill(*pid, None).is_err()).then_some(())
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_frees_everything() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let cluster = Cluster::start(&model, &["--prefill", "1", "--decode", "1"]);
    let cases = cases(14, 12);
    let mut client = cluster.client().await;
    drop(open(&mut client, &cases).await);
    wait_for_status(&mut client, |status| {
        let loads: Vec<types::LoadReport> = status
            .nodes
            .iter()
            .filter(|node| !node.load_json.is_empty())
            .map(|node| serde_json::from_str(&node.load_json).expect("load"))
            .collect();
        let records: Vec<types::NodeRecord> = status
            .nodes
            .iter()
            .map(|node| serde_json::from_str(&node.record_json).expect("record"))
            .collect();
        let capacity: u64 = records.iter().map(|record| record.capacity_blocks).sum();
        let free: u64 = loads
            .iter()
            .map(|load| load.free_blocks + load.evictable_blocks)
            .sum();
        let running: u64 = loads
            .iter()
            .map(|load| load.running_sequences + load.queued_requests)
            .sum();
        if running == 0 && free == capacity && status.requests_running == 0 {
            return Ok(());
        }
        Err(format!(
            "{free} of {capacity} blocks are free, {running} requests run"
        ))
    })
    .await;
}
