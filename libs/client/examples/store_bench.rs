//! Measures how fast a client puts blocks into a store and gets them back. `scripts/bench_store.py` (`make bench-store`)
//! drives it next to Mooncake Store; by hand:
//!
//! ```sh
//! store_bench serve --block-bytes 65536 > record &    # ends with its standard input
//! echo '{"op": "put", "blocks": 16, "clients": 1, "batches": 1000}' | store_bench drive --record "$(cat record)"
//! ```
//!
//! `drive` takes phases as lines of JSON and answers each with a line of JSON. Batch `i` of a client is the same chain of
//! blocks in every phase, so that gets find what puts have brought, and puts of batches that were never put move bytes.
#![allow(clippy::print_stdout)] // Data.

use std::error::Error;
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand, ValueEnum};
use client::{Blocks, Buffer, Place};
use kv_store::store_node::{self, StoreNode};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use transfer::{TcpTransport, Transport, ucx};
use types::{BlockHash, Epoch, KvDtype, KvLayout, KvSpace, NodeId, NodeRecord, Role};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const BLOCK_TOKENS: usize = 32;
const HEAD_DIM: usize = 32;
/// K and V of one layer in half precision.
const LAYER_BYTES: usize = 2 * BLOCK_TOKENS * HEAD_DIM * 2;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Command,
    /// What may move bytes.
    #[arg(long, global = true, default_value = "tcp")]
    transport: Choice,
}

#[derive(Subcommand)]
enum Command {
    /// Serves a pool until standard input ends, and prints how to reach it.
    Serve {
        /// Bytes of a block, a multiple of 4096.
        #[arg(long)]
        block_bytes: usize,
        /// Bytes of the pool.
        #[arg(long, default_value_t = 1 << 30)]
        pool_bytes: usize,
    },
    /// Takes phases from standard input and measures them.
    Drive {
        /// The line that the serving process printed.
        #[arg(long)]
        record: String,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Choice {
    Auto,
    Tcp,
    Ucx,
}

/// What all clients do, each with batches of its own.
#[derive(Deserialize)]
struct Phase {
    op: Op,
    /// Blocks of a batch.
    blocks: usize,
    clients: usize,
    /// Batches of each client.
    batches: usize,
    /// Number of the first one.
    #[serde(default)]
    first: usize,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Op {
    /// Makes buffers and connections, so that what follows measures none of it, and moves nothing.
    Prepare,
    Put,
    Get,
    Exists,
}

#[derive(Serialize)]
struct Figures {
    seconds: f64,
    bytes: u64,
    p50_us: f64,
    p99_us: f64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let Arguments { role, transport } = Arguments::parse();
    match role {
        Command::Serve {
            block_bytes,
            pool_bytes,
        } => serve(block_bytes, pool_bytes, transport).await,
        Command::Drive { record } => drive(&serde_json::from_str(&record)?, transport).await,
    }
}

fn config(choice: Choice) -> transfer::tcp::Config {
    transfer::tcp::Config {
        ucx: ucx::Config {
            choice: match choice {
                Choice::Auto => ucx::Choice::Auto,
                Choice::Tcp => ucx::Choice::Tcp,
                Choice::Ucx => ucx::Choice::Ucx,
            },
            ..ucx::Config::default()
        },
        ..transfer::tcp::Config::default()
    }
}

async fn serve(block_bytes: usize, pool_bytes: usize, choice: Choice) -> Result<()> {
    let layers = block_bytes / LAYER_BYTES;
    if layers * LAYER_BYTES != block_bytes || layers == 0 {
        return Err(format!("{block_bytes} is no multiple of {LAYER_BYTES}").into());
    }
    let space = KvSpace {
        model_digest: "0000".into(),
        arithmetic: "none".into(),
        layout: KvLayout {
            layers,
            kv_heads: 1,
            head_dim: HEAD_DIM,
            block_tokens: BLOCK_TOKENS,
            dtype: KvDtype::F16,
        },
        adapter: None,
        tenant_salt: String::new(),
    };
    let config = store_node::Config {
        capacity_bytes: pool_bytes,
        transfer: config(choice),
        // Keeps what was put last, which is what is got next.
        store: kv_store::Config {
            eviction: kv_store::Eviction::Lru,
            ..kv_store::Config::default()
        },
        ..store_node::Config::default()
    };
    let identity = node::Identity {
        id: NodeId::new("store"),
        epoch: Epoch(u64::from(std::process::id())),
        role: Role::Store,
    };
    let shutdown = CancellationToken::new();
    let metrics = node::Metrics::new();
    let store = StoreNode::start(
        config,
        space,
        &identity,
        node::Channels::new(),
        &metrics,
        shutdown.clone(),
    )
    .await?;
    println!("{}", serde_json::to_string(&store.record(&identity, "", "", ""))?);
    let running = tokio::spawn(store.run());
    node::task::blocking("standard-input", || std::io::stdin().lines().for_each(drop)).await?;
    shutdown.cancel();
    running.await?;
    Ok(())
}

async fn drive(record: &NodeRecord, choice: Choice) -> Result<()> {
    let address = ([127, 0, 0, 1], 0).into();
    let transport = TcpTransport::bind(address, Epoch(1), config(choice)).await?;
    let blocks = Blocks::new(transport.clone(), record)?;
    // The service answers once it runs, and what can map memory has had the time to find out.
    blocks.exists(&[]).await?;
    let mut buffers: Vec<Buffer> = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let phase: Phase = serde_json::from_str(&line?)?;
        while buffers.len() < phase.clients || buffers[0].blocks() < phase.blocks {
            buffers.retain(|buffer| buffer.blocks() >= phase.blocks);
            let buffer = blocks.allocate(phase.blocks)?;
            for block in 0..phase.blocks {
                buffer.fill(block, &vec![7; blocks.block_bytes()])?;
            }
            buffers.push(buffer);
        }
        if let Op::Prepare = phase.op {
            warm(&blocks, &buffers[0], &transport).await?;
        }
        let figures = run(&blocks, &buffers, &phase).await?;
        println!("{}", serde_json::to_string(&figures)?);
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// Moves a block until whatever may move blocks better than TCP has been introduced.
async fn warm(blocks: &Blocks, buffer: &Buffer, transport: &Arc<TcpTransport>) -> Result<()> {
    let chain = chain(blocks.kv_root(), usize::MAX, 0, 1);
    for _ in 0..100 {
        let links = transport.links();
        blocks.put_from(place(blocks), &chain, buffer, 0).await?;
        let settled = |link: &transfer::Link| link.mover != "tcp" || !link.obstacle.contains("introducing");
        if links.iter().all(settled) && !links.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

fn place(blocks: &Blocks) -> Place<'static> {
    Place {
        parent: blocks.kv_root(),
        tenant: "",
    }
}

/// The blocks of a batch, named by their client and number.
fn chain(root: BlockHash, client: usize, batch: usize, blocks: usize) -> Vec<BlockHash> {
    let mut tokens = vec![0; blocks];
    tokens[0] = (client as u32) << 24 ^ batch as u32;
    root.chain(&tokens, 1)
}

async fn run(blocks: &Blocks, buffers: &[Buffer], phase: &Phase) -> Result<Figures> {
    let clients: Vec<_> = (0..phase.clients)
        .map(|client| {
            let batches = phase.first..phase.first + phase.batches;
            let chains = batches.map(|batch| chain(blocks.kv_root(), client, batch, phase.blocks));
            (
                blocks.clone(),
                buffers[client].clone(),
                chains.collect::<Vec<_>>(),
            )
        })
        .collect();
    let op = phase.op;
    let begun = Instant::now();
    let tasks = clients.into_iter().map(|(blocks, buffer, chains)| {
        tokio::spawn(async move {
            let mut latencies = Vec::with_capacity(chains.len());
            for chain in chains {
                let begun = Instant::now();
                let done = match op {
                    Op::Prepare => chain.len(),
                    Op::Put => blocks.put_from(place(&blocks), &chain, &buffer, 0).await?,
                    Op::Get => blocks.get_into(&chain, &buffer, 0).await?,
                    Op::Exists => blocks.exists(&chain).await?.iter().filter(|held| **held).count(),
                };
                latencies.push(begun.elapsed());
                if done != chain.len() {
                    return Err(format!("{done} of {} blocks", chain.len()).into());
                }
            }
            Ok::<_, Box<dyn Error + Send + Sync>>(latencies)
        })
    });
    let mut latencies = Vec::new();
    for task in tasks.collect::<Vec<_>>() {
        latencies.extend(task.await??);
    }
    let seconds = begun.elapsed().as_secs_f64();
    latencies.sort();
    let at = |share: usize| {
        latencies[(latencies.len() * share / 100).min(latencies.len() - 1)].as_secs_f64() * 1e6
    };
    Ok(Figures {
        seconds,
        bytes: (phase.clients * phase.batches * phase.blocks * blocks.block_bytes()) as u64,
        p50_us: at(50),
        p99_us: at(99),
    })
}
