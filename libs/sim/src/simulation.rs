//! A cluster in virtual time, over the code that serves: the router's [`Cluster`](router::cluster::Cluster) and admission, the store's
//! block table and log.
//!
//! Invariant: nothing here decides. Where a request goes, whether it is taken, what a pool evicts and what an index believes comes
//! from the modules that production runs; the simulator only says how long things take and in which order they happen.
//! Deterministic: equal inputs give equal outcomes.
//!
//! How a node works, as real ones do:
//! - a prompt's prefix is what the node held when the prompt came, and what its peers send while it queues;
//! - prompts are computed one after the other, oldest first; each layer is pushed as soon as it is computed;
//! - a decode node computes all its sequences in one step, and a part of one prompt beside, if it prefills by itself;
//! - nodes report their load at an interval, and their logs arrive a moment later.
//!
//! What is simpler than in reality: a sequence takes its blocks at once for all that it will generate, and waits where there are too few,
//! where a real node preempts; blocks that decoding fills are not cached, since traces do not name them; nodes know their
//! prefill speed exactly; messages take no time.
//!
//! Elsewhere: a node (`node.rs`), how prompts and sequences advance (`prefill.rs`, `decode.rs`), failures (`failures.rs`).

mod decode;
mod failures;
mod links;
mod node;
mod outcome;
mod prefill;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use kv_store::replay::workloads::Random;
use router::admission::{self, Admission, Forecast};
use router::cluster::Query;
use router::cost::PlacementId;
use router::cost::learning::{Foretold, Measured};
use router::members::REPORT_INTERVAL;
use router::residents::Answer;
use types::{Epoch, KvSpace, Millis, NodeId, NodeRecord, Priority, Role, Slo};

use crate::front::{Direct, Front, MODEL};
use crate::pool::Pool;
use crate::profile::Profile;
use crate::scenario::Scenario;
use crate::trace::Request;

use links::Links;
use node::{Node, Visit};
pub use outcome::{NodeTotals, Outcome, Outcomes, Sample, Served};

/// How often load is sampled for reports and plots.
const SAMPLE_INTERVAL_MS: f64 = 1_000.0;
/// How often a request that no node can take asks again; [`router::Config::placement_wait`] bounds it.
const RETRY_INTERVAL_MS: f64 = 100.0;
/// How long after the last arrival a simulation ends at the latest. What has not ended then has failed.
const DRAIN_MS_MAX: f64 = 24.0 * 3_600_000.0;
/// Traces name no tenants.
const TENANT: &str = "";
/// Prompt tokens that a decode node computes in one step beside its sequences, as a real one does.
const CHUNK_TOKENS: u64 = 256;

/// What happens next, by time and then by the order in which it was planned.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Event {
    at_ns: u64,
    order: u64,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Arrives(usize),
    PlacesAgain(Visit),
    Fetched { node: At, visit: Visit },
    Computed(At),
    Lands { prefill: At, decode: At, visit: Visit },
    Stepped(At),
    Reports(At),
    LogArrives(At),
    Fails(usize),
    Returns(usize),
    MakesRoom,
    Samples,
}

/// A node in one of its lives: what was planned for an earlier one is void.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct At {
    node: usize,
    epoch: Epoch,
}

/// A request that was not turned away.
#[derive(Debug, Default)]
struct State {
    router: usize,
    attempt: u32,
    placement: Option<Placement>,
    failed: BTreeMap<NodeId, Epoch>,
    first_refused_ns: Option<u64>,
    generated: u64,
    first_ns: u64,
    last_ns: u64,
    gaps_ms: Vec<f32>,
    served: Served,
    /// Of the last placement.
    foretold: Option<Foretold>,
    measured: Measured,
    placed_ns: u64,
    outcome: Option<Outcome>,
}

#[derive(Debug, Clone, Copy)]
struct Placement {
    id: PlacementId,
    prefill: usize,
    decode: usize,
    /// Whether the prefill node's part is over.
    landed: bool,
}

struct Simulation<'a> {
    scenario: &'a Scenario,
    profile: &'a Profile,
    requests: &'a [Request],
    space: KvSpace,
    nodes: Vec<Node>,
    routers: Vec<Box<dyn Front>>,
    links: Links,
    states: Vec<State>,
    random: Random,
    events: BinaryHeap<Reverse<Event>>,
    planned: u64,
    begun: Instant,
    now_ns: u64,
    open: usize,
    samples: Vec<Sample>,
    gaps_ms: Vec<f32>,
}

/// Runs the requests, which are in the order of their coming, to their ends.
pub fn run(scenario: &Scenario, profile: &Profile, requests: &[Request]) -> Outcomes {
    run_with(scenario, profile, requests, || Box::new(Direct::new(scenario)))
}

/// The same with routers that the caller makes.
pub fn run_with(
    scenario: &Scenario,
    profile: &Profile,
    requests: &[Request],
    mut router: impl FnMut() -> Box<dyn Front>,
) -> Outcomes {
    let routers = (0..scenario.cluster.routers).map(|_| router()).collect();
    let mut simulation = Simulation::new(scenario, profile, requests, routers);
    simulation.begin();
    let last_ns = requests.last().map_or(0, |request| request.at.as_nanos() as u64);
    while simulation.open > 0
        && let Some(Reverse(event)) = simulation.events.pop()
        && event.at_ns <= last_ns + ns(DRAIN_MS_MAX)
    {
        simulation.now_ns = event.at_ns;
        simulation.happen(event.kind);
    }
    simulation.outcomes()
}

/// The space of a simulated cluster's blocks.
pub fn space(profile: &Profile, block_tokens: u64) -> KvSpace {
    KvSpace {
        model_digest: MODEL.to_owned(),
        arithmetic: "simulated".to_owned(),
        layout: profile.layout(usize::try_from(block_tokens).unwrap_or(usize::MAX)),
        adapter: None,
        tenant_salt: String::new(),
    }
}

impl<'a> Simulation<'a> {
    fn new(
        scenario: &'a Scenario,
        profile: &'a Profile,
        requests: &'a [Request],
        routers: Vec<Box<dyn Front>>,
    ) -> Self {
        let space = space(profile, scenario.workload.block_tokens);
        let shape = &scenario.cluster;
        let roles = [
            (Role::Prefill, shape.prefill_nodes),
            (Role::Decode, shape.decode_nodes),
        ];
        let mut nodes = Vec::new();
        for (role, count) in roles {
            for index in 0..count {
                let pool = new_pool(scenario, profile, role);
                let record = record(role, index, &space, profile, &pool);
                nodes.push(Node::new(record, pool));
            }
        }
        Self {
            scenario,
            profile,
            requests,
            space,
            links: Links::new(nodes.len(), profile.network_bytes_per_ms()),
            nodes,
            routers,
            states: requests.iter().map(|_| State::default()).collect(),
            random: Random::new(scenario.seed),
            events: BinaryHeap::new(),
            planned: 0,
            begun: Instant::now(),
            now_ns: 0,
            open: requests.len(),
            samples: Vec::new(),
            gaps_ms: Vec::new(),
        }
    }

    fn begin(&mut self) {
        self.tell_members();
        let interval = self.report_interval_ns();
        for node in 0..self.nodes.len() {
            self.report(node);
            self.hear_log(node);
            // Nodes do not report in step.
            let phase = interval * node as u64 / self.nodes.len() as u64;
            let at = self.at(node);
            self.plan(interval - phase, Kind::Reports(at));
        }
        for failure in 0..self.scenario.failures.len() {
            self.plan(
                ns(self.scenario.failures[failure].at_s * 1e3),
                Kind::Fails(failure),
            );
        }
        for request in 0..self.requests.len() {
            let at_ns = self.requests[request].at.as_nanos();
            self.plan(u64::try_from(at_ns).unwrap_or(u64::MAX), Kind::Arrives(request));
        }
        self.plan(ns(SAMPLE_INTERVAL_MS), Kind::Samples);
        self.plan(interval, Kind::MakesRoom);
    }

    fn happen(&mut self, kind: Kind) {
        match kind {
            Kind::Arrives(request) => self.arrives(request),
            Kind::PlacesAgain(visit) => {
                if self.is_current(visit) {
                    self.place(visit.request);
                }
            }
            Kind::Fetched { node, visit } => {
                if self.lives(node) {
                    self.fetched(node.node, visit);
                }
            }
            Kind::Computed(at) => {
                if self.lives(at) {
                    self.computed(at.node);
                }
            }
            Kind::Lands {
                prefill,
                decode,
                visit,
            } => {
                if self.lives(prefill) {
                    self.let_go(prefill.node, visit);
                    if self.lives(decode) && self.is_current(visit) {
                        self.lands(decode.node, visit);
                    }
                }
            }
            Kind::Stepped(at) => {
                if self.lives(at) {
                    self.stepped(at.node);
                }
            }
            Kind::Reports(at) => {
                if self.lives(at) {
                    self.report(at.node);
                    self.plan(self.now_ns + self.report_interval_ns(), kind);
                }
            }
            Kind::LogArrives(at) => {
                if self.lives(at) {
                    self.hear_log(at.node);
                }
            }
            Kind::Fails(failure) => self.fails(failure),
            Kind::Returns(failure) => self.returns(failure),
            Kind::MakesRoom => {
                for router in 0..self.routers.len() {
                    self.make_room(router);
                }
                self.plan(self.now_ns + self.report_interval_ns(), kind);
            }
            Kind::Samples => self.sample(),
        }
    }

    fn plan(&mut self, at_ns: u64, kind: Kind) {
        self.planned += 1;
        self.events.push(Reverse(Event {
            at_ns,
            order: self.planned,
            kind,
        }));
    }

    fn instant(&self) -> Instant {
        self.begun + Duration::from_nanos(self.now_ns)
    }

    fn at(&self, node: usize) -> At {
        let epoch = self.nodes[node].epoch;
        At { node, epoch }
    }

    fn lives(&self, at: At) -> bool {
        let node = &self.nodes[at.node];
        node.alive && node.epoch == at.epoch
    }

    fn is_current(&self, visit: Visit) -> bool {
        let state = &self.states[visit.request];
        state.attempt == visit.attempt && state.outcome.is_none()
    }

    fn arrives(&mut self, request: usize) {
        let routers = self.routers.len() as u64;
        let router = self.random.below(routers) as usize;
        self.states[request].router = router;
        let now = self.instant();
        let arrival = admission::Arrival {
            ticket: admission::Ticket(request as u64),
            tenant: TENANT,
            weight: NonZeroU32::MIN,
            priority: Priority::Normal,
            prompt_tokens: self.requests[request].prompt_tokens,
        };
        if self.routers[router].admission().lacks_room() {
            self.make_room(router);
        }
        let asked = self.slo();
        let admission = self.routers[router].admission();
        let judged = admission.foresee(&arrival).and_then(|wait| {
            let forecast = Forecast {
                ttft: wait,
                tbt: None,
            };
            Admission::judge(forecast, Duration::ZERO, asked)
        });
        if judged.is_err() {
            self.end(request, Outcome::Rejected);
            return;
        }
        match self.routers[router].admission().arrive(&arrival, now) {
            admission::Outcome::Run => self.place(request),
            admission::Outcome::Wait(displaced) => {
                for (ticket, _) in displaced {
                    self.end(ticket.0 as usize, Outcome::Rejected);
                }
            }
            admission::Outcome::Reject(_) => self.end(request, Outcome::Rejected),
        }
    }

    /// As a router does whenever nodes may have reported.
    fn make_room(&mut self, router: usize) {
        let now = self.instant();
        let room = self.routers[router].room();
        for promoted in self.routers[router].admission().make_room(room, now) {
            // A ticket is a request's index.
            self.place(promoted.0 as usize);
        }
    }

    /// As a router places a request that has its place: with the tokens that it has, on nodes that did not fail it.
    fn place(&mut self, request: usize) {
        let now = self.instant();
        let wanted = &self.requests[request];
        let draw = self.random.next();
        let waited_ms = ms(self.now_ns) - wanted.at.as_secs_f64() * 1e3;
        let asked = self.slo();
        let state = &mut self.states[request];
        let ttft = asked.ttft.filter(|_| state.generated == 0);
        let answer = Answer {
            tenant: TENANT.to_owned(),
            tokens: state.generated,
            // Traces do not say what requests would have allowed.
            tokens_max: self.profile.model.context_tokens_max,
        };
        let query = Query {
            hashes: &wanted.chain,
            key: wanted.key,
            prompt_tokens: wanted.prompt_tokens + state.generated,
            failed: &state.failed,
            slo: Slo {
                ttft: ttft.map(|limit| Millis((limit.0 - waited_ms).max(0.0))),
                tbt: asked.tbt,
            },
            answer: &answer,
            draw,
        };
        let router = &mut self.routers[state.router];
        let Ok(assignment) = router.place(request, &query, now) else {
            return self.wait_for_nodes(request);
        };
        let choice = assignment.explanation.choice().clone();
        if state.served.placements == 0 {
            let waited = Duration::from_nanos(ns(waited_ms));
            let forecast = Forecast::of(&choice, self.scenario.router.decode_load);
            if Admission::judge(forecast, waited, asked).is_err() {
                router.ended(assignment.id, None);
                return self.end(request, Outcome::Rejected);
            }
            state.served.ttft_predicted_ms = waited_ms + choice.prediction.total.0;
        }
        state.served.placements += 1;
        state.foretold = Some(assignment.foretold);
        state.measured = Measured::default();
        state.placed_ns = self.now_ns;
        state.first_refused_ns = None;
        let decode = self.node(&assignment.decode.id);
        let prefill = assignment
            .prefill
            .as_ref()
            .map_or(decode, |record| self.node(&record.id));
        let sources: Vec<(usize, usize)> = assignment
            .sources
            .iter()
            .map(|(record, blocks)| (self.node(&record.id), *blocks))
            .collect();
        let state = &mut self.states[request];
        state.placement = Some(Placement {
            id: assignment.id,
            prefill,
            decode,
            landed: false,
        });
        state.served.prefill = prefill;
        state.served.decode = decode;
        self.queue_prefill(request, prefill, &sources);
    }

    fn wait_for_nodes(&mut self, request: usize) {
        let state = &mut self.states[request];
        let since_ns = *state.first_refused_ns.get_or_insert(self.now_ns);
        let visit = Visit {
            request,
            attempt: state.attempt,
        };
        let wait: Duration = self.scenario.router.placement_wait.into();
        if u128::from(self.now_ns - since_ns) >= wait.as_nanos() {
            let outcome = if state.generated == 0 {
                Outcome::Rejected
            } else {
                Outcome::Failed
            };
            return self.end(request, outcome);
        }
        self.plan(self.now_ns + ns(RETRY_INTERVAL_MS), Kind::PlacesAgain(visit));
    }

    /// The request has its outcome; whoever waited for its place runs.
    fn end(&mut self, request: usize, outcome: Outcome) {
        let now = self.instant();
        let state = &mut self.states[request];
        let router = state.router;
        state.outcome = Some(outcome);
        self.open -= 1;
        if let Some(placement) = state.placement.take() {
            let tokens = matches!(state.outcome, Some(Outcome::Served(_))).then_some(state.generated);
            self.routers[router].ended(placement.id, tokens);
        }
        let ticket = admission::Ticket(request as u64);
        for promoted in self.routers[router].admission().end(ticket, now) {
            // A ticket is a request's index.
            self.place(promoted.0 as usize);
        }
    }

    fn slo(&self) -> Slo {
        let limits = &self.scenario.slo;
        let asked = |ms: f64| limits.asked.then_some(Millis(ms));
        Slo {
            ttft: asked(limits.ttft_ms),
            tbt: asked(limits.tbt_ms),
        }
    }

    fn node(&self, id: &NodeId) -> usize {
        let found = self.nodes.iter().position(|node| node.id == *id);
        found.expect("routers know only our nodes")
    }

    fn report_interval_ns(&self) -> u64 {
        let set = self.scenario.cluster.report_interval_ms;
        set.map_or_else(|| REPORT_INTERVAL.as_nanos() as u64, ns).max(1)
    }

    fn report(&mut self, node: usize) {
        let (now, epoch) = (self.instant(), self.nodes[node].epoch);
        let report = self.nodes[node].report(self.profile, self.now_ns);
        for router in &mut self.routers {
            router.reported(&self.nodes[node].id, epoch, report, now);
        }
    }

    /// Sends what changed in the node's pool, once, a moment from now.
    fn plan_log(&mut self, node: usize) {
        if !self.nodes[node].log_planned && self.nodes[node].pool.has_news() {
            self.nodes[node].log_planned = true;
            let at_ns = self.now_ns + ns(self.scenario.cluster.log_delay_ms);
            let at = self.at(node);
            self.plan(at_ns, Kind::LogArrives(at));
        }
    }

    fn hear_log(&mut self, node: usize) {
        let node = &mut self.nodes[node];
        node.log_planned = false;
        for batch in node.pool.news(node.epoch) {
            for router in &mut self.routers {
                router.logged(&node.id, batch.clone());
            }
        }
    }

    fn tell_members(&mut self) {
        let alive = self.nodes.iter().filter(|node| node.alive);
        let members: BTreeMap<NodeId, NodeRecord> =
            alive.map(|node| (node.id.clone(), node.record.clone())).collect();
        for router in &mut self.routers {
            router.registry(&members);
        }
    }

    fn sample(&mut self) {
        let decode = self.nodes.iter().filter(|node| node.role == Role::Decode);
        let steps = decode.clone().map(|node| {
            let batch = &node.batch;
            self.profile
                .step_ms(batch.sequences() as u64, batch.resident_tokens)
        });
        let count = decode.clone().count().max(1) as f64;
        self.samples.push(Sample {
            at_s: ms(self.now_ns) / 1e3,
            queued_prefill_tokens: self
                .nodes
                .iter()
                .map(|node| node.prefills.queued_tokens(self.now_ns))
                .sum(),
            running_sequences: decode.map(|node| node.batch.sequences()).sum(),
            decode_load: steps.sum::<f64>() / count / self.scenario.slo.tbt_ms,
        });
        self.plan(self.now_ns + ns(SAMPLE_INTERVAL_MS), Kind::Samples);
    }
}

fn new_pool(scenario: &Scenario, profile: &Profile, role: Role) -> Pool {
    let tokens = match role {
        Role::Decode => scenario.decode_pool_tokens(profile),
        Role::Prefill | Role::Router | Role::Store => scenario.cluster.prefill_pool_tokens,
    };
    let blocks = tokens / scenario.workload.block_tokens;
    Pool::new(
        usize::try_from(blocks).unwrap_or(usize::MAX),
        scenario.cluster.eviction,
    )
}

fn record(role: Role, index: usize, space: &KvSpace, profile: &Profile, pool: &Pool) -> NodeRecord {
    NodeRecord {
        id: NodeId::new(format!("{role}-{index}")),
        epoch: Epoch(1),
        role,
        grpc_endpoint: String::new(),
        http_endpoint: String::new(),
        transfer_endpoint: String::new(),
        model: MODEL.to_owned(),
        kv_space: Some(space.clone()),
        capacity_blocks: pool.free_and_evictable().0,
        context_tokens_max: profile.model.context_tokens_max,
    }
}

/// Milliseconds as nanoseconds of the simulation's clock.
fn ns(ms: f64) -> u64 {
    (ms.max(0.0) * 1e6).round() as u64
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests;
