//! Measures one prefix index on one load and prints the figures as a line of JSON: `dynamo-index SUBJECT LOAD WORKERS BLOCKS`.
//! `scripts/bench_router.py` runs it for every subject in turns.
//!
//! The index is compiled from the router's source, without the rest of the router.

mod dynamo;
mod load;
mod perigee;

#[path = "../../../../router/src"]
mod router {
    #[allow(dead_code)]
    pub mod index;
}

use std::hint::black_box;
use std::time::{Duration, Instant};

use load::{Chain, EVENT_BLOCKS, Load};

const DEPTHS: [usize; 3] = [16, 256, 2048];
/// Finds between two looks at the clock, and the least that one round of them takes.
const FINDS: usize = 20;
const ROUND: Duration = Duration::from_millis(10);

/// An index as the bench sees it.
pub trait Subject {
    /// A chain as it is asked for.
    type Query;

    fn query(chain: &Chain) -> Self::Query;
    /// Stores parts of chains, each at a worker; the time is that of applying events that are there already.
    fn store(&mut self, parts: &[load::Part]) -> f64;
    /// The same without having all events in memory at once.
    fn store_streaming(&mut self, parts: &[load::Part]);
    /// Sum of the lengths of all matches.
    fn find(&self, query: &Self::Query) -> usize;
    fn remove(&mut self, worker: usize);
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [subject, load, workers, blocks] = arguments.as_slice() else {
        panic!("usage: dynamo-index SUBJECT LOAD WORKERS BLOCKS");
    };
    let number = |text: &String| text.parse().expect("a number");
    let (workers, blocks) = (number(workers), number(blocks));
    match subject.as_str() {
        "perigee" => measure(perigee::Perigee::new(workers, usize::MAX), load, workers, blocks),
        // Room for half of what it is told.
        "perigee-full" => measure(perigee::Perigee::new(workers, blocks / 2), load, workers, blocks),
        "RadixTree" => measure(dynamo::Radix::new(), load, workers, blocks),
        "ConcurrentRadixTreeCompressed" => measure(dynamo::concurrent(), load, workers, blocks),
        "PositionalIndexer" => measure(dynamo::positional(), load, workers, blocks),
        other => panic!("no subject {other}"),
    }
}

fn measure<S: Subject>(subject: S, load: &str, workers: usize, blocks: usize) {
    match load {
        "speed" => speed(subject, workers, blocks),
        "private" => memory(subject, &Load::private(workers, blocks)),
        "shared" => memory(subject, &Load::shared(workers, blocks)),
        "mixed" => mixed(subject, workers, blocks),
        other => panic!("no load {other}"),
    }
}

/// Store, find and remove.
fn speed<S: Subject>(mut subject: S, workers: usize, blocks: usize) {
    let background = Load::private(workers, blocks);
    let stored_s = subject.store(&background.parts);
    println!("{{\"store_per_s\": {}", blocks as f64 / stored_s);
    for (number, depth) in DEPTHS.into_iter().enumerate() {
        let whole = Chain::new(1 << 40 | number as u64, depth);
        let staggered = Chain::new(1 << 41 | number as u64, depth);
        subject.store(&load::held_by_all(&whole, workers, |_| depth));
        subject.store(&load::held_by_all(&staggered, workers, |worker| {
            ((worker + 1) * depth).div_ceil(workers)
        }));
        for (name, chain, expected) in [
            ("whole", &whole, workers * depth),
            (
                "staggered",
                &staggered,
                (0..workers)
                    .map(|worker| ((worker + 1) * depth).div_ceil(workers))
                    .sum(),
            ),
        ] {
            let query = S::query(chain);
            assert_eq!(subject.find(&query), expected, "{name} at {depth}");
            println!(", \"{name}_{depth}_us\": {}", find(&subject, &[query]));
        }
    }
    let queries: Vec<_> = background.chains.iter().step_by(7).map(S::query).collect();
    println!(", \"one_holder_us\": {}", find(&subject, &queries));
    let start = Instant::now();
    subject.remove(0);
    println!(", \"remove_us\": {}", start.elapsed().as_secs_f64() * 1e6);
    let more = Load::private_from(1 << 42, workers, blocks / 10);
    let again_s = subject.store(&more.parts);
    println!(
        ", \"store_after_remove_per_s\": {}}}",
        more.blocks() as f64 / again_s
    );
}

/// Median of three rounds, in microseconds.
fn find<S: Subject>(subject: &S, queries: &[S::Query]) -> f64 {
    let mut rounds: Vec<f64> = (0..4)
        .map(|_| {
            let (start, mut finds) = (Instant::now(), 0);
            while start.elapsed() < ROUND {
                for query in queries.iter().cycle().skip(finds % queries.len()).take(FINDS) {
                    black_box(subject.find(black_box(query)));
                }
                finds += FINDS;
            }
            start.elapsed().as_secs_f64() * 1e6 / finds as f64
        })
        .skip(1)
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[1]
}

/// Growth of the resident set by location.
fn memory<S: Subject>(mut subject: S, load: &Load) {
    let before = resident_bytes();
    subject.store_streaming(&load.parts);
    let grown = resident_bytes() - before;
    println!("{{\"bytes_per_location\": {}}}", grown / load.blocks() as f64);
    black_box(subject);
}

/// Locations on 100 nodes and more, half of them shared; updates with a long look-up after every 64 events, and how long these take.
fn mixed<S: Subject>(mut subject: S, workers: usize, blocks: usize) {
    let before = resident_bytes();
    let load = Load::mixed(workers, blocks);
    let at_start = resident_bytes();
    let start = Instant::now();
    subject.store_streaming(&load.parts);
    let filled_s = start.elapsed().as_secs_f64();
    let bytes = resident_bytes() - at_start;
    black_box(before);
    let long = Chain::new(1 << 43, 6250);
    subject.store(&load::held_by_all(&long, workers, |worker| {
        1 + worker * 6249 / workers
    }));
    let queries: Vec<S::Query> = [3125, 6250].map(|depth| S::query(&long.first(depth))).into();
    let mut latencies = [const { Vec::new() }; 2];
    let more = Load::private_from(1 << 42, workers, blocks / 10);
    let (mut updated_s, mut updates) = (0.0, 0);
    for parts in more.parts.chunks(64) {
        updated_s += subject.store(parts);
        updates += parts.iter().map(|part| part.blocks.len()).sum::<usize>();
        for (query, latencies) in queries.iter().zip(&mut latencies) {
            let start = Instant::now();
            black_box(subject.find(query));
            latencies.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    println!(
        "{{\"fill_s\": {filled_s}, \"bytes_per_location\": {}, \"update_per_s\": {}",
        bytes / load.blocks() as f64,
        updates as f64 / updated_s
    );
    for (depth, latencies) in [3125, 6250].into_iter().zip(&mut latencies) {
        latencies.sort_by(f64::total_cmp);
        let (p50, p99) = (
            latencies[latencies.len() / 2],
            latencies[latencies.len() * 99 / 100],
        );
        println!(", \"find_{depth}_p50_us\": {p50}, \"find_{depth}_p99_us\": {p99}");
    }
    println!(", \"event_blocks\": {EVENT_BLOCKS}}}");
}

fn resident_bytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: f64 = status
        .split(' ')
        .nth(1)
        .expect("resident")
        .parse()
        .expect("pages");
    pages * 4096.0
}
