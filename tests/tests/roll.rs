//! Every role is rolled, and nodes change theirs, under load: no request fails, and no token is another one.

#![allow(missing_docs)]

use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::Value;
use tests::cases::{Case, Random, token};
use tests::etcd::Etcd;
use tests::load::Load;
use tests::pod::Pod;
use tests::{Cluster, PATIENCE, Process, client, perigee, records, tiny, wait_for, wait_for_status};
use types::{NodeRecord, Role, Token};

const VOCABULARY: u32 = 256;
const CLIENTS: usize = 4;
/// Requests that a rolling restart must have cost none of.
const REQUESTS_MIN: usize = 500;

/// Short and long answers, drawn in every way.
fn cases() -> Vec<Case> {
    let mut random = Random::new(93);
    let document: Vec<Token> = (0..300).map(|_| token(&mut random, VOCABULARY)).collect();
    (0..24)
        .map(|_| Case::random(&mut random, std::slice::from_ref(&document), VOCABULARY, 80))
        .collect()
}

/// A pod and its process, which ends before the folder goes that has its log.
struct Running {
    process: Option<Process>,
    pod: Pod,
}

impl Running {
    fn start(role: Role, number: usize, registry: &str, model: &Path) -> Self {
        let settings: &[&str] = match role {
            Role::Router => &[
                "--set",
                "router.policy=round_robin",
                "--set",
                "router.local_prefill_tokens_max=0",
            ],
            Role::Store => &["--kv-memory", "16MiB"],
            Role::Prefill | Role::Decode => &["--kv-memory", "64MiB", "--threads", "1"],
        };
        let pod = Pod::new(role, &format!("{role}-{number}"), registry, model, settings);
        let process = Some(pod.start());
        Self { pod, process }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.pod.grpc_port)
    }

    /// What a StatefulSet does with a container that has the chart's hook.
    async fn replace(&mut self, routers: &[String]) {
        self.pod.drain_self();
        let mut process = self.process.take().expect("it runs");
        process.signal(Signal::SIGTERM);
        assert_eq!(process.wait(), Some(0), "{}", process.log());
        self.process = Some(self.pod.start());
        for router in routers {
            self.is_heard(router).await;
        }
    }

    /// Waits until the router has heard of it; a router is heard of once it listens, and knows whom it places on.
    async fn is_heard(&self, router: &str) {
        if self.pod.role == Role::Router {
            wait_for("the router to listen", || {
                TcpStream::connect(("127.0.0.1", self.pod.grpc_port)).ok()
            });
            let mut client = client(&self.url()).await;
            wait_for_status(&mut client, |status| match records(&status).count() {
                0..5 => Err("the router knows too few nodes".to_owned()),
                _ => Ok(()),
            })
            .await;
            return;
        }
        let mut client = client(router).await;
        wait_for_status(&mut client, |status| {
            let ready = tests::heard(&status).any(|node| {
                let record: NodeRecord = serde_json::from_str(&node.record_json).expect("record");
                record.id.as_str() == self.pod.id && !node.load_json.contains("\"draining\":true")
            });
            ready
                .then_some(())
                .ok_or_else(|| format!("{} is not back", self.pod.id))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_of_every_role_costs_no_request_and_no_token() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let etcd = Etcd::start();
    let pods = |role| (0..2).map(move |number| (role, number));
    let roles = pods(Role::Prefill)
        .chain(pods(Role::Decode))
        .chain([(Role::Store, 0)]);
    let mut nodes: Vec<Running> = roles
        .map(|(role, number)| Running::start(role, number, &etcd.url(), &model))
        .collect();
    let mut routers: Vec<Running> = pods(Role::Router)
        .map(|(role, number)| Running::start(role, number, &etcd.url(), &model))
        .collect();
    let urls: Vec<String> = routers.iter().map(Running::url).collect();
    for router in &routers {
        router.is_heard(&router.url()).await;
    }
    let both: Vec<&str> = urls.iter().map(String::as_str).collect();
    let load = Load::new(&model, &both, cases());
    let work = async {
        for node in &mut nodes {
            load.goes_on(20).await;
            node.replace(&urls).await;
            if node.pod.role != Role::Store {
                load.uses(&node.pod.id).await;
            }
        }
        for router in &mut routers {
            load.goes_on(20).await;
            router.replace(&urls[..1]).await;
        }
        let so_far = load.seen().ended;
        load.goes_on(REQUESTS_MIN.saturating_sub(so_far).max(20)).await;
    };
    load.during(CLIENTS, work).await;
    let seen = load.seen();
    assert!(seen.ended >= REQUESTS_MIN, "{seen:?}");
    assert_eq!(
        seen.by.len(),
        4,
        "each node with an engine had its part: {seen:?}"
    );
}

fn node(cluster: &Cluster, arguments: &[&str]) -> Value {
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let mut command = Command::new(perigee());
    command
        .args(["node", "-o", "json", "--router", router])
        .args(arguments);
    let output = command.output().expect("start");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn started(model: &Path) -> (Cluster, Arc<Load>) {
    let spread = ["--set", "router.policy=round_robin"];
    let apart = ["--set", "router.local_prefill_tokens_max=0"];
    let roles = ["--prefill", "2", "--decode", "2", "--threads", "1"];
    let cluster = Cluster::start(model, &[&roles[..], &spread, &apart].concat());
    let load = Load::new(model, &[&cluster.ready.grpc], cases());
    (cluster, load)
}

/// Flips a node, and checks that everybody takes it for what it is.
async fn flip(cluster: &Cluster, id: &str, to: Role) {
    let was = node(cluster, &["show", id])["record"].clone();
    let flipped = node(cluster, &["flip", id, "--to", to.as_str(), "--grace", "1s"]);
    assert_eq!(
        (&flipped["role"], &flipped["was"]),
        (&to.as_str().into(), &was["role"])
    );
    let took_ms = flipped["took_ms"].as_u64().expect("a number");
    assert!(took_ms < 10_000, "{flipped}");
    let said = node(cluster, &["show", id])["record"].clone();
    assert_eq!(
        (&said["role"], &said["epoch"]),
        (&to.as_str().into(), &was["epoch"])
    );
    is_known_as(cluster, id, to).await;
}

async fn is_known_as(cluster: &Cluster, id: &str, role: Role) {
    let mut client = cluster.client().await;
    wait_for_status(&mut client, |status| {
        let known = records(&status).any(|record| record.id.as_str() == id && record.role == role);
        known
            .then_some(())
            .ok_or_else(|| format!("the router does not know {id} as a {role} node"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_change_their_role_under_load_within_seconds_and_no_request_notices() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let (cluster, load) = started(&model);
    let work = async {
        for (id, role) in [
            ("prefill-1", Role::Decode),
            ("decode-0", Role::Prefill),
            ("prefill-1", Role::Prefill),
            ("decode-0", Role::Decode),
        ] {
            flip(&cluster, id, role).await;
            load.uses(id).await;
        }
    };
    load.during(CLIENTS, work).await;
}

/// Runs `perigee model`, and waits until the router takes the node for what it is then.
async fn model_of(cluster: &Cluster, arguments: &[&str], role: Role) -> Value {
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let mut command = Command::new(perigee());
    command
        .args(["model", "-o", "json", "--router", router])
        .args(arguments);
    let output = command.output().expect("start");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    is_known_as(cluster, arguments[1], role).await;
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_are_unloaded_and_loaded_under_load_and_the_blocks_stay() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let (cluster, load) = started(&model);
    let work = async {
        for (id, role) in [("prefill-1", Role::Prefill), ("decode-1", Role::Decode)] {
            load.uses(id).await;
            let was = node(&cluster, &["show", id])["record"].clone();
            let unloaded = model_of(&cluster, &["unload", id, "--grace", "1s"], Role::Store).await;
            assert_eq!(unloaded["was"], role.as_str());
            let said = node(&cluster, &["show", id]);
            let held = said["record"]["capacity_blocks"].as_u64().expect("a number")
                - said["load"]["free_blocks"].as_u64().expect("a number");
            assert!(held > 0, "its blocks are gone: {said}");
            let part = load.seen().of(id);
            load.goes_on(20).await;
            assert_eq!(load.seen().of(id), part, "a store takes no requests");
            // Twice is as good as once.
            model_of(&cluster, &["unload", id], Role::Store).await;
            let loaded = model_of(&cluster, &["load", id, "--as", role.as_str()], role).await;
            assert_eq!(loaded["was"], "store");
            load.uses(id).await;
            assert_eq!(node(&cluster, &["show", id])["record"]["epoch"], was["epoch"]);
        }
    };
    load.during(CLIENTS, work).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_loads_a_model_that_is_there_and_refuses_another_one() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let cluster = Cluster::start(
        &model,
        &[
            "--prefill",
            "0",
            "--decode",
            "1",
            "--store",
            "1",
            "--threads",
            "1",
        ],
    );
    let load = Load::new(&model, &[&cluster.ready.grpc], cases());
    let kept = std::fs::read(&model).expect("the model");
    let mut other = kept.clone();
    *other.last_mut().expect("not empty") ^= 1;
    std::fs::write(&model, other).expect("written");
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let refused = Command::new(perigee())
        .args(["model", "load", "store-0", "--as", "decode", "--router", router])
        .output()
        .expect("start");
    let complained = String::from_utf8_lossy(&refused.stderr);
    assert!(complained.contains("not the model any more"), "{complained}");
    assert_eq!(node(&cluster, &["show", "store-0"])["record"]["role"], "store");
    std::fs::write(&model, kept).expect("written");
    let work = async {
        model_of(&cluster, &["load", "store-0", "--as", "decode"], Role::Decode).await;
        load.uses("store-0").await;
    };
    load.during(CLIENTS, work).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_goes_on_elsewhere_where_its_node_changes_its_role_without_waiting_for_it() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let cluster = Cluster::start(&model, &["--prefill", "0", "--decode", "2", "--threads", "1"]);
    let long = |seed: u32| Case {
        prompt: (seed..seed + 50).collect(),
        sampling: types::SamplingParams {
            max_tokens: 1500,
            ignore_eos: true,
            seed: seed.into(),
            ..types::SamplingParams::default()
        },
    };
    // As many at a time as make each of them last longer than a node needs to be told.
    let load = Load::new(&model, &[&cluster.ready.grpc], (0..8).map(long).collect());
    let work = async {
        load.uses("decode-1").await;
        let start = Instant::now();
        while load.seen().placed_again == 0 {
            assert!(
                start.elapsed() < PATIENCE,
                "nothing ran on a node that changed its role"
            );
            node(
                &cluster,
                &["flip", "decode-1", "--to", "prefill", "--grace", "0s"],
            );
            node(&cluster, &["flip", "decode-1", "--to", "decode", "--grace", "0s"]);
            load.goes_on(8).await;
        }
    };
    load.during(8, work).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cordoned_node_gets_nothing_new_and_is_read_from() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let (cluster, load) = started(&model);
    let work = async {
        load.uses("decode-1").await;
        assert_eq!(node(&cluster, &["cordon", "decode-1"])["state"], "cordoned");
        let mut client = cluster.client().await;
        wait_for_status(&mut client, |status| {
            let known = tests::heard(&status).any(|node| node.load_json.contains("\"cordoned\":true"));
            known.then_some(()).ok_or_else(|| "nobody is cordoned".to_owned())
        })
        .await;
        assert_eq!(node(&cluster, &["show", "decode-1"])["state"], "cordoned");
        // What was placed before ends.
        wait_for("what ran on decode-1 to end", || {
            let said = node(&cluster, &["show", "decode-1"]);
            (said["load"]["running_sequences"] == 0).then_some(())
        });
        let part = load.seen().of("decode-1");
        load.uses("decode-0").await;
        assert_eq!(load.seen().of("decode-1"), part, "a cordoned node is used");
        let explained = Command::new(perigee())
            .args(["route", "explain", "--prompt", "hello", "--router"])
            .arg(cluster.ready.grpc.trim_start_matches("http://"))
            .output()
            .expect("start");
        let explained = String::from_utf8_lossy(&explained.stdout).into_owned();
        assert!(
            explained.contains("not weighed: decode-1, cordoned"),
            "{explained}"
        );
        assert_eq!(node(&cluster, &["resume", "decode-1"])["state"], "ready");
        load.uses("decode-1").await;
    };
    let worked = tokio::time::timeout(4 * PATIENCE, load.during(CLIENTS, work));
    worked.await.expect("it comes to an end");
}
