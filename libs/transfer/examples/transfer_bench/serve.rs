//! The process whose memory is written and read.
//!
//! Beside its transport it listens on a control port. A connection to it is one of four things, by its first line:
//! `usage` is answered with the processor time used so far; `hash` with the hashes of the ranges that each further
//! line names; `land` with the right to write to such ranges, and with their hashes once that is taken back; `sink` and a size is
//! answered when so much memory is there, and again when all bytes of the stream were read into it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use transfer::{Mover, RegionId, RemoteRegion, TcpTransport, Transport, memory};
use twox_hash::XxHash3_64;
use types::{Checksum, Epoch, Memory};

use crate::{Result, TransportArguments, usage};

/// How a bare stream is read and, if not told otherwise, written.
pub(crate) const STREAM_CALL_BYTES: usize = 1 << 20;

/// What the driving process needs to know.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ready {
    pub(crate) endpoint: String,
    pub(crate) epoch: u64,
    pub(crate) write_key: u64,
    pub(crate) read_key: u64,
    pub(crate) pool_bytes: u64,
    pub(crate) control: SocketAddr,
    pub(crate) movers: Vec<Mover>,
}

/// What a line of a `land` connection asks for: the end of one right to write to ranges, and another one.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Landing {
    /// That of the last answer, or none yet.
    pub(crate) key: Option<u64>,
    /// Offset and length of each range.
    pub(crate) ranges: Vec<(u64, u64)>,
}

/// What such a line is answered with.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Landed {
    /// Of the right that begins.
    pub(crate) key: u64,
    /// What each range holds, where a right has ended.
    pub(crate) hashes: Vec<u64>,
}

/// What a control connection is served from.
struct Served {
    transport: Arc<TcpTransport>,
    pool: Arc<dyn Memory>,
    region: RegionId,
    runtime: Handle,
}

pub(crate) async fn run(arguments: &TransportArguments) -> Result<()> {
    let (transport, pool) = open(arguments, 2).await?;
    let region = transport.register(pool.clone())?;
    let pool_bytes = pool.len() as u64;
    let whole_pool = std::iter::once(0..pool_bytes).collect();
    let control = TcpListener::bind(("127.0.0.1", 0))?;
    let ready = Ready {
        endpoint: transport.endpoint(),
        epoch: transport.epoch().0,
        write_key: transport.grant_write(region, whole_pool)?.key,
        read_key: transport.expose_read(region)?.key,
        pool_bytes,
        control: control.local_addr()?,
        movers: transport.movers(),
    };
    println!("{}", serde_json::to_string(&ready)?);
    let served = Arc::new(Served {
        transport: transport.clone(),
        pool,
        region,
        runtime: Handle::current(),
    });
    std::thread::spawn(move || {
        for connection in control.incoming().flatten() {
            let served = served.clone();
            std::thread::spawn(move || {
                if let Err(error) = serve(connection, &served) {
                    eprintln!("transfer_bench: control connection: {error}");
                }
            });
        }
    });
    tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink())).await??;
    transport.close().await;
    Ok(())
}

/// A transport, and memory of it whose bytes are a pattern that differs by `seed`.
pub(crate) async fn open(
    arguments: &TransportArguments,
    seed: u64,
) -> Result<(Arc<TcpTransport>, Arc<dyn Memory>)> {
    let address = ([127, 0, 0, 1], 0).into();
    let transport = TcpTransport::bind(address, Epoch(1), arguments.config()).await?;
    let pool = transport.allocate(arguments.pool_bytes)?;
    // Pages that were never written are all the same page, which would flatter the reads of them.
    let chunk_bytes = 1 << 20;
    for offset in (0..pool.len()).step_by(chunk_bytes) {
        let words = (offset as u64..).map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed);
        let chunk: Vec<u8> = words.take(chunk_bytes / 8).flat_map(u64::to_le_bytes).collect();
        memory::copy_in(&*pool, offset, &chunk[..chunk_bytes.min(pool.len() - offset)])?;
    }
    Ok((transport, pool))
}

fn serve(connection: TcpStream, served: &Served) -> Result<()> {
    connection.set_nodelay(true)?;
    let mut answers = connection.try_clone()?;
    let mut lines = BufReader::new(connection);
    let mut line = String::new();
    lines.read_line(&mut line)?;
    match line.trim_end() {
        "usage" => writeln!(answers, "{}", usage::processor_time().as_nanos())?,
        "hash" => loop {
            line.clear();
            if lines.read_line(&mut line)? == 0 {
                break;
            }
            let hashes = hashes(&*served.pool, &serde_json::from_str::<Vec<_>>(&line)?)?;
            writeln!(answers, "{}", serde_json::to_string(&hashes)?)?;
        },
        "land" => loop {
            line.clear();
            if lines.read_line(&mut line)? == 0 {
                break;
            }
            let landed = served.land(&serde_json::from_str(&line)?)?;
            writeln!(answers, "{}", serde_json::to_string(&landed)?)?;
        },
        request => {
            let walked_bytes = request
                .strip_prefix("sink ")
                .ok_or_else(|| format!("no such request: {request:?}"))?;
            let mut memory = vec![1; walked_bytes.parse()?];
            answers.write_all(b"\n")?;
            sink(lines.into_inner(), &mut memory)?;
            answers.write_all(b"\n")?;
        }
    }
    Ok(())
}

impl Served {
    /// As a node does whose peer writes blocks: hashes only what was not hashed as it landed.
    fn land(&self, landing: &Landing) -> Result<Landed> {
        let mut hashes = Vec::new();
        if let Some(key) = landing.key {
            let grant = RemoteRegion {
                endpoint: self.transport.endpoint(),
                epoch: self.transport.epoch(),
                key,
            };
            let seen = self.runtime.block_on(self.transport.revoke_hashed(&grant));
            for (place, range) in landing.ranges.iter().enumerate() {
                hashes.push(match seen.get(place) {
                    Some(Some(Checksum(seen))) => *seen,
                    Some(None) | None => hash(&*self.pool, range)?,
                });
            }
        }
        let ranges = landing.ranges.iter().map(|(offset, len)| *offset..offset + len);
        let grant = self.transport.grant_write_hashed(self.region, ranges.collect())?;
        Ok(Landed {
            key: grant.key,
            hashes,
        })
    }
}

/// Reads to the end, into one piece of the memory after the other.
fn sink(mut stream: TcpStream, memory: &mut [u8]) -> Result<()> {
    loop {
        for call in memory.chunks_mut(STREAM_CALL_BYTES) {
            let mut filled = 0;
            while filled < call.len() {
                match stream.read(&mut call[filled..])? {
                    0 => return Ok(()),
                    read => filled += read,
                }
            }
        }
    }
}

/// The hash of each range, given by offset and length.
pub(crate) fn hashes(pool: &dyn Memory, ranges: &[(u64, u64)]) -> Result<Vec<u64>> {
    ranges.iter().map(|range| hash(pool, range)).collect()
}

fn hash(pool: &dyn Memory, (offset, len): &(u64, u64)) -> Result<u64> {
    Ok(memory::with_bytes(
        pool,
        *offset as usize,
        *len as usize,
        XxHash3_64::oneshot,
    )?)
}
