//! Whose blocks a table holds: how many each tenant has, how many it may have, and who gives when memory is short.
//!
//! A tenant is the root that its blocks hang under. One that a limit names has an account for ever; any other has one while it
//! holds blocks, as long as there are accounts left. Those that come then share the account of the others, with
//! one quota and one weight between them.
//!
//! Invariants:
//! - what an account counts are the cached blocks below its root (for the others', below all roots without an account);
//! - no account counts more than its quota, or than it had when the quota became smaller; what it has beyond shrinks only;
//! - a block on the shelf is evictable, and the policy takes it for not evictable.
//!
//! Elsewhere: what is done with all this (`eviction.rs`).

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU32;
use std::ops::RangeInclusive;

use types::{BlockHash, BlockId};

use crate::digest::DigestBuild;

/// Tenants without a limit of their own that have an account at a time. Every eviction among several tenants looks at all
/// accounts, which takes a microsecond for so many.
pub const ACCOUNTS_MAX: usize = 1024;
/// Tenants that settings can give limits of their own: people write them down. As many more can get some while the cluster runs.
pub const LIMITED_MAX: usize = 1024;

/// What a tenant may have of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TenantLimit {
    /// Most blocks that it may have cached; `None` is no bound.
    pub blocks_max: Option<usize>,
    /// Its part of the cached blocks when memory is short, beside the weights of all tenants that have some.
    pub weight: NonZeroU32,
}

/// What tenants may have of a pool.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct TenantLimits {
    /// By root. At most twice [`LIMITED_MAX`].
    pub of_root: Vec<(BlockHash, TenantLimit)>,
    /// Everybody else's.
    pub default: TenantLimit,
}

/// A tenant in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TenantUsage {
    /// Root of its blocks; `None` for all tenants without an account of their own.
    pub root: Option<BlockHash>,
    /// Blocks that it has cached.
    pub cached: usize,
    /// What it may have.
    pub limit: TenantLimit,
}

/// What tenants' limits have done so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct TenantEvents {
    /// Blocks evicted since their tenant was furthest above its share.
    pub evicted_by_share: u64,
    /// Blocks evicted since their tenant was at its quota and stored another one.
    pub evicted_by_quota: u64,
    /// Blocks that found no place since their tenant was at its quota and used all of it.
    pub refused: u64,
}

/// A cached block as [`Tenants::check_integrity`] compares it.
pub(super) struct Owned {
    pub(super) block: BlockId,
    pub(super) tenant: TenantId,
    pub(super) root: BlockHash,
    pub(super) evictable: bool,
}

/// An account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TenantId(u16);

/// Of all tenants without an account of their own.
const OTHERS: TenantId = TenantId(0);

#[derive(Debug)]
pub(super) struct Tenants {
    accounts: Vec<Account>,
    by_root: HashMap<BlockHash, TenantId, DigestBuild>,
    /// Accounts that nobody has.
    vacant: Vec<TenantId>,
    default: TenantLimit,
    /// Accounts with blocks.
    active: usize,
    shelf: Shelf,
    pub(super) events: TenantEvents,
}

#[derive(Debug)]
struct Account {
    root: Option<BlockHash>,
    /// It has a limit of its own, and is kept for that.
    is_limited: bool,
    limit: TenantLimit,
    /// Most blocks that it may have now: its quota, or what it had when that became smaller and has not given since, with the place
    /// of one that was given for another.
    ceiling: usize,
    cached: usize,
    evictable: usize,
}

/// Evictable blocks that the policy would have had evicted, but whose tenant was not the one to give. Coldest first.
#[derive(Debug, Default)]
struct Shelf {
    blocks: BTreeMap<(TenantId, u64), BlockId>,
    place_of: HashMap<BlockId, u64>,
    next_place: u64,
}

impl Default for TenantLimit {
    /// No bound, and the same weight as everybody.
    fn default() -> Self {
        Self {
            blocks_max: None,
            weight: NonZeroU32::MIN,
        }
    }
}

impl Tenants {
    /// Without limits.
    pub(super) fn new() -> Self {
        let default = TenantLimit::default();
        Self {
            accounts: vec![Account::new(None, default, true)],
            by_root: HashMap::default(),
            vacant: Vec::new(),
            default,
            active: 0,
            shelf: Shelf::default(),
            events: TenantEvents::default(),
        }
    }

    /// Replaces all limits. A tenant that shared the account of the others goes on in it with the chains that it has there.
    ///
    /// # Panics
    ///
    /// If more than twice [`LIMITED_MAX`] tenants have limits of their own.
    pub(super) fn limit(&mut self, limits: TenantLimits) {
        let TenantLimits { of_root, default } = limits;
        assert!(
            of_root.len() <= 2 * LIMITED_MAX,
            "settings and quotas are checked before"
        );
        self.default = default;
        for id in 0..self.accounts.len() {
            let id = TenantId(id as u16);
            let account = self.account_mut(id);
            account.is_limited = id == OTHERS;
            account.set_limit(default);
        }
        for (root, limit) in of_root {
            let known = self.by_root.get(&root).copied();
            let id = known.unwrap_or_else(|| self.open(root));
            let account = self.account_mut(id);
            account.is_limited = true;
            account.set_limit(limit);
        }
        for id in 0..self.accounts.len() {
            self.close_if_empty(TenantId(id as u16));
        }
    }

    /// The account of the blocks below a root. One that is opened for it is closed again with its last block, or by
    /// [`Tenants::close_if_empty`].
    pub(super) fn of_root(&mut self, root: BlockHash) -> TenantId {
        if let Some(known) = self.by_root.get(&root) {
            return *known;
        }
        let unlimited = self.accounts.iter().filter(|account| !account.is_limited);
        if self.vacant.is_empty() && unlimited.count() >= ACCOUNTS_MAX {
            return OTHERS;
        }
        self.open(root)
    }

    /// Gives a root an account.
    fn open(&mut self, root: BlockHash) -> TenantId {
        let account = Account::new(Some(root), self.default, false);
        let id = match self.vacant.pop() {
            Some(vacant) => {
                self.accounts[vacant.index()] = account;
                vacant
            }
            None => {
                let id = u16::try_from(self.accounts.len());
                self.accounts.push(account);
                TenantId(id.expect("there are at most 1 + 3 * 1024 accounts"))
            }
        };
        self.by_root.insert(root, id);
        id
    }

    /// Closes an account that has no block.
    pub(super) fn close_if_empty(&mut self, tenant: TenantId) {
        let account = self.account(tenant);
        if account.cached > 0 || account.is_limited {
            return;
        }
        // One that is vacant has no root.
        if let Some(root) = self.account_mut(tenant).root.take() {
            self.by_root.remove(&root);
            self.vacant.push(tenant);
        }
    }

    /// Whether one block more would pass the quota.
    pub(super) fn is_full(&self, tenant: TenantId) -> bool {
        let account = self.account(tenant);
        account.limit.blocks_max.is_some_and(|max| account.cached >= max)
    }

    /// A tenant that has more than its quota, and could give some of it.
    pub(super) fn excessive(&self) -> Option<TenantId> {
        let mut accounts = self.accounts.iter().zip(0..);
        let excessive = accounts.find(|(one, _)| {
            let beyond = one.limit.blocks_max.is_some_and(|max| one.cached > max);
            beyond && one.evictable > 0
        });
        excessive.map(|(_, id)| TenantId(id))
    }

    /// Whether all that can be evicted is one tenant's, and no policy was overruled: then it decides alone.
    pub(super) fn is_single(&self) -> bool {
        self.active <= 1 && self.shelf.blocks.is_empty()
    }

    /// Of the tenants with an evictable block, the one that has most for its weight.
    pub(super) fn giver(&self) -> Option<TenantId> {
        let able = self.accounts.iter().zip(0..).filter(|(one, _)| one.evictable > 0);
        let most = able.max_by(|(a, _), (b, _)| {
            // Ratios, compared without a division.
            let load =
                |one: &Account, other: &Account| one.cached as u64 * u64::from(other.limit.weight.get());
            load(a, b).cmp(&load(b, a))
        });
        most.map(|(_, id)| TenantId(id))
    }

    pub(super) fn evictable(&self, tenant: TenantId) -> usize {
        self.account(tenant).evictable
    }

    /// A block was stored.
    pub(super) fn stored(&mut self, tenant: TenantId) {
        let account = self.account_mut(tenant);
        account.cached += 1;
        self.active += usize::from(account.cached == 1);
    }

    /// A block is gone.
    pub(super) fn left(&mut self, tenant: TenantId) {
        let account = self.account_mut(tenant);
        account.cached -= 1;
        account.ceiling = account.quota().max(account.cached + 1);
        self.active -= usize::from(account.cached == 0);
        self.close_if_empty(tenant);
    }

    pub(super) fn became_evictable(&mut self, tenant: TenantId) {
        self.account_mut(tenant).evictable += 1;
    }

    pub(super) fn became_unevictable(&mut self, tenant: TenantId) {
        self.account_mut(tenant).evictable -= 1;
    }

    /// Counts as if an evictable block were gone, until it is [put back](Tenants::put_back).
    pub(super) fn take_out(&mut self, tenant: TenantId) {
        let account = self.account_mut(tenant);
        account.cached -= 1;
        account.evictable -= 1;
    }

    pub(super) fn put_back(&mut self, tenant: TenantId) {
        let account = self.account_mut(tenant);
        account.cached += 1;
        account.evictable += 1;
    }

    /// Puts a block behind those of its tenant that are on the shelf.
    pub(super) fn shelve(&mut self, tenant: TenantId, block: BlockId) {
        let shelf = &mut self.shelf;
        shelf.blocks.insert((tenant, shelf.next_place), block);
        shelf.place_of.insert(block, shelf.next_place);
        shelf.next_place += 1;
    }

    /// Takes a block from the shelf. False if it was not there.
    pub(super) fn unshelve(&mut self, tenant: TenantId, block: BlockId) -> bool {
        if self.shelf.place_of.is_empty() {
            // Nothing is hashed where there is one tenant.
            return false;
        }
        let Some(place) = self.shelf.place_of.remove(&block) else {
            return false;
        };
        self.shelf.blocks.remove(&(tenant, place));
        true
    }

    /// What a tenant has on the shelf, coldest first.
    pub(super) fn shelved(&self, tenant: TenantId) -> impl Iterator<Item = BlockId> {
        let all: RangeInclusive<(TenantId, u64)> = (tenant, 0)..=(tenant, u64::MAX);
        self.shelf.blocks.range(all).map(|(_, block)| *block)
    }

    /// The tenants that hold blocks or have limits of their own.
    pub(super) fn usage(&self) -> impl Iterator<Item = TenantUsage> {
        let accounts = self.accounts.iter();
        let known =
            accounts.filter(|account| account.cached > 0 || (account.is_limited && account.root.is_some()));
        known.map(|account| TenantUsage {
            root: account.root,
            cached: account.cached,
            limit: account.limit,
        })
    }

    fn account(&self, tenant: TenantId) -> &Account {
        &self.accounts[tenant.index()]
    }

    fn account_mut(&mut self, tenant: TenantId) -> &mut Account {
        &mut self.accounts[tenant.index()]
    }

    /// Compares with what a look at all blocks gives.
    pub(super) fn check_integrity(&self, blocks: &[Owned]) {
        for (account, id) in self.accounts.iter().zip(0..) {
            let own = || blocks.iter().filter(|one| one.tenant == TenantId(id));
            assert_eq!(account.cached, own().count(), "{account:?}");
            assert_eq!(account.evictable, own().filter(|one| one.evictable).count());
            assert!(account.cached <= account.ceiling, "{account:?}");
            match account.root {
                Some(root) => {
                    assert_eq!(self.by_root.get(&root), Some(&TenantId(id)));
                    assert!(own().all(|one| one.root == root));
                    assert!(account.is_limited || account.cached > 0);
                }
                None => assert!(TenantId(id) == OTHERS || self.vacant.contains(&TenantId(id))),
            }
        }
        let with_root = self.accounts.iter().filter(|account| account.root.is_some());
        assert_eq!(self.by_root.len(), with_root.count());
        let active = self.accounts.iter().filter(|account| account.cached > 0);
        assert_eq!(self.active, active.count());
        let Shelf {
            blocks: shelved,
            place_of,
            next_place: _,
        } = &self.shelf;
        assert_eq!(shelved.len(), place_of.len());
        for ((tenant, place), block) in shelved {
            assert_eq!(place_of.get(block), Some(place));
            assert!(
                blocks
                    .iter()
                    .any(|one| one.block == *block && one.tenant == *tenant && one.evictable)
            );
        }
    }

    /// Whether a block is on the shelf. For tests.
    pub(super) fn is_shelved(&self, block: BlockId) -> bool {
        self.shelf.place_of.contains_key(&block)
    }
}

impl Account {
    fn new(root: Option<BlockHash>, limit: TenantLimit, is_limited: bool) -> Self {
        Self {
            root,
            is_limited,
            limit,
            ceiling: limit.blocks_max.unwrap_or(usize::MAX),
            cached: 0,
            evictable: 0,
        }
    }

    fn set_limit(&mut self, limit: TenantLimit) {
        self.limit = limit;
        self.ceiling = self.quota().max(self.cached);
    }

    fn quota(&self) -> usize {
        self.limit.blocks_max.unwrap_or(usize::MAX)
    }
}

impl TenantId {
    fn index(self) -> usize {
        usize::from(self.0)
    }
}
