//! Measures how well cooperating pools do beside one pool of their size, over a trace of block ids, and prints a Markdown table.
//!
//! `cooperation TRACE.jsonl`: one JSON object per line, with `timestamp` in milliseconds and `hash_ids`, chained ids of blocks of
//! 512 tokens.

use std::process::ExitCode;
use std::time::Duration;

use kv_store::Eviction;
use kv_store::cooperate::Limits;
use sim::cooperation::{Pools, Routing, prompts_of_trace, run};

const BLOCK_TOKENS: usize = 512;
const NODE_TOKENS: usize = 3_000_000;

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("usage: cooperation TRACE.jsonl");
        return ExitCode::from(64);
    };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("{path}: {error}");
            return ExitCode::from(66);
        }
    };
    let prompts = match prompts_of_trace(&text) {
        Ok(prompts) => prompts,
        Err(error) => {
            eprintln!("{path}: {error}");
            return ExitCode::from(65);
        }
    };
    let blocks = NODE_TOKENS / BLOCK_TOKENS;
    let limits = Limits {
        blocks_per_second: 2000.0,
        run_blocks_max: 1024,
        copies_max: kv_store::Config::default().copies_max,
        recirculations_max: 4,
        ramp: Duration::from_secs(60),
        confirmation_ttl: Duration::from_secs(2),
    };
    let one = Pools {
        serving: 1,
        stores: 0,
        blocks_per_node: 10 * blocks,
        eviction: Eviction::default(),
        routing: Routing::RoundRobin,
        cooperation: None,
    };
    let whole = run(&one, &prompts);
    println!("| pools | routing | cooperation | hit ratio | of one pool | local hits | moved | load max |");
    println!("|---|---|---|---|---|---|---|---|");
    println!("| 1 × 30M | | | {:.4} | | | | |", whole.hit_ratio());
    let affinity = |load_max| Routing::Affinity { load_max };
    let cases = [
        (10, 0, affinity(1.1)),
        (10, 0, affinity(1.25)),
        (10, 0, affinity(1.5)),
        (10, 0, Routing::RoundRobin),
        (4, 6, affinity(1.1)),
        (4, 6, Routing::RoundRobin),
    ];
    for (serving, stores, routing) in cases {
        for cooperation in [None, Some(limits)] {
            let served = run(
                &Pools {
                    serving,
                    stores,
                    blocks_per_node: blocks,
                    eviction: Eviction::default(),
                    routing,
                    cooperation,
                },
                &prompts,
            );
            let routed = match routing {
                Routing::Affinity { load_max } => format!("prefix, load ≤ {load_max} × mean"),
                Routing::RoundRobin => "round robin".to_owned(),
            };
            println!(
                "| {serving} + {stores} × 3M | {routed} | {} | {:.4} | {:.1} % | {:.4} | {} | {:.2} |",
                if cooperation.is_some() { "yes" } else { "no" },
                served.hit_ratio(),
                100.0 * served.hit_ratio() / whole.hit_ratio(),
                served.hits_local as f64 / served.blocks as f64,
                served.moved,
                served.load_max,
            );
        }
    }
    ExitCode::SUCCESS
}
