//! A million reads of other nodes' memory, by nodes whose clocks jump, that pause, restart, and reuse every slot at once.
//!
//! Pools, leases, transfers and checksums are the real ones; time, and who does what when, is drawn from a seed. Leases end in the
//! middle of reads, since links are slow and clocks wrong: then a slot holds another block while its bytes are still read. What a
//! reader believes must be what it asked for all the same; and as long as the owner knows of the lease, the bytes must not change at all.
//!
//! `PERIGEE_SIMULATED_READS` sets how many, `PERIGEE_SIMULATION_SEED` which.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use transfer::mem::Faults;
use transfer::{Keep, MemNetwork, RemoteRegion, Slice, TransferBatch, TransferError, Transport};
use types::{BlockDescriptor, BlockHash, Epoch, LeaseId};

use super::super::{OwnedBlock, Store};
use crate::Config;
use crate::table::Purpose;
use crate::testing::{BLOCK_TOKENS, content, space, store_on, tokens, write};

const NODES: u64 = 3;
/// Small, so that slots are used again at once.
const POOL_BLOCKS: usize = 48;
/// More than all pools hold.
const DOCUMENTS: u64 = 256;
const READS_AT_A_TIME: usize = 32;
const READS: u64 = 1_000_000;
const SEED: u64 = 2026;
/// Of the pieces that arrive, how many have another bit.
const FLIPS: f64 = 0.002;
/// A block comes in up to so many pieces, each with its own delay.
const PIECES_MAX: u64 = 3;

/// What a reader does with the bytes it got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    /// Verifies them, as all readers do.
    Verifies,
    /// Believes them: shows what the simulation would let through.
    Trusts,
}

/// How reads ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    /// The bytes that were asked for, under a lease that was open to the end.
    valid: u64,
    /// The same, but the lease had ended: only the checksum vouched for them.
    valid_after_expiry: u64,
    /// The lease had ended and the slot held something else: found by the checksum.
    reused_detected: u64,
    /// The network changed a bit: found by the checksum.
    flipped_detected: u64,
    /// The owner had died, or was another incarnation.
    fenced: u64,
    /// The connection broke.
    broken: u64,
    /// The owner did not hold it, or the reader had no room.
    missed: u64,
    /// Believed, but not what was asked for. Must stay 0 for readers that verify.
    foreign: u64,
}

impl Counts {
    /// Those that had something to read.
    fn reads(&self) -> u64 {
        let Self {
            valid,
            valid_after_expiry,
            reused_detected,
            flipped_detected,
            fenced,
            broken,
            missed: _,
            foreign,
        } = self;
        valid + valid_after_expiry + reused_detected + flipped_detected + fenced + broken + foreign
    }
}

struct Document {
    hash: BlockHash,
    content: Vec<u8>,
}

struct Node {
    store: Store,
    transport: Arc<dyn Transport>,
    epoch: Epoch,
    /// How far its clock is from the right one.
    ahead_ms: u64,
    /// It does nothing until then; peers read its memory all the same.
    paused_until_ms: u64,
}

struct Read {
    reader: usize,
    reader_epoch: Epoch,
    owner: usize,
    owner_epoch: Epoch,
    document: usize,
    remote: RemoteRegion,
    held: BlockDescriptor,
    lease: LeaseId,
    into: Arc<Vec<OwnedBlock>>,
    /// Bytes that came, and where each piece ends.
    done: u64,
    ends: Vec<u64>,
    is_slow: bool,
}

enum Event {
    Piece(Box<Read>),
    /// A node looks after its leases.
    Tick(usize),
    Disturbance,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

struct World {
    reader: Reader,
    random: Random,
    network: MemNetwork,
    base: Instant,
    now_ms: u64,
    nodes: Vec<Node>,
    documents: Vec<Document>,
    events: BTreeMap<(u64, u64), Event>,
    scheduled: u64,
    epochs: u64,
    in_flight: usize,
    counts: Counts,
}

impl World {
    fn new(seed: u64, reader: Reader, flip_probability: f64) -> Self {
        let faults = Faults {
            flip_probability,
            break_probability: 0.002,
            ..Faults::default()
        };
        let root = space().root();
        let document = |seed| {
            let hash = root.chain(&tokens(seed, BLOCK_TOKENS), BLOCK_TOKENS)[0];
            Document {
                hash,
                content: content(hash),
            }
        };
        let mut world = Self {
            reader,
            random: Random(seed),
            network: MemNetwork::new(seed, faults),
            base: super::super::now(),
            // Far enough from the beginning that clocks can go wrong in both directions.
            now_ms: 100_000,
            nodes: Vec::new(),
            documents: (0..DOCUMENTS as u32).map(document).collect(),
            events: BTreeMap::new(),
            scheduled: 0,
            epochs: 0,
            in_flight: 0,
            counts: Counts::default(),
        };
        for index in 0..NODES as usize {
            let node = world.start(index);
            world.nodes.push(node);
            world.schedule(1, Event::Tick(index));
        }
        world.schedule(1, Event::Disturbance);
        world
    }

    /// A new incarnation: empty memory, another epoch.
    fn start(&mut self, index: usize) -> Node {
        self.epochs += 1;
        let epoch = Epoch(1000 * self.epochs);
        let transport: Arc<dyn Transport> = self.network.join(&format!("node-{index}"), epoch);
        Node {
            store: store_on(POOL_BLOCKS, Config::default(), epoch, transport.clone()),
            transport,
            epoch,
            ahead_ms: self.random.below(50_000),
            paused_until_ms: 0,
        }
    }

    fn schedule(&mut self, in_ms: u64, event: Event) {
        self.scheduled += 1;
        self.events.insert((self.now_ms + in_ms, self.scheduled), event);
    }

    /// What the node's own clock says.
    fn clock(&self, node: usize) -> Instant {
        self.base + Duration::from_millis(self.now_ms + self.nodes[node].ahead_ms)
    }

    fn run(mut self, reads: u64) -> Counts {
        while self.counts.reads() < reads {
            while self.in_flight < READS_AT_A_TIME {
                self.begin_read();
            }
            let ((at, _), event) = self.events.pop_first().expect("ticks never end");
            self.now_ms = at;
            match event {
                Event::Piece(read) => self.piece(read),
                Event::Tick(node) => self.tick(node),
                Event::Disturbance => self.disturb(),
            }
        }
        for node in &self.nodes {
            node.store.table().check_integrity();
        }
        self.counts
    }

    /// A node writes a document into its pool, in place of what is worth least.
    fn compute(&mut self, node: usize, document: usize) {
        let store = &self.nodes[node].store;
        let Some(block) = store.allocate_up_to(1).pop() else {
            return;
        };
        let document = &self.documents[document];
        write(store, block.block(), &document.content);
        drop(store.commit(block, store.common_root(), document.hash));
    }

    /// `Acquire`, at the owner's clock, and the reader's memory.
    fn begin_read(&mut self) {
        let reader = self.random.below(NODES) as usize;
        let owner = (reader + 1 + self.random.below(NODES - 1) as usize) % NODES as usize;
        // Few are popular, so that there is something to find.
        let document = self.random.below(DOCUMENTS).min(self.random.below(DOCUMENTS)) as usize;
        let hash = self.documents[document].hash;
        if self.random.one_in(3) {
            self.compute(owner, document);
        }
        let now = self.clock(owner);
        let expires = now + Duration::from_millis(1 + self.random.below(50));
        let leased = self.nodes[owner]
            .store
            .with_table(|table| table.lease(&[hash], Purpose::Request, expires, now));
        let leased = leased.expect("leases are far fewer than allowed");
        let (Some((lease, held)), Some(into)) = (leased, self.nodes[reader].store.allocate_up_to(1).pop())
        else {
            // A lease that nobody releases ends by itself.
            self.counts.missed += 1;
            return;
        };
        let bytes = space().layout.block_bytes() as u64;
        let mut ends: Vec<u64> = (0..self.random.below(PIECES_MAX))
            .map(|_| 1 + self.random.below(bytes - 1))
            .collect();
        ends.push(bytes);
        ends.sort_unstable();
        ends.dedup();
        let read = Box::new(Read {
            reader,
            reader_epoch: self.nodes[reader].epoch,
            owner,
            owner_epoch: self.nodes[owner].epoch,
            document,
            remote: self.nodes[owner].store.exposed().clone(),
            held: held[0],
            lease,
            into: Arc::new(vec![into]),
            done: 0,
            ends,
            is_slow: self.random.one_in(8),
        });
        self.in_flight += 1;
        let delay = self.delay(&read);
        self.schedule(delay, Event::Piece(read));
    }

    fn delay(&mut self, read: &Read) -> u64 {
        self.random.below(if read.is_slow { 200 } else { 3 })
    }

    /// One piece arrives.
    fn piece(&mut self, mut read: Box<Read>) {
        let reader = &self.nodes[read.reader];
        if reader.epoch != read.reader_epoch {
            // Nobody is there to believe anything.
            self.in_flight -= 1;
            return;
        }
        let end = read.ends[0];
        let slice = Slice {
            local_offset: reader.store.byte_range(read.into[0].block()).start + read.done,
            remote_offset: self.nodes[read.owner].store.byte_range(read.held.block).start + read.done,
            len: end - read.done,
        };
        let batch = TransferBatch {
            region: reader.store.region(),
            remote: read.remote.clone(),
            slices: vec![slice],
            keep: Keep::new(read.into.clone()),
        };
        let far = tokio::time::Instant::now() + Duration::from_secs(3600);
        let moved = reader.transport.read(batch, far).now_or_never();
        match moved.expect("a network without delay moves at once") {
            Ok(_) => {}
            Err(error) => return self.failed(&read, &error),
        }
        read.done = end;
        read.ends.remove(0);
        if read.ends.is_empty() {
            return self.end(*read);
        }
        let delay = self.delay(&read);
        self.schedule(delay, Event::Piece(read));
    }

    fn failed(&mut self, read: &Read, error: &TransferError) {
        self.in_flight -= 1;
        let is_same = self.nodes[read.owner].epoch == read.owner_epoch;
        match error {
            TransferError::Fenced { .. } => {
                assert!(!is_same, "only another incarnation fences a reader: {error}");
                self.counts.fenced += 1;
            }
            TransferError::ConnectionLost { .. } => self.counts.broken += 1,
            other => panic!("no reader is to see this: {other}"),
        }
    }

    /// The reader has all bytes: it verifies them, keeps them, and releases the lease.
    fn end(&mut self, read: Read) {
        self.in_flight -= 1;
        let now = self.clock(read.owner);
        let owner = &self.nodes[read.owner];
        let is_same = owner.epoch == read.owner_epoch;
        let was_leased = is_same && owner.store.with_table(|table| table.release(read.lease, now));
        let store = self.nodes[read.reader].store.clone();
        let block = Arc::into_inner(read.into).and_then(|mut blocks| blocks.pop());
        let block = block.expect("the transfer has ended");
        let document = &self.documents[read.document];
        let at = store.offset(block.block());
        let is_right =
            transfer::memory::with_bytes(store.memory().as_ref(), at, document.content.len(), |bytes| {
                bytes == document.content
            });
        let is_right = is_right.expect("inside the pool");
        let is_believed = match self.reader {
            Reader::Trusts => true,
            Reader::Verifies => store
                .adopt(block, store.common_root(), document.hash, read.held.checksum)
                .is_ok(),
        };
        let counts = &mut self.counts;
        match (is_believed, is_right) {
            (true, true) if was_leased => counts.valid += 1,
            (true, true) => counts.valid_after_expiry += 1,
            (true, false) => counts.foreign += 1,
            // Under a lease only the network can have changed anything.
            (false, false) if was_leased => counts.flipped_detected += 1,
            (false, false) => counts.reused_detected += 1,
            (false, true) => panic!("seed-dependent defect: right bytes were refused"),
        }
    }

    fn tick(&mut self, node: usize) {
        if self.nodes[node].paused_until_ms <= self.now_ms {
            let now = self.clock(node);
            self.nodes[node]
                .store
                .with_table(|table| table.expire_leases(now));
            // Nobody asks for these: they only take slots, and at once.
            for _ in 0..2 {
                let document = self.random.below(DOCUMENTS) as usize;
                self.compute(node, document);
            }
        }
        self.schedule(5, Event::Tick(node));
    }

    /// A clock jumps, a node pauses, or is killed and started again.
    fn disturb(&mut self) {
        let node = self.random.below(NODES) as usize;
        match self.random.below(40) {
            0 => self.nodes[node] = self.start(node),
            1..20 => self.nodes[node].ahead_ms = self.random.below(50_000),
            _ => self.nodes[node].paused_until_ms = self.now_ms + self.random.below(300),
        }
        let pause = 20 + self.random.below(60);
        self.schedule(pause, Event::Disturbance);
    }
}

fn simulate(seed: u64, reader: Reader, flip_probability: f64, reads: u64) -> Counts {
    let counts = World::new(seed, reader, flip_probability).run(reads);
    println!("seed {seed}, {reader:?}: {} reads, {counts:?}", counts.reads());
    counts
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().expect("a number"))
}

fn seed() -> u64 {
    number("PERIGEE_SIMULATION_SEED", SEED)
}

#[tokio::test]
async fn a_million_reads_never_give_bytes_of_another_generation() {
    let counts = simulate(
        seed(),
        Reader::Verifies,
        FLIPS,
        number("PERIGEE_SIMULATED_READS", READS),
    );
    assert_eq!(counts.foreign, 0, "seed {}", seed());
    let Counts {
        valid,
        valid_after_expiry,
        reused_detected,
        flipped_detected,
        fenced,
        broken,
        missed,
        foreign: _,
    } = counts;
    let classes = [
        valid,
        valid_after_expiry,
        reused_detected,
        flipped_detected,
        fenced,
        broken,
        missed,
    ];
    assert!(!classes.contains(&0), "something never happened: {counts:?}");
    assert!(valid > counts.reads() / 2, "most reads are good: {counts:?}");
}

/// The power of the simulation: without the check, many readers would have taken another block for theirs.
#[tokio::test]
async fn readers_that_trusted_would_have_taken_foreign_bytes() {
    let counts = simulate(seed(), Reader::Trusts, 0.0, 50_000);
    assert!(counts.foreign > 1000, "seed {}: {counts:?}", seed());
}

#[tokio::test]
async fn bytes_do_not_change_while_their_owner_knows_of_a_lease() {
    let counts = simulate(seed(), Reader::Verifies, 0.0, 100_000);
    // With a network that changes nothing, whatever did not match has no lease any more.
    assert_eq!(counts.flipped_detected, 0, "seed {}: {counts:?}", seed());
    assert!(counts.valid > 0 && counts.reused_detected > 0, "{counts:?}");
}

#[tokio::test]
async fn the_same_seed_gives_the_same_reads() {
    let runs = [0, 1].map(|_| simulate(7, Reader::Verifies, FLIPS, 20_000));
    assert_eq!(runs[0], runs[1]);
    assert_ne!(runs[0], simulate(8, Reader::Verifies, FLIPS, 20_000));
}
