//! The state of the embedded registry: members under leases, and tenants' quotas. Pure: callers pass `now`.
//!
//! Invariant: every member has exactly one living lease, and every lease exactly one member.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use types::{Error, LeaseId, NodeId, NodeRecord, TenantQuota};

use super::rules::{self, Refusal};
use super::{LEASE_TTL_MAX, LEASE_TTL_MIN};

/// Members that a registry holds. Every watcher is told all of them at every change.
pub const NODES_MAX: usize = 4096;

/// Members, their leases, and a number that grows with every change.
#[derive(Debug)]
pub struct MemberTable {
    revision: u64,
    next_lease: u64,
    members: BTreeMap<NodeId, NodeRecord>,
    leases: BTreeMap<LeaseId, Lease>,
    quotas: BTreeMap<String, TenantQuota>,
}

#[derive(Debug)]
struct Lease {
    node: NodeId,
    ttl: Duration,
    expires_at: Instant,
}

impl MemberTable {
    /// An empty table that gives leases from `first_lease` on. That must be above any lease of an earlier table
    /// that nodes may still hold: time since 1970 in nanoseconds is.
    pub fn new(first_lease: u64) -> Self {
        Self {
            revision: 0,
            next_lease: first_lease,
            members: BTreeMap::new(),
            leases: BTreeMap::new(),
            quotas: BTreeMap::new(),
        }
    }

    /// Adds a node under a new lease, or replaces its earlier incarnation, whose lease ends.
    ///
    /// # Errors
    ///
    /// `invalid`: the name or the lease's time cannot be used. `conflict`: another node of the model has another KV
    /// space. `fenced`: a newer incarnation is a member. `overloaded`: there are [`NODES_MAX`] others.
    pub fn register(&mut self, record: NodeRecord, ttl: Duration, now: Instant) -> Result<LeaseId, Error> {
        self.expire(now);
        if !(LEASE_TTL_MIN..=LEASE_TTL_MAX).contains(&ttl) {
            return Err(Error::invalid(
                "lease_ttl_ms",
                format!("lease_ttl is {ttl:?}, but must be between {LEASE_TTL_MIN:?} and {LEASE_TTL_MAX:?}"),
            ));
        }
        rules::admit(&self.members, &record)?;
        if self.members.len() >= NODES_MAX && !self.members.contains_key(&record.id) {
            let node = record.id;
            return Err(Refusal::Full {
                node,
                limit: NODES_MAX,
            }
            .into());
        }
        self.leases.retain(|_, lease| lease.node != record.id);
        let lease = LeaseId(self.next_lease);
        self.next_lease += 1;
        let expires_at = now + ttl;
        let node = record.id.clone();
        self.leases.insert(
            lease,
            Lease {
                node,
                ttl,
                expires_at,
            },
        );
        self.members.insert(record.id.clone(), record);
        self.revision += 1;
        Ok(lease)
    }

    /// Prolongs a lease by its own time from `now`. False if it has ended.
    pub fn keep_alive(&mut self, lease: LeaseId, now: Instant) -> bool {
        self.expire(now);
        let Some(lease) = self.leases.get_mut(&lease) else {
            return false;
        };
        lease.expires_at = now + lease.ttl;
        true
    }

    /// Ends a lease, and with it its member. False if it had ended.
    pub fn unregister(&mut self, lease: LeaseId) -> bool {
        let Some(lease) = self.leases.remove(&lease) else {
            return false;
        };
        self.members.remove(&lease.node);
        self.revision += 1;
        true
    }

    /// Ends every lease whose time is over. Whether there was one.
    pub fn expire(&mut self, now: Instant) -> bool {
        let members = &mut self.members;
        let before = members.len();
        self.leases.retain(|_, lease| {
            let lives = now < lease.expires_at;
            if !lives {
                members.remove(&lease.node);
            }
            lives
        });
        let changed = members.len() != before;
        self.revision += u64::from(changed);
        changed
    }

    /// Replaces a tenant's quota, or removes it if `quota` is empty.
    ///
    /// # Errors
    ///
    /// `invalid`: the name cannot be used. `overloaded`: [`super::QUOTAS_MAX`] others have one.
    pub fn put_quota(&mut self, tenant: &str, quota: TenantQuota) -> Result<(), Error> {
        super::set_quota(&mut self.quotas, tenant, quota)?;
        self.revision += 1;
        Ok(())
    }

    /// The quotas by tenant.
    pub fn quotas(&self) -> &BTreeMap<String, TenantQuota> {
        &self.quotas
    }

    /// When the next lease ends, if nothing prolongs it.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.expires_at).min()
    }

    /// Grows with every change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The members.
    pub fn members(&self) -> &BTreeMap<NodeId, NodeRecord> {
        &self.members
    }

    /// Property tests call this after every step.
    ///
    /// # Panics
    ///
    /// If the invariant is broken.
    pub fn check_integrity(&self) {
        assert_eq!(
            self.members.len(),
            self.leases.len(),
            "a member has not one lease"
        );
        for (lease, Lease { node, .. }) in &self.leases {
            assert!(self.members.contains_key(node), "lease {lease} holds no member");
            assert!(lease.0 < self.next_lease, "lease {lease} will be given again");
        }
        for (id, record) in &self.members {
            assert_eq!(*id, record.id);
        }
        let mut spaces = BTreeMap::new();
        let with_space = self.members.values().filter(|record| record.kv_space.is_some());
        for record in with_space {
            let space = spaces.entry(&record.model).or_insert(&record.kv_space);
            assert_eq!(
                *space, &record.kv_space,
                "{} is served in two KV spaces",
                record.model
            );
        }
    }
}

#[cfg(test)]
mod tests;
