//! Proof that what the table keeps incrementally is what a look at all slots gives.

use std::collections::{BTreeSet, HashMap};

use types::BlockId;

use super::tenants::Owned;
use super::{BlockTable, Cached, SlotState};

impl BlockTable {
    /// Recomputes everything that is kept incrementally. Property tests call this after every step.
    pub fn check_integrity(&self) {
        let ids = || (0u32..).map(BlockId).zip(&self.slots);
        let cached: HashMap<BlockId, &Cached> = ids()
            .filter_map(|(block, slot)| match &slot.state {
                SlotState::Cached(cached) => Some((block, cached)),
                SlotState::Free | SlotState::Owned | SlotState::Detached { .. } => None,
            })
            .collect();
        let count = |wanted: fn(&SlotState) -> bool| ids().filter(|(_, slot)| wanted(&slot.state)).count();
        assert_eq!(self.free.len(), count(|state| matches!(state, SlotState::Free)));
        let used = |state: &SlotState| matches!(state, SlotState::Owned | SlotState::Detached { .. });
        assert_eq!(self.owned, count(used));
        let free: BTreeSet<BlockId> = self.free.iter().copied().collect();
        assert_eq!(free.len(), self.free.len(), "a slot is in the free list twice");
        assert!(
            free.iter()
                .all(|block| matches!(self.slot(*block).state, SlotState::Free))
        );

        assert_eq!(self.by_hash.len(), cached.len());
        assert_eq!(self.pinned, cached.values().filter(|one| one.pins > 0).count());
        assert_eq!(
            self.reclaimable,
            cached.values().filter(|one| !one.is_held()).count()
        );
        for (block, one) in &cached {
            assert_eq!(self.by_hash.get(&one.hash), Some(block));
            let children = || cached.values().filter(|child| child.parent == Some(*block));
            assert_eq!(one.children as usize, children().count());
            assert_eq!(
                one.held_children as usize,
                children().filter(|child| child.is_held()).count()
            );
            let listed = self.policy.is_evictable(*block);
            let shelved = self.tenants.is_shelved(*block);
            assert_eq!(listed ^ shelved, one.is_evictable(), "block {block}");
            let above = one.parent.and_then(|parent| cached.get(&parent));
            assert_eq!(one.depth, above.map_or(0, |above| above.depth + 1));
            if let Some(parent) = one.parent {
                let parent = cached.get(&parent).expect("a cached block's parent is cached");
                assert_eq!(parent.hash, one.parent_hash);
                assert!(parent.stored_at < one.stored_at);
                assert_eq!(parent.tenant, one.tenant);
            }
        }
        let evictable = cached.values().filter(|one| one.is_evictable()).count();
        let listed = self.policy.coldest(usize::MAX);
        let shelved = cached.keys().filter(|block| self.tenants.is_shelved(**block));
        assert_eq!(listed.len() + shelved.count(), evictable);
        assert!(listed.iter().all(|block| cached[block].is_evictable()));
        let owned: Vec<Owned> = cached
            .iter()
            .map(|(block, one)| Owned {
                block: *block,
                tenant: one.tenant,
                root: self.path(one.hash).expect("it is cached").root,
                evictable: one.is_evictable(),
            })
            .collect();
        self.tenants.check_integrity(&owned);

        self.leases.check_integrity();
        let mut leased: HashMap<BlockId, usize> = HashMap::new();
        for block in self.leases.values().flatten() {
            *leased.entry(*block).or_default() += 1;
        }
        for (block, pins) in leased {
            let held = match &self.slot(block).state {
                SlotState::Cached(one) => one.pins,
                SlotState::Detached { pins } => *pins,
                SlotState::Free | SlotState::Owned => 0,
            };
            assert!(
                held as usize >= pins,
                "block {block} has {held} pins, but {pins} leases"
            );
        }
    }
}
