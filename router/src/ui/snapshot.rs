//! The cluster at one moment, as the live page draws it.
//!
//! Invariant: its size is bounded by the constants here and by the number of nodes.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;
use types::{Millis, NodeId, Role};

use crate::cluster::MemberStatus;
use crate::dispatch::{Dispatcher, unix_ms};
use crate::history::{self, Link, Step};
use crate::policy::PolicyName;
use crate::requests;
use crate::timeline::{Part, State, parts};

/// Requests that run, and those that ended.
const RUNNING_MAX: usize = 24;
const ENDED_MAX: usize = 24;
/// Prefixes.
const PREFIXES_MAX: usize = 8;
/// Nodes of each kind. Those beside them are counted only.
const NODES_MAX: usize = 64;
/// Steps over which links are averaged: one that is complete, at least.
const LINK_STEPS: usize = 3;

#[derive(Debug, Serialize)]
pub(super) struct Snapshot {
    unix_ms: u64,
    router: String,
    version: &'static str,
    model: String,
    policy: PolicyName,
    running: usize,
    waiting: usize,
    nodes: Vec<Node>,
    nodes_left_out: usize,
    links: Vec<Flow>,
    steps: Steps,
    prefixes: Vec<Prefix>,
    requests: Vec<Request>,
}

#[derive(Debug, Serialize)]
struct Node {
    id: String,
    role: &'static str,
    state: &'static str,
    running: u64,
    queued: u64,
    /// Blocks of the pool: all, those in use, and those that are cached for whoever asks.
    kv_blocks: u64,
    kv_used: u64,
    kv_cached: u64,
    disk_blocks: u64,
    disk_used: u64,
    step_ms: f64,
    prefill_tokens_per_s: f64,
}

/// What moves from one node to another; empty is the router.
#[derive(Debug, Serialize)]
struct Flow {
    from: String,
    to: String,
    requests_per_s: f64,
    bytes_per_s: f64,
    /// Requests that are on this way now.
    running: usize,
}

/// Columns, one value per step.
#[derive(Debug, Default, Serialize)]
struct Steps {
    step_s: f64,
    finished: Vec<u64>,
    slo_met: Vec<u64>,
    slo_missed: Vec<u64>,
    rejected: Vec<u64>,
    failed: Vec<u64>,
    cancelled: Vec<u64>,
    tokens: Vec<u64>,
    prompt_tokens: Vec<u64>,
    cached_tokens: Vec<u64>,
    ttft_p50_ms: Vec<Option<f64>>,
    ttft_p95_ms: Vec<Option<f64>>,
}

#[derive(Debug, Serialize)]
struct Prefix {
    /// The beginning of its first block's hash.
    id: String,
    tenant: String,
    requests: u64,
    heat: f64,
    shared_tokens: usize,
    tokens: usize,
    holders: Vec<Holder>,
}

/// Leading tokens that a node holds of a prefix.
#[derive(Debug, Serialize)]
struct Holder {
    node: String,
    memory_tokens: usize,
    disk_tokens: usize,
}

#[derive(Debug, Serialize)]
pub(super) struct Request {
    id: String,
    arrived_unix_ms: u64,
    state: &'static str,
    running: bool,
    age_ms: f64,
    tenant: String,
    prompt_tokens: u64,
    cached_tokens: u64,
    output_tokens: u64,
    output_tokens_max: u64,
    ttft_ms: Option<f64>,
    tbt_ms: f64,
    slo_met: Option<bool>,
    prefill: Option<String>,
    decode: Option<String>,
    placements: usize,
    parts: Vec<Bar>,
    #[serde(skip_serializing_if = "String::is_empty")]
    error: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    trace_id: String,
}

#[derive(Debug, Serialize)]
struct Bar {
    name: String,
    node: String,
    depth: u32,
    start_ms: f64,
    duration_ms: f64,
    running: bool,
    bytes: u64,
    detail: String,
}

impl Snapshot {
    pub(super) fn take(dispatcher: &Dispatcher, router: &NodeId) -> Self {
        let (running, waiting) = dispatcher.counts();
        let members = dispatcher.cluster().lock().status();
        let (live, ended) = dispatcher.requests().newest(RUNNING_MAX, ENDED_MAX);
        let steps = dispatcher.watchers().steps();
        let mut nodes: Vec<Node> = members.iter().filter_map(node).collect();
        let nodes_left_out = nodes.len().saturating_sub(NODES_MAX);
        nodes.truncate(NODES_MAX);
        Self {
            unix_ms: unix_ms(),
            router: router.to_string(),
            version: env!("CARGO_PKG_VERSION"),
            model: dispatcher.model().name().to_owned(),
            policy: dispatcher.config().policy,
            running,
            waiting,
            nodes,
            nodes_left_out,
            links: links(&steps, &live),
            steps: Steps::new(&steps),
            prefixes: prefixes(dispatcher),
            requests: live.iter().chain(&ended).map(Request::brief).collect(),
        }
    }
}

/// Routers share nothing, so only the others are shown.
fn node(member: &MemberStatus) -> Option<Node> {
    let record = &member.record;
    if record.role == Role::Router {
        return None;
    }
    let load = member.load.unwrap_or_default();
    let state = match member.load {
        _ if !member.connected => "lost",
        Some(load) => load.state(),
        None => "starting",
    };
    let free = load.free_blocks.min(record.capacity_blocks);
    let cached = load.evictable_blocks.min(record.capacity_blocks - free);
    let ms_per_token = load.prefill_ms_per_token;
    Some(Node {
        id: record.id.to_string(),
        role: record.role.as_str(),
        state,
        running: load.running_sequences,
        queued: load.queued_requests,
        kv_blocks: record.capacity_blocks,
        kv_used: record.capacity_blocks - free - cached,
        kv_cached: cached,
        disk_blocks: load.disk_capacity_blocks,
        disk_used: load.disk_blocks,
        step_ms: load.decode_step_ms,
        prefill_tokens_per_s: if ms_per_token > 0.0 {
            1e3 / ms_per_token
        } else {
            0.0
        },
    })
}

fn links(steps: &[Step], live: &[requests::Snapshot]) -> Vec<Flow> {
    let mut flows: BTreeMap<(String, String), (Link, usize)> = BTreeMap::new();
    let last = &steps[steps.len().saturating_sub(LINK_STEPS)..];
    for (way, link) in last.iter().flat_map(|step| &step.links) {
        let (sum, _) = flows.entry(way.clone()).or_default();
        sum.requests += link.requests;
        sum.bytes += link.bytes;
    }
    for snapshot in live {
        let Some(placement) = snapshot.timeline.placements.last() else {
            continue;
        };
        let decode = placement.decode.to_string();
        let mut on = |from: String, to: String| flows.entry((from, to)).or_default().1 += 1;
        match &placement.prefill {
            None => on(String::new(), decode),
            // Once there are tokens, the prefill node has done its part.
            Some(prefill) if placement.state() == State::Decoding => on(prefill.to_string(), decode),
            Some(prefill) => on(String::new(), prefill.to_string()),
        }
    }
    let seconds = history::STEP.as_secs_f64() * last.len().max(1) as f64;
    let flow = |((from, to), (link, running)): ((String, String), (Link, usize))| Flow {
        from,
        to,
        requests_per_s: link.requests as f64 / seconds,
        bytes_per_s: link.bytes as f64 / seconds,
        running,
    };
    flows.into_iter().map(flow).collect()
}

fn prefixes(dispatcher: &Dispatcher) -> Vec<Prefix> {
    let hottest = dispatcher.heat().hottest(PREFIXES_MAX, Instant::now());
    let cluster = dispatcher.cluster().lock();
    let block_tokens = cluster.kv_space().map_or(0, |space| space.layout.block_tokens);
    let prefix = |prefix: crate::heat::Prefix| {
        let mut holders: Vec<Holder> = cluster
            .index()
            .match_prefix(&prefix.chain)
            .into_iter()
            .map(|found| Holder {
                node: found.node.to_string(),
                memory_tokens: found.in_memory * block_tokens,
                disk_tokens: (found.blocks - found.in_memory) * block_tokens,
            })
            .collect();
        holders.sort_by(|a, b| a.node.cmp(&b.node));
        holders.truncate(NODES_MAX);
        Prefix {
            id: prefix.chain[0].to_string().chars().take(8).collect(),
            tenant: prefix.tenant,
            requests: prefix.requests,
            heat: prefix.heat,
            shared_tokens: prefix.shared_blocks * block_tokens,
            tokens: prefix.chain.len() * block_tokens,
            holders,
        }
    };
    hottest.into_iter().map(prefix).collect()
}

impl Steps {
    fn new(steps: &[Step]) -> Self {
        let of = |value: fn(&Step) -> u64| steps.iter().map(value).collect();
        let percentile = |percent| {
            let values = steps.iter().map(|step| step.ttft(percent));
            values.map(|ttft| ttft.map(|ttft| tenths(ttft.0))).collect()
        };
        Self {
            step_s: history::STEP.as_secs_f64(),
            finished: of(|step| step.finished),
            slo_met: of(|step| step.slo_met),
            slo_missed: of(|step| step.slo_missed),
            rejected: of(|step| step.rejected),
            failed: of(|step| step.failed),
            cancelled: of(|step| step.cancelled),
            tokens: of(|step| step.tokens),
            prompt_tokens: of(|step| step.prompt_tokens),
            cached_tokens: of(|step| step.cached_tokens),
            ttft_p50_ms: percentile(50.0),
            ttft_p95_ms: percentile(95.0),
        }
    }
}

impl Request {
    /// For a list: without what only one who asks for it wants to know.
    fn brief(snapshot: &requests::Snapshot) -> Self {
        let request = Self::whole(snapshot);
        Self {
            error: String::new(),
            trace_id: String::new(),
            ..request
        }
    }

    pub(super) fn whole(snapshot: &requests::Snapshot) -> Self {
        let requests::Snapshot { timeline, now } = snapshot;
        let last = timeline.placements.last();
        Self {
            id: timeline.arrival.request.to_string(),
            arrived_unix_ms: timeline.arrival.arrived_unix_ms,
            state: timeline.state().as_str(),
            running: timeline.ended.is_none(),
            age_ms: tenths(timeline.age(*now).0),
            tenant: timeline.arrival.tenant.clone(),
            prompt_tokens: timeline.prompt_tokens,
            cached_tokens: timeline.cached_tokens,
            output_tokens: timeline.output_tokens,
            output_tokens_max: timeline.output_tokens_max,
            ttft_ms: timeline.first_token.map(|Millis(ms)| tenths(ms)),
            tbt_ms: tenths(timeline.tbt_mean().0),
            slo_met: timeline.met_slo(),
            prefill: last
                .and_then(|last| last.prefill.as_ref())
                .map(ToString::to_string),
            decode: last.map(|last| last.decode.to_string()),
            placements: timeline.placements.len(),
            parts: parts(timeline, *now).into_iter().map(Bar::new).collect(),
            error: timeline.error.clone(),
            trace_id: format!("{:032x}", timeline.arrival.root.trace),
        }
    }
}

impl Bar {
    fn new(part: Part) -> Self {
        Self {
            name: part.name.into_owned(),
            node: part.node,
            depth: part.depth,
            start_ms: hundredths(part.start.0),
            duration_ms: hundredths(part.duration.0),
            running: part.running,
            bytes: part.bytes,
            detail: part.detail,
        }
    }
}

/// Nobody sees more, and it is sent twice a second.
fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn hundredths(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
