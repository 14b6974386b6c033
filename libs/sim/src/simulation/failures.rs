//! Nodes that die and return, and what becomes of their requests: a router places them again, with the tokens that they have.

use types::{Epoch, NodeId};

use super::outcome::Outcome;
use super::{Kind, Simulation, new_pool, ns};

impl Simulation<'_> {
    pub(super) fn fails(&mut self, failure: usize) {
        let failure_of = &self.scenario.failures[failure];
        let returns_ns = self.now_ns + ns(failure_of.for_s * 1e3);
        let Some(node) = self.failing(failure).filter(|node| self.nodes[*node].alive) else {
            return;
        };
        let (id, epoch, role) = {
            let node = &self.nodes[node];
            (node.id.clone(), node.epoch, node.role)
        };
        self.nodes[node].die(new_pool(self.scenario, self.profile, role));
        self.plan(returns_ns, Kind::Returns(failure));
        for router in &mut self.routers {
            router.lost(&id, epoch);
        }
        self.tell_members();
        let hit: Vec<usize> = (0..self.states.len())
            .filter(|request| {
                self.states[*request].placement.is_some_and(|placement| {
                    placement.decode == node || (placement.prefill == node && !placement.landed)
                })
            })
            .collect();
        for request in hit {
            self.give_up(request, &id, epoch);
        }
        self.drop_stale();
    }

    pub(super) fn returns(&mut self, failure: usize) {
        let Some(node) = self.failing(failure) else {
            return;
        };
        self.nodes[node].alive = true;
        self.tell_members();
        self.report(node);
        self.hear_log(node);
        let at = self.at(node);
        self.plan(self.now_ns + self.report_interval_ns(), Kind::Reports(at));
    }

    fn failing(&self, failure: usize) -> Option<usize> {
        let name = &self.scenario.failures[failure].node;
        self.nodes.iter().position(|node| node.id.as_str() == name)
    }

    fn give_up(&mut self, request: usize, node: &NodeId, epoch: Epoch) {
        let state = &mut self.states[request];
        // A request that ended meanwhile needs nobody.
        let Some(placement) = state.placement.take() else {
            return;
        };
        self.routers[state.router].ended(placement.id, None);
        state.attempt += 1;
        state.failed.insert(node.clone(), epoch);
        if state.served.placements >= self.scenario.router.placements_max {
            return self.end(request, Outcome::Failed);
        }
        self.place(request);
    }

    /// Takes prompts whose requests went elsewhere out of the queues.
    fn drop_stale(&mut self) {
        let now = self.instant();
        for node in 0..self.nodes.len() {
            let waiting = std::mem::take(&mut self.nodes[node].prefills.waiting);
            for prefill in waiting {
                if self.is_current(prefill.visit) {
                    self.nodes[node].prefills.waiting.push_back(prefill);
                } else {
                    self.nodes[node].pool.release(prefill.held, now);
                }
            }
        }
    }
}
