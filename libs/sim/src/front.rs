//! The router's side of a simulation.

use std::collections::BTreeMap;
use std::time::Instant;

use kv_store::follower::Follower;
use kv_store::log::Batch;
use router::admission::{Admission, Room};
use router::cluster::{Assignment, Cluster, Query};
use router::cost::PlacementId;
use router::cost::learning::{Foretold, Measured};
use router::placement::NoPlacement;
use types::{Epoch, KvSpace, LoadReport, NodeId, NodeRecord};

use crate::scenario::Scenario;

/// The model's name and digest in simulated registries.
pub const MODEL: &str = "simulated";

/// What a simulation needs of a router. [`Direct`] is the usual one; a test may put more of a real router between.
pub trait Front {
    /// Who is there.
    fn registry(&mut self, nodes: &BTreeMap<NodeId, NodeRecord>);
    /// A node reports its load.
    fn reported(&mut self, node: &NodeId, epoch: Epoch, report: LoadReport, now: Instant);
    /// A node's log goes on.
    fn logged(&mut self, node: &NodeId, batch: Batch);
    /// Both streams from a node broke.
    fn lost(&mut self, node: &NodeId, epoch: Epoch);
    /// Places the request with this index among those of the workload.
    fn place(&mut self, request: usize, query: &Query<'_>, now: Instant) -> Result<Assignment, NoPlacement>;
    /// The first token of a placement came.
    fn prefilled(&mut self, id: PlacementId, now: Instant);
    /// A placement ended, with so many tokens if its answer is complete.
    fn ended(&mut self, id: PlacementId, tokens: Option<u64>);
    /// A request is complete that was placed once.
    fn completed(&mut self, foretold: &Foretold, measured: &Measured);
    /// Who may run.
    fn admission(&mut self) -> &mut Admission;
    /// What the nodes can take.
    fn room(&self) -> Room;
}

/// The router's pure core, called directly.
#[derive(Debug)]
pub struct Direct {
    cluster: Cluster,
    admission: Admission,
    followers: BTreeMap<NodeId, Follower>,
}

impl Direct {
    /// A router of the scenario that knows nobody yet.
    pub fn new(scenario: &Scenario) -> Self {
        let config = &scenario.router;
        Self {
            cluster: Cluster::new(
                MODEL,
                MODEL,
                config.index_entries_max,
                config.priors(),
                config.policy.build(),
                config.placement(),
            ),
            admission: Admission::new(config.limits()),
            followers: BTreeMap::new(),
        }
    }
}

impl Front for Direct {
    fn registry(&mut self, nodes: &BTreeMap<NodeId, NodeRecord>) {
        self.cluster.registry(nodes);
    }

    fn reported(&mut self, node: &NodeId, epoch: Epoch, report: LoadReport, now: Instant) {
        self.cluster.reported(node, epoch, report, now);
    }

    fn logged(&mut self, node: &NodeId, batch: Batch) {
        let epoch = batch.epoch;
        let follower = self.followers.entry(node.clone()).or_default();
        // Nothing is lost on the way, and a snapshot comes first, so there are no gaps.
        if let Ok(applied) = follower.apply(batch) {
            self.cluster.logged(node, epoch, &applied);
        }
    }

    fn lost(&mut self, node: &NodeId, epoch: Epoch) {
        self.followers.remove(node);
        self.cluster.report_stream_ended(node, epoch);
        self.cluster.log_stream_ended(node, epoch);
    }

    fn place(&mut self, _: usize, query: &Query<'_>, now: Instant) -> Result<Assignment, NoPlacement> {
        let space: Option<KvSpace> = self.cluster.kv_space();
        let space = space.ok_or_else(|| NoPlacement { excluded: Vec::new() })?;
        self.cluster.place(&space, query, now)
    }

    fn prefilled(&mut self, id: PlacementId, now: Instant) {
        self.cluster.prefilled(id, now);
    }

    fn ended(&mut self, id: PlacementId, tokens: Option<u64>) {
        self.cluster.ended(id, tokens);
    }

    fn completed(&mut self, foretold: &Foretold, measured: &Measured) {
        self.cluster.completed(foretold, measured);
    }

    fn room(&self) -> Room {
        self.cluster.room()
    }

    fn admission(&mut self) -> &mut Admission {
        &mut self.admission
    }
}
