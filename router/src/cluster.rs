//! What this router knows of the cluster: members, their load, their blocks.
//!
//! Invariants:
//! - a member that left the registry but still talks to us stays, since losing the registry must fail nothing; it goes when
//!   its last stream ends;
//! - a member whose load stream is broken gets nothing new, from the moment it broke;
//! - everything known of a member is of one epoch.
//!
//! Pure: callers pass `now`. Elsewhere: the streams (`members.rs`).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kv_store::follower::Applied;
use types::{BlockHash, Epoch, KvSpace, LoadReport, Millis, NodeId, NodeRecord, Role, Slo};

use crate::admission::Room;
use crate::cost::learning::{Foretold, Measured};
use crate::cost::{CostModel, Placed, PlacementId, Priors};
use crate::index::PrefixIndex;
use crate::lengths::Lengths;
use crate::placement::{self, Explanation, KvShape, NoPlacement, NodeView, Problem, Settings};
use crate::policy::Policy;
use crate::residents::{Answer, Outlook, Residents};

/// The members, and everything that placement goes by.
#[derive(Debug)]
pub struct Cluster {
    model: String,
    digest: String,
    members: BTreeMap<NodeId, Member>,
    index: PrefixIndex,
    costs: CostModel,
    residents: Residents,
    lengths: Lengths,
    policy: Box<dyn Policy>,
    settings: Settings,
}

#[derive(Debug)]
struct Member {
    record: NodeRecord,
    registered: bool,
    reporting: bool,
    following: bool,
}

/// What to do about a member's streams.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// Follow this incarnation, and no other one of the node.
    Follow(Box<NodeRecord>),
    /// Stop: the member is gone.
    Unfollow(NodeId),
}

/// A request as placement needs it.
#[derive(Debug)]
pub struct Query<'a> {
    /// Block hashes of the sequence so far.
    pub hashes: &'a [BlockHash],
    /// Decides between equals.
    pub key: BlockHash,
    /// Tokens of the sequence so far.
    pub prompt_tokens: u64,
    /// Incarnations on which the request failed.
    pub failed: &'a BTreeMap<NodeId, Epoch>,
    /// What is left of the request's limits.
    pub slo: Slo,
    /// What its answer may become.
    pub answer: &'a Answer,
    /// A random number.
    pub draw: u64,
}

/// A placement that was counted, with what is needed to carry it out.
#[derive(Debug)]
pub struct Assignment {
    /// To be ended by [`Cluster::ended`].
    pub id: PlacementId,
    /// The decision with its reasons.
    pub explanation: Explanation,
    /// What it goes by, for [`Cluster::completed`].
    pub foretold: Foretold,
    /// Where the request decodes.
    pub decode: NodeRecord,
    /// Where it is prefilled, if not there.
    pub prefill: Option<NodeRecord>,
    /// Peers that hold its prefix, and how many blocks of it.
    pub sources: Vec<(NodeRecord, usize)>,
}

/// A member as status reports show it.
#[derive(Debug, Clone, PartialEq)]
pub struct MemberStatus {
    /// Its entry in the registry.
    pub record: NodeRecord,
    /// Its last report.
    pub load: Option<LoadReport>,
    /// Whether its streams are alive.
    pub connected: bool,
    /// Blocks of it that the index knows.
    pub indexed_blocks: u64,
}

impl Cluster {
    /// A cluster without members, for a router that serves the model with this name and digest.
    pub fn new(
        model: &str,
        digest: &str,
        index_entries_max: usize,
        priors: Priors,
        policy: Box<dyn Policy>,
        settings: Settings,
    ) -> Self {
        Self {
            model: model.to_owned(),
            digest: digest.to_owned(),
            members: BTreeMap::new(),
            index: PrefixIndex::new(index_entries_max),
            costs: CostModel::new(priors),
            residents: Residents::default(),
            lengths: Lengths::default(),
            policy,
            settings,
        }
    }

    /// The registry's members changed.
    pub fn registry(&mut self, nodes: &BTreeMap<NodeId, NodeRecord>) -> Vec<Change> {
        let mut changes = Vec::new();
        for member in self.members.values_mut() {
            member.registered = nodes.contains_key(&member.record.id);
        }
        for record in nodes.values() {
            match self.members.get(&record.id) {
                // The same incarnation in another role is followed anew: what it reports now means something else.
                Some(known)
                    if known.record.epoch > record.epoch
                        || (known.record.epoch == record.epoch && known.record.role == record.role) => {}
                Some(_) | None => {
                    self.forget(&record.id);
                    self.members
                        .insert(record.id.clone(), Member::new(record.clone()));
                    if record.role != Role::Router {
                        changes.push(Change::Follow(Box::new(record.clone())));
                    }
                }
            }
        }
        let gone = |member: &&Member| !member.registered && !member.reporting && !member.following;
        let gone: Vec<NodeId> = self
            .members
            .values()
            .filter(gone)
            .map(|m| m.record.id.clone())
            .collect();
        for id in gone {
            self.forget(&id);
            changes.push(Change::Unfollow(id));
        }
        changes
    }

    /// A report of `node` came.
    pub fn reported(&mut self, node: &NodeId, epoch: Epoch, report: LoadReport, now: Instant) {
        if let Some(member) = self.incarnation(node, epoch) {
            member.reporting = true;
            self.costs.report(node, report, now);
        }
    }

    /// The stream of `node`'s log is open and goes on where the index is. A log without news says nothing by itself.
    pub fn log_resumed(&mut self, node: &NodeId, epoch: Epoch) {
        if let Some(member) = self.incarnation(node, epoch) {
            member.following = true;
        }
    }

    /// A batch of `node`'s log was applied to its follower.
    pub fn logged(&mut self, node: &NodeId, epoch: Epoch, applied: &Applied) {
        let Some(member) = self.incarnation(node, epoch) else {
            return;
        };
        member.following = true;
        if applied.reset {
            self.index.reset(node);
        }
        self.index.apply_all(node, &applied.events);
    }

    /// The stream of `node`'s reports broke. Whether to try again.
    pub fn report_stream_ended(&mut self, node: &NodeId, epoch: Epoch) -> bool {
        if let Some(member) = self.incarnation(node, epoch) {
            member.reporting = false;
        }
        self.keep(node, epoch)
    }

    /// The stream of `node`'s log broke. What is known stays: it is a hint that a miss corrects, and the log goes on
    /// where it stopped once the stream is back. Whether to try again.
    pub fn log_stream_ended(&mut self, node: &NodeId, epoch: Epoch) -> bool {
        if let Some(member) = self.incarnation(node, epoch) {
            member.following = false;
        }
        self.keep(node, epoch)
    }

    /// What the blocks of the model's nodes are made of, if a decode node is known.
    pub fn kv_space(&self) -> Option<KvSpace> {
        let decodes = || self.serving().filter(|member| member.record.role == Role::Decode);
        // A node that is there decides before one that was.
        let member = decodes()
            .find(|member| member.reporting)
            .or_else(|| decodes().next())?;
        member.record.kv_space.clone()
    }

    /// The longest sequence that any decode node takes now, if one is reachable.
    pub fn context_tokens_max(&self) -> Option<u64> {
        self.serving()
            .filter(|member| member.record.role == Role::Decode && member.reporting)
            .map(|member| member.record.context_tokens_max)
            .max()
    }

    /// Decode nodes that take requests now.
    pub fn decode_nodes(&self) -> usize {
        let live = |member: &&Member| member.record.role == Role::Decode && member.reporting;
        self.serving().filter(live).count()
    }

    /// Places a request among the nodes whose blocks are of `space`, and counts it there.
    ///
    /// # Errors
    ///
    /// No decode node can take it.
    pub fn place(
        &mut self,
        space: &KvSpace,
        query: &Query<'_>,
        now: Instant,
    ) -> Result<Assignment, NoPlacement> {
        // The policy goes on from here: a copy of it decides, since the rest of the cluster is only read meanwhile.
        let mut policy = self.policy.copy();
        let explanation = self.weigh(space, query, policy.as_mut(), now)?;
        self.policy = policy;
        Ok(self.assign(explanation, query, now))
    }

    /// Where [`Self::place`] would place a request now. Nothing is counted, learnt or advanced.
    ///
    /// # Errors
    ///
    /// No decode node can take it.
    pub fn explain(
        &self,
        space: &KvSpace,
        query: &Query<'_>,
        now: Instant,
    ) -> Result<Explanation, NoPlacement> {
        self.weigh(space, query, self.policy.copy().as_mut(), now)
    }

    /// Scores closer than this are equal.
    pub fn tie(&self) -> Millis {
        self.settings.tie
    }

    fn weigh(
        &self,
        space: &KvSpace,
        query: &Query<'_>,
        policy: &mut dyn Policy,
        now: Instant,
    ) -> Result<Explanation, NoPlacement> {
        let views = self.views(space);
        let matches = self.index.match_prefix(query.hashes);
        let excluded: BTreeSet<NodeId> = query
            .failed
            .iter()
            .filter(|(id, epoch)| {
                self.members
                    .get(id)
                    .is_none_or(|member| member.record.epoch == **epoch)
            })
            .map(|(id, _)| id.clone())
            .collect();
        let layout = &space.layout;
        let problem = Problem {
            key: query.key,
            prompt_tokens: query.prompt_tokens,
            matches: &matches,
            nodes: &views,
            excluded: &excluded,
            shape: KvShape {
                block_tokens: layout.block_tokens as u64,
                token_bytes: layout.token_bytes() as u64,
                layers: layout.layers as u64,
            },
            slo: query.slo,
            draw: query.draw,
            outlook: Outlook {
                residents: &self.residents,
                lengths: &self.lengths,
                now,
            },
            costs: &self.costs,
            settings: &self.settings,
        };
        placement::place(&problem, policy)
    }

    /// The node that holds most of a prompt, if it has a part of that on disk only, and how many blocks it holds.
    pub fn on_disk(&self, hashes: &[BlockHash]) -> Option<(NodeRecord, usize)> {
        let matches = self.index.match_prefix(hashes).into_iter();
        let followed = matches.filter_map(|found| {
            let member = self.members.get(found.node)?;
            member.following.then_some((member, found))
        });
        let (member, found) = followed.max_by_key(|(_, found)| (found.blocks, Reverse(found.node)))?;
        (found.in_memory < found.blocks).then(|| (member.record.clone(), found.blocks))
    }

    /// What the model's nodes can take without a prompt's having to wait there for longer than it may.
    pub fn room(&self) -> Room {
        let takes = |member: &&Member| {
            let report = self.costs.last_report(&member.record.id);
            member.reporting && report.is_none_or(|report| report.takes_requests())
        };
        let of_role = |role: Role| {
            self.serving()
                .filter(takes)
                .filter(move |m| m.record.role == role)
        };
        let apart = of_role(Role::Prefill).next().is_some();
        let engines = of_role(if apart { Role::Prefill } else { Role::Decode });
        let (pressures, factor) = (self.costs.pressures(), self.costs.context_factor());
        let left = engines.map(|member| {
            let id = &member.record.id;
            let queued = pressures
                .get(id)
                .map_or(0, |pressure| pressure.queued_prefill_tokens);
            let ms_per_token = self.costs.rates(id).prefill_ms_per_token * factor;
            let tokens_max = (self.settings.node_queue_max.0 / ms_per_token) as u64;
            tokens_max.saturating_sub(queued)
        });
        // Who has no node to go to learns that by being placed.
        let sum = |sum: u64, left: u64| sum.saturating_add(left);
        let prompt_tokens = left.reduce(sum).unwrap_or(Room::UNBOUNDED.prompt_tokens);
        Room { prompt_tokens }
    }

    /// The prompt of a placement is computed.
    pub fn prefilled(&mut self, id: PlacementId, now: Instant) {
        self.costs.prefilled(id);
        self.residents.landed(id, now);
    }

    /// A placement ended, in whichever way; with so many tokens if its answer is complete.
    pub fn ended(&mut self, id: PlacementId, tokens: Option<u64>) {
        self.costs.ended(id);
        let answer = self.residents.ended(id);
        if let (Some(answer), Some(tokens)) = (answer, tokens) {
            self.lengths.learn(&answer.tenant, tokens);
        }
    }

    /// A request is complete that was placed once: its nodes have told what it took.
    pub fn completed(&mut self, foretold: &Foretold, measured: &Measured) {
        self.costs.completed(foretold, measured);
    }

    /// Every member, for status reports.
    pub fn status(&self) -> Vec<MemberStatus> {
        let status = |member: &Member| MemberStatus {
            record: member.record.clone(),
            load: self.costs.last_report(&member.record.id).copied(),
            connected: match member.record.role {
                // Routers share nothing with each other but the registry.
                Role::Router => member.registered,
                Role::Prefill | Role::Decode | Role::Store => member.reporting && member.following,
            },
            indexed_blocks: self.index.blocks(&member.record.id) as u64,
        };
        self.members.values().map(status).collect()
    }

    /// The prefix index.
    pub fn index(&self) -> &PrefixIndex {
        &self.index
    }

    /// Nodes registered under the model's name whose weights are others than the router's, which it cannot use.
    pub fn strangers(&self) -> impl Iterator<Item = &NodeRecord> {
        let records = self.members.values().map(|member| &member.record);
        records.filter(|record| {
            let space = record.kv_space.as_ref();
            record.model == self.model && space.is_some_and(|space| space.model_digest != self.digest)
        })
    }

    /// Property tests call this after every step.
    pub fn check_integrity(&self) {
        self.index.check_integrity();
        for member in self.members.values() {
            assert!(
                member.registered || member.reporting || member.following,
                "{} is kept for no reason",
                member.record.id
            );
        }
    }

    fn assign(&mut self, explanation: Explanation, query: &Query<'_>, now: Instant) -> Assignment {
        let choice = explanation.choice();
        let engine = choice.engine();
        let foretold = Foretold {
            prefill: choice.prefill.clone(),
            decode: choice.decode.clone(),
            source: choice.sources.first().map(|source| source.node.clone()),
            new_tokens: choice.new_tokens,
            prompt_tokens: query.prompt_tokens,
            prediction: choice.prediction,
            pace: self.costs.pace(engine),
        };
        if let Some(prefill) = &choice.prefill {
            self.costs
                .learn_context(prefill, choice.new_tokens, choice.prediction.compute);
        }
        let record = |id: &NodeId| {
            let member = self.members.get(id).expect("placement chooses among members");
            member.record.clone()
        };
        let decode = record(&choice.decode);
        let prefill = choice.prefill.as_ref().map(record);
        let sources = choice
            .sources
            .iter()
            .map(|source| (record(&source.node), source.blocks))
            .collect();
        let placed = Placed {
            prefill: engine.clone(),
            prefill_tokens: choice.new_tokens,
            decode: choice.decode.clone(),
            decode_blocks: choice.decode_blocks,
        };
        let id = self.costs.place(placed, now);
        let lands = now + Duration::from_secs_f64(choice.prediction.total.0.max(0.0) / 1e3);
        self.residents
            .place(id, &choice.decode, query.answer.clone(), lands);
        Assignment {
            id,
            explanation,
            foretold,
            decode,
            prefill,
            sources,
        }
    }

    fn views(&self, space: &KvSpace) -> Vec<NodeView> {
        let (pressures, context_factor) = (self.costs.pressures(), self.costs.context_factor());
        let of_space = |member: &&Member| member.record.kv_space.as_ref() == Some(space);
        let view = |member: &Member| {
            let id = &member.record.id;
            let report = self.costs.last_report(id);
            NodeView {
                id: id.clone(),
                role: member.record.role,
                reachable: member.reporting,
                readable: member.following,
                draining: report.is_some_and(|report| report.draining),
                cordoned: report.is_some_and(|report| report.cordoned),
                context_tokens_max: member.record.context_tokens_max,
                rates: self.costs.rates(id),
                pressure: pressures.get(id).copied().unwrap_or_default(),
                context_factor,
            }
        };
        self.members.values().filter(of_space).map(view).collect()
    }

    /// Members of the router's model, with its very weights.
    fn serving(&self) -> impl Iterator<Item = &Member> {
        self.members.values().filter(|member| {
            let space = member.record.kv_space.as_ref();
            member.record.model == self.model && space.is_some_and(|space| space.model_digest == self.digest)
        })
    }

    fn incarnation(&mut self, node: &NodeId, epoch: Epoch) -> Option<&mut Member> {
        self.members
            .get_mut(node)
            .filter(|member| member.record.epoch == epoch)
    }

    fn keep(&mut self, node: &NodeId, epoch: Epoch) -> bool {
        let Some(member) = self.incarnation(node, epoch) else {
            return false;
        };
        let keep = member.registered || member.reporting || member.following;
        if !keep {
            self.forget(node);
        }
        keep
    }

    fn forget(&mut self, node: &NodeId) {
        if self.members.remove(node).is_some() {
            self.index.reset(node);
            self.costs.forget(node);
        }
    }
}

impl Member {
    fn new(record: NodeRecord) -> Self {
        Self {
            record,
            registered: true,
            reporting: false,
            following: false,
        }
    }
}

#[cfg(test)]
mod tests;
