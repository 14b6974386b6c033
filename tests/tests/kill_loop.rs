//! A hundred processes die under load, and nobody else notices for long.

#![allow(missing_docs)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proto::v1::prefill_client::PrefillClient;
use proto::v1::{prefill_command, prefill_event};
use proto::{status, v1};
use tests::cases::{Case, Random, token};
use tests::load::Load;
use tests::pod::Pod;
use tests::{Cluster, PATIENCE, Process, free_port, generate, newer, tiny};
use tokio::task::JoinSet;
use tokio::time::Instant;
use transfer::{
    HostMemory, Keep, RemoteRegion, Slice, TcpTransport, TransferBatch, TransferError, Transport, tcp,
};
use types::{Epoch, ErrorCode, NodeRecord, Role, Token};

const VOCABULARY: u32 = 256;
/// Per victim, of which there are three.
const KILLS: usize = 34;
const CLIENTS: usize = 4;
/// Requests that end between the return of a victim and its next death, so that it is in the middle of some.
const REQUESTS_PER_LIFE: usize = 12;

/// A node beside the cluster's own ones, always at the same ports.
fn victim(role: Role, cluster: &Cluster, model: &Path) -> Pod {
    let id = format!("{}-victim", role.as_str());
    let transfer_port = format!("node.transfer_port={}", free_port());
    let settings = ["--kv-memory", "64MiB", "--threads", "1", "--set", &transfer_port];
    Pod::new(role, &id, &cluster.ready.registry, model, &settings)
}

/// The incarnation that is at the ports now takes nothing that is meant for `past`.
async fn refuses_the_past(record: &NodeRecord, past: Epoch) {
    assert_ne!(record.epoch, past);
    let address = "127.0.0.1:0".parse().expect("an address");
    // What is asked here is asked over TCP, whatever moves the bytes.
    let mut config = tcp::Config::default();
    config.ucx.choice = transfer::ucx::Choice::Tcp;
    let transport = TcpTransport::bind(address, Epoch(1), config)
        .await
        .expect("bound");
    let memory = HostMemory::allocate(64).expect("memory");
    let batch = TransferBatch {
        region: transport.register(memory).expect("registered"),
        remote: RemoteRegion {
            endpoint: record.transfer_endpoint.clone(),
            epoch: past,
            key: 1,
        },
        slices: vec![Slice {
            local_offset: 0,
            remote_offset: 0,
            len: 64,
        }],
        keep: Keep::default(),
    };
    let written = transport.write(batch, Instant::now() + PATIENCE).await;
    assert!(
        matches!(written, Err(TransferError::Fenced { epoch, current, .. }) if epoch == past && current == record.epoch),
        "{written:?}"
    );
    if record.role != Role::Prefill {
        return;
    }
    let start = v1::PrefillStart {
        kv_root: record.kv_space.as_ref().expect("a space").root().0.to_vec(),
        tokens: vec![1, 2, 3],
        prompt_tokens: 3,
        deadline_ms: 10_000,
        prefill_epoch: past.0,
        ..v1::PrefillStart::default()
    };
    let command = v1::PrefillCommand {
        command: Some(prefill_command::Command::Start(start)),
    };
    let channel = node::channel(&record.grpc_endpoint).expect("an endpoint");
    let mut events = PrefillClient::new(channel)
        .prefill(tokio_stream::iter([command]))
        .await
        .expect("opened")
        .into_inner();
    let event = events.message().await.expect("an event").expect("an event").event;
    let Some(prefill_event::Event::Failure(failure)) = event else {
        panic!("{event:?} instead of a refusal");
    };
    assert_eq!(status::from_failure(&failure).code, ErrorCode::Fenced);
}

/// Kills the victim and starts it again, over and over, and at last leaves it running.
async fn torment(victim: Pod, grpc: String, load: Arc<Load>) -> (Process, Pod) {
    let mut process = victim.start();
    let mut epoch = newer(&grpc, &victim.id, Epoch(0)).await.epoch;
    for _ in 0..KILLS {
        load.goes_on(REQUESTS_PER_LIFE).await;
        process.kill();
        process = victim.start();
        let record = newer(&grpc, &victim.id, epoch).await;
        refuses_the_past(&record, epoch).await;
        epoch = record.epoch;
    }
    (process, victim)
}

fn cases() -> Vec<Case> {
    let mut random = Random::new(51);
    let document: Vec<Token> = (0..300).map(|_| token(&mut random, VOCABULARY)).collect();
    (0..16)
        .map(|_| Case::random(&mut random, std::slice::from_ref(&document), VOCABULARY, 40))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_are_killed_again_and_again_cost_no_request_and_trouble_no_other_node() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let mut cluster = Cluster::start(
        &model,
        &[
            "--prefill",
            "1",
            "--decode",
            "1",
            "--threads",
            "1",
            "--set",
            "router.policy=round_robin",
        ],
    );
    let grpc = cluster.ready.grpc.clone();
    let load = Load::new(&model, &[&grpc], cases());
    let work = async {
        let begun = Instant::now();
        let mut victims = JoinSet::new();
        for role in [Role::Prefill, Role::Decode, Role::Store] {
            let victim = victim(role, &cluster, &model);
            victims.spawn(torment(victim, grpc.clone(), load.clone()));
        }
        let mut running = Vec::new();
        while let Some(victim) = victims.join_next().await {
            running.push(victim.expect("every incarnation serves"));
        }
        let elapsed = begun.elapsed();
        // Two seconds later everything is as if nothing had happened.
        tokio::time::sleep(Duration::from_secs(2)).await;
        (running, elapsed)
    };
    let (running, elapsed) = load.during(CLIENTS, work).await;
    let mut client = cluster.client().await;
    for (case, expected) in load.cases.iter().zip(&load.expected) {
        let generated = generate(&mut client, case.request()).await.expect("served");
        assert_eq!(&generated.tokens, expected);
        assert_eq!(
            generated.report().placements,
            1,
            "placed again, though everybody lives"
        );
    }
    let seen = load.seen().clone();
    println!("{} kills in {elapsed:?}: {seen:?}", 3 * KILLS);
    let by_victims: usize = seen
        .by
        .iter()
        .filter(|(id, _)| id.ends_with("victim"))
        .map(|(_, count)| count)
        .sum();
    assert!(
        by_victims >= KILLS && seen.placed_again > 0,
        "the kills hit nobody: the test proves little: {seen:?}"
    );
    assert!(cluster.up.alive());
    let log = cluster.up.log();
    // UCX prints an error of its own for memory of a peer that is killed while it is being mapped: expected here, and
    // the transfer falls back. What a node says of itself is what counts.
    let again = log
        .lines()
        .filter(|line| !line.contains("UCX  ERROR"))
        .find(|line| line.contains("starting it again") || line.contains("ERROR"));
    assert_eq!(again, None, "another node was troubled");
    for (mut process, _victim) in running {
        assert!(process.alive(), "{}", process.log());
    }
}
