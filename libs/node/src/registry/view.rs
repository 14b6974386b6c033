//! What one process knows of the members. Pure: callers pass `now`.
//!
//! Invariant: a member leaves the view for one of three reasons only: the registry said that it left, the registry,
//! after it came back, did not name it for a whole lease, or a newer record took its place. Silence is no reason.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use types::{NodeId, NodeRecord, TenantQuota};

use super::Members;

/// News from the registry.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// All there is as of `revision`.
    All {
        revision: u64,
        records: Vec<NodeRecord>,
        quotas: BTreeMap<String, TenantQuota>,
    },
    /// This one joined, or changed.
    Joined { revision: u64, record: Box<NodeRecord> },
    /// This one left.
    Left { revision: u64, id: NodeId },
    /// A tenant's quota, which is empty if it has none any more.
    Quota {
        revision: u64,
        tenant: String,
        quota: TenantQuota,
    },
}

#[derive(Debug)]
pub(crate) struct View {
    members: Members,
    /// Members that the registry has not named since it came back: they may be about to register again.
    unconfirmed: BTreeSet<NodeId>,
    /// When those are given up. `None` while the registry is away: then nobody can register.
    unconfirmed_until: Option<Instant>,
    /// One lease.
    grace: Duration,
}

impl View {
    pub(crate) fn new(grace: Duration) -> Self {
        Self {
            members: Members::default(),
            unconfirmed: BTreeSet::new(),
            unconfirmed_until: None,
            grace,
        }
    }

    pub(crate) fn members(&self) -> &Members {
        &self.members
    }

    pub(crate) fn apply(&mut self, change: Change, now: Instant) {
        match change {
            Change::All {
                revision,
                records,
                quotas,
            } => {
                self.members.revision = revision;
                self.members.quotas = quotas;
                self.replace(records, now);
            }
            Change::Joined { revision, record } => {
                self.members.revision = revision;
                self.unconfirmed.remove(&record.id);
                self.members.nodes.insert(record.id.clone(), *record);
            }
            Change::Left { revision, id } => {
                self.members.revision = revision;
                self.unconfirmed.remove(&id);
                self.members.nodes.remove(&id);
            }
            Change::Quota {
                revision,
                tenant,
                quota,
            } => {
                self.members.revision = revision;
                match quota.is_empty() {
                    true => self.members.quotas.remove(&tenant),
                    false => self.members.quotas.insert(tenant, quota),
                };
            }
        }
    }

    fn replace(&mut self, records: Vec<NodeRecord>, now: Instant) {
        let records = records.into_iter().map(|record| (record.id.clone(), record));
        let before = std::mem::replace(&mut self.members.nodes, records.collect());
        let came_back = !self.members.connected;
        for (id, record) in before {
            if self.members.nodes.contains_key(&id) {
                self.unconfirmed.remove(&id);
            } else if came_back || self.unconfirmed.contains(&id) {
                self.unconfirmed.insert(id.clone());
                self.members.nodes.insert(id, record);
            }
        }
        if came_back {
            self.members.connected = true;
            self.unconfirmed_until = Some(now + self.grace);
        }
    }

    /// The registry cannot be heard any more.
    pub(crate) fn disconnect(&mut self) {
        self.members.connected = false;
        self.unconfirmed_until = None;
    }

    /// When [`View::expire`] has something to do, if nothing happens before.
    pub(crate) fn expires_at(&self) -> Option<Instant> {
        self.unconfirmed_until.filter(|_| !self.unconfirmed.is_empty())
    }

    /// Gives up members that did not come back in time. Whether there were any.
    pub(crate) fn expire(&mut self, now: Instant) -> bool {
        if self.expires_at().is_none_or(|at| now < at) {
            return false;
        }
        for id in std::mem::take(&mut self.unconfirmed) {
            self.members.nodes.remove(&id);
        }
        self.unconfirmed_until = None;
        true
    }

    #[cfg(test)]
    pub(crate) fn check_integrity(&self) {
        let known = |id: &NodeId| self.members.nodes.contains_key(id);
        assert!(
            self.unconfirmed.iter().all(known),
            "an unconfirmed member is not a member"
        );
        assert!(self.members.connected || self.unconfirmed_until.is_none());
        assert!(self.members.nodes.iter().all(|(id, record)| *id == record.id));
    }
}

#[cfg(test)]
mod tests;
