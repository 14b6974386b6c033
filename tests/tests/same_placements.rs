//! A router behind the wire and the one that the simulator calls directly place alike.
//!
//! Two simulations of one cluster run on the same seed and the same virtual clock. In one of them everything that the router hears has
//! gone over the wire: members as JSON, load reports and logs as encoded messages, followed as `members.rs` follows them, into the
//! `SharedCluster` of a running router; and what it places are tokens, hashed as a running request hashes them. Where any part of this
//! lost or changed something that placement goes by, the two would part.
//!
//! Not covered: the router's own clock and the order in which its tasks run, which no two runs share.

#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kv_store::follower::Follower;
use kv_store::log::Batch;
use prost::Message;
use proto::{convert, v1};
use router::admission::{Admission, Room};
use router::cluster::{Assignment, Cluster, Query};
use router::cost::PlacementId;
use router::cost::learning::{Foretold, Measured};
use router::dispatch;
use router::members::SharedCluster;
use router::placement::NoPlacement;
use router::policy::PolicyName;
use sim::front::{Direct, Front, MODEL};
use sim::profile::Profile;
use sim::scenario::Scenario;
use sim::trace::{self, Request};
use types::{Epoch, LoadReport, NodeId, NodeRecord, Token};

const REQUESTS: usize = 1_000;

/// Which request went where: prefill node, decode node, and the sources of its prefix.
type Placements = Vec<(usize, Option<NodeId>, NodeId, Vec<(NodeId, usize)>)>;

/// A router's inside, behind the wire.
struct Live {
    cluster: SharedCluster,
    followers: BTreeMap<NodeId, Follower>,
    admission: Admission,
    prompts: Arc<Vec<Vec<Token>>>,
}

impl Live {
    fn new(config: &router::Config, prompts: Arc<Vec<Vec<Token>>>) -> Self {
        Self {
            cluster: SharedCluster::new(Cluster::new(
                MODEL,
                MODEL,
                config.index_entries_max,
                config.priors(),
                config.policy.build(),
                config.placement(),
            )),
            followers: BTreeMap::new(),
            admission: Admission::new(config.limits()),
            prompts,
        }
    }
}

impl Front for Live {
    fn registry(&mut self, nodes: &BTreeMap<NodeId, NodeRecord>) {
        let read = |record: &NodeRecord| convert::record(&convert::record_to_json(record)).expect("JSON");
        let nodes = nodes
            .values()
            .map(read)
            .map(|record| (record.id.clone(), record))
            .collect();
        self.cluster.lock().registry(&nodes);
    }

    fn reported(&mut self, node: &NodeId, epoch: Epoch, report: LoadReport, now: Instant) {
        let bytes = convert::load_to_wire(&report).encode_to_vec();
        let report = convert::load(&v1::LoadReport::decode(&bytes[..]).expect("a report"));
        self.cluster.lock().reported(node, epoch, report, now);
    }

    fn logged(&mut self, node: &NodeId, batch: Batch) {
        let bytes = batch.to_wire().encode_to_vec();
        let wire = v1::LogBatch::decode(&bytes[..]).expect("a batch");
        let batch = Batch::from_wire(&wire).expect("a batch");
        let epoch = batch.epoch;
        let follower = self.followers.entry(node.clone()).or_default();
        let applied = follower.apply(batch).expect("nothing is lost");
        self.cluster.lock().logged(node, epoch, &applied);
    }

    fn lost(&mut self, node: &NodeId, epoch: Epoch) {
        self.followers.remove(node);
        self.cluster.lock().report_stream_ended(node, epoch);
        self.cluster.lock().log_stream_ended(node, epoch);
    }

    fn place(&mut self, request: usize, query: &Query<'_>, now: Instant) -> Result<Assignment, NoPlacement> {
        let space = self.cluster.lock().kv_space().expect("nodes are known");
        let prompt = &self.prompts[request];
        let (hashes, key) = router::request::hashes(&space, "", prompt);
        let query = Query {
            hashes: &hashes,
            key,
            prompt_tokens: prompt.len() as u64,
            ..*query
        };
        self.cluster.lock().place(&space, &query, now)
    }

    fn prefilled(&mut self, id: PlacementId, now: Instant) {
        self.cluster.lock().prefilled(id, now);
    }

    fn ended(&mut self, id: PlacementId, tokens: Option<u64>) {
        self.cluster.lock().ended(id, tokens);
    }

    fn completed(&mut self, foretold: &Foretold, measured: &Measured) {
        let report = v1::RequestReport {
            queue_ms: measured.queue.0,
            fetched_bytes: measured.fetch.bytes,
            fetch_ms: measured.fetch.took.0,
            prefill_ms: measured.compute.0,
            handoff_bytes: measured.handoff.bytes,
            // Their sum must come out of floating point as it was.
            handoff_hidden_ms: measured.handoff.took.0,
            handoff_exposed_ms: 0.0,
            ..v1::RequestReport::default()
        };
        let report = v1::RequestReport::decode(&report.encode_to_vec()[..]).expect("a report");
        let heard = dispatch::measured(&report, measured.cached_tokens, measured.ttft);
        let exposed = measured.exposed;
        self.cluster
            .lock()
            .completed(foretold, &Measured { exposed, ..heard });
    }

    fn room(&self) -> Room {
        self.cluster.lock().room()
    }

    fn admission(&mut self) -> &mut Admission {
        &mut self.admission
    }
}

/// Notes every placement of another one.
struct Noting {
    inner: Box<dyn Front>,
    placements: Arc<Mutex<Placements>>,
}

impl Front for Noting {
    fn registry(&mut self, nodes: &BTreeMap<NodeId, NodeRecord>) {
        self.inner.registry(nodes);
    }

    fn reported(&mut self, node: &NodeId, epoch: Epoch, report: LoadReport, now: Instant) {
        self.inner.reported(node, epoch, report, now);
    }

    fn logged(&mut self, node: &NodeId, batch: Batch) {
        self.inner.logged(node, batch);
    }

    fn lost(&mut self, node: &NodeId, epoch: Epoch) {
        self.inner.lost(node, epoch);
    }

    fn place(&mut self, request: usize, query: &Query<'_>, now: Instant) -> Result<Assignment, NoPlacement> {
        let placed = self.inner.place(request, query, now)?;
        let sources = placed.sources.iter();
        self.placements.lock().expect("one thread").push((
            request,
            placed.prefill.as_ref().map(|record| record.id.clone()),
            placed.decode.id.clone(),
            sources
                .map(|(record, blocks)| (record.id.clone(), *blocks))
                .collect(),
        ));
        Ok(placed)
    }

    fn prefilled(&mut self, id: PlacementId, now: Instant) {
        self.inner.prefilled(id, now);
    }

    fn ended(&mut self, id: PlacementId, tokens: Option<u64>) {
        self.inner.ended(id, tokens);
    }

    fn completed(&mut self, foretold: &Foretold, measured: &Measured) {
        self.inner.completed(foretold, measured);
    }

    fn room(&self) -> Room {
        self.inner.room()
    }

    fn admission(&mut self) -> &mut Admission {
        self.inner.admission()
    }
}

fn scenario(policy: PolicyName) -> Scenario {
    let mut scenario = Scenario::default();
    scenario.cluster.prefill_nodes = 4;
    scenario.cluster.decode_nodes = 4;
    scenario.cluster.prefill_pool_tokens = 1_000_000;
    scenario.router.policy = policy;
    scenario.workload.requests = REQUESTS;
    scenario.workload.synthetic.rate_per_s = 2.5;
    scenario
}

/// The first requests of the published conversation trace where `PERIGEE_TRACE` says that it is, and of synthetic sessions elsewhere.
fn requests(scenario: &Scenario) -> Vec<Request> {
    let trace = std::env::var_os("PERIGEE_TRACE").map(|path| {
        let text = std::fs::read_to_string(path).expect("the trace can be read");
        trace::parse(&text, scenario.workload.block_tokens).expect("a trace")
    });
    let requests = scenario.workload.requests(trace.as_deref(), scenario.seed);
    assert_eq!(requests.len(), REQUESTS);
    requests
}

/// Tokens whose blocks are equal exactly where the request's are, so far as they are full.
fn tokens(request: &Request, index: usize, block_tokens: u64) -> Vec<Token> {
    let of_block =
        |seed: u64| (0..block_tokens).map(move |place| ((seed ^ (place * 0x9e37_79b9)) % 128_000) as Token);
    let first = |bytes: [u8; 16]| u64::from_be_bytes(bytes[..8].try_into().expect("eight"));
    let full = request.chain.iter().flat_map(|hash| of_block(first(hash.0)));
    // The rest is nobody else's.
    let rest = of_block(u64::MAX - index as u64);
    full.chain(rest).take(request.prompt_tokens as usize).collect()
}

#[test]
fn a_live_router_and_the_simulated_one_place_a_thousand_requests_alike() {
    let profile = Profile::parse(Profile::built_in("llama-3-70b-8xa800").expect("built in")).expect("valid");
    for policy in [PolicyName::Perigee, PolicyName::RoundRobin] {
        let scenario = scenario(policy);
        let mut requests = requests(&scenario);
        let block_tokens = scenario.workload.block_tokens;
        let prompts: Vec<Vec<Token>> = requests
            .iter()
            .enumerate()
            .map(|(index, request)| tokens(request, index, block_tokens))
            .collect();
        let space = sim::simulation::space(&profile, block_tokens);
        for (request, prompt) in requests.iter_mut().zip(&prompts) {
            (request.chain, request.key) = router::request::hashes(&space, "", prompt);
        }
        let prompts = Arc::new(prompts);
        let run = |inner: Box<dyn Front>| {
            let placements = Arc::new(Mutex::new(Vec::new()));
            let mut router = Some(Noting {
                inner,
                placements: placements.clone(),
            });
            let outcomes = sim::simulation::run_with(&scenario, &profile, &requests, || {
                Box::new(router.take().expect("one router"))
            });
            let placements = placements.lock().expect("one thread").clone();
            (placements, outcomes)
        };
        let (simulated, outcomes) = run(Box::new(Direct::new(&scenario)));
        let (live, live_outcomes) = run(Box::new(Live::new(&scenario.router, prompts)));
        assert_eq!(simulated.len(), REQUESTS);
        let fetches = simulated.iter().filter(|(_, _, _, sources)| !sources.is_empty());
        assert!(fetches.count() > 20, "the requests share too little to tell");
        for (simulated, live) in simulated.iter().zip(&live) {
            assert_eq!(simulated, live, "{policy:?}");
        }
        assert_eq!(outcomes, live_outcomes);
    }
}
