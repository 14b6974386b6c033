//! How long a decision takes: hashing the prompt, matching it against the index, and weighing every candidate.
//!
//! `cargo run --release -p router --example decide -- [locations] [nodes] [prompt tokens]`. One thread and the code that serves: a
//! cluster of which three in five nodes prefill, whose index knows so many pairs of a node and a block; as many running requests
//! as a router lets by default; prompts of which nodes hold anything from nothing to all.

use std::collections::BTreeMap;
use std::time::Instant;

use kv_store::follower::Applied;
use router::cluster::{Cluster, Query};
use router::cost::{PlacementId, Priors};
use router::placement::Settings;
use router::policy::PolicyName;
use router::residents::Answer;
use types::{
    BlockEvent, BlockHash, Epoch, KvDtype, KvLayout, KvSpace, LoadReport, NodeId, NodeRecord, Role, Slo,
    Tier, Token,
};

const BLOCK_TOKENS: usize = 32;
const DECISIONS: usize = 1_000;
/// Different prompts of which nodes hold blocks.
const PROMPTS: usize = 64;
/// Requests that run, as many as a router lets by default.
const RUNNING: usize = 512;
const EPOCH: Epoch = Epoch(1);

fn main() {
    let arguments: Vec<usize> = std::env::args()
        .skip(1)
        .filter_map(|word| word.parse().ok())
        .collect();
    let argument = |place: usize, default| arguments.get(place).copied().unwrap_or(default);
    let (locations, nodes, prompt_tokens) = (argument(0, 1_000_000), argument(1, 100), argument(2, 100_000));
    let space = space();
    let mut cluster = members(&space, nodes, locations);
    fill(&mut cluster, &space, (nodes, locations), prompt_tokens);
    run(&mut cluster, &space, prompt_tokens);
    let (mut whole, mut placing) = (Vec::new(), Vec::new());
    for decision in 0..DECISIONS {
        let held_blocks = decision * 7 % (prompt_tokens / BLOCK_TOKENS + 1);
        let mut prompt = prompt(decision % PROMPTS, prompt_tokens);
        prompt[held_blocks * BLOCK_TOKENS..].fill(0);
        let begun = Instant::now();
        let hashes = space.root().chain(&prompt, BLOCK_TOKENS);
        let hashed = Instant::now();
        let id = place(&mut cluster, &space, &hashes, prompt_tokens);
        whole.push(begun.elapsed());
        placing.push(hashed.elapsed());
        cluster.ended(id, None);
    }
    println!(
        "{nodes} nodes, {} locations, {RUNNING} running requests, prompts of {prompt_tokens} tokens",
        cluster.index().len()
    );
    for (what, times) in [("hashed and placed", &mut whole), ("placed", &mut placing)] {
        times.sort_unstable();
        let rank = |share: usize| times[(times.len() - 1) * share / 100].as_micros();
        println!("{what}: p50 {} µs, p99 {} µs", rank(50), rank(99));
    }
}

fn space() -> KvSpace {
    KvSpace {
        model_digest: "digest".into(),
        arithmetic: "fast-1".into(),
        layout: KvLayout {
            layers: 80,
            kv_heads: 8,
            head_dim: 128,
            block_tokens: BLOCK_TOKENS,
            dtype: KvDtype::F16,
        },
        adapter: None,
        tenant_salt: String::new(),
    }
}

fn id(number: usize) -> NodeId {
    format!("node-{number:03}").into()
}

fn members(space: &KvSpace, nodes: usize, locations: usize) -> Cluster {
    let (policy, settings) = (PolicyName::Perigee.build(), Settings::default());
    let mut cluster = Cluster::new("model", "digest", locations, Priors::default(), policy, settings);
    let record = |number: usize| NodeRecord {
        id: id(number),
        epoch: EPOCH,
        role: if number % 5 < 3 {
            Role::Prefill
        } else {
            Role::Decode
        },
        grpc_endpoint: String::new(),
        http_endpoint: String::new(),
        transfer_endpoint: String::new(),
        model: "model".into(),
        kv_space: Some(space.clone()),
        capacity_blocks: 1 << 20,
        context_tokens_max: 1 << 20,
    };
    let records: BTreeMap<_, _> = (0..nodes).map(|number| (id(number), record(number))).collect();
    cluster.registry(&records);
    for number in 0..nodes {
        let report = LoadReport {
            free_blocks: 1 << 20,
            queued_prefill_tokens: (number * 7_919 % 50_000) as u64,
            running_sequences: (number % 13) as u64,
            prefill_ms_per_token: 0.1,
            prefill_ms_per_token_kilocontext: 0.001,
            decode_step_ms: 20.0,
            transfer_bytes_per_ms: 1e7,
            ..LoadReport::default()
        };
        cluster.reported(&id(number), EPOCH, report, Instant::now());
    }
    cluster
}

fn prompt(number: usize, tokens: usize) -> Vec<Token> {
    (0..tokens)
        .map(|at| (at * 31 + number * 7_919 + 1) as Token % 100_000)
        .collect()
}

/// Gives every node its share of the locations: prefixes of the prompts, of different lengths, and then blocks of its own.
fn fill(cluster: &mut Cluster, space: &KvSpace, (nodes, locations): (usize, usize), prompt_tokens: usize) {
    let root = space.root();
    let chains: Vec<_> = (0..PROMPTS)
        .map(|number| root.chain(&prompt(number, prompt_tokens), BLOCK_TOKENS))
        .collect();
    for number in 0..nodes {
        let mut left = locations / nodes;
        let mut events = Vec::with_capacity(left);
        for (place, chain) in chains.iter().enumerate() {
            let held = chain.len() * ((number * 13 + place * 29) % 101) / 100;
            let held = held.min(left);
            left -= held;
            events.extend(stored(root, chain[..held].iter().copied()));
        }
        let own = (0..left).map(|at| root.child(&[number as Token, at as Token, Token::MAX]));
        events.extend(stored(root, own));
        let applied = Applied { reset: false, events };
        cluster.logged(&id(number), EPOCH, &applied);
    }
}

fn stored(root: BlockHash, chain: impl Iterator<Item = BlockHash>) -> impl Iterator<Item = BlockEvent> {
    chain.scan(root, |parent, hash| {
        let parent = std::mem::replace(parent, hash);
        let tier = Tier::Host;
        Some(BlockEvent::Stored { hash, parent, tier })
    })
}

fn place(cluster: &mut Cluster, space: &KvSpace, hashes: &[BlockHash], prompt_tokens: usize) -> PlacementId {
    let query = Query {
        hashes,
        key: hashes[0],
        prompt_tokens: prompt_tokens as u64,
        failed: &BTreeMap::new(),
        slo: Slo::default(),
        answer: &answer(hashes),
        draw: 0,
    };
    match cluster.place(space, &query, Instant::now()) {
        Ok(assignment) => assignment.id,
        Err(error) => panic!("{error}"),
    }
}

/// Of one of some tenants.
fn answer(hashes: &[BlockHash]) -> Answer {
    Answer {
        tenant: format!("tenant-{}", hashes[0].0[0] % 8),
        tokens: 0,
        tokens_max: 4_096,
    }
}

/// Requests that decode, after others have shown how long answers are.
fn run(cluster: &mut Cluster, space: &KvSpace, prompt_tokens: usize) {
    for number in 0..2 * RUNNING {
        let hashes = [space.root().child(&[number as Token])];
        let id = place(cluster, space, &hashes, prompt_tokens);
        if number < RUNNING {
            cluster.ended(id, Some(1 + number as u64 * 31 % 1_000));
        } else {
            cluster.prefilled(id, Instant::now());
        }
    }
}
