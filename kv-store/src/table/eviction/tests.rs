use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use proptest::prelude::*;
use types::{BlockEvent, Checksum};

use super::*;
use crate::log::Resume;
use crate::policy::Eviction;
use crate::replay::Request;
use crate::replay::workloads::Workload;
use crate::table::{Committed, Parent, TableLimits, TenantLimit};

const CAPACITY: usize = 16;
const TENANTS: usize = 4;
/// Blocks of each tenant form a binary tree: the parent of `n` is `n / 2`, and that of 1 is the tenant's root.
const NODES: u8 = 24;
/// Most blocks of each tenant, and its weight. The last two have the limits of everybody.
const BLOCKS_MAX: [usize; TENANTS] = [5, usize::MAX, 9, 9];
const WEIGHTS: [u32; TENANTS] = [1, 3, 1, 1];

type Node = (usize, u8);

fn hash((tenant, node): Node) -> BlockHash {
    let mut bytes = [node; 16];
    bytes[1] = u8::try_from(tenant).unwrap();
    BlockHash(bytes)
}

/// No node has the number 0.
fn root(tenant: usize) -> BlockHash {
    hash((tenant, 0))
}

fn parent((tenant, node): Node) -> Parent {
    match node / 2 {
        0 => Parent::Root(root(tenant)),
        above => Parent::Block(hash((tenant, above))),
    }
}

fn path((tenant, node): Node) -> Vec<BlockHash> {
    let up = std::iter::successors(Some(node), |node| Some(node / 2)).take_while(|node| *node > 0);
    let mut path: Vec<BlockHash> = up.map(|node| hash((tenant, node))).collect();
    path.reverse();
    path
}

fn limit(tenant: usize) -> TenantLimit {
    TenantLimit {
        blocks_max: (BLOCKS_MAX[tenant] < CAPACITY).then_some(BLOCKS_MAX[tenant]),
        weight: NonZeroU32::new(WEIGHTS[tenant]).unwrap(),
    }
}

fn table(capacity: usize, eviction: Eviction, limits: TenantLimits) -> BlockTable {
    let mut table = BlockTable::new(TableLimits {
        capacity,
        log_entries_max: 1 << 16,
        leases_max: 1,
        first_lease: 1,
        eviction,
    });
    table.limit_tenants(limits);
    table
}

fn limits() -> TenantLimits {
    TenantLimits {
        of_root: (0..2).map(|tenant| (root(tenant), limit(tenant))).collect(),
        default: limit(2),
    }
}

/// What is held, kept by looking at everything every time.
#[derive(Debug)]
struct Held {
    block: BlockId,
    pins: usize,
    last_use: u64,
}

#[derive(Debug, Clone)]
enum Op {
    Store(Node),
    Write,
    Unwrite(usize),
    Match(Node),
    Unpin(usize),
    MakeRoom(usize),
    Coldest(usize),
    Evict(Node),
    Forget(Node),
}

fn op() -> impl Strategy<Value = Op> {
    let node = || (0..TENANTS, 1..NODES);
    prop_oneof![
        10 => node().prop_map(Op::Store),
        1 => Just(Op::Write),
        1 => any::<usize>().prop_map(Op::Unwrite),
        3 => node().prop_map(Op::Match),
        10 => any::<usize>().prop_map(Op::Unpin),
        1 => (0..6usize).prop_map(Op::MakeRoom),
        1 => (0..CAPACITY).prop_map(Op::Coldest),
        1 => node().prop_map(Op::Evict),
        1 => node().prop_map(Op::Forget),
    ]
}

struct Run {
    eviction: Eviction,
    table: BlockTable,
    held: BTreeMap<Node, Held>,
    pins: Vec<Node>,
    written: Vec<BlockId>,
    begun: Instant,
    clock: u64,
    read_to: u64,
    refused: u64,
    /// Victims that the policy alone would not have chosen.
    overruled: usize,
}

impl Run {
    fn new(eviction: Eviction) -> Self {
        Self {
            eviction,
            table: table(CAPACITY, eviction, limits()),
            held: BTreeMap::new(),
            pins: Vec::new(),
            written: Vec::new(),
            begun: Instant::now(),
            clock: 0,
            read_to: 0,
            refused: 0,
            overruled: 0,
        }
    }

    /// Every use has a moment of its own.
    fn tick(&mut self) -> Instant {
        self.clock += 1;
        self.begun + Duration::from_millis(self.clock)
    }

    fn cached(&self, tenant: usize) -> usize {
        self.held.keys().filter(|(owner, _)| *owner == tenant).count()
    }

    fn leaves(&self) -> Vec<Node> {
        let has_child = |(tenant, node): Node| {
            self.held
                .keys()
                .any(|other| (other.0, other.1 / 2) == (tenant, node))
        };
        let free = self
            .held
            .iter()
            .filter(|(node, held)| held.pins == 0 && !has_child(**node));
        free.map(|(node, _)| *node).collect()
    }

    /// The nodes whose blocks were removed since the last look, in that order.
    fn removed(&mut self) -> Vec<Node> {
        let Resume::Entries(entries) = self.table.log().since(self.read_to + 1, usize::MAX) else {
            panic!("the log is long enough for this test");
        };
        self.read_to = self.table.log().last();
        let removed = entries.into_iter().filter_map(|entry| match entry.event {
            BlockEvent::Removed { hash } => Some((usize::from(hash.0[1]), hash.0[0])),
            BlockEvent::Stored { .. } | BlockEvent::Moved { .. } => None,
        });
        removed.collect()
    }

    /// Checks that this is whom memory has to come from, and, where that is known, that it is the right block.
    fn evict(&mut self, victim: Node) {
        let leaves = self.leaves();
        assert!(leaves.contains(&victim), "{victim:?} is in use");
        let load = |tenant: usize, other: usize| self.cached(tenant) * WEIGHTS[other] as usize;
        for (other, _) in &leaves {
            assert!(
                load(victim.0, *other) >= load(*other, victim.0),
                "{} gave, but {other} has more for its weight",
                victim.0
            );
        }
        self.check_least(victim, &leaves);
        self.held.remove(&victim);
    }

    fn check_least(&mut self, victim: Node, leaves: &[Node]) {
        let last_use = |node: &&Node| self.held[*node].last_use;
        let own = leaves.iter().filter(|node| node.0 == victim.0);
        if self.eviction == Eviction::Lru {
            assert_eq!(
                own.min_by_key(last_use),
                Some(&victim),
                "its own least recently used leaf"
            );
        }
        self.overruled += usize::from(leaves.iter().min_by_key(last_use) != Some(&victim));
    }

    fn allocate(&mut self) -> Option<BlockId> {
        let now = self.tick();
        let allocated = self.table.allocate(1, now);
        let removed = self.removed();
        assert!(removed.len() <= 1);
        for victim in removed {
            self.evict(victim);
        }
        Some(allocated.ok()?[0])
    }

    fn store(&mut self, node: Node) {
        let Some(block) = self.allocate() else { return };
        let now = self.tick();
        let before = self.cached(node.0);
        match self
            .table
            .commit(block, parent(node), hash(node), Checksum(0), now)
        {
            Committed::Stored(stored) => {
                let removed = self.removed();
                assert_eq!(removed.len(), usize::from(before == BLOCKS_MAX[node.0]));
                for victim in removed {
                    assert_eq!(victim.0, node.0, "a quota costs nobody else");
                    assert_ne!(victim.1, node.1 / 2, "the parent stays");
                    let leaves = self.leaves();
                    assert!(leaves.contains(&victim));
                    // The parent got a child before.
                    let leaves: Vec<Node> = leaves
                        .into_iter()
                        .filter(|leaf| *leaf != (node.0, node.1 / 2))
                        .collect();
                    self.check_least(victim, &leaves);
                    self.held.remove(&victim);
                }
                let last_use = self.clock;
                let held = Held {
                    block: stored.block,
                    pins: 1,
                    last_use,
                };
                assert!(self.held.insert(node, held).is_none());
                self.pins.push(node);
            }
            Committed::Duplicate(duplicate) => {
                assert_eq!(self.held[&node].block, duplicate.block);
                self.table.free(block);
                self.pin(node);
            }
            Committed::Orphan => {
                assert!(node.1 > 1 && !self.held.contains_key(&(node.0, node.1 / 2)));
                self.table.free(block);
            }
            Committed::OverQuota => {
                assert_eq!(before, BLOCKS_MAX[node.0]);
                let others = self
                    .leaves()
                    .into_iter()
                    .filter(|leaf| leaf.0 == node.0 && leaf.1 != node.1 / 2);
                assert_eq!(others.count(), 0, "only a tenant that uses all it has is refused");
                self.refused += 1;
                self.table.free(block);
            }
        }
    }

    fn pin(&mut self, node: Node) {
        let held = self.held.get_mut(&node).unwrap();
        held.pins += 1;
        held.last_use = self.clock;
        self.pins.push(node);
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Store(node) => self.store(node),
            Op::Write => {
                let block = self.allocate();
                self.written.extend(block);
            }
            Op::Unwrite(i) => {
                if !self.written.is_empty() {
                    let block = self.written.swap_remove(i % self.written.len());
                    self.table.free(block);
                }
            }
            Op::Match(node) => {
                let now = self.tick();
                let found = self.table.match_prefix(&path(node), now);
                for found in found {
                    self.pin((node.0, found.hash.0[0]));
                }
            }
            Op::Unpin(i) => {
                if !self.pins.is_empty() {
                    let node = self.pins.swap_remove(i % self.pins.len());
                    let now = self.tick();
                    let held = self.held.get_mut(&node).unwrap();
                    held.pins -= 1;
                    if held.pins == 0 {
                        held.last_use = self.clock;
                    }
                    self.table.unpin(held.block, now);
                }
            }
            Op::MakeRoom(slots) => {
                let now = self.tick();
                self.table.make_room(slots, now);
                for victim in self.removed() {
                    self.evict(victim);
                }
            }
            Op::Coldest(count) => self.coldest(count),
            Op::Evict(node) => {
                let now = self.tick();
                let could = self.leaves().contains(&node);
                assert_eq!(self.table.evict(hash(node), now), could);
                if could {
                    self.held.remove(&node);
                    self.removed();
                }
            }
            Op::Forget(node) => {
                // Readers of a block that was forgotten are others' tests.
                if self.pins.iter().all(|pin| pin.0 != node.0) {
                    let now = self.tick();
                    self.table.forget(hash(node), now);
                    for gone in self.removed() {
                        self.held.remove(&gone);
                    }
                }
            }
        }
    }

    /// Looking changes nothing, and foretells who gives.
    fn coldest(&mut self, count: usize) {
        let now = self.tick();
        let coldest = self.table.coldest(count, now);
        let leaves = self.leaves();
        assert_eq!(coldest.len(), count.min(leaves.len()));
        let mut cached: Vec<usize> = (0..TENANTS).map(|tenant| self.cached(tenant)).collect();
        let mut left = leaves;
        for victim in coldest {
            let tenant = usize::from(victim.hash.0[1]);
            for (other, _) in &left {
                let (own, others) = (
                    cached[tenant] * WEIGHTS[*other] as usize,
                    cached[*other] * WEIGHTS[tenant] as usize,
                );
                assert!(own >= others);
            }
            cached[tenant] -= 1;
            left.retain(|node| hash(*node) != victim.hash);
        }
    }

    fn compare(&self) {
        self.table.check_integrity();
        let mut usage: BTreeMap<BlockHash, usize> = BTreeMap::new();
        for tenant in self.table.tenants() {
            usage.insert(tenant.root.expect("there are accounts enough"), tenant.cached);
        }
        for (tenant, most) in BLOCKS_MAX.into_iter().enumerate() {
            let counted = usage.get(&root(tenant)).copied().unwrap_or_default();
            assert_eq!(counted, self.cached(tenant));
            assert!(counted <= most);
        }
        assert_eq!(self.table.tenant_events().refused, self.refused);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_tenant_passes_its_quota_and_the_one_furthest_above_its_share_gives(
        eviction in prop::sample::select(&Eviction::ALL),
        ops in prop::collection::vec(op(), 1..200),
    ) {
        let mut run = Run::new(eviction);
        for op in ops {
            run.step(op);
            run.compare();
        }
    }
}

/// Stores chains of one block, one after the other, and lets them go.
fn fill(table: &mut BlockTable, tenant: usize, blocks: impl Iterator<Item = u32>, now: Instant) {
    for number in blocks {
        let block = table.allocate(1, now).unwrap()[0];
        let hash = root(tenant).child(&[number]);
        match table.commit(block, Parent::Root(root(tenant)), hash, Checksum(0), now) {
            Committed::Stored(stored) => table.unpin(stored.block, now),
            Committed::Duplicate(_) | Committed::Orphan | Committed::OverQuota => panic!("{number} is new"),
        }
    }
}

fn cached(table: &BlockTable, tenant: usize) -> usize {
    let of = |usage: &TenantUsage| usage.root == Some(root(tenant));
    table
        .tenants()
        .into_iter()
        .find(of)
        .map_or(0, |usage| usage.cached)
}

#[test]
fn one_tenant_may_use_what_others_leave_and_gives_it_back_down_to_its_share() {
    for eviction in Eviction::ALL {
        let now = Instant::now();
        let mut table = table(100, eviction, TenantLimits::default());
        fill(&mut table, 0, 0..150, now);
        assert_eq!(cached(&table, 0), 100, "{eviction}: nobody else wants it");
        fill(&mut table, 1, 0..30, now);
        assert_eq!((cached(&table, 0), cached(&table, 1)), (70, 30), "{eviction}");
        fill(&mut table, 1, 30..300, now);
        assert_eq!(cached(&table, 0) + cached(&table, 1), 100);
        assert!(
            cached(&table, 0).abs_diff(50) <= 1,
            "{eviction}: {}",
            cached(&table, 0)
        );
        fill(&mut table, 2, 0..300, now);
        for tenant in 0..3 {
            assert!(
                cached(&table, tenant).abs_diff(33) <= 1,
                "{eviction}: {}",
                cached(&table, tenant)
            );
        }
        table.check_integrity();
    }
}

#[test]
fn weights_divide_what_is_short() {
    let limits = TenantLimits {
        of_root: vec![(root(1), limit(1))],
        default: TenantLimit::default(),
    };
    let now = Instant::now();
    let mut table = table(100, Eviction::Lru, limits);
    for round in 0..100 {
        fill(&mut table, 0, 10 * round..10 * round + 10, now);
        fill(&mut table, 1, 10 * round..10 * round + 10, now);
    }
    assert!(cached(&table, 1).abs_diff(75) <= 1, "{}", cached(&table, 1));
}

fn at_most(blocks: usize) -> TenantLimits {
    let limit = TenantLimit {
        blocks_max: Some(blocks),
        ..TenantLimit::default()
    };
    TenantLimits {
        of_root: vec![(root(0), limit)],
        default: TenantLimit::default(),
    }
}

#[test]
fn a_quota_that_becomes_smaller_takes_what_is_beyond_and_nothing_of_others() {
    for eviction in Eviction::ALL {
        let now = Instant::now();
        let mut table = table(100, eviction, TenantLimits::default());
        fill(&mut table, 1, 0..40, now);
        fill(&mut table, 0, 0..40, now);
        table.limit_tenants(at_most(10));
        table.check_integrity();
        assert_eq!(cached(&table, 0), 40, "only what is asked for is evicted");
        assert!(!table.give_excess(5, now));
        table.check_integrity();
        assert_eq!(cached(&table, 0), 35);
        while !table.give_excess(64, now) {}
        assert_eq!((cached(&table, 0), cached(&table, 1)), (10, 40), "{eviction:?}");
        table.limit_tenants(TenantLimits::default());
        fill(&mut table, 0, 100..120, now);
        assert_eq!(cached(&table, 0), 30, "it may have more again");
        table.check_integrity();
    }
}

#[test]
fn what_is_in_use_beyond_a_smaller_quota_goes_as_its_tenant_stores_other_blocks() {
    let now = Instant::now();
    let mut table = table(32, Eviction::Lru, TenantLimits::default());
    fill(&mut table, 0, 0..8, now);
    let used: Vec<_> = (0..8)
        .flat_map(|number| table.match_prefix(&[root(0).child(&[number])], now))
        .collect();
    assert_eq!(used.len(), 8);
    table.limit_tenants(at_most(2));
    assert!(table.give_excess(64, now), "all that could go has gone");
    assert_eq!(cached(&table, 0), 8);
    let block = table.allocate(1, now).unwrap()[0];
    let refused = table.commit(
        block,
        Parent::Root(root(0)),
        root(0).child(&[99]),
        Checksum(0),
        now,
    );
    assert_eq!(refused, Committed::OverQuota);
    table.free(block);
    for used in used {
        table.unpin(used.block, now);
    }
    for (number, left) in (100..108).zip([7, 6, 5, 4, 3, 2, 2, 2]) {
        fill(&mut table, 0, number..number + 1, now);
        assert_eq!(cached(&table, 0), left);
        table.check_integrity();
    }
}

#[test]
fn a_limit_opens_and_closes_a_tenants_account() {
    let now = Instant::now();
    let mut table = table(8, Eviction::default(), at_most(3));
    assert_eq!(
        table.tenants().len(),
        1,
        "a tenant with a limit is known without a block"
    );
    table.limit_tenants(TenantLimits::default());
    assert_eq!(table.tenants(), []);
    fill(&mut table, 1, 0..2, now);
    table.limit_tenants(at_most(3));
    table.check_integrity();
    fill(&mut table, 0, 0..5, now);
    assert_eq!((cached(&table, 0), cached(&table, 1)), (3, 2));
}

#[test]
fn a_quota_below_one_block_caches_nothing_and_leaves_no_account_behind() {
    let none = TenantLimit {
        blocks_max: Some(0),
        ..TenantLimit::default()
    };
    let limits = TenantLimits {
        of_root: Vec::new(),
        default: none,
    };
    let now = Instant::now();
    let mut table = table(4, Eviction::default(), limits);
    let block = table.allocate(1, now).unwrap()[0];
    let committed = table.commit(block, Parent::Root(root(0)), hash((0, 1)), Checksum(0), now);
    assert_eq!(committed, Committed::OverQuota);
    assert_eq!(table.tenants(), []);
    table.free(block);
    table.check_integrity();
}

#[test]
fn a_quota_of_one_block_holds_the_newest() {
    let one = TenantLimit {
        blocks_max: Some(1),
        ..TenantLimit::default()
    };
    let limits = TenantLimits {
        of_root: Vec::new(),
        default: one,
    };
    let mut table = table(4, Eviction::default(), limits);
    fill(&mut table, 0, 0..3, Instant::now());
    assert!(table.holds(root(0).child(&[2])));
    assert_eq!(cached(&table, 0), 1);
    table.check_integrity();
}

#[test]
fn tenants_without_number_share_one_account() {
    let accounts = u32::try_from(super::super::ACCOUNTS_MAX).unwrap();
    let now = Instant::now();
    let mut table = table(2048, Eviction::Lru, TenantLimits::default());
    let tenant = |number: u32| BlockHash::default().child(&[number]);
    for number in 0..accounts + 100 {
        let block = table.allocate(1, now).unwrap()[0];
        let of = tenant(number);
        let committed = table.commit(block, Parent::Root(of), of.child(&[1]), Checksum(0), now);
        let Committed::Stored(stored) = committed else {
            panic!("it is new")
        };
        table.unpin(stored.block, now);
    }
    let usage = table.tenants();
    assert_eq!(usage.len(), super::super::ACCOUNTS_MAX + 1);
    let others: Vec<usize> = usage
        .iter()
        .filter(|one| one.root.is_none())
        .map(|one| one.cached)
        .collect();
    assert_eq!(others, [100]);
    table.check_integrity();
    // An account is free again with its last block.
    assert!(table.evict(tenant(0).child(&[1]), now));
    let block = table.allocate(1, now).unwrap()[0];
    let late = tenant(u32::MAX);
    table.commit(block, Parent::Root(late), late.child(&[1]), Checksum(0), now);
    assert!(table.tenants().iter().any(|one| one.root == Some(late)));
    table.check_integrity();
}

#[test]
fn with_one_tenant_the_policy_decides_alone() {
    // Not by accident: the same operations, with limits that would matter for others.
    for eviction in Eviction::ALL {
        let logs = [TenantLimits::default(), limits()].map(|limits| {
            let mut table = table(CAPACITY, eviction, limits);
            let mut now = Instant::now();
            for round in 0..40u32 {
                now += Duration::from_millis(10);
                fill(&mut table, 1, round * 7..round * 7 + 7, now);
                let again: Vec<BlockHash> = vec![root(1).child(&[round * 7])];
                for held in table.match_prefix(&again, now) {
                    table.unpin(held.block, now);
                }
            }
            assert_eq!(table.tenant_events(), TenantEvents::default());
            let Resume::Entries(entries) = table.log().since(1, usize::MAX) else {
                panic!("the log is long enough for this test");
            };
            entries
        });
        assert_eq!(logs[0], logs[1]);
    }
}

#[test]
fn a_search_for_a_victim_is_bounded_and_costs_a_quiet_tenant_next_to_nothing() {
    let now = Instant::now();
    let each = u32::try_from(2 * SHELVED_MAX).unwrap();
    let mut table = table(4 * SHELVED_MAX, Eviction::Lru, TenantLimits::default());
    fill(&mut table, 0, 0..each, now);
    fill(&mut table, 1, 0..2 * each, now + Duration::from_secs(1));
    let evicted = table.evictions();
    assert_eq!(evicted, u64::from(each));
    // All that the quiet one has is colder than all of the other's: it is passed over once, in pieces.
    let lost = each as usize - cached(&table, 0);
    assert_eq!(lost as u64, evicted - table.tenant_events().evicted_by_share);
    assert!((1..=2).contains(&lost), "{lost}");
    table.check_integrity();
}

/// Serves one request of a tenant. Returns how many of its blocks were held.
fn serve(table: &mut BlockTable, tenant: usize, blocks: &[u64], now: Instant) -> usize {
    let chain: Vec<BlockHash> = blocks
        .iter()
        .map(|block| root(tenant).child(&[(block >> 32) as u32, *block as u32]))
        .collect();
    let found = table.match_prefix(&chain, now);
    let held = found.len();
    let mut pinned: Vec<BlockId> = found.into_iter().map(|found| found.block).collect();
    let mut above = held
        .checked_sub(1)
        .map_or(Parent::Root(root(tenant)), |last| Parent::Block(chain[last]));
    for hash in &chain[held..] {
        let Ok(free) = table.allocate(1, now) else { break };
        match table.commit(free[0], above, *hash, Checksum(0), now) {
            Committed::Stored(stored) => pinned.push(stored.block),
            Committed::Duplicate(_) | Committed::Orphan | Committed::OverQuota => panic!("{hash} is new"),
        }
        above = Parent::Block(*hash);
    }
    for block in pinned.into_iter().rev() {
        table.unpin(block, now);
    }
    held
}

/// Blocks that the first tenant finds while both are served from one pool.
fn hits_of_first(capacity: usize, eviction: Eviction, first: &[Request], second: &[Request]) -> usize {
    let mut table = table(capacity, eviction, TenantLimits::default());
    let mut all: Vec<(usize, &Request)> = first.iter().map(|request| (0, request)).collect();
    all.extend(second.iter().map(|request| (1, request)));
    all.sort_by_key(|(_, request)| request.at_ms);
    let begun = Instant::now();
    let mut hits = 0;
    for (tenant, request) in all {
        let now = begun + Duration::from_millis(request.at_ms);
        let held = serve(&mut table, tenant, &request.blocks, now);
        hits += if tenant == 0 { held } else { 0 };
    }
    hits
}

#[test]
fn a_burst_of_one_tenant_leaves_another_the_hits_of_its_share() {
    const SHARE: usize = 2_000;
    let quiet = Workload::Conversations.requests(1, 3_000);
    let until = quiet.last().unwrap().at_ms;
    // Ten times as many requests in the same time, most of which nobody asks for again.
    let mut noisy = Workload::Scans.requests(2, 30_000);
    let lasts = noisy.last().unwrap().at_ms;
    for request in &mut noisy {
        request.at_ms = request.at_ms * until / lasts;
    }
    for eviction in Eviction::ALL {
        let alone = hits_of_first(SHARE, eviction, &quiet, &[]);
        let beside = hits_of_first(2 * SHARE, eviction, &quiet, &noisy);
        println!("{eviction}: {alone} hits alone on its share, {beside} beside the other on twice as much");
        let least = match eviction {
            // Its small queue is the pool's: what is new of the quiet one passes through it at the pace of the other.
            Eviction::S3Fifo => 0.85,
            Eviction::Lru | Eviction::Lfu | Eviction::Returns => 0.95,
        };
        assert!(
            beside as f64 >= least * alone as f64,
            "{eviction}: {beside} of {alone}"
        );
    }
}
