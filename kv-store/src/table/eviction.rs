//! What leaves to make room, and whose it is.
//!
//! With one tenant the policy decides alone. With several, the tenant gives that has most for its weight, and of its blocks the one
//! that the policy values least. So tenants share what is cached by weight; what one leaves the others may use; and one
//! that has less than its share loses nothing while another has a block to give.
//!
//! There is one policy, which knows nothing of tenants. What it would have evicted of a tenant that is not to give goes on a shelf,
//! where the policy takes it for unevictable, and is the first to go once that tenant has to give. A block is put there at most once
//! per use, so the search for a victim is constant, amortised. A policy per tenant would forget what it learned with each tenant
//! that goes, and either needs state for all slots each or slots numbered anew; policies that list blocks by tenant would have to
//! be written so one by one.
//!
//! Elsewhere: who has how much (`tenants.rs`), what a policy is (`policy.rs`), what leaves for other reasons (`moves.rs`).

use std::time::Instant;

use types::{BlockHash, BlockId};

use super::tenants::{TenantEvents, TenantId, TenantLimits, TenantUsage};
use super::{BlockTable, SlotState};

/// Blocks of a tenant's shelf, from the one put there first, among which the one that is worth least now is looked for: worth
/// changes with time, by little.
const SHELF_LOOK: usize = 8;
/// Blocks put on the shelf in the search for one victim, so that it holds up nobody: a millisecond. Then the policy has
/// its way, and a tenant within its share may lose one block of so many.
const SHELVED_MAX: usize = 1024;

/// A block that eviction would take, and what keeping it is worth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Victim {
    /// Identity of the block.
    pub hash: BlockHash,
    /// Identity of the block before it, or the root of its space.
    pub parent: BlockHash,
    /// Its slot.
    pub block: BlockId,
    /// Higher is better, and comparable between nodes that run the same policy.
    pub worth: f32,
}

impl BlockTable {
    /// Sets what tenants may have. Without it nobody has a bound, and all weigh the same. A tenant that has more blocks than its new
    /// quota gets no more; [`BlockTable::give_excess`] takes what it has beyond.
    ///
    /// # Panics
    ///
    /// If more than [`super::LIMITED_MAX`] tenants have limits of their own.
    pub fn limit_tenants(&mut self, limits: TenantLimits) {
        self.tenants.limit(limits);
    }

    /// Evicts what tenants have beyond quotas that became smaller: at most `count` blocks. Whether that was all that can be evicted
    /// of it. What is in use stays, and goes as its tenant stores other blocks.
    pub fn give_excess(&mut self, count: usize, now: Instant) -> bool {
        for _ in 0..count {
            let Some(tenant) = self.tenants.excessive() else {
                return true;
            };
            if !self.evict_own(tenant, now) {
                // What was not found among others' blocks is nearer the next time.
                return false;
            }
        }
        self.tenants.excessive().is_none()
    }

    /// The tenants that hold blocks or have limits of their own.
    pub fn tenants(&self) -> Vec<TenantUsage> {
        self.tenants.usage().collect()
    }

    /// What the limits of tenants have done so far.
    pub fn tenant_events(&self) -> TenantEvents {
        self.tenants.events
    }

    /// The next `count` blocks that eviction would take, in that order. Blocks that become evictable only with them are
    /// not among them.
    pub fn coldest(&mut self, count: usize, now: Instant) -> Vec<Victim> {
        let coldest = self.next_victims(count, now);
        let victim = |block| {
            let cached = self.cached(block);
            Victim {
                hash: cached.hash,
                parent: cached.parent_hash,
                block,
                worth: self.policy.worth(block, now),
            }
        };
        coldest.into_iter().map(victim).collect()
    }

    /// What would be given up for `count` slots if `reserve` were to stay free, in the order of eviction: the worth of each
    /// block, and [`f32::NEG_INFINITY`] for a free slot. Fewer where not so many can be had; blocks in use and their ancestors are not
    /// counted, nor those that several evictable chains share.
    pub fn price(&mut self, count: usize, reserve: usize, now: Instant) -> Vec<f32> {
        let free = self.free.len().saturating_sub(reserve);
        let mut price = vec![f32::NEG_INFINITY; free.min(count)];
        if price.len() >= count {
            return price;
        }
        for leaf in self.next_victims(count, now) {
            let mut next = Some(leaf);
            while let Some(block) = next
                && price.len() < count
            {
                let cached = self.cached(block);
                if cached.pins > 0 || cached.children > u32::from(block != leaf) {
                    break;
                }
                price.push(self.policy.worth(block, now));
                next = cached.parent;
            }
            if price.len() >= count {
                break;
            }
        }
        price
    }

    /// Evicts until `slots` slots are free, or nothing more can be evicted.
    pub fn make_room(&mut self, slots: usize, now: Instant) {
        while self.free.len() < slots && self.reclaimable > 0 {
            self.evict_one(now);
        }
    }

    pub(super) fn evict_one(&mut self, now: Instant) {
        let victim = if self.tenants.is_single() {
            self.policy.victim(now)
        } else {
            self.tenants.giver().and_then(|giver| {
                let block = self.least_of(giver, now)?;
                let is_its_own = self.cached(block).tenant == giver;
                self.tenants.events.evicted_by_share += u64::from(is_its_own);
                Some(block)
            })
        };
        let block =
            victim.expect("where a block is reclaimable, one of its descendants is an evictable leaf");
        self.remove_leaf(block, now);
        self.evictions += 1;
    }

    /// Makes a tenant give one of its own blocks. False where it uses all of them.
    pub(super) fn evict_own(&mut self, tenant: TenantId, now: Instant) -> bool {
        if self.tenants.evictable(tenant) == 0 {
            return false;
        }
        let least = self.least_of(tenant, now);
        let Some(block) = least.filter(|block| self.cached(*block).tenant == tenant) else {
            return false;
        };
        self.remove_leaf(block, now);
        self.evictions += 1;
        self.tenants.events.evicted_by_quota += 1;
        true
    }

    /// Lets go of a cached block that is evictable. Its parent may be the next one.
    pub(super) fn remove_leaf(&mut self, block: BlockId, now: Instant) {
        let cached = self.cached(block);
        let (hash, parent, tenant) = (cached.hash, cached.parent, cached.tenant);
        assert!(
            cached.is_evictable(),
            "the policy chose block {block}, which is in use"
        );
        if self.tenants.unshelve(tenant, block) {
            self.policy.evictable(block, now);
        }
        self.policy.evicted(block, hash, now);
        self.by_hash.remove(&hash);
        self.slot_mut(block).state = SlotState::Free;
        self.free.push(block);
        self.reclaimable -= 1;
        self.tenants.became_unevictable(tenant);
        self.tenants.left(tenant);
        self.announce_dropped(hash);
        if let Some(parent) = parent {
            let cached = self.cached_mut(parent);
            cached.children -= 1;
            if cached.is_evictable() {
                self.let_be_evicted(parent, now);
            }
        }
    }

    /// The block has lost its last pin or child.
    pub(super) fn let_be_evicted(&mut self, block: BlockId, now: Instant) {
        self.tenants.became_evictable(self.cached(block).tenant);
        self.policy.evictable(block, now);
    }

    /// The block has got a pin or child, after it had none.
    pub(super) fn keep_from_eviction(&mut self, block: BlockId) {
        let tenant = self.cached(block).tenant;
        self.tenants.became_unevictable(tenant);
        self.hide(tenant, block);
    }

    /// Takes an evictable block from wherever victims are looked for: the shelf, or the policy.
    fn hide(&mut self, tenant: TenantId, block: BlockId) {
        if !self.tenants.unshelve(tenant, block) {
            self.policy.unevictable(block);
        }
    }

    /// The block that a tenant gives: what it has on the shelf, or what the policy values least. Somebody else's if that is
    /// not found in time.
    fn least_of(&mut self, tenant: TenantId, now: Instant) -> Option<BlockId> {
        for _ in 0..SHELVED_MAX {
            let worth = |block: &BlockId| self.policy.worth(*block, now);
            let oldest = self.tenants.shelved(tenant).take(SHELF_LOOK);
            let shelved = oldest.min_by(|a, b| worth(a).total_cmp(&worth(b)));
            let Some(choice) = self.policy.victim(now) else {
                return shelved;
            };
            let owner = self.cached(choice).tenant;
            match shelved {
                Some(shelved) if owner != tenant => return Some(shelved),
                Some(shelved) => {
                    let worth = |block| self.policy.worth(block, now);
                    let is_less = worth(choice) < worth(shelved);
                    return Some(if is_less { choice } else { shelved });
                }
                None if owner == tenant => return Some(choice),
                None => {
                    self.policy.unevictable(choice);
                    self.tenants.shelve(owner, choice);
                }
            }
        }
        self.policy.victim(now)
    }

    /// Evictable blocks in the order in which tenants would give them.
    fn next_victims(&mut self, count: usize, now: Instant) -> Vec<BlockId> {
        if self.tenants.is_single() {
            return self.policy.coldest(count);
        }
        let mut taken = Vec::new();
        while taken.len() < count
            && let Some(giver) = self.tenants.giver()
            && let Some(block) = self.least_of(giver, now)
        {
            let tenant = self.cached(block).tenant;
            self.hide(tenant, block);
            self.tenants.take_out(tenant);
            taken.push((block, tenant));
        }
        for (block, tenant) in &taken {
            self.tenants.put_back(*tenant);
            self.policy.evictable(*block, now);
        }
        taken.into_iter().map(|(block, _)| block).collect()
    }
}

#[cfg(test)]
mod tests;
