//! Proof that what the table keeps incrementally is what a look at all slots gives.

use std::collections::{BTreeMap, HashSet};

use super::{DiskTable, Slot, SlotId, Stored};

impl DiskTable {
    /// Recomputes everything that is kept incrementally. Property tests call this after every step.
    pub fn check_integrity(&self) {
        let ids = || (0..).map(SlotId).zip(&self.slots);
        let stored: BTreeMap<SlotId, &Stored> = ids()
            .filter_map(|(id, slot)| match slot {
                Slot::Stored(stored) => Some((id, stored)),
                Slot::Free | Slot::Writing(_) | Slot::Dying { .. } => None,
            })
            .collect();
        let mut named = 0;
        let mut parents_of_writers = Vec::new();
        let free: HashSet<SlotId> = self.free.iter().copied().collect();
        assert_eq!(free.len(), self.free.len(), "a slot is free twice");
        let unclear: HashSet<SlotId> = self.unclear.iter().copied().collect();
        assert_eq!(unclear.len(), self.unclear.len(), "a slot is to be cleared twice");
        for (id, slot) in ids() {
            assert_eq!(free.contains(&id), matches!(slot, Slot::Free));
            if unclear.contains(&id) {
                assert!(
                    matches!(slot, Slot::Dying { readers: 0 }),
                    "slot {} is in use",
                    id.0
                );
            }
            match slot {
                Slot::Free | Slot::Dying { .. } => {}
                Slot::Writing(writing) => {
                    named += 1;
                    assert_eq!(self.by_hash.get(&writing.record.hash), Some(&id));
                    parents_of_writers.extend(writing.parent);
                }
                Slot::Stored(stored) => {
                    named += 1;
                    assert_eq!(self.by_hash.get(&stored.record.hash), Some(&id));
                }
            }
        }
        assert_eq!(self.by_hash.len(), named);
        assert_eq!(self.stored, stored.len());
        let mut evictable = 0;
        for (id, one) in &stored {
            let listed = self.evictable.contains(&(one.last_use, *id));
            assert_eq!(listed, one.is_evictable(), "slot {}", id.0);
            evictable += usize::from(listed);
            match one.parent {
                None => assert!(one.record.follows_root),
                Some(parent) => {
                    let parent = stored.get(&parent).expect("a stored block's parent is stored");
                    assert_eq!(parent.record.hash, one.record.parent);
                    assert!(parent.stored_at < one.stored_at);
                }
            }
            self.check_children(*id, one, &stored);
            let writers = parents_of_writers.iter().filter(|parent| *parent == id).count();
            assert!(one.readers >= writers, "a writer pins its parent");
        }
        assert_eq!(self.evictable.len(), evictable);
    }

    fn check_children(&self, id: SlotId, one: &Stored, stored: &BTreeMap<SlotId, &Stored>) {
        let mut listed = HashSet::new();
        let (mut before, mut at) = (None, one.first_child);
        while let Some(child) = at {
            assert!(listed.insert(child), "a list of children has no end");
            let siblings = stored.get(&child).expect("a child is stored").siblings;
            assert_eq!(siblings.before, before);
            (before, at) = (Some(child), siblings.after);
        }
        let children = stored.iter().filter(|(_, other)| other.parent == Some(id));
        let children: HashSet<SlotId> = children.map(|(child, _)| *child).collect();
        assert_eq!(listed, children);
    }
}
