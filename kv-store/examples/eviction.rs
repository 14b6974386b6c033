//! Prints what each policy hits, by capacity, as JSON: for a trace in Mooncake's format, and for our own workloads.
//!
//! `eviction [TRACE.jsonl ...]`. `scripts/bench_eviction.py` turns the figures into docs/eviction.md.

use std::{env, fs};

use anyhow::{Context, Result};
use kv_store::policy::Eviction;
use kv_store::replay::workloads::Workload;
use kv_store::replay::{Request, optimum, replay};
use serde_json::{Value, json};

/// Capacities in thousands of tokens, and the tokens of a block, as in Figure 9 of Mooncake's FAST'25 paper.
const CAPACITIES_KTOKENS: [usize; 9] = [500, 1_000, 2_000, 3_000, 5_000, 10_000, 15_000, 26_000, 50_000];
const BLOCK_TOKENS: usize = 512;
const WORKLOAD_SEED: u64 = 1;
const WORKLOAD_REQUESTS: usize = 12_000;

fn main() -> Result<()> {
    let mut tables = Vec::new();
    for path in env::args().skip(1) {
        let requests = read(&path)?;
        tables.push(table(&path, &requests));
    }
    for workload in Workload::ALL {
        let requests = workload.requests(WORKLOAD_SEED, WORKLOAD_REQUESTS);
        tables.push(table(workload.name(), &requests));
    }
    println!("{}", serde_json::to_string_pretty(&tables)?);
    Ok(())
}

fn table(name: &str, requests: &[Request]) -> Value {
    let rows = CAPACITIES_KTOKENS.map(|ktokens| {
        let capacity = ktokens * 1000 / BLOCK_TOKENS;
        let mut row = json!({ "ktokens": ktokens });
        for eviction in Eviction::ALL {
            row[eviction.name()] = replay(requests, capacity, eviction).ratio().into();
        }
        row["belady"] = optimum::belady(requests, capacity).ratio().into();
        eprintln!("{name}: {row}");
        row
    });
    json!({ "name": name, "requests": requests.len(), "rows": rows })
}

fn read(path: &str) -> Result<Vec<Request>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let request = |(number, line): (usize, &str)| {
        let parsed: Value =
            serde_json::from_str(line).with_context(|| format!("{path}, line {}", number + 1))?;
        let blocks = parsed["hash_ids"]
            .as_array()
            .context("a request without hash_ids")?;
        let blocks = blocks
            .iter()
            .map(|block| block.as_u64().context("a hash id that is no number"));
        Ok(Request {
            at_ms: parsed["timestamp"].as_u64().unwrap_or(0),
            blocks: blocks.collect::<Result<_>>()?,
        })
    };
    text.lines().enumerate().map(request).collect()
}
