//! A bounded table of promises that end by themselves: leases and reservations.
//!
//! Invariant: an entry leaves the table exactly once, by [`Expiring::remove`] or by [`Expiring::expire`], so
//! whoever gets it is the only one to undo it. Pure: callers pass `now`.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

/// Entries that are named by a number and end at a time.
#[derive(Debug)]
pub struct Expiring<T> {
    entries: HashMap<u64, (Instant, T)>,
    by_time: BTreeSet<(Instant, u64)>,
    next_id: u64,
    entries_max: usize,
}

/// The table holds as much as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{entries_max} are open, which is the most allowed")]
pub struct Full {
    /// The bound.
    pub entries_max: usize,
}

impl<T> Expiring<T> {
    /// An empty table. Ids count up from `first_id`; a caller whose ids cross processes starts each
    /// incarnation at a number that the one before it cannot have reached.
    pub fn new(entries_max: usize, first_id: u64) -> Self {
        Self {
            entries: HashMap::new(),
            by_time: BTreeSet::new(),
            next_id: first_id,
            entries_max,
        }
    }

    /// Entries that are open.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no entry is open.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Fails where [`Expiring::insert`] would, for callers that must know before they act.
    pub fn check_room(&self) -> Result<(), Full> {
        if self.entries.len() < self.entries_max {
            Ok(())
        } else {
            Err(Full {
                entries_max: self.entries_max,
            })
        }
    }

    /// Opens an entry until `expires`.
    pub fn insert(&mut self, expires: Instant, value: T) -> Result<u64, Full> {
        self.check_room()?;
        let id = self.next_id;
        // Ids are compared, never ordered, and 2^64 of them outlast any process.
        self.next_id = self.next_id.wrapping_add(1);
        self.entries.insert(id, (expires, value));
        self.by_time.insert((expires, id));
        Ok(id)
    }

    /// Ends an entry early.
    pub fn remove(&mut self, id: u64) -> Option<T> {
        let (expires, value) = self.entries.remove(&id)?;
        self.by_time.remove(&(expires, id));
        Some(value)
    }

    /// Ends one entry whose time has come, earliest first.
    pub fn expire(&mut self, now: Instant) -> Option<T> {
        let (expires, id) = *self.by_time.first()?;
        if expires > now {
            return None;
        }
        self.remove(id)
    }

    /// The values of all open entries, in no order.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.entries.values().map(|(_, value)| value)
    }

    /// Property tests call this after every step.
    pub fn check_integrity(&self) {
        assert!(self.entries.len() <= self.entries_max);
        assert_eq!(self.entries.len(), self.by_time.len());
        for (expires, id) in &self.by_time {
            assert_eq!(self.entries.get(id).map(|(at, _)| at), Some(expires));
        }
    }
}
