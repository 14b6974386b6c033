//! Nodes are taken out of service and put back under load, and no request notices.

#![allow(missing_docs)]

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use client::{Blocks, Place};
use nix::sys::signal::Signal;
use proto::v1::decode_client::DecodeClient;
use proto::v1::prefill_client::PrefillClient;
use proto::{status, v1};
use serde_json::Value;
use tests::cases::{Case, Random, token};
use tests::load::Load;
use tests::pod::Pod;
use tests::{Cluster, Process, generate, newer, perigee, records, tiny, wait_for_status};
use transfer::{TcpTransport, tcp};
use types::{Epoch, ErrorCode, NodeRecord, Role, Token};

const VOCABULARY: u32 = 256;
const CLIENTS: usize = 4;

/// A node beside the cluster's own ones.
fn guest(role: Role, cluster: &Cluster, model: &Path) -> Pod {
    let id = format!("{}-guest", role.as_str());
    Pod::new(
        role,
        &id,
        &cluster.ready.registry,
        model,
        &["--kv-memory", "64MiB", "--threads", "1"],
    )
}

/// Whether a node refuses requests so that a router tries elsewhere.
async fn refuses(guest: &Pod) -> bool {
    let channel = node::channel(&format!("127.0.0.1:{}", guest.grpc_port)).expect("an endpoint");
    let refused = match guest.role {
        Role::Decode => {
            let mut client = DecodeClient::new(channel);
            client.decode(v1::DecodeRequest::default()).await.err()
        }
        Role::Prefill => {
            let mut client = PrefillClient::new(channel);
            let commands = tokio_stream::iter(Vec::<v1::PrefillCommand>::new());
            client.prefill(commands).await.err()
        }
        Role::Store | Role::Router => panic!("it takes no requests"),
    };
    refused.is_some_and(|refused| status::from_status(&refused).code == ErrorCode::Unavailable)
}

/// Runs `perigee node …` against the cluster's router.
fn node(cluster: &Cluster, arguments: &[&str]) -> Output {
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let mut command = Command::new(perigee());
    command.arg("node").args(arguments).args(["--router", router]);
    command.output().expect("start")
}

/// What a command of [`node`] that works prints.
fn printed(cluster: &Cluster, arguments: &[&str]) -> String {
    let output = node(cluster, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn shown(cluster: &Cluster, id: &str) -> Value {
    serde_json::from_str(&printed(cluster, &["show", id, "-o", "json"])).expect("JSON")
}

fn exits(output: &Output, code: ErrorCode, says: &str) {
    assert_eq!(output.status.code(), Some(code.exit().into()), "{output:?}");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains(says), "{errors}");
}

/// Requests that are spread over all nodes, and whose answers do not depend on them.
fn load(model: &Path, grpc: &str) -> Arc<Load> {
    let mut random = Random::new(77);
    let document: Vec<Token> = (0..300).map(|_| token(&mut random, VOCABULARY)).collect();
    let mut case = || {
        let mut case = Case::random(&mut random, std::slice::from_ref(&document), VOCABULARY, 1);
        case.sampling = types::SamplingParams {
            temperature: 0.0,
            max_tokens: 60,
            ignore_eos: true,
            ..types::SamplingParams::default()
        };
        case
    };
    Load::new(model, &[grpc], (0..24).map(|_| case()).collect())
}

/// Drains the guest, takes it back, drains it again, stops it, and starts it anew.
async fn take_out_and_put_back(guest: &Pod, mut process: Process, cluster: &Cluster, load: &Load) -> Process {
    let (id, grpc) = (guest.id.as_str(), &cluster.ready.grpc);
    let epoch = newer(grpc, id, Epoch(0)).await.epoch;
    load.uses(id).await;
    assert!(!refuses(guest).await);

    guest.drain_self();
    assert!(refuses(guest).await);
    let said = shown(cluster, id);
    assert_eq!(
        (&said["state"], &said["load"]["drain"]["done"]),
        (&"draining".into(), &true.into()),
        "{said}"
    );
    assert_eq!(said["load"]["drain"]["requests"], 0, "{said}");
    let text = printed(cluster, &["show", id]);
    assert!(text.contains("done: it may be stopped"), "{text}");
    // What was placed before the router heard of it was refused and placed elsewhere, and nothing came since.
    let part = load.seen().of(id);
    load.uses(match guest.role {
        Role::Decode => "decode-0",
        _ => "prefill-0",
    })
    .await;
    assert_eq!(load.seen().of(id), part, "a drained node is used");

    printed(cluster, &["resume", id]);
    assert!(!refuses(guest).await);
    load.uses(id).await;

    let text = printed(cluster, &["drain", id, "--wait", "--timeout", "1m"]);
    assert!(text.contains("is drained"), "{text}");
    process.signal(Signal::SIGTERM);
    assert_eq!(process.wait(), Some(0), "{}", process.log());
    let process = guest.start();
    newer(grpc, id, epoch).await;
    load.uses(id).await;
    process
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_are_drained_stopped_and_started_again_cost_no_request() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let roles = ["--prefill", "1", "--decode", "1", "--threads", "1"];
    let spread = ["--set", "router.policy=round_robin"];
    let apart = ["--set", "router.local_prefill_tokens_max=0"];
    let cluster = Cluster::start(&model, &[&roles[..], &spread, &apart].concat());
    let load = load(&model, &cluster.ready.grpc);
    let work = async {
        let mut running = Vec::new();
        for role in [Role::Decode, Role::Prefill] {
            let guest = guest(role, &cluster, &model);
            let process = take_out_and_put_back(&guest, guest.start(), &cluster, &load).await;
            running.push((process, guest));
        }
        running
    };
    let running = load.during(CLIENTS, work).await;
    drop(running);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_decode_node_is_drained_by_force_only_and_a_router_serves_on() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let cluster = Cluster::start(&model, &["--prefill", "1", "--decode", "1"]);
    exits(
        &node(&cluster, &["drain", "decode-0"]),
        ErrorCode::Conflict,
        "last decode node",
    );
    exits(
        &node(&cluster, &["drain", "decode-9"]),
        ErrorCode::NotFound,
        "there are: decode-0",
    );
    assert_eq!(shown(&cluster, "decode-0")["state"], "ready");

    // As many as make the drain last longer than a node needs to say so once.
    let mut streams = Vec::new();
    let mut client = cluster.client().await;
    for first in 0..8 {
        let sampling = v1::Sampling {
            max_tokens: Some(1500),
            ignore_eos: true,
            ..v1::Sampling::default()
        };
        let request = tests::request(&[first, 2, 3], sampling);
        let mut stream = client.generate(request).await.expect("placed").into_inner();
        stream.message().await.expect("accepted");
        streams.push(stream);
    }
    let impatient = ["drain", "decode-0", "--force", "--wait", "--timeout", "1ms"];
    exits(
        &node(&cluster, &impatient),
        ErrorCode::Timeout,
        "it goes on draining",
    );
    assert_eq!(shown(&cluster, "decode-0")["state"], "draining");
    for mut stream in streams {
        let mut tokens = 0;
        while let Some(response) = stream.message().await.expect("what runs goes on") {
            if let Some(v1::generate_response::Event::Tokens(chunk)) = response.event {
                tokens += chunk.ids.len();
            }
        }
        assert_eq!(tokens, 1500);
    }
    printed(&cluster, &["drain", "decode-0", "--wait"]);
    printed(&cluster, &["resume", "decode-0"]);
    let greeting = || tests::request(&[1, 2, 3], v1::Sampling::default());
    wait_for_status(&mut client, |status| {
        let ready = tests::heard(&status).all(|node| !node.load_json.contains("\"draining\":true"));
        ready
            .then_some(())
            .ok_or_else(|| "decode-0 still drains".to_owned())
    })
    .await;
    generate(&mut client, greeting()).await.expect("served again");

    let router = cluster.ready.nodes.iter().find(|node| node.role == "router");
    let router = router.expect("there is one").id.as_str();
    let ready = || {
        let url = format!("{}/readyz", cluster.ready.http);
        let output = Command::new("curl").args(["-sf", &url]).output().expect("curl");
        output.status.success()
    };
    assert!(ready());
    printed(&cluster, &["drain", router, "--wait"]);
    assert!(!ready(), "a service would still find it");
    assert_eq!(shown(&cluster, router)["state"], "draining");
    generate(&mut client, greeting())
        .await
        .expect("who has a connection is served");
    printed(&cluster, &["resume", router]);
    assert!(ready());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_drains_gives_its_blocks_away_and_takes_no_more() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let cluster = Cluster::start(&model, &["--prefill", "0", "--decode", "1", "--store", "2"]);
    let mut client = cluster.client().await;
    let stores = wait_for_status(&mut client, |status| {
        let mut stores: Vec<NodeRecord> = records(&status)
            .filter(|record| record.role == Role::Store)
            .collect();
        stores.sort_by(|a, b| a.id.cmp(&b.id));
        (stores.len() == 2)
            .then_some(stores)
            .ok_or_else(|| "there are no two stores".to_owned())
    })
    .await;
    let address = "127.0.0.1:0".parse().expect("an address");
    let transport = TcpTransport::bind(address, Epoch(1), tcp::Config::default());
    let transport = transport.await.expect("bound");
    let blocks = |record: &NodeRecord| Blocks::new(transport.clone(), record).expect("it holds blocks");
    let store = blocks(&stores[0]);
    let block_tokens = stores[0].kv_space.as_ref().expect("a space").layout.block_tokens;
    let count = 8;
    let chain = |first: Token| {
        let tokens: Vec<Token> = (first..).take(count * block_tokens).collect();
        store.kv_root().chain(&tokens, block_tokens)
    };
    let buffer = store.allocate(count).expect("memory");
    for at in 0..count {
        let fill = u8::try_from(at).expect("few");
        buffer
            .fill(at, &vec![fill; store.block_bytes()])
            .expect("it fits");
    }
    let place = || Place {
        parent: store.kv_root(),
        tenant: "",
    };
    store
        .put_from(place(), &chain(1), &buffer, 0)
        .await
        .expect("a store takes blocks");

    let text = printed(&cluster, &["drain", stores[0].id.as_str(), "--wait"]);
    assert!(text.contains("is drained"), "{text}");
    let refused = store
        .put_from(place(), &chain(2), &buffer, 0)
        .await
        .expect_err("it drains");
    assert_eq!(refused.code, ErrorCode::Unavailable, "{refused}");
    assert_eq!(
        store.get_into(&chain(1), &buffer, 0).await,
        Ok(count),
        "what it has is read as ever"
    );
    let mut held = 0;
    for record in wait_for_status(&mut client, |status| {
        Ok::<_, String>(records(&status).collect::<Vec<_>>())
    })
    .await
    {
        if record.id != stores[0].id {
            let exists = blocks(&record).exists(&chain(1)).await.expect("it answers");
            held = held.max(exists.iter().filter(|held| **held).count());
        }
    }
    assert_eq!(held, count, "a peer holds them now");

    printed(&cluster, &["resume", stores[0].id.as_str()]);
    store
        .put_from(place(), &chain(2), &buffer, 0)
        .await
        .expect("it takes blocks again");
}
