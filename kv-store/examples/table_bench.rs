//! Measures the block table behind its lock, as a store uses it: how many keys a second one core can look up, what eviction
//! on another thread does to that, and for how long the longest operations hold the lock.
//!
//! `table_bench`. `scripts/bench_table.py` puts what it prints into docs/eviction.md. Wants two idle cores.

use std::hint::black_box;
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use kv_store::Eviction;
use kv_store::table::{BlockTable, Committed, Parent, TableLimits};
use types::{BlockHash, BlockId, Checksum};

const BLOCKS: usize = 1_000_000;
/// Blocks of a chain, which one request stores.
const CHAIN: usize = 40;
/// Keys asked for at a time: a long prompt's.
const BATCH: usize = 64;
/// How long each rate is measured.
const MEASURED: Duration = Duration::from_secs(2);
/// Chains stored each second while eviction runs: 10,000 blocks, which at 512 tokens are 5 million tokens a second.
const CHAINS_PER_SECOND: u32 = 250;
/// Times that each long operation is measured; the worst counts.
const REPEATS: usize = 9;
const ROOT: BlockHash = BlockHash([0xff; 16]);

/// A table, and how many chains were stored in it.
struct Filled {
    table: Mutex<BlockTable>,
    chains: u32,
}

fn chain(number: u32) -> Vec<BlockHash> {
    ROOT.chain(&[number; CHAIN], 1)
}

impl Filled {
    fn new() -> Self {
        let table = BlockTable::new(TableLimits {
            capacity: BLOCKS,
            log_entries_max: 1024,
            leases_max: 16,
            first_lease: 1,
            eviction: Eviction::default(),
        });
        let mut filled = Self {
            table: Mutex::new(table),
            chains: 0,
        };
        // Twice over, so that the policy's history is full as well.
        while (filled.chains as usize) < 2 * BLOCKS / CHAIN {
            store(&filled.table, filled.chains, &mut Vec::new());
            filled.chains += 1;
        }
        filled
    }

    /// Keys in no order, half of which are held.
    fn keys(&self) -> Vec<BlockHash> {
        let half = self.chains / 2;
        let mut keys: Vec<BlockHash> = (half / 2..half + half / 2).flat_map(chain).collect();
        // Digests are uniform, so their order is none; the half that the index does not look at sees to that.
        keys.sort_unstable_by_key(|key| u128::from_le_bytes(key.0));
        keys
    }
}

/// Runs one operation of the table. Returns for how long it held the lock, too.
fn held<R>(table: &Mutex<BlockTable>, run: impl FnOnce(&mut BlockTable) -> R) -> (R, Duration) {
    let mut table = table.lock().expect("nothing panics while it measures");
    let begun = Instant::now();
    let result = run(&mut table);
    (result, begun.elapsed())
}

/// Stores a chain as a request does, block by block; notes how long each step held the lock.
fn store(table: &Mutex<BlockTable>, number: u32, holds: &mut Vec<Duration>) {
    let mut parent = Parent::Root(ROOT);
    let mut pinned: Vec<BlockId> = Vec::with_capacity(CHAIN);
    let (blocks, hold) = held(table, |table| table.allocate(CHAIN, Instant::now()));
    holds.push(hold);
    let blocks = blocks.expect("nothing else is pinned");
    for (block, hash) in blocks.into_iter().zip(chain(number)) {
        let (committed, hold) = held(table, |table| {
            table.commit(block, parent, hash, Checksum(1), Instant::now())
        });
        holds.push(hold);
        let Committed::Stored(stored) = committed else {
            panic!("each chain is stored once, in order");
        };
        pinned.push(stored.block);
        parent = Parent::Block(hash);
    }
    for block in pinned.into_iter().rev() {
        let ((), hold) = held(table, |table| table.unpin(block, Instant::now()));
        holds.push(hold);
    }
}

fn percentile(sorted: &[Duration], share: f64) -> f64 {
    let index = ((sorted.len() - 1) as f64 * share) as usize;
    sorted[index].as_nanos() as f64 / 1000.0
}

/// Looks keys up for a while, `batch` at a time, as [`kv_store::Store::exists`] does. Prints a row.
fn lookups(name: &str, table: &Mutex<BlockTable>, keys: &[BlockHash], batch: usize) {
    let mut took = Vec::new();
    let begun = Instant::now();
    let mut batches = keys.chunks_exact(batch).cycle();
    while begun.elapsed() < MEASURED
        && let Some(batch) = batches.next()
    {
        let asked = Instant::now();
        let held = table
            .lock()
            .expect("nothing panics while it measures")
            .exists(batch);
        black_box(held);
        took.push(asked.elapsed());
    }
    let rate = (took.len() * batch) as f64 / begun.elapsed().as_secs_f64() / 1e6;
    took.sort_unstable();
    let [middle, high, higher] = [0.5, 0.99, 0.999].map(|share| percentile(&took, share));
    println!("| {name} | {batch} | {rate:.2} | {middle:.1} | {high:.1} | {higher:.1} |");
}

fn main() {
    let filled = Filled::new();
    let (table, keys) = (&filled.table, filled.keys());
    println!(
        "| lookups | keys at a time | million keys/s | p50 µs | p99 µs | p99.9 µs |\n|---|---|---|---|---|---|"
    );
    for batch in [1, BATCH] {
        lookups("alone", table, &keys, batch);
    }
    let (done, until_done) = mpsc::channel();
    let mut holds = Vec::new();
    std::thread::scope(|scope| {
        let holds = &mut holds;
        let chains = filled.chains;
        scope.spawn(move || {
            let (begun, mut stored) = (Instant::now(), 0);
            let mut wait = Duration::ZERO;
            while until_done.recv_timeout(wait).is_err() {
                store(table, chains + stored, holds);
                stored += 1;
                let next = begun + Duration::from_secs(1) * stored / CHAINS_PER_SECOND;
                wait = next.saturating_duration_since(Instant::now());
            }
        });
        for batch in [1, BATCH] {
            lookups("while blocks are evicted", table, &keys, batch);
        }
        done.send(()).expect("the thread waits for this");
    });

    println!("\n| holds the lock | worst µs |\n|---|---|");
    let worst = |name: &str, holds: &[Duration]| {
        let worst = holds
            .iter()
            .max()
            .map_or(0.0, |hold| hold.as_nanos() as f64 / 1000.0);
        println!("| {name} | {worst:.0} |");
    };
    worst("a step of storing a chain, while keys are looked up", &holds);
    let now = Instant::now();
    let repeated = |run: &dyn Fn(&mut BlockTable)| -> Vec<Duration> {
        (0..REPEATS).map(|_| held(table, run).1).collect()
    };
    worst(
        "evict 1,000 blocks",
        &repeated(&|table| {
            let free = table.counts().free;
            table.make_room(free + 1000, now);
        }),
    );
    worst(
        "the 1,000 coldest blocks",
        &repeated(&|table| {
            black_box(table.coldest(1000, now));
        }),
    );
    worst(
        "the price of 1,000 slots",
        &repeated(&|table| {
            black_box(table.price(1000, usize::MAX, now));
        }),
    );
    worst(
        "a snapshot",
        &repeated(&|table| {
            black_box(table.snapshot());
        }),
    );
}
